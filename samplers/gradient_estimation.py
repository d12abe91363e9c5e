"""Gradient estimation: Euler along a velocity extrapolated from the last one."""

import math

import torch
from torch import Tensor
from tqdm.auto import trange

from ..chroma.errors import SamplingError
from .steps import check_sigmas, level, report, velocity


@torch.no_grad()
def sample_gradient_estimation(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args=None,
    callback=None,
    disable=None,
    ge_gamma: float = 1.5,
):
    """Velocity at the share ge_gamma - 1 of the step (Permenter & Yuan 2024, arXiv:2306.04848).

    1 is Euler's method, 1.5 the second-order one (Adams-Bashforth). ComfyUI's default, 2, reaches
    to the end of the step: first order, with more contrast. The paper's rule, v + (ge_gamma - 1)
    (v - last v), means this for equal steps only; here the difference is scaled by the ratio of
    the steps, so that it does for all, and equal steps give ComfyUI's numbers.
    """
    if not math.isfinite(ge_gamma):
        raise SamplingError(f"ge_gamma {ge_gamma} is not usable; expected a number such as 1.5")
    s, extra = check_sigmas(sigmas), extra_args or {}
    previous: tuple[float, Tensor] | None = None
    for i in trange(len(s) - 1, disable=disable):
        denoised = model(x, level(x, s[i]), **extra)
        report(callback, i, x, s[i], denoised)
        if s[i + 1] == s[i]:
            continue
        if s[i + 1] == 0:
            x = denoised
            continue
        h, v = s[i + 1] - s[i], velocity(x, denoised, s[i])
        x = x + h * v
        if previous is not None:
            ratio = h / (s[i] - previous[0])
            x = x + h * ratio * (ge_gamma - 1) * (v - previous[1])
        previous = s[i], v
    return x
