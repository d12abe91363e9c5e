"""Settings that belong together, as the model's author recommends them."""

from dataclasses import dataclass, replace

from .config import ChromaConfig
from .tiny import files as small


@dataclass(frozen=True)
class Preset:
    """Steps, guidance scale, sampler, scheduler and shift for one variant of Chroma."""

    steps: int
    cfg: float
    sampler: str
    scheduler: str = "beta"
    alpha: float = 0.6
    beta: float = 0.6
    shift: float = 1.0

    def __str__(self) -> str:
        """All of it in one line."""
        options = " ".join(f"{name} {value:g}" for name, value in self.schedule_options.items())
        schedule = f"{self.scheduler} ({options})" if options else self.scheduler
        return (
            f"{self.sampler}, {self.steps} steps, {schedule}, shift {self.shift:g}, "
            f"cfg {self.cfg:g}"
        )

    def changed(self, steps: int, cfg: float) -> "Preset":
        """With other steps and guidance scale, where these are not 0."""
        return replace(self, steps=steps or self.steps, cfg=cfg or self.cfg)

    @property
    def schedule_options(self) -> dict[str, float]:
        """What the scheduler takes beside steps and shift."""
        return {"alpha": self.alpha, "beta": self.beta} if self.scheduler == "beta" else {}


# The least error of all samplers at equal evaluations (benchmarks/sampling.py).
BASE = Preset(steps=26, cfg=4.0, sampler="flow_pec")
# Chroma1-Flash has its guidance baked in: cfg 1, and half the cost of a step.
FLASH = Preset(steps=8, cfg=1.0, sampler="flash")
PRESETS: dict[str, Preset] = {
    "Base / HD": BASE,
    # With flow_pec nearer to the converged picture than the other samplers are after 26 steps.
    "Base / HD, 16 steps": replace(BASE, steps=16),
    "Flash": FLASH,
    "Flash, 16 steps": replace(FLASH, steps=16),
}


def own_size(config: ChromaConfig) -> int:
    """The side in pixels of the pictures that a model was trained on, by its width."""
    return 1024 if config.hidden >= ChromaConfig().hidden else small.SIZE
