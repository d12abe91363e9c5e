"""DPM-Solver++ SDE, single-step: two evaluations a step (one in the last), with fresh noise."""

import torch
from torch import Tensor
from tqdm.auto import trange

from ..chroma.errors import SamplingError
from .noise import check_stochastic, noise_source
from .steps import between, check_sigmas, level, report, sde_step


@torch.no_grad()
def sample_dpmpp_sde(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args=None,
    callback=None,
    disable=None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler=None,
    r: float = 0.5,
):
    """Two-stage steps of the reverse SDE (Gonzalez et al. 2023, arXiv:2305.14267; SEEDS-2).

    DPM-Solver++'s second stage lies at the share r of the step in lambda = ln((1 - sigma) /
    sigma), and on the same path of noise as the step itself, which k-diffusion's `dpmpp_sde`
    approaches by a Brownian tree. From sigma 1, where lambda is -inf, the share is that in
    -ln(sigma). eta is the noise rate: 1 the paper's SDE, 0 the ODE.
    """
    check_stochastic("dpmpp_sde", eta, s_noise)
    if not 0 < r <= 1:
        raise SamplingError(f"dpmpp_sde: r {r} is not usable; expected above 0 and up to 1")
    s, extra = check_sigmas(sigmas), extra_args or {}
    noise = noise_source(x, extra, noise_sampler)
    for i in trange(len(s) - 1, disable=disable):
        denoised = model(x, level(x, s[i]), **extra)
        report(callback, i, x, s[i], denoised)
        if s[i + 1] == s[i]:
            continue
        if s[i + 1] == 0:
            x = denoised
            continue
        middle = between(s[i], s[i + 1], r)
        keep, pull, spread = sde_step(s[i], middle, eta)
        ahead, path = keep * x + pull * denoised, None
        if spread * s_noise > 0:
            path = spread * s_noise * noise(s[i], middle)
            ahead = ahead + path
        inner = model(ahead, level(x, middle), **extra)
        keep, pull, _ = sde_step(s[i], s[i + 1], eta)
        x = keep * x + pull * (denoised + (inner - denoised) / (2 * r))
        if path is not None:
            keep, _, spread = sde_step(middle, s[i + 1], eta)
            x = x + keep * path
            if spread > 0:
                x = x + spread * s_noise * noise(middle, s[i + 1])
    return x
