"""Adapters that run beside a layer's weight, which stays as it is stored.

Shapes: x (..., K), y (..., N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

# (x, bias or None) -> the layer's own product with that bias, in a new tensor
Product = Callable[[Tensor, Tensor | None], Tensor]


class Beside(Protocol):
    """What is added around a weight's product, such as LoRAs composed into one pair."""

    @property
    def additive(self) -> bool:
        """Whether the product stays as it is, so that it may contain the bias."""
        ...

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor it holds."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> Beside:
        """The same elsewhere."""
        ...

    def apply(
        self, x: Tensor, product: Callable[[Tensor], Tensor], bias: Tensor | None = None
    ) -> Tensor:
        """y, from x in the dtype and on the device of its tensors."""
        ...


class Layer:
    """A layer that may have adapters beside its weight."""

    affine: Beside | None = None

    def adapted(self, x: Tensor, product: Product, bias: Tensor | None) -> Tensor:
        """y in x's dtype; the adapters follow x to its device."""
        affine = self.affine
        if affine is None:
            return product(x, bias)
        # All its tensors are where the first one is.
        held = next(affine.tensors(), x)
        if held.device != x.device or held.dtype != x.dtype:
            self.affine = affine = affine.to(x.device, x.dtype)
        if affine.additive:
            return affine.apply(x, lambda x: product(x, bias))
        return affine.apply(x, lambda x: product(x, None), bias)
