"""Fresh noise in samplers: its energy, its source, and its options."""

import math

import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.samplers.noise import noise_source
from chroma_nodes.samplers.steps import between
from sampler_cases import NOISY, beta, many, points, run, uniform
from test_samplers import SPREAD, gaussian, two_modes

TWO_STAGE = ("dpmpp_2s_ancestral", "dpmpp_sde", "res_2s")
MULTISTEP = ("dpmpp_2m_sde", "res_2m", "res_multistep_ancestral", "sa_solver")
# Name, eta, tolerance: multistep samplers at their default eta.
ENERGIES = [
    *((name, eta, 0.02) for name in TWO_STAGE for eta in (0.5, 1.0)),
    *((name, NOISY[name][1], 0.05) for name in MULTISTEP),
]


def energy(sampler, flow, sigmas, **kw):
    """The mean square of the samples over that of the pictures."""
    model = {"gaussian": gaussian, "two_modes": two_modes}[flow]
    truth = SPREAD**2 + {"gaussian": 0.25, "two_modes": 1.0}[flow]
    out = run(sampler, lambda x, s, **_: model(x, s), many(), sigmas, extra_args={"seed": 5}, **kw)
    return float(out.square().mean()) / truth


@pytest.mark.parametrize("flow", ["gaussian", "two_modes"])
@pytest.mark.parametrize("schedule", [uniform, beta])
@pytest.mark.parametrize(("name", "eta", "tolerance"), ENERGIES)
def test_samples_have_the_energy_of_the_pictures(name, eta, tolerance, schedule, flow):
    assert energy(NOISY[name][0], flow, schedule(26), eta=eta) == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("flow", ["gaussian", "two_modes"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["euler_ancestral", "euler_ancestral_cfg_pp"])
def test_missing_energy_of_first_order_samplers_halves_with_the_step(name, eta, flow):
    """They lack 4 to 10 percent at 26 steps, as Euler's method does."""
    lack = [1 - energy(NOISY[name][0], flow, beta(n), eta=eta) for n in (26, 104)]
    assert 0.03 < lack[0] < 0.11
    assert -0.01 < lack[1] < 0.35 * lack[0]


@pytest.mark.parametrize("name", NOISY)
def test_more_steps_bring_the_mean_and_deviation_to_the_truth(name):
    x, kw = many(), {"extra_args": {"seed": 5}, "eta": 1.0}
    out = run(NOISY[name][0], lambda x, s, **_: gaussian(x, s), x, beta(150), **kw)
    assert float(out.mean()) == pytest.approx(0.5, abs=0.01)
    loose = name.startswith("euler")
    assert float(out.std()) == pytest.approx(SPREAD, rel=0.04 if loose else 0.015)


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("s_noise", [1.0, 0.5])
@pytest.mark.parametrize("sigma", [1.0, 0.6])
def test_a_step_mixes_picture_and_noise_as_rectified_flow_does(name, sigma, s_noise):
    """A step to t gives (1 - t) picture and t noise: what is left of the old, and the fresh."""
    picture, t, following = 0.8, 0.4, torch.tensor(0.8).double().view(1, 1)

    def state(old, *new):
        draws = iter((*new, 0.0, 0.0))
        x = ((1 - sigma) * following + sigma * old).double()
        return float(
            run(
                NOISY[name][0], lambda x, s: following, x, [sigma, t], eta=1.0, s_noise=s_noise,
                noise_sampler=lambda s, t: torch.full_like(x, next(draws)),
            )
        )  # fmt: skip

    still = state(0.0)
    assert still == pytest.approx((1 - t) * picture)
    old, *fresh = state(1.0) - still, state(0.0, 1.0) - still, state(0.0, 0.0, 1.0) - still
    assert (old / t) ** 2 + sum((f / s_noise / t) ** 2 for f in fresh) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", NOISY)
def test_noise_comes_from_the_seed_or_the_noise_sampler(name):
    sampler, default = NOISY[name]
    x, sigmas = points(), [1.0, 0.7, 0.7, 0.4, 0.1, 0.0]

    def out(**kw):
        return run(sampler, lambda x, s, seed=0: two_modes(x, s), x, sigmas, **kw)

    first = out(extra_args={"seed": 1})
    assert torch.equal(first, out(extra_args={"seed": 1}))
    assert torch.equal(first, out(extra_args={"seed": 1}, eta=default))
    assert not torch.equal(first, out(extra_args={"seed": 2}))
    assert not torch.equal(out(), out())
    assert bool(out(extra_args={"seed": 2**64 - 1}).isfinite().all())
    calls = []

    def record(sigma, following):
        calls.extend((float(sigma), float(following)))
        return torch.ones_like(x)

    out(noise_sampler=record)
    expected = [1.0, 0.7, 0.7, 0.4, 0.4, 0.1]
    if name == "dpmpp_sde":  # Two parts a step.
        first, second, third = 0.7**0.5, between(0.7, 0.4, 0.5), between(0.4, 0.1, 0.5)
        expected = [1.0, first, first, 0.7, 0.7, second, second, 0.4, 0.4, third, third, 0.1]
    if name == "sa_solver":  # Noise between sigma 0.2 and 0.8 alone.
        expected = expected[:4]
    assert calls == pytest.approx(expected)
    still = out(noise_sampler=lambda s, t: torch.full_like(x, 1e6), s_noise=0.0)
    assert float(still.abs().max()) < 10
    quiet = out(extra_args={"seed": 1}, eta=0.0)
    assert torch.equal(quiet, out(extra_args={"seed": 2}, eta=0.0, s_noise=3.0))


def test_every_draw_and_row_has_its_own_noise():
    x = torch.zeros(3, 2000)
    draw = noise_source(x, {"seed": 9}, None)
    started = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    rows = torch.cat([started, draw(1.0, 0.8), draw(0.8, 0.6)])
    together = torch.corrcoef(rows) - torch.eye(len(rows))
    assert float(together.abs().max()) < 0.1
    assert float(rows.std()) == pytest.approx(1, abs=0.02)
    again = noise_source(x, {"seed": 9}, None)(0.3, 0.2)
    assert torch.equal(again, rows[3:6])


@pytest.mark.parametrize("name", NOISY)
def test_rows_that_start_alike_part(name):
    x = points()[:1].expand(2, -1)
    out = run(NOISY[name][0], lambda x, s, seed: two_modes(x, s), x, uniform(4), {"seed": 9})
    assert float((out[0] - out[1]).abs().min()) > 1e-6


@pytest.mark.parametrize("eta", [1.5, 4.0])
@pytest.mark.parametrize("name", NOISY)
def test_large_eta_stays_finite(name, eta):
    out = run(NOISY[name][0], gaussian, points(), [1.0, 0.9, 0.5, 0.1, 0.01, 0.0], eta=eta)
    assert bool(out.isfinite().all()) and float(out.abs().max()) < 20


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("option", ["eta", "s_noise"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_unusable_noise_options(name, option, value):
    says = "res_multistep" if name == "res_multistep_ancestral" else name
    with pytest.raises(SamplingError, match=f"{says}: {option} {value}") as error:
        run(NOISY[name][0], gaussian, points(), [1.0, 0.5, 0.0], **{option: value})
    assert "\n" not in str(error.value)
