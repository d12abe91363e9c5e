"""The node that inspects files, in ComfyUI. Needs COMFYUI_PATH."""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

from pathlib import Path

import pytest
from bad_files import pair
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.chroma.workflow.nodes_inspecting import NODES
from comfy_inprocess import complaint, import_comfyui
from safetensors.torch import save_file

import_comfyui()

import folder_paths
from chroma_nodes.nodes import host, inspecting
from chroma_nodes.nodes.inspecting import ChromaInspect

HELP = Path(inspecting.__file__).parent / "web" / "docs" / "ChromaInspect.md"


@pytest.fixture
def lora(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "one.safetensors"
    path.parent.mkdir()
    save_file(pair("diffusion_model.double_blocks.0.img_attn.qkv"), path)
    places = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", places)
    return "loras/sub/one.safetensors"


def test_every_file_of_the_folders_is_offered(lora):
    host.register_small_model()
    offered = inspecting.inspectable()
    assert lora in offered
    assert {f"{name}/{small.LABEL}" for name in inspecting.SMALL_FILES} <= set(offered)


def test_the_report_is_shown_and_given_on(lora):
    output = ChromaInspect.execute(lora)
    assert "one.safetensors: a LoRA" in output.result[0]
    assert output.result[0] in str(output.ui.as_dict())[:5000].encode().decode("unicode_escape")
    assert "a Chroma transformer" in ChromaInspect.execute(offered_model()).result[0]


def offered_model():
    return f"diffusion_models/{small.LABEL}"


@pytest.mark.parametrize("name", ["loras/../one.safetensors", "/etc/passwd", "x", "loras/no.sft"])
def test_other_names_are_refused(lora, name):
    told = complaint(ChromaInspect, file_name=name)
    assert told and "is not in the list" in told


def test_the_schema_the_help_page_and_the_standalone_node_agree():
    schema = ChromaInspect.GET_SCHEMA()
    assert [one.id for one in schema.inputs] == [one.name for one in NODES[0].inputs]
    page = HELP.read_text("utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    assert all(f"`{one.id}`" in page for one in schema.inputs)
    assert "`report`" in page
