"""The weights and steps of samplers are the integrals and mixtures they stand for."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from chroma_nodes.samplers.deis import sample_deis
from chroma_nodes.samplers.gradient_estimation import sample_gradient_estimation
from chroma_nodes.samplers.res_2s import sample_res_2s_ode, stage_weights
from chroma_nodes.samplers.res_multistep import (
    sample_res_multistep,
    sample_res_multistep_ancestral,
)
from chroma_nodes.samplers.sa_solver import stochastic_weights
from chroma_nodes.samplers.steps import ancestral_step, between
from sampler_cases import half_log_snr, run
from scipy.integrate import quad
from test_samplers import two_modes


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


@pytest.mark.parametrize("c2", [0.3, 0.5, 1.0])
def test_res_2s_is_exact_where_denoised_is_straight_in_log_sigma(c2):
    sigmas = [1.0, 0.9, 0.4, 0.2, 0.03]

    def model(x, sigma, **_):
        return torch.full_like(x, 0.3 - 2 * math.log(float(sigma[0])))

    x = torch.tensor([[1.5]], dtype=torch.float64)
    found = float(run(partial(sample_res_2s_ode, c2=c2), model, x, sigmas))
    # dx/du = D with x = u^-1 y: x / sigma grows by the integral of D over 1 / sigma.
    whole = quad(lambda s: (0.3 - 2 * math.log(s)) / s**2, 0.03, 1.0, epsabs=1e-12)[0]
    assert found == pytest.approx(0.03 * (1.5 + whole), abs=1e-9)


@pytest.mark.parametrize("h", [1e-6, 0.1, 1.0, 8.0])
@pytest.mark.parametrize("c2", [0.3, 1.0])
def test_stage_weights_are_integrals(h, c2):
    def integral(basis):
        return quad(lambda u: math.exp(u - h) * basis(u), 0, h, epsabs=1e-14)[0]

    inner = integral(lambda u: u / (c2 * h))
    expected = integral(lambda u: 1.0) - inner, inner
    np.testing.assert_allclose(stage_weights(h, c2), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_between_is_a_share_of_the_step_in_lambda(share):
    middle = between(0.9, 0.2, share)
    whole = half_log_snr(0.2) - half_log_snr(0.9)
    assert half_log_snr(middle) - half_log_snr(0.9) == pytest.approx(share * whole)
    assert math.log(between(1.0, 0.2, share)) == pytest.approx(share * math.log(0.2))


@pytest.mark.parametrize("sigma", [1.0, 0.999999, 0.6, 1e-4])
def test_between_stays_within_the_step(sigma):
    rng = np.random.default_rng(0)
    for following in np.concatenate([sigma * rng.random(50), sigma * (1 - 1e-12 * rng.random(50))]):
        for share in (1e-9, 0.5, 1.0):
            assert following <= between(sigma, float(following), share) <= sigma


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 2.0])
def test_ancestral_step_keeps_the_mixture_of_rectified_flow(eta):
    for sigma, following in ((1.0, 0.9), (0.9, 0.5), (0.5, 0.02)):
        down, keep, spread = ancestral_step(sigma, following, eta)
        assert 0 <= down <= following
        assert keep * (1 - down) == pytest.approx(1 - following)
        assert (keep * down) ** 2 + spread**2 == pytest.approx(following**2)
    assert ancestral_step(0.8, 0.4, 1.0)[0] == pytest.approx(0.4**2 / 0.8)


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
    found = stochastic_weights(nodes, 0.5, 0.35, rate)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    # At sigma 1, lambda is -inf: the polynomial there is the one through the other nodes.
    with_one = stochastic_weights([1.0, *nodes], 0.5, 0.35, rate)
    np.testing.assert_allclose(with_one, [0.0, *expected], rtol=1e-9, atol=1e-12)


def test_stochastic_adams_weights_stay_exact_in_tiny_steps():
    """Their sum is the weight of a constant; their balance is second order."""
    s, h = 0.5, 1e-5
    nodes = [s + 2 * h, s + h, s]
    weights = stochastic_weights(nodes, s, s - h, 0.0)
    assert sum(weights) == pytest.approx(1 - (s - h) / s, rel=1e-9)
    # The uniform three-step Adams-Bashforth weights.
    share = np.array(weights) / sum(weights)
    np.testing.assert_allclose(share, [5 / 12, -16 / 12, 23 / 12], rtol=1e-3)


def test_res_multistep_without_eta_is_the_ode_solver():
    x, sigmas = torch.randn(2, 5), [1.0, 0.9, 0.9, 0.6, 0.2, 0.01, 0.0]
    plain = run(sample_res_multistep, two_modes, x, sigmas)
    assert torch.equal(run(sample_res_multistep_ancestral, two_modes, x, sigmas, eta=0.0), plain)
    assert not torch.equal(run(sample_res_multistep, two_modes, x, sigmas, eta=0.5), plain)
