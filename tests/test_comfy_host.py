"""The MODEL inside ComfyUI: same numbers as ComfyUI's own Chroma, and as ours outside of it.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment.
"""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import dataclasses
import gc
import json
import logging
import struct
import weakref
from types import SimpleNamespace

import pytest
import torch
from chroma_nodes.chroma.errors import CheckpointError
from chroma_nodes.chroma.guidance import Denoiser
from chroma_nodes.chroma.sampling import sample_latent
from chroma_nodes.chroma.text.encoder import TextEmbedding
from chroma_nodes.samplers import SAMPLERS
from comfy_inprocess import import_comfyui, write_small_files
from oracles import SMALL, random_transformer
from safetensors.torch import load_file, save_file
from torch import nn

import_comfyui()

import comfy.ldm.chroma.model
import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.utils
from chroma_nodes.nodes import host_model
from chroma_nodes.nodes.host_model import apply_transformer, build_model, load_model
from chroma_nodes.nodes.host_transformer import HostTransformer, adopt, core_settings
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

SIGMAS = torch.tensor([1.0, 0.8, 0.45, 0.2, 0.0])
CPU = torch.device("cpu")


class _TrimmedRows(nn.Module):
    """ComfyUI's Chroma always makes 344 modulation rows; it finds the last two only at the end."""

    def __init__(self, approximator, rows):
        super().__init__()
        self.approximator, self.rows = approximator, rows

    def forward(self, x):
        return self.approximator(x)[:, : self.rows]


def native_chroma(seed=0):
    """ComfyUI's own Chroma at a small width, with the weights of random_transformer(seed)."""
    state = random_transformer(seed=seed).state_dict()
    settings = core_settings(SMALL)
    names = {f.name for f in dataclasses.fields(comfy.ldm.chroma.model.ChromaParams)}
    settings |= {name: [] for name in names - settings.keys()}
    config = comfy.supported_models.Chroma(settings)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(state)
    model.load_model_weights(dict(state))
    return model.eval().requires_grad_(False)


def native_patcher(seed=0):
    return ModelPatcher(native_chroma(seed), CPU, CPU)


def trimmed(native):
    """The same native module, which finds the final layer's modulation at any depth."""
    native.distilled_guidance_layer = _TrimmedRows(
        native.distilled_guidance_layer, SMALL.modulations
    )
    return native


@pytest.fixture(scope="module")
def plain():
    return random_transformer()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_small_files(tmp_path_factory.mktemp("models"))


@pytest.fixture
def own(files):
    return build_model(files["diffusion_models"], torch.float32)


def case(batch=2, h=12, w=10, tokens=7, seed=1):
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(batch, 16, h, w, generator=g)
    context = torch.randn(batch, tokens, SMALL.context_dim, generator=g)
    return latent, torch.full((batch,), 0.7), context


def embedding(tokens=7, seed=3, rows=1):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, tokens, SMALL.context_dim, generator=g)
    return TextEmbedding(hidden, torch.full((rows,), tokens))


def conditioning(text, **extra):
    return [[text.hidden, {"pooled_output": None, **extra}]]


def comfy_sample(model, noise, positive, negative, *, cfg=4.0, latent=None, mask=None):
    """A run through ComfyUI's sampling, in latents as the transformer sees them."""
    latent_in = (
        torch.zeros_like(noise) if latent is None else model.model.process_latent_out(latent)
    )
    out = comfy.sample.sample_custom(
        model, noise, cfg, comfy.samplers.KSAMPLER(SAMPLERS["euler"]), SIGMAS,
        positive, negative, latent_in, noise_mask=mask, disable_pbar=True,
    )  # fmt: skip
    return model.model.process_latent_in(out)


def close(actual, wanted, tolerance=1e-4):
    """Equal to within `tolerance` standard deviations of what is wanted."""
    torch.testing.assert_close(
        actual, wanted, atol=tolerance * float(wanted.detach().std()), rtol=0
    )


@torch.no_grad()
def test_adopted_equals_comfyuis_own_chroma():
    native = native_chroma().diffusion_model
    latent, sigma, context = case()
    ours = adopt(native)(latent, sigma, context)
    theirs = trimmed(native)(latent, sigma, context, torch.zeros(2))
    assert theirs.std() > 0.5
    close(ours, theirs)


@torch.no_grad()
def test_adopted_equals_comfyuis_own_with_an_odd_latent_and_control():
    native = native_chroma().diffusion_model
    latent, sigma, context = case(h=7, w=9)
    g = torch.Generator().manual_seed(5)
    add = [torch.randn(2, 20, SMALL.hidden, generator=g) for _ in range(3)]
    control = {"input": [add[0], None], "output": [None, add[1], add[2]]}
    ours = adopt(native)(latent, sigma, context, control=control)
    without = adopt(native)(latent, sigma, context)
    theirs = trimmed(native)(latent, sigma, context, torch.zeros(2), control)
    close(ours, theirs)
    assert (ours - without).abs().max() > 0.01


@torch.no_grad()
def test_comfyuis_names_for_modulations_give_the_same_slices():
    native = native_chroma().diffusion_model
    ours, vectors = adopt(native), torch.randn(1, SMALL.modulations, SMALL.hidden)
    for kind in ("single", "double_img", "double_txt"):
        mine, theirs = (m.get_modulations(vectors, kind, idx=1) for m in (ours, native))
        for a, b in zip(*((x,) if kind == "single" else x for x in (mine, theirs)), strict=True):
            assert torch.equal(a.shift, b.shift) and torch.equal(a.gate, b.gate)
    final = zip(*(m.get_modulations(vectors, "final") for m in (ours, native)), strict=True)
    assert all(torch.equal(a, b) for a, b in final)


@torch.no_grad()
def test_own_build_equals_the_transformer_outside_of_comfyui(own, plain):
    latent, sigma, context = case()
    close(own.model.diffusion_model(latent, sigma, context), plain(latent, sigma, context), 1e-5)


@pytest.mark.parametrize("adopted", (False, True))
@pytest.mark.parametrize("lengths", ((7, 7), (7, 5)))
def test_sampling_equals_ours(own, plain, adopted, lengths):
    model = apply_transformer(native_patcher()) if adopted else own
    noise = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(2))
    cond, uncond = embedding(lengths[0]), embedding(lengths[1], seed=4)
    ours = sample_latent(
        Denoiser(plain, cond, uncond, 4.0), SAMPLERS["euler"], SIGMAS, noise,
        torch.zeros_like(noise), disable_progress=True,
    )  # fmt: skip
    close(comfy_sample(model, noise, conditioning(cond), conditioning(uncond)), ours)


def test_inpainting_equals_ours(own, plain):
    g = torch.Generator().manual_seed(2)
    noise, latent = torch.randn(2, 1, 16, 8, 12, generator=g)
    mask = torch.zeros(1, 64, 96)
    mask[:, 20:50, 30:80] = 1
    cond, uncond = embedding(), embedding(seed=4)
    ours = sample_latent(
        Denoiser(plain, cond, uncond, 4.0), SAMPLERS["euler"], SIGMAS, noise, latent, mask=mask,
        disable_progress=True,
    )  # fmt: skip
    theirs = comfy_sample(
        own, noise, conditioning(cond), conditioning(uncond), latent=latent, mask=mask[:, None]
    )
    close(theirs, ours)


@pytest.mark.parametrize("adopted", (False, True))
def test_every_picture_of_a_batch_has_its_own_prompt(own, plain, adopted):
    model = apply_transformer(native_patcher()) if adopted else own
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    first, second, negative = embedding(9), embedding(5, seed=4), embedding(6, seed=5)
    hidden = torch.zeros(2, 9, SMALL.context_dim)
    hidden[0], hidden[1, :5] = first.hidden[0], second.hidden[0]
    cond = conditioning(TextEmbedding(hidden, torch.tensor([9, 5])))
    cond[0][1]["chroma_lengths"] = torch.tensor([9, 5])
    together = comfy_sample(model, noise, cond, conditioning(negative))
    alone = [
        sample_latent(
            Denoiser(plain, text, negative, 4.0), SAMPLERS["euler"], SIGMAS, noise[i : i + 1],
            torch.zeros_like(noise[:1]), disable_progress=True,
        )
        for i, text in enumerate((first, second))
    ]  # fmt: skip
    close(together, torch.cat(alone))


def test_the_original_model_stays_native():
    native = native_patcher()
    kind = type(native.model.diffusion_model)
    noise, cond = torch.randn(1, 16, 8, 8), conditioning(embedding())
    before = comfy_sample(native, noise, cond, cond)
    adopted = apply_transformer(native)
    first = comfy_sample(adopted, noise, cond, cond)
    after = comfy_sample(native, noise, cond, cond)
    assert type(native.model.diffusion_model) is kind
    assert "diffusion_model" not in native.object_patches
    assert torch.equal(before, after)
    # The native final layer reads other modulation rows at this depth, so the two must differ.
    assert (first - before).abs().max() > 0.01
    assert torch.equal(comfy_sample(adopted, noise, cond, cond), first)


def test_a_model_is_freed_as_soon_as_nobody_holds_it():
    native = native_patcher()
    adopted, alive = apply_transformer(native), weakref.ref(native.model)
    adopted.patch_model()
    gc.disable()
    try:
        del native, adopted
        assert alive() is None
    finally:
        gc.enable()


def test_applying_twice_keeps_the_first_adoption():
    once = apply_transformer(native_patcher())
    twice = apply_transformer(once)
    assert twice is not once
    assert twice.get_model_object("diffusion_model") is once.get_model_object("diffusion_model")


def test_a_clone_with_a_model_of_its_own_adopts_that_one():
    adopted, other = apply_transformer(native_patcher()), native_patcher(seed=9)
    other.object_patches = adopted.object_patches.copy()
    for callback in adopted.get_all_callbacks(CallbacksMP.ON_CLONE):
        callback(adopted, other)
    transformer = other.get_model_object("diffusion_model")
    assert isinstance(transformer, HostTransformer)
    assert transformer.img_in is other.model.diffusion_model.img_in
    noise, text = torch.randn(1, 16, 8, 8), embedding()
    ours = sample_latent(
        Denoiser(random_transformer(seed=9), text), SAMPLERS["euler"], SIGMAS, noise,
        torch.zeros_like(noise), disable_progress=True,
    )  # fmt: skip
    close(comfy_sample(other, noise, conditioning(text), conditioning(text), cfg=1.0), ours)
    clone = adopted.clone()
    assert clone.get_model_object("diffusion_model") is adopted.get_model_object("diffusion_model")


def lora_for(weight, name, seed=7):
    g = torch.Generator().manual_seed(seed)
    up = torch.randn(weight.shape[0], 4, generator=g) * 0.2
    down = torch.randn(4, weight.shape[1], generator=g) * 0.2
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, up @ down


@pytest.mark.parametrize("adopted", (False, True))
def test_a_lora_by_comfyui_takes_effect_and_comes_off_again(own, adopted):
    model = apply_transformer(native_patcher()) if adopted else own
    reference = random_transformer()
    layer = reference.double_blocks[1].img_attn.qkv
    lora, delta = lora_for(layer.weight, "diffusion_model.double_blocks.1.img_attn.qkv")
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0.0)
    noise, text = torch.randn(1, 16, 8, 8), embedding()
    cond = conditioning(text)

    def expected():
        return sample_latent(
            Denoiser(reference, text), SAMPLERS["euler"], SIGMAS, noise,
            torch.zeros_like(noise), disable_progress=True,
        )  # fmt: skip

    without = comfy_sample(model, noise, cond, cond, cfg=1.0)
    close(without, expected())
    with torch.no_grad():
        layer.weight += 0.7 * delta
    with_lora = comfy_sample(patched, noise, cond, cond, cfg=1.0)
    close(with_lora, expected(), 1e-3)
    assert (with_lora - without).abs().max() > 0.01
    close(comfy_sample(model, noise, cond, cond, cfg=1.0), without, 1e-6)


def test_diffusers_lora_names_are_known(own):
    keys = comfy.lora.model_lora_keys_unet(own.model, {})
    assert "transformer.transformer_blocks.0.attn.to_q" in keys
    assert "lora_unet_double_blocks_0_img_attn_qkv" in keys


@pytest.mark.parametrize("lengths", ((7, 7), (7, 5)))
def test_modulation_is_computed_once_per_sigma(own, lengths):
    calls = []
    layer = own.model.diffusion_model.distilled_guidance_layer
    handle = layer.register_forward_hook(lambda *args: calls.append(args[1][0].shape[0]))
    noise = torch.randn(2, 16, 8, 8)
    cond, uncond = (conditioning(embedding(n)) for n in lengths)
    comfy_sample(own, noise, cond, uncond)
    handle.remove()
    assert calls == [1] * (len(SIGMAS) - 1)


def test_modulation_is_not_shared_where_prompts_change_the_weights():
    def executor(*args):
        return args

    conds = {"positive": [{"hooks": object()}], "negative": [{}]}
    executor.class_obj = SimpleNamespace(conds=conds, model_options={})
    assert host_model.share_modulation(executor, 1, 2) == (1, 2)
    assert executor.class_obj.model_options == {}


def test_two_runs_with_other_weights_share_nothing(own):
    noise, cond = torch.randn(1, 16, 8, 8), conditioning(embedding())
    first = comfy_sample(own, noise, cond, cond)
    layer = own.model.diffusion_model.distilled_guidance_layer.out_proj
    layer.bias.data += 0.5
    assert (comfy_sample(own, noise, cond, cond) - first).abs().max() > 0.01


def hooked(transformer, **options):
    with torch.no_grad():
        return transformer(*case(), transformer_options=options)


def test_block_replacements_see_and_change_what_comfyuis_own_would(own):
    transformer = own.model.diffusion_model
    seen = []

    def watch(args, extra):
        seen.append(args)
        return extra["original_block"](args)

    def skip(args, extra):
        return {"img": args["img"], "txt": args.get("txt")}

    plain_out = hooked(transformer)
    sites = {("double_block", 1): watch, ("single_block", 2): watch}
    close(hooked(transformer, patches_replace={"dit": sites}), plain_out, 1e-6)
    assert set(seen[0]) == {"img", "txt", "vec", "pe", "attn_mask", "transformer_options"}
    assert set(seen[1]) == {"img", "vec", "pe", "attn_mask", "transformer_options"}
    last = seen[1]["transformer_options"]
    assert (last["block_index"], last["block_type"], last["total_blocks"]) == (2, "single", 3)
    assert last["img_slice"] == [7, 37]
    changed = hooked(transformer, patches_replace={"dit": {("double_block", 0): skip}})
    assert (changed - plain_out).abs().max() > 0.01


def test_attention_patches_and_overrides_take_part():
    transformer = adopt(native_chroma().diffusion_model)
    plain_out, slices, calls = hooked(transformer), [], []

    def output_patch(out, extra):
        slices.append(extra["img_slice"])
        return out * 0.5

    def override(function, *args, **kwargs):
        calls.append(kwargs["transformer_options"]["block_index"])
        return function(*args, **kwargs)

    changed = hooked(transformer, patches={"attn1_output_patch": [output_patch]})
    assert (changed - plain_out).abs().max() > 0.01
    assert slices == [[7, 37]] * 5
    close(hooked(transformer, optimized_attention_override=override), plain_out, 1e-6)
    assert calls == [0, 1, 0, 1, 2]


def test_a_patch_before_the_rotation_is_left_to_comfyuis_block():
    native = native_chroma().diffusion_model
    transformer, seen = adopt(native), []

    def patch(q, k, v, **_):
        seen.append(q.shape)
        return {"q": q, "k": k, "v": v}

    close(hooked(transformer, patches={"attn1_patch": [patch]}), hooked(transformer))
    assert seen in ([], [(2, 2, 37, 64)] * 5)  # none where ComfyUI has no such patch yet


def test_wrappers_around_the_diffusion_model_run(own):
    def double(executor, *args, **kwargs):
        return 2 * executor(*args, **kwargs)

    wrappers = {WrappersMP.DIFFUSION_MODEL: {"test": [double]}}
    transformer = own.model.diffusion_model
    close(hooked(transformer, wrappers=wrappers), 2 * hooked(transformer), 1e-6)


def test_an_interrupt_stops_within_one_step(own):
    calls = []

    def interrupt(args, extra):
        calls.append(1)
        comfy.model_management.interrupt_current_processing(True)
        return extra["original_block"](args)

    sites = {("double_block", 0): interrupt, ("double_block", 1): interrupt}
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        hooked(own.model.diffusion_model, patches_replace={"dit": sites})
    assert calls == [1]


def test_guidance_is_ignored_with_a_warning(own, caplog):
    noise, text = torch.randn(1, 16, 8, 8), embedding()
    without = comfy_sample(own, noise, conditioning(text), conditioning(text), cfg=1.0)
    guided = conditioning(text, guidance=3.5)
    with caplog.at_level(logging.WARNING, "chroma"):
        assert torch.equal(comfy_sample(own, noise, guided, guided, cfg=1.0), without)
    assert "Remove FluxGuidance" in caplog.text


def test_gradients_flow_through_the_adopted_model():
    transformer = adopt(native_chroma().diffusion_model)
    latent, sigma, context = case()
    transformer(latent.requires_grad_(), sigma, context).square().mean().backward()
    assert latent.grad is not None and latent.grad.abs().max() > 0


def test_another_model_is_refused():
    model = ModelPatcher(nn.Sequential(nn.Linear(2, 2)), CPU, CPU)
    model.model.diffusion_model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="this MODEL is Linear, which has no img_in"):
        apply_transformer(model)


def test_a_small_file_is_built_here(files, plain):
    model = load_model(files["diffusion_models"], "fp32")
    latent, sigma, context = case()
    with torch.no_grad():
        ours = model.model.diffusion_model(latent, sigma, context)
    close(ours, plain(latent, sigma, context), 1e-5)


def test_bf16_weights_halve_the_memory(files):
    sizes = [load_model(files["diffusion_models"], name).model_size() for name in ("fp32", "bf16")]
    assert 1.8 < sizes[0] / sizes[1] < 2.01


def header_only(path, tensors):
    """A file with this header and zeros behind it, which take no room on most disks."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = {"BF16": 2, "F8_E4M3": 1, "U8": 1, "F32": 4}[dtype] * int(torch.tensor(shape).prod())
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def full_width_tensors():
    config = dataclasses.replace(host_model.ChromaConfig(), double_depth=1, single_depth=1)
    with torch.device("meta"):
        state = host_model.ChromaTransformer(config).state_dict()
    return {name: ("BF16", tuple(tensor.shape) or (1,)) for name, tensor in state.items()}


def test_a_file_of_the_published_width_is_loaded_by_comfyui(tmp_path, monkeypatch):
    loaded = []

    def core(path, model_options):
        loaded.append((path, model_options))
        return native_patcher()

    monkeypatch.setattr(comfy.sd, "load_diffusion_model", core)
    header_only(tmp_path / "hd.safetensors", full_width_tensors())
    model = load_model(tmp_path / "hd.safetensors", "fp16")
    assert loaded == [(str(tmp_path / "hd.safetensors"), {"dtype": torch.float16})]
    assert isinstance(model.get_model_object("diffusion_model"), HostTransformer)


def test_damaged_and_foreign_files_are_refused(files, tmp_path):
    whole = files["diffusion_models"].read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"cut.safetensors is damaged or incomplete"):
        load_model(cut, "auto")
    with pytest.raises(CheckpointError, match="is a T5 text encoder, expected a Chroma"):
        load_model(files["text_encoders"], "auto")
    state = load_file(files["diffusion_models"])
    bad = {**state, "img_in.weight": state["img_in.weight"] * float("nan")}
    save_file(bad, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match=r"img_in.weight holds NaN"):
        load_model(tmp_path / "nan.safetensors", "auto")
    del state["double_blocks.0.txt_mlp.2.bias"]
    save_file(state, tmp_path / "hole.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors \(double_blocks.0.txt_mlp.2.bias"):
        load_model(tmp_path / "hole.safetensors", "auto")
