"""Products with stored matrices against `F.linear` with their values."""

import pytest
import torch
from chroma_nodes.chroma.quant.floats import E4M3, INT8
from chroma_nodes.chroma.quant.matmul_exact import linear
from chroma_nodes.chroma.quant.scratch import Scratch
from chroma_nodes.chroma.quant.tensor import QuantTensor
from torch import Tensor
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def e4m3(rows: int, columns: int) -> tuple[QuantTensor, Tensor]:
    """A stored matrix and, by torch's own cast, its values in fp32."""
    stored = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.037)
    weight = QuantTensor(E4M3, stored.view(torch.uint8), scale, (rows, columns))
    return weight, stored.float() * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 64), (64,), (2000, 64), (0, 64), (2, 0, 64)])
@pytest.mark.parametrize("scratch", [None, Scratch()])
def test_equals_the_product_with_the_values(dtype, shape, scratch) -> None:
    weight, values = e4m3(300, 64)  # more rows than are decoded at a time
    x, bias = torch.randn(shape).to(dtype), torch.randn(300).to(dtype)
    assert torch.equal(linear(x, weight, bias, scratch), F.linear(x, values.to(dtype), bias))
    assert torch.equal(linear(x, weight, None, scratch), F.linear(x, values.to(dtype)))


def test_scales_by_row() -> None:
    data, scale = torch.randint(-127, 128, (9, 16), dtype=torch.int8), torch.rand(9, 1)
    x = torch.randn(4, 16)
    y = linear(x, QuantTensor(INT8, data, scale, (9, 16)), None, Scratch())
    assert torch.equal(y, F.linear(x, data.float() * scale))


def test_layers_of_different_shapes_share_the_scratch() -> None:
    scratch, layers = Scratch(), [e4m3(*s) for s in ((8, 16), (64, 32), (16, 24), (8, 16))]
    for _ in range(2):
        for weight, values in layers:
            x = torch.randn(3, weight.shape[1])
            assert torch.equal(linear(x, weight, None, scratch), F.linear(x, values))


def test_scratch_grows_to_the_largest_need_only() -> None:
    scratch, cpu = Scratch(), torch.device("cpu")
    large = scratch.take((10, 20), torch.float32, cpu)
    small = scratch.take((4, 5), torch.float32, cpu)
    assert small.shape == (4, 5) and small.is_contiguous()
    assert small.data_ptr() == large.data_ptr()
    assert scratch.take((10, 20), torch.float32, cpu).data_ptr() == large.data_ptr()
    assert scratch.take((20, 20), torch.float32, cpu).untyped_storage().nbytes() == 1600
    other = scratch.take((4, 5), torch.bfloat16, cpu)
    assert other.dtype == torch.bfloat16
    assert other.data_ptr() != scratch.take((4, 5), torch.float32, cpu).data_ptr()


@pytest.mark.parametrize("scratch", [None, Scratch()])
def test_gradients_through_layers_that_share_a_scratch(scratch) -> None:
    first, first_values = e4m3(24, 16)
    second, second_values = e4m3(16, 24)
    x = torch.randn(2, 5, 16, dtype=torch.float64).float().requires_grad_()
    bias = torch.randn(24, requires_grad=True)
    linear(linear(x, first, bias, scratch).tanh(), second, None, scratch).square().sum().backward()
    found = x.grad, bias.grad
    x.grad = bias.grad = None
    F.linear(F.linear(x, first_values, bias).tanh(), second_values).square().sum().backward()
    torch.testing.assert_close(found, (x.grad, bias.grad), rtol=1e-5, atol=1e-6)


def test_backward_keeps_no_expanded_matrix() -> None:
    weight, _ = e4m3(256, 128)
    kept: list[int] = []
    x = torch.randn(2, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        linear(x, weight, None, Scratch())
    assert max(kept, default=0) < weight.numel()


def test_a_scratch_first_used_in_inference_mode_serves_training() -> None:
    scratch, (weight, values) = Scratch(), e4m3(8, 16)
    with torch.inference_mode():
        linear(torch.randn(2, 16), weight, None, scratch)
    x = torch.randn(2, 16, requires_grad=True)
    linear(x, weight, None, scratch).sum().backward()
    torch.testing.assert_close(x.grad, values.sum(0).expand(2, 16))
