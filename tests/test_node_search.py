"""What ComfyUI's node search is told. Set COMFYUI_PATH to a checkout of it."""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import asyncio

from comfy_inprocess import import_comfyui

import_comfyui()

from chroma_nodes import nodes as pack
from chroma_nodes.nodes.search import ALIASES
from comfy_api.latest import io


def test_every_node_tells_its_aliases_where_comfyui_asks_for_them():
    nodes = asyncio.run(pack.ChromaExtension().get_node_list())
    assert {node.GET_SCHEMA().node_id for node in nodes} == set(ALIASES)
    asked = hasattr(io.Schema("x"), "search_aliases")
    for node in nodes:
        told = node.GET_NODE_INFO_V1() if asked else {}
        name = node.GET_SCHEMA().node_id
        assert told.get("search_aliases") == (list(ALIASES[name]) if asked else None)


def test_aliases_find_what_names_do_not():
    for node in pack.NODES:
        schema = node.GET_SCHEMA()
        title = f"{schema.node_id} {schema.display_name}".lower()
        aliases = ALIASES[schema.node_id]
        assert len(set(aliases)) == len(aliases)
        assert not [alias for alias in aliases if alias in title]
