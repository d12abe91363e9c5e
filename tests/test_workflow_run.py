"""Workflows without ComfyUI: what runs, and what is refused with which line."""

import copy
import gc
import json
import math
import weakref

import pytest
import torch
from chroma_nodes.chroma.checkpoint import load_text_encoder, load_transformer
from chroma_nodes.chroma.errors import WorkflowError
from chroma_nodes.chroma.image import load_image
from chroma_nodes.chroma.pipeline import Pipeline, Settings, generate
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.chroma.workflow import (
    REGISTRY,
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
        (changed("9", sampler_name="dpm"), "expected one of flow_pec, euler"),
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
         r"node 4 \(ChromaModelShift\): 16384 x 16384 pixels give mu 956 .* lower max_shift"),
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


def test_models_that_do_not_belong_together_are_named(tmp_path, tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    write_small_files(models)
    line = error_of(changed("1", model_name="random.safetensors"), tmp_path, models_dir=models)
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
