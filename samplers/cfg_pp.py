"""CFG++: Euler steps whose picture is guided and whose noise is the negative prompt's."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import trange

from ..chroma.errors import SamplingError
from .noise import check_stochastic, noise_source
from .steps import check_sigmas, half_log_snr, level, report

POST_CFG = "sampler_post_cfg_function"


@torch.no_grad()
def sample_euler_ancestral_cfg_pp(
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
    """CFG++ (Chung et al. 2024, arXiv:2406.08070, algorithm 2) as rectified flow mixes.

    x = (1 - t) guided + t noise, where the noise is (x - (1 - s) uncond) / s, and a share of it
    fresh (Song et al. 2020, arXiv:2010.02502, equation 16, whose eta this is). The guidance adds
    up over the steps: scales are those of the paper, about 1 and less, lower for more steps.
    Needs a negative prompt; raises SamplingError if the model does not tell its prediction.
    """
    check_stochastic("euler_ancestral_cfg_pp", eta, s_noise)
    s, extra = check_sigmas(sigmas), extra_args or {}
    noise = noise_source(x, extra, noise_sampler)
    predict = _with_uncond(model, extra)
    for i in trange(len(s) - 1, disable=disable):
        denoised, uncond = predict(x, level(x, s[i]))
        report(callback, i, x, s[i], denoised)
        if s[i + 1] == s[i]:
            continue
        if s[i + 1] == 0:
            x = denoised
            continue
        fresh = fresh_share(s[i], s[i + 1], eta)
        old = s[i + 1] * math.sqrt(1 - fresh**2) / s[i]
        x = (1 - s[i + 1]) * denoised + old * (x - (1 - s[i]) * uncond)
        if fresh > 0:
            x = x + s[i + 1] * fresh * s_noise * noise(s[i], s[i + 1])
    return x


def sample_euler_cfg_pp(
    model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None
):
    """`euler_ancestral_cfg_pp` without fresh noise; Euler's method where uncond is the guided."""
    return sample_euler_ancestral_cfg_pp(model, x, sigmas, extra_args, callback, disable, eta=0.0)


def fresh_share(sigma: float, following: float, eta: float) -> float:
    """How much of the noise at `following` is fresh, from 0 to 1; for eta 1 as in DDPM."""
    h = half_log_snr(following) - half_log_snr(sigma)
    return min(1.0, eta * math.sqrt(-math.expm1(-2 * h)))


def _with_uncond(model, extra: dict) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, sigma (B,)) -> (denoised, the negative prompt's own denoised), both like x.

    Where extra_args has `model_options`, as in ComfyUI, a post-CFG function listens for it; other
    models are given `uncond_callback`, to be called with it.
    """
    heard: list[Tensor] = []

    def listen(args: dict) -> Tensor:
        # ComfyUI's prediction for a prompt that is not there is zeros.
        if args["uncond"] is not None:
            heard.append(args["uncond_denoised"])
        return args["denoised"]

    if "model_options" in extra:
        options = extra["model_options"]
        functions = [*options.get(POST_CFG, ()), listen]
        listening = {**options, POST_CFG: functions, "disable_cfg1_optimization": True}
        extra = {**extra, "model_options": listening}
    else:
        extra = {**extra, "uncond_callback": heard.append}

    def predict(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        heard.clear()
        denoised = model(x, sigma, **extra)
        if not heard:
            raise SamplingError("CFG++ samplers need a negative prompt; an empty one will do")
        return denoised, heard[-1]

    return predict
