"""A picture of every node in a typical graph, as ComfyUI's frontend draws it, for the help pages.

    COMFYUI_PATH=... python docs/node_pictures.py [--only NODE ...]

In the middle the node, in blue; on the left what its inputs usually come from, on the right where
its outputs usually go. Needs a checkout of ComfyUI with its requirements, playwright and Chromium.
"""

import argparse
import io
import logging
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from browser_page import clear, execute, make_server, open_browser, open_page  # noqa: E402

log = logging.getLogger("chroma")
DOCS = ROOT / "nodes" / "web" / "docs"
WIDEST = 900
PASSING = 110  # room above a node for links that go past it

# Where a link of a type usually comes from, and where it usually goes.
BEFORE = {
    "MODEL": "ChromaLoadModel", "CLIP": "ChromaLoadTextEncoder", "VAE": "ChromaLoadVAE",
    "CONDITIONING": "ChromaTextEncode", "LORA_STACK": "ChromaLoraStack",
    "SIGMAS": "ChromaBetaScheduler",
}  # fmt: skip
AFTER = {
    "MODEL": ["CFGGuider.model"], "CLIP": ["ChromaTextEncode.clip"], "VAE": ["VAEDecode.vae"],
    "CONDITIONING": ["CFGGuider.positive"], "FLOAT": ["CFGGuider.cfg"],
    "NOISE": ["SamplerCustomAdvanced.noise"], "GUIDER": ["SamplerCustomAdvanced.guider"],
    "SAMPLER": ["SamplerCustomAdvanced.sampler"], "SIGMAS": ["SamplerCustomAdvanced.sigmas"],
    "IMAGE": ["SaveImage.images"], "STRING": ["PreviewAny.source"],
}  # fmt: skip

# What differs: node -> type -> neighbour. None leaves an input of special cases alone.
_SHIFTED = {"MODEL": "ChromaModelShift"}
BEFORE_OF: dict[str, dict[str, str | None]] = {
    "ChromaTextToImage": dict.fromkeys(("MODEL", "CLIP", "VAE"), "ChromaLoad"),
    "ChromaApplyTransformer": {"MODEL": "UNETLoader"},
    "ChromaScheduler": _SHIFTED,
    "ChromaBetaScheduler": _SHIFTED,
    "ChromaSigmoidOffsetScheduler": _SHIFTED,
    "ChromaPowerOddsScheduler": _SHIFTED,
    "ChromaBongTangentScheduler": _SHIFTED,
    "ChromaLinearQuadraticScheduler": _SHIFTED,
    "ChromaGuider": _SHIFTED,
    "ChromaLoraStack": {"LORA_STACK": None},
    "ChromaLoraInfo": {"MODEL": None},
    "ChromaConvertLora": {"MODEL": None},
    "ChromaMergeLoras": {"MODEL": None},
    "ChromaResizeLora": {"MODEL": None},
}
AFTER_OF = {
    "ChromaLoad": {
        "MODEL": ["ChromaTextToImage.model"], "CLIP": ["ChromaTextToImage.clip"],
        "VAE": ["ChromaTextToImage.vae"],
    },
    "ChromaLoadModel": {"MODEL": ["ChromaModelShift.model"]},
    "ChromaApplyTransformer": {"MODEL": ["ChromaModelShift.model"]},
    "ChromaLoadLora": {"MODEL": ["ChromaModelShift.model"]},
    "ChromaLoraStack": {"MODEL": ["ChromaModelShift.model"], "LORA_STACK": []},
    "ChromaLoadTextEncoder": {"CLIP": ["ChromaTextEncode.clip", "ChromaTextEncode:2.clip"]},
    "ChromaLoadVAE": {"VAE": ["VAEDecode.vae", "VAEEncode.vae"]},
    "ChromaModelShift": {"MODEL": ["ChromaBetaScheduler.model", "CFGGuider.model"]},
    "ChromaGuidance": {"MODEL": ["KSampler.model"]},
    "ChromaNAG": {"MODEL": ["BasicGuider.model"]},
    "ChromaWildcards": {"STRING": ["ChromaTextEncode.text"]},
    "ChromaPromptTags": {"STRING": ["ChromaTextEncode.text"]},
    "ChromaSigmaCurve": {"IMAGE": ["PreviewImage.images"]},
}  # fmt: skip
# Neighbours that go together where both are there.
BESIDE = [("CFGGuider", "SamplerCustomAdvanced", "guider")]

# Widgets: node, node:number or node in the middle/node:number -> widget -> value.
FOX = "A photograph of a red fox sitting on a mossy stone in a misty autumn forest at dawn."
BAD = "low quality, blurry, watermark, text, bad anatomy"
VALUES: dict[str, dict[str, Any]] = {
    "CFGGuider": {"cfg": 4.0},
    "KSampler": {"cfg": 4.0, "steps": 26, "scheduler": "beta"},
    "ChromaTextEncode": {"text": FOX},
    "ChromaTextEncode:2": {"text": BAD},
    "ChromaTextConcat/ChromaTextEncode:2": {"text": "Watercolour on rough paper, loose washes."},
    "ChromaNAG/ChromaTextEncode:1": {"text": BAD},
    "ChromaLongTextEncode": {"text": FOX + " Soft golden light falls through the trees. [...]"},
    "ChromaWildcards": {"text": "A {red|grey|white} fox {sitting|sleeping} on a mossy stone."},
    "ChromaPromptTags": {"text": FOX, "quality": "best quality", "tags": "forest, autumn"},
    "ChromaPromptCheck": {"positive": FOX, "negative": BAD},
    "ChromaTextToImage": {"prompt": FOX, "negative_prompt": BAD},
    "ChromaSigmaCurve": {"label": "beta 0.6 / 0.6"},
    "ChromaPreset": {"preset": "Flash"},
    "ChromaLoraStack": {"lora_2": "fox.safetensors"},
    "ChromaFlashLora": {"lora_name": "flash-heun.safetensors"},
    "ChromaMergeLoras": {"lora_1": "autumn.safetensors"},
    "ChromaMergeLoraIntoCheckpoint": {
        "model_name": "diffusion_models/Chroma1-HD.safetensors",
        "lora_1": "autumn.safetensors",
    },
    "ChromaQuantize": {"model_name": "diffusion_models/Chroma1-HD.safetensors"},
    "ChromaInspect": {"file_name": "loras/watercolour.safetensors"},
}
# What widgets of these names choose in all nodes.
MENUS = {
    "model_name": "Chroma1-HD.safetensors",
    "unet_name": "Chroma1-HD.safetensors",
    "original": "Chroma1-HD.safetensors",
    "tuned": "Chroma1-HD-Flash.safetensors",
    "text_encoder_name": "t5xxl_fp16.safetensors",
    "vae_name": "ae.safetensors",
    "lora_name": "watercolour.safetensors",
    "lora_1": "watercolour.safetensors",
}
# Empty files in the folders of these menus.
FILES = {
    "diffusion_models": ["Chroma1-HD", "Chroma1-HD-Flash"],
    "text_encoders": ["t5xxl_fp16"],
    "vae": ["ae"],
    "loras": ["autumn", "fox", "flash-heun", "watercolour"],
}
SETTINGS = {
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.Canvas.SelectionToolbox": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.NodeBadge.NodeIdBadgeMode": "None",
}

# Adds nodes, values and links; lays the nodes out in columns as wide as their text needs.
BUILD = """async ({nodes, links}) => {
    const BARE = 150, WITH_WIDGETS = 240, WIDEST = 310, TEXT_AREA = 24, BETWEEN = 55, BELOW = 50;
    const made = {}, columns = {};
    for (const [name, {type, values, main, column}] of Object.entries(nodes)) {
        const node = made[name] = LiteGraph.createNode(type);
        window.app.graph.add(node);
        for (const widget of node.widgets ?? [])
            if (widget.name in values) widget.value = values[widget.name];
        if (main) [node.color, node.bgcolor] = ['#2a3f5f', '#34507a'];
        (columns[column] ??= []).push(name);
    }
    for (const [from, slot, to, input] of links)
        made[from].connect(slot, made[to], made[to].inputs.findIndex(i => i.name === input));
    await new Promise(requestAnimationFrame);
    const long = text => {
        const brush = window.app.canvas.ctx;
        brush.font = `${LiteGraph.NODE_TEXT_SIZE}px ${LiteGraph.NODE_FONT ?? 'Arial'}`;
        return brush.measureText(text).width;
    };
    const lines = node => (node.widgets ?? []).filter(w => !w.element && w.type !== 'toggle');
    const areas = node => (node.widgets ?? []).filter(w => w.element && w.value);
    const need = node => Math.max(
        node.widgets?.length ? WITH_WIDGETS : BARE, long(node.title) + 60,
        ...lines(node).map(w => Math.min(WIDEST, long(w.name) + long(`${w.value}`) + 80)),
    );
    let x = 0;
    for (const column of Object.keys(columns).sort((a, b) => a - b)) {
        const width = Math.max(...columns[column].map(name => need(made[name])));
        let y = 0;
        for (const name of columns[column]) {
            const node = made[name];
            node.pos = [x, y + nodes[name].down];
            node.setSize([width, node.computeSize()[1] + TEXT_AREA * areas(node).length]);
            y = node.pos[1] + node.size[1] + BELOW;
        }
        x += width + BETWEEN;
    }
}"""
# Moves the nodes into the upper left corner of the view at a zoom; their box on the page.
PLACE = """([zoom, margin]) => {
    const canvas = window.app.canvas, nodes = window.app.graph._nodes;
    const least = f => Math.min(...nodes.map(f)), most = f => Math.max(...nodes.map(f));
    const left = least(n => n.pos[0]), top = least(n => n.pos[1]) - 30;
    canvas.deselectAll?.();
    canvas.ds.scale = zoom;
    canvas.ds.offset[0] = margin / zoom - left + 60;
    canvas.ds.offset[1] = margin / zoom - top + 60;
    canvas.setDirty(true, true);
    const box = canvas.canvas.getBoundingClientRect();
    return {
        x: box.x + (left + canvas.ds.offset[0]) * zoom - margin,
        y: box.y + (top + canvas.ds.offset[1]) * zoom - margin,
        width: (most(n => n.pos[0] + n.size[0]) - left) * zoom + 2 * margin,
        height: (most(n => n.pos[1] + n.size[1]) - top) * zoom + 2 * margin,
    };
}"""


@dataclass
class Graph:
    """Nodes by name, each in a column, and links (from, output, to, input)."""

    main: str
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    links: list[tuple[str, int, str, str]] = field(default_factory=list)

    def add(self, name: str, column: int) -> None:
        """Add the node in the middle, `Type`, or a neighbour, `Type:number`, unless it is there."""
        kind, _, number = name.partition(":")
        values = dict(MENUS)
        for key in (kind, name, f"{self.main}/{name}"):
            values |= VALUES.get(key, {})
        node = {"type": kind, "column": column, "main": not number, "values": values, "down": 0}
        self.nodes.setdefault(name, node)


def graph_of(node: str, info: dict[str, Any]) -> Graph:
    """The node, what comes before it and what comes after it."""
    graph = Graph(node)
    graph.add(node, 0)
    _add_sources(graph, info)
    targets = AFTER | AFTER_OF.get(node, {})
    for slot, kind in enumerate(info[node]["output"]):
        for target in targets.get(kind, []):
            name, _, socket = target.partition(".")
            name = name if ":" in name else f"{name}:1"
            graph.add(name, 1)
            graph.links.append((node, slot, name, socket))
    for first, second, socket in BESIDE:
        if {f"{first}:1", f"{second}:1"} <= graph.nodes.keys():
            graph.nodes[f"{second}:1"]["column"] = 2
            graph.nodes[f"{first}:1"]["down"] = PASSING
            graph.links.append((f"{first}:1", 0, f"{second}:1", socket))
    return graph


def _add_sources(graph: Graph, info: dict[str, Any]) -> None:
    sources = BEFORE | BEFORE_OF.get(graph.main, {})
    used: dict[str, int] = {}
    sections = info[graph.main]["input"]
    for socket, (kind, *_) in (sections.get("required", {}) | sections.get("optional", {})).items():
        source = sources.get(kind) if isinstance(kind, str) else None
        if source is None:
            continue
        # One loader gives a model and a text encoder, but one encoder not two prompts.
        used[kind] = used.get(kind, 0) + 1
        name = f"{source}:{used[kind]}"
        graph.add(name, -1)
        graph.links.append((name, info[source]["output"].index(kind), graph.main, socket))


def draw(page: Any, graph: Graph) -> Image.Image:
    """The graph in an empty tab, no wider than a help page has use for."""
    clear(page)
    page.evaluate(BUILD, {"nodes": graph.nodes, "links": graph.links})
    box = page.evaluate(PLACE, [1.0, 16])
    if box["width"] > WIDEST:
        box = page.evaluate(PLACE, [(WIDEST - 32) / (box["width"] - 32), 16])
    page.wait_for_timeout(500)  # text areas follow the canvas a moment later
    return Image.open(io.BytesIO(page.screenshot(clip=box))).convert("RGB")


def main() -> None:
    """Draw the pictures of all nodes that have a help page, or of some."""
    parser = argparse.ArgumentParser(description="Pictures of nodes for their help pages.")
    parser.add_argument("--only", nargs="+", metavar="NODE", help="these nodes' pictures only")
    parser.add_argument("--out", type=Path, default=DOCS / "images", help="folder for them")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        server = make_server(Path(folder) / "base", **SETTINGS)
        for models, names in FILES.items():
            (server.base / "models" / models).mkdir()
            for name in names:
                (server.base / "models" / models / f"{name}.safetensors").touch()
        with server, open_browser() as browser:
            info = server.get("/object_info")
            page = open_page(browser, server.port, height=1200)
            execute(page, "Workspace.ToggleFocusMode")
            for node in options.only or sorted(path.stem for path in DOCS.glob("*.md")):
                file = options.out / f"{node}.webp"
                draw(page, graph_of(node, info)).save(file, quality=75, method=6)
                log.info("%s: %d bytes", file.name, file.stat().st_size)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
