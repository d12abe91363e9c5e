"""flow_pec with noise, where the distribution of pictures is known: energy, order, little noise."""

import math
from functools import partial

import flows
import pytest
import torch
from chroma_nodes.samplers.flow_pec import sample_flow_pec
from chroma_nodes.samplers.steps import half_log_snr, sde_step
from chroma_nodes.schedulers import get_sigmas
from scipy.integrate import solve_ivp

# Name: pictures, and how many to sample for an energy to within a percent.
PICTURES = {
    "gaussian": (
        flows.normal(torch.full((4,), 0.5).double(), torch.full((4,), 0.16).double()),
        8192,
    ),
    "spectrum": (flows.normal(torch.zeros(64).double(), flows.spectrum(2.0, 627.0)), 512),
    "ring": (flows.ring(), 2048),
    "mixture": (flows.scattered(torch.ones(16).double(), 8, seed=2), 1024),
}
SCHEDULES = {
    "beta .6": partial(get_sigmas, "beta"),
    "beta .4": partial(get_sigmas, "beta", alpha=0.4, beta=0.4),
    "sigmoid_offset": partial(get_sigmas, "sigmoid_offset"),
    "simple": partial(get_sigmas, "simple"),
    "kl_optimal": partial(get_sigmas, "kl_optimal"),
    "bong_tangent": partial(get_sigmas, "bong_tangent"),
    "power_odds": partial(get_sigmas, "power_odds"),
}
# Long last steps in log-SNR need more of them.
STEPS = [
    *(("beta .6", steps) for steps in (16, 26, 52)),
    *((name, 16) for name in ("beta .4", "sigmoid_offset")),
    *((name, 26) for name in ("simple", "kl_optimal")),
    *(("bong_tangent", steps) for steps in (16, 26, 52)),
    *(("power_odds", steps) for steps in (26, 52)),
]


def run(model, x, sigmas, **options):
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    return sample_flow_pec(model, x, sigmas, disable=True, extra_args={"seed": 3}, **options)


def even(steps, end=0.2):
    return torch.linspace(0.9, end, steps + 1, dtype=torch.float64)


def energy(name, sigmas, **options):
    """The samples' variance over that of the pictures, mean of all coordinates."""
    pictures, count = PICTURES[name]
    mean = (pictures.weights[:, None] * pictures.means).sum(0)
    square = (pictures.weights[:, None] * (pictures.variances + pictures.means**2)).sum(0)
    noise = flows.start(len(mean), batch=count, seed=5)
    out = run(pictures, noise, sigmas, **options)
    return float(((out - mean).square().mean(0) / (square - mean**2)).mean())


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("schedule", "steps"), STEPS)
@pytest.mark.parametrize("name", PICTURES)
def test_energy_is_that_of_the_pictures(name, schedule, steps, eta):
    assert energy(name, SCHEDULES[schedule](steps), eta=eta) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.5])
def test_mean_and_deviation_come_to_the_truth(eta):
    pictures, count = PICTURES["gaussian"]
    noise = flows.start(4, batch=count, seed=5)
    out = run(pictures, noise, get_sigmas("beta", 150), eta=eta)
    assert float(out.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(out.std()) == pytest.approx(0.4, rel=0.015)


class Path:
    """One Brownian path in the SDE's own time, told to every grid the same.

    A step's noise is the integral of exp((1 + rate) lambda) dW, scaled to variance 1: sums of the
    finest grid's draws.
    """

    def __init__(self, finest, rate, like, seed=7):
        self.sigmas, self.rate = finest, rate
        generator = torch.Generator().manual_seed(seed)
        self.draws = [
            torch.randn(like.shape, generator=generator, dtype=like.dtype) for _ in finest[1:]
        ]

    def __call__(self, sigma, following):
        first, last = (min(range(len(self.sigmas)), key=lambda i: abs(self.sigmas[i] - level))
                       for level in (sigma, following))  # fmt: skip
        total = torch.zeros_like(self.draws[0])
        for i in range(first, last):
            keep, _, spread = sde_step(self.sigmas[i], self.sigmas[i + 1], self.rate)
            total = keep * total + spread * self.draws[i]
        return total / sde_step(sigma, following, self.rate)[2]


def strong_errors(pictures, noise, eta, counts, finest=512, **options):
    """Root mean squares, on one path, of the distance to the finest grid's samples."""
    grid = even(finest)
    path = Path(grid.tolist(), eta**2, noise)

    def samples(count):
        sigmas = grid[:: finest // count]
        return run(pictures, noise, sigmas, eta=eta, noise_sampler=path, order=2, **options)

    truth = samples(finest)
    return [float((samples(count) - truth).square().mean().sqrt()) for count in counts]


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("name", ["gaussian", "ring"])
def test_strong_order_one(name, eta):
    """On one path of noise, the order of every formula that takes one number from a step of it."""
    pictures, _ = PICTURES[name]
    noise = flows.start(pictures.means.shape[1], batch=64, seed=5)
    coarse, fine = strong_errors(pictures, noise, eta, (32, 128))
    assert math.log2(coarse / fine) / 2 > 0.85


def test_the_error_of_little_noise_is_in_proportion_to_it():
    """Beside the flow's own error, of third order, one of eta times the step is left."""
    pictures, _ = PICTURES["gaussian"]
    noise = flows.start(4, batch=64, seed=5)
    (more,), (less,) = (strong_errors(pictures, noise, eta, (128,)) for eta in (0.1, 0.01))
    assert 5 < more / less < 12


def distances(pictures, x, sigmas, etas, **options):
    plain = run(pictures, x, sigmas)
    return [float((run(pictures, x, sigmas, eta=e, **options) - plain).norm()) for e in etas]


@pytest.mark.parametrize("sigmas", [even(104, end=0.0), get_sigmas("beta", 52)])
@pytest.mark.parametrize("name", PICTURES)
def test_little_noise_moves_a_picture_little(name, sigmas):
    """Also from sigma 1, where any noise at all could replace x, being infinitely far away."""
    pictures, _ = PICTURES[name]
    x = flows.start(pictures.means.shape[1], batch=16)
    some, little, hardly, none = distances(pictures, x, sigmas, (0.1, 0.01, 0.001, 1e-7))
    # Where the flow parts, as on the ring, a few pictures go another way.
    assert 4 < some / little < 13
    # What is left: polynomials in the picture instead of the velocity.
    assert hardly < little / 2 and none < float(x.norm()) * 2e-3


def test_no_noise_at_all_is_the_flow_up_to_its_error():
    pictures, _ = PICTURES["gaussian"]
    x = flows.start(4, batch=16)

    def distance(steps):
        sigmas = even(steps)
        return distances(pictures, x, sigmas, (1e-8,))[0]

    assert math.log2(distance(64) / distance(128)) > 2.5


def drift_solution(pictures, x, eta, start, end):
    """The SDE's drift alone: x = sigma y, dy/dlambda = -eta^2 y + (1 + eta^2) exp(lambda) D."""

    def field(value, flat):
        sigma = 1 / (1 + math.exp(value))
        y = torch.from_numpy(flat).view_as(x)
        denoised = pictures(sigma * y, y.new_full((len(y),), sigma))
        return (-(eta**2) * y + (1 + eta**2) * math.exp(value) * denoised).flatten().numpy()

    span = [half_log_snr(start), half_log_snr(end)]
    found = solve_ivp(field, span, (x / start).flatten().numpy(), "DOP853", rtol=1e-11, atol=1e-11)
    return end * torch.from_numpy(found.y[:, -1]).view_as(x)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_without_its_noise_the_drift_is_integrated_with_third_order(eta):
    pictures, _ = PICTURES["mixture"]
    x = flows.start(16, batch=16)
    exact = drift_solution(pictures, x, eta, 0.9, 0.2)

    def error(steps):
        out = run(pictures, x, even(steps), eta=eta, s_noise=0.0, order=3, kappa=9.0)
        return float((out - exact).square().mean().sqrt())

    coarse, fine = error(64), error(128)
    assert fine < 1e-5 and math.log2(coarse / fine) > 2.7


def test_without_its_noise_the_drift_is_exact_where_it_leaves_denoised_alone():
    """As it does for normal pictures at eta 1."""
    pictures, _ = PICTURES["gaussian"]
    x = flows.start(4, batch=16)
    exact = drift_solution(pictures, x, 1.0, 0.9, 0.2)
    # Short enough steps for the whole eta.
    out = run(pictures, x, even(40), eta=1.0, s_noise=0.0)
    torch.testing.assert_close(out, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_less_noise_than_its_own_gives_less_energy(schedule):
    sigmas = SCHEDULES[schedule](26)
    energies = [energy("gaussian", sigmas, eta=0.7, s_noise=s) for s in (0.0, 0.5, 1.0, 1.2)]
    assert energies == sorted(energies) and energies[0] < 0.5 and energies[3] > 1.1
