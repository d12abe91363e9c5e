"""An API-format workflow in the format of ComfyUI's interface, laid out in columns."""

from typing import Any

from .graph import Link, Prompt, check
from .schema import REQUIRED, Input, Registry

COLUMN, GAP = 380, 40
WIDTH, LINE = 315, 26
TEXT_HEIGHT = 140
CORE_VERSION = "0.3.64"
PACK = "chroma-nodes"

# Where files that people need can be had: name -> (URL, folder below models).
PUBLIC_FILES = {
    "Chroma1-HD.safetensors": (
        "https://huggingface.co/lodestones/Chroma1-HD/resolve/main/Chroma1-HD.safetensors",
        "diffusion_models",
    ),
    "Chroma1-HD-Flash.safetensors": (
        "https://huggingface.co/lodestones/Chroma1-Flash/resolve/main/Chroma1-HD-Flash.safetensors",
        "diffusion_models",
    ),
    "t5xxl_fp16.safetensors": (
        "https://huggingface.co/comfyanonymous/flux_text_encoders/resolve/main/"
        "t5xxl_fp16.safetensors",
        "text_encoders",
    ),
    "ae.safetensors": (
        "https://huggingface.co/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/"
        "vae/ae.safetensors",
        "vae",
    ),
}


def to_interface(prompt: Prompt, registry: Registry, note: str = "") -> dict[str, Any]:
    """The graph as ComfyUI's interface saves it, with a note beside it where there is one.

    Raises WorkflowError as `check` does.
    """
    order = check(prompt, registry)
    number = {node.id: i + 1 for i, node in enumerate(order)}
    depth: dict[str, int] = {}
    bottom: dict[int, int] = {}
    nodes: dict[str, dict[str, Any]] = {}
    links: list[list[Any]] = []
    for rank, node in enumerate(order):
        column = 1 + max((depth[link.node] for link in node.links), default=-1)
        depth[node.id] = column
        height = _height(node.type.inputs, len(node.type.outputs))
        top = bottom.get(column, 0)
        bottom[column] = top + height + GAP + LINE
        body = _node(node, prompt[node.id], number[node.id], rank)
        body["pos"], body["size"] = [column * COLUMN, top], [WIDTH, height]
        nodes[node.id] = body
        for slot, entry in enumerate(body["inputs"]):
            value = node.inputs[entry["name"]]
            if not isinstance(value, Link):
                continue
            link_id = len(links) + 1
            entry["link"] = link_id
            source = nodes[value.node]["outputs"][value.slot]
            source["links"].append(link_id)
            links.append(
                [link_id, number[value.node], value.slot, body["id"], slot, source["type"]]
            )
    bodies = list(nodes.values())
    if note:
        bodies.append(_note(note, len(nodes) + 1))
    return {
        "last_node_id": len(bodies), "last_link_id": len(links), "nodes": bodies,
        "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def _note(text: str, number: int) -> dict[str, Any]:
    return {
        "id": number, "type": "MarkdownNote", "pos": [-COLUMN, 0], "size": [WIDTH, 2 * WIDTH],
        "flags": {}, "order": number - 1, "mode": 0, "inputs": [], "outputs": [],
        "properties": {}, "widgets_values": [text],
    }  # fmt: skip


def _node(node: Any, body: dict[str, Any], number: int, rank: int) -> dict[str, Any]:
    sockets = [
        spec for spec in node.type.inputs
        if not spec.is_widget or isinstance(node.inputs[spec.name], Link)
    ]  # fmt: skip
    is_ours = node.type.id.startswith("Chroma")
    properties: dict[str, Any] = {
        "Node name for S&R": node.type.id,
        "cnr_id": PACK if is_ours else "comfy-core",
    }
    if not is_ours:
        properties["ver"] = CORE_VERSION
    if models := _models(node.inputs):
        properties["models"] = models
    out = {
        "id": number, "type": node.type.id, "flags": {}, "order": rank, "mode": 0,
        "inputs": [_socket(spec) for spec in sockets],
        "outputs": [
            {"name": name, "type": kind, "links": [], "slot_index": slot}
            for slot, (name, kind) in enumerate(node.type.outputs)
        ],
        "properties": properties,
        "widgets_values": _widget_values(node.type.inputs, node.inputs),
    }  # fmt: skip
    if title := body.get("_meta", {}).get("title"):
        out["title"] = title
    return out


def _socket(spec: Input) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": spec.name, "type": spec.type, "link": None}
    if spec.is_widget:
        entry["widget"] = {"name": spec.name}
    return entry


def _widget_values(specs: tuple[Input, ...], inputs: dict[str, Any]) -> list[Any]:
    values: list[Any] = []
    for spec in specs:
        if not spec.is_widget:
            continue
        value = inputs[spec.name]
        # A value that comes over a link leaves the widget as a new node has it.
        idle = "" if spec.default is REQUIRED else spec.default
        values.append(idle if isinstance(value, Link) else value)
        if spec.is_seed:
            values.append("fixed")
    # The upload button stands behind all others, whichever of them holds the picture's name.
    return values + ["image" for spec in specs if spec.is_upload]


def _models(inputs: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"name": value, "url": url, "directory": folder}
        for value in inputs.values()
        if isinstance(value, str) and value in PUBLIC_FILES
        for url, folder in [PUBLIC_FILES[value]]
    ]


def _height(specs: tuple[Input, ...], outputs: int) -> int:
    widgets = [spec for spec in specs if spec.is_widget]
    tall = sum(TEXT_HEIGHT for spec in widgets if spec.type == "STRING")
    sockets = max(len(specs) - len(widgets), outputs)
    pictures = sum(TEXT_HEIGHT * 2 for spec in widgets if spec.is_upload)
    return (sockets + len(widgets) + 1) * LINE + tall + pictures
