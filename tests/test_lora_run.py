"""LoRAs in workflows and on the command line, against files with the merged weights."""

import argparse
import logging

import pytest
import torch
from chroma_nodes.chroma.checkpoint import load_text_encoder, load_transformer
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.errors import LoraError, WorkflowError
from chroma_nodes.chroma.image import load_image
from chroma_nodes.chroma.lora.apply import apply_lora
from chroma_nodes.chroma.lora.arguments import LoraArgument, add_lora_arguments, loras_from
from chroma_nodes.chroma.lora.read import read_lora
from chroma_nodes.chroma.lora.strengths import Strengths
from chroma_nodes.chroma.pipeline import Pipeline, Settings, generate
from chroma_nodes.chroma.presets import FLASH
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.chroma.workflow import REGISTRY, Context, nodes_lora, run_workflow
from chroma_nodes.chroma.workflow.insert_loras import insert_loras, lora_files
from chroma_nodes.schedulers import get_sigmas
from lora_files import TEXT_PREFIX, linears, merged, write_lora
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")
PROMPT = "a 3d emoji of a red apple on a white background"
SETTINGS = Settings(width=64, height=64, steps=3, seed=5)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for node in nodes_lora.NODES:
        monkeypatch.setitem(REGISTRY, node.id, node)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A models folder: two LoRAs, one of them for the text encoder too, and what they make."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("loras", "diffusion_models", "text_encoders"):
        (folder / name).mkdir()
    base = load_transformer(small.TRANSFORMER, dtype=torch.float32)
    text = load_text_encoder(small.TEXT_ENCODER, dtype=torch.float32)
    style = write_lora(folder / "loras" / "style.safetensors", linears(base), size=0.15)
    both = write_lora(folder / "loras" / "both.safetensors", linears(base), size=0.1, seed=1)
    text_part = write_lora(folder / "text.safetensors", linears(text), TEXT_PREFIX, size=0.4)
    file = load_file(folder / "loras" / "both.safetensors")
    save_file(file | load_file(folder / "text.safetensors"), folder / "loras" / "both.safetensors")
    model = merged(base.state_dict(), [(style, 0.7), (both, -0.5)])
    save_file(model, folder / "diffusion_models" / "merged.safetensors")
    model = merged(base.state_dict(), [(style, 0.7)])
    save_file(model, folder / "diffusion_models" / "style.safetensors")
    clip = merged(text.state_dict(), [(text_part, 0.8)])
    save_file(clip, folder / "text_encoders" / "merged.safetensors")
    tokenizer = folder / "text_encoders" / "tokenizer.json"
    tokenizer.write_bytes(small.TOKENIZER.read_bytes())
    return folder


def graph(model=small.LABEL, text_encoder=small.LABEL):
    """A picture in fp32 from loaders 1 (MODEL) and 2 (CLIP)."""

    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    return {
        "1": node("ChromaLoadModel", model_name=model, weight_dtype="fp32"),
        "2": node("ChromaLoadTextEncoder", text_encoder_name=text_encoder, weight_dtype="fp32"),
        "3": node("ChromaLoadVAE", vae_name=small.LABEL),
        "5": node("CLIPTextEncode", clip=["2", 0], text=PROMPT),
        "7": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "8": node(
            "KSampler", model=["1", 0], seed=5, steps=3, cfg=1.0, sampler_name="euler",
            scheduler="simple", positive=["5", 0], negative=["5", 0], latent_image=["7", 0],
            denoise=1.0,
        ),
        "9": node("VAEDecode", samples=["8", 0], vae=["3", 0]),
        "10": node("SaveImage", images=["9", 0]),
    }  # fmt: skip


def with_nodes(added, model, clip=("2", 0)):
    """The graph with further nodes, whose MODEL and CLIP are used."""
    prompt = graph()
    prompt |= {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in added.items()}
    prompt["8"]["inputs"]["model"] = list(model)
    prompt["5"]["inputs"]["clip"] = list(clip)
    return prompt


def picture(prompt, folder, out, **kw):
    paths = run_workflow(
        prompt, models_dir=folder, input_dir=folder, output_dir=out, device=CPU, **kw
    )
    return load_image(paths[0])[0]


def load(lora, model, clip=None, **inputs):
    """Inputs of ChromaLoadLora."""
    links = {"model": model} if clip is None else {"model": model, "clip": clip}
    return "ChromaLoadLora", {**links, "lora_name": f"{lora}.safetensors", **inputs}


TEXT = {"strength": -0.5, "text_encoder_strength": 0.8}
CHAINS = {
    "two nodes": (
        {"20": load("style", ["1", 0], strength=0.7),
         "21": load("both", ["20", 0], ["2", 0], **TEXT)},
        ("21", 0), ("21", 1),
    ),
    "bypass": (
        {"20": load("style", ["1", 0], strength=0.7, how="bypass"),
         "21": load("both", ["20", 0], ["2", 0], **TEXT, how="bypass")},
        ("21", 0), ("21", 1),
    ),
    "stack": (
        {"20": ("ChromaLoraStack", {
            "model": ["1", 0], "clip": ["2", 0], "lora_1": "style.safetensors",
            "strength_1": 0.7, "lora_3": "both.safetensors", "strength_3": -0.5,
            "text_encoder_strength_3": 0.8})},
        ("20", 0), ("20", 1),
    ),
    "stack on a stack": (
        {"20": ("ChromaLoraStack", {
            "model": ["1", 0], "lora_1": "style.safetensors", "strength_1": 0.7}),
         "21": ("ChromaLoraStack", {
            "model": ["1", 0], "clip": ["2", 0], "lora_stack": ["20", 2],
            "lora_1": "both.safetensors", "strength_1": -0.5, "text_encoder_strength_1": 0.8})},
        ("21", 0), ("21", 1),
    ),
    "core": (
        {"20": ("LoraLoaderModelOnly", {
            "model": ["1", 0], "lora_name": "style.safetensors", "strength_model": 0.7}),
         "21": ("LoraLoader", {
            "model": ["20", 0], "clip": ["2", 0], "lora_name": "both.safetensors",
            "strength_model": -0.5, "strength_clip": 0.8})},
        ("21", 0), ("21", 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS)
def test_every_way_to_load_equals_the_merged_file(folder, tmp_path, chain):
    expected = picture(graph("merged.safetensors", "merged.safetensors"), folder, tmp_path)
    without = picture(graph(), folder, tmp_path)
    found = picture(with_nodes(*CHAINS[chain]), folder, tmp_path)
    assert float((found - expected).abs().max()) <= 1 / 255 + 1e-6
    assert float((without - expected).abs().mean()) > 0.02


def test_a_branch_without_the_lora_stays_without_it(folder, tmp_path):
    expected = picture(graph(), folder, tmp_path / "a")
    added, model, clip = CHAINS["two nodes"]
    prompt = with_nodes(added, model, clip)
    for key, before in (("5", "15"), ("8", "18"), ("9", "19"), ("10", "30")):
        prompt[before] = {**graph()[key], "inputs": dict(graph()[key]["inputs"])}
    prompt["18"]["inputs"] |= {"positive": ["15", 0], "negative": ["15", 0]}
    prompt["19"]["inputs"]["samples"], prompt["30"]["inputs"]["images"] = ["18", 0], ["19", 0]
    prompt["30"]["inputs"]["filename_prefix"] = "plain"
    picture(prompt, folder, tmp_path / "b")
    plain, _ = load_image(next((tmp_path / "b").glob("plain*")))
    assert torch.equal(plain, expected)


def test_strength_0_is_the_picture_without(folder, tmp_path):
    added = {"20": load("both", ["1", 0], ["2", 0], strength=0, text_encoder_strength=0)}
    found = picture(with_nodes(added, ("20", 0), ("20", 1)), folder, tmp_path)
    assert torch.equal(found, picture(graph(), folder, tmp_path))


def test_blocks_of_the_node(folder, tmp_path):
    added = {"20": load("style", ["1", 0], strength=0.7, blocks="double: 0, single: 0, other: 0")}
    found = picture(with_nodes(added, ("20", 0)), folder, tmp_path)
    assert torch.equal(found, picture(graph(), folder, tmp_path))
    added["20"][1]["blocks"] = "double 0-1: 1, single 9: 1"
    with pytest.raises(WorkflowError, match=r"node 20 \(ChromaLoadLora\): block strengths: .* 9"):
        picture(with_nodes(added, ("20", 0)), folder, tmp_path)


def test_a_missing_file_is_found_before_anything_runs(folder, tmp_path):
    added = {"20": load("gone", ["1", 0])}
    with pytest.raises(WorkflowError, match=r"gone\.safetensors is not in .*loras"):
        picture(with_nodes(added, ("20", 0)), folder, tmp_path)
    stack = {"20": ("ChromaLoraStack", {"model": ["1", 0], "lora_1": "../x.safetensors"})}
    with pytest.raises(WorkflowError, match="leads out of its folder"):
        picture(with_nodes(stack, ("20", 0)), folder, tmp_path)


def test_what_is_left_out_is_told(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "chroma"):
        added = {"20": load("both", ["1", 0])}
        picture(with_nodes(added, ("20", 0)), folder, tmp_path)
    assert "text encoder not applied, as no CLIP is connected" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "chroma"):
        picture(with_nodes({"20": load("style", ["1", 0])}, ("20", 0)), folder, tmp_path)
    assert caplog.text == ""


def test_info_tells_what_is_in_a_file(folder, tmp_path):
    context = Context(CPU, folder, folder, tmp_path, {}, progress=False)
    (model,) = REGISTRY["ChromaLoadModel"].run(context, model_name=small.LABEL, weight_dtype="fp32")
    info = REGISTRY["ChromaLoraInfo"]
    (text,) = info.run(context, lora_name="style.safetensors", model=model)
    assert text.startswith("style.safetensors: ") and "rank 4" in text
    with pytest.raises(LoraError):  # not of Chroma1's size
        info.run(context, lora_name="style.safetensors", model=None)
    prompt = {"1": graph()["1"], "2": {"class_type": "ChromaLoraInfo", "inputs": {
        "lora_name": "style.safetensors", "model": ["1", 0]}}}  # fmt: skip
    assert run_workflow(prompt, models_dir=folder, output_dir=tmp_path, device=CPU) == []


def test_flash_lora_brings_sampler_sigmas_and_cfg(folder, tmp_path):
    prompt = graph()
    prompt["20"] = {
        "class_type": "ChromaFlashLora",
        "inputs": {
            "model": ["1", 0],
            "lora_name": "style.safetensors",
            "strength": 0.7,
            "steps": 3,
        },
    }
    prompt["11"] = {
        "class_type": "CFGGuider",
        "inputs": {
            "model": ["20", 0],
            "positive": ["5", 0],
            "negative": ["5", 0],
            "cfg": ["20", 3],
        },
    }
    prompt["12"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}}
    prompt["8"] = {"class_type": "SamplerCustomAdvanced", "inputs": {
        "noise": ["12", 0], "guider": ["11", 0], "sampler": ["20", 1], "sigmas": ["20", 2],
        "latent_image": ["7", 0]}}  # fmt: skip
    found = picture(prompt, folder, tmp_path)
    pipeline = Pipeline.load(
        folder / "diffusion_models" / "style.safetensors", small.TEXT_ENCODER, small.TOKENIZER,
        small.VAE, device=CPU, dtype=torch.float32,
    )  # fmt: skip
    settings = Settings(
        64, 64, 3, FLASH.cfg, 5, FLASH.sampler, FLASH.scheduler, FLASH.shift,
    )  # fmt: skip
    expected = generate(pipeline, [PROMPT], "", settings, disable_progress=True)
    assert len(get_sigmas(FLASH.scheduler, 3)) == 4
    assert float((found - expected).abs().max()) <= 1.5 / 255


def psnr(a, b):
    return float(-10 * torch.log10((a - b).square().mean()))


def test_the_same_lora_on_quantised_bases_keeps_to_their_own_error(folder, tmp_path):
    def render(path, lora):
        pipeline = Pipeline.load(
            path, small.TEXT_ENCODER, small.TOKENIZER, small.VAE, device=CPU, dtype=torch.float32
        )
        if lora:
            file = read_lora(folder / "loras" / "style.safetensors", pipeline.transformer.config)
            apply_lora(pipeline.transformer, [(file, Strengths())])
        return generate(pipeline, [PROMPT], "", SETTINGS, disable_progress=True)

    plain, styled = (render(small.TRANSFORMER, lora) for lora in (False, True))
    for target in ("q8_0", "fp8"):
        path = tmp_path / f"{target}.{'gguf' if target == 'q8_0' else 'safetensors'}"
        quantise_file(small.TRANSFORMER, target, path)
        own, found = (psnr(render(path, x), y) for x, y in ((False, plain), (True, styled)))
        assert found > own - 3 and found > psnr(plain, styled) + 10


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_lora_arguments(parser)
    return loras_from(parser.parse_args(arguments))


def test_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.safetensors"
    odd = tmp_path / "b:0.5"
    for file in (path, odd):
        file.touch()
    found = parse("--lora", str(path), "--lora", f"{path}:0.8", "--lora", "a.safetensors:-1",
                  "--lora", str(odd), "--lora", f"{odd}:2")  # fmt: skip
    assert [(lora.path.resolve(), lora.strength) for lora in found] == [
        (path, 1.0), (path, 0.8), (path, -1.0), (odd, 1.0), (odd, 2.0),
    ]  # fmt: skip
    assert parse() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (r"C:\loras\x.safetensors", r"C:\\loras\\x.safetensors: there is no such file"),
        (r"C:\loras\x.safetensors:0.5", r"x.safetensors:0.5: C:\\loras\\x.safetensors is not a"),
        ("here:nan", "here:nan: the strength is nan"),
        ("here:strong", "here:strong: there is no such file"),
        ("", "there is no such file"),
    ],
)
def test_unusable_arguments(text, message):
    with pytest.raises(LoraError, match=message):
        parse("--lora", text)


def test_drives_are_no_strengths(monkeypatch):
    """On Windows "C:\\x" exists; here what is a file is decided by name."""
    there = {r"C:\x.safetensors"}
    monkeypatch.setattr("pathlib.Path.is_file", lambda self: str(self) in there)
    (plain,), (strong,) = (
        parse("--lora", r"C:\x.safetensors"), parse("--lora", r"C:\x.safetensors:0.5")
    )  # fmt: skip
    assert (str(plain.path), plain.strength) == (r"C:\x.safetensors", 1.0)
    assert (str(strong.path), strong.strength) == (r"C:\x.safetensors", 0.5)


def test_arguments_become_nodes_of_the_graph(folder, tmp_path):
    style, both = (folder / "loras" / f"{name}.safetensors" for name in ("style", "both"))
    loras = [LoraArgument(style, 0.7), LoraArgument(both, -0.5)]
    prompt = insert_loras(graph(), loras, REGISTRY)
    added = [node for node in prompt.values() if node["class_type"] == "ChromaLoadLora"]
    assert len(added) == 2 and prompt["5"]["inputs"]["clip"] != ["2", 0]
    assert [node["inputs"].get("clip") for node in added] == [None, ["2", 0]]
    prompt[prompt["5"]["inputs"]["clip"][0]]["inputs"]["text_encoder_strength"] = 0.8
    expected = picture(graph("merged.safetensors", "merged.safetensors"), folder, tmp_path)
    found = picture(prompt, folder, tmp_path)
    assert float((found - expected).abs().max()) <= 1 / 255 + 1e-6


def test_without_arguments_the_graph_stays(folder):
    assert insert_loras(graph(), [], REGISTRY) == graph()


def test_a_lora_without_text_part_leaves_the_clip_alone(folder):
    style = LoraArgument(folder / "loras" / "style.safetensors")
    prompt = insert_loras(graph(), [style, style], REGISTRY)
    assert prompt["5"] == graph()["5"] and len(prompt) == len(graph()) + 2
    link = prompt["8"]["inputs"]["model"]
    links = [link, prompt[link[0]]["inputs"]["model"]]
    assert prompt[links[1][0]]["inputs"]["model"] == ["1", 0]


def test_files_of_one_name_stay_apart(folder, tmp_path):
    style = folder / "loras" / "style.safetensors"
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "style.safetensors"
    other.write_bytes(style.read_bytes())
    loras = [LoraArgument(style), LoraArgument(other), LoraArgument(style, 0.5)]
    files = lora_files(loras)
    assert set(files.values()) == {style, other} and len(files) == 2
    prompt = insert_loras(graph(), loras, REGISTRY)
    nodes = [n["inputs"] for n in prompt.values() if n["class_type"] == "ChromaLoadLora"]
    assert [files["loras", n["lora_name"]] for n in nodes] == [style, other, style]


def test_two_models_both_get_the_lora_and_a_second_clip_too(folder):
    prompt = graph()
    prompt["31"], prompt["32"], prompt["33"] = graph()["1"], graph()["2"], graph()["2"]
    prompt["38"] = {**graph()["8"], "inputs": {**graph()["8"]["inputs"], "model": ["31", 0]}}
    for key, clip in (("35", "32"), ("36", "33")):
        prompt[key] = {"class_type": "CLIPTextEncode", "inputs": {"clip": [clip, 0], "text": ""}}
    found = insert_loras(
        prompt, [LoraArgument(folder / "loras" / "both.safetensors", 0.5)], REGISTRY
    )
    assert len(found) == len(prompt) + 3
    for key, name, source in (("8", "model", "1"), ("38", "model", "31")):
        node = found[found[key]["inputs"][name][0]]["inputs"]
        assert (node["model"], node["strength"]) == ([source, 0], 0.5)
    for key, source in (("5", "2"), ("35", "32"), ("36", "33")):
        node = found[found[key]["inputs"]["clip"][0]]["inputs"]
        assert (node["clip"], node["text_encoder_strength"]) == ([source, 0], 0.5)
    assert found[found["36"]["inputs"]["clip"][0]]["inputs"]["strength"] == 0


def test_loras_need_a_model(folder):
    prompt = {"1": {"class_type": "LoadImage", "inputs": {"image": "x.png"}}}
    style = LoraArgument(folder / "loras" / "style.safetensors")
    with pytest.raises(WorkflowError, match="no node of the workflow loads a MODEL"):
        insert_loras(prompt, [style], REGISTRY)
