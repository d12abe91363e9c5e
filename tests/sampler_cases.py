"""The samplers beside euler, heun and flow_pec, by what they can do, and what they are tried on."""

import math
from functools import partial

import numpy as np
import torch
from chroma_nodes.samplers.cfg_pp import sample_euler_ancestral_cfg_pp, sample_euler_cfg_pp
from chroma_nodes.samplers.deis import sample_deis
from chroma_nodes.samplers.dpmpp_2m import sample_dpmpp_2m
from chroma_nodes.samplers.dpmpp_2m_sde import sample_dpmpp_2m_sde
from chroma_nodes.samplers.dpmpp_2s_ancestral import sample_dpmpp_2s_ancestral
from chroma_nodes.samplers.dpmpp_sde import sample_dpmpp_sde
from chroma_nodes.samplers.euler_ancestral import sample_euler_ancestral
from chroma_nodes.samplers.gradient_estimation import sample_gradient_estimation
from chroma_nodes.samplers.res_2m import sample_res_2m, sample_res_2m_ode
from chroma_nodes.samplers.res_2s import sample_res_2s, sample_res_2s_ode
from chroma_nodes.samplers.res_multistep import sample_res_multistep_ancestral
from chroma_nodes.samplers.sa_solver import sample_sa_solver
from scipy.special import betaincinv

# Those that add noise, and their default eta.
NOISY = {
    "euler_ancestral": (sample_euler_ancestral, 1.0),
    "dpmpp_2s_ancestral": (sample_dpmpp_2s_ancestral, 1.0),
    "dpmpp_sde": (sample_dpmpp_sde, 1.0),
    "res_2s": (sample_res_2s, 0.5),
    "euler_ancestral_cfg_pp": (sample_euler_ancestral_cfg_pp, 1.0),
    "dpmpp_2m_sde": (sample_dpmpp_2m_sde, 1.0),
    "res_2m": (sample_res_2m, 0.5),
    "res_multistep_ancestral": (sample_res_multistep_ancestral, 1.0),
    "sa_solver": (sample_sa_solver, 1.0),
}
TWO_STAGE = ("dpmpp_2s_ancestral", "dpmpp_sde", "res_2s", "res_2s_ode")


def without_noise(name):
    return partial(NOISY[name][0], eta=0.0)


# Without noise, and the order they reach.
SINGLE_STEP = {
    "euler_ancestral": (without_noise("euler_ancestral"), 1),
    "euler_ancestral_cfg_pp": (without_noise("euler_ancestral_cfg_pp"), 1),
    "euler_cfg_pp": (sample_euler_cfg_pp, 1),
    "dpmpp_2s_ancestral": (without_noise("dpmpp_2s_ancestral"), 2),
    "dpmpp_sde": (without_noise("dpmpp_sde"), 2),
    "dpmpp_sde, r 1": (partial(sample_dpmpp_sde, eta=0.0, r=1.0), 2),
    "dpmpp_sde, r 0.3": (partial(sample_dpmpp_sde, eta=0.0, r=0.3), 2),
    "res_2s": (without_noise("res_2s"), 2),
    "res_2s_ode": (sample_res_2s_ode, 2),
    "res_2s_ode, c2 1": (partial(sample_res_2s_ode, c2=1.0), 2),
    "res_2s_ode, c2 0.3": (partial(sample_res_2s_ode, c2=0.3), 2),
}
MULTISTEP = {
    "deis": (sample_deis, 3),
    "deis order 1": (partial(sample_deis, order=1), 1),
    "deis order 2": (partial(sample_deis, order=2), 2),
    "deis order 4": (partial(sample_deis, order=4), 4),
    "dpmpp_2m": (sample_dpmpp_2m, 2),
    "gradient_estimation": (sample_gradient_estimation, 2),
    "gradient_estimation gamma 2": (partial(sample_gradient_estimation, ge_gamma=2.0), 1),
    "res_2m_ode": (sample_res_2m_ode, 2),
    "dpmpp_2m_sde eta 0": (without_noise("dpmpp_2m_sde"), 2),
    "res_multistep_ancestral eta 0": (without_noise("res_multistep_ancestral"), 2),
    "sa_solver eta 0": (without_noise("sa_solver"), 4),
    "sa_solver eta 0, no corrector": (
        partial(sample_sa_solver, eta=0.0, corrector_order=0),
        3,
    ),
}
ALL = {
    **{name: sampler for name, (sampler, _) in NOISY.items()},
    **{name: sampler for name, (sampler, _) in MULTISTEP.items()},
    "res_2s_ode": sample_res_2s_ode,
    "euler_cfg_pp": sample_euler_cfg_pp,
}


def run(sampler, model, x, sigmas, extra_args=None, **kw):
    """The sampler on a model whose negative prompt, where asked for, predicts the same."""

    def heard(x, sigma, uncond_callback=None, **extra):
        denoised = model(x, sigma, **extra)
        if uncond_callback is not None:
            uncond_callback(denoised)
        return denoised

    if isinstance(sigmas, list):
        sigmas = torch.tensor(sigmas, dtype=torch.float64)
    return sampler(heard, x, sigmas, extra_args=extra_args, disable=True, **kw)


def points():
    return torch.linspace(-2, 2, 12, dtype=torch.float64).view(2, 6)


def many(rows=16384):
    return torch.randn(2, rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fixed_noise(seed=11):
    generator = torch.Generator().manual_seed(seed)
    return lambda s, t: torch.randn(2, 6, generator=generator, dtype=torch.float64)


def beta(steps):
    quantiles = betaincinv(0.6, 0.6, 1 - np.arange(steps) / steps)
    return torch.tensor(np.append(quantiles, 0.0))


def uniform(steps):
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def graded(steps, start=1.0, end=0.1):
    """Steps that begin small, as schedules do where the history is still short."""
    return start - (start - end) * torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 1.7


def half_log_snr(sigma):
    return math.log((1 - sigma) / sigma)
