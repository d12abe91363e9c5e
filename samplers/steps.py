"""What every sampler shares: checks, the velocity, and exact weights for polynomials in sigma.

Rectified flow: x = (1 - sigma) * image + sigma * noise, dx/dsigma = v = (x - denoised) / sigma.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..chroma.errors import SamplingError


def check_sigmas(sigmas: Tensor) -> list[float]:
    """The schedule as Python numbers. Raises SamplingError unless in [0, 1] and never rising."""
    values = [float(s) for s in sigmas.tolist()]
    if not all(math.isfinite(s) and 0 <= s <= 1 + 1e-6 for s in values):
        raise SamplingError("sigmas must be finite numbers from 0 to 1; choose another scheduler")
    for i, (high, low) in enumerate(pairwise(values)):
        if low > high:
            raise SamplingError(
                f"sigmas must not rise at any step; {low:g} follows {high:g} at step {i + 1}"
            )
    return values


def level(x: Tensor, sigma: float) -> Tensor:
    """sigma for each row of x, (B,), fp32 at least: bf16 would move it by up to 0.4 percent."""
    return x.new_full((len(x),), sigma, dtype=torch.promote_types(x.dtype, torch.float32))


def velocity(x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """The flow's direction (x - denoised) / sigma."""
    return (x - denoised) / sigma


def quadrature(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Weights w with sum w_j p(nodes_j) = integral of p from start to end, exact for polynomials.

    Computed in fp64 in the scaled variable (sigma - start) / (end - start), of any order.
    """
    h = end - start
    z = (np.asarray(nodes, dtype=np.float64) - start) / h
    powers = np.arange(len(z))
    moments = 1.0 / (powers + 1)
    weights = np.linalg.solve(np.vander(z, increasing=True).T, moments)
    return [float(w) * h for w in weights]


def report(callback, i: int, x: Tensor, sigma: float, denoised: Tensor) -> None:
    """One call per step with k-diffusion's keys."""
    if callback is not None:
        callback({"i": i, "x": x, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
