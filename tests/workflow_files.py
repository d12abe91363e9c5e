"""The workflows that ship, and how to run them on the small model."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.tiny import files as small
from lora_files import write_lora
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
API = sorted((ROOT / "workflows" / "api").glob("*.json"))
UI = sorted((ROOT / "workflows").glob("*.json"))
INPUTS = ROOT / "workflows" / "api" / "inputs"

FILE_INPUTS = ("model_name", "text_encoder_name", "vae_name")
GGUF = ".gguf"
LORA_STRENGTH = 0.05


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def on_small_model(prompt: dict[str, Any], *, own_files: bool = False) -> dict[str, Any]:
    """The same graph with the small model's files, at its size, in fp32.

    With `own_files` GGUF files and LoRAs keep the names that `write_models` gives them. Without,
    the small model's own file stands in for GGUF, and no LoRA is applied.
    """
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        inputs = node["inputs"]
        for name in FILE_INPUTS:
            if name in inputs and not (own_files and inputs[name].endswith(GGUF)):
                inputs[name] = small.LABEL
        if "weight_dtype" in inputs:
            inputs["weight_dtype"] = "fp32"
        for side in ("width", "height"):
            if isinstance(inputs.get(side), int):
                inputs[side] = small.SIZE
    return prompt if own_files else _without_loras(prompt)


def _without_loras(prompt: dict[str, Any]) -> dict[str, Any]:
    """The graph around its LoRA loaders, with the preset in the place of the flash LoRA."""
    moved = {}
    for node_id, node in list(prompt.items()):
        inputs = node["inputs"]
        if node["class_type"] == "ChromaLoadLora":
            moved |= {(node_id, 0): inputs["model"], (node_id, 1): inputs["clip"]}
            del prompt[node_id]
        elif node["class_type"] == "ChromaFlashLora":
            node["class_type"] = "ChromaPreset"
            node["inputs"] = {"model": inputs["model"], "preset": "Flash"}
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][name] = moved.get(tuple(value), value)
    return prompt


def few_steps(prompt: dict[str, Any], steps: int = 2) -> dict[str, Any]:
    """The same graph with so many steps wherever they are a widget."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = steps
    return prompt


def write_models(models: Path) -> None:
    """The GGUF files and LoRAs that the workflows name, made from the small model."""
    sources = {"diffusion_models": small.TRANSFORMER, "text_encoders": small.TEXT_ENCODER}
    for folder in (*sources, "loras"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(small.TOKENIZER, models / "text_encoders" / "tokenizer.json")
    matrices = {
        key: value
        for key, value in load_file(small.TRANSFORMER).items()
        if value.ndim == 2 and "_blocks." in key
    }
    for node in (node for path in API for node in load(path).values()):
        inputs = node["inputs"]
        for name, folder in zip(FILE_INPUTS, sources, strict=False):
            if str(inputs.get(name, "")).endswith(GGUF):
                target = models / folder / inputs[name]
                quantise_file(sources[folder], "q8_0", target) if not target.exists() else None
        if "lora_name" in inputs:
            write_lora(models / "loras" / inputs["lora_name"], matrices, size=LORA_STRENGTH)
