"""The KL-optimal schedule (Sabour et al. 2024, arXiv:2404.14507): even steps in atan(sigma).

The paper derives it for isotropic Gaussian data under noise that is added to an unscaled signal;
for a flow's interpolation it is a heuristic.
"""

import math

import numpy as np
import torch
from torch import Tensor

from .normal import check_lowest, even_to
from .rounding import check_steps, finish
from .shift import apply_shift, check_shift


def kl_optimal_sigmas(steps: int, *, shift: float = 1.0, sigma_min: float = 0.0) -> Tensor:
    """steps + 1 sigmas, fp32: tan of even angles from atan(1) to atan(sigma_min), then 0; shifted.

    By default the angles reach 0 themselves, so that no step is spent below sigma_min.
    """
    angles = even_to(math.pi / 4, math.atan(check_lowest(sigma_min)), check_steps(steps))
    return finish(apply_shift(np.tan(angles), check_shift(shift)), "kl_optimal")


def kl_optimal_sigmas_compat(steps: int, table: Tensor) -> Tensor:
    """ComfyUI's numbers: the angles run from the highest to the lowest entry of a sigma table.

    Otherwise the table's shift plays no part. For one step, where ComfyUI divides by 0, 1 and 0.
    """
    highest, lowest = float(table[-1]), float(table[0])
    angles = even_to(math.atan(highest), math.atan(lowest), check_steps(steps))
    return torch.from_numpy(np.tan(angles)).float()
