"""Fresh noise for stochastic samplers, the same for the same seed on every device."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..chroma.errors import SamplingError

SEED_OFFSET = 1
SEEDS = 2**64
MOST_ROWS = 2**20


class RowSeeds(int):
    """A seed for each row of a batch, so that a row comes out as if it were alone.

    As a number it is the first of them, for samplers that know one seed only.
    """

    rows: Sequence[int]

    @classmethod
    def of(cls, seeds: Sequence[int]) -> "RowSeeds":
        """Raises SamplingError unless there is at least one."""
        if not seeds:
            raise SamplingError("no seeds; expected one for each picture")
        self = cls(seeds[0])
        self.rows = seeds
        return self

    @classmethod
    def counting(cls, first: int) -> "RowSeeds":
        """first, first + 1, ... for as many rows as there may be."""
        return cls.of(range(first, first + MOST_ROWS))

    def take(self, count: int) -> list[int]:
        """The seeds of the first `count` rows. Raises SamplingError if there are fewer."""
        if len(self.rows) < count:
            raise SamplingError(
                f"{len(self.rows)} seeds do not fit a batch of {count} pictures; "
                "expected one for each picture"
            )
        return [seed % SEEDS for seed in self.rows[:count]]


def noise_source(x: Tensor, extra_args, noise_sampler) -> Callable[[float, float], Tensor]:
    """(sigma, following sigma) -> unit normal noise like x: `noise_sampler`, or drawn on the CPU.

    The generator's seed is extra_args["seed"] + 1, or random where there is none: the seed itself
    has drawn the noise that x started from. With RowSeeds every row has a generator of its own.
    """
    if noise_sampler is not None:
        return noise_sampler
    seed = (extra_args or {}).get("seed")
    if isinstance(seed, RowSeeds):
        shape = (1, *x.shape[1:])
        generators = [_generator(row) for row in seed.take(len(x))]
    else:
        shape, generators = tuple(x.shape), [_generator(seed)]

    def draw(sigma: float, following: float) -> Tensor:
        rows = [torch.randn(shape, generator=g, dtype=x.dtype) for g in generators]
        return torch.cat(rows).to(x.device)

    return draw


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator(device="cpu")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed((seed + SEED_OFFSET) % SEEDS)
    return generator


def check_stochastic(name: str, eta: float, s_noise: float) -> None:
    """Raises SamplingError unless the noise options are finite and not negative."""
    for option, value in (("eta", eta), ("s_noise", s_noise)):
        if not (math.isfinite(value) and value >= 0):
            raise SamplingError(f"{name}: {option} {value} is not usable; expected 0 or more")
