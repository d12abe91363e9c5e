"""The normal schedule: even steps in time down to a lowest noise level, then one step to 0."""

import numpy as np
import torch
from torch import Tensor

from ..chroma.errors import SamplingError
from .rounding import check_steps, finish
from .shift import apply_shift, check_shift, table_shift


def check_lowest(sigma_min: float) -> float:
    """sigma_min itself if it is 0 or from 1e-6 to 0.5. Raises SamplingError otherwise."""
    if not (sigma_min == 0 or 1e-6 <= sigma_min <= 0.5):
        raise SamplingError(
            f"sigma_min {sigma_min} is not usable; expected 0 or a number from 1e-06 to 0.5"
        )
    return sigma_min


def even_to(start: float, end: float, steps: int) -> np.ndarray:
    """steps + 1 falling fp64 values, the last one 0: even from start to end, then 0.

    With an end of 0, all of them are even.
    """
    if end == 0:
        return start * (1 - np.arange(steps + 1) / steps)
    return np.append(np.linspace(start, end, steps), 0.0)


def normal_sigmas(steps: int, *, shift: float = 1.0, sigma_min: float = 0.001) -> Tensor:
    """steps + 1 sigmas, fp32: even from 1 to sigma_min, then 0; shifted.

    sigma_min, the lowest level before the shift, is by default that of ComfyUI's table of 1000. The
    last step, from there to 0, does next to nothing; with sigma_min 0 this is the simple schedule.
    """
    t = even_to(1.0, check_lowest(sigma_min), check_steps(steps))
    return finish(apply_shift(t, check_shift(shift)), "normal")


def normal_sigmas_compat(steps: int, table: Tensor) -> Tensor:
    """ComfyUI's numbers: even from the highest to the lowest entry of a rising sigma table, then 0.

    ComfyUI takes these entries, already shifted, for times and shifts them again. Where the lowest
    then lies below 1e-5, that is the last value, here 0.
    """
    shift, lowest = table_shift(table), float(table[0])
    check_steps(steps)
    if apply_shift(torch.tensor(lowest), shift) <= 1e-5:
        times = np.append(np.linspace(float(table[-1]), lowest, steps + 1)[:-1], 0.0)
    else:
        times = even_to(float(table[-1]), lowest, steps)
    return torch.from_numpy(apply_shift(times, shift)).float()
