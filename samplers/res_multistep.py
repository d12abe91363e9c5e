"""The two-step refined exponential solver: one evaluation a step, second order."""

import math

import torch
from torch import Tensor
from tqdm.auto import trange

from .steps import check_sigmas, level, report


def step_weights(before: float, now: float, after: float) -> tuple[float, float]:
    """Weights of the current and of the previous denoised picture (Zhang et al. 2023, section 3).

    In lambda = -ln(sigma) the flow is x' = -x + denoised. With h the step and denoised linear in
    lambda, variation of constants gives exp(-h) x + h phi1 D + h^2 phi2 D', where
    phi1 = (1 - exp(-h)) / h and phi2 = (1 - phi1) / h.
    """
    h = math.log(now / after)
    back = math.log(before / now)
    phi1 = -math.expm1(-h) / h
    phi2 = (1 - phi1) / h
    slope = h * h * phi2 / back
    return h * phi1 + slope, -slope


@torch.no_grad()
def sample_res_multistep(
    model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None
):
    """Exponential multistep (Zhang et al. 2023, arXiv:2308.02157), linear in -ln(sigma).

    The first step is Euler's; the last one, to sigma 0, returns the denoised picture.
    """
    s, extra = check_sigmas(sigmas), extra_args or {}
    previous: tuple[float, Tensor] | None = None
    for i in trange(len(s) - 1, disable=disable):
        denoised = model(x, level(x, s[i]), **extra)
        report(callback, i, x, s[i], denoised)
        if s[i + 1] == s[i]:
            continue
        ratio = s[i + 1] / s[i]
        if s[i + 1] == 0:
            x = denoised
        elif previous is None:
            x = ratio * x + (1 - ratio) * denoised
        else:
            now, before = step_weights(previous[0], s[i], s[i + 1])
            x = ratio * x + now * denoised + before * previous[1]
        previous = s[i], denoised
    return x
