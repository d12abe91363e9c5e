"""How fast samplers converge on analytic flows, without noise."""

import math

import numpy as np
import pytest
import torch
from chroma_nodes.samplers.euler import sample_euler
from sampler_cases import MULTISTEP, SINGLE_STEP, TWO_STAGE, beta, graded, points, run
from scipy.integrate import solve_ivp
from test_samplers import gaussian, gaussian_solution, grid, two_modes

ORDER = SINGLE_STEP | MULTISTEP


@pytest.mark.parametrize("name", SINGLE_STEP)
@pytest.mark.parametrize("start", [1.0, 0.8])
def test_single_steps_reach_their_order(name, start):
    """From sigma 1, where lambda is -inf, and below."""
    sampler, order = SINGLE_STEP[name]
    x = points()
    exact = gaussian_solution(x, start, 0.1)
    coarse, fine = (
        float((run(sampler, gaussian, x, grid(n, start)) - exact).abs().max()) for n in (128, 256)
    )
    assert order - 0.3 < math.log2(coarse / fine) < order + 0.4


@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_samplers_reach_their_order(name):
    sampler, order = MULTISTEP[name]
    x = points()
    exact = gaussian_solution(x, 1.0, 0.1)
    coarse, fine = (
        float((run(sampler, gaussian, x, graded(n)) - exact).abs().max()) for n in (192, 384)
    )
    slope = math.log2(coarse / fine)
    assert slope > order - 0.3
    if "dpmpp" not in name:  # Its first error term nearly cancels here.
        assert slope < order + 0.3


@pytest.mark.parametrize("name", ORDER)
def test_converges_on_a_mixture_as_scipy_does(name):
    starts = np.array([-1.7, -0.4, 0.3, 1.1])

    def field(s, x):
        out = two_modes(torch.tensor(x)[None], torch.tensor([s], dtype=torch.float64))
        return ((torch.tensor(x) - out[0]) / s).numpy()

    truth = solve_ivp(field, (1.0, 0.05), starts, rtol=1e-9, atol=1e-10).y[:, -1]
    sampler, order = ORDER[name]
    ours = run(sampler, two_modes, torch.tensor(starts)[None], graded(300, end=0.05))[0]
    np.testing.assert_allclose(ours.numpy(), truth, atol=3e-2 if order == 1 else 1e-3)


@pytest.mark.parametrize("name", TWO_STAGE)
def test_two_stages_beat_two_steps_of_euler(name):
    x = points()
    exact = gaussian_solution(x, 1.0, 0.1)
    sampler, _ = SINGLE_STEP[name]
    error = float((run(sampler, gaussian, x, grid(8)) - exact).abs().max())
    assert error < 0.5 * float((run(sample_euler, gaussian, x, grid(16)) - exact).abs().max())


@pytest.mark.parametrize("name", ["euler_ancestral", "euler_ancestral_cfg_pp"])
def test_without_eta_the_first_order_samplers_are_eulers_method(name):
    sampler, _ = SINGLE_STEP[name]
    for sigmas in (beta(9), grid(7, 0.7, 0.2)):
        expected = run(sample_euler, two_modes, points(), sigmas)
        found = run(sampler, two_modes, points(), sigmas)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
