"""Schedules one by one: invariants, formulas, ComfyUI and RES4LYF, the shifts, the picture."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.schedulers import SCHEDULERS, get_sigmas
from chroma_nodes.schedulers.beta import beta57_sigmas, beta57_sigmas_compat
from chroma_nodes.schedulers.bong_tangent import bong_tangent_sigmas, bong_tangent_sigmas_compat
from chroma_nodes.schedulers.curve import DOT, LEFT, LINE, RIGHT, draw_sigmas
from chroma_nodes.schedulers.kl_optimal import kl_optimal_sigmas, kl_optimal_sigmas_compat
from chroma_nodes.schedulers.linear_quadratic import (
    linear_quadratic_sigmas,
    linear_quadratic_sigmas_compat,
)
from chroma_nodes.schedulers.normal import normal_sigmas, normal_sigmas_compat
from chroma_nodes.schedulers.optimal_steps import (
    chroma_table,
    optimal_steps_sigmas,
    optimal_steps_sigmas_compat,
)
from chroma_nodes.schedulers.power_odds import power_odds_sigmas, power_odds_sigmas_compat
from chroma_nodes.schedulers.shift import (
    apply_shift,
    check_shift,
    discrete_table,
    flux_shift,
    flux_table,
    table_shift,
)
from chroma_nodes.schedulers.sigmoid_offset import sigmoid_offset_sigmas
from chroma_nodes.schedulers.simple import simple_sigmas
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import ImageDraw, ImageFont
from scipy import ndimage, stats

DATA = Path(__file__).parent / "data"
RECORDED = json.loads((DATA / "reference_schedules.json").read_text())
BETA57 = json.loads((DATA / "reference_sigmas.json").read_text())
COMPAT = {
    "normal": normal_sigmas_compat,
    "linear_quadratic": linear_quadratic_sigmas_compat,
    "kl_optimal": kl_optimal_sigmas_compat,
}
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
SHIFTS = st.floats(0.01, 100) | st.sampled_from([0.01, 1, 100])
STEPS = st.integers(1, 200) | st.sampled_from([1, 2, 3, 200])


def table_of(name: str) -> torch.Tensor:
    """A recorded table's name, "aura 3" or "flux 1.15", to the table."""
    kind, value = name.split()
    return {"aura": discrete_table, "flux": flux_table}[kind](float(value))


def close(ours: torch.Tensor, expected: object, atol: float = 1e-5) -> None:
    assert ours.dtype == torch.float32
    theirs = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def assert_runs_from_one_to_zero(sigmas: torch.Tensor, steps: int) -> None:
    assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert bool(sigmas.isfinite().all()) and bool((sigmas[1:] < sigmas[:-1]).all())


# -- invariants -------------------------------------------------------------------------------


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


# -- formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "a"), [(2, 16), (1.5, 8), (1, 3), (0.25, 100)])
def test_power_odds_are_a_power_in_the_odds(p, a):
    t = 1 - np.arange(1, 26) / 26
    odds = a * t**p / (1 - t**p)
    close(power_odds_sigmas(26, p=p, a=a)[1:-1], odds / (1 + odds), atol=1e-7)


def test_power_odds_of_power_one_are_shifted_even_steps():
    close(power_odds_sigmas(13, p=1, a=3, shift=2), simple_sigmas(13, shift=6), atol=1e-7)


def test_beta57_is_that_beta_law():
    close(beta57_sigmas(26), stats.beta(0.5, 0.7).ppf(1 - np.arange(27) / 26), atol=1e-7)


@pytest.mark.parametrize("steps", [1, 8, 26])
def test_kl_optimal_has_even_angles(steps):
    angles = np.arctan(kl_optimal_sigmas(steps).numpy())
    np.testing.assert_allclose(angles, np.linspace(np.pi / 4, 0, steps + 1), atol=1e-7)
    above = np.arctan(kl_optimal_sigmas(steps, sigma_min=0.01).numpy()[:-1])
    np.testing.assert_allclose(
        above, np.linspace(np.pi / 4, np.arctan(0.01), steps), atol=1e-7
    )  # fmt: skip


def test_normal_is_even_to_its_lowest_level():
    expected = [1, 0.75025, 0.5005, 0.25075, 0.001, 0]
    close(normal_sigmas(5), expected, atol=1e-7)
    close(normal_sigmas(5, sigma_min=0), simple_sigmas(5), atol=0)


@pytest.mark.parametrize(("steps", "noise"), [(2, 0.1), (8, 0.025), (27, 0.4)])
def test_linear_quadratic_is_a_line_and_a_parabola_that_continues_it(steps, noise):
    half = steps // 2
    y = 1 - linear_quadratic_sigmas(steps, threshold_noise=noise).double().numpy()
    np.testing.assert_allclose(y[: half + 1], np.linspace(0, noise, half + 1), atol=1e-7)
    bend = np.polynomial.Polynomial.fit(range(half, steps + 1), y[half:], min(2, steps - half))
    if steps > 2:
        np.testing.assert_allclose(bend(np.arange(half, steps + 1)), y[half:], atol=1e-6)
        assert bend.deriv()(half) == pytest.approx(noise / half, abs=1e-5)


def test_bong_tangent_meets_in_the_middle_and_is_an_arctangent_on_both_sides():
    sigmas = bong_tangent_sigmas(38, middle=0.3).double().numpy()  # 40 points, k = 0.2
    assert sigmas[23] == pytest.approx(0.3)
    for part, first in ((sigmas[:24], 0), (sigmas[23:], 24)):
        x = first + np.arange(len(part))
        design = np.stack([np.arctan(0.2 * (24 - x)), np.ones(len(part))], axis=1)
        fitted = design @ np.linalg.lstsq(design, part, rcond=None)[0]
        np.testing.assert_allclose(fitted, part, atol=1e-6)


def test_optimal_steps_is_the_stretched_sigmoid_and_close_to_its_table():
    exact = optimal_steps_sigmas(40)
    t = np.arange(41) / 40
    f = 1 / (1 + np.exp(-8 * (0.6 - t)))
    close(exact, (f - f[-1]) / (f[0] - f[-1]), atol=1e-7)
    # The table starts 0.008 below 1 and ends on a level of 0.048 where the curve goes on to 0.039.
    assert np.abs(exact.numpy()[:-1] - chroma_table()[:-1]).max() < 0.04


# -- ComfyUI's and RES4LYF's numbers ----------------------------------------------------------


@pytest.mark.parametrize("case", RECORDED["bong_tangent"], ids=lambda c: str(c["steps"]))
def test_bong_tangent_equals_res4lyf(case):
    theirs = case["sigmas"]
    for table in (discrete_table(3.0), flux_table(1.15)):
        close(bong_tangent_sigmas_compat(case["steps"], table, **case["options"]), theirs, 2e-7)
    close(bong_tangent_sigmas(case["steps"], **case["options"]), theirs, atol=2e-7)


@pytest.mark.parametrize("steps", RECORDED["optimal_steps"])
def test_optimal_steps_equal_comfyui(steps):
    ours = optimal_steps_sigmas_compat(int(steps), flux_table(1.15))
    close(ours, RECORDED["optimal_steps"][steps], atol=2e-7)


@pytest.mark.parametrize(
    ("table", "name", "steps"),
    [
        (table, name, steps)
        for table, by_name in RECORDED["comfyui"].items()
        for name, by_steps in by_name.items()
        for steps in by_steps
    ],
)
def test_compat_equals_comfyui(table, name, steps):
    close(COMPAT[name](int(steps), table_of(table)), RECORDED["comfyui"][table][name][steps])


@pytest.mark.parametrize("table", ["aura 1", "flux 0", "flux 1.15"])
@pytest.mark.parametrize("steps", [8, 16, 26])
def test_beta57_equals_res4lyf(table, steps):
    group = {"aura 1": "aura_shift1", "flux 0": "flux_mu0", "flux 1.15": "flux_mu1.15"}[table]
    theirs = BETA57[group]["beta57_0.5_0.7"][str(steps)]
    close(beta57_sigmas_compat(steps, table_of(table)), theirs, atol=0)


def test_one_step_is_one_and_zero_where_the_originals_divide_by_zero():
    for compat in (bong_tangent_sigmas_compat, kl_optimal_sigmas_compat):
        assert compat(1, discrete_table(3.0)).tolist() == [1, 0]


@settings(max_examples=50, deadline=None)
@given(steps=STEPS, shift=SHIFTS)
def test_power_odds_compat_are_the_exact_ones_at_the_tables_shift(steps, shift):
    exact = power_odds_sigmas(steps, shift=shift)
    for table in (discrete_table(shift), flux_table(math.log(shift))):
        close(power_odds_sigmas_compat(steps, table), exact)


@pytest.mark.parametrize("compat", [normal_sigmas_compat, power_odds_sigmas_compat])
@pytest.mark.parametrize(
    "table", [torch.linspace(0.03, 14.6, 1000), torch.linspace(0.1, 1, 1000), torch.ones(1)]
)
def test_a_table_of_another_kind_of_model_is_one_line(compat, table):
    with pytest.raises(SamplingError, match=r"not a shifted flow's.*use the exact form$"):
        compat(26, table)


@pytest.fixture(scope="module")
def comfy() -> SimpleNamespace:
    from comfy_inprocess import import_comfyui

    import_comfyui()
    from comfy import model_sampling, samplers
    from comfy_extras.nodes_optimalsteps import OptimalStepsScheduler

    return SimpleNamespace(
        optimal_steps=OptimalStepsScheduler, samplers=samplers, sampling=model_sampling
    )


def comfy_sampling(comfy: SimpleNamespace, kind: str, shift: float) -> object:
    """ComfyUI's own model sampling object at a shift a."""
    if kind == "flux":
        sampling = comfy.sampling.ModelSamplingFlux()
        sampling.set_parameters(shift=math.log(shift))
    else:
        sampling = comfy.sampling.ModelSamplingDiscreteFlow()
        sampling.set_parameters(shift=shift, multiplier={"aura": 1.0, "sd3": 1000}[kind])
    return sampling


@pytest.mark.parametrize("kind", ["aura", "sd3", "flux"])
@pytest.mark.parametrize("shift", [0.02, 0.5, 1.0, 3.0, 25.3])
def test_tables_and_compat_equal_the_real_comfyui(comfy, kind, shift):
    sampling = comfy_sampling(comfy, kind, shift)
    table = flux_table(math.log(shift)) if kind == "flux" else discrete_table(shift)
    torch.testing.assert_close(table, sampling.sigmas, rtol=1e-6, atol=0)
    for name, compat in COMPAT.items():
        for steps in range(2 if name == "kl_optimal" else 1, 201):
            theirs = comfy.samplers.calculate_sigmas(sampling, name, steps)
            close(compat(steps, sampling.sigmas), theirs)


def test_optimal_steps_equal_the_real_comfyui_node(comfy):
    for steps in range(3, 201):
        theirs = comfy.optimal_steps.execute("Chroma", steps, 1.0).args[0]
        close(optimal_steps_sigmas_compat(steps, flux_table(1.15)), theirs, atol=2e-7)


# -- shift ------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1), SHIFTS, SHIFTS)
def test_shifts_multiply_and_undo_each_other(sigma, first, second):
    s = torch.tensor([sigma], dtype=torch.float64)
    twice, once = apply_shift(apply_shift(s, first), second), apply_shift(s, first * second)
    torch.testing.assert_close(twice, once, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(apply_shift(apply_shift(s, first), 1 / first), s, atol=1e-9, rtol=0)
    assert torch.equal(apply_shift(s, 1.0), s)
    assert 0 <= float(apply_shift(s, first)) <= 1 + 1e-12


@settings(max_examples=200, deadline=None)
@given(SHIFTS)
def test_tables_rise_to_one_and_tell_their_shift(shift):
    for table in (discrete_table(shift), flux_table(math.log(shift))):
        assert table.dtype == torch.float32 and table[-1] == pytest.approx(1, abs=1e-6)
        assert bool((table[1:] >= table[:-1]).all()) and table[0] > 0
        assert table_shift(table) == pytest.approx(shift, rel=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 256), st.integers(1, 256), st.floats(-2, 2), st.floats(-2, 2)
)  # fmt: skip
def test_flux_shift_is_diffusers_or_says_that_it_is_unusable(columns, rows, base, top):
    flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")
    mu = flux.calculate_shift(columns * rows, 256, 4096, base, top)
    assume(abs(abs(mu) - math.log(100)) > 1e-6)
    if abs(mu) > math.log(100):
        with pytest.raises(SamplingError, match=r"pixels give mu .*lower max_shift"):
            flux_shift(16 * columns, 16 * rows, base, top)
    else:
        shift = flux_shift(16 * columns, 16 * rows, base, top)
        assert check_shift(shift) == pytest.approx(math.exp(mu), rel=1e-9)


def test_flux_shift_at_the_sizes_people_use():
    sizes = [(512, 512), (768, 768), (1024, 1024), (1152, 1152), (1536, 1536), (2048, 2048)]
    shifts = [flux_shift(*size) for size in sizes]
    np.testing.assert_allclose(shifts, [1.88, 2.33, 3.16, 3.80, 7.5, 25.3], rtol=5e-3)


@pytest.mark.parametrize(
    ("size", "line"), [((4096, 4096), {}), ((256, 256), {"base_shift": math.nan})]
)
def test_a_flux_shift_out_of_range_is_one_line(size, line):
    with pytest.raises(SamplingError, match=r"pixels give mu .*expected mu from -4\.6 to 4\.6"):
        flux_shift(*size, **line)


# -- the picture ------------------------------------------------------------------------------


def pixels(picture: torch.Tensor, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture.numpy() * 255).round() == np.array(colour)


def dots(picture: torch.Tensor) -> np.ndarray:
    """Centres (row, column) of the dots, from left to right."""
    marks, count = ndimage.label(pixels(picture, DOT).all(-1))
    centres = np.array(ndimage.center_of_mass(marks, marks, range(1, count + 1)))
    return centres[centres[:, 1].argsort()]


@pytest.mark.parametrize("steps", [1, 2, 8, 26])
@pytest.mark.parametrize("schedule", [simple_sigmas, power_odds_sigmas, beta57_sigmas])
def test_the_picture_has_a_dot_for_every_sigma_at_its_height(schedule, steps):
    sigmas = schedule(steps)
    picture = draw_sigmas(sigmas, "a schedule", width=1600, height=900)
    assert picture.shape == (900, 1600, 3) and picture.dtype == torch.float32
    assert picture.min() >= 0 and picture.max() == 1
    rows, columns = dots(picture).T
    assert len(rows) == steps + 1
    expected = rows[-1] + (rows[0] - rows[-1]) * sigmas.numpy()
    np.testing.assert_allclose(rows, expected, atol=1)
    np.testing.assert_allclose(np.diff(columns), np.diff(columns).mean(), atol=1)


def test_the_line_joins_the_dots():
    picture = draw_sigmas(torch.tensor([1.0, 0.25, 0.0]))
    centres = dots(picture)
    rows, columns = np.nonzero(pixels(picture, LINE).all(-1))
    assert len(rows) > 300
    on_line = np.interp(columns, centres[:, 1], centres[:, 0])
    assert np.abs(rows - on_line).max() < 3


def test_the_axis_grows_only_above_one():
    low, one, high = (dots(draw_sigmas(torch.tensor(v))) for v in ([0.5, 0], [1.0, 0], [14.6, 7.3]))
    assert low[-1, 0] - low[0, 0] == pytest.approx((one[-1, 0] - one[0, 0]) / 2, abs=1)
    assert high[0, 0] == pytest.approx(one[0, 0], abs=1)
    assert high[1, 0] == pytest.approx(low[0, 0], abs=1)


@pytest.mark.parametrize(("steps", "ticks"), [(1, 2), (10, 11), (11, 6), (26, 6), (200, 11)])
def test_axes_at_zero_and_grid_lines_at_the_ticks(steps, ticks):
    picture = draw_sigmas(torch.full((steps + 1,), 0.625), width=800, height=400)
    dark = 1 - picture.mean(-1)

    def lines(strip: torch.Tensor) -> list[float]:
        """The darkness of every line across a strip of pixels."""
        marks, count = ndimage.label(strip.numpy() > 0.02)
        return ndimage.sum(strip.numpy(), marks, range(1, count + 1)).tolist()

    upright = lines(dark[120, LEFT - 6 : 800 - RIGHT + 6])
    assert len(upright) == ticks and upright[0] > 2 * max(upright[1:])
    level = lines(dark[40:365, 800 - RIGHT - 10])
    assert len(level) == 6 and level[-1] > 2 * max(level[0], level[1], *level[3:-1])


@pytest.mark.parametrize(
    ("sigmas", "label", "words"),
    [
        ([1.0, 0.6, 0.25, 0.0], "beta", {"beta, 3 steps, last from 0.25", "max 1", "min 0"}),
        ([0.75, 0.125], "", {"1 step, last from 0.75", "max 0.75", "min 0.125"}),
        ([], "beta", {"beta, 0 steps"}),
        ([0.5], "", {"0 steps", "min 0.5"}),
    ],
)
def test_the_legend_and_the_labels(sigmas, label, words, monkeypatch):
    written = set()
    draw = ImageDraw.ImageDraw.text

    def record(self, place, text, *rest):
        written.add(text)
        draw(self, place, text, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    picture = draw_sigmas(torch.tensor(sigmas), label)
    numbers = {"sigma", "step", "0", "0.25", "0.5", "0.75", "1", "2", "3"}
    assert written - numbers == words and picture.shape == (480, 768, 3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 20, width=32), max_size=300), st.integers(320, 600))
def test_any_sigmas_are_drawn_and_kept_as_they_are(values, width):
    sigmas = torch.tensor(values)
    before = sigmas.clone()
    assert draw_sigmas(sigmas, width=width, height=200).shape == (200, width, 3)
    assert torch.equal(sigmas, before)


@pytest.mark.parametrize("error", [TypeError, ImportError])
def test_the_picture_needs_no_new_pillow(error, monkeypatch):
    def only_one_size(size=None):
        if size is not None:
            raise error
        return ImageFont.load_default_imagefont()

    monkeypatch.setattr(ImageFont, "load_default", only_one_size)
    assert len(dots(draw_sigmas(simple_sigmas(8), "simple"))) == 9


@pytest.mark.parametrize(
    ("sigmas", "size", "says"),
    [
        (torch.tensor([1.0, math.nan]), {}, r"shape \(2,\) cannot be drawn"),
        (torch.tensor([1.0, -0.1]), {}, "none below 0"),
        (torch.ones(2, 3), {}, r"shape \(2, 3\) cannot be drawn; expected one row"),
        (torch.ones(2), {"width": 319}, "size 319 x 480 is too small; expected 320 x 200"),
        (torch.ones(2), {"height": 10}, "size 768 x 10 is too small"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(sigmas, size, says):
    with pytest.raises(SamplingError, match=says) as error:
        draw_sigmas(sigmas, **size)
    assert "\n" not in str(error.value)
