"""The table of samplers' options, against the samplers themselves."""

import inspect

import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.samplers import SAMPLERS, choose
from chroma_nodes.samplers.options import OPTIONS

CONTRACT = {"model", "x", "sigmas", "extra_args", "callback", "disable", "noise_sampler"}
CASES = [(name, option) for name, options in OPTIONS.items() for option in options]


def own(name):
    parameters = inspect.signature(SAMPLERS[name]).parameters
    return {k: p.default for k, p in parameters.items() if k not in CONTRACT}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_table_has_every_option_and_its_default(name):
    if own(name).keys() <= {"eta", "s_noise"}:
        assert name not in OPTIONS
    else:
        table = {option.name: option.default for option in OPTIONS[name]}
        assert table == own(name)
        assert [type(v) for v in table.values()] == [type(own(name)[k]) for k in table]


@pytest.mark.parametrize(("name", "option"), CASES, ids=lambda v: getattr(v, "name", v))
def test_the_ends_of_its_range_can_be_sampled_with(name, option):
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.2, 0.0])
    outs = [
        choose(SAMPLERS, name, **{option.name: value})(
            lambda x, sigma, **_: 0.3 * x.sin(), x, sigmas, extra_args={"seed": 1}, disable=True
        )
        for value in (option.low, option.high, option.default)
    ]
    assert all(bool(out.isfinite().all()) for out in outs)
    assert option.low <= option.default <= option.high
    assert option.advice.endswith(".") and "\n" not in option.advice


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("flow_pec", {"order": 1}, "flow_pec: order 1 is not usable; expected 0"),
        ("flow_pec", {"kappa": 0.5}, "flow_pec: kappa 0.5 is not usable"),
        ("flow_pec", {"eta": -1.0}, "flow_pec: eta -1.0 is not usable"),
        ("flash", {"substeps": 3}, "flash: substeps 3 is not usable; expected 1 or 2"),
        ("flash", {"order": 2}, "the sampler flash has no order.*flow_pec, deis"),
        ("deis", {"order": 5}, "order 5 is not usable; expected 1 to 4"),
        ("sa_solver", {"corrector_order": -1}, "corrector_order -1 is not usable"),
        ("res_2s", {"c2": 0.0}, "res_2s: c2 0.0 is not usable"),
        ("dpmpp_sde", {"r": 2.0}, "dpmpp_sde: r 2.0 is not usable"),
        ("gradient_estimation", {"ge_gamma": float("nan")}, "ge_gamma nan is not usable"),
        ("euler_ancestral_cfg_pp", {"s_noise": -1.0}, "s_noise -1.0 is not usable"),
    ],
)
def test_options_are_refused_before_anything_is_sampled(name, options, says):
    with pytest.raises(SamplingError, match=says):
        choose(SAMPLERS, name, **options)
