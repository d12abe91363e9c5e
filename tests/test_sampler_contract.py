"""What every sampler keeps to: exact ends, one report a step, dtypes, repeated sigmas, errors."""

import math

import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.samplers.deis import sample_deis
from chroma_nodes.samplers.dpmpp_sde import sample_dpmpp_sde
from chroma_nodes.samplers.gradient_estimation import sample_gradient_estimation
from chroma_nodes.samplers.res_2s import sample_res_2s, sample_res_2s_ode
from chroma_nodes.samplers.sa_solver import sample_sa_solver
from sampler_cases import ALL, NOISY, TWO_STAGE, points, run, without_noise
from test_samplers import gaussian


@pytest.mark.parametrize("name", ALL)
def test_a_model_that_knows_the_picture_is_followed_exactly(name):
    picture, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    out = run(ALL[name], lambda x, s: picture, noise, [1.0, 0.6, 0.5, 0.1, 0.0])
    assert torch.equal(out, picture)
    sampler = without_noise(name) if name in NOISY else ALL[name]
    part = run(sampler, lambda x, s: picture, noise, [1.0, 0.6, 0.5, 0.2])
    torch.testing.assert_close(part, 0.8 * picture + 0.2 * noise, rtol=1e-5, atol=1e-5)
    start = 0.7 * picture + 0.3 * noise
    part = run(sampler, lambda x, s: picture, start, [0.3, 0.2, 0.1])
    torch.testing.assert_close(part, 0.9 * picture + 0.1 * noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(2, 5), (3, 16, 4, 4), (1, 2, 3, 4, 5)])
def test_contract(name, shape):
    x = torch.randn(shape)
    keep, sigmas = x.clone(), torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1, 0.0])
    extra, calls, reports = {"seed": 7}, [], []

    def model(x, sigma, seed):
        assert sigma.shape == (shape[0],) and seed == 7
        calls.append(float(sigma[0]))
        return gaussian(x, sigma)

    out = run(ALL[name], model, x, sigmas, extra_args=extra, callback=reports.append)
    assert out.shape == x.shape and out.dtype == x.dtype and bool(out.isfinite().all())
    assert torch.equal(x, keep) and extra == {"seed": 7}
    assert torch.equal(sigmas, torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1, 0.0]))
    assert [r["i"] for r in reports] == [0, 1, 2, 3, 4]
    assert [r["sigma"] for r in reports] == pytest.approx([1.0, 0.9, 0.7, 0.4, 0.1])
    assert all(r["denoised"].shape == x.shape for r in reports)
    own = calls[::2] if name in TWO_STAGE else calls
    assert own == pytest.approx([1.0, 0.9, 0.7, 0.4, 0.1])
    for sigma, inner in zip(calls[::2], calls[1::2], strict=False) if name in TWO_STAGE else ():
        assert 0 < inner < sigma
    assert len(calls) == (9 if name in TWO_STAGE else 5)  # One evaluation in the last step.


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept_and_sigma_is_not_rounded_to_it(name, dtype):
    seen = []

    def model(x, sigma, **_):
        assert x.dtype == dtype
        seen.append(float(sigma[0]))
        return gaussian(x, sigma.to(x)).to(dtype)

    x, sigmas = torch.randn(2, 3).to(dtype), [1.0, 0.943, 0.503, 0.2, 0.0]
    out = run(ALL[name], model, x, sigmas, extra_args={"seed": 0})
    assert out.dtype == dtype and bool(out.isfinite().all())
    for sigma in sigmas[:-1]:
        assert min(abs(s - sigma) for s in seen) < 1e-7


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("end", [[0.0, 0.0], [0.05]])
def test_a_repeated_sigma_changes_nothing_but_is_reported(name, end):
    def model(x, sigma, **_):  # Networks are not the identity at sigma 0.
        return gaussian(x, sigma) + 0.01

    reports = []
    sigmas = torch.tensor([1.0, 1.0, 0.8, 0.6, 0.6, 0.6, 0.3, 0.1, *end], dtype=torch.float64)
    plain = torch.tensor([1.0, 0.8, 0.6, 0.3, 0.1, end[0]], dtype=torch.float64)
    kw = {"extra_args": {"seed": 3}}
    out = run(ALL[name], model, points(), sigmas, callback=reports.append, **kw)
    assert torch.equal(out, run(ALL[name], model, points(), plain, **kw))
    assert [r["i"] for r in reports] == list(range(len(sigmas) - 1))


@pytest.mark.parametrize("name", ALL)
def test_nothing_to_do_and_unusable_sigmas(name):
    x = torch.randn(1, 2)
    assert torch.equal(run(ALL[name], gaussian, x, [0.5]), x)
    assert torch.equal(run(ALL[name], gaussian, x, torch.zeros(0)), x)
    for sigmas, says in (([1.0, 0.5, 0.6, 0.0], "0.6 follows 0.5"), ([1.0, math.nan], "finite")):
        with pytest.raises(SamplingError, match=says):
            run(ALL[name], gaussian, x, sigmas)


@pytest.mark.parametrize(
    ("sampler", "option"),
    [(sample_dpmpp_sde, "r"), (sample_res_2s, "c2"), (sample_res_2s_ode, "c2")],
)
@pytest.mark.parametrize("value", [0.0, -0.5, 1.1, math.nan])
def test_unusable_stages(sampler, option, value):
    with pytest.raises(SamplingError, match=f"{option} {value} is not usable") as error:
        run(sampler, gaussian, points(), [1.0, 0.5, 0.0], **{option: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sampler", "options", "says"),
    [
        (sample_deis, {"order": 0}, "order 0 is not usable; expected 1 to 4"),
        (sample_deis, {"order": 5}, "order 5"),
        (sample_deis, {"order": 2.5}, "order 2.5"),
        (sample_sa_solver, {"predictor_order": 0}, "predictor_order 0 .* 1 to 4"),
        (sample_sa_solver, {"corrector_order": 5}, "corrector_order 5 .* 0 to 4"),
        (sample_gradient_estimation, {"ge_gamma": math.nan}, "ge_gamma nan"),
    ],
)
def test_unusable_options(sampler, options, says):
    with pytest.raises(SamplingError, match=says):
        run(sampler, gaussian, points(), [1.0, 0.5, 0.0], **options)
