"""DPM-Solver++(2S) with fresh noise in every step: two evaluations a step (one in the last)."""

import torch
from torch import Tensor
from tqdm.auto import trange

from .noise import check_stochastic, noise_source
from .steps import ancestral_step, between, check_sigmas, level, report


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
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
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095, algorithm 1), r = 1/2, in flow's lambda.

    The whole step uses the picture denoised at the step's middle in lambda = ln((1 - sigma) /
    sigma), and goes beyond the next sigma; noise leads back up. From sigma 1, where lambda is
    -inf, the middle is that in -ln(sigma). eta 0 is the paper's solver of the ODE.
    """
    check_stochastic("dpmpp_2s_ancestral", eta, s_noise)
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
            middle = between(s[i], down, 1 / 2)
            ahead = _toward(x, denoised, middle / s[i])
            x = _toward(x, model(ahead, level(x, middle), **extra), down / s[i])
        if spread > 0:
            x = keep * x + spread * s_noise * noise(s[i], s[i + 1])
    return x


def _toward(x: Tensor, denoised: Tensor, ratio: float) -> Tensor:
    """The state after sigma has fallen to `ratio` of itself, with denoised constant."""
    return ratio * x + (1 - ratio) * denoised
