"""The GPU kernels against plain torch, in Triton's interpreter, which needs no GPU."""

import importlib
import importlib.util
import sys

import numpy as np
import pytest
import torch
from chroma_nodes.chroma import ops
from torch.nn import functional as F

gguf = pytest.importorskip("gguf")
if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def kernels():
    """The module over a triton that interprets, whatever has imported triton before."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(sys.modules):
            if name.split(".")[0] == "triton" and not name.startswith("triton._C"):
                patch.delitem(sys.modules, name)
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("chroma_nodes.chroma.quant.triton_kernels")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def q8_0(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes (N, K/32*34) and what the gguf package says they stand for."""
    values = (torch.randn(rows, columns) * 0.02).numpy()
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
    return torch.from_numpy(data), torch.from_numpy(np.ascontiguousarray(expected))


def same(found: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether fp32 values were converted once: the interpreter cuts bf16 off, GPUs round."""
    cut = values.view(torch.int32).bitwise_and(-65536).view(torch.float32)
    rounded = torch.equal(found, values.to(found.dtype))
    return rounded or (found.dtype == torch.bfloat16 and torch.equal(found, cut.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_q8_0_values_are_exact(kernels, dtype) -> None:
    data, expected = q8_0(7, 96)  # 21 blocks: less than one group
    assert same(kernels.dequantise_q8_0(data, dtype), expected)
    data, expected = q8_0(5, 2048)  # 320 blocks: several groups
    out = torch.empty(5, 2048, dtype=dtype)
    assert kernels.dequantise_q8_0(data, dtype, out) is out
    assert same(out, expected)


@pytest.mark.parametrize("tokens", [1, 16, 37])
@pytest.mark.parametrize("bias", [False, True])
def test_q8_0_product(kernels, tokens, bias) -> None:
    data, weight = q8_0(70, 160)
    x, b = torch.randn(tokens, 160), torch.randn(70) if bias else None
    y = kernels.linear_q8_0(x, data, b)
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_q8_0_product_refuses_many_tokens(kernels) -> None:
    data, _ = q8_0(16, 32)
    with pytest.raises(ValueError, match="128 tokens at most, not 129"):
        kernels.linear_q8_0(torch.zeros(129, 32), data, None)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_e4m3_values_are_exact(kernels, rows, dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(3, 5)  # all but NaN; more than one tile
    scale = torch.tensor([[0.3], [0.01], [7.0]]) if rows else torch.tensor(0.017)
    expected = codes.view(torch.float8_e4m3fn).float() * scale
    assert same(kernels.dequantise_e4m3(codes, scale, dtype), expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("width", [48, 64])
def test_ada_layer_norm(kernels, batch, width) -> None:
    x = torch.randn(2, 3, width) * 5 + 2
    shift, scale = torch.randn(batch, 1, width), torch.randn(batch, 1, width)
    expected = ops.modulate(F.layer_norm(x, (width,), eps=1e-6), shift, scale)
    torch.testing.assert_close(kernels.ada_layer_norm(x, shift, scale), expected)


def test_rms_norm(kernels) -> None:
    x, scale = torch.randn(2, 3, 4, 24) * 5, torch.randn(24)
    norm = ops.RMSNorm(24)
    norm.scale.data.copy_(scale)
    torch.testing.assert_close(kernels.rms_norm(x, scale), norm(x).detach())


def test_rope(kernels) -> None:
    ids = torch.randint(0, 60, (5, 3)).float()
    table = ops.rope_table(ids, (4, 8, 12), 10_000.0)
    x = torch.randn(2, 3, 5, 24)
    torch.testing.assert_close(kernels.apply_rope(x, table), ops.apply_rope(x, table))


def test_half_precision_is_rounded_once(kernels) -> None:
    x = torch.randn(1, 4, 64).half()
    shift, scale = torch.randn(1, 1, 64).half(), torch.randn(1, 1, 64).half()
    exact = F.layer_norm(x.double(), (64,), eps=1e-6) * (1 + scale.double()) + shift.double()
    error = (kernels.ada_layer_norm(x, shift, scale).double() - exact).abs()
    assert (error <= exact.abs() * 2**-11 + 1e-6).all()
