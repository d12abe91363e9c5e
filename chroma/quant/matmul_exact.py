"""Products with a stored matrix, equal to those with its values written out in the input's dtype.

Shapes: N output features, K input features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .scratch import Scratch
from .tensor import QuantTensor


def linear(
    x: Tensor, weight: QuantTensor, bias: Tensor | None, scratch: Scratch | None = None
) -> Tensor:
    """`F.linear(x, weight.dequantise(x.dtype), bias)` to the last bit, (..., K) -> (..., N).

    The expanded matrix is not kept for a backward pass but expanded again.
    """
    wanted = x.requires_grad or (bias is not None and bias.requires_grad)
    if wanted and torch.is_grad_enabled():
        return _Product.apply(x, bias, weight, scratch)  # pyright: ignore[reportReturnType]
    return F.linear(x, _expand(weight, x.dtype, scratch), bias)


def _expand(weight: QuantTensor, dtype: torch.dtype, scratch: Scratch | None) -> Tensor:
    if torch.compiler.is_compiling():  # of the whole model: it plans its memory itself
        return weight.rows(slice(None)).to(dtype)
    if scratch is None:
        return weight.dequantise(dtype)
    with torch.no_grad():
        return scratch.expand(weight, dtype)


class _Product(torch.autograd.Function):
    """The product for training adapters beside frozen stored matrices."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: QuantTensor, scratch: Scratch | None
    ) -> Tensor:
        ctx.weight, ctx.scratch = weight, scratch
        return F.linear(x, _expand(weight, x.dtype, scratch), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ _expand(ctx.weight, grad.dtype, ctx.scratch)
        if ctx.needs_input_grad[1]:
            bias_grad = grad.flatten(0, -2).sum(0)
        return x_grad, bias_grad, None, None
