"""Schedules against the formulas that define them."""

import numpy as np
import pytest
from chroma_nodes.schedulers.beta import beta57_sigmas
from chroma_nodes.schedulers.bong_tangent import bong_tangent_sigmas
from chroma_nodes.schedulers.kl_optimal import kl_optimal_sigmas
from chroma_nodes.schedulers.linear_quadratic import linear_quadratic_sigmas
from chroma_nodes.schedulers.normal import normal_sigmas
from chroma_nodes.schedulers.optimal_steps import chroma_table, optimal_steps_sigmas
from chroma_nodes.schedulers.power_odds import power_odds_sigmas
from chroma_nodes.schedulers.simple import simple_sigmas
from schedule_cases import close
from scipy import stats


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
