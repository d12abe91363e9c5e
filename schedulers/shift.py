"""The time shift of rectified-flow models, and the sigma tables that ComfyUI samples from.

sigma' = a * sigma / (1 + (a - 1) * sigma) (Esser et al. 2024, arXiv:2403.03206, eq. 23). `shift` is
that a; Flux writes it as exp(mu). 1 leaves sigma as it is.
"""

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..chroma.errors import SamplingError
from .rounding import check_range

# Pixels on each side of one token: 8 by the autoencoder, 2 by the patch.
PIXELS_PER_TOKEN = 16 * 16
MIN_TOKENS, MAX_TOKENS = 256, 4096
MIN_SHIFT, MAX_SHIFT = 0.01, 100.0

Array = TypeVar("Array", Tensor, np.ndarray)


def check_shift(shift: float) -> float:
    """The shift itself if it is usable. Raises SamplingError otherwise."""
    return check_range("shift", shift, MIN_SHIFT, MAX_SHIFT)


def apply_shift(sigma: Array, shift: float) -> Array:
    """Shifted sigmas, the same shape and dtype."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flux_mu(width: int, height: int, base_shift: float = 0.5, max_shift: float = 1.15) -> float:
    """Flux' mu of a picture in pixels: a line through 256 and 4096 tokens, not clamped."""
    tokens = width * height / PIXELS_PER_TOKEN
    slope = (max_shift - base_shift) / (MAX_TOKENS - MIN_TOKENS)
    return base_shift + slope * (tokens - MIN_TOKENS)


def flux_shift(width: int, height: int, base_shift: float = 0.5, max_shift: float = 1.15) -> float:
    """The resolution-dependent shift exp(mu) of a picture in pixels.

    Raises SamplingError for a shift that is not usable, by default above about 2500 x 2500.
    """
    mu = flux_mu(width, height, base_shift, max_shift)
    if not math.log(MIN_SHIFT) <= mu <= math.log(MAX_SHIFT):
        raise SamplingError(
            f"{width} x {height} pixels give mu {mu:.4g} (a shift of e^mu); expected mu from "
            "-4.6 to 4.6, so lower max_shift or set a constant shift"
        )
    return min(math.exp(mu), MAX_SHIFT)


def discrete_table(shift: float, length: int = 1000) -> Tensor:
    """Rising sigmas (length,) fp32 as ComfyUI's AuraFlow and SD3 sampling hold them."""
    t = torch.arange(1, length + 1, 1) / length
    return t if shift == 1.0 else shift * t / (1 + (shift - 1) * t)


def flux_table(mu: float, length: int = 10_000) -> Tensor:
    """Rising sigmas (length,) fp32 as ComfyUI's Flux sampling holds them."""
    t = torch.arange(1, length + 1, 1) / length
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1) ** 1.0)


def table_shift(table: Tensor) -> float:
    """The shift of a rising sigma table as the two functions above make them.

    From its first entry a / (len - 1 + a). Raises SamplingError for any other table.
    """
    first = float(table[0])
    shift = first * (len(table) - 1) / (1 - first) if 0 < first < 1 else math.nan
    t = torch.arange(1, len(table) + 1, dtype=torch.float64) / len(table)
    if not torch.allclose(apply_shift(t, shift), table.double(), rtol=0, atol=1e-5):
        raise SamplingError(
            "the model's sigma table is not a shifted flow's, which this schedule needs in the "
            "compatible form; use the exact form"
        )
    return shift
