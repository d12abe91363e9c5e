"""DEIS: polynomials through past velocities, one evaluation a step, order 1 to 4."""

import torch
from torch import Tensor
from tqdm.auto import trange

from .steps import check_order, check_sigmas, level, quadrature, report, velocity


@torch.no_grad()
def sample_deis(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args=None,
    callback=None,
    disable=None,
    order: int = 3,
):
    """tAB-DEIS (Zhang & Chen 2022, arXiv:2204.13902, section 3.3) in the flow's own time, sigma.

    Each step integrates the Lagrange polynomial through the last `order` velocities exactly. For
    a flow the exponential part of DEIS is the identity. ComfyUI's `deis` lays the same polynomial
    through a variance-preserving model's time; sigma is at least as accurate and needs no tables.
    """
    check_order("order", order, 1, 4)
    s, extra = check_sigmas(sigmas), extra_args or {}
    known: list[tuple[float, Tensor]] = []
    for i in trange(len(s) - 1, disable=disable):
        denoised = model(x, level(x, s[i]), **extra)
        report(callback, i, x, s[i], denoised)
        if s[i + 1] == s[i]:
            continue
        if s[i + 1] == 0:
            x = denoised
            continue
        known = [*known, (s[i], velocity(x, denoised, s[i]))][-order:]
        weights = quadrature([sigma for sigma, _ in known], s[i], s[i + 1])
        for weight, (_, v) in zip(weights, known, strict=True):
            x = x + weight * v
    return x
