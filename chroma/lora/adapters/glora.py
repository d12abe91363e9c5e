"""GLoRA as LyCORIS has it (arXiv:2306.07967): a low-rank change of the input, and a LoRA."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import LoraError
from .base import NOWHERE, Adapter, Weight, expect, expect_matrix, matrix
from .steps import Pair, Step


@dataclass(frozen=True, eq=False)
class GLoRA(Adapter):
    """W' = W + strength alpha / r (W a1 a2 + b1 b2): a1 (K, r), a2 (r, K), b1 (N, r), b2 (r, K).

    alpha None stands for r. Before version 2 LyCORIS stored each pair with the names exchanged.
    """

    kind: ClassVar[str] = "glora"

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return min(matrix(self.a1, NOWHERE).shape)

    @property
    def scale(self) -> float:
        """What both products are multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def fit(self, shape: tuple[int, ...]) -> None:
        n, k = expect_matrix(self.kind, shape)
        a1, a2, b1, b2 = self._factors(NOWHERE)
        r = self.rank
        if not a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0] == r:
            raise LoraError(f"{self.kind}: the ranks of a1, a2, b1 and b2 differ")
        shapes = {"a1": (a1, (k, r)), "a2": (a2, (r, k)), "b1": (b1, (n, r)), "b2": (b2, (r, k))}
        expect(self.kind, shapes)

    def change(self, weight: Tensor, strength: float) -> Tensor:
        a1, a2, b1, b2 = self._factors(weight.device)
        return weight + strength * self.scale * ((weight @ a1) @ a2 + b1 @ b2)

    def step(self, weight: Weight, strength: float) -> Step:
        """W a1 is known once W is: both parts are one pair of rank 2r."""
        current = weight()
        a1, a2, b1, b2 = self._factors(current.device)
        up = strength * self.scale * torch.cat((current @ a1, b1), dim=1)  # (N, 2r)
        return Step(terms=(Pair(torch.cat((a2, b2)), up),))

    def _factors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a1 (K, r), a2 (r, K), b1 (N, r), b2 (r, K), whichever names the file gives them."""
        a1, a2, b1, b2 = (matrix(t, device) for t in (self.a1, self.a2, self.b1, self.b2))
        return (a1, a2, b1, b2) if a1.shape[0] >= a1.shape[1] else (a2, a1, b2, b1)
