"""The workflows that ship: both formats, notes, thumbnails, that they are one graph, and a run."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.chroma.workflow import REGISTRY, run_workflow, to_interface
from chroma_nodes.chroma.workflow.layout import PUBLIC_FILES
from comfy_queue import Server
from PIL import Image
from workflow_files import (
    API,
    INPUTS,
    UI,
    few_steps,
    load,
    on_small_model,
    write_models,
)

NOTES = ("MarkdownNote", "Note")
# A new ComfyUI has this picture in its input folder; the one with a hole is our own.
EXAMPLE = "example.png"
PREFIX = "Chroma Nodes - "
MAX_THUMBNAIL_BYTES = 30_000
CHECKOUT = os.environ.get("COMFYUI_PATH")
FOLDERS = {
    "model_name": "diffusion_models", "text_encoder_name": "text_encoders", "vae_name": "vae",
    "lora_name": "loras",
}  # fmt: skip
# What the model's author recommends, by the kind of model.
RECOMMENDED = {
    "flash": ("8 steps", "heun", "cfg 1", "16 steps", "shift 1"),
    "base": ("26 steps", "shift 1", "0.6 / 0.6", "0.4 / 0.4", "long", "none at all"),
}
BY_NAME = {path.stem: path for path in API}
# Those whose graph is another one without GGUF files and LoRAs.
OWN_FILES = [
    path for path in API
    if on_small_model(load(path), own_files=True) != on_small_model(load(path))
]  # fmt: skip


def signature(workflow):
    """(kinds of nodes, links by kind and slot), independent of ids and positions."""
    nodes = {n["id"]: n for n in workflow["nodes"] if n["type"] not in NOTES}
    links = sorted(
        (nodes[a]["type"], slot, nodes[b]["type"], nodes[b]["inputs"][into]["name"], kind)
        for _, a, slot, b, into, kind in workflow["links"]
    )
    return sorted(n["type"] for n in nodes.values()), links


def note_of(workflow):
    (note,) = (n["widgets_values"][0] for n in workflow["nodes"] if n["type"] in NOTES)
    return note


def files_of(prompt):
    """Every (folder, name) of a file that the user must have."""
    return {
        (FOLDERS[name], node["inputs"][name])
        for node in prompt.values()
        for name in FOLDERS
        if node["inputs"].get(name, small.LABEL) != small.LABEL
    }


def twin(ui):
    """The API file of an interface file."""
    graph = signature(load(ui))
    values = (v for n in load(ui)["nodes"] for v in n["widgets_values"] if n["type"] not in NOTES)
    files = {v for v in values if str(v).endswith((".safetensors", ".gguf"))}
    return next(
        path for path in API
        if signature(to_interface(load(path), REGISTRY)) == graph
        and {name for _, name in files_of(load(path))} == files
    )  # fmt: skip


def test_eleven_of_each_with_names_of_their_own():
    assert len(API) == len(UI) == len({twin(path) for path in UI}) == 11
    assert all(path.stem.startswith(PREFIX) for path in UI)
    assert all(path.stem.startswith("chroma-") for path in API)


@pytest.mark.parametrize("path", UI, ids=lambda p: p.stem)
def test_interface_file_is_the_graph_of_an_api_file(path):
    mine, made = load(path), to_interface(load(twin(path)), REGISTRY, "note")
    seeds = {"fixed", "randomize"}
    for node, other in zip(mine["nodes"], made["nodes"], strict=True):
        assert node["type"] == other["type"]
        if node["type"] in NOTES:
            continue
        for a, b in zip(node["widgets_values"], other["widgets_values"], strict=True):
            assert a == b or {a, b} == seeds or (node["type"] == "LoadImage" and a == EXAMPLE)


@pytest.mark.parametrize("path", UI, ids=lambda p: p.stem)
def test_links_and_widgets_fit_the_schema(path):
    workflow = load(path)
    assert workflow["version"] == 0.4
    ids = [n["id"] for n in workflow["nodes"]]
    assert len(set(ids)) == len(ids) and max(ids) == workflow["last_node_id"]
    by_id = {n["id"]: n for n in workflow["nodes"]}
    for link, a, slot, b, into, kind in workflow["links"]:
        assert link in by_id[a]["outputs"][slot]["links"]
        assert by_id[b]["inputs"][into]["link"] == link
        assert by_id[b]["inputs"][into]["type"] == by_id[a]["outputs"][slot]["type"] == kind
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        node_type = REGISTRY[node["type"]]
        widgets = [i for i in node_type.inputs if i.is_widget]
        extra = sum(i.is_seed + i.is_upload for i in widgets)
        assert len(node["widgets_values"]) == len(widgets) + extra
        assert [o["name"] for o in node["outputs"]] == [name for name, _ in node_type.outputs]
        linked = {i["name"] for i in node["inputs"] if i["link"] is not None}
        sockets = {i.name for i in node_type.inputs if not i.is_widget and i.default is not None}
        assert sockets <= linked


@pytest.mark.parametrize("path", UI, ids=lambda p: p.stem)
def test_thumbnail(path):
    file = path.with_suffix(".jpg")
    assert file.stat().st_size < MAX_THUMBNAIL_BYTES
    with Image.open(file) as picture:
        assert picture.format == "JPEG" and min(picture.size) >= 128
        assert np.asarray(picture).std() > 10


@pytest.mark.parametrize("path", UI, ids=lambda p: p.stem)
def test_public_files_can_be_downloaded_from_the_graph(path):
    workflow = load(path)
    named, offered = set(), set()
    for node in workflow["nodes"]:
        named |= {v for v in node["widgets_values"] if v in PUBLIC_FILES}
        offered |= {m["name"] for m in node["properties"].get("models", [])}
        for model in node["properties"].get("models", []):
            assert model["url"].endswith("/" + model["name"]) and model["directory"]
    assert named == offered
    text = json.dumps(workflow)
    assert ("safetensors" in text) == bool(offered)


@pytest.mark.parametrize("path", UI, ids=lambda p: p.stem)
def test_the_note_names_every_file_its_folder_and_the_recommended_settings(path):
    note, wanted = note_of(load(path)), files_of(load(twin(path)))
    lines = note.splitlines()
    for folder, name in wanted:
        own = [line for line in lines if line.startswith(f"- `models/{folder}`: ")]
        if name == "choose-your-lora.safetensors":
            assert any("LoRA of your own" in line for line in own)
            continue
        assert [line for line in own if f"[{name}](https://huggingface.co/" in line]
    if wanted:
        kind = "flash" if "8 steps" in path.stem else "base"
        assert all(words in note for words in RECOMMENDED[kind])
    else:
        assert "26" in note and "1024 x 1024" in note


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A models folder with the GGUF files and LoRAs that the workflows name."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def saved_size(prompt):
    """Pixels of a side of the pictures a graph saves on the small model."""
    scales = [n["inputs"].get("scale_by", 1) for n in prompt.values()]
    return round(small.SIZE * np.prod(scales))


@pytest.mark.parametrize("path", API, ids=lambda p: p.stem)
def test_it_runs_on_the_small_model(path, models, tmp_path):
    prompt = few_steps(on_small_model(load(path), own_files=True))
    saved = run_workflow(
        prompt, models_dir=models, input_dir=INPUTS, output_dir=tmp_path,
        device=torch.device("cpu"),
    )  # fmt: skip
    pictures = [file for file in saved if not file.name.startswith("preview")]
    saves = [n for n in prompt.values() if n["class_type"] == "SaveImage"]
    batch = max(n["inputs"].get("batch_size", 1) for n in prompt.values())
    assert len(pictures) == batch * len(saves)
    for file in pictures:
        with Image.open(file) as picture:
            assert picture.size == (saved_size(prompt),) * 2
            assert json.loads(picture.text["prompt"]) == prompt


def test_the_pictures_of_a_batch_are_those_of_their_prompts_alone(tmp_path):
    """Independent of the batch: row i with the line i and the seed plus i."""
    batch = few_steps(on_small_model(load(BY_NAME["chroma-batch-of-prompts"])), 4)
    batch["5"]["inputs"]["text"] = "a flat emoji of a cat\na 3d emoji of a red apple\na pizza\nfox"
    together = run_workflow(batch, output_dir=tmp_path / "a", device=torch.device("cpu"))
    for i, line in enumerate(batch["5"]["inputs"]["text"].splitlines()):
        alone = few_steps(on_small_model(load(BY_NAME["chroma-text-to-image-hd"])), 4)
        alone["5"]["inputs"]["text"] = line
        alone["8"]["inputs"]["noise_seed"] = batch["8"]["inputs"]["noise_seed"] + i
        (single,) = run_workflow(alone, output_dir=tmp_path / str(i), device=torch.device("cpu"))
        assert np.abs(pixels(together[i]) - pixels(single)).max() <= 1


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(Path(CHECKOUT or ""), tmp_path_factory.mktemp("comfy") / "base")
    write_models(running.base / "models")
    with running:
        yield running


@pytest.mark.skipif(not CHECKOUT, reason="COMFYUI_PATH is not set: no real ComfyUI to test against")
@pytest.mark.parametrize("path", OWN_FILES, ids=lambda p: p.stem)
def test_quantised_files_and_loras_give_comfyui_the_same_picture(server, path, models, tmp_path):
    prompt = few_steps(on_small_model(load(path), own_files=True))
    run = server.run(prompt)
    assert run.ending == "execution_success", run.data
    ours = run_workflow(
        prompt, models_dir=models, input_dir=INPUTS, output_dir=tmp_path,
        device=torch.device("cpu"),
    )  # fmt: skip
    for a, b in zip(server.pictures(run), ours, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1


def test_gguf_files_and_loras_change_the_picture(models, tmp_path):
    """So the comparison above is of graphs in which they act."""
    assert len(OWN_FILES) == 3
    for path in OWN_FILES:
        with_files, without = (
            run_workflow(
                few_steps(on_small_model(load(path), own_files=own)), models_dir=models,
                output_dir=tmp_path / f"{path.stem}{own}", device=torch.device("cpu"),
            )
            for own in (True, False)
        )  # fmt: skip
        assert (pixels(with_files[0]) != pixels(without[0])).any()
