"""CFG++ in its flow form: the guided picture with the negative prompt's noise."""

import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.chroma.guidance import Denoiser
from chroma_nodes.chroma.text.encoder import TextEmbedding
from chroma_nodes.samplers.cfg_pp import sample_euler_ancestral_cfg_pp, sample_euler_cfg_pp
from comfy_samplers import ComfyModel, comfyui
from oracles import SMALL, random_transformer
from sampler_cases import beta, fixed_noise, points
from test_samplers import gaussian, grid, two_modes


@pytest.mark.parametrize("scale", [0.6, 1.0, 2.0])
@pytest.mark.parametrize(
    ("first", "eta"), [(1.0, 0.0), (1.0, 1.0), (0.97, 0.0), (0.97, 0.5), (0.97, 1.0)]
)
def test_cfg_pp_agrees_with_comfyui(first, scale, eta):
    """From sigma 1 with eta between 0 and 1, ComfyUI takes it for 1: infinity over infinity."""
    model = ComfyModel(two_modes, gaussian, scale)
    sampler, name = sample_euler_ancestral_cfg_pp, "euler_ancestral_cfg_pp"
    kw = {"eta": eta}
    for sigmas in (first * beta(12), first * grid(6)):
        expected = comfyui(name, model, points(), sigmas, noise_sampler=fixed_noise(), **kw)
        extra = {"model_options": {}, "seed": 1}
        found = sampler(
            model, points(), sigmas, extra_args=extra, disable=True, noise_sampler=fixed_noise(),
            **kw,
        )  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert extra == {"model_options": {}, "seed": 1}


def test_euler_cfg_pp_hears_uncond_in_comfyui_after_other_functions():
    seen = []

    def post(args):
        seen.append(args["uncond_denoised"])
        return args["denoised"] + 0.1

    options = {"sampler_post_cfg_function": [post]}
    model = ComfyModel(two_modes, gaussian, 0.8)
    extra = {"model_options": options}
    ours = sample_euler_cfg_pp(model, points(), beta(5), extra_args=extra, disable=True)
    theirs = comfyui("euler_cfg_pp", model, points(), beta(5), extra_args=extra)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert options == {"sampler_post_cfg_function": [post]} and len(seen) == 10


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
