"""Orthogonal fine-tuning: a weight turned, not added to.

OFT (arXiv:2306.07280) and BOFT (arXiv:2311.06243) as LyCORIS stores them turn the output, OFTv2
(arXiv:2506.19847) the input. A skew-symmetric Q is turned into a rotation by Cayley's transform.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import LoraError
from .base import Adapter, Weight, expect, expect_matrix
from .steps import Rotate, Scale, Step, Transform


class Orthogonal(Adapter):
    """An adapter that is a transform of the output or of the input."""

    @abstractmethod
    def turn(self, strength: float, device: torch.device) -> Step:
        """The change as a step without terms, fp32."""

    def change(self, weight: Tensor, strength: float) -> Tensor:
        step = self.turn(strength, weight.device)
        for left in step.left:
            weight = left(weight.T).T
        for right in reversed(step.right):
            weight = right.adjoint()(weight)
        return weight

    def step(self, weight: Weight, strength: float) -> Step:
        return self.turn(strength, next(self.tensors()).device)


@dataclass(frozen=True, eq=False)
class OFT(Orthogonal):
    """W + strength (rescale R^T W - W), R block-diagonal: blocks (n, b, b), rescale (N,), N = n b.

    Q = blocks - blocks^T, whose norm `constraint` times N limits, where it is positive.
    """

    kind: ClassVar[str] = "oft"

    blocks: Tensor
    rescale: Tensor | None = None
    constraint: float | None = None

    def fit(self, shape: tuple[int, ...]) -> None:
        n, _ = expect_matrix(self.kind, shape)
        size = _block_size(self.kind, self.blocks, 3)
        expect(self.kind, {"oft_blocks": (self.blocks, (n // size, size, size))})
        _expect_blocks(self.kind, n, size)
        _expect_rescale(self.kind, self.rescale, n)

    def turn(self, strength: float, device: torch.device) -> Step:
        rotation = _rotation(self.blocks, self.constraint, device).mT
        if self.rescale is not None:
            rescale = self.rescale.to(rotation).reshape(*rotation.shape[:2], 1)
            rotation = rescale * rotation
        return Step(left=(Rotate(strength * (rotation - _identity(rotation))),))


@dataclass(frozen=True, eq=False)
class BOFT(Orthogonal):
    """m stages of rotations: blocks (m, n, b, b), rescale (N,), N = n b; see Rotate for the order.

    The strength interpolates every stage, and the rescaling, towards the identity.
    """

    kind: ClassVar[str] = "boft"

    blocks: Tensor
    rescale: Tensor | None = None
    constraint: float | None = None

    def fit(self, shape: tuple[int, ...]) -> None:
        n, _ = expect_matrix(self.kind, shape)
        size, stages = _block_size(self.kind, self.blocks, 4), self.blocks.shape[0]
        expect(self.kind, {"oft_blocks": (self.blocks, (stages, n // size, size, size))})
        _expect_blocks(self.kind, n, 2 ** (stages - 1) * size)
        _expect_rescale(self.kind, self.rescale, n)

    def turn(self, strength: float, device: torch.device) -> Step:
        rotation = _rotation(self.blocks, self.constraint, device)
        excess, half = rotation - _identity(rotation), rotation.shape[-1] // 2
        left: list[Transform] = [
            Rotate(strength * stage, stride=2**i * half) for i, stage in enumerate(excess)
        ]
        if self.rescale is not None:
            left.append(Scale(strength * (self.rescale.to(rotation).flatten() - 1)))
        return Step(left=tuple(left))


@dataclass(frozen=True, eq=False)
class OFTv2(Orthogonal):
    """W + strength (W R^T - W), R block-diagonal: vectors (n, b (b - 1) / 2) or (1, ...), K = n b.

    A vector is Q above the diagonal, row by row; one vector serves all blocks. `neumann`: R is
    I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4, as it is trained, else PEFT's exact (I - Q) (I + Q)^-1.
    `scaled` (OneTrainer): the vectors are divided by 2 sqrt(b - 1) first.
    """

    kind: ClassVar[str] = "oftv2"

    vectors: Tensor
    neumann: bool = True
    scaled: bool = False

    def fit(self, shape: tuple[int, ...]) -> None:
        _, k = expect_matrix(self.kind, shape)
        if self.vectors.ndim != 2:
            raise LoraError(f"{self.kind}: oft_R has shape {tuple(self.vectors.shape)}")
        blocks, elements = self.vectors.shape
        size = self._size()
        if size * (size - 1) != 2 * elements or k % size or blocks not in (1, k // size):
            raise LoraError(
                f"{self.kind}: oft_R of shape ({blocks}, {elements}) makes no blocks of {k} columns"
            )

    def turn(self, strength: float, device: torch.device) -> Step:
        size = self._size()
        vectors = self.vectors.to(device, torch.float32)
        if self.scaled:
            vectors = vectors / (2 * (size - 1) ** 0.5)
        q = vectors.new_zeros(len(vectors), size, size)
        above = torch.triu_indices(size, size, 1, device=device)
        q[:, above[0], above[1]] = vectors
        excess = self._rotation(q - q.mT).mT - _identity(q)
        return Step(right=(Rotate(strength * excess),))

    def _rotation(self, q: Tensor) -> Tensor:
        one = _identity(q)
        if self.neumann:
            square = q @ q
            return one + 2 * q + square @ (2 * one + 2 * q + square)
        return torch.linalg.solve(one + q, one - q, left=False)

    def _size(self) -> int:
        """b, of the number of elements above the diagonal."""
        return round((1 + (1 + 8 * self.vectors.shape[1]) ** 0.5) / 2)


def _rotation(blocks: Tensor, constraint: float | None, device: torch.device) -> Tensor:
    """(..., b, b) -> (I + Q) (I - Q)^-1, fp32."""
    blocks = blocks.to(device, torch.float32)
    q = blocks - blocks.mT
    if constraint is not None and constraint > 0:
        # A stage of BOFT has all N features, as OFT has.
        limit = constraint * blocks.shape[-3] * blocks.shape[-1]
        q = q * (limit / (q.norm() + 1e-8)).clamp(max=1.0)
    one = _identity(q)
    return torch.linalg.solve(one - q, one + q, left=False)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _block_size(kind: str, blocks: Tensor, ndim: int) -> int:
    """b of a tensor that must have so many dimensions; raises LoraError."""
    if blocks.ndim != ndim:
        raise LoraError(
            f"{kind}: oft_blocks has shape {tuple(blocks.shape)}, expected {ndim} dimensions"
        )
    return blocks.shape[-1]


def _expect_blocks(kind: str, features: int, size: int) -> None:
    if features % size:
        raise LoraError(f"{kind}: {features} rows do not divide into blocks of {size}")


def _expect_rescale(kind: str, rescale: Tensor | None, features: int) -> None:
    if rescale is not None and rescale.numel() != features:
        raise LoraError(f"{kind}: {rescale.numel()} rescale factors, expected {features}")
