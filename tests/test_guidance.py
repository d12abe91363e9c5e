"""Guidance, inpainting and the sampling run around the transformer."""

import pytest
import torch
from chroma_nodes.chroma.errors import ImageError, SamplingError
from chroma_nodes.chroma.guidance import Denoiser, Guidance, InpaintDenoiser
from chroma_nodes.chroma.noise import make_noise
from chroma_nodes.chroma.pipeline import latent_size
from chroma_nodes.chroma.sampling import fit_mask, sample_latent
from chroma_nodes.chroma.text.encoder import TextEmbedding
from chroma_nodes.samplers import SAMPLERS
from oracles import SMALL, diffusers_transformer, diffusers_velocity, random_transformer


@pytest.fixture(scope="module")
def model():
    return random_transformer()


def text(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, SMALL.context_dim, generator=g) for n in lengths]
    hidden = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return TextEmbedding(hidden, torch.tensor(lengths))


def state(batch, sigma=0.6, seed=3):
    x = torch.randn(batch, 16, 6, 8, generator=torch.Generator().manual_seed(seed))
    return x, torch.full((batch,), sigma)


def count_forwards(model):
    sizes = []
    handle = model.img_in.register_forward_hook(lambda _, args, out: sizes.append(len(args[0])))
    return sizes, handle


@pytest.mark.parametrize(("positive", "negative"), [(5, 5), (7, 2)])
@torch.no_grad()
def test_cfg_equals_two_runs_of_diffusers(model, positive, negative):
    x, sigma = state(2)
    cond, uncond = text([positive], 1), text([negative], 2)
    theirs = diffusers_transformer(model)
    v = [
        diffusers_velocity(theirs, x, sigma, t.hidden.expand(2, -1, -1), t.lengths.expand(2))
        for t in (cond, uncond)
    ]
    expected = x - 0.6 * (v[1] + 3.5 * (v[0] - v[1]))
    sizes, handle = count_forwards(model)
    ours = Denoiser(model, cond, uncond, 3.5)(x, sigma)
    handle.remove()
    assert (ours - expected).abs().max() <= 5e-4
    assert sizes == ([4] if positive == negative else [2, 2])


@torch.no_grad()
def test_cfg_one_runs_no_uncond_and_ignores_it(model):
    x, sigma = state(1)
    sizes, handle = count_forwards(model)
    alone = Denoiser(model, text([4]), None, 1.0)(x, sigma)
    with_negative = Denoiser(model, text([4]), text([4], 9), 1.0)(x, sigma)
    handle.remove()
    assert sizes == [1, 1]
    assert torch.equal(alone, with_negative)


@torch.no_grad()
def test_the_negative_prompt_is_real(model):
    x, sigma = state(1)
    a, b = (Denoiser(model, text([4]), text([4], seed), 4.0)(x, sigma) for seed in (7, 8))
    assert (a - b).abs().max() > 0.1


NEUTRAL = Guidance(3.5, "constant", 7.0, 1.0, 0.0, 0.0, False, 0, 1.0, 0.0, 0.0)
SIGMAS = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def run_euler(denoiser, batch=2, sigmas=SIGMAS):
    return SAMPLERS["euler"](denoiser, state(batch)[0], sigmas, disable=True)


@torch.no_grad()
@pytest.mark.parametrize("negative", (4, 6))
def test_neutral_guidance_is_plain_guidance_bit_for_bit(model, negative):
    cond, uncond = text([4]), text([negative], 9)
    plain, neutral = (run_euler(Denoiser(model, cond, uncond, cfg)) for cfg in (3.5, NEUTRAL))
    assert torch.equal(plain, neutral)


@torch.no_grad()
@pytest.mark.parametrize("negative", (4, 6))
def test_outside_of_the_interval_the_negative_prompt_is_not_run(model, negative):
    cond, uncond = text([4]), text([negative], 9)
    plan = Guidance(3.5, interval_start=0.8, interval_end=0.6)
    sizes, handle = count_forwards(model)
    denoiser = Denoiser(model, cond, uncond, plan)
    result = run_euler(denoiser)
    handle.remove()
    assert sum(sizes) == 2 * (1 + 2 + 2 + 1 + 1) and denoiser.passes == 7
    x = state(2)[0]
    for part, cfg in ((SIGMAS[:2], 1.0), (SIGMAS[1:4], 3.5), (SIGMAS[3:], 1.0)):
        x = SAMPLERS["euler"](Denoiser(model, cond, uncond, cfg), x, part, disable=True)
    torch.testing.assert_close(result, x, rtol=0, atol=1e-4 * float(x.abs().max()))


@torch.no_grad()
def test_the_scale_follows_the_curve(model):
    cond, uncond = text([4]), text([4], 9)
    plan = Guidance(5.0, "linear", 1.0)
    for sigma, cfg in ((0.75, 4.0), (0.25, 2.0)):
        x, level = state(1, sigma)
        curved, plain = (Denoiser(model, cond, uncond, c)(x, level) for c in (plan, cfg))
        assert torch.equal(curved, plain)


@torch.no_grad()
def test_zero_init_leaves_the_noise_and_runs_no_model(model):
    sizes, handle = count_forwards(model)
    denoiser = Denoiser(model, text([4]), text([4], 9), Guidance(3.5, zero_init=2))
    x = run_euler(denoiser, sigmas=SIGMAS[:3])
    handle.remove()
    assert torch.equal(x, state(2)[0]) and sizes == [] and denoiser.passes == 0
    assert denoiser.run.calls == 2


@torch.no_grad()
def test_momentum_remembers_one_run_only(model):
    cond, uncond, plan = text([4]), text([4], 9), Guidance(3.5, apg_momentum=-0.5)
    one = Denoiser(model, cond, uncond, plan)
    first, second = one(*state(1)), one(*state(1))
    again = Denoiser(model, cond, uncond, plan)(*state(1))
    assert torch.equal(first, again)
    assert (first - second).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("cfg", (1.0, 3.5, Guidance(3.5, interval_end=0.9)))
def test_who_asks_for_the_uncond_prediction_gets_it(model, cfg):
    cond, uncond, seen = text([4]), text([4], 9), []
    denoiser = Denoiser(model, cond, uncond, cfg)
    result = denoiser(*state(2), uncond_callback=seen.append)
    close = {"rtol": 0, "atol": 1e-4 * float(result.abs().max())}
    expected = Denoiser(model, uncond, None, 1.0)(*state(2))
    torch.testing.assert_close(seen[0], expected, **close)
    torch.testing.assert_close(result, Denoiser(model, cond, uncond, cfg)(*state(2)), **close)
    assert len(seen) == 1 and denoiser.passes == 2


@torch.no_grad()
def test_the_uncond_prediction_is_raw_still_at_zero_init_and_never_missing(model):
    x, seen = state(1)[0], []
    plan = Guidance(3.5, zero_init=1, zero_star=True, apg_eta=0.0)
    denoiser = Denoiser(model, text([4]), text([4], 9), plan)
    for sigma in (1.0, 0.6):
        denoiser(x, torch.tensor([sigma]), uncond_callback=seen.append)
    assert torch.equal(seen[0], x)
    raw = Denoiser(model, text([4], 9))(*state(1))
    torch.testing.assert_close(seen[1], raw, rtol=0, atol=1e-4 * float(raw.abs().max()))
    with pytest.raises(SamplingError, match="this sampler needs a negative prompt"):
        Denoiser(model, text([4]))(*state(1), uncond_callback=seen.append)


def test_inpainting_keeps_the_uncond_prediction_too():
    latent, noise, seen = torch.randn(1, 16, 8, 8), torch.randn(1, 16, 8, 8), []
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1

    def model(x, sigma, uncond_callback, **_):
        uncond_callback(torch.full_like(x, 3.0))
        return torch.full_like(x, 7.0)

    inpaint = InpaintDenoiser(model, mask, latent, noise)
    inpaint(latent, torch.tensor([0.5]), uncond_callback=seen.append)
    assert torch.equal(seen[0], torch.where(mask.bool(), 3.0, latent))


@torch.no_grad()
def test_one_modulation_per_step_for_cond_uncond_and_batch(model):
    rows = []
    handle = model.distilled_guidance_layer.register_forward_hook(
        lambda _, args, out: rows.append(len(out))
    )
    for lengths in ([3], [5]):
        Denoiser(model, text([5]), text(lengths), 4.0)(*state(3))
    handle.remove()
    assert rows == [1, 1]


@torch.no_grad()
def test_a_batch_of_four_prompts_equals_four_runs(model):
    lengths = [2, 9, 5, 9]
    cond, x, sigmas = text(lengths), state(4)[0], torch.linspace(1, 0, 5)

    def run(cond, x):
        model_fn = Denoiser(model, cond, text([3], 5), 2.0)
        return SAMPLERS["euler"](model_fn, x, sigmas, disable=True)

    together = run(cond, x)
    for i, n in enumerate(lengths):
        one = TextEmbedding(cond.hidden[i : i + 1, :n], cond.lengths[i : i + 1])
        alone = run(one, x[i : i + 1])
        assert (together[i : i + 1] - alone).abs().max() <= 1e-4 * alone.abs().max()


@pytest.mark.parametrize(
    ("cfg", "uncond", "says"),
    [(float("nan"), True, "cfg nan"), (-1.0, True, r"cfg -1\.0"), (4.0, False, "negative prompt")],
)
def test_unusable_guidance(model, cfg, uncond, says):
    with pytest.raises(SamplingError, match=says):
        Denoiser(model, text([4]), text([4]) if uncond else None, cfg)


def test_a_curve_from_one_needs_a_negative_prompt(model):
    with pytest.raises(SamplingError, match="needs a negative prompt"):
        Denoiser(model, text([4]), None, Guidance(1.0, "linear", 3.0))


@torch.no_grad()
def test_prompts_must_fit_the_batch(model):
    x, sigma = state(3)
    with pytest.raises(SamplingError, match="2 prompts do not fit a batch of 3"):
        Denoiser(model, text([4, 4]), None, 1.0)(x, sigma)


@torch.no_grad()
def test_a_broken_model_is_reported_at_its_step():
    model = random_transformer()
    model.final_layer.linear.bias[0] = float("nan")
    with pytest.raises(SamplingError, match=r"NaN or infinity at sigma 0\.6000"):
        Denoiser(model, text([4]), None, 1.0)(*state(1))


def test_noise_is_torchs_own_for_the_seed():
    expected = torch.randn(2, 16, 3, 5, generator=torch.manual_seed(2**63 + 5))
    assert torch.equal(make_noise((2, 16, 3, 5), 2**63 + 5), expected)
    for seed in (-1, 2**64):
        with pytest.raises(SamplingError, match=f"seed {seed}"):
            make_noise((1,), seed)


def test_inpainting_keeps_the_rest_exactly():
    latent, noise = torch.randn(1, 16, 8, 8), torch.randn(1, 16, 8, 8)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    seen = []

    def model(x, sigma, **_):
        seen.append((x.clone(), float(sigma[0])))
        return torch.full_like(x, 7.0)

    sigmas = torch.tensor([1.0, 0.5, 0.2, 0.0])
    out = sample_latent(
        model, SAMPLERS["heun"], sigmas, noise, latent, mask=mask, disable_progress=True
    )
    torch.testing.assert_close(out[..., :4], latent[..., :4])
    assert torch.equal(out[..., 4:], torch.full((1, 16, 8, 4), 7.0))
    for x, sigma in seen:
        expected = (1 - sigma) * latent + sigma * noise
        torch.testing.assert_close(x[..., :4], expected[..., :4])
    soft = InpaintDenoiser(model, torch.full((1, 1, 8, 8), 0.25), latent, noise)
    torch.testing.assert_close(
        soft(latent, torch.tensor([0.5])), 0.75 * latent + 0.25 * 7.0, rtol=1e-5, atol=1e-5
    )
    assert fit_mask(mask, latent).shape == (1, 1, 8, 8)


def test_partial_runs_join_up():
    """Stopping at a sigma and going on without noise equals one run, as in ComfyUI."""
    latent, noise = torch.zeros(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    sigmas = torch.linspace(1, 0, 7)

    def model(x, sigma, **_):
        return 0.3 * x

    def run(sigmas, noise, latent):
        return sample_latent(model, SAMPLERS["euler"], sigmas, noise, latent, disable_progress=True)

    whole = run(sigmas, noise, latent)
    half = run(sigmas[:4], noise, latent)
    joined = run(sigmas[3:], torch.zeros_like(noise), half)
    torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(run(sigmas[:1], noise, latent), latent)


@pytest.mark.parametrize("side", [0, 8, 100, 1000, 16400, -16])
def test_sizes_that_do_not_fit(side):
    with pytest.raises(ImageError, match=f"width {side} is not usable; expected a multiple of 16"):
        latent_size(side, 128)
    with pytest.raises(ImageError, match=f"height {side}"):
        latent_size(128, side)
