"""The NAG node in ComfyUI: same numbers as outside of it, with every sampler node and patch.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment.
"""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import pytest
import torch
from chroma_nodes.chroma.errors import CheckpointError, PromptError, SamplingError
from chroma_nodes.chroma.nag import NAG, NAGSettings
from chroma_nodes.chroma.sampling import sample_latent
from chroma_nodes.samplers import SAMPLERS
from comfy_inprocess import import_comfyui, write_small_files
from oracles import SMALL, random_transformer

import_comfyui()

import comfy.ldm.chroma.model
import comfy.sample
import comfy.samplers
import comfy.supported_models
from chroma_nodes.nodes.host_model import build_model
from chroma_nodes.nodes.host_nag import NAG_KEY
from chroma_nodes.nodes.host_transformer import HostTransformer
from chroma_nodes.nodes.nag import ChromaNAG
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_custom_sampler import BasicGuider
from test_comfy_host import close, native_chroma, native_patcher

SIGMAS = torch.tensor([1.0, 0.8, 0.45, 0.2, 0.0])
STRONG = {"scale": 6.0, "tau": 1.3, "alpha": 0.6, "sigma_end": 0.0}


@pytest.fixture(scope="module")
def plain():
    return random_transformer()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    files = write_small_files(tmp_path_factory.mktemp("models"))
    return build_model(files["diffusion_models"], torch.float32)


def text(lengths, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(lengths), max(lengths), SMALL.context_dim, generator=g)


def conditioning(lengths, seed):
    extra = {"pooled_output": None}
    if len(set(lengths)) > 1:
        extra["chroma_lengths"] = torch.tensor(lengths)
    return [[text(lengths, seed), extra]]


def noise(batch=2):
    return torch.randn(batch, 16, 8, 12, generator=torch.Generator().manual_seed(2))


def guided(model, negative, **changes):
    return ChromaNAG.execute(model, negative, **{**STRONG, **changes}).result[0]


def run(model, positive, negative, cfg=1.0, batch=2):
    out = comfy.sample.sample_custom(
        model, noise(batch), cfg, comfy.samplers.KSAMPLER(SAMPLERS["euler"]), SIGMAS,
        positive, negative, torch.zeros_like(noise(batch)), disable_pbar=True,
    )  # fmt: skip
    return model.model.process_latent_in(out)


@torch.no_grad()
def ours(model, positive, negative, settings, uncond=None, cfg=1.0, batch=2):
    """The run outside of ComfyUI; each prompt is (lengths, seed)."""
    nag = NAG(settings, text(*negative), tuple(negative[0]))

    def velocity(x, sigma, prompt, **kw):
        lengths, seed = prompt
        times = len(x) // len(lengths)
        context = text(lengths, seed).repeat(times, 1, 1)
        return model(x, sigma, context, torch.tensor(lengths).repeat(times), **kw)

    def denoise(x, sigma, **_):
        v = velocity(x, sigma, positive, nag=nag)
        if uncond is not None:
            u = velocity(x, sigma, uncond)
            v = u + cfg * (v - u)
        return x - sigma.view(-1, 1, 1, 1) * v

    return sample_latent(
        denoise, SAMPLERS["euler"], SIGMAS, noise(batch), torch.zeros(batch, 16, 8, 12),
        disable_progress=True,
    )  # fmt: skip


@pytest.mark.parametrize("adopted", (False, True))
@pytest.mark.parametrize(
    ("positive", "negative"), [((7,), (7,)), ((7,), (4,)), ((7, 3), (5,)), ((7, 7), (2, 6))]
)
def test_sampling_at_cfg_one_equals_ours(own, plain, adopted, positive, negative):
    model = guided(native_patcher() if adopted else own, conditioning(negative, 4))
    theirs = run(model, conditioning(positive, 3), conditioning((4,), 5))
    wanted = ours(plain, (positive, 3), (negative, 4), NAGSettings(**STRONG))
    close(theirs, wanted)
    without = run(own, conditioning(positive, 3), conditioning((4,), 5))
    assert (without - wanted).abs().max() > 0.05 * wanted.std()


def test_basic_guider_and_ksampler_give_the_same(own):
    positive, empty = conditioning((7,), 3), conditioning((4,), 5)
    model = guided(own, conditioning((5,), 4))
    wanted = run(model, positive, empty)
    (guider,) = getattr(BasicGuider.execute(model, positive), "result", (None,)) if hasattr(
        BasicGuider, "execute"
    ) else BasicGuider().get_guider(model, positive)  # fmt: skip
    sampler = comfy.samplers.KSAMPLER(SAMPLERS["euler"])
    latent = torch.zeros_like(noise())
    basic = guider.sample(noise(), latent, sampler, SIGMAS, disable_pbar=True)
    assert torch.equal(model.model.process_latent_in(basic), wanted)
    kwargs = {"sigmas": SIGMAS, "disable_pbar": True}
    direct = comfy.sample.sample(
        model, noise(), 4, 1.0, "euler", "simple", positive, empty, latent, **kwargs
    )
    assert torch.allclose(model.model.process_latent_in(direct), wanted, atol=1e-4)


@pytest.mark.parametrize("uncond", [(7,), (4,)])
def test_above_cfg_one_it_guides_the_positive_prompt_only(own, plain, uncond):
    model = guided(own, conditioning((5,), 4))
    theirs = run(model, conditioning((7,), 3), conditioning(uncond, 6), cfg=3.0)
    settings = NAGSettings(**STRONG)
    wanted = ours(plain, ((7,), 3), ((5,), 4), settings, uncond=(uncond, 6), cfg=3.0)
    close(theirs, wanted)


@pytest.mark.parametrize("changes", [{"scale": 1.0}, {"alpha": 0.0}])
def test_neutral_values_are_the_plain_run_to_the_bit(own, changes):
    positive, empty = conditioning((7,), 3), conditioning((4,), 5)
    model = guided(own, conditioning((5,), 4), **changes)
    assert torch.equal(run(model, positive, empty), run(own, positive, empty))


def test_sigma_end_leaves_the_later_steps_plain(own, plain):
    model = guided(own, conditioning((5,), 4), sigma_end=0.5)
    tokens = []
    layer = own.model.diffusion_model.txt_in
    handle = layer.register_forward_hook(lambda _, args, out: tokens.append(out.shape[1]))
    theirs = run(model, conditioning((7,), 3), conditioning((4,), 5))
    handle.remove()
    assert tokens == [12, 12, 7, 7]
    settings = NAGSettings(**{**STRONG, "sigma_end": 0.5})
    close(theirs, ours(plain, ((7,), 3), ((5,), 4), settings))


def test_the_input_model_stays_as_it_is_and_the_last_node_counts():
    model, positive, empty = native_patcher(), conditioning((7,), 3), conditioning((4,), 5)
    first = guided(model, conditioning((5,), 4))
    second = guided(first, conditioning((5,), 8))
    assert NAG_KEY not in model.model_options["transformer_options"]
    outs = [run(m, positive, empty) for m in (first, second)]
    assert not torch.equal(*outs)
    assert torch.equal(run(first.clone(), positive, empty), outs[0])
    native = model.get_model_object("diffusion_model")
    assert not isinstance(native, HostTransformer)
    assert isinstance(first.get_model_object("diffusion_model"), HostTransformer)


@torch.no_grad()
def test_patches_of_other_nodes_take_part():
    model = guided(ModelPatcher(native_chroma(), torch.device("cpu"), torch.device("cpu")),
                   conditioning((5,), 4))  # fmt: skip
    transformer = model.get_model_object("diffusion_model")
    nag = model.model_options["transformer_options"][NAG_KEY]

    def forward(**options):
        sigma = torch.full((2,), 0.7)
        return transformer(
            noise(), sigma, text((7, 7), 3), transformer_options={NAG_KEY: nag, **options}
        )

    plain_out, tokens, slices, rotated = forward(), [], [], []

    def override(function, q, *args, **kwargs):
        tokens.append(q.shape[2])
        return function(q, *args, **kwargs)

    def output_patch(out, extra):
        slices.append((out.shape[1], extra["img_slice"]))
        return out

    def before(q, k, v, **_):
        rotated.append(q.shape[2])
        return {"q": q, "k": k, "v": v}

    close(forward(optimized_attention_override=override), plain_out, 1e-6)
    assert tokens == [7 + 24, 5 + 24] * 5
    close(forward(patches={"attn1_output_patch": [output_patch]}), plain_out, 1e-6)
    assert slices == [(12 + 24, [12, 36])] * 5
    close(forward(patches={"attn1_patch": [before]}), plain_out)
    assert rotated in ([], [36] * 5)  # none where ComfyUI has no such patch yet


def test_models_and_prompts_that_do_not_fit(own):
    positive = conditioning((7,), 3)
    other = ModelPatcher(torch.nn.Module(), torch.device("cpu"), torch.device("cpu"))
    other.model.diffusion_model = torch.nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"this MODEL is Linear.*expected Chroma") as caught:
        guided(other, positive)
    assert "\n" not in str(caught.value)
    with pytest.raises(PromptError, match="negative holds 2 prompts, expected one"):
        guided(own, positive * 2)
    with pytest.raises(SamplingError, match="2 negative prompts do not fit a batch of 3"):
        run(guided(own, conditioning((4, 4), 4)), positive, positive, batch=3)
    narrow = [[torch.randn(1, 4, 40), {}]]
    with pytest.raises(SamplingError, match="vectors of 40"):
        run(guided(own, narrow), positive, positive)
