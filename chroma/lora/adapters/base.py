"""What every adapter is: stored tensors that turn one weight into another.

Shapes: a weight (N, K) has N output features (rows) and K input features (columns); r is a rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import LoraError
from .held import Held
from .steps import Dense, Rows, Step

Weight = Callable[[], Tensor]
# Where shapes are compared without the values.
NOWHERE = torch.device("meta")
# An adapter, its strength, and the rows (first, end) of the weight it is for; None: all.
Placement = tuple["Adapter", float, Rows | None]


class Adapter(Held, ABC):
    """One module's change, in the tensors and the dtype of its file."""

    kind: ClassVar[str]

    @property
    def rank(self) -> int | None:
        """The number of columns of the factors, where the kind has one."""
        return None

    @abstractmethod
    def fit(self, shape: tuple[int, ...]) -> None:
        """Raise LoraError unless the tensors fit each other and a weight of this shape."""

    @abstractmethod
    def change(self, weight: Tensor, strength: float) -> Tensor:
        """The new weight, fp32 and where `weight` (fp32) is, which is left as it was."""

    def step(self, weight: Weight, strength: float) -> Step:
        """The same change as W' = left W right + terms, fp32; `weight()` is W, fp32."""
        return self.dense_step(weight, strength)

    def dense_step(self, weight: Weight, strength: float) -> Step:
        """The change as a matrix: any kind can be written so, at the cost of a second weight."""
        current = weight()
        return Step(terms=(Dense(self.change(current, strength) - current),))


class Additive(Adapter):
    """An adapter that adds the same matrix D to any weight: W' = W + strength D."""

    @abstractmethod
    def delta(self, device: torch.device) -> Tensor:
        """D, fp32, in the weight's shape."""

    def change(self, weight: Tensor, strength: float) -> Tensor:
        return weight + strength * self.delta(weight.device)

    def dense_step(self, weight: Weight, strength: float) -> Step:
        return Step(terms=(Dense(strength * self.delta(next(self.tensors()).device)),))


def changed(weight: Tensor, placements: Sequence[Placement]) -> Tensor:
    """The weight, fp32, after several adapters in their order; `weight` (fp32) stays as it was."""
    for adapter, strength, rows in placements:
        if rows is None:
            weight = adapter.change(weight, strength)
        else:
            part = slice(*rows)
            changed_rows = adapter.change(weight[part], strength)
            weight = weight.clone()
            weight[part] = changed_rows
    return weight


def expect(kind: str, shapes: Mapping[str, tuple[Tensor, Sequence[int]]]) -> None:
    """Raise LoraError unless every named tensor has its shape."""
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != tuple(shape):
            raise LoraError(
                f"{kind}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )


def expect_matrix(kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(N, K) of a weight that must be a matrix; raises LoraError."""
    if len(shape) != 2:
        raise LoraError(f"{kind}: it changes a matrix, but the weight has shape {shape}")
    return shape[0], shape[1]


def matrix(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A factor as an fp32 matrix: some trainers store a linear layer's as a 1x1 convolution's.

    Raises LoraError where it is none.
    """
    if tensor.ndim < 2:
        raise LoraError(f"a factor has shape {tuple(tensor.shape)}, expected a matrix")
    return tensor.to(device or tensor.device, torch.float32).flatten(1)
