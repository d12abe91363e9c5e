"""Products in 8 bits inside ComfyUI, whose loader is asked for them.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment.
"""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import pytest
import torch
from chroma_nodes.chroma.quant.matmul_int8 import has_int8
from comfy_inprocess import import_comfyui

import_comfyui()

import comfy.sd
from chroma_nodes.nodes import host, host_model
from test_comfy_quant import CPU, QKV, case, lora, plain, run, state, write

__all__ = ["state"]  # the fixture
fast = pytest.mark.skipif(not has_int8(CPU), reason="this CPU multiplies no int8 matrices fast")


@pytest.fixture
def files(tmp_path, state):
    return write("Q8_0", state, tmp_path)


def load(path, choice="int8"):
    return host_model.load_model(path, choice)


def packed(patcher):
    modules = patcher.model.diffusion_model.named_modules()
    return {name for name, module in modules if getattr(module, "packed", None) is not None}


@fast
def test_the_blocks_multiply_in_int8(files):
    path, meant = files
    patcher = load(path)
    assert QKV in packed(patcher)
    assert all("_blocks." in name for name in packed(patcher))
    with torch.no_grad():
        expected = plain(meant)(*case())
    y = run(patcher).float()
    assert 0 < (y - expected).std() <= 0.05 * expected.std()
    assert not packed(load(path, "auto"))


@fast
def test_a_lora_and_nodes_that_merge_get_the_values(files):
    path, meant = files
    patcher = load(path)
    before = run(patcher)
    factors, delta = lora()
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, factors, 0.7, 0.0)
    merged = {**meant, f"{QKV}.weight": meant[f"{QKV}.weight"] + 0.7 * delta}
    with torch.no_grad():
        expected = plain(merged)(*case())
    y = run(patched).float()
    assert (y - expected).std() <= 0.05 * expected.std()
    assert (y - before.float()).std() > 0.2 * expected.std()
    assert torch.equal(run(patcher), before)
    (weight, convert), *_ = patcher.get_key_patches()[f"diffusion_model.{QKV}.weight"]
    error = (convert(weight, inplace=True) - meant[f"{QKV}.weight"]).abs().max()
    assert error <= meant[f"{QKV}.weight"].abs().max() / 127


def test_a_device_without_fp8_products_says_so_and_stays_exact(files, caplog):
    path, _ = files
    y = run(load(path, "fp8"))
    (message,) = [m for m in caplog.messages if "Products" in m]
    assert message.startswith("Products in fp8 are not possible here: needs an NVIDIA GPU")
    assert torch.equal(y, run(load(path, "auto")))


def test_the_menu_of_the_transformer_offers_them():
    assert host.MODEL_DTYPE_CHOICES == ["auto", "bf16", "fp16", "fp32", "int8", "fp8"]
