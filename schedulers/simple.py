"""The simple schedule: even steps in time."""

import numpy as np
import torch
from torch import Tensor

from .rounding import check_steps, finish
from .shift import apply_shift, check_shift


def simple_sigmas(steps: int, *, shift: float = 1.0) -> Tensor:
    """steps + 1 sigmas, fp32: even from 1 to 0, then shifted."""
    t = 1 - np.arange(check_steps(steps) + 1) / steps
    return finish(apply_shift(t, check_shift(shift)), "simple")


def simple_sigmas_compat(steps: int, table: Tensor) -> Tensor:
    """ComfyUI's numbers: every (len / steps)-th entry of a rising sigma table, from its end."""
    stride = len(table) / check_steps(steps)
    picked = [table[-(1 + int(i * stride))] for i in range(steps)]
    return torch.cat([torch.stack(picked).float(), torch.zeros(1)])
