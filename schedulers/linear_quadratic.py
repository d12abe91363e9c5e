"""The linear-quadratic schedule of Mochi (Genmo 2024, genmoai/mochi): small even steps, then large.

With y = 1 - sigma, the first half of the steps, L, takes y evenly from 0 to `threshold_noise` h; in
the other Q steps y is the parabola that goes on with the slope h / L and ends at 1.
"""

import numpy as np
import torch
from torch import Tensor

from .rounding import check_range, check_steps, finish
from .shift import apply_shift, check_shift


def _curve(steps: int, threshold_noise: float) -> np.ndarray:
    check_range("threshold_noise", threshold_noise, 0.001, 0.5)
    if check_steps(steps) == 1:
        return np.array([1.0, 0.0])
    linear = steps // 2
    slope = threshold_noise / linear
    start = np.arange(linear) * slope
    j = np.arange(steps - linear + 1)  # 0..Q
    bend = (1 - threshold_noise - slope * j[-1]) / j[-1] ** 2
    rest = threshold_noise + slope * j + bend * j**2
    return 1 - np.r_[start, rest[:-1], 1.0]


def linear_quadratic_sigmas(
    steps: int, *, shift: float = 1.0, threshold_noise: float = 0.025
) -> Tensor:
    """steps + 1 sigmas, fp32: Mochi's curve, shifted. ComfyUI's ignores the shift."""
    u = _curve(steps, threshold_noise)
    return finish(apply_shift(u, check_shift(shift)), "linear_quadratic")


def linear_quadratic_sigmas_compat(
    steps: int, table: Tensor, *, threshold_noise: float = 0.025
) -> Tensor:
    """ComfyUI's numbers: Mochi's curve times the highest entry of a sigma table."""
    return torch.from_numpy(_curve(steps, threshold_noise) * float(table[-1])).float()
