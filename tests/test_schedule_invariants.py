"""Every schedule falls strictly from one to zero, whatever its options; all else is an error."""

import math

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.schedulers import SCHEDULERS, get_sigmas
from chroma_nodes.schedulers.beta import beta57_sigmas
from chroma_nodes.schedulers.bong_tangent import bong_tangent_sigmas
from chroma_nodes.schedulers.kl_optimal import kl_optimal_sigmas
from chroma_nodes.schedulers.linear_quadratic import linear_quadratic_sigmas
from chroma_nodes.schedulers.normal import normal_sigmas
from chroma_nodes.schedulers.optimal_steps import optimal_steps_sigmas
from chroma_nodes.schedulers.power_odds import power_odds_sigmas
from chroma_nodes.schedulers.sigmoid_offset import sigmoid_offset_sigmas
from chroma_nodes.schedulers.simple import simple_sigmas
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from schedule_cases import SHIFTS, STEPS
from scipy import stats

# Every option over its whole range, both ends included.
OPTIONS = {
    beta57_sigmas: {},
    bong_tangent_sigmas: {
        "pivot_1": st.floats(0, 1),
        "pivot_2": st.floats(0, 1),
        "slope_1": st.floats(0.01, 1),
        "slope_2": st.floats(0.01, 1),
        "middle": st.floats(0.05, 0.95),
    },
    kl_optimal_sigmas: {"sigma_min": st.just(0) | st.floats(1e-6, 0.5)},
    linear_quadratic_sigmas: {"threshold_noise": st.floats(0.001, 0.5)},
    normal_sigmas: {"sigma_min": st.just(0) | st.floats(1e-6, 0.5)},
    optimal_steps_sigmas: {},
    power_odds_sigmas: {"p": st.floats(0.25, 4), "a": st.floats(0.01, 100)},
    simple_sigmas: {},
}


def assert_runs_from_one_to_zero(sigmas: torch.Tensor, steps: int) -> None:
    assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert bool(sigmas.isfinite().all()) and bool((sigmas[1:] < sigmas[:-1]).all())


@pytest.mark.parametrize("schedule", OPTIONS, ids=lambda schedule: schedule.__name__)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), steps=STEPS, shift=SHIFTS)
def test_every_schedule_falls_strictly_from_one_to_zero(schedule, data, steps, shift):
    options = data.draw(st.fixed_dictionaries({}, optional=OPTIONS[schedule]))
    assert_runs_from_one_to_zero(schedule(steps, shift=shift, **options), steps)


@pytest.mark.parametrize("schedule", OPTIONS, ids=lambda schedule: schedule.__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), steps=st.integers(1, 200), shift=st.floats(0.01, 100))
def test_shift_multiplies_the_odds(schedule, data, steps, shift):
    options = data.draw(st.fixed_dictionaries({}, optional=OPTIONS[schedule]))
    # fp32 near 1 leaves few digits of 1 - sigma, which the odds divide by.
    plain = schedule(steps, **options)[:-1].double()
    shifted = schedule(steps, shift=shift, **options)[:-1].double()
    inner = (plain < 0.999) & (shifted < 0.999)
    odds = (plain / (1 - plain))[inner], (shifted / (1 - shifted))[inner]
    torch.testing.assert_close(odds[1], shift * odds[0], rtol=1e-3, atol=0)


@settings(max_examples=200, deadline=None)
@given(
    steps=STEPS,
    shift=SHIFTS,
    k=st.floats(0.01, 10),
    c=st.floats(0, 1),
    anchored=st.booleans(),
)
def test_any_sigmoid_falls_strictly_or_says_that_it_cannot(steps, shift, k, c, anchored):
    options = {"square_k": k, "base_c": c, "anchored": anchored}
    try:
        sigmas = sigmoid_offset_sigmas(steps, shift=shift, **options)
    except SamplingError as error:
        assert "closer than fp32" in str(error)
        u = stats.logistic.cdf(8 * k * (1 - c - np.arange(steps + 1) / steps))
        u = (u - u[-1]) / (u[0] - u[-1]) if anchored else np.append(u[:-1], 0)
        exact = (shift * u / (1 + (shift - 1) * u)).astype(np.float32)
        # Two correct logistic functions may differ in the last place of fp32.
        assert np.diff(exact).max() > -1.2e-7
    else:
        assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,)
        assert sigmas[-1] == 0 and (sigmas[0] == 1 if anchored else sigmas[0] <= 1)
        assert bool((sigmas[1:] < sigmas[:-1]).all())


@pytest.mark.parametrize("schedule", OPTIONS, ids=lambda schedule: schedule.__name__)
@pytest.mark.parametrize("steps", [1000, 10_000])
def test_thousands_of_steps_at_the_defaults(schedule, steps):
    assert_runs_from_one_to_zero(schedule(steps), steps)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULERS)), steps=STEPS, shift=SHIFTS, denoise=st.floats(0.01, 1)
)
def test_denoise_keeps_the_last_steps_of_a_longer_schedule(name, steps, shift, denoise):
    assume(steps / denoise <= 200)
    sigmas = get_sigmas(name, steps, shift=shift, denoise=denoise)
    whole = get_sigmas(name, math.floor(steps / denoise), shift=shift)
    assert torch.equal(sigmas, whole[len(whole) - 1 - steps :])
    assert len(sigmas) == steps + 1 and sigmas[-1] == 0


@pytest.mark.parametrize("schedule", OPTIONS, ids=lambda schedule: schedule.__name__)
@pytest.mark.parametrize("steps", [0, -1, 2.5, True, 10_001])
def test_unusable_steps_are_one_line(schedule, steps):
    with pytest.raises(SamplingError, match=f"^steps {steps} is not usable.*1 to 10000$"):
        schedule(steps)


@pytest.mark.parametrize(
    ("schedule", "option", "low", "high"),
    [
        (simple_sigmas, "shift", 0.01, 100),
        (bong_tangent_sigmas, "pivot_1", 0, 1),
        (bong_tangent_sigmas, "pivot_2", 0, 1),
        (bong_tangent_sigmas, "slope_1", 0.01, 1),
        (bong_tangent_sigmas, "slope_2", 0.01, 1),
        (bong_tangent_sigmas, "middle", 0.05, 0.95),
        (kl_optimal_sigmas, "sigma_min", 1e-6, 0.5),
        (linear_quadratic_sigmas, "threshold_noise", 0.001, 0.5),
        (normal_sigmas, "sigma_min", 1e-6, 0.5),
        (power_odds_sigmas, "p", 0.25, 4),
        (power_odds_sigmas, "a", 0.01, 100),
        (sigmoid_offset_sigmas, "square_k", 0.01, 10),
        (sigmoid_offset_sigmas, "base_c", 0, 1),
    ],
)
def test_options_outside_their_range_are_one_line(schedule, option, low, high):
    for value in (low - 1e-7, high + 1e-7, -math.inf, math.inf, math.nan):
        with pytest.raises(SamplingError, match=f"^{option} \\S+ is not usable") as error:
            schedule(26, **{option: value})
        assert "\n" not in str(error.value) and f"from {low:g} to {high:g}" in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (power_odds_sigmas, {"p": 0.25, "a": 100.0}),
        (linear_quadratic_sigmas, {"threshold_noise": 0.001}),
        (bong_tangent_sigmas, {"pivot_1": 0.0, "pivot_2": 1.0, "slope_1": 1.0, "middle": 0.95}),
    ],
)
def test_steps_that_fp32_cannot_tell_apart_are_an_error(schedule, options):
    with pytest.raises(SamplingError, match="10000 steps puts neighbours closer than fp32"):
        schedule(10_000, shift=100.0, **options)
