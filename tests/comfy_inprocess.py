"""ComfyUI imported into the test process (COMFYUI_PATH names its checkout), and small weights."""

import inspect
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chroma_nodes.chroma.autoencoder import Autoencoder, AutoencoderConfig
from chroma_nodes.chroma.text.t5 import T5Config, T5Encoder
from chroma_nodes.chroma.tiny import files as small
from oracles import SMALL, random_transformer
from safetensors.torch import save_file

COMFYUI = os.environ.get("COMFYUI_PATH")
TEXT = T5Config(vocab_size=2048, d_model=SMALL.context_dim, heads=2, d_kv=16, d_ff=64, layers=2)
PICTURES = AutoencoderConfig(channels=32, multipliers=(1, 1, 2, 2), res_blocks=1)


def import_comfyui() -> None:
    """Make `import comfy` work, on the CPU, or skip the module. ComfyUI reads sys.argv."""
    if COMFYUI is None:
        pytest.skip("COMFYUI_PATH is not set", allow_module_level=True)
    if COMFYUI not in sys.path:
        sys.path.insert(0, COMFYUI)
    argv, sys.argv = sys.argv, ["comfyui", "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.sd
    finally:
        sys.argv = argv


def complaint(node: Any, **values: Any) -> str | None:
    """What is said of a node's inputs before it is queued, by its menus and by itself."""
    from chroma_nodes.nodes.menus import wrong_choice

    if wrong := wrong_choice(node, values):
        return wrong
    own = vars(node).get("validate_inputs")
    if own is None:
        return None
    names = list(inspect.signature(own.__func__).parameters)[1:]
    told = own.__func__(node, **{name: values.get(name) for name in names})
    return None if told is True else told


def random_t5(seed: int = 0, config: T5Config = TEXT) -> T5Encoder:
    """A T5 whose random weights give outputs that depend on every token."""
    torch.manual_seed(seed)
    return T5Encoder(config).eval()


def random_autoencoder(seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(PICTURES).eval()


def write_small_files(folder: Path) -> dict[str, Path]:
    """Random small weights in the layout of ComfyUI's model folders: {category: file}."""
    modules = {
        "diffusion_models": random_transformer(),
        "text_encoders": random_t5(),
        "vae": random_autoencoder(),
    }
    files = {}
    for category, module in modules.items():
        file = folder / category / "random.safetensors"
        file.parent.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, file)
        files[category] = file
    beside = files["text_encoders"].with_name("tokenizer.json")
    beside.write_bytes(small.TOKENIZER.read_bytes())
    return files
