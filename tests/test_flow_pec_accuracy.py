"""flow_pec on flows whose solution is known: its order, and what it is worth."""

import math
import statistics

import pytest
from chroma_nodes.samplers import SAMPLERS, choose
from chroma_nodes.schedulers import get_sigmas
from flows import all_flows, gaussian_flow

FLOWS = [flow for flow in all_flows() if flow.name != "straight"]
SCHEDULES = [("beta", {}), ("power_odds", {}), ("simple", {"shift": 3.158})]


def run(name, flow, sigmas, **options):
    sampler = choose(SAMPLERS, name, **options)
    return sampler(flow.model, flow.noise, sigmas.double(), disable=True)


def errors(name, evaluations, **options):
    """Of every flow on every schedule, at equal evaluations."""
    steps = (evaluations + 1) // 2 if name == "heun" else evaluations
    return [
        flow.error(run(name, flow, get_sigmas(schedule, steps, **shift), **options))
        for flow in FLOWS
        for schedule, shift in SCHEDULES
    ]


def mean_error(name, evaluations):
    """The geometric mean."""
    return statistics.geometric_mean(max(e, 1e-12) for e in errors(name, evaluations))


@pytest.mark.parametrize("order", [2, 3])
def test_order_of_convergence_from_sigma_1_to_0(order):
    """Second order: the last step, to 0, is Euler's."""
    flow = gaussian_flow()
    found = [
        flow.error(run("flow_pec", flow, get_sigmas("simple", n), order=order, kappa=9.0))
        for n in (64, 128)
    ]
    assert math.log2(found[0] / found[1]) > 1.8


def test_less_error_than_others_at_equal_evaluations():
    pec = {n: mean_error("flow_pec", n) for n in (13, 16, 26)}
    for other in ("res_multistep", "dpmpp_2m", "heun"):
        assert pec[16] <= mean_error(other, 16) / 2, other
        assert pec[26] <= mean_error(other, 26) / 2, other
    assert pec[13] < mean_error("euler", 26)
    assert pec[13] < mean_error("res_multistep", 26)


@pytest.mark.parametrize("steps", [16, 26])
def test_less_error_than_sa_solver_in_the_median(steps):
    theirs = errors("sa_solver", steps, eta=0.0)
    assert statistics.median(errors("flow_pec", steps)) < statistics.median(theirs)
