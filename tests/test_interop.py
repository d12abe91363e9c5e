"""What `quantize` makes, opened by ComfyUI's own loaders and by ComfyUI-GGUF.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment; the
GGUF tests need COMFYUI_GGUF_PATH, the folder of a ComfyUI-GGUF checkout, as well.
"""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import dataclasses
import importlib
import importlib.util
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from chroma_nodes.chroma.checkpoint import read_text_encoder, read_transformer, recipe
from chroma_nodes.chroma.checkpoint.layout import gguf_name
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.config import ChromaConfig
from chroma_nodes.chroma.quant.tensor import QuantTensor
from chroma_nodes.chroma.text.t5 import T5Config, T5Encoder
from chroma_nodes.chroma.transformer import ChromaTransformer
from comfy_inprocess import import_comfyui, random_t5
from oracles import SMALL, random_transformer
from safetensors.torch import save_file

import_comfyui()

import comfy.ldm.chroma.model
import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.text_encoders.t5
import comfy.utils

CPU = torch.device("cpu")
# Rows of whole 256-blocks, and heads as wide as Chroma1's.
CONFIG = dataclasses.replace(SMALL, hidden=256, mlp_hidden=1024)
T5 = T5Config(vocab_size=2048, d_model=256, heads=4, d_kv=64, d_ff=512, layers=2)
# What the model detection of some versions takes for granted.
WIDTHS = {
    "hidden_size": CONFIG.hidden, "num_heads": CONFIG.heads, "context_in_dim": CONFIG.context_dim,
    "out_dim": CONFIG.hidden, "hidden_dim": CONFIG.approximator_hidden,
    "n_layers": CONFIG.approximator_depth,
}  # fmt: skip
# ComfyUI has read `comfy_quant`, and turned the older files into it, since the same version.
READS_SETTINGS = hasattr(comfy.utils, "convert_old_quants")
READS_INT8 = READS_SETTINGS and "int8_tensorwise" in comfy.quant_ops.QUANT_ALGOS
needs_settings = pytest.mark.skipif(
    not READS_SETTINGS, reason="this ComfyUI reads scaled_fp8 files only"
)
needs_int8 = pytest.mark.skipif(not READS_INT8, reason="this ComfyUI reads no int8 files")
# Its products of int8 weights round the inputs to int8, too.
INT8_TOLERANCE = 0.1
SAFETENSORS = [
    "fp8", "fp8-learned", pytest.param("fp8mixed", marks=needs_settings),
    pytest.param("int8", marks=needs_int8),
]  # fmt: skip


@pytest.fixture(scope="module")
def city():
    """ComfyUI-GGUF's `loader`, `dequant` and `ops` modules."""
    folder = os.environ.get("COMFYUI_GGUF_PATH")
    if folder is None:
        pytest.skip("COMFYUI_GGUF_PATH is not set: no ComfyUI-GGUF to test against")
    spec = importlib.util.spec_from_file_location("comfyui_gguf", Path(folder, "__init__.py"))
    # Not executed: it would register nodes, and only a running ComfyUI can do that.
    sys.modules["comfyui_gguf"] = importlib.util.module_from_spec(spec)
    names = "loader", "dequant", "ops"
    yield {name: importlib.import_module(f"comfyui_gguf.{name}") for name in names}
    for name in [n for n in sys.modules if n.partition(".")[0] == "comfyui_gguf"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A small transformer and a small T5 in bf16 files."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(3)
    for name, module in (("chroma", random_transformer(CONFIG)), ("t5", random_t5(config=T5))):
        state = {k: v.bfloat16().contiguous() for k, v in module.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def make(sources, tmp_path):
    """Quantises one of the two sources and reads it back here: the path and the plain values."""

    def make(name, target):
        suffix = "gguf" if target in recipe.GGUF_TARGETS else "safetensors"
        path = tmp_path / f"{name}-{target}.{suffix}"
        quantise_file(sources / f"{name}.safetensors", target, path)
        _, state = (read_transformer if name == "chroma" else read_text_encoder)(path)
        return path, {
            n: t.dequantise(torch.float32) if isinstance(t, QuantTensor) else t.float()
            for n, t in state.items()
        }

    return make


@pytest.fixture
def small_widths(monkeypatch):
    """Detection finds the small model's widths, and the model its number of modulations."""
    detect = comfy.model_detection.detect_unet_config
    host = comfy.ldm.chroma.model.Chroma
    get = host.get_modulations

    def detect_small(*args, **kwargs):
        return {**detect(*args, **kwargs), **WIDTHS}

    def get_small(self, tensor, *args, **kwargs):
        # The last two of 344, whatever the depth, are the last layer's.
        return get(self, tensor[:, : CONFIG.modulations], *args, **kwargs)

    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", detect_small)
    monkeypatch.setattr(host, "get_modulations", get_small)


def transformer_output(model):
    g = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 16, 6, 8, generator=g)
    context = torch.randn(2, 5, CONFIG.context_dim, generator=g)
    sigma = torch.full((2,), 0.7)
    guidance = () if isinstance(model, ChromaTransformer) else (torch.zeros(2),)
    with torch.no_grad():
        return model(latent, sigma, context, *guidance)


def expected_transformer(values):
    model = ChromaTransformer(CONFIG)
    model.load_state_dict(values)
    return transformer_output(model.eval())


def expected_text(values):
    model = T5Encoder(T5)
    model.load_state_dict(values)
    with torch.no_grad():
        return model.eval()(tokens())


def tokens():
    return torch.randint(2, T5.vocab_size, (2, 9), generator=torch.Generator().manual_seed(2))


def host_text(operations, dtype=torch.float32):
    """ComfyUI's T5 at the small width."""
    config = {
        "num_layers": T5.layers, "d_model": T5.d_model, "d_kv": T5.d_kv, "num_heads": T5.heads,
        "d_ff": T5.d_ff, "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True,
        "model_type": "t5", "vocab_size": T5.vocab_size,
    }  # fmt: skip
    return comfy.text_encoders.t5.T5(config, dtype, CPU, operations)


def text_output(model):
    with torch.no_grad():
        return model(tokens(), None)[0]


def near(found, expected, tolerance=1e-4):
    return float((found - expected).abs().max() / expected.std()) <= tolerance


def stored_values(module):
    """What a linear layer of ComfyUI stands for, fp32."""
    if hasattr(module.weight, "dequantize") and type(module.weight) is not torch.nn.Parameter:
        return module.weight.dequantize().float()
    weight = module.weight.float()
    return weight * module.scale_weight if hasattr(module, "scale_weight") else weight


@pytest.mark.parametrize("target", recipe.GGUF_TARGETS)
def test_comfyui_gguf_reads_the_same_values(city, make, target):
    path, values = make("chroma", target)
    theirs, arch = city["loader"].gguf_sd_loader(str(path), return_arch=True)
    assert arch == "flux" and theirs.keys() == values.keys()
    for name, tensor in theirs.items():
        assert tuple(tensor.shape) == tuple(values[name].shape), name
        found = city["dequant"].dequantize_tensor(tensor, torch.float32, torch.float32)
        assert torch.equal(torch.Tensor(found), values[name]), name


@pytest.mark.parametrize("target", recipe.GGUF_TARGETS)
def test_comfyui_gguf_reads_the_same_text_encoder(city, make, target):
    path, values = make("t5", target)
    theirs = city["loader"].gguf_clip_loader(str(path))
    assert theirs.keys() == values.keys()
    for name, tensor in theirs.items():
        found = city["dequant"].dequantize_tensor(tensor, torch.float32, torch.float32)
        assert torch.equal(torch.Tensor(found), values[name]), name


@pytest.mark.parametrize("target", ["q8_0", "q4_k", "f16", "bf16"])
def test_comfyui_gguf_computes_the_same(city, make, small_widths, caplog, target):
    class Operations(city["ops"].GGMLOps):
        class Linear(city["ops"].GGMLOps.Linear):
            # An option of its loader; by default it loses a few bits in fp16.
            dequant_dtype = torch.float32

    path, values = make("chroma", target)
    state = city["loader"].gguf_sd_loader(str(path))
    with caplog.at_level(logging.INFO):
        patcher = comfy.sd.load_diffusion_model_state_dict(
            state, model_options={"custom_operations": Operations, "dtype": torch.float32}
        )
    for complaint in ("unet missing", "unet unexpected", "left over keys"):
        assert complaint not in caplog.text
    found = transformer_output(patcher.model.diffusion_model)
    assert near(found, expected_transformer(values))


@pytest.mark.parametrize("target", ["q8_0", "q4_k"])
def test_comfyui_gguf_encodes_text_the_same(city, make, target):
    path, values = make("t5", target)

    class Operations(city["ops"].GGMLOps):
        class Linear(city["ops"].GGMLOps.Linear):
            dequant_dtype = torch.float32

        class Embedding(city["ops"].GGMLOps.Embedding):
            dequant_dtype = torch.float32

    model = host_text(Operations)
    missing, unexpected = model.load_state_dict(
        city["loader"].gguf_clip_loader(str(path)), strict=False
    )
    assert not missing and not unexpected
    assert near(text_output(model), expected_text(values))


@pytest.mark.parametrize("target", SAFETENSORS)
def test_comfyui_loads_the_values_of_the_file(make, small_widths, caplog, target):
    path, values = make("chroma", target)
    with caplog.at_level(logging.INFO):
        patcher = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
    assert "unet unexpected" not in caplog.text and "left over keys" not in caplog.text
    model = patcher.model.diffusion_model
    linears = {n: m for n, m in model.named_modules() if f"{n}.weight" in values}
    linears = {n: m for n, m in linears.items() if values[f"{n}.weight"].ndim == 2}
    assert {f"{n}.weight" for n in linears} == {n for n, t in values.items() if t.ndim == 2}
    for name, module in linears.items():
        weight, bias = f"{name}.weight", f"{name}.bias"
        if not READS_SETTINGS:
            # It casts what a scaled_fp8 file keeps in 16 bits: some layers, and all biases.
            cast = (bias, weight) if weight.startswith(recipe.SENSITIVE) else (bias,)
            values |= {n: values[n].to(torch.float8_e4m3fn).float() for n in cast}
        assert torch.equal(stored_values(module), values[weight]), name
        assert torch.equal(module.bias.float(), values[bias]), name
    found, expected = transformer_output(model), expected_transformer(values)
    assert near(found, expected, INT8_TOLERANCE if target == "int8" else 1e-4)


@pytest.mark.parametrize("target", SAFETENSORS)
def test_comfyui_loads_the_values_of_a_text_encoder(make, target):
    path, values = make("t5", target)
    if READS_SETTINGS:
        state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        state, _ = comfy.utils.convert_old_quants(state, model_prefix="", metadata=metadata)
        settings = comfy.utils.detect_layer_quantization(state, "")
        assert settings is not None
        operations = comfy.ops.mixed_precision_ops(settings, torch.float32, full_precision_mm=True)
        model = host_text(operations)
    else:
        state = comfy.utils.load_torch_file(str(path))
        marker = state.pop("scaled_fp8")
        operations = comfy.ops.scaled_fp8_ops(fp8_matrix_mult=False, override_dtype=marker.dtype)
        model = host_text(operations)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    for name, module in model.named_modules():
        if isinstance(module, operations.Linear):
            assert torch.equal(stored_values(module), values[f"{name}.weight"]), name
    tolerance = INT8_TOLERANCE if target == "int8" else 1e-4
    assert near(text_output(model), expected_text(values), tolerance)


def test_names_and_shapes_at_full_size_are_those_of_comfyui():
    """Published GGUF files and stable-diffusion.cpp have these names, too."""
    with torch.device("meta"):
        ours = ChromaTransformer(ChromaConfig()).state_dict()
    written = {gguf_name(name): tensor for name, tensor in ours.items()}
    config = comfy.model_detection.model_config_from_unet(written, "")
    host = comfy.ldm.chroma.model.Chroma(
        **config.unet_config, device="meta", operations=comfy.ops.disable_weight_init
    ).state_dict()
    found = config.process_unet_state_dict(written)
    assert len(found) == 643
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in host.items()}
