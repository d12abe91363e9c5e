"""Samplers: (model, x, sigmas) -> x at the last sigma, in k-diffusion's contract.

model(x, sigma (B,), **extra_args) -> denoised. `callback` gets one dict per step: i, x, sigma,
sigma_hat, denoised. `disable` hides the progress bar. Sigmas are in [0, 1] and never
rise; where one is repeated, x stays as it is.
"""

from collections.abc import Callable

from torch import Tensor

from .euler import sample_euler
from .flash import sample_flash
from .heun import sample_heun
from .res_multistep import sample_res_multistep

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": sample_euler,
    "heun": sample_heun,
    "res_multistep": sample_res_multistep,
    "flash": sample_flash,
}
