"""Compiled forms of functions give the bits of the plain ones, or are not used."""

import pytest
import torch
from chroma_nodes.chroma.quant import expand as expand_module
from chroma_nodes.chroma.quant.expand import expand
from chroma_nodes.chroma.quant.floats import E4M3, E5M2, INT8
from chroma_nodes.chroma.quant.fused import Fused, can_compile
from chroma_nodes.chroma.quant.gguf_formats import GGUF_FORMATS
from chroma_nodes.chroma.quant.layers import QuantLinear
from chroma_nodes.chroma.quant.matmul_int8 import quantise_tokens
from chroma_nodes.chroma.quant.scratch import Scratch
from chroma_nodes.chroma.quant.tensor import QuantTensor
from torch.nn import functional as F

compiles = pytest.mark.skipif(
    not can_compile(torch.device("cpu")), reason="there is no C++ compiler here"
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def stored(format_, scale_shape, rows=96, columns=256):
    """A random stored matrix with finite values."""
    if format_.block > 1:
        data = torch.randint(0, 256, (rows, columns // 32, 34), dtype=torch.uint8)
        data.view(torch.float16)[..., 0] = torch.rand(rows, columns // 32).half()
        return QuantTensor(format_, data.view(rows, -1), None, (rows, columns))
    values = torch.randn(rows, columns) * 30
    dtype = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2, INT8: torch.int8}[format_]
    scale = torch.rand(rows, 1) if scale_shape == "rows" else torch.rand(())
    return QuantTensor(format_, values.to(dtype).view(format_.dtype), scale, (rows, columns))


@compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("format_", "scale_shape"),
    [(GGUF_FORMATS["Q8_0"], None), (INT8, "one"), (INT8, "rows"), (E4M3, "one"), (E4M3, "rows"),
     (E5M2, "one")],
)  # fmt: skip
def test_compiled_expansion(monkeypatch, caplog, format_, scale_shape, dtype):
    monkeypatch.setattr(expand_module, "_WORTH_COMPILING", 0)
    fused = Fused()
    with caplog.at_level("INFO", "chroma"):
        for rows in (96, 96, 40):  # the second one is the compiled form's, at any number of rows
            weight = stored(format_, scale_shape, rows)
            out = torch.full(weight.shape, 7, dtype=dtype)
            expand(weight, out, fused)
            assert torch.equal(out, weight.dequantise(dtype))
    assert not caplog.messages  # no falling back to the plain form


@compiles
def test_compiled_tokens(caplog):
    """2**20 values, which are worth compiling for."""
    x = (torch.randn(512, 2048) * torch.logspace(-3, 3, 512)[:, None]).bfloat16()
    x[5] = 0
    scratch = Scratch()
    with caplog.at_level("INFO", "chroma"):
        for zero_point in (0, 128, 0, 128):
            integers, scale = quantise_tokens(x, zero_point, scratch)
            error = ((integers.double() - zero_point) * scale.double() - x.double()).abs()
            assert (error <= scale.double() * 0.50001).all()
            assert (integers.long() - zero_point).abs().max() == 127
    assert not caplog.messages


def double(x, out):
    out.copy_(x * 2)


@compiles
def test_a_form_that_gives_other_results_is_not_used(caplog):
    x, out, fused = torch.randn(9, 4), torch.empty(9, 4), Fused()
    with caplog.at_level("INFO", "chroma"):
        for _ in range(2):
            fused.run(lambda: out.copy_(x * 3), double, (x,), (out,))
            assert torch.equal(out, x * 3)
    assert caplog.messages == ["double runs without a compiler: its results differ"]


def broken(x, out):
    out.copy_(x.nonexistent())


@compiles
def test_a_form_that_does_not_compile_is_not_used(caplog):
    x, out, fused = torch.randn(9, 4), torch.empty(9, 4), Fused()
    with caplog.at_level("INFO", "chroma"):
        for _ in range(2):
            fused.run(lambda: out.copy_(x * 3), broken, (x,), (out,))
            assert torch.equal(out, x * 3)
    (message,) = caplog.messages
    assert message.startswith("broken runs without a compiler: ")


@compiles
def test_a_form_that_fails_later_is_given_up(caplog, monkeypatch):
    """As when its compiler has to work again and cannot: for another setting, or over a limit."""
    x, out, fused = torch.randn(9, 4), torch.empty(9, 4), Fused()
    fused.run(lambda: out.copy_(x * 2), double, (x,), (out,))
    (key,) = fused._forms

    def fail(*_):
        out.fill_(7)
        raise RuntimeError("recompile limit\nand a long story")

    monkeypatch.setitem(fused._forms, key, fail)
    with caplog.at_level("INFO", "chroma"):
        for _ in range(2):
            fused.run(lambda: out.copy_(x * 2), double, (x,), (out,))
            assert torch.equal(out, x * 2)
    assert caplog.messages == ["double runs without a compiler: recompile limit"]


@compiles
def test_each_width_is_seen_to_be_right(caplog):
    fused, checked = Fused(), []
    for width in (4, 8, 4, 8):
        x, out = torch.randn(9, width), torch.empty(9, width)

        def plain(x=x, out=out):
            checked.append(x.shape[1])
            out.copy_(x * 2)

        fused.run(plain, double, (x,), (out,))
        assert torch.equal(out, x * 2)
    assert checked == [4, 8]


def test_without_a_compiler_the_plain_form_runs(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert not can_compile(torch.device("cpu"))
    x, out, fused = torch.randn(9, 4), torch.empty(9, 4), Fused()
    for _ in range(2):
        fused.run(lambda: out.copy_(x * 3), double, (x,), (out,))
        assert torch.equal(out, x * 3)


@compiles
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K"])
def test_a_compiled_model_computes_the_same(name):
    """What ComfyUI's compile nodes do: the stored matrix is expanded within the compiled code."""
    format_ = GGUF_FORMATS[name]
    data = torch.randint(0, 60, (64, format_.row_bytes(256)), dtype=torch.uint8)
    weight = QuantTensor(format_, data, None, (64, 256))
    layer, x = QuantLinear(weight, torch.randn(64), Scratch()), torch.randn(5, 256)
    with torch.no_grad():
        y = torch.compile(layer, fullgraph=True)(x)
        expected = F.linear(x, weight.dequantise(torch.float32), layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
