"""Check an API-format workflow and put its nodes in order.

API format: {node id: {"class_type": ..., "inputs": {name: value or [node id, slot]}}}.
"""

import json
import math
from collections import deque
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from ..errors import WorkflowError
from .schema import REQUIRED, Input, NodeType, Registry

Prompt = dict[str, Any]

# Bytes of one name in a path; file systems hold 255, and SaveImage puts a number behind it.
MAX_NAME = 240
# How deep lists and objects may lie in each other; links need 4, and Python's JSON fails at 1000.
MAX_NESTING = 100
# Of a value, and of the nodes in a cycle, in messages.
_SHOWN_LETTERS, _SHOWN_NODES = 80, 10


class Link(NamedTuple):
    """An input that comes from another node's output."""

    node: str
    slot: int


@dataclass(frozen=True)
class Node:
    """A checked node: every value converted, every default filled in."""

    id: str
    type: NodeType
    inputs: dict[str, Any]

    @property
    def links(self) -> list[Link]:
        return [value for value in self.inputs.values() if isinstance(value, Link)]


def read_prompt(path: Path) -> Prompt:
    """The JSON of a workflow file. Raises WorkflowError unless it is one in API format."""
    try:
        prompt = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise WorkflowError(f"{path} does not exist; check the name and the folder") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise WorkflowError(
            f"{path.name} is not a JSON file ({str(error).splitlines()[0]}); "
            "export it from ComfyUI with Export (API)"
        ) from None
    check_format(prompt, path.name)
    return prompt


def check_format(prompt: Any, name: str = "the workflow") -> None:
    """Raises WorkflowError unless this looks like an API-format workflow with a node in it."""
    if isinstance(prompt, dict) and "nodes" in prompt and "links" in prompt:
        raise WorkflowError(
            f"{name} is in the format of ComfyUI's interface; "
            "expected API format, so export it with Export (API)"
        )
    shaped = isinstance(prompt, dict) and all(
        label(node_id) == node_id and isinstance(node, dict)
        and isinstance(kind := node.get("class_type"), str) and label(kind) == kind
        and isinstance(node.get("inputs", {}), dict) and isinstance(node.get("_meta", {}), dict)
        for node_id, node in prompt.items()
    )  # fmt: skip
    if not shaped or not prompt:
        raise WorkflowError(
            f"{name} is not a workflow; expected nodes with class_type and inputs, "
            "as ComfyUI's Export (API) writes them"
        )
    if _is_nested_deep(prompt):
        raise WorkflowError(
            f"{name} has values nested more than {MAX_NESTING} deep; export it from ComfyUI again "
            "with Export (API)"
        )


def _is_nested_deep(prompt: Prompt) -> bool:
    """Whether lists and objects lie in each other deeper than MAX_NESTING."""
    level: list[Any] = [prompt]
    for _ in range(MAX_NESTING):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    return bool(level)


def shown(value: Any) -> str:
    """A value as messages show it: on one line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_LETTERS else text[:_SHOWN_LETTERS] + "..."


def label(text: Any) -> str:
    """A name as messages show it: as it is, unless it is no text, too long, or breaks the line."""
    plain = isinstance(text, str) and text.isprintable() and len(text) <= _SHOWN_LETTERS
    return text if plain else shown(text)


def check(prompt: Prompt, registry: Registry) -> list[Node]:
    """Every node the outputs need, each behind the ones it depends on.

    Raises WorkflowError, naming the node, for an unknown kind, a missing input, a value of the
    wrong type or out of range, a broken link, a cycle, or a workflow without an output.
    """
    check_format(prompt)
    for node_id, body in prompt.items():
        if body["class_type"] not in registry:
            raise WorkflowError(
                f"node {node_id} ({body['class_type']}): unknown node; expected one of this "
                "pack's nodes or of the core nodes its workflows use, so run it in ComfyUI"
            )
    nodes = {node_id: _check_node(node_id, prompt, registry) for node_id in prompt}
    outputs = [node_id for node_id, node in nodes.items() if node.type.is_output]
    if not outputs:
        raise WorkflowError("the workflow has no output; add a SaveImage node")
    return _order(nodes, outputs)


def _check_node(node_id: str, prompt: Prompt, registry: Registry) -> Node:
    body = prompt[node_id]
    node_type, given = registry[body["class_type"]], body.get("inputs", {})
    inputs = {}
    for spec in node_type.inputs:
        where = f"node {node_id} ({node_type.id}), input {spec.name}"
        value = given.get(spec.name, spec.default)
        if value is REQUIRED:
            raise WorkflowError(f"{where}: missing; expected {_expected(spec)}")
        if isinstance(value, list):
            inputs[spec.name] = _check_link(where, spec, value, prompt, registry)
        elif spec.is_widget:
            inputs[spec.name] = _convert(where, spec, value)
        elif value is None and spec.default is None:
            inputs[spec.name] = None
        else:
            raise WorkflowError(
                f"{where}: {shown(value)} is not a link; expected {_expected(spec)}"
            )
    return Node(node_id, node_type, inputs)


def _expected(spec: Input) -> str:
    if not spec.is_widget:
        return f'a link to an output of type {spec.type}, as ["node id", slot]'
    if spec.choices is not None:
        return "one of " + ", ".join(spec.choices)
    kinds = {"INT": "a whole number", "FLOAT": "a number", "BOOLEAN": "true or false"}
    text = kinds.get(spec.type, "text")
    if spec.minimum is not None and spec.maximum is not None:
        low, high = (f"{x:g}" if isinstance(x, float) else x for x in (spec.minimum, spec.maximum))
        text += f" from {low} to {high}"
    return text


def _check_link(
    where: str, spec: Input, value: list[Any], prompt: Prompt, registry: Registry
) -> Link:
    shaped = len(value) == 2 and isinstance(value[0], str | int) and type(value[1]) is int
    if not shaped:
        raise WorkflowError(f"{where}: {shown(value)} is not a link; expected {_expected(spec)}")
    link = Link(str(value[0]), value[1])
    if link.node not in prompt:
        raise WorkflowError(f"{where}: linked to node {label(link.node)}, which does not exist")
    source = registry[prompt[link.node]["class_type"]]
    if not 0 <= link.slot < len(source.outputs):
        raise WorkflowError(
            f"{where}: linked to output {link.slot} of node {link.node} ({source.id}), "
            f"which has {len(source.outputs)}"
        )
    offered = source.outputs[link.slot][1]
    if offered != spec.type:
        raise WorkflowError(
            f"{where}: linked to an output of type {offered} of node {link.node} ({source.id}); "
            f"expected type {spec.type}"
        )
    return link


def _convert(where: str, spec: Input, value: Any) -> Any:
    """A widget's value as ComfyUI converts it, checked."""
    wrong = WorkflowError(f"{where}: {shown(value)} is not usable; expected {_expected(spec)}")
    if isinstance(value, dict) or value is None:
        raise wrong
    try:
        converters: dict[str, Any] = {"INT": int, "FLOAT": float, "BOOLEAN": bool}
        value = converters.get(spec.type, str)(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong
    low, high = spec.minimum, spec.maximum
    if (low is not None and value < low) or (high is not None and value > high):
        raise wrong
    if spec.choices is not None and value not in spec.choices:
        raise wrong
    if spec.folder is not None:
        check_name(where, str(value))
    return value


def check_name(where: str, name: str) -> None:
    """Raises WorkflowError for a file name that could lead out of its folder, or is none."""
    for flavour in (PurePosixPath, PureWindowsPath):
        path = flavour(name)
        if path.root or path.drive or ".." in path.parts:
            raise WorkflowError(
                f"{where}: {shown(name)} leads out of its folder; expected a plain file name in it"
            )
    parts = [part.encode("utf-8", "replace") for part in PurePosixPath(name).parts]
    broken = any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in name)
    if not parts or broken or max(map(len, parts)) > MAX_NAME:
        raise WorkflowError(
            f"{where}: {shown(name)} is no file name; expected one of 1 to {MAX_NAME} bytes"
        )


def _order(nodes: dict[str, Node], outputs: list[str]) -> list[Node]:
    needed: set[str] = set()
    queue = deque(outputs)
    while queue:
        node_id = queue.popleft()
        if node_id not in needed:
            needed.add(node_id)
            queue.extend(link.node for link in nodes[node_id].links)
    rank = {node_id: i for i, node_id in enumerate(nodes) if node_id in needed}
    sorter = TopologicalSorter({i: [link.node for link in nodes[i].links] for i in rank})
    try:
        sorter.prepare()
    except CycleError as error:
        ring = error.args[1]
        others = " -> ..." if len(ring) > _SHOWN_NODES else ""
        raise WorkflowError(
            f"node {ring[0]} ({nodes[ring[0]].type.id}): waits for itself in a cycle, "
            f"{' -> '.join(ring[:_SHOWN_NODES])}{others}; remove one of these links"
        ) from None
    order: list[Node] = []
    while sorter.is_active():
        ready = sorter.get_ready()
        order += [nodes[node_id] for node_id in sorted(ready, key=rank.__getitem__)]
        sorter.done(*ready)
    return order
