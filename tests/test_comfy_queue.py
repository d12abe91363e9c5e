"""The pack on a real ComfyUI server, over its HTTP queue. Set COMFYUI_PATH to a checkout."""

import io
import json
import os

import numpy as np
import pytest
from chroma_nodes.chroma.caching import CacheSettings
from chroma_nodes.chroma.guidance import Guidance
from chroma_nodes.chroma.nag import NAGSettings
from chroma_nodes.chroma.pipeline import Settings
from chroma_nodes.chroma.workflow import run_workflow
from chroma_nodes.chroma.workflow.single import Extras, text_to_image
from PIL import Image
from workflow_files import API, INPUTS, load, on_small_model

CHECKOUT = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="COMFYUI_PATH is not set: no real ComfyUI to test against"
)


def small_graph():
    return on_small_model(load(next(p for p in API if p.stem == "chroma-small")))


def graph_of(picture):
    """The graph in a picture, without what ComfyUI's cache adds to its nodes."""
    graph = json.loads(picture.text["prompt"])
    for node in graph.values():
        node.pop("is_changed", None)
    return graph


def sampler_node(prompt):
    return next(k for k, n in prompt.items() if n["class_type"] == "SamplerCustomAdvanced")


def test_the_pack_imports_without_a_warning(server):
    lines = [line for line in server.log().splitlines() if "chroma" in line.lower()]
    assert any("seconds" in line and "ComfyUI-Chroma" in line for line in lines)
    bad = ("IMPORT FAILED", "Error", "WARNING", "Traceback", "Cannot import")
    assert not [line for line in lines if any(mark in line for mark in bad)]


@pytest.mark.parametrize("path", API, ids=lambda p: p.stem)
def test_every_workflow_fits_the_object_info(server, path):
    info = server.get("/object_info")
    for node_id, node in load(path).items():
        schema = info[node["class_type"]]["input"]
        known = {**schema.get("required", {}), **schema.get("optional", {})}
        assert set(node["inputs"]) <= set(known), node_id
        assert set(schema.get("required", {})) <= set(node["inputs"]), node_id


@pytest.mark.parametrize("path", API, ids=lambda p: p.stem)
def test_every_workflow_runs_and_equals_the_standalone_picture(server, path, tmp_path):
    prompt = on_small_model(load(path))
    run = server.run(prompt)
    assert run.ending == "execution_success", run.data
    sampler = sampler_node(prompt)
    steps = [(value, top) for node, value, top in run.progress if node == sampler]
    assert steps and steps[-1][0] == steps[-1][1]
    assert [value for value, _ in steps] == sorted(value for value, _ in steps)
    assert run.previews and Image.open(io.BytesIO(run.previews[0])).size[0] > 0
    saved = run_workflow(prompt, input_dir=INPUTS, output_dir=tmp_path)
    ours = [path for path in saved if not path.name.startswith("preview")]
    for their_file, our_file in zip(server.pictures(run), ours, strict=True):
        with Image.open(their_file) as a, Image.open(our_file) as b:
            difference = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
            assert np.asarray(a).std() > 10
            assert graph_of(a) == graph_of(b) == prompt
        assert difference.max() <= 1


EXTRAS = {
    "batch of prompts": (
        ["a 3d emoji of a cat", "a flat emoji of a red apple on a blue background"],
        Settings(steps=4, seed=2**64 - 1, scheduler="power_odds", sampler="flow_pec"),
        Extras(
            Guidance(4.0, "linear", 2.0, interval_end=0.2), cache=CacheSettings(0.2),
            sampler_options={"order": 3, "eta": 0.4}, count=2, batch=3,
        ),
    ),
    "picture with a mask": (
        ["a 3d emoji of a cat"],
        Settings(steps=4, cfg=1.0, sampler="euler_ancestral", denoise=0.8, scheduler="normal"),
        Extras(
            nag=NAGSettings(), image="example.png", mask="example-with-hole.png",
            mask_channel="alpha", count=2, batch=2, sampler_options={"eta": 0.7},
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXTRAS)
def test_graphs_of_the_command_line_run_and_equal_the_standalone_pictures(server, name, tmp_path):
    prompts, settings, extras = EXTRAS[name]
    prompt = on_small_model(text_to_image(prompts, "blurry", settings, extras=extras))
    run = server.run(prompt)
    assert run.ending == "execution_success", run.data
    saved = run_workflow(prompt, input_dir=INPUTS, output_dir=tmp_path)
    assert len(saved) == len(prompts) * extras.count
    for their_file, our_file in zip(server.pictures(run), saved, strict=True):
        with Image.open(their_file) as a, Image.open(our_file) as b:
            difference = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
        assert difference.max() <= 1


def test_an_interrupt_stops_within_one_step(server):
    prompt = small_graph()
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 400
        if "noise_seed" in node["inputs"]:
            node["inputs"]["noise_seed"] = 987
    run = server.run(prompt, interrupt_at=5)
    assert run.ending == "execution_interrupted"
    assert max(value for _, value, _ in run.progress) <= 7
    again = server.run(small_graph())
    assert again.ending == "execution_success"


def test_core_nodes_take_everything_of_ours(server):
    """KSampler with our names in its lists, and CLIPTextEncode on our CLIP."""
    prompt = small_graph()
    kinds = {node["class_type"]: key for key, node in prompt.items()}
    save = kinds["SaveImage"]
    graph = {
        "m": prompt[kinds["ChromaLoadModel"]],
        "c": prompt[kinds["ChromaLoadTextEncoder"]],
        "v": prompt[kinds["ChromaLoadVAE"]],
        "p": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["c", 0], "text": "a 3d emoji"}},
        "n": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["c", 0], "text": ""}},
        "l": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 128, "height": 128, "batch_size": 2},
        },
        "s": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["m", 0], "positive": ["p", 0], "negative": ["n", 0],
                "latent_image": ["l", 0], "seed": 3, "steps": 4, "cfg": 4.0,
                "sampler_name": "chroma_flash", "scheduler": "sigmoid_offset", "denoise": 1.0,
            },
        },
        "d": {"class_type": "VAEDecode", "inputs": {"samples": ["s", 0], "vae": ["v", 0]}},
        "o": {**prompt[save], "inputs": {"images": ["d", 0], "filename_prefix": "k"}},
    }  # fmt: skip
    run = server.run(graph)
    assert run.ending == "execution_success", run.data
    assert len(server.pictures(run)) == 2


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..\\x.safetensors"])
def test_names_that_leave_the_folder_are_refused(server, name):
    prompt = small_graph()
    for node in prompt.values():
        if node["class_type"] == "ChromaLoadModel":
            node["inputs"]["model_name"] = name
    status, reply = server.post("/prompt", {"prompt": prompt})
    assert status == 400
    errors = next(iter(reply["node_errors"].values()))["errors"]
    assert all(" not in " in one["details"] and "\n" not in one["details"] for one in errors)


def test_every_menu_is_checked_before_anything_runs(server):
    """By ComfyUI where it does that, which then names the menu alone; else by the pack."""
    for kind, info in server.get("/object_info").items():
        if not kind.startswith("Chroma"):
            continue
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        for name in (name for name, (type_, *_) in inputs.items() if type_ == "COMBO"):
            values = {
                other: options[0]["default"]
                for other, (_, *options) in inputs.items()
                if options and "default" in options[0]
            }
            node = {"class_type": kind, "inputs": {**values, name: "no such choice"}}
            shown = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
            status, reply = server.post("/prompt", {"prompt": {"1": node, "2": shown}})
            assert status == 400, (kind, name)
            told = [
                error["details"]
                for error in reply["node_errors"]["1"]["errors"]
                if "no such choice" in error["details"]
            ]
            assert told and all(name in one and " not in " in one for one in told), (kind, name)


def test_a_bad_file_is_one_line_and_the_server_lives(server):
    (server.base / "models" / "diffusion_models").mkdir(exist_ok=True)
    (server.base / "models" / "diffusion_models" / "broken.safetensors").write_bytes(b"\x10" * 40)
    prompt = small_graph()
    for node in prompt.values():
        if node["class_type"] == "ChromaLoadModel":
            node["inputs"]["model_name"] = "broken.safetensors"
    run = server.run(prompt)
    assert run.ending == "execution_error"
    message = run.data["exception_message"].strip()
    assert "broken.safetensors is damaged" in message and "\n" not in message
    assert server.run(small_graph()).ending == "execution_success"
