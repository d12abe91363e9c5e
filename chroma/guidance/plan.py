"""What guidance a run wants: the scale over sigma, and which rules apply."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import SamplingError

# How much of `cfg`, rather than `cfg_end`, holds at a sigma.
CURVES: dict[str, Callable[[float], float]] = {
    "constant": lambda sigma: 1.0,
    "linear": lambda sigma: sigma,
    "cosine": lambda sigma: (1 - math.cos(math.pi * sigma)) / 2,
}
# Sigmas come in fp32, bounds as typed: 0.3 in fp32 is not below 0.3.
SLACK = 1e-6


def check_cfg(cfg: float, name: str = "cfg") -> float:
    """The scale itself if it is usable. Raises SamplingError otherwise."""
    if not (math.isfinite(cfg) and 0 <= cfg <= 100):
        raise SamplingError(
            f"{name} {cfg} is not usable; expected a number from 0 to 100, usually 4"
        )
    return cfg


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance and its refinements; each default changes nothing.

    For each model call, in this order:
    1. `zero_init`: at the first so many noise levels of the run the velocity is zero and the model
       is not run (CFG-Zero*). For runs from pure noise.
    2. `curve` leads the scale from `cfg` at sigma 1 to `cfg_end` at sigma 0. Outside of sigma from
       `interval_start` down to `interval_end` it is 1 (Kynkäänniemi et al. 2024,
       arXiv:2404.07724). Where it is 1 the uncond pass is not run and no later rule changes
       anything.
    3. `zero_star`: the uncond velocity is scaled to lie nearest to the cond one (CFG-Zero*).
    4. `apg_momentum`, `apg_norm`, `apg_eta`: the difference of the denoised latents becomes itself
       plus momentum times the last one; is cut to this Euclidean norm over all values of one latent
       (0: not cut); keeps this share of its part along the cond one (APG).
    5. Guidance with the scale of 2.
    6. `rescale`: this share of the way to the cond velocity's standard deviation.
    Raises SamplingError for values that cannot be used.
    """

    cfg: float
    curve: str = "constant"
    cfg_end: float = 1.0
    interval_start: float = 1.0
    interval_end: float = 0.0
    rescale: float = 0.0
    zero_star: bool = False
    zero_init: int = 0
    apg_eta: float = 1.0
    apg_norm: float = 0.0
    apg_momentum: float = 0.0

    def __post_init__(self) -> None:
        check_cfg(self.cfg)
        check_cfg(self.cfg_end, "cfg_end")
        if self.curve not in CURVES:
            raise SamplingError(
                f"unknown curve '{self.curve}'; expected one of {', '.join(CURVES)}"
            )
        for name in ("interval_start", "interval_end", "rescale", "apg_eta"):
            self._require(name, 0 <= getattr(self, name) <= 1, "a number from 0 to 1")
        if self.interval_start < self.interval_end:
            raise SamplingError(
                f"interval_start {self.interval_start} is below interval_end {self.interval_end}; "
                "expected the larger sigma first, since sigma falls over a run"
            )
        self._require("apg_momentum", abs(self.apg_momentum) < 1, "a number between -1 and 1")
        usable = math.isfinite(self.apg_norm) and self.apg_norm >= 0
        self._require("apg_norm", usable, "0 for no limit, or a positive number")
        self._require("zero_init", self.zero_init >= 0, "0 or a number of steps")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise SamplingError(f"{name} {getattr(self, name)} is not usable; expected {expected}")

    def scale(self, sigma: float) -> float:
        """The guidance scale at a noise level."""
        if not self.interval_end - SLACK <= sigma <= self.interval_start + SLACK:
            return 1.0
        if self.curve == "constant":
            return self.cfg
        return self.cfg_end + (self.cfg - self.cfg_end) * CURVES[self.curve](sigma)

    @property
    def uses_uncond(self) -> bool:
        """Whether the scale differs from 1 at some sigma."""
        ends = (self.cfg,) if self.curve == "constant" else (self.cfg, self.cfg_end)
        return not all(is_one(cfg) for cfg in ends)

    @property
    def has_apg(self) -> bool:
        return (self.apg_eta, self.apg_norm, self.apg_momentum) != (1, 0, 0)

    @property
    def has_rules(self) -> bool:
        """Whether anything but the scale differs from plain classifier-free guidance."""
        return self.zero_star or self.has_apg or self.rescale != 0


def is_one(scale: float) -> bool:
    """Whether the uncond prediction has no effect."""
    return math.isclose(scale, 1.0)
