"""DPM-Solver++(2M): one evaluation a step, second order."""

from torch import Tensor

from .dpmpp_2m_sde import sample_dpmpp_2m_sde


def sample_dpmpp_2m(model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2) in ln((1 - sigma) / sigma).

    ComfyUI's `dpmpp_2m` takes -ln(sigma) instead, which is the half-log-SNR of other models.
    """
    return sample_dpmpp_2m_sde(model, x, sigmas, extra_args, callback, disable, eta=0.0)
