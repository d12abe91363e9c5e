"""Products in 8 bits, chosen for a whole model: which layers, how well, and what stays exact."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from chroma_nodes.chroma.checkpoint import load_transformer
from chroma_nodes.chroma.checkpoint.read import read_transformer
from chroma_nodes.chroma.pipeline import Pipeline, Settings, generate
from chroma_nodes.chroma.quant import products
from chroma_nodes.chroma.quant.floats import E4M3, INT8
from chroma_nodes.chroma.quant.fused import can_compile
from chroma_nodes.chroma.quant.gguf_formats import GGUF_FORMATS
from chroma_nodes.chroma.quant.kernels import Kernels
from chroma_nodes.chroma.quant.layers import QuantLinear
from chroma_nodes.chroma.quant.matmul_int8 import has_int8
from chroma_nodes.chroma.quant.products import in_8_bits
from chroma_nodes.chroma.quant.scratch import Scratch
from chroma_nodes.chroma.quant.tensor import QuantTensor
from chroma_nodes.chroma.tiny import files as small
from torch.nn import functional as F

CPU = torch.device("cpu")
ROOM = 10**12
fast = pytest.mark.skipif(not has_int8(CPU), reason="this CPU multiplies no int8 matrices fast")
LINEARS = ("img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2", "txt_attn.qkv",
           "txt_attn.proj", "txt_mlp.0", "txt_mlp.2", "linear1", "linear2")  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def any_device(monkeypatch):
    """A device with every kind of product, as far as the choice of layers goes."""
    monkeypatch.setattr(products, "available", lambda device: Kernels(True, True, {}))


@pytest.mark.parametrize(("kind", "format_"), [("int8", INT8), ("fp8", E4M3)])
def test_only_the_blocks_linears_change(any_device, kind, format_):
    _, state = read_transformer(small.TRANSFORMER)
    found = in_8_bits(state, kind, CPU, ROOM)
    assert list(found) == list(state)
    for name, weight in found.items():
        block, _, layer = name.removesuffix(".weight").partition("_blocks.")
        chosen = block in ("double", "single") and layer.partition(".")[2] in LINEARS
        if not (chosen and name.endswith(".weight")):
            assert weight is state[name]
            continue
        assert weight.format is format_ and weight.eight_bit
        error = (weight.dequantise(torch.float32) - state[name].float()).norm()
        assert error < {"int8": 0.02, "fp8": 0.04}[kind] * state[name].float().norm()


def matrix(format_, **kw):
    data = torch.randint(-100, 100, (64, format_.row_bytes(64)), dtype=torch.int8)
    scale = None if format_.block > 1 else torch.tensor(0.01)
    if format_.block > 1:
        data.view(64, -1, 34).view(torch.float16)[..., 0] = 0.01
    return QuantTensor(format_, data.view(format_.dtype), scale, (64, 64), **kw)


def test_quantised_files(any_device):
    names = [f"double_blocks.0.img_mlp.{i}.weight" for i in (0, 2)]
    mine, q8_0 = matrix(INT8), matrix(GGUF_FORMATS["Q8_0"])
    kept = matrix(E4M3, full_precision=True)
    found = in_8_bits({names[0]: mine, names[1]: q8_0, "img_in.weight": mine}, "int8", CPU, ROOM)
    assert found[names[0]].eight_bit and found[names[0]].data is mine.data
    assert found["img_in.weight"] is mine
    values = q8_0.dequantise(torch.float32)
    error = (found[names[1]].dequantise(torch.float32) - values).abs()
    assert (error <= values.abs().amax(1, keepdim=True) / 127 * 0.50001).all()
    assert in_8_bits({names[0]: kept}, "fp8", CPU, ROOM)[names[0]] is kept


def test_a_device_without_such_products_stays_exact(caplog):
    state = {"double_blocks.0.img_mlp.0.weight": torch.randn(64, 64)}
    assert in_8_bits(state, "fp8", CPU, ROOM) == state
    (message,) = caplog.messages
    assert message.startswith("Products in fp8 are not possible here: needs an NVIDIA GPU")


@fast
def test_a_packed_layer_keeps_its_matrix():
    weight = matrix(INT8, eight_bit=True)
    layer, plain = QuantLinear(weight, None, Scratch()), matrix(INT8)
    x = torch.randn(5, 64)
    layer.pack()
    assert layer.packed is not None and layer.weight.numel() == 0
    assert torch.equal(layer.stored.data, weight.data)
    exact = F.linear(x, weight.dequantise(torch.float32))
    y = layer(x)
    assert not torch.equal(y, exact)
    torch.testing.assert_close(y, exact, rtol=0, atol=0.02 * exact.abs().max().item())
    # Training an adapter needs true gradients.
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantise(torch.float32).sum(0).expand(5, 64))
    assert QuantLinear(plain, None, Scratch()).packed is None


@fast
def test_the_small_model_in_int8(tmp_path):
    model = load_transformer(small.TRANSFORMER, products="int8")
    packed = [n for n, m in model.named_modules() if isinstance(m, QuantLinear) and m.packed]
    double, single = len(model.double_blocks), len(model.single_blocks)
    assert len(packed) == 8 * double + 2 * single
    settings = Settings(width=small.SIZE, height=small.SIZE, steps=6, seed=3)
    pictures = [
        generate(Pipeline.load(products=kind), ["an owl"], "", settings, disable_progress=True)
        for kind in ("exact", "int8")
    ]
    error = (pictures[0] - pictures[1]).square().mean()
    assert 0 < error < 10**-2.5  # above 25 dB


def test_bare_fp8_keeps_its_bytes(any_device):
    name = "double_blocks.0.img_mlp.0.weight"
    bare = replace(matrix(E4M3), scale=None)
    found = in_8_bits({name: bare}, "fp8", CPU, ROOM)[name]
    assert found.eight_bit and found.data is bare.data
    assert torch.equal(found.dequantise(torch.float32), bare.dequantise(torch.float32))


def test_too_little_memory_keeps_the_file_as_it_is(any_device, caplog):
    state = {"double_blocks.0.img_mlp.0.weight": torch.randn(64, 64)}
    assert in_8_bits(state, "int8", CPU, 64 * 64 - 1) == state
    (message,) = caplog.messages
    assert message.startswith("Products in int8 need")


@fast
def test_packed_layers_can_be_copied_and_compiled():
    layer = QuantLinear(matrix(INT8, eight_bit=True), torch.randn(64), Scratch())
    layer.pack()
    x = torch.randn(5, 64)
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), y)
        if can_compile(CPU):
            torch.testing.assert_close(torch.compile(layer)(x), y)


@fast
def test_int8_weights_are_in_memory_once(tmp_path):
    """At the widths of the real model one matrix is 38 MB; packing may add one, not all."""
    code = (
        "import torch, resource\n"
        "from chroma_nodes.chroma.quant.floats import INT8\n"
        "from chroma_nodes.chroma.quant.layers import QuantLinear, pack, place\n"
        "from chroma_nodes.chroma.quant.tensor import QuantTensor\n"
        "from torch import nn\n"
        "with torch.device('meta'):\n"
        "    model = nn.Sequential(*(nn.Linear(3072, 12288, bias=False) for _ in range(8)))\n"
        "def matrix():\n"
        "    data = torch.ones(12288, 3072, dtype=torch.int8)\n"
        "    return QuantTensor(INT8, data, torch.ones(()), (12288, 3072), eight_bit=True)\n"
        "state = {f'{i}.weight': matrix() for i in range(8)}\n"
        "place(model, state, torch.float32)\n"
        "del state\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "pack(model)\n"
        "assert all(layer.packed is not None for layer in model)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2.5 * 38e3  # kB
