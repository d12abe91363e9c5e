"""The workflows that ship: both formats, thumbnails, and that they are one graph."""

import json

import pytest
from chroma_nodes.chroma.workflow import REGISTRY, to_interface
from chroma_nodes.chroma.workflow.layout import PUBLIC_FILES
from PIL import Image
from workflow_files import API, UI, load

NOTES = ("MarkdownNote", "Note")


def signature(workflow):
    """(kinds of nodes, links by kind and slot), independent of ids and positions."""
    nodes = {n["id"]: n for n in workflow["nodes"] if n["type"] not in NOTES}
    links = sorted(
        (nodes[a]["type"], slot, nodes[b]["type"], nodes[b]["inputs"][into]["name"], kind)
        for _, a, slot, b, into, kind in workflow["links"]
    )
    return sorted(n["type"] for n in nodes.values()), links


def test_six_of_each():
    assert len(API) == len(UI) == 6


@pytest.mark.parametrize("path", UI, ids=lambda p: p.stem)
def test_interface_file_is_the_graph_of_an_api_file(path):
    workflow = load(path)
    same = [p for p in API if signature(to_interface(load(p), REGISTRY)) == signature(workflow)]
    assert len(same) == (2 if "HD" in path.stem or "Small" in path.stem else 1)


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
        assert {i.name for i in node_type.inputs if not i.is_widget} <= linked


@pytest.mark.parametrize("path", UI, ids=lambda p: p.stem)
def test_thumbnail(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG" and min(picture.size) >= 128


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
