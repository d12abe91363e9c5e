"""`pipeline.generate` on the small model: its options, and batches of seeds."""

import functools
from itertools import pairwise

import pytest
import torch
from chroma_nodes.chroma.caching import CacheSettings
from chroma_nodes.chroma.errors import ImageError, SamplingError
from chroma_nodes.chroma.guidance import Denoiser, Guidance
from chroma_nodes.chroma.nag import NAG, NAGSettings
from chroma_nodes.chroma.noise import make_noise
from chroma_nodes.chroma.pipeline import Pipeline, Settings, decode, generate
from chroma_nodes.chroma.sampling import sample_latent
from chroma_nodes.samplers import SAMPLERS
from chroma_nodes.schedulers import get_sigmas

CPU = torch.device("cpu")
PROMPT = "a 3d emoji of a cat"
SETTINGS = Settings(width=64, height=64, steps=4, cfg=3.0, seed=5)


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(device=CPU, dtype=torch.float32)


def make(pipeline, prompts=(PROMPT,), settings=SETTINGS, **kw):
    return generate(pipeline, list(prompts), "blurry", settings, disable_progress=True, **kw)


@torch.no_grad()
def by_hand(pipeline, sampler=SAMPLERS["flow_pec"], cfg=3.0, nag=None, seed=5, steps=4):
    """The same run put together from its parts."""
    cond, uncond = pipeline.text_encoder.encode([PROMPT]), pipeline.text_encoder.encode(["blurry"])
    nag = nag and NAG(nag, uncond.hidden, tuple(uncond.lengths.tolist()))
    noise = make_noise((1, 16, 8, 8), seed)
    latent = sample_latent(
        Denoiser(pipeline.transformer, cond, uncond, cfg, nag), sampler,
        get_sigmas("beta", steps), noise, torch.zeros_like(noise), seed=seed,
        disable_progress=True,
    )  # fmt: skip
    return decode(pipeline.autoencoder, latent)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", ["flow_pec", "euler_ancestral", "sa_solver"])
def test_each_picture_of_a_batch_is_that_of_its_seed(pipeline, sampler):
    settings = Settings(width=64, height=64, steps=4, cfg=3.0, sampler=sampler)
    together = make(pipeline, settings=settings, seeds=[8, 2, 8])
    for seed, picture in zip((8, 2, 8), together, strict=True):
        alone = Settings(width=64, height=64, steps=4, cfg=3.0, sampler=sampler, seed=seed)
        close(picture[None], make(pipeline, settings=alone))
    assert (together[0] - together[1]).abs().mean() > 0.01


def test_prompts_are_repeated_over_the_seeds(pipeline):
    prompts = [PROMPT, "a flat emoji of a tree on a blue background"]
    four = make(pipeline, prompts, seeds=[1, 2, 3, 4])
    close(four[2:3], make(pipeline, prompts[:1], seeds=[3]))
    close(four[3:4], make(pipeline, prompts[1:], seeds=[4]))
    with pytest.raises(SamplingError, match="2 prompts do not fit 3 seeds"):
        make(pipeline, prompts, seeds=[1, 2, 3])
    with pytest.raises(SamplingError, match="no seeds"):
        make(pipeline, seeds=[])


def test_options_of_the_sampler_reach_it(pipeline):
    settings = Settings(width=64, height=64, steps=4, cfg=3.0, seed=5, sampler="deis")
    ours = make(pipeline, settings=settings, sampler_options={"order": 2})
    close(ours, by_hand(pipeline, functools.partial(SAMPLERS["deis"], order=2)))
    assert (ours - make(pipeline, settings=settings)).abs().max() > 1e-3
    with pytest.raises(SamplingError, match="deis has no substeps"):
        make(pipeline, settings=settings, sampler_options={"substeps": 2})


def test_guidance_stands_in_place_of_cfg(pipeline):
    plan = Guidance(5.0, "linear", 2.0, rescale=0.5)
    close(make(pipeline, guidance=plan), by_hand(pipeline, cfg=plan))
    close(make(pipeline, guidance=Guidance(3.0)), make(pipeline))


def test_nag_takes_the_negative_prompt_at_cfg_one(pipeline):
    settings, nag = Settings(width=64, height=64, steps=4, cfg=1.0, seed=5), NAGSettings(9.0)
    ours = make(pipeline, settings=settings, nag=nag)
    close(ours, by_hand(pipeline, cfg=1.0, nag=nag))
    assert (ours - make(pipeline, settings=settings)).abs().max() > 1e-3


def test_the_cache_saves_the_later_blocks(pipeline):
    runs = []
    layer = pipeline.transformer.single_blocks[0].linear1
    handle = layer.register_forward_hook(lambda _, inputs, out: runs.append(len(out)))
    plain = make(pipeline)
    assert sum(runs) == 8
    runs.clear()
    saved = make(pipeline, cache=CacheSettings(10.0))
    assert sum(runs) == 2 and (saved - plain).abs().max() > 1e-3
    runs.clear()
    close(make(pipeline, cache=CacheSettings(0.0)), plain)
    handle.remove()


def test_image_to_image_and_masks(pipeline):
    image = make(pipeline)
    with torch.no_grad():
        latent = pipeline.autoencoder.encode(image.movedim(-1, 1) * 2 - 1)
        same = decode(pipeline.autoencoder, latent)
    half = Settings(width=64, height=64, steps=4, denoise=0.5, sampler="euler", cfg=1.0, seed=5)
    changed = make(pipeline, settings=half, image=image)
    with torch.no_grad():
        sigmas = get_sigmas("beta", 8)[-5:]
        x = sigmas[0] * make_noise(latent.shape, 5) + (1 - sigmas[0]) * latent
        text = pipeline.text_encoder.encode([PROMPT])
        for high, low in pairwise(sigmas):
            v = pipeline.transformer(x, high[None], text.hidden, text.lengths)
            x = x + (low - high) * v
        close(changed, decode(pipeline.autoencoder, x))
    close(make(pipeline, image=image, mask=torch.zeros(1, 64, 64)), same)
    close(make(pipeline, image=image, mask=torch.ones(1, 64, 64)), make(pipeline))
    both = make(pipeline, settings=half, image=image, seeds=[5, 6])
    close(both[:1], changed)
    for kw, says in (
        ({"image": image[:, :32]}, r"expected \(1, 64, 64, 3\)"),
        ({"mask": torch.ones(1, 8, 8)}, "a mask needs an image"),
        ({"image": image.repeat(3, 1, 1, 1), "seeds": [1, 2]}, "3 images do not fit 2 pictures"),
    ):
        with pytest.raises(ImageError, match=says):
            make(pipeline, **kw)
