"""Products with stored matrices beside the bf16 product of the same shape, in one run.

    python benchmarks/linears.py --json benchmarks/results/linears.json

Every repeat times all ways in turn, so that a busy machine slows them alike; a way's figure is the
median over the repeats of its time divided by the bf16 product's of the same repeat.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from chroma_nodes.chroma.quant.floats import E4M3
from chroma_nodes.chroma.quant.gguf_formats import GGUF_FORMATS
from chroma_nodes.chroma.quant.kernels import available
from chroma_nodes.chroma.quant.matmul_exact import linear
from chroma_nodes.chroma.quant.matmul_int8 import linear_int8, prepack
from chroma_nodes.chroma.quant.round_int8 import quantise_int8
from chroma_nodes.chroma.quant.scratch import Scratch
from chroma_nodes.chroma.quant.tensor import QuantTensor
from torch import Tensor
from torch.nn import functional as F

BASELINE = "bf16"
SHAPES = ((3072, 3072), (12288, 3072))
CPU = torch.device("cpu")


Ways = dict[str, Callable[[Tensor], Tensor]]


def q8_0(weight: Tensor) -> QuantTensor:
    """GGML's Q8_0 of (N, K): per 32 columns an fp16 scale absmax / 127 and 32 int8."""
    rows, columns = weight.shape
    blocks = weight.view(rows, -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    quants = (blocks / scale).round_().to(torch.int8)
    data = torch.cat([scale.half().view(torch.uint8), quants.view(torch.uint8)], -1)
    return QuantTensor(GGUF_FORMATS["Q8_0"], data.view(rows, -1), None, (rows, columns))


def half_precision(weight: QuantTensor) -> Callable[[Tensor], Tensor]:
    """The common way: every layer expands Q8_0 anew, in fp16, and then casts it to x's dtype."""
    blocks = weight.data.view(-1, 34)

    def product(x: Tensor) -> Tensor:
        scale = blocks[:, :2].view(torch.float16)
        values = scale * blocks[:, 2:].view(torch.int8)
        return F.linear(x, values.view(weight.shape).to(x.dtype))

    return product


def ways(rows: int, columns: int) -> Ways:
    """Every way to multiply by one random matrix (N, K) of a trained layer's scale."""
    weight = torch.randn(rows, columns) * 0.02
    plain, stored = weight.bfloat16(), q8_0(weight)
    scale = weight.abs().max() / 448
    fp8 = QuantTensor(
        E4M3, (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale, (rows, columns)
    )
    scratch = Scratch()

    def copied(x: Tensor) -> Tensor:
        return F.linear(x, scratch.take((rows, columns), x.dtype, x.device).copy_(plain))

    found: Ways = {
        BASELINE: lambda x: F.linear(x, plain),
        "bf16, copied first": copied,  # what writing an expanded matrix to memory costs by itself
        "Q8_0 exact": lambda x: linear(x, stored, None, scratch),
        "fp8 exact": lambda x: linear(x, fp8, None, scratch),
        "Q8_0 expanded in fp16": half_precision(stored),
    }
    if available(CPU).int8:
        integers, int8_scale = quantise_int8(weight)
        packed = prepack(integers)
        found["int8"] = lambda x: linear_int8(x, packed, int8_scale, None, scratch)
    return found


def measure(found: Ways, x: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each way and its median ratio to the baseline."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for repeat in range(repeats + 1):
        for name, product in found.items():
            product(x)  # after another way, whose memory this one gets
            start = time.perf_counter()
            product(x)
            if repeat:  # the first round chooses kernels
                times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: {
            "ms": round(statistics.median(own), 3),
            "ratio": round(
                statistics.median(a / b for a, b in zip(own, times[BASELINE], strict=True)), 3
            ),
        }
        for name, own in times.items()
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def machine() -> dict[str, object]:
    return {
        "cpu": cpu_name(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args()
    torch.manual_seed(0)
    result = {"machine": machine(), "repeats": options.repeats, "products": []}
    print(*(f"{k}: {v}" for k, v in result["machine"].items()), sep="\n")
    for rows, columns in SHAPES:
        found = ways(rows, columns)
        for tokens in options.tokens:
            x = torch.randn(tokens, columns).bfloat16()
            figures = measure(found, x, options.repeats)
            result["products"].append(
                {"rows": rows, "columns": columns, "tokens": tokens, "ways": figures}
            )
            print(f"\n{rows} x {columns}, {tokens} tokens")
            for name, figure in figures.items():
                print(f"  {name:24} {figure['ms']:9.2f} ms {figure['ratio']:6.2f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
