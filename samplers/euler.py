"""Euler's method: one evaluation a step, first order."""

import torch
from torch import Tensor
from tqdm.auto import trange

from .steps import check_sigmas, level, report, velocity


@torch.no_grad()
def sample_euler(model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None):
    """Straight steps along dx/dsigma = v (Karras et al. 2022, algorithm 1, without churn)."""
    s, extra = check_sigmas(sigmas), extra_args or {}
    for i in trange(len(s) - 1, disable=disable):
        denoised = model(x, level(x, s[i]), **extra)
        report(callback, i, x, s[i], denoised)
        if s[i + 1] == s[i]:
            continue
        x = denoised if s[i + 1] == 0 else x + (s[i + 1] - s[i]) * velocity(x, denoised, s[i])
    return x
