"""Samplers: (model, x, sigmas) -> x at the last sigma, in k-diffusion's contract.

model(x, sigma (B,), **extra_args) -> denoised. `callback` gets one dict per step: i, x, sigma,
sigma_hat, denoised. `disable` hides the progress bar. Sigmas are in [0, 1] and never
rise; where one is repeated, x stays as it is.
"""

from collections.abc import Callable

from torch import Tensor

from .choose import OWN_ETA, choose, own_or, takes
from .deis import sample_deis
from .dpmpp_2m import sample_dpmpp_2m
from .dpmpp_2m_sde import sample_dpmpp_2m_sde
from .euler import sample_euler
from .flash import sample_flash
from .gradient_estimation import sample_gradient_estimation
from .heun import sample_heun
from .res_2m import sample_res_2m, sample_res_2m_ode
from .res_multistep import sample_res_multistep, sample_res_multistep_ancestral
from .sa_solver import sample_sa_solver

__all__ = ["OWN_ETA", "SAMPLERS", "choose", "own_or", "takes"]

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": sample_euler,
    "heun": sample_heun,
    "res_multistep": sample_res_multistep,
    "res_multistep_ancestral": sample_res_multistep_ancestral,
    "res_2m": sample_res_2m,
    "res_2m_ode": sample_res_2m_ode,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "deis": sample_deis,
    "gradient_estimation": sample_gradient_estimation,
    "sa_solver": sample_sa_solver,
    "flash": sample_flash,
}
