"""Schedules against recorded values of the real ComfyUI, and their invariants."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.schedulers import SCHEDULERS, get_sigmas
from chroma_nodes.schedulers.shift import apply_shift, discrete_table, flux_mu, flux_table
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

REFERENCE = json.loads((Path(__file__).parent / "data" / "reference_sigmas.json").read_text())
TABLES = {
    "aura_shift1": discrete_table(1.0),
    "flux_mu0": flux_table(0.0),
    "flux_mu1.15": flux_table(1.15),
}


def parse(name: str) -> tuple[str, dict[str, float]]:
    """A reference name such as sigmoid_offset_k1_c0.5 -> scheduler and options."""
    if name == "simple":
        return name, {}
    first, second = re.findall(r"_[kc]?(\d+\.?\d*)", name)[-2:]
    if name.startswith("beta"):
        return "beta", {"alpha": float(first), "beta": float(second)}
    return "sigmoid_offset", {"square_k": float(first), "base_c": float(second)}


@pytest.mark.parametrize(
    ("table", "name", "steps"),
    [(t, n, s) for t in TABLES for n, by_steps in REFERENCE[t].items() for s in by_steps],
)
def test_compat_equals_comfyui_to_float32(table, name, steps):
    scheduler, options = parse(name)
    ours = get_sigmas(scheduler, int(steps), compat_table=TABLES[table], **options)
    assert torch.equal(ours, torch.tensor(REFERENCE[table][name][steps], dtype=torch.float32))


@pytest.mark.parametrize(
    ("group", "name", "steps"),
    [
        (g, n, s)
        for g in ("_exact_unquantised_shift1_float64", "_proposed_float64")
        for n, by_steps in REFERENCE[g].items()
        for s in by_steps
    ],
)  # fmt: skip
def test_exact_equals_the_formula_to_float32(group, name, steps):
    scheduler, options = parse(name)
    if name.startswith("sigmoid_offset"):
        options["anchored"] = False
    ours = get_sigmas(scheduler, int(steps), **options)
    assert ours.dtype == torch.float32
    expected = torch.tensor(REFERENCE[group][name][steps], dtype=torch.float32)
    torch.testing.assert_close(ours, expected, rtol=3e-7, atol=1e-9)


def test_exact_sigmoid_is_the_published_curve_stretched():
    published = REFERENCE["_exact_unquantised_shift1_float64"]["sigmoid_offset_k1.0_c0.5"]["26"]
    end = 1 / (1 + math.exp(4))
    curve = np.array([*published[:-1], end])
    stretched = (curve - end) / (curve[0] - end)
    np.testing.assert_allclose(get_sigmas("sigmoid_offset", 26).numpy(), stretched, atol=1e-7)


def test_beta_agrees_with_scipy_stats_and_shift_with_its_formula():
    law = stats.beta(0.5, 0.7)
    u = law.ppf(1 - np.arange(11) / 10)
    expected = 3 * u / (1 + 2 * u)
    ours = get_sigmas("beta", 10, shift=3.0, alpha=0.5, beta=0.7)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-6, atol=1e-9)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(SCHEDULERS)), st.integers(1, 200),
    st.floats(0.1, 20), st.floats(0.01, 1.0),
)  # fmt: skip
def test_exact_schedules_fall_strictly_to_zero(name, steps, shift, denoise):
    full = get_sigmas(name, steps, shift=shift)
    assert full.dtype == torch.float32 and len(full) == steps + 1
    assert full[0] == 1 and full[-1] == 0
    assert bool((full[1:] < full[:-1]).all())
    if int(steps / denoise) <= 200:
        tail = get_sigmas(name, steps, shift=shift, denoise=denoise)
        assert len(tail) == steps + 1
        assert torch.equal(
            tail, get_sigmas(name, int(steps / denoise), shift=shift)[-(steps + 1) :]
        )


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 200), st.floats(0.1, 20), st.floats(1e-3, 50), st.floats(1e-3, 50)
)  # fmt: skip
def test_extreme_beta_falls_strictly_or_says_that_it_cannot(steps, shift, alpha, beta):
    try:
        sigmas = get_sigmas("beta", steps, shift=shift, alpha=alpha, beta=beta)
    except SamplingError as error:
        assert "closer than fp32" in str(error)
        t = stats.beta(alpha, beta).ppf(1 - np.arange(steps + 1) / steps)
        exact = (shift * t / (1 + (shift - 1) * t)).astype(np.float32)
        # Two correct quantile functions may differ in the last place of fp32.
        assert np.diff(exact).max() > -1.2e-7
    else:
        assert len(sigmas) == steps + 1 and sigmas[0] == 1 and sigmas[-1] == 0
        assert bool((sigmas[1:] < sigmas[:-1]).all())


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [999, 1000])
def test_a_thousand_steps_are_told_apart(name, steps):
    sigmas = get_sigmas(name, steps)
    assert len(sigmas) == steps + 1 and bool((sigmas[1:] < sigmas[:-1]).all())


@pytest.mark.parametrize("denoise", [0.0, -0.5])
def test_no_denoising_gives_no_sigmas(denoise):
    assert len(get_sigmas("beta", 26, denoise=denoise)) == 0


@pytest.mark.parametrize(
    ("name", "steps", "options", "says"),
    [
        ("beta", 0, {}, "steps 0"),
        ("beta", -3, {}, "steps -3"),
        ("beta", 2.5, {}, r"steps 2\.5"),
        ("beta", 26, {"alpha": 0.0}, r"alpha 0\.0"),
        ("beta", 26, {"beta": math.nan}, "beta nan"),
        ("sigmoid_offset", 26, {"square_k": 0.0}, r"square_k 0\.0"),
        ("sigmoid_offset", 26, {"base_c": 1.5}, r"base_c 1\.5"),
        ("simple", 26, {"shift": 0.0}, r"shift 0\.0"),
        ("simple", 26, {"shift": math.inf}, "shift inf"),
        ("simple", 26, {"alpha": 0.6}, "no option 'alpha'"),
        ("beta", 26, {"denoise": 1.2}, r"denoise 1\.2"),
        ("beta", 26, {"denoise": math.nan}, "denoise nan"),
        ("beta", 200, {"denoise": 0.01}, r"denoise 0\.01 at 200 steps .* 20000 steps"),
        ("beta", True, {}, "steps True"),
        ("karras", 26, {}, "unknown scheduler 'karras'.*beta, beta57"),
        ("beta", 10_000, {"alpha": 0.05, "beta": 0.05}, "closer than fp32"),
    ],
)
def test_unusable_values_are_one_clear_line(name, steps, options, says):
    with pytest.raises(SamplingError, match=says) as error:
        get_sigmas(name, steps, **options)
    assert "\n" not in str(error.value)


def test_flux_mu_goes_through_its_two_points():
    assert flux_mu(256, 256) == pytest.approx(0.5)
    assert flux_mu(1024, 1024) == pytest.approx(1.15)
    assert flux_mu(2048, 2048) == pytest.approx(3.23)
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    flux = math.exp(0.63) / (math.exp(0.63) + 1 / t - 1)
    torch.testing.assert_close(apply_shift(t, math.exp(0.63)), flux)
