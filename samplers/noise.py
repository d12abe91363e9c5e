"""Fresh noise for stochastic samplers, the same for the same seed on every device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..chroma.errors import SamplingError

SEED_OFFSET = 1
SEEDS = 2**64


def noise_source(x: Tensor, extra_args, noise_sampler) -> Callable[[float, float], Tensor]:
    """(sigma, following sigma) -> unit normal noise like x: `noise_sampler`, or drawn on the CPU.

    The generator's seed is extra_args["seed"] + 1, or random where there is none: the seed itself
    has drawn the noise that x started from.
    """
    if noise_sampler is not None:
        return noise_sampler
    generator = torch.Generator(device="cpu")
    seed = (extra_args or {}).get("seed")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed((seed + SEED_OFFSET) % SEEDS)

    def draw(sigma: float, following: float) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)

    return draw


def check_stochastic(name: str, eta: float, s_noise: float) -> None:
    """Raises SamplingError unless the noise options are finite and not negative."""
    for option, value in (("eta", eta), ("s_noise", s_noise)):
        if not (math.isfinite(value) and value >= 0):
            raise SamplingError(f"{name}: {option} {value} is not usable; expected 0 or more")
