"""8-bit integer products against the same sums in int64 and float64."""

import pytest
import torch
from chroma_nodes.chroma.quant.matmul_int8 import (
    has_int8,
    linear_int8,
    prepack,
    quantise_tokens,
)
from chroma_nodes.chroma.quant.round_int8 import quantise_int8
from torch import Tensor

CPU = torch.device("cpu")
fast = pytest.mark.skipif(not has_int8(CPU), reason="this CPU multiplies no int8 matrices fast")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def oracle(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Integers summed in int64, scaled in float64: (M, K) by (N, K) -> (M, N)."""
    token_scale = (x.float().abs().amax(-1, keepdim=True) / 127).bfloat16().double()
    token_scale[token_scale == 0] = 1
    tokens = (x.double() / token_scale).round().long()
    assert tokens.abs().max() <= 127
    y = (tokens @ weight.long().t()).double() * token_scale * scale.double().flatten()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_quantised_to_nearest(dtype) -> None:
    weight = (torch.randn(9, 40) * torch.logspace(-6, 3, 9)[:, None]).to(dtype)
    weight[4] = 0
    data, scale = quantise_int8(weight)
    assert data.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (9, 1)
    absmax = weight.double().abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale[absmax > 0].double(), absmax[absmax > 0] / 127)
    assert (data[absmax[:, 0] > 0].abs().amax(-1) == 127).all()
    error = (data.double() * scale.double() - weight.double()).abs()
    assert (error <= scale.double() * 0.50001).all()
    assert not data[4].any()


@pytest.mark.parametrize("zero_point", [0, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tokens_are_quantised_to_nearest(dtype, zero_point) -> None:
    x = (torch.randn(300, 40) * torch.logspace(-3, 3, 300)[:, None]).to(dtype)
    x[7] = 0
    integers, scale = quantise_tokens(x, zero_point)
    assert integers.dtype == (torch.uint8 if zero_point else torch.int8)
    assert scale.dtype == torch.bfloat16
    error = ((integers.double() - zero_point) * scale.double() - x.double()).abs()
    assert (error <= scale.double() * 0.50001).all()
    assert (integers.long() - zero_point).abs().max() == 127


def test_no_scale_carries_an_integer_past_its_range() -> None:
    absmax = torch.linspace(1, 2, 4001)[:, None]
    integers, _ = quantise_tokens(torch.cat([absmax, -absmax], 1))
    assert torch.equal(integers, torch.tensor([[127, -127]], dtype=torch.int8).expand(4001, 2))


@fast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 48), (3, 17, 48), (200, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_product_is_the_integer_one(dtype, shape, bias) -> None:
    weight, scale = quantise_int8(torch.randn(80, 48) * 0.05)
    x, b = torch.randn(shape).to(dtype), torch.randn(80).to(dtype) if bias else None
    y = linear_int8(x, prepack(weight), scale, b)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 80)
    expected = oracle(x.reshape(-1, 48), weight, scale, b).view(y.shape)
    # bf16 rounds the sum and then its scaled value, relative to the larger of sum and bias
    rtol = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=rtol * 4)


@fast
def test_sums_are_exact_at_the_models_widths() -> None:
    weight = torch.full((16, 12288), 127, dtype=torch.int8)
    x = torch.full((2, 12288), 3.0)
    y = linear_int8(x, prepack(weight), torch.ones(16, 1), None)
    scale = torch.tensor(3 / 127).bfloat16().item()
    torch.testing.assert_close(
        y, torch.full((2, 16), 127.0 * 127 * 12288 * scale), rtol=1e-6, atol=0
    )


@fast
def test_one_scale_for_the_whole_matrix() -> None:
    weight, x = torch.randint(-127, 128, (24, 32), dtype=torch.int8), torch.randn(5, 32)
    scale = torch.tensor(0.02)
    y = linear_int8(x, prepack(weight), scale, None)
    torch.testing.assert_close(y.double(), oracle(x, weight, scale, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 31, 33, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_product_of_gpus(tokens, dtype) -> None:
    """torch's own int8 product, whose CPU form takes any shape."""
    weight, scale = quantise_int8(torch.randn(64, 48) * 0.05)
    x, bias = torch.randn(tokens, 48).to(dtype), torch.randn(64).to(dtype)
    y = linear_int8(x, weight, scale, bias)
    rtol = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}[dtype]
    expected = oracle(x, weight, scale, bias)
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=rtol * 4)


def test_no_tokens() -> None:
    weight, scale = quantise_int8(torch.randn(24, 32))
    assert linear_int8(torch.zeros(2, 0, 32), weight, scale, None).shape == (2, 0, 24)


@fast
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_spoils_only_itself(value) -> None:
    weight, scale = quantise_int8(torch.randn(24, 32))
    x = torch.randn(3, 32)
    x[1, 4] = value
    y = linear_int8(x, prepack(weight), scale, None)
    assert y[[0, 2]].isfinite().all() and not y[1].isfinite().any()
