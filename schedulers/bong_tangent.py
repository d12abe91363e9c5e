"""RES4LYF's bong_tangent schedule: two arctangent curves that meet in the middle.

Each part is atan(k (p - x)) at whole x, stretched to run from 1 to `middle` and from there to 0.
Over steps + 2 points, k is 40 slope / (steps + 2) and p the whole part of pivot (steps + 2); the
parts meet at the mean of both pivots.
"""

import numpy as np
import torch
from torch import Tensor

from .rounding import check_range, check_steps, finish
from .shift import apply_shift, check_shift


def _part(points: int, slope: float, pivot: int, start: float, end: float) -> np.ndarray:
    curve = np.arctan(slope * (pivot - np.arange(points)))
    return end + (start - end) * (curve - curve[-1]) / (curve[0] - curve[-1])


def _curve(
    steps: int, pivots: tuple[float, float], slopes: tuple[float, float], middle: float
) -> np.ndarray:
    check_steps(steps)
    check_range("middle", middle, 0.05, 0.95)
    for i in range(2):
        check_range(f"pivot_{i + 1}", pivots[i], 0, 1)
        check_range(f"slope_{i + 1}", slopes[i], 0.01, 1)
    if steps == 1:
        return np.array([1.0, 0.0])
    points = steps + 2
    meeting = int((points * pivots[0] + points * pivots[1]) / 2)
    # Pivots near 0 or 1 would leave one part without a step.
    meeting = min(max(meeting, 2), steps)
    first, second = (
        _part(count, 40 * slope / points, int(points * pivot) - offset, start, end)
        for count, slope, pivot, offset, start, end in (
            (meeting, slopes[0], pivots[0], 0, 1.0, middle),
            (points - meeting, slopes[1], pivots[1], meeting, middle, 0.0),
        )
    )
    return np.r_[first[:-1], second]


def bong_tangent_sigmas(
    steps: int,
    *,
    shift: float = 1.0,
    pivot_1: float = 0.6,
    pivot_2: float = 0.6,
    slope_1: float = 0.2,
    slope_2: float = 0.2,
    middle: float = 0.5,
) -> Tensor:
    """steps + 1 sigmas, fp32: RES4LYF's curve, shifted. RES4LYF itself ignores the shift."""
    u = _curve(steps, (pivot_1, pivot_2), (slope_1, slope_2), middle)
    return finish(apply_shift(u, check_shift(shift)), "bong_tangent")


def bong_tangent_sigmas_compat(
    steps: int,
    table: Tensor,
    *,
    pivot_1: float = 0.6,
    pivot_2: float = 0.6,
    slope_1: float = 0.2,
    slope_2: float = 0.2,
    middle: float = 0.5,
) -> Tensor:
    """RES4LYF's numbers, whatever the table; steps + 1 of them also where RES4LYF divides by 0."""
    return torch.from_numpy(_curve(steps, (pivot_1, pivot_2), (slope_1, slope_2), middle)).float()
