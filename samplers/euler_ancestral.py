"""Euler's method with fresh noise in every step: one evaluation a step."""

import torch
from torch import Tensor
from tqdm.auto import trange

from .noise import check_stochastic, noise_source
from .steps import ancestral_step, check_sigmas, level, report


@torch.no_grad()
def sample_euler_ancestral(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args=None,
    callback=None,
    disable=None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler=None,
):
    """Euler beyond the next sigma, then noise up to it, as rectified flow mixes the two.

    eta 0 is Euler's method. First order, so few steps give too little contrast: on toys of one
    and two normal modes the energy is 8 to 10 percent low at 26 steps with eta 1 (4 to 7 percent
    with eta 0), and each doubling of the steps halves that. The two-stage samplers stay within 2.
    """
    check_stochastic("euler_ancestral", eta, s_noise)
    s, extra = check_sigmas(sigmas), extra_args or {}
    noise = noise_source(x, extra, noise_sampler)
    for i in trange(len(s) - 1, disable=disable):
        denoised = model(x, level(x, s[i]), **extra)
        report(callback, i, x, s[i], denoised)
        if s[i + 1] == s[i]:
            continue
        down, keep, spread = ancestral_step(s[i], s[i + 1], eta)
        ratio = down / s[i]
        x = denoised if down == 0 else ratio * x + (1 - ratio) * denoised
        if spread > 0:
            x = keep * x + spread * s_noise * noise(s[i], s[i + 1])
    return x
