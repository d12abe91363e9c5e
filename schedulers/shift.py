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

# Pixels on each side of one token: 8 by the autoencoder, 2 by the patch.
PIXELS_PER_TOKEN = 16 * 16
MIN_TOKENS, MAX_TOKENS = 256, 4096

Array = TypeVar("Array", Tensor, np.ndarray)


def check_shift(shift: float) -> float:
    """The shift itself if it is usable. Raises SamplingError otherwise."""
    if not (math.isfinite(shift) and 0.01 <= shift <= 100):
        raise SamplingError(f"shift {shift} is not usable; expected a number from 0.01 to 100")
    return shift


def apply_shift(sigma: Array, shift: float) -> Array:
    """Shifted sigmas, the same shape and dtype."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flux_mu(width: int, height: int, base_shift: float = 0.5, max_shift: float = 1.15) -> float:
    """Flux' mu of a picture in pixels: a line through 256 and 4096 tokens, not clamped."""
    tokens = width * height / PIXELS_PER_TOKEN
    slope = (max_shift - base_shift) / (MAX_TOKENS - MIN_TOKENS)
    return base_shift + slope * (tokens - MIN_TOKENS)


def flux_shift(width: int, height: int, base_shift: float = 0.5, max_shift: float = 1.15) -> float:
    """The resolution-dependent shift exp(mu) of a picture in pixels."""
    return check_shift(math.exp(flux_mu(width, height, base_shift, max_shift)))


def discrete_table(shift: float, length: int = 1000) -> Tensor:
    """Rising sigmas (length,) fp32 as ComfyUI's AuraFlow and SD3 sampling hold them."""
    t = torch.arange(1, length + 1, 1) / length
    return t if shift == 1.0 else shift * t / (1 + (shift - 1) * t)


def flux_table(mu: float, length: int = 10_000) -> Tensor:
    """Rising sigmas (length,) fp32 as ComfyUI's Flux sampling holds them."""
    t = torch.arange(1, length + 1, 1) / length
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1) ** 1.0)
