"""A two-step Runge-Kutta method for few-step models: two evaluations a step (one in the last)."""

import torch
from torch import Tensor
from tqdm.auto import trange

from .steps import check_sigmas, level, quadrature, report, velocity

# The inner node lies at this share of the step.
NODE = 2 / 3


@torch.no_grad()
def sample_flash(model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None):
    """Sub-steps at two thirds, combined with the previous step's own sub-step.

    A two-step Runge-Kutta method (Jackiewicz & Tracogna 1995) on the velocity: the inner node is
    predicted from the velocities here and at the last inner node (Euler in the first step), and
    the step integrates the polynomial through all three exactly. Where sigma reaches 0, the
    denoised picture is returned.
    """
    s, extra = check_sigmas(sigmas), extra_args or {}
    last_node: tuple[float, Tensor] | None = None
    for i in trange(len(s) - 1, disable=disable):
        denoised = model(x, level(x, s[i]), **extra)
        report(callback, i, x, s[i], denoised)
        if s[i + 1] == s[i]:
            continue
        if s[i + 1] == 0:
            x = denoised
            continue
        middle = s[i] + NODE * (s[i + 1] - s[i])
        known = [(s[i], velocity(x, denoised, s[i]))]
        if last_node is not None:
            known.append(last_node)
        inner = _advance(x, known, s[i], middle)
        v = velocity(inner, model(inner, level(x, middle), **extra), middle)
        x = _advance(x, [*known, (middle, v)], s[i], s[i + 1])
        last_node = (middle, v)
    return x


def _advance(x: Tensor, known: list[tuple[float, Tensor]], start: float, end: float) -> Tensor:
    weights = quadrature([sigma for sigma, _ in known], start, end)
    for weight, (_, v) in zip(weights, known, strict=True):
        x = x + weight * v
    return x
