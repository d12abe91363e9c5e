"""Bad workflows, prompts and file names without ComfyUI, and the error each must end in."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad_case import Case
from chroma_nodes.chroma.checkpoint.new_file import new_file
from chroma_nodes.chroma.guidance import Guidance
from chroma_nodes.chroma.lora.strengths import parse_blocks
from chroma_nodes.chroma.pipeline import Pipeline, Settings, generate
from chroma_nodes.chroma.text.encoder import TextEncoder
from chroma_nodes.chroma.text.tokenizer import Tokenizer
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.chroma.workflow import apply_overrides, read_prompt, run_workflow
from workflow_files import API, INPUTS, load, on_small_model

Graph = dict[str, Any]
CPU = torch.device("cpu")
LONG = "x" * 5000
# Names that lead out of a folder, or that no file can have.
ESCAPES = {
    "..": "../secret.safetensors",
    ".. in the middle": "a/../../secret.safetensors",
    ".. by backslash": "..\\secret.safetensors",
    ".. alone": "..",
    "absolute": "/etc/passwd",
    "absolute twice": "//etc/passwd",
    "Windows drive": "C:\\Windows\\win.ini",
    "Windows drive with slash": "C:/Windows/win.ini",
    "Windows drive without root": "C:win.ini",
    "Windows root": "\\Windows\\win.ini",
    "UNC": "\\\\server\\share\\x.safetensors",
    "UNC with slashes": "//server/share/x.safetensors",
    "Windows device": "\\\\.\\PhysicalDrive0",
    "NUL": "a\0.safetensors",
    "too long": "x" * 300,
    "half a character": "a\ud800.safetensors",
    "empty": "",
}


def small_graph(steps: int = 1) -> Graph:
    """The small model's workflow, at a quarter of its size."""
    prompt = on_small_model(load(next(path for path in API if path.stem == "chroma-small")))
    for node in prompt.values():
        inputs = node["inputs"]
        inputs.update({name: 64 for name in ("width", "height") if type(inputs.get(name)) is int})
        inputs.update({name: steps for name in ("steps",) if name in inputs})
    return prompt


def node_of(prompt: Graph, kind: str) -> str:
    """The first node of a class."""
    return next(node_id for node_id, node in prompt.items() if node["class_type"] == kind)


def with_inputs(kind: str, **inputs: Any) -> Graph:
    """The small workflow with inputs of one node changed; Ellipsis takes one away."""
    prompt = small_graph()
    node = prompt[node_of(prompt, kind)]["inputs"]
    node.update(inputs)
    for name in [name for name, value in inputs.items() if value is ...]:
        del node[name]
    return prompt


def with_nodes(nodes: Graph) -> Graph:
    return {**small_graph(), **nodes}


def run(prompt: Any, folder: Path) -> object:
    """Execute it on a models folder that is not there."""
    try:
        return run_workflow(
            prompt, models_dir=folder / "models", input_dir=INPUTS, output_dir=folder / "out",
            device=CPU,
        )  # fmt: skip
    finally:
        assert not list(folder.rglob("*.png")), "a bad workflow left a picture"


def graph_case(name: str, prompt: Callable[[], Any], says: str) -> Case:
    return Case(name, "WorkflowError", says, lambda folder: run(prompt(), folder))


def _input_case(kind: str, says: str, name: str = "", **inputs: Any) -> Case:
    what = ", ".join(f"{key} = {str(value)[:20]!a}" for key, value in inputs.items())
    return graph_case(name or f"{kind}: {what}", lambda: with_inputs(kind, **inputs), says)


def file_case(name: str, content: bytes, says: str) -> Case:
    """A workflow file of these bytes."""

    def attempt(folder: Path) -> object:
        path = folder / "bad.json"
        path.write_bytes(content)
        return run(read_prompt(path), folder)

    return Case(name, "WorkflowError", says, attempt)


def ring(count: int) -> Graph:
    """Shifts that wait for each other in a ring."""
    shift = small_graph()["4"]
    return {
        str(100 + i): {
            **shift, "inputs": {**shift["inputs"], "model": [str(100 + (i + 1) % count), 0]}
        }
        for i in range(count)
    }  # fmt: skip


def _looped(count: int) -> Graph:
    return with_nodes({**ring(count), "4": ring(1)["100"] | {
        "inputs": {**small_graph()["4"]["inputs"], "model": ["100", 0]}}})  # fmt: skip


def _override(text: str, says: str) -> Case:
    return Case(f"--set {text[:20]!a}", "WorkflowError", says,
                lambda _: apply_overrides(small_graph(), [text]))  # fmt: skip


WORKFLOWS = (
    file_case("file: empty", b"", "is not a JSON file"),
    file_case("file: no JSON", b"{", "is not a JSON file"),
    file_case("file: a picture", b"\x89PNG\r\n\xff", "is not a JSON file"),
    file_case("file: UTF-16", "{}".encode("utf-16"), "is not a JSON file"),
    file_case("file: nested 100000 deep", b"[" * 100_000, "is not a JSON file"),
    file_case("file: a number of 5000 digits", b'{"1": ' + b"9" * 5000 + b"}", "not a"),
    file_case("file: a list", b"[]", "is not a workflow"),
    file_case("file: no nodes", b"{}", "is not a workflow"),
    file_case("file: text", b'"hello"', "is not a workflow"),
    file_case("file: the interface's format", b'{"nodes": [], "links": []}', "Export (API)"),
    file_case("file: a node that is a number", b'{"1": 5}', "is not a workflow"),
    file_case("file: a node without a class", b'{"1": {"inputs": {}}}', "is not a workflow"),
    file_case("file: a class that is a list", b'{"1": {"class_type": []}}', "is not a workflow"),
    file_case("file: inputs that are a list", b'{"1": {"class_type": "SaveImage", "inputs": []}}',
              "is not a workflow"),
    file_case("file: a title that is a list",
              b'{"1": {"class_type": "SaveImage", "_meta": []}}', "is not a workflow"),
    Case("file: missing", "WorkflowError", "does not exist", lambda f: read_prompt(f / "x.json")),
    Case("file: a folder", "WorkflowError", "is not a JSON file", read_prompt),
    graph_case("none", lambda: None, "is not a workflow"),
    graph_case("unknown node", lambda: with_nodes({"x": {"class_type": "Evil"}}), "unknown node"),
    graph_case("no output", lambda: {"1": small_graph()["1"]}, "no output"),
    graph_case("a ring of one", lambda: _looped(1), "cycle"),
    graph_case("a ring of 2000", lambda: _looped(2000), "cycle"),
    _input_case("SaveImage", "missing", images=...),
    _input_case("SaveImage", "does not exist", images=["99", 0]),
    _input_case("SaveImage", "has 1", images=["3", 7]),
    _input_case("SaveImage", "has 1", images=["3", -1]),
    _input_case("SaveImage", "type VAE", images=["3", 0]),
    _input_case("SaveImage", "is not a link", images=["3"]),
    _input_case("SaveImage", "is not a link", images=["3", 0, 0]),
    _input_case("SaveImage", "is not a link", images=["3", "0"]),
    _input_case("SaveImage", "is not a link", images=[None, 0]),
    _input_case("SaveImage", "is not a link", images=[["3", 0], 0]),
    _input_case("SaveImage", "is not a link", images="3"),
    _input_case("SaveImage", "is not a link", images=None),
    _input_case("SaveImage", "is not usable", filename_prefix=None),
    _input_case("SaveImage", "is not usable", filename_prefix={"a": 1}),
    _input_case("EmptySD3LatentImage", "is not usable", width=0),
    _input_case("EmptySD3LatentImage", "is not usable", width=-64),
    _input_case("EmptySD3LatentImage", "is not usable", width=10**12),
    _input_case("EmptySD3LatentImage", "is not usable", width=10**400),
    _input_case("EmptySD3LatentImage", "is not usable", width=float("inf")),
    _input_case("EmptySD3LatentImage", "is not usable", width=float("nan")),
    _input_case("EmptySD3LatentImage", "is not usable", width="wide"),
    _input_case("EmptySD3LatentImage", "is not usable", width="9" * 5000),
    _input_case("EmptySD3LatentImage", "is not usable", batch_size=10**9),
    _input_case("EmptySD3LatentImage", "is not usable", batch_size={}),
    _input_case("RandomNoise", "is not usable", noise_seed=-1),
    _input_case("RandomNoise", "is not usable", noise_seed=2**64),
    _input_case("RandomNoise", "is not usable", noise_seed=None),
    _input_case("ChromaBetaScheduler", "is not usable", steps=0),
    _input_case("ChromaBetaScheduler", "is not usable", steps=10**9),
    _input_case("ChromaBetaScheduler", "is not usable", denoise=1.5),
    _input_case("ChromaBetaScheduler", "is not usable", denoise=float("nan")),
    _input_case("ChromaBetaScheduler", "is not usable", alpha=-1),
    _input_case("ChromaModelShift", "is not usable", shift=0),
    _input_case("ChromaModelShift", "is not usable", shift=float("inf")),
    _input_case("ChromaModelShift", "is not usable", mode=LONG),
    _input_case("ChromaSampler", "is not usable", sampler_name="__class__"),
    _input_case("CFGGuider", "is not usable", cfg=1e9),
    _input_case("CFGGuider", "is not usable", cfg=float("-inf")),
    _input_case("ChromaTextEncode", "is not usable", pad_rule="x"),
    _input_case("ChromaTextEncode", "is not usable", text=None),
    _input_case("ChromaTextEncode", "type MODEL", clip=["1", 0]),
    _input_case("ChromaLoadModel", "is not in", model_name="missing.safetensors"),
    _input_case("ChromaLoadModel", "is not usable", weight_dtype="int1"),
    _input_case("ChromaLoadTextEncoder", "is not in", text_encoder_name="missing.gguf"),
    _input_case("ChromaLoadVAE", "is not in", vae_name="missing.safetensors"),
    _override("", "expected node.input=value"),
    _override("1.model_name", "expected node.input=value"),
    _override("steps=3", "expected node.input=value"),
    _override("99.steps=3", "there is no node"),
    _override("1.steps=3", "has no input"),
    _override("ChromaTextEncode.text=x", "nodes are called"),
    Case("--set with JSON nested 100000 deep", "WorkflowError", "is not", lambda folder: run(
        apply_overrides(small_graph(), ["8.noise_seed=" + "[" * 100_000 + "]" * 100_000]), folder)),
    graph_case("inputs nested 900 deep that no node has",
               lambda: with_inputs("ChromaLoadVAE", extra=nested(900)), "nested"),
    graph_case("inputs nested 100000 deep that no node has",
               lambda: with_inputs("ChromaLoadVAE", extra=nested(100_000)), "nested"),
    graph_case("a class of two lines", lambda: with_nodes({"x": {"class_type": "a\nb"}}),
               "is not a workflow"),
    graph_case("a class of 5000 letters", lambda: with_nodes({"x": {"class_type": LONG}}),
               "is not a workflow"),
    graph_case("a node id of two lines", lambda: with_nodes({"x\ny": {"class_type": "Evil"}}),
               "is not a workflow"),
    graph_case("a node id that is a number", lambda: {1: {"class_type": "Evil"}},
               "is not a workflow"),
    _input_case("SaveImage", "does not exist", "SaveImage: a link to a node of two lines",
                images=["x\ny", 0]),
    _override("99.text=one\ntwo", "there is no node"),
    _override("99.text=" + LONG, "there is no node"),
)  # fmt: skip


def nested(depth: int) -> list:
    """A list in a list, `depth` times."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def _encoder() -> TextEncoder:
    from chroma_nodes.chroma.checkpoint import load_text_encoder

    return TextEncoder(Tokenizer.from_file(small.TOKENIZER), load_text_encoder(small.TEXT_ENCODER))


def _generate(**changes: Any) -> Callable[[Path], object]:
    """A call of the library that must be refused before anything is computed."""

    def attempt(_: Path) -> object:
        given = {"prompts": ["x"], **changes}
        settings = Settings(**{"width": 64, "height": 64, "steps": 1, **given.pop("settings", {})})
        pipeline = Pipeline.load(device=CPU)
        return generate(pipeline, settings=settings, disable_progress=True, **given)

    return attempt


def prompt_case(name: str, says: str, prompts: Any) -> Case:
    return Case(f"prompt: {name}", "PromptError", says, lambda _: _encoder().encode(prompts))


def _library(name: str, error: str, says: str, **changes: Any) -> Case:
    return Case(f"library: {name}", error, says, _generate(**changes))


PROMPTS = (
    prompt_case("no prompt", "at least one prompt", []),
    prompt_case("a lone string", "list of at least one", "a cat"),
    prompt_case("half a surrogate pair", "surrogate", ["a \ud83d cat"]),
    prompt_case("the other half, weighted", "surrogate", ["a (\udc31:1.2) cat"]),
    prompt_case("half a surrogate pair among good ones", "surrogate", ["a cat", "\ud800"]),
    _library("width 0", "ImageError", "width 0", settings={"width": 0}),
    _library("width 65", "ImageError", "width 65", settings={"width": 65}),
    _library("height 10^12", "ImageError", "height", settings={"height": 10**12}),
    _library("unknown sampler", "SamplingError", "x", settings={"sampler": "x"}),
    _library("unknown schedule", "SamplingError", "x", settings={"scheduler": "x"}),
    _library("no steps", "SamplingError", "steps", settings={"steps": 0}),
    _library("denoise 2", "SamplingError", "denoise", settings={"denoise": 2.0}),
    _library("shift 0", "SamplingError", "shift", settings={"shift": 0.0}),
    _library("a sampler's unknown option", "SamplingError", "x", sampler_options={"order_x": 1}),
    _library("a schedule's unknown option", "SamplingError", "x",
             settings={"schedule_options": {"x": 1}}),
    _library("seed -1", "SamplingError", "seed", settings={"seed": -1}),
    _library("seed 2^64", "SamplingError", "seed", settings={"seed": 2**64}),
    _library("two prompts for three seeds", "SamplingError", "do not fit",
             prompts=["a", "b"], seeds=[1, 2, 3]),
    _library("no prompts", "SamplingError", "do not fit", prompts=[], seeds=[1]),
    _library("a mask without a picture", "ImageError", "needs an image",
             mask=torch.zeros(1, 64, 64)),
    _library("a picture of another size", "ImageError", "shape", image=torch.zeros(1, 32, 32, 3)),
    _library("half a surrogate pair", "PromptError", "surrogate", prompts=["\ud800"]),
    Case("guidance: unknown curve", "SamplingError", "curve", lambda _: Guidance(4.0, curve="x")),
    Case("guidance: NaN", "SamplingError", "cfg", lambda _: Guidance(float("nan"))),
    Case("guidance: interval", "SamplingError", "interval",
         lambda _: Guidance(4.0, interval_start=0.2, interval_end=0.8)),
    Case("blocks: nonsense", "LoraError", "is not usable", lambda _: parse_blocks("x: 1")),
    Case("blocks: NaN", "LoraError", "is not usable", lambda _: parse_blocks("double: nan")),
    Case("blocks: backwards", "LoraError", "backwards", lambda _: parse_blocks("double 9-1: 1")),
    Case("blocks: a number of 5000 digits", "LoraError", "",
         lambda _: parse_blocks(f"double {'9' * 5000}: 1")),
)  # fmt: skip

# (node, input) of every file that a workflow can name without ComfyUI, and what else it needs.
_LORA = {
    "class_type": "ChromaLoadLora",
    "inputs": {
        "model": ["1", 0],
        "strength": 1.0,
        "text_encoder_strength": 1.0,
        "how": "auto",
        "blocks": "",
    },
}
_STACK = {"class_type": "ChromaLoraStack", "inputs": {"model": ["1", 0]}}
_PLACES: dict[str, Callable[[str], Graph]] = {
    "model": lambda name: with_inputs("ChromaLoadModel", model_name=name),
    "text encoder": lambda name: with_inputs("ChromaLoadTextEncoder", text_encoder_name=name),
    "VAE": lambda name: with_inputs("ChromaLoadVAE", vae_name=name),
    "output": lambda name: with_inputs("SaveImage", filename_prefix=name),
    "picture": lambda name: with_nodes({
        "i": {"class_type": "LoadImage", "inputs": {"image": name}},
        "p": {"class_type": "PreviewImage", "inputs": {"images": ["i", 0]}}}),
    "LoRA": lambda name: _behind_model(_LORA, lora_name=name),
    "stack": lambda name: _behind_model(_STACK, lora_1=name),
}  # fmt: skip


def _behind_model(node: Graph, **inputs: Any) -> Graph:
    """The small workflow with a node between the model and its shift."""
    node = copy.deepcopy(node)
    node["inputs"].update(inputs)
    prompt = with_nodes({"l": node})
    prompt["4"]["inputs"]["model"] = ["l", 0]
    return prompt


def _linked_out(folder: Path) -> object:
    """The output folder has a link to another one in it."""
    (folder / "out").mkdir()
    (folder / "outside").mkdir()
    os.symlink(folder / "outside", folder / "out" / "link")
    return run(with_inputs("SaveImage", filename_prefix="link/x"), folder)


def _quantised_out(folder: Path) -> object:
    (folder / "models").mkdir()
    (folder / "outside").mkdir()
    os.symlink(folder / "outside", folder / "models" / "link")
    return new_file(folder / "models", "link/x", "q8_0")


def new_file_case(name: str) -> Case:
    def attempt(folder: Path) -> object:
        return new_file(folder, ESCAPES[name], "q8_0")

    return Case(f"name for a new model: {name}", "CheckpointError", "is no name", attempt)


NAMES = (
    *(
        graph_case(f"name of {place}: {name}", lambda m=make, n=value: m(n), "")
        for place, make in _PLACES.items()
        for name, value in ESCAPES.items()
    ),
    *(new_file_case(name) for name in ESCAPES),
    Case("name of output: through a link", "WorkflowError", "leads out", _linked_out),
    Case("name for a new model: through a link", "CheckpointError", "leads out", _quantised_out),
)


def good_picture(folder: Path) -> bytes:
    """The pixels that the small workflow gives; raises if it fails."""
    from PIL import Image

    (saved,) = run_workflow(small_graph(), input_dir=INPUTS, output_dir=folder, device=CPU)
    with Image.open(saved) as picture:
        assert json.loads(picture.text["prompt"]) == small_graph()
        pixels = picture.tobytes()
    saved.unlink()
    return pixels
