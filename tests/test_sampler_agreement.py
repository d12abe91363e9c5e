"""Samplers against those of diffusers and ComfyUI, where these are right for rectified flow."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from chroma_nodes.samplers.deis import sample_deis
from chroma_nodes.samplers.dpmpp_2m_sde import sample_dpmpp_2m_sde
from chroma_nodes.samplers.dpmpp_sde import sample_dpmpp_sde
from chroma_nodes.samplers.gradient_estimation import sample_gradient_estimation
from chroma_nodes.samplers.res_2m import sample_res_2m
from chroma_nodes.samplers.sa_solver import sample_sa_solver
from chroma_nodes.samplers.steps import between
from comfy_samplers import ComfyModel, comfyui
from sampler_cases import (
    ALL,
    NOISY,
    beta,
    fixed_noise,
    half_log_snr,
    points,
    run,
    uniform,
    without_noise,
)
from test_samplers import grid, two_modes


def shrinking(steps=12, end=0.2):
    """Steps that shrink in half-log-SNR, so that no slope is followed too far."""
    lengths = np.cumsum(np.linspace(1.5, 0.5, steps))
    first = half_log_snr(0.97)
    lambdas = first + (half_log_snr(end) - first) * np.append(0.0, lengths / lengths[-1])
    return torch.tensor(1 / (1 + np.exp(lambdas)))


@pytest.mark.parametrize("name", ["dpmpp_2s_ancestral", "dpmpp_sde"])
def test_single_steps_agree_with_diffusers(name):
    """Its single-step solver takes pairs of steps: every other sigma is a middle."""
    diffusers = pytest.importorskip("diffusers")
    sigmas = 0.97 * beta(9)[:-1]
    pairs = [sigmas[0]]
    for high, low in pairwise(sigmas):
        pairs += [torch.tensor(between(float(high), float(low), 0.5)).double(), low]
    theirs = diffusers.DPMSolverSinglestepScheduler(
        solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    theirs.set_timesteps(len(pairs) + 1)  # The last two would be of first order.
    theirs.sigmas = torch.stack(pairs)
    x = points()
    for i, sigma in enumerate(pairs[:-1]):
        velocity = (x - two_modes(x, sigma.expand(2))) / sigma
        x = theirs.step(velocity, theirs.timesteps[i], x).prev_sample
    found = run(without_noise(name), two_modes, points(), sigmas)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("eta", [0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "first"),
    [("euler_ancestral", 1.0), ("euler_ancestral", 0.97), ("dpmpp_2s_ancestral", 0.97)],
)
def test_ancestral_samplers_agree_with_comfyui_at_the_same_seed(name, first, eta):
    """From sigma 1, ComfyUI's dpmpp_2s takes 0.9999 for the middle of any step."""
    model = ComfyModel()
    from comfy.k_diffusion.sampling import default_noise_sampler

    generator = torch.Generator().manual_seed(5)
    adds_one = torch.equal(
        default_noise_sampler(points(), seed=4)(1.0, 0.5),
        torch.randn(2, 6, generator=generator, dtype=torch.float64),
    )
    theirs = {"seed": 4 if adds_one else 5}  # Older ones add the noise they started from.
    for sigmas in (first * beta(12), first * grid(6)):
        expected = comfyui(f"{name}_RF", model, points(), sigmas, eta=eta, extra_args=theirs)
        found = run(ALL[name], two_modes, points(), sigmas, extra_args={"seed": 4}, eta=eta)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("r", [0.5, 0.7])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_dpmpp_sde_agrees_with_seeds_2_below_sigma_1(eta, r):
    """ComfyUI starts at sigma 0.9999 instead of 1."""
    for sigmas in (0.97 * beta(12), 0.97 * grid(6)):
        kw = {"eta": eta, "r": r}
        expected = comfyui(
            "seeds_2", ComfyModel(), points(), sigmas, noise_sampler=fixed_noise(), **kw
        )
        sampler = partial(sample_dpmpp_sde, noise_sampler=fixed_noise(), **kw)
        found = run(sampler, two_modes, points(), sigmas)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpmpp_sde_agrees_with_comfyuis_own_on_the_same_path_of_noise(eta):
    """For eta between 0 and 1 they differ: theirs scales the noise, ours its rate."""
    draw, drawn = fixed_noise(), []

    def theirs(s, t):
        """The noise of the step's first part, then that of all of it."""
        s, t = half_log_snr(float(s)), half_log_snr(float(t))
        if len(drawn) % 2 == 0:
            drawn.append((t, draw(s, t)))
            return drawn[-1][1]
        middle, first = drawn[-1]
        drawn.append((t, draw(s, t)))
        early = math.exp(2 * middle) - math.exp(2 * s)  # Integrals of exp(2 lambda).
        late = math.exp(2 * t) - math.exp(2 * middle)
        both = math.sqrt(early) * first + math.sqrt(late) * drawn[-1][1]
        return both / math.sqrt(early + late)

    sigmas = 0.97 * beta(12)
    expected = comfyui("dpmpp_sde", ComfyModel(), points(), sigmas, noise_sampler=theirs, eta=eta)
    sampler = partial(sample_dpmpp_sde, noise_sampler=fixed_noise(), eta=eta)
    found = run(sampler, two_modes, points(), sigmas)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("end", [[0.0], []])
@pytest.mark.parametrize("ours", ["dpmpp_2m_sde", "res_2m"])
def test_two_step_solvers_agree_with_comfyui_while_steps_shrink(ours, end, eta):
    """ComfyUI starts at sigma 0.9999 instead of 1, and follows slopes through growing steps."""
    sigmas = torch.cat([shrinking(), torch.tensor(end, dtype=torch.float64)])
    expected = comfyui(
        "dpmpp_2m_sde", ComfyModel(), points(), sigmas, eta=eta, noise_sampler=fixed_noise(),
        solver_type="midpoint" if ours == "dpmpp_2m_sde" else "heun",
    )  # fmt: skip
    sampler = partial(NOISY[ours][0], eta=eta, noise_sampler=fixed_noise())
    found = run(sampler, two_modes, points(), sigmas)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sa_solver_agrees_with_comfyui_below_sigma_1(eta):
    """ComfyUI starts at sigma 0.9999 instead of 1."""
    sigmas = 0.97 * beta(14)
    kw = {} if eta else {"tau_func": lambda sigma: 0.0}
    expected = comfyui(
        "sa_solver", ComfyModel(), points(), sigmas, noise_sampler=fixed_noise(), **kw
    )
    found = run(sample_sa_solver, two_modes, points(), sigmas, eta=eta, noise_sampler=fixed_noise())
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_gradient_estimation_agrees_with_comfyui_on_equal_steps(gamma):
    """On others ComfyUI's is first order for every gamma."""
    expected = comfyui("gradient_estimation", ComfyModel(), points(), uniform(12), ge_gamma=gamma)
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
    model = ComfyModel()
    x = points()
    kw = {
        "dpmpp_2m_sde": {"eta": 0.0, "noise_sampler": fixed_noise()},
        "sa_solver": {"tau_func": lambda sigma: 0.0, "noise_sampler": fixed_noise()},
    }.get(name, {})
    sampler = without_noise(name) if kw else ALL[name]
    truth = run(partial(sample_deis, order=4), two_modes, x, beta(1500))

    def error(out):
        return float((out - truth).square().mean().sqrt())

    ours = run(sampler, two_modes, x, beta(steps))
    assert error(ours) < 1.1 * error(comfyui(name, model, x, beta(steps), **kw))
