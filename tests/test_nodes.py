"""The nodes in ComfyUI: schemas, help pages, and what comes out of each.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment.
"""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import asyncio
import logging
import math
from pathlib import Path

import chroma_nodes
import pytest
import torch
from chroma_nodes.chroma.autoencoder import LATENT_SCALE, LATENT_SHIFT, AutoencoderConfig
from chroma_nodes.chroma.errors import CheckpointError
from chroma_nodes.chroma.presets import PRESETS
from chroma_nodes.chroma.text.encoder import PadRule, TextEncoder
from chroma_nodes.chroma.text.t5 import T5Config
from chroma_nodes.chroma.text.tokenizer import Tokenizer
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.samplers import SAMPLERS
from chroma_nodes.schedulers import SCHEDULERS, get_sigmas
from comfy_inprocess import (
    import_comfyui,
    random_autoencoder,
    random_t5,
    write_small_files,
)
from torch import nn

import_comfyui()

import comfy.lora
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.text_encoders.t5
import folder_paths
from chroma_nodes import nodes as pack
from chroma_nodes.nodes import host, host_model, host_text, host_vae
from chroma_nodes.nodes.conditioning import ChromaTextEncode
from chroma_nodes.nodes.loading import (
    ChromaApplyTransformer,
    ChromaLoadModel,
    ChromaLoadTextEncoder,
    ChromaLoadVAE,
)
from chroma_nodes.nodes.sampling import ChromaPreset, ChromaSampler
from chroma_nodes.nodes.scheduling import (
    ChromaBetaScheduler,
    ChromaModelShift,
    ChromaSigmoidOffsetScheduler,
)
from comfy.model_patcher import ModelPatcher

DOCS = Path(pack.__file__).parent / "web" / "docs"
PROMPT = "a red apple, large, (centre:1.3)"


def load_nodes():
    async def start():
        extension = await chroma_nodes.comfy_entrypoint()
        return await extension.get_node_list()

    return asyncio.run(start())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_small_files(tmp_path_factory.mktemp("models"))


@pytest.fixture
def model(files):
    return host_model.build_model(files["diffusion_models"], torch.float32)


@pytest.fixture
def clip(files):
    return host_text.load_clip(files["text_encoders"], "fp32")


@pytest.fixture
def vae(files):
    return host_vae.load_vae(files["vae"])


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(Tokenizer.from_file(small.TOKENIZER), random_t5())


def result(output):
    return output.result if len(output.result) > 1 else output.result[0]


# Schemas


@pytest.mark.parametrize("node", pack.NODES, ids=lambda node: node.__name__)
def test_schema_is_complete(node):
    schema = node.GET_SCHEMA()  # raises if ids clash
    assert schema.node_id == node.__name__ and schema.node_id.startswith("Chroma")
    assert schema.category.split("/")[0] == "Chroma" and schema.display_name and schema.description
    for socket in (*schema.inputs, *schema.outputs):
        assert socket.tooltip and socket.tooltip.rstrip().endswith("."), socket.id
    assert all(output.display_name for output in schema.outputs)
    info = node.GET_NODE_INFO_V1()
    assert info["name"] == node.__name__


@pytest.mark.parametrize("node", pack.NODES, ids=lambda node: node.__name__)
def test_help_page_names_every_input(node):
    page = (DOCS / f"{node.__name__}.md").read_text("utf-8")
    schema = node.define_schema()
    assert page.startswith(f"# {schema.display_name}\n")
    for socket in schema.inputs:
        assert f"`{socket.id}`" in page
    for output in schema.outputs:
        assert f"`{output.display_name}`" in page


def test_no_help_page_is_left_over():
    assert {p.stem for p in DOCS.glob("*.md")} == {node.__name__ for node in pack.NODES}


def test_loading_the_extension_registers_everything_once():
    before = list(comfy.samplers.SCHEDULER_HANDLERS)
    nodes = load_nodes()
    assert load_nodes() == nodes == pack.NODES
    for names in (comfy.samplers.KSAMPLER_NAMES, comfy.samplers.KSampler.SAMPLERS):
        assert [n for n in names if n.startswith("chroma_")] == ["chroma_" + n for n in SAMPLERS]
    for name in (*("chroma_" + n for n in SCHEDULERS), "sigmoid_offset"):
        assert comfy.samplers.KSampler.SCHEDULERS.count(name) == 1
    assert [n for n in comfy.samplers.SCHEDULER_HANDLERS if n in before] == before
    folder = [str(small.FOLDER)]
    assert folder_paths.get_folder_paths(host.SMALL_CATEGORY) == folder
    sampler = comfy.samplers.sampler_object("chroma_flash")
    assert sampler.sampler_function is SAMPLERS["flash"]


def test_a_sigmoid_offset_of_another_pack_stays(monkeypatch):
    theirs = comfy.samplers.SchedulerHandler(lambda sampling, steps: None)
    monkeypatch.setitem(comfy.samplers.SCHEDULER_HANDLERS, "sigmoid_offset", theirs)
    load_nodes()
    assert comfy.samplers.SCHEDULER_HANDLERS["sigmoid_offset"] is theirs


# Loading


def test_loaders_offer_the_small_model_and_the_users_files(files, monkeypatch):
    for category, node in (
        ("diffusion_models", ChromaLoadModel),
        ("text_encoders", ChromaLoadTextEncoder),
        ("vae", ChromaLoadVAE),
    ):
        folder = str(files[category].parent)
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, category, ([folder], {".safetensors"})
        )
        offered = node.define_schema().inputs[0]
        assert offered.options == [small.LABEL, "random.safetensors"]
        assert offered.default == small.LABEL
        assert host.locate(category, "random.safetensors", small.VAE) == files[category]
        assert host.locate(category, small.LABEL, small.VAE) == small.VAE
        with pytest.raises(CheckpointError, match=f"gone is not in ComfyUI's {category} folder"):
            host.locate(category, "gone", small.VAE)
    kinds = [
        type(result(ChromaLoadModel.execute("random.safetensors", "fp32"))),
        type(result(ChromaLoadTextEncoder.execute("random.safetensors", "fp32"))),
        type(result(ChromaLoadVAE.execute("random.safetensors"))),
    ]
    assert issubclass(kinds[0], ModelPatcher)
    assert kinds[1:] == [comfy.sd.CLIP, host_vae.HostVAE]


def test_apply_returns_another_model(model):
    assert result(ChromaApplyTransformer.execute(model)) is not model


@pytest.mark.parametrize(
    "cpu, choice, native, wanted",
    (
        ("cpu", "auto", True, torch.bfloat16),
        ("cpu", "auto", False, None),
        ("meta", "auto", True, None),
        ("cpu", "fp16", True, torch.float16),
    ),
)
def test_the_precision_auto_stands_for(monkeypatch, cpu, choice, native, wanted):
    monkeypatch.setattr(host, "cpu_has_bf16", lambda: native)
    assert host.weight_dtype(choice, torch.device(cpu)) is wanted


def test_bf16_is_computed_natively_where_the_cpu_can(files, monkeypatch):
    for native, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(host, "cpu_has_bf16", lambda native=native: native)
        model = host_model.load_model(files["diffusion_models"], "bf16")
        seen = []
        model.model.diffusion_model.img_in.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].dtype)
        )
        cond = [[torch.zeros(1, 3, 48), {"pooled_output": None}]]
        latent = torch.zeros(1, 16, 4, 4)
        comfy.sample.sample_custom(
            model, latent, 1.0, comfy.samplers.KSAMPLER(SAMPLERS["euler"]),
            torch.tensor([1.0, 0.0]), cond, cond, latent, disable_pbar=True,
        )  # fmt: skip
        assert seen == [wanted]


# Text


def close(actual, wanted, tolerance=1e-5):
    torch.testing.assert_close(actual, wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("rule", PadRule)
def test_encoded_text_equals_ours(clip, encoder, rule):
    ((hidden, extra),) = result(ChromaTextEncode.execute(clip, PROMPT, rule.value, False))
    close(hidden, encoder.encode([PROMPT], rule).hidden)
    assert extra == {"pooled_output": None}


def test_comfyuis_own_encode_node_uses_the_reference_rule_and_weights(clip, encoder):
    tokens = clip.tokenize(PROMPT)
    ((hidden, extra),) = clip.encode_from_tokens_scheduled(tokens)
    close(hidden, encoder.encode([PROMPT]).hidden)
    assert extra["pooled_output"] is None
    unweighted = encoder.encode([PROMPT], weighted=False).hidden
    assert hidden.shape != unweighted.shape or (hidden - unweighted).abs().max() > 1e-3


def test_one_prompt_per_line(clip, encoder):
    text = "a red apple\n\na blue car, small\n"
    ((hidden, extra),) = result(ChromaTextEncode.execute(clip, text, "reference", True))
    expected = encoder.encode(["a red apple", "a blue car, small"])
    close(hidden, expected.hidden)
    assert torch.equal(extra["chroma_lengths"], expected.lengths)
    ((empty, _),) = result(ChromaTextEncode.execute(clip, "\n", "reference", True))
    close(empty, encoder.encode([""]).hidden)


def test_tokens_are_in_comfyuis_form(clip):
    plain, with_ids = (clip.tokenize("a (b:1.5)", return_word_ids=flag) for flag in (False, True))
    (row,), (numbered,) = plain["t5xxl"], with_ids["t5xxl"]
    assert {weight for _, weight in row} == {1.0, 1.5} and row[-1] == (1, 1.0)
    assert [token[:2] for token in numbered] == row
    assert clip.tokenizer.untokenize(row)[-1] == (row[-1], "")
    a, b = clip.encode_from_tokens(plain), clip.encode_from_tokens(with_ids)
    assert torch.equal(a, b)


def test_a_cut_prompt_is_reported(clip, caplog):
    with caplog.at_level(logging.WARNING, "chroma"):
        ((hidden, _),) = result(ChromaTextEncode.execute(clip, "red " * 600, "reference", False))
    assert hidden.shape[1] == 512 and "Cut off" in caplog.text


XXL = T5Config(vocab_size=32128, d_model=32, heads=2, d_kv=16, d_ff=48, layers=2)


def core_clip(**changes):
    """A CLIP as ComfyUI builds it around T5, at a small width."""
    config = {
        "num_layers": XXL.layers, "d_model": XXL.d_model, "d_kv": XXL.d_kv,
        "num_heads": XXL.heads, "d_ff": XXL.d_ff, "dense_act_fn": "gelu_pytorch_tanh",
        "is_gated_act": True, "model_type": "t5", "vocab_size": XXL.vocab_size, **changes,
    }  # fmt: skip
    native = comfy.text_encoders.t5.T5(config, torch.float32, "cpu", comfy.ops.manual_cast)
    model, model.t5xxl = nn.Module(), nn.Module()
    model.t5xxl.transformer = native.eval().requires_grad_(False)
    clip = comfy.sd.CLIP(no_init=True)
    clip.patcher = ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    clip.cond_stage_model, clip.tokenizer = model, object()
    clip.layer_idx, clip.apply_hooks_to_conds = None, None
    clip.tokenizer_options, clip.use_clip_schedule = {}, False
    return clip


@pytest.fixture(scope="module")
def foreign():
    clip = core_clip()
    clip.cond_stage_model.t5xxl.transformer.load_state_dict(random_t5(3, XXL).state_dict())
    return clip


@pytest.mark.parametrize("rule", PadRule)
def test_a_clip_of_another_loader_encodes_like_ours(foreign, rule):
    before = foreign.cond_stage_model, foreign.tokenizer
    ((hidden, _),) = result(ChromaTextEncode.execute(foreign, PROMPT, rule.value, False))
    ours = TextEncoder(host_text.t5_tokenizer(), random_t5(3, XXL)).encode([PROMPT], rule)
    close(hidden, ours.hidden)
    assert (foreign.cond_stage_model, foreign.tokenizer) == before


@torch.no_grad()
def test_without_padding_another_loaders_clip_gives_comfyuis_numbers(foreign):
    text = "a red apple"
    ((hidden, _),) = result(ChromaTextEncode.execute(foreign, text, "comfy_nopad", False))
    ids = host_text.adopt_clip(foreign).tokenize(text)["t5xxl"][0]
    native = foreign.cond_stage_model.t5xxl.transformer
    theirs, _ = native(torch.tensor([[token for token, _ in ids]]), None)
    close(hidden, theirs, 2e-5)


def test_weights_in_half_precision_are_computed_in_fp32(files, encoder):
    half = host_text.load_clip(files["text_encoders"], "bf16")
    ((hidden, _),) = result(ChromaTextEncode.execute(half, "a red apple", "reference", False))
    assert hidden.dtype == torch.float32
    rounded = random_t5()
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    ours = TextEncoder(encoder.tokenizer, rounded).encode(["a red apple"])
    close(hidden, ours.hidden)


def test_a_lora_reaches_the_text_encoder(clip):
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    name = "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
    assert name in keys.values()
    tokens, before = clip.tokenize("a red apple"), clip.encode("a red apple")
    patched = clip.clone()
    weight = clip.cond_stage_model.state_dict()[name]
    assert patched.add_patches({name: ("diff", (torch.randn_like(weight),))}, 1.0) == [name]
    assert (patched.encode_from_tokens(tokens) - before).abs().max() > 1e-3
    close(clip.encode_from_tokens(tokens), before)


def test_other_text_encoders_are_refused(files):
    with pytest.raises(CheckpointError, match=r"expected a T5 v1.1 encoder; use ChromaLoadTextEnc"):
        clip = core_clip()
        clip.cond_stage_model = nn.Linear(2, 2)
        ChromaTextEncode.execute(clip, "", "reference", False)
    with pytest.raises(CheckpointError, match=r"this CLIP holds T5, expected a T5 v1.1"):
        ChromaTextEncode.execute(core_clip(is_gated_act=False), "", "reference", False)
    with pytest.raises(CheckpointError, match="is a Flux autoencoder, expected a T5 text encoder"):
        host_text.load_clip(files["vae"], "auto")


# VAE


@pytest.fixture(scope="module")
def autoencoder():
    return random_autoencoder()


@torch.no_grad()
def test_vae_equals_our_autoencoder(vae, autoencoder):
    pixels = torch.rand(2, 64, 48, 3, generator=torch.Generator().manual_seed(1))
    latent = vae.encode(pixels)
    ours = autoencoder.encode(pixels.movedim(-1, 1) * 2 - 1)
    close((latent - LATENT_SHIFT) * LATENT_SCALE, ours)
    assert latent.shape == (2, 16, 8, 6)
    decoded = ((autoencoder.decode(ours) + 1) / 2).clamp(0, 1).movedim(1, -1)
    close(vae.decode(latent), decoded)
    assert decoded.std() > 0.01


@torch.inference_mode()  # as ComfyUI runs its nodes
@pytest.mark.parametrize("tile, likeness", ((32, 0.9999), (12, 0.7)))
def test_tiles_are_stitched_to_about_the_whole(vae, tile, likeness):
    pixels = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(1))
    whole = vae.encode(pixels)
    encoded = vae.encode_tiled(pixels, tile_x=8 * tile, tile_y=8 * tile, overlap=32)
    decoded = vae.decode_tiled(whole, tile_x=tile, tile_y=tile, overlap=4)
    for tiled, expected in ((encoded, whole), (decoded, vae.decode(whole))):
        assert tiled.shape == expected.shape
        both = torch.stack([tiled.flatten(), expected.flatten()])
        assert torch.corrcoef(both)[0, 1] > likeness


def test_sizes_that_comfyui_asks_of_a_vae(vae):
    assert (vae.spacial_compression_encode(), vae.spacial_compression_decode()) == (8, 8)
    assert (
        vae.latent_channels == 16
        and vae.get_sd().keys() == random_autoencoder().state_dict().keys()
    )
    assert vae.encode(torch.rand(1, 70, 50, 3)).shape == (1, 16, 8, 6)


def test_the_autoencoder_of_flux_is_left_to_comfyui(files, monkeypatch):
    taken = []
    monkeypatch.setattr(host_vae, "_core_vae", taken.append)
    flux = AutoencoderConfig()
    monkeypatch.setattr(host_vae, "read_autoencoder", lambda path: (flux, {}))
    monkeypatch.setattr(host_vae, "check_state", lambda model, state, path: None)
    host_vae.load_vae(files["vae"])
    assert taken == [files["vae"]]


def test_other_files_are_no_vae(files):
    with pytest.raises(CheckpointError, match="expected a Flux autoencoder"):
        host_vae.load_vae(files["diffusion_models"])


# Sigmas and samplers


def shifted(model, **changes):
    values = {
        "mode": "constant", "shift": 1.0, "base_shift": 0.5, "max_shift": 1.15, "width": 1024,
        "height": 1024, **changes,
    }  # fmt: skip
    return result(ChromaModelShift.execute(model, **values))


def core_shift(name, model, *args):
    from comfy_extras import nodes_model_advanced

    node = getattr(nodes_model_advanced, name)()
    return getattr(node, node.FUNCTION)(model, *args)[0].get_model_object("model_sampling")


@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_a_constant_shift_equals_comfyuis_auraflow_node(model, shift):
    ours = shifted(model, shift=shift).get_model_object("model_sampling")
    theirs = core_shift("ModelSamplingAuraFlow", model, shift)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    sigma = torch.tensor([0.3])
    assert torch.equal(ours.timestep(sigma), sigma)
    assert torch.equal(ours.calculate_denoised(sigma, sigma, sigma), sigma - sigma * sigma)


def test_a_resolution_shift_equals_comfyuis_flux_node(model):
    ours = shifted(model, mode="resolution", width=1536, height=512)
    theirs = core_shift("ModelSamplingFlux", model, 1.15, 0.5, 1536, 512)
    sampling = ours.get_model_object("model_sampling")
    close(sampling.sigmas, theirs.sigmas, 1e-7)
    sigma = torch.tensor([0.3])
    assert torch.equal(sampling.timestep(sigma), sigma)
    assert "model_sampling" not in model.object_patches


@pytest.mark.parametrize(
    "changes, shift",
    (
        ({}, 1.0),
        ({"shift": 2.5}, 2.5),
        ({"mode": "resolution"}, math.exp(1.15)),
        (None, math.exp(1.15)),
    ),
)
def test_exact_sigmas_follow_the_models_shift(model, changes, shift):
    model = model if changes is None else shifted(model, **changes)
    beta = result(ChromaBetaScheduler.execute(model, 13, 1.0, False, alpha=0.5, beta=0.7))
    close(beta, get_sigmas("beta", 13, shift=shift, alpha=0.5, beta=0.7), 1e-6)
    sigmoid = result(
        ChromaSigmoidOffsetScheduler.execute(model, 13, 0.5, False, square_k=1.2, base_c=0.4)
    )
    wanted = get_sigmas("sigmoid_offset", 13, shift=shift, square_k=1.2, base_c=0.4, denoise=0.5)
    close(sigmoid, wanted, 1e-6)
    assert len(beta) == len(sigmoid) == 14


@pytest.mark.parametrize("steps", (8, 26, 200))
@pytest.mark.parametrize("shift", (1.0, None))
def test_compat_sigmas_equal_comfyuis_beta_scheduler(model, steps, shift):
    model = model if shift is None else shifted(model, shift=shift)
    sampling = model.get_model_object("model_sampling")
    ours = result(ChromaBetaScheduler.execute(model, steps, 1.0, True))
    assert torch.equal(ours, comfy.samplers.calculate_sigmas(sampling, "beta", steps))


def test_ksamplers_schedulers(model):
    load_nodes()
    sampling = model.get_model_object("model_sampling")
    exact = comfy.samplers.calculate_sigmas(sampling, "chroma_beta", 26)
    assert torch.equal(exact, result(ChromaBetaScheduler.execute(model, 26, 1.0, False)))
    known = comfy.samplers.calculate_sigmas(sampling, "sigmoid_offset", 26)
    compat = result(ChromaSigmoidOffsetScheduler.execute(model, 26, 1.0, True))
    assert torch.equal(known, compat) and float(known[0]) == pytest.approx(0.99423, abs=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_node_gives_the_named_sampler(name):
    sampler = result(ChromaSampler.execute(name))
    assert isinstance(sampler, comfy.samplers.KSAMPLER)
    assert sampler.sampler_function is SAMPLERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_gives_what_belongs_together(model, name):
    preset = PRESETS[name]
    out = ChromaPreset.execute(model, name)
    shifted_model, sampler, sigmas, cfg = result(out)
    (shown,) = out.ui.as_dict()["text"]
    assert f"{preset.sampler}, {preset.steps} steps" in shown and f"cfg {preset.cfg:g}" in shown
    assert shifted_model.get_model_object("model_sampling").shift == preset.shift
    assert sampler.sampler_function is SAMPLERS[preset.sampler]
    assert (len(sigmas), cfg) == (preset.steps + 1, preset.cfg)
    close(
        sigmas,
        get_sigmas(
            preset.scheduler, preset.steps, shift=preset.shift, alpha=preset.alpha, beta=preset.beta
        ),
    )


def test_ksampler_node_runs_with_our_sampler_and_scheduler(model):
    load_nodes()
    latent = torch.zeros(1, 16, 4, 4)
    cond = [[torch.randn(1, 3, 48), {"pooled_output": None}]]
    out = comfy.sample.sample(
        model, torch.randn_like(latent), 3, 2.0, "chroma_heun", "sigmoid_offset", cond, cond,
        latent, denoise=0.5, disable_pbar=True, seed=1,
    )  # fmt: skip
    assert out.shape == latent.shape and torch.isfinite(out).all()
