"""Samplers: (model, x, sigmas) -> x at the last sigma, in k-diffusion's contract.

model(x, sigma (B,), **extra_args) -> denoised. `callback` gets one dict per step: i, x, sigma,
sigma_hat, denoised. `disable` hides the progress bar. Sigmas are in [0, 1] and never
rise; where one is repeated, x stays as it is.
"""

from collections.abc import Callable

from torch import Tensor

from .cfg_pp import sample_euler_ancestral_cfg_pp, sample_euler_cfg_pp
from .choose import OWN_ETA, choose, own_or, takes
from .deis import sample_deis
from .dpmpp_2m import sample_dpmpp_2m
from .dpmpp_2m_sde import sample_dpmpp_2m_sde
from .dpmpp_2s_ancestral import sample_dpmpp_2s_ancestral
from .dpmpp_sde import sample_dpmpp_sde
from .euler import sample_euler
from .euler_ancestral import sample_euler_ancestral
from .flash import sample_flash
from .flow_pec import sample_flow_pec
from .gradient_estimation import sample_gradient_estimation
from .heun import sample_heun
from .res_2m import sample_res_2m, sample_res_2m_ode
from .res_2s import sample_res_2s, sample_res_2s_ode
from .res_multistep import sample_res_multistep, sample_res_multistep_ancestral
from .sa_solver import sample_sa_solver

__all__ = ["OWN_ETA", "SAMPLERS", "choose", "own_or", "takes"]

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "flow_pec": sample_flow_pec,
    "euler": sample_euler,
    "euler_ancestral": sample_euler_ancestral,
    "euler_cfg_pp": sample_euler_cfg_pp,
    "euler_ancestral_cfg_pp": sample_euler_ancestral_cfg_pp,
    "heun": sample_heun,
    "res_multistep": sample_res_multistep,
    "res_multistep_ancestral": sample_res_multistep_ancestral,
    "res_2m": sample_res_2m,
    "res_2m_ode": sample_res_2m_ode,
    "res_2s": sample_res_2s,
    "res_2s_ode": sample_res_2s_ode,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "dpmpp_sde": sample_dpmpp_sde,
    "dpmpp_2s_ancestral": sample_dpmpp_2s_ancestral,
    "deis": sample_deis,
    "gradient_estimation": sample_gradient_estimation,
    "sa_solver": sample_sa_solver,
    "flash": sample_flash,
}
