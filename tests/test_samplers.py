"""Samplers against analytic flows, whose solutions are known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.samplers import SAMPLERS
from chroma_nodes.samplers.steps import quadrature
from comfy_inprocess import import_comfyui
from scipy.integrate import solve_ivp
from test_schedulers import REFERENCE

SPREAD = 0.4
ORDER = {"euler": 1, "heun": 2, "res_multistep": 2, "flash": 2}


def gaussian(x, sigma, **_):
    """Denoised picture where all pictures are normal with deviation SPREAD around 0.5."""
    s = sigma.view(-1, *[1] * (x.ndim - 1)).to(x)
    variance = (1 - s) ** 2 * SPREAD**2 + s**2
    return 0.5 + (1 - s) * SPREAD**2 / variance * (x - (1 - s) * 0.5)


def gaussian_solution(x, start, end):
    def deviation(s):
        return math.sqrt((1 - s) ** 2 * SPREAD**2 + s**2)

    return (1 - end) * 0.5 + (x - (1 - start) * 0.5) * deviation(end) / deviation(start)


def two_modes(x, sigma, **_):
    """Denoised picture where pictures are -1 or 1, each blurred by SPREAD."""
    s = sigma.view(-1, *[1] * (x.ndim - 1)).to(x)
    variance = (1 - s) ** 2 * SPREAD**2 + s**2
    means = torch.stack([-(1 - s), (1 - s)])
    weight = torch.softmax(-((x - means) ** 2) / (2 * variance), dim=0)
    each = torch.stack([-torch.ones_like(x), torch.ones_like(x)])
    each = each + (1 - s) * SPREAD**2 / variance * (x - means)
    return (weight * each).sum(0)


def run(name, model, x, sigmas, **kw):
    """flash in its form of two evaluations a step; the other one is flow_pec."""
    if name == "flash":
        kw["substeps"] = 2
    return SAMPLERS[name](model, x, sigmas, disable=True, **kw)


def grid(steps, start=1.0, end=0.1):
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


@pytest.mark.parametrize("name", ORDER)
def test_order_of_convergence(name):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[None]
    exact = gaussian_solution(x, 1.0, 0.1)
    errors = [
        float((run(name, gaussian, x, grid(n)) - exact).abs().max()) for n in (16, 32, 64, 128)
    ]
    slopes = np.diff(np.log2(errors))
    assert -slopes[-1] > ORDER[name] - 0.3
    if name != "flash":  # Two-step Runge-Kutta reaches a higher order on smooth flows.
        assert -slopes[-1] < ORDER[name] + 0.3


@pytest.mark.parametrize("name", ORDER)
def test_converges_on_a_mixture_as_scipy_does(name):
    starts = np.array([-1.7, -0.4, 0.3, 1.1])

    def field(s, x):
        out = two_modes(torch.tensor(x)[None], torch.tensor([s], dtype=torch.float64))
        return ((torch.tensor(x) - out[0]) / s).numpy()

    truth = solve_ivp(field, (1.0, 0.05), starts, rtol=1e-9, atol=1e-10).y[:, -1]
    ours = run(name, two_modes, torch.tensor(starts)[None], grid(300, end=0.05))[0]
    tolerance = 2e-2 if name == "euler" else 2e-3
    np.testing.assert_allclose(ours.numpy(), truth, atol=tolerance)


def test_flash_sub_steps_at_two_thirds_and_is_exact_for_quadratic_velocities():
    sigmas, seen = [1.0, 0.9, 0.65, 0.5, 0.2], []

    def model(x, sigma):
        s = float(sigma[0])
        seen.append(s)
        return x - s * (3 * s**2 - 4 * s + 1)

    x = torch.zeros(1, 1, dtype=torch.float64)
    out = run("flash", model, x, torch.tensor(sigmas, dtype=torch.float64))
    assert seen == pytest.approx([n for a, b in pairwise(sigmas) for n in (a, a + (b - a) * 2 / 3)])
    # The integral of the velocity from 1, where s^3 - 2 s^2 + s is 0, to 0.2.
    assert float(out) == pytest.approx(0.2**3 - 2 * 0.2**2 + 0.2, abs=1e-12)


def test_flash_predicts_its_sub_steps_from_the_last_one():
    sigmas, inner = [1.0, 0.9, 0.65, 0.5, 0.2], []

    def model(x, sigma):
        s = float(sigma[0])
        inner.append((s, float(x)))
        return x - s * (2 * s - 1)

    run("flash", model, torch.zeros(1, 1, dtype=torch.float64), torch.tensor(sigmas).double())
    # A straight velocity, whose x is s^2 - s, is predicted exactly once there is a step behind.
    for s, x in inner[3::2]:
        assert x == pytest.approx(s**2 - s, abs=1e-6)
    s, x = inner[1]
    assert x == pytest.approx(s - 1, abs=1e-6)


def test_second_order_beats_euler_at_equal_evaluations():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[None]
    exact = gaussian_solution(x, 1.0, 0.1)

    def error(name, steps):
        return float((run(name, gaussian, x, grid(steps)) - exact).abs().max())

    assert error("flash", 8) < error("heun", 8) < error("euler", 16)
    assert error("res_multistep", 16) < error("euler", 16)


@pytest.mark.parametrize("name", ORDER)
def test_a_model_that_knows_the_picture_is_followed_exactly(name):
    picture = torch.randn(2, 3, 4, 4)
    noise = torch.randn(2, 3, 4, 4)
    out = run(name, lambda x, s: picture, noise, torch.tensor([1.0, 0.6, 0.5, 0.1, 0.0]))
    assert torch.equal(out, picture)
    part = run(name, lambda x, s: picture, noise, torch.tensor([1.0, 0.6, 0.5, 0.2]))
    torch.testing.assert_close(part, 0.8 * picture + 0.2 * noise, rtol=1e-5, atol=1e-5)
    start = 0.7 * picture + 0.3 * noise
    torch.testing.assert_close(
        run(name, lambda x, s: picture, start, torch.tensor([0.3, 0.2, 0.1])),
        0.9 * picture + 0.1 * noise, rtol=1e-5, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 16, 4, 4), (1, 2, 3, 4, 5)])
def test_contract(name, shape):
    x = torch.randn(shape)
    keep, sigmas = x.clone(), torch.tensor([1.0, 0.7, 0.4, 0.1, 0.0])
    extra, calls, reports = {"seed": 7}, [], []

    def model(x, sigma, seed):
        assert sigma.shape == (shape[0],) and seed == 7
        calls.append(float(sigma[0]))
        return gaussian(x, sigma)

    out = run(name, model, x, sigmas, extra_args=extra, callback=reports.append)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert torch.equal(x, keep) and extra == {"seed": 7}
    assert torch.equal(sigmas, torch.tensor([1.0, 0.7, 0.4, 0.1, 0.0]))
    assert [r["i"] for r in reports] == [0, 1, 2, 3]
    assert [r["sigma"] for r in reports] == pytest.approx([1.0, 0.7, 0.4, 0.1])
    assert all(r["denoised"].shape == x.shape for r in reports)
    assert len(calls) == (7 if name in ("heun", "flash") else 4)
    alone = run(name, gaussian, x[:1], sigmas)
    torch.testing.assert_close(out[:1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept_and_sigma_is_not_rounded_to_it(name, dtype):
    seen = []

    def model(x, sigma):
        assert x.dtype == dtype
        seen.append(sigma[0].double().item())
        return gaussian(x, sigma.to(x)).to(dtype)

    out = run(name, model, torch.randn(2, 3).to(dtype), torch.tensor([1.0, 0.943, 0.503, 0.0]))
    assert out.dtype == dtype and bool(out.isfinite().all())
    for sigma in (1.0, 0.943, 0.503):
        assert min(abs(s - sigma) for s in seen) < 1e-7


@pytest.mark.parametrize("name", ORDER)
def test_a_repeated_sigma_changes_nothing_but_is_reported(name):
    def model(x, sigma):  # Networks are not the identity at sigma 0.
        return gaussian(x, sigma) + 0.01

    x = torch.linspace(-2, 2, 6, dtype=torch.float64)[None]
    reports = []
    sigmas = torch.tensor([1.0, 1.0, 0.6, 0.6, 0.3, 0.1, 0.0, 0.0], dtype=torch.float64)
    plain = torch.tensor([1.0, 0.6, 0.3, 0.1, 0.0], dtype=torch.float64)
    out = run(name, model, x, sigmas, callback=reports.append)
    assert torch.equal(out, run(name, model, x, plain))
    assert [r["i"] for r in reports] == list(range(7))


@pytest.mark.parametrize("name", ["euler", "heun", "res_multistep"])
@pytest.mark.parametrize("end", [[0.0], []])
def test_agrees_with_comfyui(name, end):
    import_comfyui()
    import comfy.k_diffusion.sampling as theirs

    class Model:
        class inner_model:
            class model_patcher:
                get_model_object = staticmethod(lambda name: None)

        def __call__(self, x, sigma, **_):
            return two_modes(x, sigma)

    x = torch.linspace(-2, 2, 12, dtype=torch.float64).view(2, 6)
    sigmas = torch.tensor([1.0, 0.943, 0.824, 0.5, 0.176, 0.057, *end], dtype=torch.float64)
    expected = getattr(theirs, f"sample_{name}")(Model(), x, sigmas, extra_args={}, disable=True)
    torch.testing.assert_close(run(name, two_modes, x, sigmas), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ORDER)
def test_nothing_to_do(name):
    x = torch.randn(1, 2)
    assert torch.equal(run(name, gaussian, x, torch.tensor([0.5])), x)
    assert torch.equal(run(name, gaussian, x, torch.zeros(0)), x)


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize(
    ("sigmas", "says"),
    [
        ([1.0, 0.5, 0.6, 0.0], "0.6 follows 0.5 at step 2"),
        ([0.0, 0.5, 1.0], "must not rise"),
        ([1.0, math.nan, 0.0], "finite"),
        (
            [14.6, 3.0, 0.0],
            "sigmas from 0 to 14.6 are not a flow model's; .*a Chroma MODEL",
        ),
    ],
)
def test_unusable_sigmas(name, sigmas, says):
    with pytest.raises(SamplingError, match=says):
        run(name, gaussian, torch.randn(1, 2), torch.tensor(sigmas))


@pytest.mark.parametrize("case", REFERENCE["_velocity_quadrature_test_vectors"])
def test_quadrature_weights(case):
    weights = quadrature(case["nodes"], case["s"], case["t"])
    np.testing.assert_allclose(weights, case["weights"], rtol=1e-9, atol=1e-12)
