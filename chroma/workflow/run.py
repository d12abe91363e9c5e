"""Execute an API-format workflow."""

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..devices import best_device
from ..errors import ChromaError, WorkflowError
from ..out_of_memory import telling_out_of_memory
from . import (
    nodes_caching,
    nodes_chroma,
    nodes_core,
    nodes_guidance,
    nodes_inspecting,
    nodes_lora,
    nodes_nag,
    nodes_prompt,
    nodes_sampling,
    nodes_scaling,
    nodes_simple,
)
from .graph import Link, Node, Prompt, check, check_format, label
from .layout import to_interface
from .schema import Registry
from .values import Context

_PARTS = (
    nodes_chroma, nodes_lora, nodes_sampling, nodes_guidance, nodes_nag, nodes_caching, nodes_core,
    nodes_simple, nodes_prompt, nodes_inspecting, nodes_scaling,
)  # fmt: skip
REGISTRY: Registry = {node.id: node for part in _PARTS for node in part.NODES}


def apply_overrides(prompt: Prompt, overrides: Sequence[str]) -> Prompt:
    """A copy with inputs set by "node.input=value".

    `node` is a node's id, its title, or its class where only one node has it. The value is read as
    JSON, or as text where it is none. Raises WorkflowError for a node or input there is not.
    """
    check_format(prompt)
    prompt = json.loads(json.dumps(prompt))
    for override in overrides:
        target, equals, text = override.partition("=")
        said = label(override)
        node_name, dot, input_name = target.rpartition(".")
        if not equals or not dot:
            raise WorkflowError(f"--set {said}: expected node.input=value")
        node_id = _find(prompt, node_name, said)
        node_type = REGISTRY.get(prompt[node_id]["class_type"])
        known = [spec.name for spec in node_type.inputs] if node_type else [input_name]
        if input_name not in known:
            raise WorkflowError(
                f"--set {said}: node {node_id} ({prompt[node_id]['class_type']}) has no input "
                f"{input_name}; expected one of {', '.join(known)}"
            )
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        prompt[node_id].setdefault("inputs", {})[input_name] = value
    return prompt


def _find(prompt: Prompt, name: str, said: str) -> str:
    if name in prompt:
        return name
    for key in ("title", "class"):
        found = [node_id for node_id, node in prompt.items() if _label(node, key) == name]
        if len(found) == 1:
            return found[0]
        if found:
            raise WorkflowError(
                f"--set {said}: {len(found)} nodes are called {label(name)}; "
                f"expected one of the ids {', '.join(found)}"
            )
    labels = [_label(node, key) for node in prompt.values() for key in ("title", "class")]
    near = difflib.get_close_matches(name, [*prompt, *filter(None, labels)], 1)
    hint = f"; did you mean {label(near[0])}?" if near else ""
    raise WorkflowError(f"--set {said}: there is no node {label(name)}{hint}")


def _label(node: dict[str, Any], key: str) -> str:
    return node["class_type"] if key == "class" else str(node.get("_meta", {}).get("title", ""))


def prompts_first(order: Sequence[Node]) -> list[Node]:
    """The same nodes with the prompts ahead, each still behind the ones it depends on.

    So the text encoder, the second largest model, is gone before the transformer is read.
    """
    early: set[str] = set()
    for node in reversed(order):
        makes_prompt = any(kind == "CONDITIONING" for _, kind in node.type.outputs)
        if makes_prompt or node.id in early:
            early |= {node.id, *(link.node for link in node.links)}
    return sorted(order, key=lambda node: node.id not in early)


def branch_by_branch(order: Sequence[Node]) -> list[Node]:
    """The same nodes, each output directly behind what it still needs.

    So a picture is saved before the next one is begun.
    """
    out: dict[str, Node] = {}
    for output in order:
        if output.type.is_output:
            needed = {output.id}
            for node in reversed(order):
                if node.id in needed:
                    needed.update(link.node for link in node.links)
            out |= {node.id: node for node in order if node.id in needed and node.id not in out}
    return list(out.values())


def check_files(order: Sequence[Node], context: Context) -> None:
    """Raises WorkflowError for a missing file before anything is computed."""
    for node in order:
        for spec in node.type.inputs:
            if spec.folder is not None and spec.folder != "output":
                with naming(node):
                    context.locate(spec.folder, node.inputs[spec.name])


@contextmanager
def naming(node: Node) -> Iterator[None]:
    """Put the node's name before the message of any ChromaError, or of memory that ran out."""
    try:
        with telling_out_of_memory():
            yield
    except ChromaError as error:
        raise WorkflowError(f"node {node.id} ({node.type.id}): {error}") from error


@torch.no_grad()
def execute(context: Context) -> None:
    """Run every node the outputs need, once, freeing results that nothing needs any more.

    Raises WorkflowError naming the node where one fails for a reason of the user's.
    """
    order = check(context.prompt, REGISTRY)
    check_files(order, context)
    order = prompts_first(branch_by_branch(order))
    users = Counter(link.node for node in order for link in node.links)
    results: dict[str, tuple[Any, ...]] = {}
    for node in order:
        inputs = {
            name: results[value.node][value.slot] if isinstance(value, Link) else value
            for name, value in node.inputs.items()
        }
        with naming(node):
            results[node.id] = node.type.run(context, **inputs)
        del inputs
        for link in node.links:
            users[link.node] -= 1
            if users[link.node] == 0:
                del results[link.node]


def run_workflow(
    prompt: Prompt,
    *,
    models_dir: Path = Path("models"),
    input_dir: Path = Path("input"),
    output_dir: Path = Path("output"),
    workflow: dict[str, Any] | None = None,
    device: torch.device | None = None,
    progress: bool = False,
) -> list[Path]:
    """Execute a workflow; the pictures it saved.

    Folders are laid out as ComfyUI's. `workflow` is the same graph in the interface's format, to
    be kept in the pictures; where there is none it is made from `prompt`.
    """
    context = Context(
        device or best_device(), models_dir, input_dir, output_dir, prompt,
        workflow or to_interface(prompt, REGISTRY), progress=progress,
    )  # fmt: skip
    execute(context)
    return context.saved
