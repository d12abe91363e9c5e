"""The power-odds schedule: the odds sigma / (1 - sigma) are a t^p / (1 - t^p) at time t.

So sigma is t^p shifted by a. Its steps neither shrink to nothing at the ends, as those of the beta
schedule do, nor change length abruptly, which suits multistep samplers.
"""

import numpy as np
import torch
from torch import Tensor

from .rounding import check_range, check_steps, finish
from .shift import apply_shift, check_shift, table_shift


def _curve(steps: int, p: float, a: float) -> np.ndarray:
    check_range("p", p, 0.25, 4)
    check_range("a", a, 0.01, 100)
    return apply_shift((1 - np.arange(check_steps(steps) + 1) / steps) ** p, a)


def power_odds_sigmas(steps: int, *, shift: float = 1.0, p: float = 2.0, a: float = 4.0) -> Tensor:
    """steps + 1 sigmas, fp32, at even times from 1 to 0, shifted: the odds grow by a and by shift.

    A shift s with a is the same as no shift with s a.
    """
    return finish(apply_shift(_curve(steps, p, a), check_shift(shift)), "power_odds")


def power_odds_sigmas_compat(
    steps: int, table: Tensor, *, p: float = 2.0, a: float = 4.0
) -> Tensor:
    """The exact sigmas at the table's shift: no other program has this schedule to agree with."""
    return torch.from_numpy(apply_shift(_curve(steps, p, a), table_shift(table))).float()
