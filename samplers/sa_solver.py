"""SA-Solver: a stochastic Adams predictor and corrector, one evaluation a step."""

import math

import numpy as np
import torch
from scipy.special import gammainc
from torch import Tensor
from tqdm.auto import trange

from .noise import check_stochastic, noise_source
from .steps import check_order, check_sigmas, half_log_snr, level, report, sde_step

# Noise is added where sigma lies in this range after a step, as in the paper's experiments.
NOISY = (0.2, 0.8)


@torch.no_grad()
def sample_sa_solver(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args=None,
    callback=None,
    disable=None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler=None,
    predictor_order: int = 3,
    corrector_order: int = 4,
):
    """SA-Solver (Xue et al. 2023, arXiv:2309.05019, algorithm 1) in the flow's half-log-SNR.

    `eta` is the paper's tau: 0 solves the ODE, 1 the usual reverse SDE, for sigmas in NOISY. The
    state is evaluated once, at the prediction; the corrector repeats the step with that picture
    and the same noise (order 0: it does not). Near a last step to 0 the orders fall.
    """
    check_stochastic("sa_solver", eta, s_noise)
    check_order("predictor_order", predictor_order, 1, 4)
    check_order("corrector_order", corrector_order, 0, 4)
    s, extra = check_sigmas(sigmas), extra_args or {}
    noise = noise_source(x, extra, noise_sampler)
    known: list[tuple[float, Tensor]] = []
    step: tuple[Tensor, float, float, float] | None = None
    for i in trange(len(s) - 1, disable=disable):
        denoised = model(x, level(x, s[i]), **extra)
        report(callback, i, x, s[i], denoised)
        if s[i + 1] == s[i]:
            continue
        if s[i + 1] == 0:
            x = denoised
            continue
        known = [*known, (s[i], denoised)][-4:]
        left = len(set(s[i + 1 :])) if s[-1] == 0 else len(s)
        if step is not None and corrector_order > 0:
            x = _integrate(known[-min(corrector_order, left) :], *step)
        rate = eta**2 if NOISY[0] <= s[i + 1] <= NOISY[1] else 0.0
        keep, _, spread = sde_step(s[i], s[i + 1], rate)
        start = keep * x
        if spread * s_noise > 0:
            start = start + spread * s_noise * noise(s[i], s[i + 1])
        step = start, s[i], s[i + 1], rate
        x = _integrate(known[-min(predictor_order, left - 1) :], *step)
    return x


def stochastic_weights(
    nodes: list[float], sigma: float, following: float, rate: float
) -> list[float]:
    """Weights of the denoised pictures at `nodes`, exact for polynomials in lambda (equation 15).

    The integral of (1 + rate) exp(-(1 + rate) (end - lambda)) D(lambda) over the step, in units
    of the step: the moments are k! P(k + 1, z) / z^k with z = (1 + rate) h and P the regularized
    gamma function. A node at sigma 1, where lambda is -inf, has weight 0 beside any other one.
    """
    end = half_log_snr(following)
    h = end - half_log_snr(sigma)
    lambdas = [half_log_snr(node) for node in nodes]
    finite = [value for value in lambdas if value > -math.inf]
    z = (1 + rate) * h
    if len(finite) < 2:
        whole = (1 - following) * -math.expm1(-z)
        return [whole if len(nodes) == 1 or value in finite else 0.0 for value in lambdas]
    powers = np.arange(len(finite))
    moments = [math.factorial(k) / z**k * float(gammainc(k + 1, z)) for k in powers]
    positions = (end - np.asarray(finite)) / h
    solved = np.linalg.solve(np.vander(positions, increasing=True).T, moments)
    weights = iter((1 - following) * solved)
    return [float(next(weights)) if value > -math.inf else 0.0 for value in lambdas]


def _integrate(
    known: list[tuple[float, Tensor]], start: Tensor, sigma: float, following: float, rate: float
) -> Tensor:
    weights = stochastic_weights([node for node, _ in known], sigma, following, rate)
    for weight, (_, denoised) in zip(weights, known, strict=True):
        start = start + weight * denoised
    return start
