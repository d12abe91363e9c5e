"""Samplers by name: every one keeps the contract, and options that do not fit are refused."""

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.samplers import OWN_ETA, SAMPLERS, choose, own_or, takes

NOISY = [name for name, sampler in SAMPLERS.items() if takes(sampler, "eta")]


def away(x, sigma, uncond_callback=None, **_):
    """A model whose picture depends on x."""
    if uncond_callback is not None:
        uncond_callback(0.5 * x)
    return 0.3 * x.sin()


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_reports_its_steps_and_ends_finite(name):
    x, reports = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), []
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    keep = x.clone()
    out = SAMPLERS[name](
        away, x, sigmas, extra_args={"seed": 3}, callback=reports.append, disable=True
    )
    assert out.shape == x.shape and out.dtype == x.dtype and bool(out.isfinite().all())
    assert [r["i"] for r in reports] == [0, 1, 2, 3] and torch.equal(x, keep)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_fails_is_not_hidden(name):
    def broken(*_, **__):
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        SAMPLERS[name](broken, torch.randn(1, 2, 2, 2), torch.tensor([1.0, 0.5, 0.0]), disable=True)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_returns_no_numbers_is_one_line(name, bad):
    def broken(x, sigma, **kw):
        out = away(x, sigma, **kw)
        return out if float(sigma[0]) > 0.6 else out.index_fill(1, torch.tensor([1]), bad)

    sigmas = torch.tensor([1.0, 0.7, 0.5, 0.0])
    with pytest.raises(SamplingError, match=r"returned NaN or infinity at sigma 0\.5000") as error:
        SAMPLERS[name](broken, torch.randn(1, 2, 2, 2), sigmas, disable=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NOISY)
def test_eta_zero_needs_no_noise_and_others_do(name):
    def refuse(*_):
        raise AssertionError("noise was asked for")

    x, sigmas = torch.randn(1, 2, 4, 4), torch.tensor([1.0, 0.7, 0.5, 0.3, 0.0])
    run = choose(SAMPLERS, name, eta=0.0)
    run(away, x, sigmas, disable=True, noise_sampler=refuse)
    with pytest.raises(AssertionError, match="noise was asked for"):
        choose(SAMPLERS, name, eta=1.0)(away, x, sigmas, disable=True, noise_sampler=refuse)


def test_options_that_do_not_fit():
    assert choose(SAMPLERS, "euler") is SAMPLERS["euler"]
    assert choose(SAMPLERS, "euler", eta=0.0) is SAMPLERS["euler"]
    assert own_or(OWN_ETA) is None and own_or(0.0) == 0.0
    with pytest.raises(SamplingError, match=r"euler has no eta, so 0.5 cannot be used.*sa_solver"):
        choose(SAMPLERS, "euler", eta=0.5)
    with pytest.raises(SamplingError, match="heun has no s_noise"):
        choose(SAMPLERS, "heun", s_noise=1.1)
    with pytest.raises(SamplingError, match=r"unknown sampler 'magic'.*euler"):
        choose(SAMPLERS, "magic")
    for order in ("x", True):
        with pytest.raises(SamplingError, match=r"order of the sampler deis is .*a number"):
            choose(SAMPLERS, "deis", order=order)
    choose(SAMPLERS, "gradient_estimation", ge_gamma=np.float32(1.5))
    for eta in (-0.5, float("nan")):
        with pytest.raises(SamplingError, match="sa_solver: eta"):
            choose(SAMPLERS, "sa_solver", eta=eta)
