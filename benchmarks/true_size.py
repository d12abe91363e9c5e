"""The published models' size on this machine: make the files, load them, draw with them.

    python benchmarks/true_size.py WORK [--side 256] [--steps 2] --json FILE

WORK takes synthetic files of Chroma (8.9 billion parameters), T5-XXL's encoder (4.8 billion) and
Flux' autoencoder: random weights of realistic scale in bf16 (27 GB), and one format at a time what
`quantize` makes of them. Each part runs in a process of its own, which tells the seconds of its
stages and its memory: anonymous, of mapped files (pages that the system may drop at any time), and
the peak of both.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from chroma_nodes.chroma.autoencoder import Autoencoder, AutoencoderConfig
from chroma_nodes.chroma.checkpoint import (
    load_autoencoder,
    load_text_encoder,
    load_transformer,
)
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.checkpoint.reader import TensorInfo
from chroma_nodes.chroma.checkpoint.write_safetensors import write_safetensors
from chroma_nodes.chroma.config import ChromaConfig
from chroma_nodes.chroma.text.t5 import T5Config, T5Encoder
from chroma_nodes.chroma.transformer import ChromaTransformer
from torch import nn

# Rows of random numbers that are repeated to fill a matrix.
TILE = 256
# Real tokens of the prompts.
TOKENS = 40
T5_XXL = T5Config(vocab_size=32128, d_model=4096, heads=64, d_kv=64, d_ff=10240, layers=24)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "chroma": lambda: ChromaTransformer(ChromaConfig()),
    "t5xxl": lambda: T5Encoder(T5_XXL),
    "ae": lambda: Autoencoder(AutoencoderConfig()),
}
SUFFIXES = {"bf16": ".safetensors", "q8_0": ".gguf", "fp8": ".safetensors"}


def write_model(path: Path, model: str) -> None:
    """A bf16 file of random weights in the published model's shape."""
    generator = torch.Generator().manual_seed(0)
    infos = {name: TensorInfo("BF16", shape) for name, shape in shapes(model).items()}
    with write_safetensors(path, infos, {}) as writer:
        for name, shape in shapes(model).items():
            writer.write(name, _random(name, shape, generator).bfloat16())


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights that keep the variance of what goes through them; norms and biases as at a start."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    rows, inputs = shape[0], math.prod(shape[1:])
    tile = torch.randn(min(TILE, rows), inputs, generator=generator) / math.sqrt(inputs)
    return tile.repeat(-(-rows // len(tile)), 1)[:rows].reshape(shape)


def memory() -> dict[str, float]:
    """Gigabytes of this process: anonymous, of mapped files, and the peak of both (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return {name: int(fields[name].split()[0]) / 1e6 for name in ("RssAnon", "RssFile", "VmHWM")}


def forget_peak() -> None:
    """Start measuring the peak anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


class Stages:
    """Seconds and memory of one stage after another."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    def run(self, name: str, action: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        forget_peak()
        started = time.perf_counter()
        result = action(*args, **kw)
        self.found[name] = {"s": time.perf_counter() - started, **memory()}
        return result


def quantise(source: Path, target: str, out: Path) -> dict:
    stages = Stages()
    stages.run("quantize", quantise_file, source, target, out)
    largest = max(2 * math.prod(shape) for shape in shapes(source.stem).values())  # of bf16
    return stages.found["quantize"] | {"largest_tensor_gb": largest / 1e9}


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """The published model's tensors."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in MODELS[model]().state_dict().items()}


@torch.no_grad()
def draw(files: dict[str, Path], side: int, steps: int) -> dict:
    """Prompt to picture with the models loaded one after another, at cfg > 1: two rows a step."""
    stages = Stages()
    bf16 = torch.bfloat16
    encoder = stages.run("load T5", load_text_encoder, files["t5xxl"], dtype=bf16)
    tokens = torch.zeros(2, 512, dtype=torch.int64)
    tokens[:, :TOKENS] = torch.randint(3, 32000, (2, TOKENS))
    context = stages.run("encode", encoder, tokens, torch.tensor([TOKENS, TOKENS]))
    del encoder
    model = stages.run("load Chroma", load_transformer, files["chroma"], dtype=bf16)
    x, time_left = torch.randn(2, 16, side // 8, side // 8, dtype=bf16), torch.full((2,), 0.7)
    velocity = x
    for step in range(steps):
        inputs = (x, time_left, context[:, : TOKENS + 1].to(bf16))
        velocity = stages.run(f"step {step + 1}", model, *inputs)
    del model
    vae = stages.run("load AE", load_autoencoder, files["ae"], dtype=torch.float32)
    picture = stages.run("decode", vae.decode, velocity[:1].float())
    finite = bool(torch.isfinite(velocity).all() and torch.isfinite(picture).all())
    sizes = {name: path.stat().st_size / 1e9 for name, path in files.items()}
    return {"stages": stages.found, "file_gb": sizes, "finite": finite}


def apart(*arguments: object) -> dict:
    """What a process of its own tells."""
    command = [sys.executable, __file__, *map(str, arguments)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def measure(work: Path, side: int, steps: int) -> dict:
    """All formats, the files of each removed before the next is made."""
    work.mkdir(parents=True, exist_ok=True)
    sources = {model: work / f"{model}.safetensors" for model in MODELS}
    for model, path in sources.items():
        if not path.exists():
            write_model(path, model)
    result: dict[str, Any] = {}
    for name, suffix in SUFFIXES.items():
        found: dict[str, Any] = {}
        files = dict(sources)
        if name != "bf16":
            for model in ("chroma", "t5xxl"):
                files[model] = work / f"{model}-{name}{suffix}"
                made = apart("--make", sources[model], name, files[model])
                found[f"quantize {model}"] = made
        found |= apart("--draw", *files.values(), side, steps)
        for model in files.keys() - {"ae"}:
            if files[model] != sources[model]:
                files[model].unlink()
        result[name] = found
        print(name, json.dumps(found, indent=1))
    return result


def main() -> None:
    if sys.argv[1] == "--make":
        source, target, out = sys.argv[2:]
        print(json.dumps(quantise(Path(source), target, Path(out))))
        return
    if sys.argv[1] == "--draw":
        *paths, side, steps = sys.argv[2:]
        files = dict(zip(MODELS, map(Path, paths), strict=True))
        print(json.dumps(draw(files, int(side), int(steps))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = measure(args.work, args.side, args.steps)
    machine = {"torch": torch.__version__, "cores": os.cpu_count(), "machine": platform.machine()}
    if args.json:
        args.json.write_text(json.dumps({"machine": machine} | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
