"""LoRA (arXiv:2106.09685), with a middle factor, and with rank stabilisation (arXiv:2312.03732)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import LoraError
from .base import NOWHERE, Additive, Weight, expect, expect_matrix, matrix
from .steps import Pair, Step


@dataclass(frozen=True, eq=False)
class LowRank(Additive):
    """D = alpha / r up (mid) down: down (r, K), up (N, r), mid (r, r).

    alpha None stands for r. `rank_stabilised` divides by sqrt(r) instead.
    """

    kind: ClassVar[str] = "lora"

    down: Tensor
    up: Tensor
    mid: Tensor | None = None
    alpha: float | None = None
    rank_stabilised: bool = False

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def fit(self, shape: tuple[int, ...]) -> None:
        n, k = expect_matrix(self.kind, shape)
        down, up = matrix(self.down, NOWHERE), matrix(self.up, NOWHERE)
        if up.shape[1] != self.rank:
            raise LoraError(f"{self.kind}: rank {self.rank} in down, but {up.shape[1]} in up")
        expect(self.kind, {"down": (down, (self.rank, k)), "up": (up, (n, self.rank))})
        if self.mid is not None:
            expect(self.kind, {"mid": (matrix(self.mid, NOWHERE), (self.rank, self.rank))})

    def delta(self, device: torch.device) -> Tensor:
        pair = self._pair(device)
        return self.scale * (pair.up @ pair.down)

    def step(self, weight: Weight, strength: float) -> Step:
        pair = self._pair(self.down.device)
        return Step(terms=(Pair(pair.down, strength * self.scale * pair.up),))

    def _pair(self, device: torch.device) -> Pair:
        up = matrix(self.up, device)
        if self.mid is not None:
            up = up @ matrix(self.mid, device)
        return Pair(matrix(self.down, device), up)
