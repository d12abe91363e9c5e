"""The refined exponential solver in the flow's half-log-SNR: one evaluation a step."""

import math

from torch import Tensor

from .dpmpp_2m_sde import two_step
from .noise import check_stochastic


def exact(h: float, eta: float) -> float:
    """Weight of dD/dlambda where D is linear in lambda over a step of length h.

    The integral of (1 + eta) exp(-(1 + eta) (h - u)) u over u from 0 to h; h^2 phi2(-h) for eta 0.
    """
    return h + math.expm1(-(1 + eta) * h) / (1 + eta)


def sample_res_2m(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args=None,
    callback=None,
    disable=None,
    eta: float = 0.5,
    s_noise: float = 1.0,
    noise_sampler=None,
):
    """Exponential multistep (Zhang et al. 2023, arXiv:2308.02157), linear in ln((1 - sigma)/sigma).

    RES4LYF's name and default eta; its `res_2m` works in -ln(sigma), starts with two-stage steps,
    and sets the noise after each step to eta sigma, however small the step. Here eta is the noise
    rate of the reverse SDE, so that the result converges with more steps.
    """
    check_stochastic("res_2m", eta, s_noise)
    options = (eta, s_noise, noise_sampler, exact)
    return two_step(model, x, sigmas, extra_args, callback, disable, *options)


def sample_res_2m_ode(
    model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None
):
    """`res_2m` without noise: second order."""
    return sample_res_2m(model, x, sigmas, extra_args, callback, disable, eta=0.0)
