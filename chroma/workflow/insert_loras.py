"""LoRAs of the command line as nodes of the workflow, right behind its loaders."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.reader import read_header
from ..config import ChromaConfig
from ..errors import CheckpointError, WorkflowError
from ..lora.arguments import LoraArgument
from ..lora.names import name_table, resolve
from ..lora.spelling import split_suffix
from .graph import Prompt, check_format
from .schema import Registry

NODE, FOLDER = "ChromaLoadLora", "loras"
Output = tuple[str, int]


def lora_files(loras: Sequence[LoraArgument]) -> dict[tuple[str, str], Path]:
    """Where the files are that the inserted nodes name, as a Context wants it."""
    return {(FOLDER, name): lora.path for lora, name in zip(loras, _names(loras), strict=True)}


def insert_loras(prompt: Prompt, loras: Sequence[LoraArgument], registry: Registry) -> Prompt:
    """A copy in which every loaded MODEL goes through all the LoRAs.

    So does every CLIP, where a file changes the text encoder. Raises WorkflowError where LoRAs are
    asked for and no node loads a MODEL.
    """
    check_format(prompt)
    prompt = json.loads(json.dumps(prompt))
    models, clips = _loaded(prompt, registry, "MODEL"), _loaded(prompt, registry, "CLIP")
    if not loras:
        return prompt
    if not models:
        raise WorkflowError("--lora: no node of the workflow loads a MODEL; add Load Chroma Model")
    chain = _Chain(loras, taken=set(prompt))
    moved: dict[Output, Output] = {}
    for i in range(max(len(models), len(clips))):
        has_own = i < len(models)
        model, clip = models[i if has_own else 0], clips[i] if i < len(clips) else None
        ends = chain.add(model, clip, has_own)
        moved |= {model: ends[0]} if has_own else {}
        moved |= {} if clip is None or ends[1] is None else {clip: ends[1]}
    for node in prompt.values():
        for name, value in node.get("inputs", {}).items():
            if isinstance(value, list) and len(value) == 2:
                node["inputs"][name] = list(moved.get((str(value[0]), value[1]), value))
    return {**prompt, **chain.nodes}


@dataclass
class _Chain:
    """Makes the nodes, one behind the other."""

    loras: Sequence[LoraArgument]
    taken: set[str]
    nodes: Prompt = field(default_factory=dict)

    def add(
        self, model: Output, clip: Output | None, change_model: bool
    ) -> tuple[Output, Output | None]:
        """Where MODEL and CLIP come out at the end."""
        for lora, name in zip(self.loras, _names(self.loras), strict=True):
            takes_clip = clip is not None and _changes_text(lora.path)
            if not (takes_clip or change_model):
                continue
            inputs: dict[str, Any] = {
                "model": list(model), "lora_name": name,
                "strength": lora.strength if change_model else 0.0,
                "text_encoder_strength": lora.strength, "how": "auto", "blocks": "",
            }  # fmt: skip
            node_id = self._new_id()
            if clip is not None and takes_clip:
                inputs["clip"] = list(clip)
                clip = (node_id, 1)
            self.nodes[node_id] = {
                "class_type": NODE, "inputs": inputs, "_meta": {"title": f"LoRA {name}"},
            }  # fmt: skip
            model = (node_id, 0)
        return model, clip

    def _new_id(self) -> str:
        number = len(self.nodes) + 1
        while (node_id := f"lora{number}") in self.taken:
            number += 1
        self.taken.add(node_id)
        return node_id


def _names(loras: Sequence[LoraArgument]) -> list[str]:
    """One name per file: its own, with a number before it where two files share it."""
    paths = list(dict.fromkeys(lora.path for lora in loras))
    names: dict[Path, str] = {}
    for path in paths:
        taken = [other.name for other in names].count(path.name)
        names[path] = f"{taken + 1}-{path.name}" if taken else path.name
    return [names[lora.path] for lora in loras]


def _changes_text(path: Path) -> bool:
    """Whether a file has tensors for the text encoder; one that is no file has none."""
    table = name_table(ChromaConfig())
    try:
        names = read_header(path).tensors
    except CheckpointError:  # told by the node that reads it
        return False
    spelled = (split_suffix(name) for name in names)
    targets = (resolve(one[0], table) for one in spelled if one is not None)
    return any(target is not None and target.text_encoder for target in targets)


def _loaded(prompt: Prompt, registry: Registry, kind: str) -> list[Output]:
    """Every output of this kind that does not come out of another one of it."""
    found = []
    for node_id, node in prompt.items():
        node_type = registry.get(node["class_type"])
        if node_type is None or any(spec.type == kind for spec in node_type.inputs):
            continue
        found += [
            (node_id, slot) for slot, (_, type_) in enumerate(node_type.outputs) if type_ == kind
        ]
    return found
