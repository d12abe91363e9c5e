"""The sigmoid-offset schedule of Chroma's users: sigma falls along a logistic curve.

f(t) = 1 / (1 + exp(-8 k (1 - c - t))) for t from 0 to 1; k is `square_k`, c is `base_c`. Sigma is
1/2 at t = 1 - c, so a smaller c spends more steps at high sigma.
"""

import numpy as np
from scipy.special import expit
from torch import Tensor

from .rounding import check_range, check_steps, finish, look_up
from .shift import apply_shift, check_shift


def _curve(t: np.ndarray, square_k: float, base_c: float) -> np.ndarray:
    check_range("square_k", square_k, 0.01, 10)
    check_range("base_c", base_c, 0, 1)
    return expit(8 * square_k * (1 - base_c - t))


def sigmoid_offset_sigmas(
    steps: int,
    *,
    shift: float = 1.0,
    square_k: float = 1.0,
    base_c: float = 0.5,
    anchored: bool = True,
) -> Tensor:
    """steps + 1 sigmas, fp32, shifted; anchored, the curve is stretched to run from 1 to 0.

    The published schedule starts below 1 (0.982 by default) although sampling starts from pure
    noise, an error that no number of steps removes; stretching it removes it. Not anchored, the
    curve stays as published, with its end replaced by 0.
    """
    u = _curve(np.arange(check_steps(steps) + 1) / steps, square_k, base_c)
    u = (u - u[-1]) / (u[0] - u[-1]) if anchored else np.append(u[:-1], 0.0)
    return finish(apply_shift(u, check_shift(shift)), "sigmoid_offset")


def sigmoid_offset_sigmas_compat(
    steps: int, table: Tensor, *, square_k: float = 1.0, base_c: float = 0.5
) -> Tensor:
    """The published numbers: the curve as it is, rounded to the entries of a rising sigma table."""
    return look_up(_curve(np.arange(check_steps(steps)) / steps, square_k, base_c), table)
