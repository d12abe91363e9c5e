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
    # Rounding can take a schedule a little past 1, where log-SNRs are not defined.
    values = [1.0 if 1 < s <= 1 + 1e-6 else float(s) for s in sigmas.tolist()]
    if not all(math.isfinite(s) and 0 <= s <= 1 for s in values):
        raise SamplingError(
            f"sigmas from {min(values):g} to {max(values):g} are not a flow model's; expected "
            "finite numbers from 0 to 1, so choose another scheduler, or a Chroma MODEL"
        )
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


def half_log_snr(sigma: float) -> float:
    """The flow's lambda = ln((1 - sigma) / sigma); -inf where sigma is 1."""
    return math.log1p(-sigma) - math.log(sigma) if sigma < 1 else -math.inf


def sde_step(sigma: float, following: float, eta: float) -> tuple[float, float, float]:
    """(a, b, c) of the exact step a x + b D + c noise, if denoised D is constant on the way.

    The reverse SDE in lambda whose noise rate is eta = tau^2 (Xue et al. 2023, arXiv:2309.05019,
    proposition 4.2); 0 is the ODE. From sigma 1 with noise, x is forgotten. `following` is above 0.
    """
    h = half_log_snr(following) - half_log_snr(sigma)
    decay = eta * h if eta else 0.0
    a = following / sigma * math.exp(-decay)
    b = (1 - following) * -math.expm1(-(h + decay))
    return a, b, following * math.sqrt(-math.expm1(-2 * decay))


def between(sigma: float, following: float, share: float) -> float:
    """The sigma at a share of the step in lambda; from sigma 1, where it is -inf, in -ln(sigma)."""
    if sigma >= 1:
        return following**share
    start = half_log_snr(sigma)
    middle = 1 / (1 + math.exp(start + share * (half_log_snr(following) - start)))
    # Rounding must not leave the step.
    return min(sigma, max(following, middle))


def ancestral_step(sigma: float, following: float, eta: float) -> tuple[float, float, float]:
    """(down, a, b): after a step to `down`, a x + b noise is at the level `following`.

    Rectified flow keeps (1 - sigma) picture + sigma noise: a restores the first, b fills up the
    second. down is `following` for eta 0 and following^2 / sigma for eta 1; never below 0.
    """
    down = max(0.0, following * (1 + (following / sigma - 1) * eta))
    keep = (1 - following) / (1 - down)
    return down, keep, math.sqrt(max(0.0, following**2 - (keep * down) ** 2))


def check_order(name: str, order: int, lowest: int, highest: int) -> None:
    """Raises SamplingError unless `order` is a whole number from `lowest` to `highest`."""
    if order not in range(lowest, highest + 1):
        raise SamplingError(f"{name} {order} is not usable; expected {lowest} to {highest}")


def check_finite(denoised: Tensor, sigma: float) -> None:
    """Raises SamplingError if the model returned anything but finite numbers."""
    if not bool(denoised.isfinite().all()):
        raise SamplingError(
            f"the model returned NaN or infinity at sigma {sigma:.4f}; "
            "the weights or their precision are unsuitable: try bf16 or fp32 instead of fp16"
        )


def report(callback, i: int, x: Tensor, sigma: float, denoised: Tensor) -> None:
    """One call per step with k-diffusion's keys. Raises SamplingError if the model has failed."""
    check_finite(denoised, sigma)
    if callback is not None:
        callback({"i": i, "x": x, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
