"""What an adapter does beside a weight that stays as it is: W' = left W right + terms.

Shapes: x (..., K), y (..., N), W (N, K); T tokens; F is K or N.
Transforms keep what they add to the identity: rounded to 16 bits, that costs no more than rounding
y does, where a factor such as 1.003 would be lost.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .held import Held

Rows = tuple[int, int]


class Transform(Held, ABC):
    """A linear map of the last dimension onto itself, (..., F) -> (..., F)."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A new tensor."""

    @abstractmethod
    def adjoint(self) -> "Transform":
        """The map of the transposed matrix."""


@dataclass(frozen=True, eq=False)
class Scale(Transform):
    """x (1 + excess), excess (F,)."""

    excess: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, x, self.excess)

    def adjoint(self) -> "Scale":
        return self


@dataclass(frozen=True, eq=False)
class Rotate(Transform):
    """Blocks of b features times (1 + excess), excess (F / b, b, b), or (1, b, b) for all.

    With `stride`, a block takes b / 2 pairs of features that lie `stride` apart (BOFT's butterfly,
    arXiv:2311.06243), else neighbours.
    """

    excess: Tensor
    stride: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        size = self.excess.shape[-1]
        mixed = x if self.stride is None else _swap(x, (2, self.stride))
        blocks = mixed.unflatten(-1, (-1, size))  # (..., F / b, b)
        blocks = blocks + torch.einsum("nij,...nj->...ni", self.excess, blocks)
        mixed = blocks.flatten(-2)
        return mixed if self.stride is None else _swap(mixed, (self.stride, 2))

    def adjoint(self) -> "Rotate":
        return replace(self, excess=self.excess.mT)


@dataclass(frozen=True, eq=False)
class Within(Transform):
    """A transform of the features `first` to `end`; the others stay."""

    transform: Transform
    rows: Rows

    def __call__(self, x: Tensor) -> Tensor:
        first, end = self.rows
        inner = self.transform(x[..., first:end])
        return torch.cat((x[..., :first], inner, x[..., end:]), dim=-1)

    def adjoint(self) -> "Within":
        return replace(self, transform=self.transform.adjoint())


class Term(Held, ABC):
    """A matrix D added to a weight, in whatever form multiplies fastest."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """D, (N, K)."""

    def product(self, x: Tensor) -> Tensor:
        """D x, (T, K) -> (T, N)."""
        return F.linear(x, self.matrix())

    def after(self, left: Transform) -> "Term":
        """left D."""
        return Dense(left(self.matrix().T).T)

    def before(self, right: Transform) -> "Term":
        """D right."""
        return Dense(right.adjoint()(self.matrix()))

    def padded(self, rows: Rows, size: int) -> "Term":
        """D as the given rows of a matrix of `size` rows, zero elsewhere."""
        return Dense(pad_rows(self.matrix(), rows, size))


@dataclass(frozen=True, eq=False)
class Dense(Term):
    """D itself."""

    values: Tensor

    def matrix(self) -> Tensor:
        return self.values


@dataclass(frozen=True, eq=False)
class Pair(Term):
    """D = up down: up (N, r), down (r, K)."""

    down: Tensor
    up: Tensor

    def matrix(self) -> Tensor:
        return self.up @ self.down

    def after(self, left: Transform) -> "Pair":
        return replace(self, up=left(self.up.T).T)

    def before(self, right: Transform) -> "Pair":
        return replace(self, down=right.adjoint()(self.down))

    def padded(self, rows: Rows, size: int) -> "Pair":
        return replace(self, up=pad_rows(self.up, rows, size))


@dataclass(frozen=True, eq=False)
class Kronecker(Term):
    """D = left (first x second) right: first (a, b), second (c, d), N = a c, K = b d.

    `left` and `right` are applied to vectors in their order.
    """

    first: Tensor
    second: Tensor
    left: tuple[Transform, ...] = ()
    right: tuple[Transform, ...] = ()

    def matrix(self) -> Tensor:
        matrix = torch.kron(self.first, self.second)
        for transform in self.left:
            matrix = transform(matrix.T).T
        for transform in reversed(self.right):
            matrix = transform.adjoint()(matrix)
        return matrix

    def product(self, x: Tensor) -> Tensor:
        for transform in self.right:
            x = transform(x)
        b = self.first.shape[1]
        inner = F.linear(x.unflatten(-1, (b, -1)), self.second)  # (T, b, c)
        y = (self.first @ inner).flatten(-2)  # (T, a, c) -> (T, N)
        for transform in self.left:
            y = transform(y)
        return y

    def after(self, left: Transform) -> "Kronecker":
        return replace(self, left=(*self.left, left))

    def before(self, right: Transform) -> "Kronecker":
        return replace(self, right=(right, *self.right))


@dataclass(frozen=True, eq=False)
class Step:
    """W' = left W right + terms; left and right are applied to vectors in their order."""

    left: tuple[Transform, ...] = ()
    right: tuple[Transform, ...] = ()
    terms: tuple[Term, ...] = ()


def pad_rows(matrix: Tensor, rows: Rows, size: int) -> Tensor:
    """(n, m) -> (size, m): the matrix at its rows, zero elsewhere."""
    first, end = rows
    return F.pad(matrix, (0, 0, first, size - end))


def _swap(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Transpose every run of grid[0] * grid[1] features, (..., F) -> (..., F)."""
    return x.unflatten(-1, (-1, *grid)).mT.flatten(-3)
