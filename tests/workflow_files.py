"""The workflows that ship, and how to run them on the small model."""

import copy
import json
from pathlib import Path
from typing import Any

from chroma_nodes.chroma.tiny import files as small

ROOT = Path(__file__).resolve().parent.parent
API = sorted((ROOT / "workflows" / "api").glob("*.json"))
UI = sorted((ROOT / "workflows").glob("*.json"))
INPUTS = ROOT / "workflows" / "api" / "inputs"

FILE_INPUTS = ("model_name", "text_encoder_name", "vae_name")


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def on_small_model(prompt: dict[str, Any]) -> dict[str, Any]:
    """The same graph with the small model's files, at its size, in fp32."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        inputs = node["inputs"]
        for name in FILE_INPUTS:
            if name in inputs:
                inputs[name] = small.LABEL
        if "weight_dtype" in inputs:
            inputs["weight_dtype"] = "fp32"
        for side in ("width", "height"):
            if isinstance(inputs.get(side), int):
                inputs[side] = small.SIZE
    return prompt
