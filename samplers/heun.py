"""Heun's method: two evaluations a step (one in the last), second order."""

import torch
from torch import Tensor
from tqdm.auto import trange

from .steps import check_sigmas, level, report, velocity


@torch.no_grad()
def sample_heun(model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None):
    """The trapezoid rule (Karras et al. 2022, algorithm 1); Euler where sigma reaches 0."""
    s, extra = check_sigmas(sigmas), extra_args or {}
    for i in trange(len(s) - 1, disable=disable):
        denoised = model(x, level(x, s[i]), **extra)
        report(callback, i, x, s[i], denoised)
        if s[i + 1] == s[i]:
            continue
        if s[i + 1] == 0:
            x = denoised
            continue
        h, v = s[i + 1] - s[i], velocity(x, denoised, s[i])
        ahead = x + h * v
        v_ahead = velocity(ahead, model(ahead, level(x, s[i + 1]), **extra), s[i + 1])
        x = x + h * (v + v_ahead) / 2
    return x
