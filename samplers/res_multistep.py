"""The two-step refined exponential solver: one evaluation a step, second order without noise."""

import math

import torch
from torch import Tensor
from tqdm.auto import trange

from .noise import check_stochastic, noise_source
from .steps import ancestral_step, check_sigmas, level, report


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
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args=None,
    callback=None,
    disable=None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler=None,
):
    """Exponential multistep (Zhang et al. 2023, arXiv:2308.02157), linear in -ln(sigma).

    The first step is Euler's; the last one, to sigma 0, returns the denoised picture. With eta,
    each step goes further down and takes fresh noise up again, as rectified flow mixes it. There,
    denoised is taken at the middle of the step between the sigmas (not of the longer one down)
    and followed no further than half the last step: part of its change is noise, no trend, and
    to extrapolate that gives too much contrast.
    """
    check_stochastic("res_multistep", eta, s_noise)
    s, extra = check_sigmas(sigmas), extra_args or {}
    noise = noise_source(x, extra, noise_sampler)
    previous: tuple[float, Tensor] | None = None
    for i in trange(len(s) - 1, disable=disable):
        denoised = model(x, level(x, s[i]), **extra)
        report(callback, i, x, s[i], denoised)
        if s[i + 1] == s[i]:
            continue
        down, keep, spread = ancestral_step(s[i], s[i + 1], eta)
        ratio = down / s[i]
        if down == 0:
            x = denoised
        elif previous is None:
            x = ratio * x + (1 - ratio) * denoised
        elif eta == 0:
            now, before = step_weights(previous[0], s[i], s[i + 1])
            x = ratio * x + now * denoised + before * previous[1]
        else:
            reach = min(1.0, math.log(s[i] / s[i + 1]) / math.log(previous[0] / s[i]))
            middle = denoised + reach / 2 * (denoised - previous[1])
            x = ratio * x + (1 - ratio) * middle
        if spread > 0:
            x = keep * x + spread * s_noise * noise(s[i], s[i + 1])
        previous = s[i], denoised
    return x


def sample_res_multistep_ancestral(
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
    """`res_multistep` with fresh noise in every step but the last."""
    options = (eta, s_noise, noise_sampler)
    return sample_res_multistep(model, x, sigmas, extra_args, callback, disable, *options)
