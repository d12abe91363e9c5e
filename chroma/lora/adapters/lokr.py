"""LoKr: the Kronecker product of two small matrices (LyCORIS, arXiv:2309.14859)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import LoraError
from .base import NOWHERE, Additive, Weight, expect_matrix, matrix
from .steps import Kronecker, Step

# A matrix, or the two of which it is the product: (a (n, r), b (r, k)).
Factor = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class LoKr(Additive):
    """D = alpha / r (w1 x w2), the Kronecker product: w1 (a, b), w2 (c, d), N = a c, K = b d.

    r is that of w2 where it is given as two factors, else that of w1. Where both are whole
    matrices nothing is scaled, whatever alpha says.
    """

    kind: ClassVar[str] = "lokr"

    w1: Factor
    w2: Factor
    alpha: float | None = None

    @property
    def rank(self) -> int | None:
        for factor in (self.w2, self.w1):
            if not isinstance(factor, Tensor):
                return factor[1].shape[0]
        return None

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        if self.rank is None or self.alpha is None:
            return 1.0
        return self.alpha / self.rank

    def fit(self, shape: tuple[int, ...]) -> None:
        n, k = expect_matrix(self.kind, shape)
        (a, b), (c, d) = _shape(self.w1, "w1"), _shape(self.w2, "w2")
        if (a * c, b * d) != (n, k):
            raise LoraError(
                f"{self.kind}: ({a}, {b}) x ({c}, {d}) makes ({a * c}, {b * d}), expected {shape}"
            )

    def delta(self, device: torch.device) -> Tensor:
        return self.scale * torch.kron(_whole(self.w1, device), _whole(self.w2, device))

    def step(self, weight: Weight, strength: float) -> Step:
        device = next(self.tensors()).device
        first = strength * self.scale * _whole(self.w1, device)
        return Step(terms=(Kronecker(first, _whole(self.w2, device)),))


def _shape(factor: Factor, name: str) -> tuple[int, int]:
    if isinstance(factor, Tensor):
        n, k = matrix(factor, NOWHERE).shape
        return n, k
    a, b = matrix(factor[0], NOWHERE), matrix(factor[1], NOWHERE)
    if a.shape[1] != b.shape[0]:
        raise LoraError(f"lokr: rank {b.shape[0]} in {name}_b, but {a.shape[1]} in {name}_a")
    return a.shape[0], b.shape[1]


def _whole(factor: Factor, device: torch.device) -> Tensor:
    if isinstance(factor, Tensor):
        return matrix(factor, device)
    return matrix(factor[0], device) @ matrix(factor[1], device)
