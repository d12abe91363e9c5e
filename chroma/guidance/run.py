"""Guidance over one sampling run: the plan's rules, and what they remember between model calls."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from . import rules
from .plan import Guidance, is_one

# (cond, uncond, scale) -> guided, all denoised: what stands at place 5 of the plan.
Combine = Callable[[Tensor, Tensor, float], Tensor]


@dataclass
class GuidanceRun:
    """One run under `plan`, from its first model call to its last; a new run needs a new one.

    passes: how often a prompt went through the model; cond and uncond together count two.
    calls: how often the sampler asked for a prediction.
    """

    plan: Guidance
    passes: int = 0
    calls: int = 0
    _levels: list[float] = field(default_factory=list)
    _difference: Tensor | None = None

    def count(self, passes: int) -> None:
        """Note one model call that ran so many prompts."""
        self.calls += 1
        self.passes += passes

    def holds_still(self, sigma: float) -> bool:
        """Whether the velocity is zero here: sigma is among the first `zero_init` levels seen."""
        if len(self._levels) < self.plan.zero_init and sigma not in self._levels:
            self._levels.append(sigma)
        return sigma in self._levels

    def guide(
        self,
        x: Tensor,
        cond: Tensor,
        uncond: Tensor,
        scale: float,
        combine: Combine = rules.classifier_free,
    ) -> Tensor:
        """The guided prediction; x is the latent, all others are denoised, (B, C, h, w)."""
        if is_one(scale):
            return cond
        plan = self.plan
        if plan.zero_star:
            uncond = x - rules.zero_star_scale(x - cond, x - uncond) * (x - uncond)
        if plan.has_apg:
            # c + (w - 1) d is classifier-free guidance away from c - d.
            uncond = cond - self._projected(cond, cond - uncond)
        guided = combine(cond, uncond, scale)
        if plan.rescale:
            guided = x - rules.rescale(x - guided, x - cond, plan.rescale)
        return guided

    def _projected(self, cond: Tensor, difference: Tensor) -> Tensor:
        plan = self.plan
        if plan.apg_momentum:
            if self._difference is not None:
                difference = difference + plan.apg_momentum * self._difference
            self._difference = difference
        if plan.apg_norm:
            difference = rules.limit_norm(difference, plan.apg_norm)
        return rules.weigh_parallel(difference, cond, plan.apg_eta)
