"""Multistep samplers against analytic flows, diffusers and ComfyUI."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.samplers.deis import sample_deis
from chroma_nodes.samplers.dpmpp_2m import sample_dpmpp_2m
from chroma_nodes.samplers.dpmpp_2m_sde import sample_dpmpp_2m_sde
from chroma_nodes.samplers.gradient_estimation import sample_gradient_estimation
from chroma_nodes.samplers.res_2m import sample_res_2m, sample_res_2m_ode
from chroma_nodes.samplers.res_multistep import (
    sample_res_multistep,
    sample_res_multistep_ancestral,
)
from chroma_nodes.samplers.sa_solver import sample_sa_solver, stochastic_adams
from comfy_inprocess import import_comfyui
from scipy.integrate import quad, solve_ivp
from scipy.special import betaincinv
from test_samplers import SPREAD, gaussian, gaussian_solution, two_modes

# Those that add noise, at their default eta.
NOISY = {
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "res_2m": sample_res_2m,
    "res_multistep_ancestral": sample_res_multistep_ancestral,
    "sa_solver": sample_sa_solver,
}
# Those that do not, and the order they reach.
ODE = {
    "deis": (sample_deis, 3),
    "deis order 1": (partial(sample_deis, order=1), 1),
    "deis order 2": (partial(sample_deis, order=2), 2),
    "deis order 4": (partial(sample_deis, order=4), 4),
    "dpmpp_2m": (sample_dpmpp_2m, 2),
    "gradient_estimation": (sample_gradient_estimation, 2),
    "gradient_estimation gamma 2": (partial(sample_gradient_estimation, ge_gamma=2.0), 1),
    "res_2m_ode": (sample_res_2m_ode, 2),
    "dpmpp_2m_sde eta 0": (partial(sample_dpmpp_2m_sde, eta=0.0), 2),
    "res_multistep_ancestral eta 0": (partial(sample_res_multistep_ancestral, eta=0.0), 2),
    "sa_solver eta 0": (partial(sample_sa_solver, eta=0.0), 4),
    "sa_solver eta 0, no corrector": (
        partial(sample_sa_solver, eta=0.0, corrector_order=0),
        3,
    ),
}
ALL = {name: sampler for name, (sampler, _) in ODE.items()} | NOISY


def run(sampler, model, x, sigmas, **kw):
    if isinstance(sigmas, list):
        sigmas = torch.tensor(sigmas, dtype=torch.float64)
    return sampler(model, x, sigmas, disable=True, **kw)


def points():
    return torch.linspace(-2, 2, 12, dtype=torch.float64).view(2, 6)


def graded(steps, start=1.0, end=0.1):
    """Steps that begin small, as schedules do where the history is still short."""
    return start - (start - end) * torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 1.7


def uniform(steps):
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def beta(steps):
    quantiles = betaincinv(0.6, 0.6, 1 - np.arange(steps) / steps)
    return torch.tensor(np.append(quantiles, 0.0))


def half_log_snr(sigma):
    return math.log((1 - sigma) / sigma)


def shrinking(steps=12, end=0.2):
    """Steps that shrink in half-log-SNR, so that no slope is followed too far."""
    lengths = np.cumsum(np.linspace(1.5, 0.5, steps))
    first = half_log_snr(0.97)
    lambdas = first + (half_log_snr(end) - first) * np.append(0.0, lengths / lengths[-1])
    return torch.tensor(1 / (1 + np.exp(lambdas)))


@pytest.mark.parametrize("name", ODE)
def test_order_of_convergence(name):
    sampler, order = ODE[name]
    x = points()
    exact = gaussian_solution(x, 1.0, 0.1)
    coarse, fine = (
        float((run(sampler, gaussian, x, graded(n)) - exact).abs().max()) for n in (192, 384)
    )
    slope = math.log2(coarse / fine)
    assert slope > order - 0.3
    if "dpmpp" not in name:  # Its first error term nearly cancels here.
        assert slope < order + 0.3


@pytest.mark.parametrize("name", ODE)
def test_converges_on_a_mixture_as_scipy_does(name):
    starts = np.array([-1.7, -0.4, 0.3, 1.1])

    def field(s, x):
        out = two_modes(torch.tensor(x)[None], torch.tensor([s], dtype=torch.float64))
        return ((torch.tensor(x) - out[0]) / s).numpy()

    truth = solve_ivp(field, (1.0, 0.05), starts, rtol=1e-9, atol=1e-10).y[:, -1]
    sampler, order = ODE[name]
    ours = run(sampler, two_modes, torch.tensor(starts)[None], graded(300, end=0.05))[0]
    np.testing.assert_allclose(ours.numpy(), truth, atol=3e-2 if order == 1 else 1e-3)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis_is_exact_where_the_velocity_is_a_polynomial(order):
    sigmas, degree = [1.0, 0.9, 0.65, 0.5, 0.3, 0.2], order - 1
    seen = []

    def model(x, sigma):
        s = float(sigma[0])
        seen.append((s, float(x)))
        return x - s * (degree + 1) * s**degree

    x = torch.zeros(1, 1, dtype=torch.float64)
    out = float(run(partial(sample_deis, order=order), model, x, sigmas))
    s, start = seen[degree]  # From here the history is full.
    assert out - start == pytest.approx(0.2**order - s**order, abs=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
def test_gradient_estimation_takes_the_velocity_at_a_share_of_the_step(gamma):
    """On every grid, where the velocity is straight in sigma: at sigma + (gamma - 1) h."""
    sigmas = [1.0, 0.9, 0.65, 0.5, 0.2]
    seen = []

    def model(x, sigma):
        s = float(sigma[0])
        seen.append(float(x))
        return x - s * (2 * s - 1)

    sampler = partial(sample_gradient_estimation, ge_gamma=gamma)
    seen_end = float(run(sampler, model, torch.zeros(1, 1, dtype=torch.float64), sigmas))
    xs = [*seen, seen_end]
    for i in range(1, 4):
        h = sigmas[i + 1] - sigmas[i]
        assert xs[i + 1] - xs[i] == pytest.approx(h * (2 * (sigmas[i] + (gamma - 1) * h) - 1))


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_agrees_with_diffusers_while_steps_shrink(solver, stochastic):
    """Up to sigma 0.5; below, uniform steps grow in half-log-SNR: ours differ on purpose."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++",
        solver_type=solver,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
    )
    theirs.set_timesteps(20)
    sigmas = theirs.sigmas[:11].double()
    draws = torch.randn(10, 2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = points()
    for i, t in enumerate(theirs.timesteps[:10]):
        velocity = (x - two_modes(x, sigmas[i].expand(2))) / sigmas[i]
        x = theirs.step(velocity, t, x, variance_noise=draws[i]).prev_sample
    sampler = sample_dpmpp_2m_sde if solver == "midpoint" else sample_res_2m
    numbered = iter(draws)
    ours = run(
        sampler, two_modes, points(), sigmas, eta=float(stochastic),
        noise_sampler=lambda s, t: next(numbered),
    )  # fmt: skip
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def comfyui_model():
    import_comfyui()
    import comfy.model_sampling

    class Sampling(comfy.model_sampling.CONST):
        noise_scale = 1.0

        def percent_to_sigma(self, percent):
            return 1 - percent

    class Model:
        class inner_model:
            class model_patcher:
                get_model_object = staticmethod(lambda name: Sampling())

        def __call__(self, x, sigma, **_):
            return two_modes(x, sigma)

    return Model()


def comfyui(name, sigmas, **options):
    import comfy.k_diffusion.sampling as theirs

    sampler = getattr(theirs, f"sample_{name}")
    return sampler(comfyui_model(), points(), sigmas, extra_args={}, disable=True, **options)


def fixed_noise():
    generator = torch.Generator().manual_seed(11)
    return lambda s, t: torch.randn(2, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("end", [[0.0], []])
@pytest.mark.parametrize("ours", ["dpmpp_2m_sde", "res_2m"])
def test_two_step_solvers_agree_with_comfyui_while_steps_shrink(ours, end, eta):
    """ComfyUI starts at sigma 0.9999 instead of 1, and follows slopes through growing steps."""
    comfyui_model()
    sigmas = torch.cat([shrinking(), torch.tensor(end, dtype=torch.float64)])
    expected = comfyui(
        "dpmpp_2m_sde", sigmas, eta=eta, noise_sampler=fixed_noise(),
        solver_type="midpoint" if ours == "dpmpp_2m_sde" else "heun",
    )  # fmt: skip
    found = run(NOISY[ours], two_modes, points(), sigmas, eta=eta, noise_sampler=fixed_noise())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sa_solver_agrees_with_comfyui_below_sigma_1(eta):
    """ComfyUI starts at sigma 0.9999 instead of 1."""
    comfyui_model()
    sigmas = 0.97 * beta(14)
    kw = {} if eta else {"tau_func": lambda sigma: 0.0}
    expected = comfyui("sa_solver", sigmas, noise_sampler=fixed_noise(), **kw)
    found = run(sample_sa_solver, two_modes, points(), sigmas, eta=eta, noise_sampler=fixed_noise())
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_gradient_estimation_agrees_with_comfyui_on_equal_steps(gamma):
    """On others ComfyUI's is first order for every gamma."""
    comfyui_model()
    expected = comfyui("gradient_estimation", uniform(12), ge_gamma=gamma)
    sampler = partial(sample_gradient_estimation, ge_gamma=gamma)
    torch.testing.assert_close(
        run(sampler, two_modes, points(), uniform(12)), expected, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("steps", [12, 16, 26])
@pytest.mark.parametrize(
    "name", ["deis", "dpmpp_2m", "dpmpp_2m_sde", "gradient_estimation", "sa_solver"]
)
def test_no_worse_than_comfyui_without_noise(name, steps):
    """Ours differ on purpose: DEIS in sigma, the flow's half-log-SNR, sigma 1, long steps."""
    comfyui_model()
    x = points()
    kw = {
        "dpmpp_2m_sde": {"eta": 0.0, "noise_sampler": fixed_noise()},
        "sa_solver": {"tau_func": lambda sigma: 0.0, "noise_sampler": fixed_noise()},
    }.get(name, {})
    eta = {"eta": 0.0} if kw else {}
    truth = run(partial(sample_deis, order=4), two_modes, x, beta(1500))

    def error(out):
        return float((out - truth).square().mean().sqrt())

    ours = run(globals()[f"sample_{name}"], two_modes, x, beta(steps), **eta)
    assert error(ours) < 1.1 * error(comfyui(name, beta(steps), **kw))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("nodes", [[0.5], [0.6, 0.5], [0.8, 0.6, 0.5], [0.8, 0.6, 0.5, 0.35]])
def test_stochastic_adams_weights_are_integrals(nodes, eta):
    rate, end = eta**2, half_log_snr(0.35)
    lambdas = [half_log_snr(node) for node in nodes]

    def integrand(value, j):
        basis = math.prod(
            (value - other) / (lambdas[j] - other) for k, other in enumerate(lambdas) if k != j
        )
        return (1 + rate) * math.exp(-(1 + rate) * (end - value)) * basis

    expected = [
        (1 - 0.35) * quad(integrand, half_log_snr(0.5), end, args=(j,))[0]
        for j in range(len(nodes))
    ]
    found = stochastic_adams(nodes, 0.5, 0.35, rate)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    # At sigma 1, lambda is -inf: the polynomial there is the one through the other nodes.
    with_one = stochastic_adams([1.0, *nodes], 0.5, 0.35, rate)
    np.testing.assert_allclose(with_one, [0.0, *expected], rtol=1e-9, atol=1e-12)


def test_stochastic_adams_weights_stay_exact_in_tiny_steps():
    """Their sum is the weight of a constant; their balance is second order."""
    s, h = 0.5, 1e-5
    nodes = [s + 2 * h, s + h, s]
    weights = stochastic_adams(nodes, s, s - h, 0.0)
    assert sum(weights) == pytest.approx(1 - (s - h) / s, rel=1e-9)
    # The uniform three-step Adams-Bashforth weights.
    share = np.array(weights) / sum(weights)
    np.testing.assert_allclose(share, [5 / 12, -16 / 12, 23 / 12], rtol=1e-3)


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("schedule", [uniform, beta])
@pytest.mark.parametrize("flow", ["gaussian", "two_modes"])
def test_samples_have_the_energy_of_the_pictures(name, schedule, flow):
    model = {"gaussian": gaussian, "two_modes": two_modes}[flow]
    truth = SPREAD**2 + {"gaussian": 0.25, "two_modes": 1.0}[flow]
    x = torch.randn(2, 16384, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = run(NOISY[name], model, x, schedule(26), extra_args={"seed": 5})
    assert float(out.square().mean()) == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("name", NOISY)
def test_more_steps_bring_the_energy_to_the_truth(name):
    x = torch.randn(2, 32768, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = run(NOISY[name], gaussian, x, beta(150), extra_args={"seed": 5}, eta=1.0)
    assert float(out.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(out.std()) == pytest.approx(SPREAD, rel=0.015)


@pytest.mark.parametrize("name", NOISY)
def test_noise_comes_from_the_seed_or_the_noise_sampler(name):
    x, sigmas = points(), [1.0, 0.7, 0.7, 0.4, 0.1, 0.0]
    sampler = NOISY[name]

    def out(**kw):
        return run(sampler, lambda x, s, seed=0: two_modes(x, s), x, sigmas, **kw)

    assert torch.equal(out(extra_args={"seed": 1}), out(extra_args={"seed": 1}))
    assert not torch.equal(out(extra_args={"seed": 1}), out(extra_args={"seed": 2}))
    calls = []

    def record(sigma, following):
        calls.extend((float(sigma), float(following)))
        return torch.ones_like(x)

    out(noise_sampler=record)
    expected = [1.0, 0.7, 0.7, 0.4, 0.4, 0.1]
    if name == "sa_solver":  # Noise between sigma 0.2 and 0.8 alone.
        expected = expected[:4]
    assert calls == pytest.approx(expected)
    still = out(noise_sampler=lambda s, t: torch.full_like(x, 1e6), s_noise=0.0)
    assert float(still.abs().max()) < 10
    quiet = out(extra_args={"seed": 1}, eta=0.0)
    assert torch.equal(quiet, out(extra_args={"seed": 2}, eta=0.0, s_noise=3.0))


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("s_noise", [1.0, 0.5])
def test_a_step_mixes_picture_and_noise_as_rectified_flow_does(name, s_noise):
    """From the picture's own state, one step gives (1 - t) picture and t noise, old and new."""
    picture, old, new = torch.tensor(0.8), torch.tensor(1.0), torch.tensor(1.0)
    s, t = 0.6, 0.4
    x = ((1 - s) * picture + s * old).double().view(1, 1)
    kw = {"eta": 1.0, "s_noise": s_noise}

    def state(noise):
        return float(
            run(
                NOISY[name], lambda x, s: picture.double().view(1, 1), x, [s, t],
                noise_sampler=lambda s, t: torch.full_like(x, noise), **kw,
            )
        )  # fmt: skip

    kept = state(0.0) - (1 - t) * 0.8
    fresh = state(float(new)) - state(0.0)
    assert (kept / t) ** 2 + (fresh / s_noise / t) ** 2 == pytest.approx(1, abs=1e-6)


def test_res_multistep_without_eta_is_the_ode_solver():
    x, sigmas = torch.randn(2, 5), [1.0, 0.9, 0.9, 0.6, 0.2, 0.01, 0.0]
    plain = run(sample_res_multistep, two_modes, x, sigmas)
    assert torch.equal(run(sample_res_multistep_ancestral, two_modes, x, sigmas, eta=0.0), plain)
    assert not torch.equal(run(sample_res_multistep, two_modes, x, sigmas, eta=0.5), plain)


@pytest.mark.parametrize("eta", [1.5, 4.0])
@pytest.mark.parametrize("name", NOISY)
def test_large_eta_stays_finite(name, eta):
    out = run(NOISY[name], gaussian, points(), [1.0, 0.9, 0.5, 0.1, 0.01, 0.0], eta=eta)
    assert bool(out.isfinite().all()) and float(out.abs().max()) < 20


@pytest.mark.parametrize("name", ALL)
def test_a_model_that_knows_the_picture_is_followed_exactly(name):
    picture, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    out = run(ALL[name], lambda x, s: picture, noise, [1.0, 0.6, 0.5, 0.1, 0.0])
    assert torch.equal(out, picture)
    if name in NOISY:
        return
    part = run(ALL[name], lambda x, s: picture, noise, [1.0, 0.6, 0.5, 0.2])
    torch.testing.assert_close(part, 0.8 * picture + 0.2 * noise, rtol=1e-5, atol=1e-5)
    start = 0.7 * picture + 0.3 * noise
    part = run(ALL[name], lambda x, s: picture, start, [0.3, 0.2, 0.1])
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
    assert calls == pytest.approx([1.0, 0.9, 0.7, 0.4, 0.1])  # One evaluation a step.


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept(name, dtype):
    def model(x, sigma, **_):
        assert x.dtype == dtype
        return gaussian(x, sigma.to(x)).to(dtype)

    x, sigmas = torch.randn(2, 3).to(dtype), [1.0, 0.943, 0.503, 0.2, 0.0]
    out = run(ALL[name], model, x, sigmas, extra_args={"seed": 0})
    assert out.dtype == dtype and bool(out.isfinite().all())


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


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("option", ["eta", "s_noise"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_unusable_noise_options(name, option, value):
    with pytest.raises(SamplingError, match=option) as error:
        run(NOISY[name], gaussian, points(), [1.0, 0.5, 0.0], **{option: value})
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
