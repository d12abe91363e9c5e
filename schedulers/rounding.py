"""What schedules share: checks, and ComfyUI's rounding of positions to a sigma table's entries."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..chroma.errors import SamplingError

MAX_STEPS = 10_000


def check_steps(steps: int) -> int:
    """The count itself if it is usable. Raises SamplingError otherwise."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise SamplingError(
            f"steps {steps} is not usable; expected a whole number from 1 to {MAX_STEPS}"
        )
    return steps


def check_range(name: str, value: float, low: float, high: float) -> float:
    """The value itself if it is a number from low to high. Raises SamplingError otherwise."""
    if not (math.isfinite(value) and low <= value <= high):
        raise SamplingError(
            f"{name} {value} is not usable; expected a number from {low:g} to {high:g}"
        )
    return value


def look_up(positions: Sequence[float] | np.ndarray, table: Tensor) -> Tensor:
    """Falling sigmas at positions in [0, 1], repeated entries left out, 0 at the end; fp32.

    Leaving out is ComfyUI's habit: the result may have fewer than steps + 1 values.
    """
    index = np.rint(np.asarray(positions) * (len(table) - 1)).astype(int)
    keep = np.r_[True, index[1:] != index[:-1]]
    return torch.cat([table[index[keep].tolist()].float(), torch.zeros(1)])


def finish(sigmas: np.ndarray, name: str) -> Tensor:
    """Exact fp64 sigmas, the last one 0, as fp32, checked to fall strictly.

    Raises SamplingError where fp32 cannot tell two neighbours apart.
    """
    out = torch.from_numpy(sigmas).float()
    if not bool((out[1:] < out[:-1]).all()):
        raise SamplingError(
            f"{name} with {len(sigmas) - 1} steps puts neighbours closer than fp32 can hold; "
            "use fewer steps or milder parameters"
        )
    return out
