"""Adams' formulas over uneven steps, and limiters that keep them from overshooting.

known: the last evaluations (sigma, f (B, ...)), the newest one last, sigmas strictly falling.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .steps import half_log_snr

Known = Sequence[tuple[float, Tensor]]
# (nodes, start, end) -> one weight per node, for the step from start to end.
Weigh = Callable[[Sequence[float], float, float], list[float]]

# Gauss' quadrature: what is not a polynomial in w is integrated to 1e-4 or better.
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(48)


def stochastic_adams(nodes: Sequence[float], start: float, end: float, rate: float) -> list[float]:
    """Weights of the denoised pictures at `nodes`, exact for polynomials in sigma.

    The integral of SA-Solver (Xue et al. 2023, arXiv:2309.05019, equation 15) with noise rate
    tau^2 over a step to `end` > 0. In w = exp((1 + rate) (lambda - lambda_end)), lambda being the
    half-log-SNR, it is (1 - end) times the plain integral of D, also from sigma 1, where w is 0.
    """
    last = half_log_snr(end)
    low = np.exp((1 + rate) * (half_log_snr(start) - last))
    w = low + (1 - low) * (NODES + 1) / 2
    sigma = 1 / (1 + np.exp(last) * w ** (1 / (1 + rate)))
    z, at = (np.asarray(nodes) - start) / (end - start), (sigma - start) / (end - start)
    powers = np.arange(len(z))
    moments = (at[None, :] ** powers[:, None] * NODE_WEIGHTS).sum(1) * (1 - low) / 2
    weights = np.linalg.solve(np.vander(z, increasing=True).T, moments)
    return [float(weight) * (1 - end) for weight in weights]


def advance(x: Tensor, known: Known, weights: Sequence[float]) -> Tensor:
    """x + the weighted sum of what is known."""
    for weight, (_, f) in zip(weights, known, strict=True):
        x = x + weight * f
    return x


def predictor(
    known: Known, end: float, weigh: Weigh, order: int, kappa: float
) -> tuple[Known, list[float]]:
    """The newest evaluations and their weights: of the highest order that keeps the limit.

    sum |weight| / |sum weight| is what the formula makes of errors in f. It may be at most kappa;
    it is 1 at order 1.
    """
    start = known[-1][0]
    for length in range(min(order, len(known)), 1, -1):
        weights = weigh([sigma for sigma, _ in known[-length:]], start, end)
        if sum(map(abs, weights)) <= kappa * abs(sum(weights)):
            return known[-length:], weights
    return known[-1:], weigh([start], start, end)


def slope_ratio(known: Known) -> Tensor:
    """How much of f's last slope but one is found again in the last one, (B,), fp32 at least.

    1 on a straight line; negative where f swings to and fro, as it does when a step is too long
    for the flow. Takes three evaluations. A constant f has ratio 0.
    """
    (s0, f0), (s1, f1), (s2, f2) = known[-3:]
    wide = torch.promote_types(f0.dtype, torch.float32)
    before = (f1 - f0).flatten(1).to(wide) / (s1 - s0)
    now = (f2 - f1).flatten(1).to(wide) / (s2 - s1)
    size = before.square().sum(1)
    return (now * before).sum(1) / torch.where(size > 0, size, torch.ones_like(size))


def van_leer(ratio: Tensor) -> Tensor:
    """The share of a slope to extrapolate with: van Leer's limiter (1974), at most 1.

    None where the slope turns round, all of it where the slope grows.
    """
    return (2 * ratio / (1 + ratio.abs())).clamp(0, 1)


def rows(share: Tensor, x: Tensor) -> Tensor:
    """(B,) in the shape and dtype to be multiplied with x."""
    return share.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
