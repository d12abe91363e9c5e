"""flow_pec on flows whose solution is known: its order, its limits, and what it is worth."""

import math

import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.samplers import SAMPLERS, choose
from chroma_nodes.samplers.adams import predictor
from chroma_nodes.samplers.steps import quadrature
from chroma_nodes.schedulers import get_sigmas
from flows import all_flows, gaussian_flow

FLOWS = [flow for flow in all_flows() if flow.name != "straight"]


def run(name, flow, sigmas, **options):
    sampler = choose(SAMPLERS, name, **options)
    return sampler(flow.model, flow.noise, sigmas.double(), disable=True)


def mean_error(name, evaluations, schedules, **options):
    """Geometric mean over flows and schedules, at equal evaluations."""
    steps = (evaluations + 1) // 2 if name == "heun" else evaluations
    errors = [
        flow.error(run(name, flow, get_sigmas(*schedule[:1], steps, **schedule[1]), **options))
        for flow in FLOWS
        for schedule in schedules
    ]
    return math.exp(sum(math.log(max(e, 1e-12)) for e in errors) / len(errors))


@pytest.mark.parametrize(("order", "slope"), [(2, 2), (3, 2)])
def test_order_of_convergence(order, slope):
    flow = gaussian_flow()
    errors = [
        flow.error(run("flow_pec", flow, get_sigmas("simple", n), order=order, kappa=9.0))
        for n in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) > slope - 0.2


def test_polynomial_velocities_are_integrated_exactly():
    """Once three evaluations are known, a velocity that is straight in sigma is exact."""
    sigmas = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.2]).double()

    def model(x, sigma):
        s = float(sigma[0])
        return x - s * (2 * s - 1)

    x = torch.zeros(1, 1, dtype=torch.float64)
    out = SAMPLERS["flow_pec"](model, x, sigmas, disable=True)
    first_step = (0.9**2 - 0.9) - (0.9 - 1.0)  # Euler's error, which the corrector takes back
    assert abs(float(out) - (0.2**2 - 0.2)) < abs(first_step)


@pytest.mark.parametrize("nodes", [[1.0, 0.99, 0.6], [0.8, 0.79, 0.78], [1.0, 0.9, 0.4]])
def test_the_predictor_keeps_its_limit(nodes):
    known = [(s, torch.zeros(1)) for s in nodes]
    for kappa in (1.0, 1.8, 2.6, 4.0, 9.0):
        _, weights = predictor(known, nodes[-1] / 2, quadrature, 3, kappa)
        assert sum(map(abs, weights)) <= kappa * abs(sum(weights)) * (1 + 1e-9)
        assert sum(weights) == pytest.approx(nodes[-1] / 2 - nodes[-1])


def test_less_error_than_others_at_equal_evaluations():
    schedules = [("beta", {}), ("power_odds", {}), ("simple", {"shift": 3.158})]
    pec = {n: mean_error("flow_pec", n, schedules) for n in (13, 16, 26)}
    for other in ("res_multistep", "dpmpp_2m", "heun"):
        assert pec[16] <= mean_error(other, 16, schedules) / 2, other
        assert pec[26] <= mean_error(other, 26, schedules) / 2, other
    assert pec[13] < mean_error("euler", 26, schedules)
    assert pec[13] < mean_error("res_multistep", 26, schedules)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"order": 1}, "order 1"), ({"order": 4}, "order 4"), ({"kappa": -1.0}, "kappa -1"),
        ({"kappa": 0.5}, "kappa 0.5"), ({"eta": -0.1}, "eta -0.1"),
        ({"eta": 0.5, "s_noise": -1.0}, "s_noise -1"),
    ],
)  # fmt: skip
def test_unusable_options_are_one_line(options, says):
    flow = gaussian_flow()
    with pytest.raises(SamplingError, match=f"flow_pec: {says}"):
        run("flow_pec", flow, get_sigmas("simple", 4), **options)
