"""The beta schedule (Lee et al. 2024, arXiv:2407.12173): steps at quantiles of a beta law.

beta57 is RES4LYF's name for alpha 0.5 and beta 0.7.
"""

import math

import numpy as np
from scipy.special import betaincinv
from torch import Tensor

from ..chroma.errors import SamplingError
from .rounding import check_steps, finish, look_up
from .shift import apply_shift, check_shift


def _quantiles(positions: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (math.isfinite(value) and 0 < value <= 50):
            raise SamplingError(f"{name} {value} is not usable; expected above 0, up to 50")
    return np.asarray(betaincinv(alpha, beta, positions))


def beta_sigmas(steps: int, *, shift: float = 1.0, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """steps + 1 sigmas, fp32: quantiles of Beta(alpha, beta) at even steps from 1 to 0, shifted."""
    positions = 1 - np.arange(check_steps(steps) + 1) / steps
    return finish(apply_shift(_quantiles(positions, alpha, beta), check_shift(shift)), "beta")


def beta_sigmas_compat(
    steps: int, table: Tensor, *, alpha: float = 0.6, beta: float = 0.6
) -> Tensor:
    """ComfyUI's numbers: the quantiles rounded to the entries of a rising sigma table."""
    positions = 1 - np.linspace(0, 1, check_steps(steps), endpoint=False)
    return look_up(_quantiles(positions, alpha, beta), table)


def beta57_sigmas(steps: int, *, shift: float = 1.0) -> Tensor:
    """beta_sigmas with alpha 0.5 and beta 0.7."""
    return beta_sigmas(steps, shift=shift, alpha=0.5, beta=0.7)


def beta57_sigmas_compat(steps: int, table: Tensor) -> Tensor:
    """RES4LYF's numbers: beta_sigmas_compat with alpha 0.5 and beta 0.7."""
    return beta_sigmas_compat(steps, table, alpha=0.5, beta=0.7)
