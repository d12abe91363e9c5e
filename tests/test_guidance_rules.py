"""The formulas of guidance against their papers, written out in NumPy's fp64."""

import argparse
import math

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.chroma.guidance import Guidance, GuidanceRun, rules
from chroma_nodes.chroma.guidance.cli import add_guidance_arguments, guidance_from
from scipy.optimize import minimize_scalar

SIGMA, SCALE = 0.6, 4.5
SHAPE = (3, 16, 6, 4)


def predictions(seed=0):
    """x, cond and uncond, the latter two denoised and alike but for a part, fp64."""
    g = torch.Generator().manual_seed(seed)
    x, cond, other = torch.randn(3, *SHAPE, generator=g, dtype=torch.float64)
    return x, cond, 0.8 * cond + 0.5 * other + 0.1


def rows(*tensors):
    """The same rows, flat, in NumPy."""
    return [t.reshape(len(t), -1).numpy() for t in tensors]


def same(actual, wanted):
    (actual,) = rows(actual)
    np.testing.assert_allclose(actual, np.asarray(wanted).reshape(actual.shape), atol=1e-12)


def guided(plan, calls=1):
    """The last of some calls of one run, each with predictions of its own."""
    run = GuidanceRun(plan)
    return [run.guide(*predictions(seed), plan.scale(SIGMA)) for seed in range(calls)][-1]


def test_cfg_zero_scale_brings_uncond_nearest_to_cond():
    _, cond, uncond = predictions()
    scales = rules.zero_star_scale(cond, uncond).flatten().tolist()
    for c, u, scale in zip(*rows(cond, uncond), scales, strict=True):
        nearest = minimize_scalar(lambda s, c=c, u=u: np.sum((c - s * u) ** 2))
        assert scale == pytest.approx(nearest.x, rel=1e-6)


def test_zero_star_is_the_published_formula_on_velocities():
    x, cond, uncond = predictions()
    expected = []
    for latent, c, u in zip(*rows(x, cond, uncond), strict=True):
        v_c, v_u = (latent - c) / SIGMA, (latent - u) / SIGMA
        star = v_c @ v_u / (v_u @ v_u)
        v = (1 - SCALE) * star * v_u + SCALE * v_c
        expected.append(latent - SIGMA * v)
    same(guided(Guidance(SCALE, zero_star=True)), expected)


@pytest.mark.parametrize("amount", (0.3, 1.0))
def test_rescale_blends_towards_the_deviation_of_the_cond_velocity(amount):
    x, cond, uncond = predictions()
    result = guided(Guidance(SCALE, rescale=amount))
    expected = []
    for latent, c, u in zip(*rows(x, cond, uncond), strict=True):
        v_c = (latent - c) / SIGMA
        v = (latent - (u + SCALE * (c - u))) / SIGMA
        v = amount * v * v_c.std() / v.std() + (1 - amount) * v
        expected.append(latent - SIGMA * v)
    same(result, expected)
    deviation = [row.std() for row in rows(x - result)[0]]
    plain = [row.std() for row in rows(x - guided(Guidance(SCALE)))[0]]
    wanted = [row.std() for row in rows(x - cond)[0]]
    blended = amount * np.array(wanted) + (1 - amount) * np.array(plain)
    np.testing.assert_allclose(deviation, blended, rtol=1e-9)


def apg_of_the_paper(calls, scale, eta, norm, momentum):
    """Algorithm 1 of arXiv:2410.02416, on denoised latents: the result of the last call."""
    average = [0.0] * SHAPE[0]
    for seed in range(calls):
        expected = []
        _, *both = predictions(seed)
        for i, (c, u) in enumerate(zip(*rows(*both), strict=True)):
            average[i] = difference = (c - u) + momentum * average[i]
            if norm > 0:
                difference = difference * min(1.0, norm / np.linalg.norm(difference))
            unit = c / np.linalg.norm(c)
            parallel = (difference @ unit) * unit
            update = (difference - parallel) + eta * parallel
            expected.append(c + (scale - 1) * update)
    return expected


@pytest.mark.parametrize(
    ("eta", "norm", "momentum"),
    [(0.0, 0.0, 0.0), (0.4, 5.0, 0.0), (1.0, 0.0, -0.5), (0.0, 7.0, -0.75), (1.0, 1e9, 0.0)],
)
def test_apg_is_the_papers_algorithm(eta, norm, momentum):
    plan = Guidance(SCALE, apg_eta=eta, apg_norm=norm, apg_momentum=momentum)
    same(guided(plan, calls=3), apg_of_the_paper(3, SCALE, eta, norm, momentum))


def test_apg_that_takes_nothing_away_is_plain_guidance():
    _, cond, uncond = rows(*predictions())
    same(guided(Guidance(SCALE, apg_norm=1e9)), uncond + SCALE * (cond - uncond))


def test_all_rules_apply_in_the_stated_order():
    plan = Guidance(SCALE, zero_star=True, apg_eta=0.2, apg_norm=6.0, rescale=0.6)
    expected = []
    for latent, c, u in zip(*rows(*predictions()), strict=True):
        v_c, v_u = latent - c, latent - u
        away = latent - (v_c @ v_u) / (v_u @ v_u) * v_u
        d = (c - away) * min(1, 6 / np.linalg.norm(c - away))
        d -= 0.8 * (d @ c) / (c @ c) * c
        v = latent - (c + (SCALE - 1) * d)
        expected.append(latent - (0.6 * v * v_c.std() / v.std() + 0.4 * v))
    same(guided(plan), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_neutral_values_are_plain_guidance_bit_for_bit(dtype):
    x, cond, uncond = (t.to(dtype) for t in predictions())
    neutral = Guidance(
        SCALE, "constant", 9.0, 1.0, 0.0, rescale=0.0, zero_star=False, zero_init=0, apg_eta=1.0,
        apg_norm=0.0, apg_momentum=0.0,
    )  # fmt: skip
    run = GuidanceRun(neutral)
    assert not neutral.has_rules and not run.holds_still(1.0)
    result = run.guide(x, cond, uncond, neutral.scale(SIGMA))
    assert torch.equal(result, uncond + (cond - uncond) * SCALE)


@pytest.mark.parametrize(
    "rule", ({"zero_star": True}, {"rescale": 1.0}, {"apg_eta": 0.0}, {"apg_momentum": -0.5})
)
def test_no_rule_changes_anything_at_scale_one(rule):
    x, cond, uncond = predictions()
    assert torch.equal(GuidanceRun(Guidance(1.0, **rule)).guide(x, cond, uncond, 1.0), cond)


@pytest.mark.parametrize(
    "rule", ({"zero_star": True}, {"rescale": 1.0}, {"apg_eta": 0.0}, {"apg_norm": 3.0})
)
def test_rows_of_zeros_and_equal_predictions_stay_finite(rule):
    x, cond, uncond = (t.float() for t in predictions())
    for c, u in ((x, x), (cond, cond), (torch.zeros_like(x), uncond), (cond, x)):
        assert torch.isfinite(GuidanceRun(Guidance(SCALE, **rule)).guide(x, c, u, SCALE)).all()


def test_every_row_is_guided_on_its_own():
    plan = Guidance(SCALE, zero_star=True, apg_eta=0.2, apg_norm=6.0, rescale=0.6)
    x, cond, uncond = predictions()
    for i in range(len(x)):
        one = (t[i : i + 1] for t in (x, cond, uncond))
        same(GuidanceRun(plan).guide(*one, SCALE), guided(plan)[i : i + 1])


# The scale over sigma


@pytest.mark.parametrize("curve", ("linear", "cosine"))
def test_curves_start_at_cfg_and_end_at_cfg_end(curve):
    plan = Guidance(6.0, curve, 2.0)
    assert plan.scale(1.0) == 6 and plan.scale(0.0) == 2 and plan.scale(0.5) == pytest.approx(4)
    values = [plan.scale(s) for s in np.linspace(0, 1, 30)]
    assert values == sorted(values)


def test_curves_are_what_their_names_say():
    assert Guidance(6.0, "linear", 2.0).scale(0.3) == pytest.approx(3.2)
    cosine = 2 + 4 * math.sin(math.pi * 0.3 / 2) ** 2
    assert Guidance(6.0, "cosine", 2.0).scale(0.3) == pytest.approx(cosine)
    assert {Guidance(6.1, "constant", 2.0).scale(s) for s in (1.0, 0.3, 0.0)} == {6.1}


def test_outside_of_the_interval_the_scale_is_one():
    plan = Guidance(4.0, interval_start=0.9, interval_end=0.3)
    in_fp32 = torch.tensor([1.0, 0.91, 0.9, 0.6, 0.3, 0.29, 0.0]).tolist()
    assert [plan.scale(s) for s in in_fp32] == [1, 1, 4, 4, 4, 1, 1]


def test_which_plans_use_the_negative_prompt():
    assert Guidance(4.0).uses_uncond and Guidance(1.0, "linear", 3.0).uses_uncond
    assert not Guidance(1.0).uses_uncond and not Guidance(1.0, "linear", 1.0).uses_uncond
    assert not Guidance(1.0, "constant", 3.0).uses_uncond


def test_zero_init_holds_the_first_levels_of_the_run():
    run = GuidanceRun(Guidance(4.0, zero_init=2))
    asked = [1.0, 1.0, 0.9, 0.8, 0.9, 0.5]
    assert [run.holds_still(s) for s in asked] == [True, True, True, False, True, False]
    assert not GuidanceRun(Guidance(4.0)).holds_still(1.0)


# Errors and the command line


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"cfg": math.nan}, "^cfg nan is not usable; expected a number from 0 to 100"),
        ({"cfg_end": -1.0}, r"^cfg_end -1\.0 is not usable"),
        ({"curve": "square"}, "^unknown curve 'square'; expected one of constant, linear, cosine"),
        ({"interval_start": 1.2}, r"^interval_start 1\.2 is not usable; expected .* 0 to 1"),
        ({"interval_start": 0.2, "interval_end": 0.4}, r"interval_start 0\.2 is below interval_e"),
        ({"rescale": math.nan}, "^rescale nan"),
        ({"zero_init": -1}, "^zero_init -1 is not usable; expected 0 or a number of steps"),
        ({"apg_eta": -0.1}, r"^apg_eta -0\.1"),
        ({"apg_norm": math.inf}, "^apg_norm inf is not usable; expected 0 for no limit"),
        ({"apg_momentum": 1.0}, r"^apg_momentum 1\.0 is not usable; .* between -1 and 1"),
    ],
)
def test_unusable_values(values, says):
    with pytest.raises(SamplingError, match=says) as caught:
        Guidance(**{"cfg": 4.0, **values})
    assert "\n" not in str(caught.value)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg", type=float, default=4.0)
    add_guidance_arguments(parser)
    return guidance_from(parser.parse_args(arguments))


def test_the_command_line_names_every_option():
    assert parse() == Guidance(4.0)
    given = (
        "--cfg 5 --cfg-curve cosine --cfg-end 2 --cfg-interval 0.9 0.2 --cfg-rescale 0.7 "
        "--zero-star --zero-init 1 --apg-eta 0.5 --apg-norm 30 --apg-momentum -0.5"
    )
    expected = Guidance(5.0, "cosine", 2.0, 0.9, 0.2, 0.7, True, 1, 0.5, 30.0, -0.5)
    assert parse(*given.split()) == expected
    with pytest.raises(SamplingError, match=r"interval_start 0\.1 is below"):
        parse("--cfg-interval", "0.1", "0.5")
