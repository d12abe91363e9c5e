"""flow_pec and the flows it is judged by: formulas, limiters, noise, and the samplers' contract."""

import math
from itertools import pairwise

import flows
import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.samplers.adams import predictor, slope_ratio, stochastic_adams, van_leer
from chroma_nodes.samplers.flash import sample_flash
from chroma_nodes.samplers.flow_pec import sample_flow_pec
from chroma_nodes.samplers.sa_solver import sample_sa_solver
from chroma_nodes.samplers.steps import quadrature
from chroma_nodes.schedulers import get_sigmas
from scipy.integrate import quad
from test_schedulers import REFERENCE

VECTORS = REFERENCE["_velocity_quadrature_test_vectors"]
PICTURES = {
    "gaussian": flows.normal(torch.full((4,), 0.5).double(), torch.full((4,), 0.16).double()),
    "spectrum": flows.normal(torch.zeros(64).double(), flows.spectrum(2.0, 627.0)),
    "ring": flows.ring(),
    "mixture": flows.scattered(torch.ones(16).double(), 32, seed=2),
    "image": flows.scattered(flows.spectrum(2.0, 627.0), 24, seed=3),
}


def run(model, x, sigmas, **options):
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    return sample_flow_pec(model, x, sigmas, disable=True, **options)


def one(model, sigmas, start=0.0, **options):
    """A single number from `start`; model(s, x) is the velocity."""

    def denoise(x, sigma):
        s = float(sigma[0])
        return x - s * model(s, x)

    x = torch.full((1, 1), start, dtype=torch.float64)
    return float(run(denoise, x, sigmas, **options))


def slope(error, steps=(64, 128)):
    return math.log2(error(steps[0]) / error(steps[1]))


@pytest.mark.parametrize("order", [2, 3])
def test_converges_with_third_order(order):
    """The corrector's order, as long as the predictor's is no more than one below."""

    def error(n):
        sigmas = torch.linspace(0.9, 0.2, n + 1).double()
        mean, variance, x = torch.zeros(1).double(), torch.ones(1).double(), torch.ones(1, 1)
        exact = flows.normal_solution(mean, variance, x.double(), 0.9, 0.2)
        out = run(flows.normal(mean, variance), x.double(), sigmas, order=order, kappa=9.0)
        return float((out - exact).abs())

    assert slope(error) > 2.7


def test_a_velocity_straight_in_sigma_is_exact():
    sigmas = [1.0, 0.93, 0.7, 0.55, 0.2]
    found = one(lambda s, _: 2 * s - 1, sigmas, kappa=9.0)
    assert found == pytest.approx(0.2**2 - 0.2, abs=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_corrected_steps_are_exact_for_quadratic_velocities(order):
    sigmas = [1.0, 0.93, 0.7, 0.55, 0.3, 0.1, 0.05]

    def v(s, _=None):
        return 3 * s**2 + 4 * s + 1

    def integral(s):
        return s**3 + 2 * s**2 + s

    end = one(v, sigmas, order=order)
    # The first step knows two velocities, all others three.
    corrected = (0.93 - 1.0) * (v(1.0) + v(0.93)) / 2 + integral(0.1) - integral(0.93)
    known = [(s, torch.full((1, 1), v(s), dtype=torch.float64)) for s in sigmas[3:6]]
    share = float(van_leer(slope_ratio(known)))
    used, weights = predictor(known, 0.05, quadrature, order, {2: 2.6, 3: 4.0}[order])
    formula = sum(w * float(f) for w, (_, f) in zip(weights, used, strict=True))
    plain = (0.05 - 0.1) * v(0.1)
    assert end == pytest.approx(corrected + plain + share * (formula - plain), abs=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_the_step_to_0_follows_the_velocitys_slope(order):
    sigmas = [1.0, 0.93, 0.7, 0.55, 0.3, 0.15, 0.0]
    assert one(lambda s, _: 2 * s - 1, sigmas, order=order) == pytest.approx(0, abs=1e-12)


def test_the_third_order_predictor_is_exact_for_quadratic_velocities():
    known = [(s, torch.full((1, 1), 3 * s**2, dtype=torch.float64)) for s in (0.9, 0.8, 0.65)]
    used, weights = predictor(known, 0.5, quadrature, 3, 9.0)
    assert len(used) == 3
    found = sum(w * float(f) for w, (_, f) in zip(weights, used, strict=True))
    assert found == pytest.approx(0.5**3 - 0.65**3, abs=1e-14)


@pytest.mark.parametrize("case", [c for c in VECTORS if c["nodes"][0] == c["s"]])
def test_recorded_predictor_weights(case):
    known = [(s, torch.zeros(1, 1)) for s in reversed(case["nodes"])]
    _, weights = predictor(known, case["t"], quadrature, 3, 99.0)
    np.testing.assert_allclose(weights[::-1], case["weights"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kappa", [1.0, 1.8, 2.6, 4.0, 9.0])
@pytest.mark.parametrize("steps", [8, 16, 26])
def test_the_predictor_takes_the_highest_order_within_its_limit(steps, kappa):
    sigmas = get_sigmas("bong_tangent", steps).double().tolist()
    for i in range(len(sigmas) - 2):
        nodes, h = sigmas[max(0, i - 2) : i + 1], sigmas[i + 1] - sigmas[i]
        known = [(s, torch.zeros(1, 1)) for s in nodes]
        used, weights = predictor(known, sigmas[i + 1], quadrature, 3, kappa)
        assert sum(map(abs, weights)) <= kappa * abs(h) * (1 + 1e-12)
        assert sum(weights) == pytest.approx(h)
        for more in range(len(used) + 1, len(nodes) + 1):
            refused = quadrature(nodes[-more:], sigmas[i], sigmas[i + 1])
            assert sum(map(abs, refused)) > kappa * abs(h)


def test_automatic_order_and_limit_follow_the_number_of_steps():
    flow = flows.gaussian_flow()
    for steps, chosen in ((23, {"order": 2, "kappa": 2.6}), (24, {"order": 3, "kappa": 4.0})):
        # A repeated sigma is no step.
        sigmas = torch.linspace(1, 0.02, steps + 1).double()
        sigmas = torch.cat([sigmas[:1], sigmas])
        out = run(flow.model, flow.noise, sigmas)
        assert torch.equal(out, run(flow.model, flow.noise, sigmas, **chosen))
        other = {"order": 5 - chosen["order"], "kappa": 9.0}
        assert not torch.equal(out, run(flow.model, flow.noise, sigmas, **other))


def test_slope_ratio_and_limiter():
    s = (0.9, 0.7, 0.6)
    rows = [(0.9, 0.7, 0.6), (1.0, 3.0, 3.5), (0.0, 1.0, 0.5), (2.0, 2.0, 2.0)]
    known = [(s[i], torch.tensor([[r[i], 2 * r[i]] for r in rows]).double()) for i in range(3)]
    ratio = slope_ratio(known)
    assert ratio.tolist() == pytest.approx([1.0, 0.5, -1.0, 0.0])
    shares = van_leer(torch.tensor([1.0, 0.5, -1.0, 0.0, 3.0]))
    assert shares.tolist() == pytest.approx([1.0, 2 / 3, 0.0, 0.0, 1.0])


def test_a_flow_stiffer_than_the_steps_does_no_harm():
    """Where velocities swing to and fro, plain Adams formulas blow up."""

    def model(x, sigma):
        s = sigma[:, None]
        velocity = 20 * (x - torch.cos(s)) - torch.sin(s)
        return x - s * velocity

    x = torch.full((1, 1), 1.5, dtype=torch.float64)
    sigmas = torch.linspace(1, 0.1, 14).double()

    def error(sampler, **options):
        return abs(float(sampler(model, x, sigmas, disable=True, **options)) - math.cos(0.1))

    assert error(sample_flow_pec) < 0.01
    assert error(sample_sa_solver, eta=0.0) > 1000


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(
    ("nodes", "start", "end"),
    [
        ([1.0], 1.0, 0.9),
        ([1.0, 0.9], 0.9, 0.7),
        ([0.9, 0.7, 0.5], 0.5, 0.3),
        ([0.5, 0.3], 0.5, 0.3),
    ],
)
def test_stochastic_weights_are_the_integrals_of_the_exact_step(nodes, start, end, rate):
    weights = stochastic_adams(nodes, start, end, rate)
    scale = (end / (1 - end)) ** (1 + rate) * (1 - end) * (1 + rate)

    def kernel(s):
        return scale * (1 - s) ** rate / s ** (2 + rate)

    for power in range(len(nodes)):
        expected, _ = quad(lambda s, k=power: kernel(s) * s**k, end, start, epsabs=1e-12)
        found = sum(w * s**power for w, s in zip(weights, nodes, strict=True))
        assert found == pytest.approx(expected, abs=1e-9)


def test_little_noise_comes_near_the_ordinary_flow():
    """Below sigma 1, where any noise at all would replace x, being infinitely far away."""
    mean, variance = torch.zeros(4).double(), torch.full((4,), 0.5).double()
    x = flows.start(4)
    exact = flows.normal_solution(mean, variance, x, 0.9, 0.2)

    def error(n):
        out = run(flows.normal(mean, variance), x, torch.linspace(0.9, 0.2, n + 1), eta=1e-8)
        return float((out - exact).norm())

    assert slope(error, (32, 64)) > 2.7


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("name", PICTURES)
def test_noisy_samples_keep_the_energy_of_pictures(name, eta):
    pictures = PICTURES[name]
    variance = (pictures.weights[:, None] * (pictures.variances + pictures.means**2)).sum(0)
    noise = flows.start(len(variance), batch=1024, seed=5)
    out = run(pictures, noise, get_sigmas("beta", 26), eta=eta, extra_args={"seed": 3})
    assert float((out.square().mean(0) / variance).mean()) == pytest.approx(1, abs=0.05)


def test_without_eta_no_noise_is_drawn():
    flow, sigmas = flows.gaussian_flow(), get_sigmas("beta", 8)

    def refuse(sigma, following):
        raise AssertionError

    out = run(flow.model, flow.noise, sigmas, noise_sampler=refuse, extra_args={"seed": 1})
    assert torch.equal(out, run(flow.model, flow.noise, sigmas, s_noise=0.3))


def test_noise_comes_from_the_seed_or_the_given_source():
    flow, sigmas, asked = flows.gaussian_flow(), get_sigmas("beta", 6), []

    def source(sigma, following):
        asked.append((sigma, following))
        return torch.zeros_like(flow.noise)

    def noisy(**options):
        return run(flow.model, flow.noise, sigmas, eta=0.7, **options)

    seven, again = noisy(extra_args={"seed": 7}), noisy(extra_args={"seed": 7})
    assert torch.equal(seven, again) and not torch.equal(seven, noisy(extra_args={"seed": 8}))
    # A step to 0 has no noise.
    silent, steps = noisy(noise_sampler=source), sigmas.double().tolist()
    assert asked == list(pairwise(steps[:-1]))
    assert torch.equal(silent, noisy(s_noise=0.0, extra_args={"seed": 7}))


@pytest.mark.parametrize("eta", [0.0, 0.8])
@pytest.mark.parametrize("shape", [(2, 5), (3, 16, 4, 4), (1, 2, 3, 4, 5)])
def test_contract(shape, eta):
    x, sigmas = torch.randn(shape), torch.tensor([1.0, 0.7, 0.4, 0.1, 0.0])
    keep, calls, reports = x.clone(), [], []

    def model(x, sigma, seed):
        assert sigma.shape == (len(x),) and seed == 7
        calls.append(float(sigma[0]))
        return x * 0.3 * (1 - sigma.view(-1, *[1] * (x.ndim - 1)))

    options = {"extra_args": {"seed": 7}, "disable": True, "eta": eta}
    out = sample_flow_pec(model, x, sigmas, callback=reports.append, **options)
    assert out.shape == x.shape and out.dtype == x.dtype and torch.equal(x, keep)
    assert torch.equal(sigmas, torch.tensor([1.0, 0.7, 0.4, 0.1, 0.0]))
    assert calls == pytest.approx([1.0, 0.7, 0.4, 0.1])
    assert [r["i"] for r in reports] == [0, 1, 2, 3]
    assert [r["sigma"] for r in reports] == calls
    assert all(r["denoised"].shape == r["x"].shape == x.shape for r in reports)
    if not eta:
        alone = sample_flow_pec(model, x[:1], sigmas, extra_args={"seed": 7}, disable=True)
        torch.testing.assert_close(out[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype, eta):
    x = torch.randn(2, 3).to(dtype)
    sigmas = torch.tensor([1.0, 0.943, 0.503, 0.1, 0.0])
    out = sample_flow_pec(lambda x, s: x * 0.3, x, sigmas, disable=True, eta=eta)
    assert out.dtype == dtype and bool(out.isfinite().all())


@pytest.mark.parametrize("eta", [0.0, 0.8])
def test_a_repeated_sigma_changes_nothing_but_is_reported(eta):
    flow, reports = flows.gaussian_flow(), []
    options = {"eta": eta, "extra_args": {"seed": 1}}
    plain = run(flow.model, flow.noise, [1.0, 0.6, 0.4, 0.3, 0.0], **options)
    again = [1.0, 1.0, 0.6, 0.6, 0.4, 0.3, 0.0, 0.0]
    assert torch.equal(
        run(flow.model, flow.noise, again, callback=reports.append, **options), plain
    )
    assert [r["i"] for r in reports] == list(range(7))


@pytest.mark.parametrize("sigmas", [[1.0, 0.6, 0.3, 0.1, 0.0], [0.7, 0.5, 0.3, 0.2], [1.0, 0.0]])
def test_a_model_that_knows_the_picture_is_followed(sigmas):
    picture, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    x = (1 - sigmas[0]) * picture + sigmas[0] * noise
    out = sample_flow_pec(lambda x, s: picture, x, torch.tensor(sigmas), disable=True)
    expected = (1 - sigmas[-1]) * picture + sigmas[-1] * noise
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("eta", [0.0, 0.8])
def test_nothing_to_do(eta):
    x = torch.randn(1, 2)
    for sigmas in (torch.tensor([0.5]), torch.zeros(0)):
        out = sample_flow_pec(lambda x, s: x, x, sigmas, disable=True, eta=eta)
        assert torch.equal(out, x)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"order": 1}, "order 1 "), ({"order": 4}, "order 4 "), ({"kappa": -1.0}, "kappa -1.0 "),
        ({"kappa": 0.5}, "kappa 0.5 "), ({"kappa": math.nan}, "kappa nan "),
        ({"eta": -0.1}, "eta -0.1 "), ({"s_noise": math.inf}, "s_noise inf "),
    ],
)  # fmt: skip
def test_unusable_options(options, says):
    with pytest.raises(SamplingError, match=f"flow_pec: {says}") as caught:
        run(lambda x, s: x, torch.randn(1, 2), [1.0, 0.0], **options)
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)


def test_flash_is_flow_pec_with_one_evaluation_a_step():
    flow, sigmas = flows.nearly_straight_flow(), get_sigmas("beta", 8).double()
    out = sample_flash(flow.model, flow.noise, sigmas, disable=True)
    assert torch.equal(out, run(flow.model, flow.noise, sigmas))
    with pytest.raises(SamplingError, match="substeps 3 is not usable; expected 1 or 2"):
        sample_flash(flow.model, flow.noise, sigmas, disable=True, substeps=3)


def test_eight_evaluations_are_worth_more_in_one_step_each():
    flow = flows.nearly_straight_flow()

    def error(steps, substeps):
        sigmas = get_sigmas("beta", steps).double()
        return flow.error(
            sample_flash(flow.model, flow.noise, sigmas, disable=True, substeps=substeps)
        )

    assert error(8, 1) < error(4, 2) / 4


@pytest.mark.parametrize("make", [flows.gaussian_flow, flows.spectrum_flow, flows.straight_flow])
def test_numeric_solutions_agree_with_closed_forms(make):
    flow = make()
    assert flow.error(flows.integrate(flow.model, flow.noise)) < 1e-8
    middle = flows.integrate(flow.model, flow.noise, 1.0, 0.4)
    assert flow.error(flows.integrate(flow.model, middle, 0.4)) < 1e-8


def test_the_mixture_denoises_by_bayes_rule():
    pictures = flows.ring(3).some(2)
    x, s = 0.4, 0.5
    means, own = pictures.means[:, 0].tolist(), 0.2**2
    one_axis = flows.Mixture(pictures.weights, pictures.means[:, :1], pictures.variances[:, :1])

    def joint(y):
        prior = sum(0.5 * math.exp(-((y - m) ** 2) / (2 * own)) for m in means)
        return prior * math.exp(-((x - (1 - s) * y) ** 2) / (2 * s**2))

    total, moment = quad(joint, -4, 4)[0], quad(lambda y: y * joint(y), -4, 4)[0]
    found = one_axis(torch.full((1, 1), x, dtype=torch.float64), torch.tensor([s]))
    assert float(found) == pytest.approx(moment / total, abs=1e-9)


def test_a_straight_flow_takes_one_step():
    flow = flows.straight_flow()
    for steps in (1, 5):
        assert flow.error(run(flow.model, flow.noise, get_sigmas("beta", steps))) < 1e-6
