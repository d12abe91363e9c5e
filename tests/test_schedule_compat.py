"""The compatible forms of schedules against ComfyUI and RES4LYF, recorded and real."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.schedulers.beta import beta57_sigmas_compat
from chroma_nodes.schedulers.bong_tangent import bong_tangent_sigmas, bong_tangent_sigmas_compat
from chroma_nodes.schedulers.kl_optimal import kl_optimal_sigmas_compat
from chroma_nodes.schedulers.linear_quadratic import linear_quadratic_sigmas_compat
from chroma_nodes.schedulers.normal import normal_sigmas_compat
from chroma_nodes.schedulers.optimal_steps import optimal_steps_sigmas_compat
from chroma_nodes.schedulers.power_odds import power_odds_sigmas, power_odds_sigmas_compat
from chroma_nodes.schedulers.shift import discrete_table, flux_table
from hypothesis import given, settings
from schedule_cases import SHIFTS, STEPS, close
from test_schedulers import REFERENCE

RECORDED = json.loads((Path(__file__).parent / "data" / "reference_schedules.json").read_text())
COMPAT = {
    "normal": normal_sigmas_compat,
    "linear_quadratic": linear_quadratic_sigmas_compat,
    "kl_optimal": kl_optimal_sigmas_compat,
}


def table_of(name: str) -> torch.Tensor:
    """A recorded table's name, "aura 3" or "flux 1.15", to the table."""
    kind, value = name.split()
    return {"aura": discrete_table, "flux": flux_table}[kind](float(value))


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
    theirs = REFERENCE[group]["beta57_0.5_0.7"][str(steps)]
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
