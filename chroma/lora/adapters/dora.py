"""DoRA: a change of direction and a magnitude of its own (arXiv:2402.09353)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import LoraError
from .base import Adapter, Additive, Weight, expect_matrix
from .steps import Scale, Step


@dataclass(frozen=True, eq=False)
class DoRA(Adapter):
    """W' = magnitude (W + D) / ||W + D||, of rows (magnitude (N,)) or else of columns ((K,)).

    D is the inner adapter's whole change. The strength interpolates: W + strength (W' - W).
    """

    kind: ClassVar[str] = "dora"

    inner: Adapter
    magnitude: Tensor
    per_row: bool

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    def fit(self, shape: tuple[int, ...]) -> None:
        features = expect_matrix(self.kind, shape)[int(not self.per_row)]
        if self.magnitude.numel() != features:
            raise LoraError(
                f"{self.kind}: {self.magnitude.numel()} magnitudes, expected {features} for the "
                f"{'rows' if self.per_row else 'columns'} of {shape}"
            )
        self.inner.fit(shape)

    def change(self, weight: Tensor, strength: float) -> Tensor:
        merged = self.inner.change(weight, 1.0)
        gain = self._gain(merged)
        return torch.lerp(weight, merged * (gain[:, None] if self.per_row else gain), strength)

    def step(self, weight: Weight, strength: float) -> Step:
        """Rows: y = (1 + s (g - 1)) W x + s g D x, where g = magnitude / ||W + D||."""
        if not isinstance(self.inner, Additive):
            return self.dense_step(weight, strength)
        excess = self._gain(self.inner.change(weight(), 1.0)) - 1
        terms, scale = self.inner.step(weight, strength).terms, Scale(excess)
        base = (Scale(strength * excess),)
        if self.per_row:
            return Step(left=base, terms=tuple(term.after(scale) for term in terms))
        return Step(right=base, terms=tuple(term.before(scale) for term in terms))

    def _gain(self, merged: Tensor) -> Tensor:
        """The factor of every row or column of W + D."""
        norm = merged.norm(dim=1 if self.per_row else 0) + torch.finfo(merged.dtype).eps
        return self.magnitude.to(merged).flatten() / norm
