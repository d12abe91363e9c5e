"""ComfyUI's OptimalSteps schedule for Chroma: a fixed table of 41 sigmas, resampled.

OptimalSteps (Pei et al. 2025, arXiv:2503.21774) searches a table for each model. This one is none
of these: all but its last entry are sigmoid_offset with square_k 1 and base_c 0.4 at 40 steps,
rounded to thousandths as a table of 1000 sigmas does; the last one is 0.001.
"""

import numpy as np
import torch
from torch import Tensor

from .rounding import check_steps
from .shift import discrete_table
from .sigmoid_offset import sigmoid_offset_sigmas, sigmoid_offset_sigmas_compat

SQUARE_K, BASE_C = 1.0, 0.4


def chroma_table() -> np.ndarray:
    """The published table, (41,) fp64, from 0.992 to 0.001."""
    rounded = sigmoid_offset_sigmas_compat(
        40, discrete_table(1.0), square_k=SQUARE_K, base_c=BASE_C
    )
    return np.append(rounded[:-1].double().numpy().round(3), 0.001)


def optimal_steps_sigmas(steps: int, *, shift: float = 1.0) -> Tensor:
    """steps + 1 sigmas, fp32: the curve behind the table, stretched to run from 1 to 0; shifted."""
    return sigmoid_offset_sigmas(steps, shift=shift, square_k=SQUARE_K, base_c=BASE_C)


def optimal_steps_sigmas_compat(steps: int, table: Tensor) -> Tensor:
    """ComfyUI's numbers, whatever the sigma table: linear in log sigma between entries, then 0."""
    published = chroma_table()
    at = np.linspace(0, len(published) - 1, check_steps(steps) + 1)
    sigmas = np.exp(np.interp(at, np.arange(len(published)), np.log(published)))
    sigmas[-1] = 0.0
    return torch.from_numpy(sigmas).float()
