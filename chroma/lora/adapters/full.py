"""Changes stored whole: differences, new weights, and IA3's factors."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import LoraError
from .base import NOWHERE, Adapter, Additive, Weight, expect_matrix
from .steps import Dense, Scale, Step


@dataclass(frozen=True, eq=False)
class Diff(Additive):
    """D itself, for a weight of any shape: a matrix, a bias, a norm's scale."""

    kind: ClassVar[str] = "diff"

    diff: Tensor

    def fit(self, shape: tuple[int, ...]) -> None:
        _expect_whole(self.kind, self.diff, shape)

    def delta(self, device: torch.device) -> Tensor:
        return _whole(self.diff, device)


@dataclass(frozen=True, eq=False)
class SetWeight(Adapter):
    """W' = W + strength (value - W), for a weight of any shape."""

    kind: ClassVar[str] = "set"

    value: Tensor

    def fit(self, shape: tuple[int, ...]) -> None:
        _expect_whole(self.kind, self.value, shape)

    def change(self, weight: Tensor, strength: float) -> Tensor:
        return torch.lerp(weight, _whole(self.value, weight.device), strength)

    def step(self, weight: Weight, strength: float) -> Step:
        value = _whole(self.value, self.value.device)
        keep = Scale(torch.full_like(value[:, 0], -strength))
        return Step(left=(keep,), terms=(Dense(strength * value),))


@dataclass(frozen=True, eq=False)
class IA3(Adapter):
    """W (1 + strength factor): factor (K,) of the columns if `on_input`, else (N,) of the rows.

    LyCORIS' form of arXiv:2205.05638.
    """

    kind: ClassVar[str] = "ia3"

    factor: Tensor
    on_input: bool

    def fit(self, shape: tuple[int, ...]) -> None:
        features = expect_matrix(self.kind, shape)[int(self.on_input)]
        if self.factor.numel() != features:
            raise LoraError(
                f"{self.kind}: {self.factor.numel()} factors, expected {features} for {shape}"
            )

    def change(self, weight: Tensor, strength: float) -> Tensor:
        excess = self._excess(weight.device, strength)
        return weight + weight * (excess if self.on_input else excess[:, None])

    def step(self, weight: Weight, strength: float) -> Step:
        scale = (Scale(self._excess(self.factor.device, strength)),)
        return Step(right=scale) if self.on_input else Step(left=scale)

    def _excess(self, device: torch.device, strength: float) -> Tensor:
        return strength * self.factor.to(device, torch.float32).flatten()


def _expect_whole(kind: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(_whole(tensor, NOWHERE).shape) != shape:
        raise LoraError(f"{kind}: the tensor has shape {tuple(tensor.shape)}, expected {shape}")


def _whole(tensor: Tensor, device: torch.device) -> Tensor:
    """fp32, with a 1x1 convolution's matrix as a matrix."""
    whole = tensor.to(device, torch.float32)
    return whole if whole.ndim < 3 else whole.flatten(1)
