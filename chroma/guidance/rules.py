"""Formulas that turn the predictions with and without the prompt into one.

Tensors are (B, ...), and every row is treated on its own. A velocity v may be given as
x - denoised = sigma * v: no formula here depends on its scale.
"""

import torch
from torch import Tensor


def classifier_free(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """u + scale * (c - u), of velocities or denoised latents alike (Ho & Salimans 2022)."""
    return uncond + scale * (cond - uncond)


def zero_star_scale(cond: Tensor, uncond: Tensor) -> Tensor:
    """The factor s, (B, 1, ...), that minimises |c - s u|, of velocities.

    CFG-Zero* (Fan et al. 2025, arXiv:2503.18886) guides away from s u instead of u.
    """
    return _dot(cond, uncond) / _positive(_dot(uncond, uncond))


def limit_norm(difference: Tensor, threshold: float) -> Tensor:
    """Each row shortened to the Euclidean norm `threshold` where it is longer."""
    return difference * (threshold / _dot(difference, difference).sqrt()).clamp_max(1)


def weigh_parallel(difference: Tensor, cond: Tensor, eta: float) -> Tensor:
    """`difference` with its part along `cond` multiplied by eta, of denoised latents.

    APG (Sadat et al. 2024, arXiv:2410.02416): the parallel part is what oversaturates.
    """
    parallel = _dot(difference, cond) / _positive(_dot(cond, cond)) * cond
    return difference + (eta - 1) * parallel


def rescale(guided: Tensor, cond: Tensor, amount: float) -> Tensor:
    """`guided` brought towards the standard deviation of `cond`, of velocities.

    amount 1 gives that deviation, amount 0 leaves `guided` (Lin et al. 2023, arXiv:2305.08891,
    equations 15 and 16). Guidance beyond 1 raises the deviation, which burns the picture in.
    """
    matched = guided * (_std(cond) / _positive(_std(guided)))
    return amount * matched + (1 - amount) * guided


def _axes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(_axes(a), keepdim=True)


def _std(x: Tensor) -> Tensor:
    return x.std(_axes(x), keepdim=True)


def _positive(x: Tensor) -> Tensor:
    # A row of zeros gives 0 / tiny = 0 instead of NaN.
    return x.clamp_min(torch.finfo(x.dtype).tiny)
