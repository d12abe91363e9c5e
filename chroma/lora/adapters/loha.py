"""LoHa: the Hadamard product of two low-rank matrices (FedPara, arXiv:2108.06098)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import LoraError
from .base import NOWHERE, Additive, Weight, expect, expect_matrix, matrix
from .steps import Pair, Step


@dataclass(frozen=True, eq=False)
class LoHa(Additive):
    """D = alpha / r (w1_a w1_b) * (w2_a w2_b), elementwise: a (N, r), b (r, K). alpha None: r."""

    kind: ClassVar[str] = "loha"

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def fit(self, shape: tuple[int, ...]) -> None:
        n, k = expect_matrix(self.kind, shape)
        for a, b, name in ((self.w1_a, self.w1_b, "w1"), (self.w2_a, self.w2_b, "w2")):
            up, down = matrix(a, NOWHERE), matrix(b, NOWHERE)
            r = down.shape[0]
            if up.shape[1] != r:
                raise LoraError(f"{self.kind}: rank {r} in {name}_b, but {up.shape[1]} in {name}_a")
            expect(self.kind, {f"{name}_a": (up, (n, r)), f"{name}_b": (down, (r, k))})

    def delta(self, device: torch.device) -> Tensor:
        w1 = matrix(self.w1_a, device) @ matrix(self.w1_b, device)
        w2 = matrix(self.w2_a, device) @ matrix(self.w2_b, device)
        return self.scale * w1 * w2

    def step(self, weight: Weight, strength: float) -> Step:
        """A pair of rank r^2 by the Khatri-Rao product, where that is less work than a matrix."""
        device = self.w1_a.device
        ups = matrix(self.w1_a, device), matrix(self.w2_a, device)
        downs = matrix(self.w1_b, device), matrix(self.w2_b, device)
        (n, r1), (r2, k) = ups[0].shape, downs[1].shape
        if 2 * r1 * r2 * (n + k) > n * k:
            return self.dense_step(weight, strength)
        up = torch.einsum("ni,nj->nij", *ups).flatten(1)  # (N, r1 r2)
        down = torch.einsum("ik,jk->ijk", *downs).flatten(0, 1)  # (r1 r2, K)
        return Step(terms=(Pair(down, strength * self.scale * up),))
