"""Flows whose denoiser is exact, and where their trajectories end: what samplers are judged by.

Rectified flow: x = (1 - sigma) * picture + sigma * noise. B batch, D coordinates, K modes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

# (x (B, D), sigma (B,)) -> denoised (B, D)
Model = Callable[..., Tensor]
# Below this sigma the denoised picture is the end of the trajectory to 1e-9.
NEARLY_ZERO = 1e-5


@dataclass(frozen=True)
class Mixture:
    """Pictures from normal modes: weights (K,), means (K, D), variances (K, D), all fp64."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def __call__(self, x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        """The mean of all pictures that could have become x, (B, D)."""
        s = sigma.to(x)[:, None, None]
        means, own = self.means.to(x), self.variances.to(x)
        variance = (1 - s) ** 2 * own + s**2
        away = x[:, None] - (1 - s) * means  # (B, K, D)
        log = -0.5 * (away**2 / variance + variance.log()).sum(-1) + self.weights.to(x).log()
        each = means + (1 - s) * own / variance * away
        return (log.softmax(1)[..., None] * each).sum(1)

    def some(self, modes: int) -> "Mixture":
        """The first few modes: what a prompt leaves."""
        weights = self.weights[:modes] / self.weights[:modes].sum()
        return Mixture(weights, self.means[:modes], self.variances[:modes])

    @property
    def energy(self) -> float:
        """The mean square of a picture's coordinate."""
        square = (self.means**2 + self.variances).mean(1)
        return float((self.weights * square).sum())


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance with scale w between two flows."""

    cond: Model
    uncond: Model
    w: float

    def __call__(self, x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        without = self.uncond(x, sigma)
        return without + self.w * (self.cond(x, sigma) - without)


@dataclass(frozen=True)
class Straight:
    """Each noise n has the picture mean + deviation * n: every trajectory is a straight line."""

    mean: Tensor
    deviation: Tensor

    def __call__(self, x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        s = sigma.to(x)[:, None]
        mean, deviation = self.mean.to(x), self.deviation.to(x)
        noise = (x - (1 - s) * mean) / ((1 - s) * deviation + s)
        return mean + deviation * noise


@dataclass(frozen=True)
class Flow:
    """A test problem: a model, noise to start from (B, D) and where it ends, all fp64.

    scale: what one coordinate's errors are measured in, (D,).
    """

    name: str
    model: Model
    noise: Tensor
    solution: Tensor
    scale: Tensor

    def error(self, x: Tensor) -> float:
        """The median over the batch of |x - solution| / |solution|, coordinates in `scale`."""
        away, size = (x.double() - self.solution) / self.scale, self.solution / self.scale
        return float((away.norm(dim=1) / size.norm(dim=1)).median())


def integrate(model: Model, x: Tensor, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Where the flow takes x (B, D) fp64 from `start` to `end`, by scipy's eighth-order DOP853."""

    def field(s: float, flat: np.ndarray) -> np.ndarray:
        now = torch.from_numpy(flat).view_as(x)
        return ((now - model(now, now.new_full((len(x),), s))) / s).flatten().numpy()

    last = max(end, NEARLY_ZERO)
    found = solve_ivp(
        field, (start, last), x.flatten().numpy(), "DOP853", rtol=1e-10, atol=1e-10
    ).y[:, -1]
    arrived = torch.from_numpy(found).view_as(x)
    return model(arrived, arrived.new_full((len(x),), last)) if end < last else arrived


def normal(mean: Tensor, variance: Tensor) -> Mixture:
    """Normal pictures: mean (D,), variance (D,)."""
    return Mixture(torch.ones(1, dtype=torch.float64), mean[None], variance[None])


def normal_solution(
    mean: Tensor, variance: Tensor, x: Tensor, start: float = 1.0, end: float = 0.0
) -> Tensor:
    """Where the flow of normal pictures takes x (B, D), in closed form."""

    def deviation(s: float) -> Tensor:
        return ((1 - s) ** 2 * variance + s**2).sqrt()

    return (1 - end) * mean + (x - (1 - start) * mean) * deviation(end) / deviation(start)


def spectrum(power: float, at_one: float, count: int = 64) -> Tensor:
    """The variance of a picture's frequencies 1 to count, falling with `power`, (count,)."""
    return at_one * torch.arange(1, count + 1, dtype=torch.float64) ** -power


def ring(modes: int = 8, radius: float = 1.5, deviation: float = 0.2) -> Mixture:
    """Modes on a circle in the plane."""
    angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return Mixture(torch.full_like(angle, 1 / modes), means, torch.full_like(means, deviation**2))


def scattered(variance: Tensor, modes: int, seed: int, share: float = 0.5) -> Mixture:
    """Modes at random places, which make up `share` of the variance (D,)."""
    generator = torch.Generator().manual_seed(seed)
    size = (modes, len(variance))
    places = torch.randn(size, generator=generator, dtype=torch.float64)
    weights = torch.rand(modes, generator=generator, dtype=torch.float64) + 0.2
    each = ((1 - share) * variance).expand(size)
    return Mixture(weights / weights.sum(), (share * variance).sqrt() * places, each)


def start(coordinates: int, batch: int = 32, seed: int = 1) -> Tensor:
    """Noise (batch, coordinates) fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, coordinates, generator=generator, dtype=torch.float64)


def _numeric(name: str, model: Model, scale: Tensor) -> Flow:
    noise = start(len(scale))
    return Flow(name, model, noise, integrate(model, noise), scale)


def gaussian_flow() -> Flow:
    """One normal mode, narrow and away from the middle."""
    mean, variance = torch.full((4,), 0.5).double(), torch.full((4,), 0.16).double()
    noise = start(4)
    solution = normal_solution(mean, variance, noise)
    return Flow("gaussian", normal(mean, variance), noise, solution, torch.ones(4).double())


def spectrum_flow() -> Flow:
    """Normal pictures with the power spectrum of natural images."""
    variance = spectrum(2.0, 627.0)
    mean, noise = torch.zeros_like(variance), start(len(variance))
    solution = normal_solution(mean, variance, noise)
    return Flow("spectrum", normal(mean, variance), noise, solution, variance.sqrt())


def straight_flow() -> Flow:
    """What one more round of rectification would make: straight lines."""
    mean, deviation = torch.full((4,), 0.5).double(), torch.linspace(0.2, 2, 4).double()
    noise = start(4)
    model, solution = Straight(mean, deviation), mean + deviation * noise
    return Flow("straight", model, noise, solution, torch.ones(4).double())


def nearly_straight_flow(share: float = 0.8) -> Flow:
    """A few-step model: `share` of the velocity is that of straight lines."""
    variance = spectrum(1.5, 120.0)
    mean = torch.zeros_like(variance)
    model = Guided(Straight(mean, variance.sqrt()), scattered(variance, 24, seed=4), share)
    return _numeric("nearly straight", model, variance.sqrt())


def all_flows() -> list[Flow]:
    """Every problem; those of images measure each frequency by its own deviation."""
    one = torch.ones(16).double()
    wide, image = scattered(one, 32, seed=2), scattered(spectrum(2.0, 627.0), 24, seed=3)
    rough = scattered(spectrum(1.5, 120.0), 24, seed=5)
    frequencies, roughness = spectrum(2.0, 627.0).sqrt(), spectrum(1.5, 120.0).sqrt()
    return [
        gaussian_flow(),
        spectrum_flow(),
        straight_flow(),
        nearly_straight_flow(),
        _numeric("ring", ring(), torch.ones(2).double()),
        _numeric("mixture", wide, one),
        _numeric("mixture, cfg 4", Guided(wide.some(4), wide, 4.0), one),
        _numeric("image", image, frequencies),
        _numeric("image, cfg 4", Guided(image.some(3), image, 4.0), frequencies),
        _numeric("rough image, cfg 4", Guided(rough.some(3), rough, 4.0), roughness),
    ]
