"""fp8 products, by torch's CPU reference kernel, against float64 by the formula."""

import pytest
import torch
from chroma_nodes.chroma.quant import matmul_fp8
from chroma_nodes.chroma.quant.kernels import available
from chroma_nodes.chroma.quant.matmul_fp8 import has_fp8_matmul, linear_fp8, quantise_e4m3
from torch import Tensor


def _runs(**scales: Tensor) -> bool:
    """Whether this torch's CPU kernel takes such scales: it came late, those by row later."""
    a = torch.zeros(16, 16, dtype=torch.float8_e4m3fn)
    try:
        torch._scaled_mm(a, a.t(), out_dtype=torch.bfloat16, **scales)
    except (AttributeError, RuntimeError):
        return False
    return True


ONE, ROWS = torch.ones(()), torch.ones(16, 1)
pytestmark = pytest.mark.skipif(
    not (_runs(scale_a=ONE, scale_b=ONE) and _runs(scale_a=ROWS, scale_b=ROWS.t())),
    reason="this torch has no fp8 product on CPUs",
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def stored(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """e4m3 bytes and their values in fp64."""
    weight = (torch.randn(rows, columns) * 20).to(torch.float8_e4m3fn)
    return weight.view(torch.uint8), weight.double()


def oracle(x: Tensor, x_scale: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """Quantised x times W in float64, (M, K) by (N, K) -> (M, N)."""
    codes = (x.float() / x_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (codes.double() * x_scale.double()) @ (values * scale.double()).t()


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("row_scales", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("input_scale", [None, 0.02])
def test_product(monkeypatch, by_row, row_scales, dtype, input_scale) -> None:
    monkeypatch.setattr(matmul_fp8, "has_row_scales", lambda device: by_row)
    weight, values = stored(48, 64)
    scale = torch.rand(48, 1) * 0.01 if row_scales else torch.tensor(0.003)
    x = (torch.randn(2, 9, 64) * torch.logspace(-2, 1, 18).view(2, 9, 1)).to(dtype)
    before, bias = x.clone(), torch.randn(48)
    y = linear_fp8(x, weight, scale, bias, input_scale)
    assert y.shape == (2, 9, 48) and y.dtype == dtype and torch.equal(x, before)
    flat = x.view(-1, 64).float()
    largest = flat.abs().amax(-1, keepdim=True) if by_row else flat.abs().amax().view(1, 1)
    x_scale = largest / 448 if input_scale is None else torch.full((1, 1), input_scale)
    expected = oracle(flat, x_scale, values, scale).view(2, 9, 48) + bias.double()
    # bf16: one rounding of the product, one of the sum with the bias
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2e-2)


def test_each_token_has_its_own_scale() -> None:
    weight, values = stored(16, 32)
    x = torch.randn(2, 32)
    x[1] *= 1e-4  # below e4m3's smallest number at the first token's scale
    y = linear_fp8(x, weight, torch.tensor(1.0), None)
    exact = x.double() @ values.t()
    assert ((y - exact).norm(dim=-1) / exact.norm(dim=-1) < 0.1).all()


def test_large_values_are_limited_in_a_copy() -> None:
    x = torch.tensor([[1000.0, -500.0, 448.0, 1.0]])
    codes = quantise_e4m3(x, torch.tensor(1.0))
    assert codes.float().tolist() == [[448.0, -448.0, 448.0, 1.0]]
    assert x[0, 0] == 1000


def test_edges() -> None:
    weight, _ = stored(16, 32)
    one = torch.tensor(1.0)
    assert linear_fp8(torch.zeros(2, 0, 32), weight, one, None).shape == (2, 0, 16)
    assert not linear_fp8(torch.zeros(3, 32), weight, one, None).any()
    with pytest.raises(ValueError, match=r"multiples of 16, not a weight \(15, 32\)"):
        linear_fp8(torch.zeros(3, 32), weight[:15], one, None)


def test_a_cpu_has_no_fp8_units() -> None:
    cpu = torch.device("cpu")
    assert not has_fp8_matmul(cpu)
    kernels = available(cpu)
    assert not kernels.fp8_matmul and "8.9" in kernels.reasons["fp8_matmul"]
    assert set(kernels.reasons) == {"int8", "fp8_matmul"}
