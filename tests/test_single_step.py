"""Single-step samplers, most of them with fresh noise, against analytic flows and ComfyUI."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.chroma.guidance import Denoiser
from chroma_nodes.chroma.text.encoder import TextEmbedding
from chroma_nodes.samplers.cfg_pp import sample_euler_ancestral_cfg_pp, sample_euler_cfg_pp
from chroma_nodes.samplers.dpmpp_2s_ancestral import sample_dpmpp_2s_ancestral
from chroma_nodes.samplers.dpmpp_sde import sample_dpmpp_sde
from chroma_nodes.samplers.euler import sample_euler
from chroma_nodes.samplers.euler_ancestral import sample_euler_ancestral
from chroma_nodes.samplers.noise import noise_source
from chroma_nodes.samplers.res_2s import sample_res_2s, sample_res_2s_ode, stage_weights
from chroma_nodes.samplers.steps import ancestral_step, between
from comfy_inprocess import import_comfyui
from oracles import SMALL, random_transformer
from scipy.integrate import quad, solve_ivp
from scipy.special import betaincinv
from test_samplers import SPREAD, gaussian, gaussian_solution, grid, two_modes

# Those that add noise, and their default eta.
NOISY = {
    "euler_ancestral": (sample_euler_ancestral, 1.0),
    "dpmpp_2s_ancestral": (sample_dpmpp_2s_ancestral, 1.0),
    "dpmpp_sde": (sample_dpmpp_sde, 1.0),
    "res_2s": (sample_res_2s, 0.5),
    "euler_ancestral_cfg_pp": (sample_euler_ancestral_cfg_pp, 1.0),
}
TWO_STAGE = ("dpmpp_2s_ancestral", "dpmpp_sde", "res_2s", "res_2s_ode")
ORDER = {
    **{name: (partial(sampler, eta=0.0), 1) for name, (sampler, _) in NOISY.items()},
    **{name: (partial(NOISY[name][0], eta=0.0), 2) for name in TWO_STAGE[:3]},
    "dpmpp_sde, r 1": (partial(sample_dpmpp_sde, eta=0.0, r=1.0), 2),
    "dpmpp_sde, r 0.3": (partial(sample_dpmpp_sde, eta=0.0, r=0.3), 2),
    "res_2s_ode": (sample_res_2s_ode, 2),
    "res_2s_ode, c2 1": (partial(sample_res_2s_ode, c2=1.0), 2),
    "res_2s_ode, c2 0.3": (partial(sample_res_2s_ode, c2=0.3), 2),
    "euler_cfg_pp": (sample_euler_cfg_pp, 1),
}
ALL = {
    **{name: sampler for name, (sampler, _) in NOISY.items()},
    "res_2s_ode": sample_res_2s_ode,
    "euler_cfg_pp": sample_euler_cfg_pp,
}


def run(sampler, model, x, sigmas, extra_args=None, **kw):
    """The sampler on a model whose negative prompt, where asked for, predicts the same."""

    def heard(x, sigma, uncond_callback=None, **extra):
        denoised = model(x, sigma, **extra)
        if uncond_callback is not None:
            uncond_callback(denoised)
        return denoised

    if isinstance(sigmas, list):
        sigmas = torch.tensor(sigmas, dtype=torch.float64)
    return sampler(heard, x, sigmas, extra_args=extra_args, disable=True, **kw)


def points():
    return torch.linspace(-2, 2, 12, dtype=torch.float64).view(2, 6)


def many(rows=16384):
    return torch.randn(2, rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def beta(steps):
    quantiles = betaincinv(0.6, 0.6, 1 - np.arange(steps) / steps)
    return torch.tensor(np.append(quantiles, 0.0))


def uniform(steps):
    return grid(steps, end=0.0)


def half_log_snr(sigma):
    return math.log((1 - sigma) / sigma)


def fixed_noise(seed=11):
    generator = torch.Generator().manual_seed(seed)
    return lambda s, t: torch.randn(2, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize("start", [1.0, 0.8])
def test_order_of_convergence(name, start):
    """From sigma 1, where lambda is -inf, and below."""
    sampler, order = ORDER[name]
    x = points()
    exact = gaussian_solution(x, start, 0.1)
    coarse, fine = (
        float((run(sampler, gaussian, x, grid(n, start)) - exact).abs().max()) for n in (128, 256)
    )
    assert order - 0.3 < math.log2(coarse / fine) < order + 0.4


@pytest.mark.parametrize("name", ORDER)
def test_converges_on_a_mixture_as_scipy_does(name):
    starts = np.array([-1.7, -0.4, 0.3, 1.1])

    def field(s, x):
        out = two_modes(torch.tensor(x)[None], torch.tensor([s], dtype=torch.float64))
        return ((torch.tensor(x) - out[0]) / s).numpy()

    truth = solve_ivp(field, (1.0, 0.05), starts, rtol=1e-9, atol=1e-10).y[:, -1]
    sampler, order = ORDER[name]
    ours = run(sampler, two_modes, torch.tensor(starts)[None], grid(300, end=0.05))[0]
    np.testing.assert_allclose(ours.numpy(), truth, atol=2e-2 if order == 1 else 2e-3)


@pytest.mark.parametrize("name", TWO_STAGE)
def test_two_stages_beat_two_steps_of_euler(name):
    x = points()
    exact = gaussian_solution(x, 1.0, 0.1)
    sampler = partial(ALL[name], eta=0.0) if name in NOISY else ALL[name]
    error = float((run(sampler, gaussian, x, grid(8)) - exact).abs().max())
    assert error < 0.5 * float((run(sample_euler, gaussian, x, grid(16)) - exact).abs().max())


@pytest.mark.parametrize("name", ["euler_ancestral", "euler_ancestral_cfg_pp"])
def test_without_eta_the_first_order_samplers_are_eulers_method(name):
    sampler = partial(ALL[name], eta=0.0)
    for sigmas in (beta(9), grid(7, 0.7, 0.2)):
        expected = run(sample_euler, two_modes, points(), sigmas)
        found = run(sampler, two_modes, points(), sigmas)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("name", ["dpmpp_2s_ancestral", "dpmpp_sde"])
def test_agrees_with_diffusers(name):
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
    found = run(partial(ALL[name], eta=0.0), two_modes, points(), sigmas)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


class ComfyModel:
    """What ComfyUI's samplers take for a model; cond and uncond are functions of (x, sigma)."""

    def __init__(self, cond=two_modes, uncond=two_modes, scale=1.0, negative=True):
        import comfy.model_sampling

        class Sampling(comfy.model_sampling.CONST):
            noise_scale = 1.0

            def percent_to_sigma(self, percent):
                return 1 - percent

        class Patcher:
            get_model_object = staticmethod(lambda name: Sampling())

        self.inner_model = type("Inner", (), {"model_patcher": Patcher})
        self.functions, self.scale, self.negative = (cond, uncond), scale, negative

    def __call__(self, x, sigma, model_options=None, seed=None):
        from comfy.samplers import cfg_function

        cond, uncond = (function(x, sigma) for function in self.functions)
        return cfg_function(
            self, cond, uncond if self.negative else torch.zeros_like(x), self.scale, x, sigma,
            model_options=model_options or {}, cond=[{}], uncond=[{}] if self.negative else None,
        )  # fmt: skip


def comfyui(name, model, sigmas, **options):
    import comfy.k_diffusion.sampling as theirs

    options.setdefault("extra_args", {})
    return getattr(theirs, f"sample_{name}")(model, points(), sigmas, disable=True, **options)


@pytest.mark.parametrize("eta", [0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "first"),
    [("euler_ancestral", 1.0), ("euler_ancestral", 0.97), ("dpmpp_2s_ancestral", 0.97)],
)
def test_ancestral_samplers_agree_with_comfyui_at_the_same_seed(name, first, eta):
    """From sigma 1, ComfyUI's dpmpp_2s takes 0.9999 for the middle of any step."""
    import_comfyui()
    from comfy.k_diffusion.sampling import default_noise_sampler

    generator = torch.Generator().manual_seed(5)
    adds_one = torch.equal(
        default_noise_sampler(points(), seed=4)(1.0, 0.5),
        torch.randn(2, 6, generator=generator, dtype=torch.float64),
    )
    theirs = {"seed": 4 if adds_one else 5}  # Older ones add the noise they started from.
    for sigmas in (first * beta(12), first * grid(6)):
        expected = comfyui(f"{name}_RF", ComfyModel(), sigmas, eta=eta, extra_args=theirs)
        found = run(ALL[name], two_modes, points(), sigmas, extra_args={"seed": 4}, eta=eta)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("r", [0.5, 0.7])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_dpmpp_sde_agrees_with_seeds_2_below_sigma_1(eta, r):
    """ComfyUI starts at sigma 0.9999 instead of 1."""
    import_comfyui()
    for sigmas in (0.97 * beta(12), 0.97 * grid(6)):
        kw = {"eta": eta, "r": r}
        expected = comfyui("seeds_2", ComfyModel(), sigmas, noise_sampler=fixed_noise(), **kw)
        sampler = partial(sample_dpmpp_sde, noise_sampler=fixed_noise(), **kw)
        found = run(sampler, two_modes, points(), sigmas)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpmpp_sde_agrees_with_comfyuis_own_on_the_same_path_of_noise(eta):
    """For eta between 0 and 1 they differ: theirs scales the noise, ours its rate."""
    import_comfyui()
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
    expected = comfyui("dpmpp_sde", ComfyModel(), sigmas, noise_sampler=theirs, eta=eta)
    sampler = partial(sample_dpmpp_sde, noise_sampler=fixed_noise(), eta=eta)
    found = run(sampler, two_modes, points(), sigmas)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [0.6, 1.0, 2.0])
@pytest.mark.parametrize(
    ("first", "eta"), [(1.0, 0.0), (1.0, 1.0), (0.97, 0.0), (0.97, 0.5), (0.97, 1.0)]
)
def test_cfg_pp_agrees_with_comfyui(first, scale, eta):
    """From sigma 1 with eta between 0 and 1, ComfyUI takes it for 1: infinity over infinity."""
    import_comfyui()
    model = ComfyModel(two_modes, gaussian, scale)
    sampler, name = sample_euler_ancestral_cfg_pp, "euler_ancestral_cfg_pp"
    kw = {"eta": eta}
    for sigmas in (first * beta(12), first * grid(6)):
        expected = comfyui(name, model, sigmas, noise_sampler=fixed_noise(), **kw)
        extra = {"model_options": {}, "seed": 1}
        found = sampler(
            model, points(), sigmas, extra_args=extra, disable=True, noise_sampler=fixed_noise(),
            **kw,
        )  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert extra == {"model_options": {}, "seed": 1}


def test_euler_cfg_pp_hears_uncond_in_comfyui_after_other_functions():
    import_comfyui()
    seen = []

    def post(args):
        seen.append(args["uncond_denoised"])
        return args["denoised"] + 0.1

    options = {"sampler_post_cfg_function": [post]}
    model = ComfyModel(two_modes, gaussian, 0.8)
    ours, theirs = (
        sampler(model, points(), beta(5), extra_args={"model_options": options}, disable=True)
        for sampler in (sample_euler_cfg_pp, partial(comfyui_on, "euler_cfg_pp"))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert options == {"sampler_post_cfg_function": [post]} and len(seen) == 10


def comfyui_on(name, model, x, sigmas, **options):
    import comfy.k_diffusion.sampling as theirs

    return getattr(theirs, f"sample_{name}")(model, x, sigmas, **options)


@pytest.mark.parametrize("sampler", [sample_euler_cfg_pp, sample_euler_ancestral_cfg_pp])
def test_cfg_pp_without_a_negative_prompt_is_one_line(sampler):
    def silent(x, sigma, **_):
        return two_modes(x, sigma)

    def comfyuis(x, sigma, model_options, **_):
        """With no negative prompt, ComfyUI's prediction for it is zeros."""
        assert model_options["disable_cfg1_optimization"]
        for function in model_options["sampler_post_cfg_function"]:
            x = function({"denoised": x, "uncond": None, "uncond_denoised": torch.zeros_like(x)})
        return x

    for model, extra in ((silent, {}), (comfyuis, {"model_options": {}})):
        with pytest.raises(SamplingError, match="need a negative prompt") as error:
            sampler(model, points(), grid(3), extra_args=extra, disable=True)
        assert "\n" not in str(error.value)


def test_cfg_pp_mixes_guided_picture_and_negative_noise():
    guided, negative, t = 0.9, -0.4, 0.3

    def model(x, sigma, uncond_callback, **_):
        uncond_callback(torch.full_like(x, negative))
        return torch.full_like(x, guided)

    x = points()
    for s in (1.0, 0.6):
        sigmas = torch.tensor([s, t], dtype=torch.float64)
        found = sample_euler_cfg_pp(model, x, sigmas, disable=True)
        noise = (x - (1 - s) * negative) / s
        torch.testing.assert_close(found, (1 - t) * guided + t * noise, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_cfg_pp_hears_uncond_from_the_denoiser():
    transformer = random_transformer()
    cond, uncond = (
        TextEmbedding(
            torch.randn(1, 4, SMALL.context_dim, generator=torch.Generator().manual_seed(n)),
            torch.tensor([4]),
        )
        for n in (1, 2)
    )
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    both = Denoiser(transformer, cond, uncond, 0.7)
    found = sample_euler_cfg_pp(both, x, torch.tensor([0.9, 0.5]), disable=True)
    sigma = torch.tensor([0.9])
    d, negative = (
        Denoiser(transformer, text, uncond, 1.0)(x, sigma) for text in (cond, uncond)
    )  # fmt: skip
    d = negative + 0.7 * (d - negative)
    expected = 0.5 * d + 0.5 * (x - 0.1 * negative) / 0.9
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(SamplingError, match="negative prompt"):
        alone = Denoiser(transformer, cond, None, 1.0)
        sample_euler_cfg_pp(alone, x, torch.tensor([0.9, 0.5]), disable=True)


def energy(sampler, flow, sigmas, **kw):
    """The mean square of the samples over that of the pictures."""
    model = {"gaussian": gaussian, "two_modes": two_modes}[flow]
    truth = SPREAD**2 + {"gaussian": 0.25, "two_modes": 1.0}[flow]
    out = run(sampler, lambda x, s, **_: model(x, s), many(), sigmas, extra_args={"seed": 5}, **kw)
    return float(out.square().mean()) / truth


@pytest.mark.parametrize("flow", ["gaussian", "two_modes"])
@pytest.mark.parametrize("schedule", [uniform, beta])
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("name", ["dpmpp_2s_ancestral", "dpmpp_sde", "res_2s"])
def test_samples_have_the_energy_of_the_pictures(name, eta, schedule, flow):
    assert energy(ALL[name], flow, schedule(26), eta=eta) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("flow", ["gaussian", "two_modes"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["euler_ancestral", "euler_ancestral_cfg_pp"])
def test_missing_energy_of_first_order_samplers_halves_with_the_step(name, eta, flow):
    """They lack 4 to 10 percent at 26 steps, as Euler's method does."""
    lack = [1 - energy(ALL[name], flow, beta(n), eta=eta) for n in (26, 104)]
    assert 0.03 < lack[0] < 0.11
    assert -0.01 < lack[1] < 0.35 * lack[0]


@pytest.mark.parametrize("name", NOISY)
def test_more_steps_bring_the_mean_and_deviation_to_the_truth(name):
    x, kw = many(), {"extra_args": {"seed": 5}, "eta": 1.0}
    out = run(ALL[name], lambda x, s, **_: gaussian(x, s), x, beta(120), **kw)
    assert float(out.mean()) == pytest.approx(0.5, abs=0.01)
    loose = name.startswith("euler")
    assert float(out.std()) == pytest.approx(SPREAD, rel=0.04 if loose else 0.015)


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("s_noise", [1.0, 0.5])
@pytest.mark.parametrize("sigma", [1.0, 0.6])
def test_a_step_mixes_picture_and_noise_as_rectified_flow_does(name, sigma, s_noise):
    """A step to t gives (1 - t) picture and t noise: what is left of the old, and the fresh."""
    picture, t, following = 0.8, 0.4, torch.tensor(0.8).double().view(1, 1)

    def state(old, *new):
        draws = iter((*new, 0.0, 0.0))
        x = ((1 - sigma) * following + sigma * old).double()
        return float(
            run(
                ALL[name], lambda x, s: following, x, [sigma, t], eta=1.0, s_noise=s_noise,
                noise_sampler=lambda s, t: torch.full_like(x, next(draws)),
            )
        )  # fmt: skip

    still = state(0.0)
    assert still == pytest.approx((1 - t) * picture)
    old, *fresh = state(1.0) - still, state(0.0, 1.0) - still, state(0.0, 0.0, 1.0) - still
    assert (old / t) ** 2 + sum((f / s_noise / t) ** 2 for f in fresh) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", NOISY)
def test_noise_comes_from_the_seed_or_the_noise_sampler(name):
    sampler, default = NOISY[name]
    x, sigmas = points(), [1.0, 0.7, 0.7, 0.4, 0.0]

    def out(**kw):
        return run(sampler, lambda x, s, seed=0: two_modes(x, s), x, sigmas, **kw)

    first = out(extra_args={"seed": 1})
    assert torch.equal(first, out(extra_args={"seed": 1}))
    assert torch.equal(first, out(extra_args={"seed": 1}, eta=default))
    assert not torch.equal(first, out(extra_args={"seed": 2}))
    assert not torch.equal(out(), out())
    assert bool(out(extra_args={"seed": 2**64 - 1}).isfinite().all())
    calls = []

    def record(sigma, following):
        calls.extend((float(sigma), float(following)))
        return torch.ones_like(x)

    out(noise_sampler=record)
    expected = [1.0, 0.7, 0.7, 0.4]
    if name == "dpmpp_sde":  # Two parts a step.
        expected = [1.0, 0.7**0.5, 0.7**0.5, 0.7, 0.7, *[between(0.7, 0.4, 0.5)] * 2, 0.4]
    assert calls == pytest.approx(expected)
    still = out(noise_sampler=lambda s, t: torch.full_like(x, 1e6), s_noise=0.0)
    assert float(still.abs().max()) < 10
    quiet = out(extra_args={"seed": 1}, eta=0.0)
    assert torch.equal(quiet, out(extra_args={"seed": 2}, eta=0.0, s_noise=3.0))


def test_every_draw_and_row_has_its_own_noise():
    x = torch.zeros(3, 2000)
    draw = noise_source(x, {"seed": 9}, None)
    started = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    rows = torch.cat([started, draw(1.0, 0.8), draw(0.8, 0.6)])
    together = torch.corrcoef(rows) - torch.eye(len(rows))
    assert float(together.abs().max()) < 0.1
    assert float(rows.std()) == pytest.approx(1, abs=0.02)
    again = noise_source(x, {"seed": 9}, None)(0.3, 0.2)
    assert torch.equal(again, rows[3:6])


@pytest.mark.parametrize("name", NOISY)
def test_rows_that_start_alike_part(name):
    x = points()[:1].expand(2, -1)
    out = run(ALL[name], lambda x, s, seed: two_modes(x, s), x, uniform(4), {"seed": 9})
    assert float((out[0] - out[1]).abs().min()) > 1e-6


@pytest.mark.parametrize("eta", [1.5, 4.0])
@pytest.mark.parametrize("name", NOISY)
def test_large_eta_stays_finite(name, eta):
    out = run(ALL[name], gaussian, points(), [1.0, 0.9, 0.5, 0.1, 0.01, 0.0], eta=eta)
    assert bool(out.isfinite().all()) and float(out.abs().max()) < 20


@pytest.mark.parametrize("name", ALL)
def test_a_model_that_knows_the_picture_is_followed_exactly(name):
    picture, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    out = run(ALL[name], lambda x, s: picture, noise, [1.0, 0.6, 0.5, 0.1, 0.0])
    assert torch.equal(out, picture)
    sampler = partial(ALL[name], eta=0.0) if name in NOISY else ALL[name]
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


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("option", ["eta", "s_noise"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_unusable_noise_options(name, option, value):
    with pytest.raises(SamplingError, match=f"{name}: {option} {value}") as error:
        run(ALL[name], gaussian, points(), [1.0, 0.5, 0.0], **{option: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sampler", "option"),
    [(sample_dpmpp_sde, "r"), (sample_res_2s, "c2"), (sample_res_2s_ode, "c2")],
)
@pytest.mark.parametrize("value", [0.0, -0.5, 1.1, math.nan])
def test_unusable_stages(sampler, option, value):
    with pytest.raises(SamplingError, match=f"{option} {value} is not usable") as error:
        run(sampler, gaussian, points(), [1.0, 0.5, 0.0], **{option: value})
    assert "\n" not in str(error.value)
