"""The two-stage refined exponential solver: two evaluations a step (one in the last)."""

import math

import torch
from torch import Tensor
from tqdm.auto import trange

from ..chroma.errors import SamplingError
from .noise import check_stochastic, noise_source
from .steps import ancestral_step, check_sigmas, level, report


def stage_weights(h: float, c2: float) -> tuple[float, float]:
    """Weights of the pictures denoised at the start and at the share c2 of a step of length h.

    h (phi1 - phi2 / c2) and h phi2 / c2, with phi1 = (1 - exp(-h)) / h, phi2 = (1 - phi1) / h:
    exact where denoised is linear over the step (Zhang et al. 2023, section 3).
    """
    whole = -math.expm1(-h)
    inner = (1 - whole / h) / c2
    return whole - inner, inner


@torch.no_grad()
def sample_res_2s(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args=None,
    callback=None,
    disable=None,
    eta: float = 0.5,
    s_noise: float = 1.0,
    noise_sampler=None,
    c2: float = 0.5,
):
    """Exponential Runge-Kutta (Zhang et al. 2023, arXiv:2308.02157) in -ln(sigma), then noise.

    The flow is x' = -x + denoised in -ln(sigma), which is finite at sigma 1. With eta the step
    goes beyond the next sigma, and noise leads back up as rectified flow mixes it. RES4LYF's name
    and default eta; its noise reaches eta sigma after every step, however small the step.
    """
    check_stochastic("res_2s", eta, s_noise)
    if not 0 < c2 <= 1:
        raise SamplingError(f"res_2s: c2 {c2} is not usable; expected above 0 and up to 1")
    s, extra = check_sigmas(sigmas), extra_args or {}
    noise = noise_source(x, extra, noise_sampler)
    for i in trange(len(s) - 1, disable=disable):
        denoised = model(x, level(x, s[i]), **extra)
        report(callback, i, x, s[i], denoised)
        if s[i + 1] == s[i]:
            continue
        down, keep, spread = ancestral_step(s[i], s[i + 1], eta)
        if down == 0:
            x = denoised
        else:
            h = math.log(s[i] / down)
            decay = math.exp(-c2 * h)
            ahead = decay * x + (1 - decay) * denoised
            inner = model(ahead, level(x, s[i] * decay), **extra)
            first, second = stage_weights(h, c2)
            x = down / s[i] * x + first * denoised + second * inner
        if spread > 0:
            x = keep * x + spread * s_noise * noise(s[i], s[i + 1])
    return x


def sample_res_2s_ode(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args=None,
    callback=None,
    disable=None,
    c2: float = 0.5,
):
    """`res_2s` without noise: second order."""
    return sample_res_2s(model, x, sigmas, extra_args, callback, disable, eta=0.0, c2=c2)
