"""The nodes of a workflow one by one, on random weights, against the mathematics and ComfyUI."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import ImageError
from chroma_nodes.chroma.workflow import REGISTRY, Context
from comfy_inprocess import write_small_files
from PIL import Image
from workflow_files import INPUTS

CPU = torch.device("cpu")
# Flux' latents: (raw - SHIFT) * SCALE.
SCALE, SHIFT = 0.3611, 0.1159
# Made by ComfyUI's own functions: {table of sigmas: {scheduler: {steps: sigmas}}}.
REFERENCE = json.loads((Path(__file__).parent / "data" / "reference_sigmas.json").read_text())


@pytest.fixture(scope="module")
def random_models(tmp_path_factory):
    """A models folder with random weights of widths that fit each other."""
    folder = tmp_path_factory.mktemp("models")
    write_small_files(folder)
    return folder


@pytest.fixture
def call(random_models, tmp_path):
    """Run one node on its own: call("KSampler", model=..., ...) -> its outputs."""
    context = Context(CPU, random_models, INPUTS, tmp_path, {}, progress=False)

    def run_node(kind, **inputs):
        with torch.no_grad():
            return REGISTRY[kind].run(context, **inputs)

    return run_node


@pytest.fixture
def parts(call):
    """MODEL, positive and negative CONDITIONING, VAE of the random weights, in fp32."""
    name = "random.safetensors"
    (model,) = call("ChromaLoadModel", model_name=name, weight_dtype="fp32")
    (clip,) = call("ChromaLoadTextEncoder", text_encoder_name=name, weight_dtype="fp32")
    (vae,) = call("ChromaLoadVAE", vae_name=name)
    (positive,) = call("CLIPTextEncode", text="a cat", clip=clip)
    (negative,) = call("CLIPTextEncode", text="a dog on a mat", clip=clip)
    return model, positive, negative, vae


def euler_by_hand(model, positive, negative, cfg, sigmas, x):
    """Euler's method with classifier-free guidance in model space, one forward at a time."""
    for high, low in itertools.pairwise(sigmas):
        sigma = torch.full((len(x),), high)
        cond = model(x, sigma, positive.hidden, positive.lengths)
        uncond = model(x, sigma, negative.hidden, negative.lengths)
        x = x + (low - high) * (uncond + cfg * (cond - uncond))
    return x


def drawn(seed, shape):
    torch.manual_seed(seed)
    return torch.randn(shape)


def test_ksampler_is_euler_on_comfyuis_sigmas_at_its_default_shift(call, parts):
    model, positive, negative, _ = parts
    (empty,) = call("EmptyLatentImage", width=64, height=48, batch_size=1)
    (out,) = call(
        "KSampler", model=model, seed=7, steps=8, cfg=3.0, sampler_name="euler",
        scheduler="simple", positive=positive, negative=negative, latent_image=empty, denoise=1.0,
    )  # fmt: skip
    with torch.no_grad():
        sigmas = REFERENCE["flux_mu1.15"]["simple"]["8"]
        noise = drawn(7, (1, 16, 6, 8))
        expected = euler_by_hand(model.transformer, positive, negative, 3.0, sigmas, noise)
    got = (out["samples"] - SHIFT) * SCALE
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_ksampler_with_denoise_starts_from_the_noised_picture(call, parts):
    model, positive, negative, _ = parts
    (model,) = call("ModelSamplingAuraFlow", model=model, shift=1.0)
    raw = drawn(3, (1, 16, 4, 4)) * 2
    (out,) = call(
        "KSampler", model=model, seed=7, steps=4, cfg=3.0, sampler_name="chroma_euler",
        scheduler="simple", positive=positive, negative=negative, latent_image={"samples": raw},
        denoise=0.5,
    )  # fmt: skip
    with torch.no_grad():
        sigmas = REFERENCE["aura_shift1"]["simple"]["8"][-5:]
        start = sigmas[0] * drawn(7, raw.shape) + (1 - sigmas[0]) * (raw - SHIFT) * SCALE
        expected = euler_by_hand(model.transformer, positive, negative, 3.0, sigmas, start)
    got = (out["samples"] - SHIFT) * SCALE
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("shift_node", "settings", "table"),
    [
        (None, {}, "flux_mu1.15"),
        ("ModelSamplingAuraFlow", {"shift": 1.0}, "aura_shift1"),
        ("ChromaModelShift", {
            "mode": "constant", "shift": 1.0, "base_shift": 0.5, "max_shift": 1.15,
            "width": 512, "height": 512}, "aura_shift1"),
        ("ModelSamplingFlux", {
            "max_shift": 1.15, "base_shift": 0.5, "width": 1024, "height": 1024}, "flux_mu1.15"),
        ("ModelSamplingFlux", {
            "max_shift": 0.0, "base_shift": 0.0, "width": 640, "height": 480}, "flux_mu0"),
    ],
)  # fmt: skip
def test_core_schedulers_give_comfyuis_numbers(call, parts, shift_node, settings, table):
    model = parts[0]
    if shift_node is not None:
        (model,) = call(shift_node, model=model, **settings)
    for name, key in (("simple", "simple"), ("beta", "beta_0.6_0.6"),
                      ("sigmoid_offset", "sigmoid_offset_k1_c0.5")):  # fmt: skip
        (sigmas,) = call("BasicScheduler", model=model, scheduler=name, steps=26, denoise=1.0)
        torch.testing.assert_close(sigmas, torch.tensor(REFERENCE[table][key]["26"]))
    (sigmas,) = call("BetaSamplingScheduler", model=model, steps=16, alpha=0.4, beta=0.4)
    torch.testing.assert_close(sigmas, torch.tensor(REFERENCE[table]["beta_0.4_0.4"]["16"]))


def test_a_run_split_in_two_is_one_run(call, parts):
    model, positive, _, _ = parts
    (guider,) = call("BasicGuider", model=model, conditioning=positive)
    (sampler,) = call("KSamplerSelect", sampler_name="euler")
    (sigmas,) = call("BasicScheduler", model=model, scheduler="simple", steps=6, denoise=1.0)
    (noise,) = call("RandomNoise", noise_seed=5)
    (silence,) = call("DisableNoise")
    (empty,) = call("EmptySD3LatentImage", width=32, height=32, batch_size=2)
    high, low = call("SplitSigmas", sigmas=sigmas, step=2)
    same = {"guider": guider, "sampler": sampler}
    whole, _ = call("SamplerCustomAdvanced", **same, noise=noise, sigmas=sigmas, latent_image=empty)
    first, _ = call("SamplerCustomAdvanced", **same, noise=noise, sigmas=high, latent_image=empty)
    second, last = call(
        "SamplerCustomAdvanced", **same, noise=silence, sigmas=low, latent_image=first
    )
    tolerance = 1e-4 * float(whole["samples"].abs().max())
    torch.testing.assert_close(second["samples"], whole["samples"], rtol=1e-4, atol=tolerance)
    torch.testing.assert_close(second["samples"], last["samples"])
    assert (first["samples"] - whole["samples"]).abs().max() > 1


def test_no_steps_leave_even_an_empty_latent_alone(call, parts):
    model, positive, negative, _ = parts
    (empty,) = call("EmptySD3LatentImage", width=32, height=32, batch_size=1)
    (out,) = call(
        "KSampler", model=model, seed=7, steps=4, cfg=3.0, sampler_name="euler",
        scheduler="simple", positive=positive, negative=negative, latent_image=empty, denoise=0.0,
    )  # fmt: skip
    assert not out["samples"].any()


def test_decoding_in_one_tile_is_decoding(call, parts):
    vae, latent = parts[3], {"samples": drawn(0, (1, 16, 8, 8))}
    (plain,) = call("VAEDecode", samples=latent, vae=vae)
    (tiled,) = call(
        "VAEDecodeTiled", samples=latent, vae=vae, tile_size=512, overlap=256, temporal_size=64,
        temporal_overlap=8,
    )  # fmt: skip
    assert plain.shape == (1, 64, 64, 3)
    torch.testing.assert_close(tiled, plain, rtol=0, atol=1e-5)


def test_encoding_crops_from_the_middle_and_refuses_less_than_one_patch(call, parts):
    pixels = drawn(0, (1, 27, 40, 3)).sigmoid()
    (cropped,) = call("VAEEncode", pixels=pixels[:, 1:25], vae=parts[3])
    (whole,) = call("VAEEncode", pixels=pixels, vae=parts[3])
    torch.testing.assert_close(whole["samples"], cropped["samples"])
    with pytest.raises(ImageError, match="7 pixels is too small"):
        call("VAEEncode", pixels=pixels[:, :7], vae=parts[3])


def test_inpainting_keeps_what_is_outside_the_mask(call, parts):
    model, positive, negative, vae = parts
    picture, mask = call("LoadImage", image="example-with-hole.png")
    (before,) = call("VAEEncode", pixels=picture, vae=vae)
    (masked,) = call("SetLatentNoiseMask", samples=before, mask=mask)
    (after,) = call(
        "KSampler", model=model, seed=7, steps=3, cfg=3.0, sampler_name="res_multistep",
        scheduler="simple", positive=positive, negative=negative, latent_image=masked, denoise=1.0,
    )  # fmt: skip
    cells = mask.reshape(16, 8, 16, 8).amax(dim=(1, 3)) > 0  # latent cells that the mask touches
    change = (after["samples"] - before["samples"]).abs().amax(dim=(0, 1))
    assert 0 < cells.sum() < cells.numel()
    assert change[~cells].max() < 1e-4
    assert change[cells].min() > 1e-2


@pytest.mark.parametrize("channel", ["alpha", "red", "green", "blue"])
def test_masks_come_from_the_chosen_channel(call, channel):
    (mask,) = call("LoadImageMask", image="example-with-hole.png", channel=channel)
    with Image.open(INPUTS / "example-with-hole.png") as file:
        band = np.asarray(file.convert("RGBA").getchannel(channel[0].upper())) / 255
    expected = 1 - band if channel == "alpha" else band
    assert mask.shape == (1, 128, 128)
    np.testing.assert_allclose(mask[0].numpy(), expected, atol=1e-6)
