"""Workflows without ComfyUI: what runs, and what is refused with which line."""

import copy
import gc
import itertools
import json
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.checkpoint import load_text_encoder, load_transformer
from chroma_nodes.chroma.errors import ImageError, WorkflowError
from chroma_nodes.chroma.image import load_image
from chroma_nodes.chroma.pipeline import Pipeline, Settings, generate
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.chroma.workflow import (
    REGISTRY,
    Context,
    apply_overrides,
    check,
    nodes_chroma,
    read_prompt,
    run_workflow,
    to_interface,
)
from comfy_inprocess import write_small_files
from PIL import Image
from workflow_files import API, INPUTS, load, on_small_model

CPU = torch.device("cpu")
# Made by ComfyUI's own functions: {table of sigmas: {scheduler: {steps: sigmas}}}.
REFERENCE = json.loads((Path(__file__).parent / "data" / "reference_sigmas.json").read_text())


def graph(name="chroma-small", steps=2):
    prompt = on_small_model(load(next(p for p in API if p.stem == name)))
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = steps
    return prompt


def run(prompt, tmp_path, **kw):
    kw = {"input_dir": INPUTS, "output_dir": tmp_path, "device": CPU, **kw}
    return run_workflow(prompt, **kw)


def error_of(prompt, tmp_path, **kw):
    with pytest.raises(WorkflowError) as error:
        run(prompt, tmp_path, **kw)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    return str(error.value)


def changed(node, **inputs):
    prompt = graph()
    prompt[node]["inputs"].update(inputs)
    return prompt


@pytest.mark.parametrize("path", API, ids=lambda p: p.stem)
def test_every_bundled_workflow_is_valid_and_runs_on_the_small_model(path, tmp_path):
    assert [node.id for node in check(load(path), REGISTRY)]
    (saved,) = run(graph(path.stem), tmp_path)
    with Image.open(saved) as file:
        assert file.size == (128, 128)
        assert json.loads(file.text["prompt"]) == graph(path.stem)


def test_the_graph_equals_the_library_call(tmp_path):
    (saved,) = run(graph(steps=3), tmp_path)
    pipeline = Pipeline.load(device=CPU, dtype=torch.float32)
    text = graph()["5"]["inputs"]["text"]
    settings = Settings(width=128, height=128, steps=3, seed=1)
    expected = generate(pipeline, [text], "", settings, disable_progress=True)
    assert (load_image(saved)[0] - expected).abs().max() <= 1 / 255


def test_denoise_zero_returns_the_picture(tmp_path):
    prompt = graph("chroma-image-to-image")
    prompt["10"]["inputs"]["denoise"] = 0.0
    (saved,) = run(prompt, tmp_path)
    before, _ = load_image(INPUTS / "example.png")
    assert (load_image(saved)[0] - before).abs().mean() < 0.03


def test_file_names_count_on_and_may_hold_a_folder(tmp_path):
    prompt = graph()
    prompt["14"]["inputs"]["filename_prefix"] = "a/%width%x"
    first, second = run(prompt, tmp_path) + run(prompt, tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in (first, second)] == [
        "a/128x_00001_.png", "a/128x_00002_.png",
    ]  # fmt: skip


def test_nodes_the_outputs_do_not_need_are_not_run(tmp_path):
    prompt = graph()
    prompt["99"] = {"class_type": "LoadImage", "inputs": {"image": "missing.png"}}
    assert len(run(prompt, tmp_path)) == 1


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (changed("10", steps=0), r"node 10 \(ChromaBetaScheduler\), input steps: 0 is not usable"),
        (changed("11", cfg=math.nan), r"node 11 \(CFGGuider\), input cfg: nan"),
        (changed("11", cfg="much"), "input cfg: 'much' is not usable; expected a number"),
        (changed("11", cfg={"a": 1}), "input cfg"),
        (changed("7", width=8), "input width: 8 is not usable"),
        (changed("9", sampler_name="dpm"), "expected one of euler, heun"),
        (changed("8", noise_seed=-1), "input noise_seed: -1"),
        (changed("4", model=["77", 0]), "linked to node 77, which does not exist"),
        (changed("4", model=["1", 3]), r"output 3 of node 1 \(ChromaLoadModel\), which has 1"),
        (changed("4", model=["3", 0]), "type VAE of node 3 .*; expected type MODEL"),
        (changed("4", model=["1"]), "is not a link"),
        (changed("4", model="1"), "is not a link"),
        (changed("4", model=["4", 0]), "node 4 .*cycle"),
        (changed("1", model_name="../x.safetensors"), "leads out of its folder"),
        (changed("1", model_name="/x.safetensors"), "leads out of its folder"),
        (changed("1", model_name="C:\\x.safetensors"), "leads out of its folder"),
        (changed("1", model_name="a\\..\\..\\x.sft"), "leads out of its folder"),
        (changed("14", filename_prefix="../x"), r"node 14 \(SaveImage\), .* leads out of its"),
        (changed("14", filename_prefix="."), "'.' is no file name"),
        (changed("14", filename_prefix="a" * 300), "is no file name"),
        (changed("14", filename_prefix="\ud800"), "is no file name"),
        (changed("1", model_name=""), "is no file name"),
        (changed("4", mode="resolution", max_shift=4.0, width=16384, height=16384),
         r"node 4 \(ChromaModelShift\): a shift of e\^956 is too large"),
        (changed("1", model_name="none.safetensors"),
         r"node 1 \(ChromaLoadModel\): the file none.safetensors is not in"),
        ({}, "not a workflow"),
        ([], "not a workflow"),
        ({"1": {"inputs": {}}}, "not a workflow"),
        ({"1": {"class_type": "DisableNoise", "_meta": None}}, "not a workflow"),
        ({"nodes": [], "links": []}, r"Export \(API\)"),
        ({"1": {"class_type": "UNETLoader", "inputs": {}}}, r"node 1 \(UNETLoader\): unknown node"),
        ({"1": {"class_type": "KSampler", "inputs": {}}}, "input model: missing"),
        ({"1": {"class_type": "DisableNoise", "inputs": {}}}, "no output; add a SaveImage"),
    ],
)  # fmt: skip
def test_refused_with_one_line(prompt, says, tmp_path):
    with pytest.raises(WorkflowError, match=says) as error:
        run(prompt, tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_late_failure_names_the_node_and_leaves_nothing(tmp_path):
    prompt = graph("chroma-image-to-image")
    prompt["15"]["inputs"]["image"] = "missing.png"
    assert error_of(prompt, tmp_path).startswith("node 15 (LoadImage): ")


def test_a_model_of_another_kind_is_named(tmp_path):
    (tmp_path / "m" / "diffusion_models").mkdir(parents=True)
    wrong = tmp_path / "m" / "diffusion_models" / "t5.safetensors"
    wrong.write_bytes(small.TEXT_ENCODER.read_bytes())
    out = tmp_path / "out"
    out.mkdir()
    line = error_of(changed("1", model_name="t5.safetensors"), out, models_dir=tmp_path / "m")
    assert (
        "node 1 (ChromaLoadModel): t5.safetensors is a T5 text encoder, expected a Chroma" in line
    )


def test_overrides_by_id_title_and_class():
    prompt = graph()
    prompt["5"]["_meta"] = {"title": "Words"}
    new = apply_overrides(prompt, ["10.steps=9", "Words.text=a = b", "CFGGuider.cfg=2.5"])
    assert new["10"]["inputs"]["steps"] == 9
    assert new["5"]["inputs"]["text"] == "a = b"
    assert new["11"]["inputs"]["cfg"] == 2.5
    assert prompt["10"]["inputs"]["steps"] == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("steps=9", "expected node.input=value"),
        ("10.steps", "expected node.input=value"),
        ("10.stepz=9", "has no input stepz; expected one of model, steps"),
        ("77.cfg=1", "there is no node 77"),
        ("CFGGuide.cfg=1", "there is no node CFGGuide; did you mean CFGGuider"),
        ("ChromaTextEncode.text=x", "2 nodes are called ChromaTextEncode"),
    ],
)
def test_bad_overrides(override, says):
    with pytest.raises(WorkflowError, match=says):
        apply_overrides(graph(), [override])


@pytest.mark.parametrize("text", ["", "{", "\x00", "[" * 100_000])
def test_files_that_are_no_json(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(WorkflowError, match=r"x\.json is not a JSON file"):
        read_prompt(tmp_path / "x.json")
    with pytest.raises(WorkflowError, match="does not exist"):
        read_prompt(tmp_path / "y.json")


def test_a_long_chain_does_not_exhaust_the_stack():
    prompt = {"0": {"class_type": "ChromaLoadModel", "inputs": {}}}
    for i in range(1, 3000):
        prompt[str(i)] = {
            "class_type": "ChromaApplyTransformer", "inputs": {"model": [str(i - 1), 0]},
        }  # fmt: skip
    rest = copy.deepcopy(graph())
    rest["4"]["inputs"]["model"] = ["2999", 0]
    prompt |= {f"x{k}": v for k, v in rest.items()}
    for node in rest.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in rest:
                node["inputs"][name] = [f"x{value[0]}", value[1]]
    assert len(check(prompt, REGISTRY)) >= 3000


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


SCALE, SHIFT = 0.3611, 0.1159


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


def test_a_preview_is_saved(tmp_path):
    prompt = graph()
    prompt["14"] = {"class_type": "PreviewImage", "inputs": {"images": ["13", 0]}}
    (saved,) = run(prompt, tmp_path)
    assert saved.name == "preview_00001_.png"


def test_the_text_encoder_is_gone_before_the_transformer_is_read(monkeypatch, tmp_path):
    alive, seen = [], []

    def load_text(path, **kw):
        model = load_text_encoder(path, **kw)
        alive.append(weakref.ref(model))
        return model

    def load_model(path, **kw):
        gc.collect()
        seen.append([model() is None for model in alive])
        return load_transformer(path, **kw)

    monkeypatch.setattr(nodes_chroma, "load_text_encoder", load_text)
    monkeypatch.setattr(nodes_chroma, "load_transformer", load_model)
    run(graph(), tmp_path)
    assert seen == [[True]]


def test_models_that_do_not_belong_together_are_named(random_models, tmp_path):
    prompt = changed("1", model_name="random.safetensors")
    line = error_of(prompt, tmp_path, models_dir=random_models)
    assert line.startswith("node 11 (CFGGuider): the text encoder makes vectors of 192, ")
    assert "reads 48" in line


def test_a_cycle_names_only_the_nodes_in_it(tmp_path):
    prompt = graph()
    prompt["20"] = {"class_type": "ChromaApplyTransformer", "inputs": {"model": ["4", 0]}}
    prompt["4"]["inputs"]["model"] = ["20", 0]
    line = error_of(prompt, tmp_path)
    assert "4 -> 20 -> 4" in line or "20 -> 4 -> 20" in line
    assert "11" not in line and "14" not in line


def test_a_missing_file_is_told_before_anything_is_computed(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("a model was read")

    for name in ("load_text_encoder", "load_transformer", "load_autoencoder"):
        monkeypatch.setattr(nodes_chroma, name, refuse)
    line = error_of(changed("3", vae_name="none.safetensors"), tmp_path)
    assert line.startswith("node 3 (ChromaLoadVAE): the file none.safetensors is not in ")


def test_a_picture_holds_a_workflow_for_the_interface(tmp_path):
    (saved,) = run(graph(), tmp_path)
    with Image.open(saved) as file:
        workflow = json.loads(file.text["workflow"])
    nodes = {node["type"]: node for node in workflow["nodes"]}
    assert len(workflow["nodes"]) == len(graph())
    assert nodes["RandomNoise"]["widgets_values"] == [1, "fixed"]
    assert nodes["ChromaBetaScheduler"]["widgets_values"] == [2, 0.6, 0.6, 1.0, False]
    assert nodes["CFGGuider"]["widgets_values"] == [4.0]


def test_interface_entries_of_linked_widgets_and_uploads():
    flash = to_interface(load(next(p for p in API if p.stem == "chroma-flash")), REGISTRY)
    guider = next(n for n in flash["nodes"] if n["type"] == "CFGGuider")
    cfg = next(i for i in guider["inputs"] if i["name"] == "cfg")
    assert cfg["widget"] == {"name": "cfg"} and cfg["link"] is not None
    source = next(link for link in flash["links"] if link[0] == cfg["link"])
    assert source[2] == 3 and source[5] == "FLOAT"

    prompt = load(next(p for p in API if p.stem == "chroma-inpaint"))
    prompt["15"]["class_type"] = "LoadImageMask"
    prompt["16"] = {"class_type": "EmptyLatentImage", "inputs": {}}
    prompt["17"]["inputs"]["mask"] = ["15", 0]
    masked = to_interface(prompt, REGISTRY)
    (node,) = (n for n in masked["nodes"] if n["type"] == "LoadImageMask")
    assert node["widgets_values"] == ["example-with-hole.png", "alpha", "image"]
    (node,) = (n for n in masked["nodes"] if n["type"] == "EmptyLatentImage")
    assert node["widgets_values"] == [512, 512, 1]
