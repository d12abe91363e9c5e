"""DPM-Solver++(2M) SDE: one evaluation a step, with fresh noise."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import trange

from .noise import check_stochastic, noise_source
from .steps import check_sigmas, half_log_snr, level, report, sde_step


def at_midpoint(h: float, eta: float) -> float:
    """Weight of dD/dlambda where D is taken at the middle of a step of length h in lambda."""
    return -math.expm1(-(1 + eta) * h) * h / 2


@torch.no_grad()
def two_step(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args,
    callback,
    disable,
    eta: float,
    s_noise: float,
    noise_sampler,
    weight: Callable[[float, float], float],
):
    """Exact steps of the SDE (the ODE for eta 0) with denoised linear in the half-log-SNR lambda.

    `weight` (h, eta) says how much the slope through the last two denoised pictures counts. At
    sigma 1 lambda is -inf, in the limit of which the slope from there is 0. A slope is followed
    no further than it was measured: steps that grow in lambda, as they do near sigma 0, would
    else overshoot, and with noise give too much contrast.
    """
    s, extra = check_sigmas(sigmas), extra_args or {}
    noise = noise_source(x, extra, noise_sampler)
    previous: tuple[float, Tensor] | None = None
    for i in trange(len(s) - 1, disable=disable):
        denoised = model(x, level(x, s[i]), **extra)
        report(callback, i, x, s[i], denoised)
        if s[i + 1] == s[i]:
            continue
        if s[i + 1] == 0:
            x = denoised
            continue
        keep, pull, spread = sde_step(s[i], s[i + 1], eta)
        x = keep * x + pull * denoised
        now = half_log_snr(s[i])
        if previous is not None:
            h = half_log_snr(s[i + 1]) - now
            slope = (1 - s[i + 1]) * weight(h, eta) / max(h, now - previous[0])
            x = x + slope * (denoised - previous[1])
        if spread * s_noise > 0:
            x = x + spread * s_noise * noise(s[i], s[i + 1])
        previous = now, denoised
    return x


def sample_dpmpp_2m_sde(
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
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, appendix E), midpoint form.

    `eta` scales the noise of the reverse SDE: 1 is the paper's, 0 is dpmpp_2m.
    """
    check_stochastic("dpmpp_2m_sde", eta, s_noise)
    options = (eta, s_noise, noise_sampler, at_midpoint)
    return two_step(model, x, sigmas, extra_args, callback, disable, *options)
