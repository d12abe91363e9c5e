"""The published model's size: time to load, memory, and seconds of a forward pass on this machine.

    python benchmarks/true_size.py WORK [--tokens 40] [--side 256] [--keep] --json FILE

WORK takes a synthetic Chroma of 8.9 billion parameters in Q8_0 (9.7 GB; random weights of realistic
scale, the approximator and the ends in bf16 as in published files). Loading and running happen in a
process of their own, whose peak of anonymous memory is what it really needs: mapped pages of the
file can be dropped at any time.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from chroma_nodes.chroma.checkpoint import Kind, load_transformer
from chroma_nodes.chroma.checkpoint.reader import TensorInfo
from chroma_nodes.chroma.checkpoint.recipe import Recipe, plan
from chroma_nodes.chroma.checkpoint.write_gguf import write_gguf
from chroma_nodes.chroma.config import ChromaConfig
from chroma_nodes.chroma.quant.gguf_encode import encode
from chroma_nodes.chroma.transformer import ChromaTransformer

# Rows of random numbers that are repeated to fill a matrix.
TILE = 256


def write_model(path: Path, target: str) -> None:
    """A file of random weights in the shape of Chroma1."""
    with torch.device("meta"):
        state = ChromaTransformer(ChromaConfig()).state_dict()
    infos = {name: TensorInfo("BF16", tuple(t.shape)) for name, t in state.items()}
    formats = plan(infos, Kind.CHROMA, Recipe(target))
    stored = {name: TensorInfo(formats[name], info.shape) for name, info in infos.items()}
    generator = torch.Generator().manual_seed(0)
    with write_gguf(path, stored, {"general.architecture": "flux"}) as writer:
        for name, info in stored.items():
            writer.write(name, _random(name, info, generator))


def _random(name: str, info: TensorInfo, generator: torch.Generator) -> torch.Tensor:
    if len(info.shape) == 1:
        start = torch.ones if name.endswith("scale") else torch.zeros
        return start(info.shape, dtype=torch.float32)
    rows, columns = info.shape
    tile = torch.randn(TILE, columns, generator=generator) / math.sqrt(columns)
    data = tile.bfloat16() if info.dtype == "BF16" else encode(info.dtype, tile)
    return data.repeat(-(-rows // TILE), 1)[:rows].contiguous()


def memory() -> dict[str, float]:
    """Gigabytes of this process: anonymous, of mapped files, and the peak of both (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return {name: int(fields[name].split()[0]) / 1e6 for name in ("RssAnon", "RssFile", "VmHWM")}


def run(path: Path, side: int, tokens: int) -> dict:
    """Load, and two forward passes with two rows each, as a step at cfg > 1 makes them."""
    started = time.perf_counter()
    model = load_transformer(path, dtype=torch.bfloat16)
    loaded = time.perf_counter() - started
    after_load = memory()
    x = torch.randn(2, 16, side // 8, side // 8, dtype=torch.bfloat16)
    context = torch.randn(2, tokens, model.config.context_dim, dtype=torch.bfloat16)
    passes = []
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            finite = bool(torch.isfinite(model(x, torch.full((2,), 0.7), context)).all())
            passes.append(time.perf_counter() - started)
    parameters = sum(math.prod(info.shape) for info in _infos(model).values())
    return {
        "parameters": parameters, "file_gb": path.stat().st_size / 1e9, "load_s": loaded,
        "after_load_gb": after_load, "step_s": passes, "after_steps_gb": memory(),
        "finite": finite, "side": side, "text_tokens": tokens,
    }  # fmt: skip


def _infos(model: ChromaTransformer) -> dict[str, TensorInfo]:
    with torch.device("meta"):
        state = ChromaTransformer(model.config).state_dict()
    return {name: TensorInfo("BF16", tuple(t.shape)) for name, t in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--keep", action="store_true", help="keep the synthetic file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(run(args.measure, args.side, args.tokens)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "chroma-synthetic-Q8_0.gguf"
    if not path.exists():
        write_model(path, "q8_0")
    command = [sys.executable, __file__, str(args.work), "--measure", str(path),
               "--side", str(args.side), "--tokens", str(args.tokens)]  # fmt: skip
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(out.splitlines()[-1])
    if not args.keep:
        path.unlink()
    machine = {"torch": torch.__version__, "cores": os.cpu_count(), "machine": platform.machine()}
    text = json.dumps({"machine": machine, "q8_0": result}, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
