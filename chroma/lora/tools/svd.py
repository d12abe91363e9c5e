"""Singular value decompositions of differences of weights, of products of factors, and quantiles.

Shapes: a matrix (N, K), a rank r; factors up (N, r) and down (r, K), whose product is the matrix.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .rules import RankRule

# Columns beyond the rank that is looked for (Halko, Martinsson, Tropp 2011, section 4.2).
_OVERSAMPLING = 16
# A sweep that lowers the squared error by less than this part of it is the last.
_SETTLED = 1e-4
_MOST_SWEEPS = 12
# Above this part of the smaller side, the whole decomposition costs no more.
_WORTHWHILE = 1 / 6
_ROWS = 1024


class Factors(NamedTuple):
    """up (N, r) and down (r, K), fp32, each with the root of the singular values in it."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class Truncated(NamedTuple):
    """The factors kept, and what they leave out: |D - up down| / |D|, Frobenius."""

    factors: Factors
    error: float


def truncate_product(up: Tensor, down: Tensor, rule: RankRule) -> Truncated:
    """The best factors of the rank that `rule` chooses for up (N, R) down (R, K), exactly.

    Two QR decompositions leave an R x R matrix with the product's singular values.
    """
    left, small_up = torch.linalg.qr(up.double())
    right, small_down = torch.linalg.qr(down.double().T)
    u, values, vh = torch.linalg.svd(small_up @ small_down.T)
    rank = rule.choose(values)
    total = float(values.square().sum())
    lost = float(values[rank:].square().sum())
    root = values[:rank].sqrt()
    factors = Factors(
        (left @ (u[:, :rank] * root)).float(),
        ((root[:, None] * vh[:rank]) @ right.T).float(),
    )
    return Truncated(factors, math.sqrt(lost / total) if total else 0.0)


def truncate_matrix(matrix: Tensor, rule: RankRule) -> Truncated:
    """The best factors of the rank that `rule` chooses for a matrix, fp32 (N, K).

    For a small rank by block power iteration (Halko et al. 2011, algorithm 4.4), which ends when
    the error has settled: within 0.1 % of the least possible (Eckart-Young). Else, and wherever it
    has not settled, from the eigenvectors of the smaller Gram matrix in fp64, exact to rounding.
    """
    if matrix.shape[0] > matrix.shape[1]:
        turned = truncate_matrix(matrix.T, rule)
        return Truncated(
            Factors(turned.factors.down.T.contiguous(), turned.factors.up.T.contiguous()),
            turned.error,
        )
    total = _energy(matrix)
    if total == 0:
        empty = Factors(matrix.new_zeros(matrix.shape[0], 1), matrix.new_zeros(1, matrix.shape[1]))
        return Truncated(empty, 0.0)
    found = _by_power_iteration(matrix, rule, total) if rule.counts_only else None
    left, values = found or _by_gram(matrix)
    rank = rule.choose(values)
    root = values[:rank].sqrt()
    left = left[:, :rank]
    # A value of zero has no direction of its own: its rows stay zero.
    down = (left.T @ matrix) / torch.where(root > 0, root, 1.0)[:, None]
    lost = max(0.0, total - float(values[:rank].double().square().sum()))
    return Truncated(Factors(left * root, down), math.sqrt(lost / total))


def _by_power_iteration(
    matrix: Tensor, rule: RankRule, total: float
) -> tuple[Tensor, Tensor] | None:
    """Left singular vectors (N, r) and values (r,) of the largest; None unless they settle."""
    assert rule.rank is not None
    side = min(matrix.shape)
    width = rule.rank + _OVERSAMPLING
    if width > side * _WORTHWHILE:
        return None
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis, _ = torch.linalg.qr(matrix @ start)
    before = -math.inf
    for _ in range(_MOST_SWEEPS):
        opposite, _ = torch.linalg.qr(matrix.T @ basis)
        image = matrix @ opposite  # (N, width)
        left, values, _ = torch.linalg.svd(image, full_matrices=False)
        captured = float(values[: rule.rank].double().square().sum())
        if captured - before <= _SETTLED * max(total - captured, 1e-12 * total):
            return left[:, : rule.rank], values[: rule.rank]
        basis, before = left, captured
    return None


def _by_gram(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors (N, N) and values (N,), fp32, of a matrix with N <= K."""
    rows = matrix.shape[0]
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=matrix.device)
    for part in matrix.split(_ROWS, dim=1):
        wide = part.double()
        gram.addmm_(wide, wide.T)
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.clamp_(min=0).sqrt_().flip(0)
    return vectors.flip(1).float(), values.float()


def _energy(matrix: Tensor) -> float:
    """The squared Frobenius norm, without a copy of the matrix in fp64."""
    return sum(float(part.double().square().sum()) for part in matrix.split(_ROWS))


def quantile(values: Tensor, share: float) -> float:
    """The share-quantile (0 to 1) of all values, between neighbours linearly, at any size.

    `torch.quantile` takes 16 million values at most.
    """
    flat = values.flatten().float()
    place = share * (flat.numel() - 1)
    below = math.floor(place)
    low = float(flat.kthvalue(below + 1).values)
    if below == place:
        return low
    high = float(flat.kthvalue(below + 2).values)
    return low + (high - low) * (place - below)
