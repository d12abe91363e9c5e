"""flash: for few-step models, flow_pec with one evaluation a step, or a two-step Runge-Kutta."""

import torch
from torch import Tensor
from tqdm.auto import trange

from ..chroma.errors import SamplingError
from .adams import advance
from .flow_pec import sample_flow_pec
from .steps import check_sigmas, level, quadrature, report, velocity

# The inner node lies at this share of the step.
NODE = 2 / 3


@torch.no_grad()
def sample_flash(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args=None,
    callback=None,
    disable=None,
    substeps: int = 1,
):
    """One evaluation a step by flow_pec with its automatic choices, or two with `substeps` 2."""
    if substeps not in (1, 2):
        raise SamplingError(f"flash: substeps {substeps} is not usable; expected 1 or 2")
    sample = sample_flow_pec if substeps == 1 else _two_evaluations
    return sample(model, x, sigmas, extra_args, callback, disable)


def _two_evaluations(model, x: Tensor, sigmas: Tensor, extra_args, callback, disable):
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
        inner = _integrate(x, known, s[i], middle)
        v = velocity(inner, model(inner, level(x, middle), **extra), middle)
        x = _integrate(x, [*known, (middle, v)], s[i], s[i + 1])
        last_node = (middle, v)
    return x


def _integrate(x: Tensor, known: list[tuple[float, Tensor]], start: float, end: float) -> Tensor:
    return advance(x, known, quadrature([sigma for sigma, _ in known], start, end))
