"""flow_pec: a predictor and corrector on the velocity, one evaluation a step."""

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from tqdm.auto import trange

from ..chroma.errors import SamplingError
from .adams import Known, Weigh, advance, predictor, rows, slope_ratio, stochastic_adams, van_leer
from .noise import check_stochastic, noise_source
from .steps import (
    check_sigmas,
    half_log_snr,
    level,
    quadrature,
    report,
    sde_step,
    velocity,
)

# From so many steps on, the automatic order is 3.
MANY_STEPS = 24
# The automatic limit by order. Even steps need 2 and 3.67.
KAPPA = {2: 2.6, 3: 4.0}
# With noise, going back to order 1 costs variance.
KAPPA_WITH_NOISE = 4.0
# A step that is long in log-SNR adds less noise, and one from sigma 1, where it is infinite, none:
# at any noise rate the marginals are the same, but formulas reach only so far.
MOST_DECAY = 0.25


@torch.no_grad()
def sample_flow_pec(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args=None,
    callback=None,
    disable=None,
    order: int = 0,
    kappa: float = 0.0,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler=None,
):
    """Predict, evaluate, correct: Adams' formulas over the uneven steps of the schedule.

    The corrector (Adams-Moulton, up to order 3) repeats the last step with the velocity at its
    end; the predictor (Adams-Bashforth, up to `order`) makes the next one. Both are kept from
    overshooting, for each picture, by the ratio of the velocity's last two slopes: where it falls,
    the predictor goes over to Euler's method; where it is negative, the corrector is left out.
    `order` is 2 or 3, `kappa` limits the predictor's weights; 0 chooses by the number of steps.
    `eta` above 0 solves the reverse SDE with tau = eta and its noise times `s_noise` by the same
    formulas on the denoised picture (SA-Solver, Xue et al. 2023, arXiv:2309.05019); steps that are
    too long for it take a smaller eta.
    """
    check_stochastic("flow_pec", eta, s_noise)
    s, extra = check_sigmas(sigmas), extra_args or {}
    rate = eta**2
    order, kappa = _choose(s, order, kappa, noisy=rate > 0)
    weigh = quadrature
    noise = noise_source(x, extra, noise_sampler) if rate else None
    known: list[tuple[float, Tensor]] = []
    predicted = base = x
    for i in trange(len(s) - 1, disable=disable):
        denoised = model(predicted, level(x, s[i]), **extra)
        report(callback, i, predicted, s[i], denoised)
        if s[i + 1] == s[i]:
            continue
        f = denoised if rate else velocity(predicted, denoised, s[i])
        known = [*known, (s[i], f)][-3:]
        ratio = slope_ratio(known) if len(known) == 3 else x.new_zeros(len(x))
        x = _correct(predicted, base, known, weigh, ratio)
        base, ends = x, s[i + 1] == 0
        if noise is not None and not ends:
            step_rate = min(rate, MOST_DECAY / (half_log_snr(s[i + 1]) - half_log_snr(s[i])))
            weigh = partial(stochastic_adams, rate=step_rate)
            keep, _, spread = sde_step(s[i], s[i + 1], step_rate)
            base = keep * x + spread * s_noise * noise(s[i], s[i + 1])
            # Fresh noise alone makes slopes differ.
            ratio = ratio + min(1.0, eta) / 2 * (1 - ratio)
        if ends:
            plain = denoised + (x - predicted)
        else:
            plain = advance(base, known[-1:], weigh([s[i]], s[i], s[i + 1]))
        predicted = plain
        # With noise, the formulas are in log-SNR, which has no end.
        if not (ends and rate):
            share = van_leer(ratio)
            predicted = _predict(plain, base, known, s[i + 1], weigh, order, kappa, share)
    return predicted


def _choose(sigmas: list[float], order: int, kappa: float, noisy: bool) -> tuple[int, float]:
    if order not in (0, *KAPPA):
        raise SamplingError(
            f"flow_pec: order {order} is not usable; expected 0 (automatic), 2 or 3"
        )
    if kappa != 0 and not (math.isfinite(kappa) and kappa >= 1):
        raise SamplingError(
            f"flow_pec: kappa {kappa} is not usable; expected 0 (automatic), or 1 and more"
        )
    steps = sum(high > low for high, low in pairwise(sigmas))
    order = order or (3 if steps >= MANY_STEPS else 2)
    return order, kappa or (KAPPA_WITH_NOISE if noisy else KAPPA[order])


def _correct(predicted: Tensor, base: Tensor, known: Known, weigh: Weigh, ratio: Tensor) -> Tensor:
    """x at the newest sigma: the last step from `base` again, as far as `ratio` (B,) allows."""
    if len(known) < 2:
        return predicted
    weights = weigh([sigma for sigma, _ in known], known[-2][0], known[-1][0])
    accepted = rows((1 + ratio).clamp(0, 1), predicted)
    return predicted + accepted * (advance(base, known, weights) - predicted)


def _predict(
    plain: Tensor,
    base: Tensor,
    known: Known,
    end: float,
    weigh: Weigh,
    order: int,
    kappa: float,
    share: Tensor,
) -> Tensor:
    """The step from `base` to `end`: between Euler's, at share 0 (B,), and the full formula."""
    used, weights = predictor(known, end, weigh, order, kappa)
    if len(used) == 1:
        return plain
    return plain + rows(share, base) * (advance(base, used, weights) - plain)
