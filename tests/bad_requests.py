"""Bad requests to a ComfyUI server with the pack in it, and how each must end."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bad_files import HUGE, entry, gguf, pair, png, safetensors, tensor
from bad_workflows import ESCAPES, small_graph, with_inputs, with_nodes
from chroma_nodes.chroma.tiny import files as small
from comfy_queue import Server
from safetensors.torch import load_file, save_file

REFUSED, FAILED = "400", "execution_error"


@dataclass(frozen=True)
class Request:
    """A body for POST /prompt that the server refuses, or a graph that fails while it runs."""

    name: str
    ending: str
    says: str
    body: Any


def _graph(name: str, says: str, prompt: Any, ending: str = REFUSED) -> Request:
    return Request(name, ending, says, {"prompt": prompt})


def _input(kind: str, says: str, **inputs: Any) -> Request:
    what = ", ".join(f"{key} = {str(value)[:20]!a}" for key, value in inputs.items())
    return _graph(f"{kind}: {what}", says, with_inputs(kind, **inputs))


def with_lora(name: str, **inputs: Any) -> dict[str, Any]:
    """The small workflow with a LoRA between the model and its shift."""
    given = {"model": ["1", 0], "lora_name": name, "strength": 1.0, "text_encoder_strength": 1.0,
             "how": "auto", "blocks": ""}  # fmt: skip
    prompt = with_nodes({"l": {"class_type": "ChromaLoadLora", "inputs": given | inputs}})
    prompt["4"]["inputs"]["model"] = ["l", 0]
    return prompt


def _quantize(**inputs: Any) -> dict[str, Any]:
    given = {"model_name": f"diffusion_models/{small.LABEL}", "target_format": "q8_0",
             "filename_prefix": "", "keep": "", "calibration": "none"}  # fmt: skip
    return {"q": {"class_type": "ChromaQuantize", "inputs": given | inputs}}


def _nan_model() -> dict[str, torch.Tensor]:
    state = load_file(small.TRANSFORMER)
    name = "double_blocks.0.img_attn.qkv.weight"
    return {**state, name: state[name] * torch.nan}


# {folder of models: {name: its bytes, or the tensors in it}}, written before the server starts.
FILES: dict[str, dict[str, bytes | Callable[[], dict[str, torch.Tensor]]]] = {
    "diffusion_models": {
        "empty.safetensors": b"",
        "huge.safetensors": safetensors({"a": entry(shape=[HUGE], offsets=[0, 4 * HUGE])}),
        "huge.gguf": gguf([tensor(dims=[HUGE])]),
        "many.gguf": gguf(counts=(HUGE, HUGE)),
        "page.safetensors": b"<!DOCTYPE html>" + bytes(99),
        "nan.safetensors": _nan_model,
        "vae.safetensors": lambda: load_file(small.VAE),
    },
    "text_encoders": {
        "huge.safetensors": safetensors({"a": entry(shape=[HUGE], offsets=[0, 4 * HUGE])}),
        "huge.gguf": gguf([tensor(dims=[HUGE])]),
        "model.safetensors": lambda: load_file(small.TRANSFORMER),
    },
    "vae": {
        "huge.safetensors": safetensors({"a": entry(shape=[HUGE], offsets=[0, 4 * HUGE])}),
        "model.safetensors": lambda: load_file(small.TRANSFORMER),
    },
    "loras": {
        "huge.safetensors": safetensors({"a": entry(shape=[HUGE], offsets=[0, 4 * HUGE])}),
        "wan.safetensors": lambda: pair("diffusion_model.blocks.0.self_attn.q"),
        "wide.safetensors": lambda: pair("diffusion_model.double_blocks.0.img_attn.qkv"),
        "model.safetensors": lambda: load_file(small.TRANSFORMER),
    },
}
INPUTS = {"cut.png": png(64, 64), "page.png": b"<html>"}


def _files(kind: str, name: str, folder: str, makes: Callable[..., dict]) -> list[Request]:
    return [
        _graph(f"{kind}: {file}", file.split(".")[0], makes(**{name: file}), FAILED)
        for file in FILES[folder]
    ]


def _escapes(what: str, says: str, makes: Callable[[str], dict], ending: str) -> list[Request]:
    return [_graph(f"name of {what}: {name}", says, makes(ESCAPES[name]), ending)
            for name in ESCAPES if name not in ("empty", "half a character")]  # fmt: skip


REQUESTS = (
    Request("nothing", REFUSED, "prompt", {}),
    _graph("no node", "", {}),
    _graph("unknown node", "Evil", with_nodes({"x": {"class_type": "Evil", "inputs": {}}})),
    _graph("no output", "no outputs", {"1": small_graph()["1"]}),
    _input("SaveImage", "missing", images=...),
    _input("SaveImage", "", images=["3", 0]),
    _input("SaveImage", "", images=["3"]),
    _input("EmptySD3LatentImage", "smaller than min", width=0),
    _input("EmptySD3LatentImage", "bigger than max", width=10**12),
    _input("EmptySD3LatentImage", "convert", width="wide"),
    _input("EmptySD3LatentImage", "bigger than max", batch_size=10**9),
    _input("RandomNoise", "smaller than min", noise_seed=-1),
    _input("RandomNoise", "bigger than max", noise_seed=2**64),
    _input("ChromaBetaScheduler", "smaller than min", steps=0),
    _input("ChromaBetaScheduler", "bigger than max", steps=10**9),
    _input("ChromaBetaScheduler", "bigger than max", denoise=1.5),
    _input("ChromaSampler", "not in", sampler_name="__class__"),
    _input("ChromaModelShift", "not in", mode="x"),
    _input("ChromaTextEncode", "not in", pad_rule="x"),
    _input("ChromaTextEncode", "", clip=["1", 0]),
    _input("ChromaLoadModel", "not in", model_name="missing.safetensors"),
    _input("ChromaLoadModel", "not in", weight_dtype="int1"),
    _input("ChromaLoadTextEncoder", "not in", text_encoder_name="missing.gguf"),
    _input("ChromaLoadVAE", "not in", vae_name="missing.safetensors"),
    _graph("LoRA: blocks", "block strengths", with_lora("wan.safetensors", blocks="x: 1")),
    _graph("LoRA: how", "not in", with_lora("wan.safetensors", how="x")),
    _graph("quantize: format", "not in", _quantize(target_format="q1")),
    *_files("model", "model_name", "diffusion_models",
            lambda **given: with_inputs("ChromaLoadModel", **given)),
    *_files("text encoder", "text_encoder_name", "text_encoders",
            lambda **given: with_inputs("ChromaLoadTextEncoder", **given)),
    *_files("VAE", "vae_name", "vae", lambda **given: with_inputs("ChromaLoadVAE", **given)),
    *_files("LoRA", "name", "loras", with_lora),
    _graph("quantize: a bad model", "huge", _quantize(
        model_name="diffusion_models/huge.safetensors"), FAILED),
    *_escapes("model", "not in", lambda n: with_inputs("ChromaLoadModel", model_name=n), REFUSED),
    *_escapes("LoRA", "not in", with_lora, REFUSED),
    *_escapes("a new model", "is no name", lambda n: _quantize(filename_prefix=n), REFUSED),
)  # fmt: skip


def write_files(server: Server) -> None:
    """Put the bad files into the server's folders."""
    for folder, files in FILES.items():
        target = server.base / "models" / folder
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if isinstance(content, bytes):
                (target / name).write_bytes(content)
            else:
                save_file(content(), target / name)
    for name, content in INPUTS.items():
        (server.base / "input" / name).write_bytes(content)


def ask(server: Server, request: Request) -> tuple[str, str]:
    """How the server met a request: (its ending, what it said)."""
    if request.ending == FAILED:
        run = server.run(request.body["prompt"])
        return run.ending, str(run.data.get("exception_message", "")).strip()
    status, reply = server.post("/prompt", request.body)
    return str(status), json.dumps(reply)


# Bodies that are no prompt at all, by name.
BODIES = {
    "no JSON": b"{",
    "empty": b"",
    "a picture": b"\x89PNG\r\n\x1a\n\xff",
    "nested 100000 deep": b"[" * 100_000,
    "a number": b"5",
    "a list as the graph": b'{"prompt": []}',
    "text": b'"hello"',
}


def post_raw(server: Server, body: bytes) -> int:
    """The status of a body that may not even be JSON."""
    address = f"http://127.0.0.1:{server.port}/prompt"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def escaped(server: Server) -> list[Path]:
    """Files that lie beside the folders in which nodes may write."""
    allowed = ("output", "temp", "models", "input", "user", "custom_nodes")
    return [path for path in server.base.parent.rglob("*") if path.is_file()
            and path != server.log_file and not path.is_symlink()
            and path.relative_to(server.base.parent).parts[1:2][0] not in allowed]  # fmt: skip
