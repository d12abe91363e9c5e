"""Output error of learned rounding against rounding to nearest and the published scripts.

    python benchmarks/learned_rounding.py [--small] [--rows N] [--columns K] [--device cuda]
        [--published SCRIPT.py]... [--out FILE]

Synthetic weights are normal (0.02); their inputs are correlated, with a few outlier channels.
`--small` takes layers of the included model and what they are fed instead. Errors are tr(E H E^T)
on inputs that no method saw, over that of rounding to nearest at absmax / 448; `: weights` is the
same with H the identity, `: bias` with the bias that the script changed.

`--published` runs a converter as its users do, in a process of its own, on a file of these layers:
a script (or a command line in quotes) that takes --input and --output, such as those of
github.com/Clybius/Learned-Rounding. Without it, the methods of those scripts are imitated, from
their mathematics: they see synthetic normal inputs, or only the largest singular vectors.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from chroma_nodes.chroma.quant.gram import Gram
from chroma_nodes.chroma.quant.learned import output_error, quantise_fp8_learned
from chroma_nodes.chroma.quant.round_fp8 import fp8_scale, quantise_fp8, to_e4m3
from safetensors.torch import load_file, save_file
from torch import Tensor

# The smallest normal e4m3 number, which the first script takes for the grid's step.
_STEP = 2.0**-6
_CALIBRATION, _HELD_OUT = 4096, 4096


def _nearest(x: Tensor) -> Tensor:
    return to_e4m3(x).view(torch.float8_e4m3fn).float()


def uniform_adaround(x: Tensor, generator: torch.Generator, iterations: int = 512) -> Tensor:
    """Codes of scaled weights x (N, K): AdaRound (Nagel et al. 2020) on a uniform grid, then cast.

    The offsets h in [0, step] are learned by RMSprop against normal inputs (256, K), with the
    annealed regulariser that drives them to either end.
    """
    inputs = torch.randn(256, x.shape[1], generator=generator).to(x.device)
    floor = torch.floor(x / _STEP) * _STEP
    offset = (x - floor).clone().requires_grad_()
    optimiser = torch.optim.RMSprop([offset], lr=1e-2)
    for i in range(iterations):
        beta = 20 - 18 * i / iterations
        lost = (inputs @ (floor + offset - x).T).square().mean()
        regular = (1 - (2 * offset / _STEP - 1).abs().clamp(max=1).pow(beta)).mean()
        optimiser.zero_grad()
        (lost + 0.01 * regular).backward()
        optimiser.step()
        with torch.no_grad():
            offset.clamp_(0, _STEP)
    return to_e4m3(floor + offset.detach())


def _components(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first left and right singular vectors, (N,) and (K,)."""
    u, _, v = torch.svd_lowrank(x, q=6, niter=20)
    return u[:, 0], v[:, 0]


def component_greedy(x: Tensor, generator: torch.Generator, iterations: int = 250) -> Tensor:
    """Codes after single weights were moved against the error of the first component, u^T E v.

    Each iteration moves the element that adds most to it to its other neighbour. The script moves
    by 1, which the cast undoes where codes are further apart; here every move counts, so this may
    differ from rounding to nearest by more than the script does.
    """
    u, v = _components(x)
    codes = to_e4m3(x)
    error = x - codes.view(torch.float8_e4m3fn).float()
    share = error * u[:, None] * v
    for _ in range(iterations):
        row, column = divmod(int((share * share.sum().sign()).argmax()), x.shape[1])
        grows = bool(error[row, column].sign() == x[row, column].sign())
        codes[row, column] += 1 if grows else -1
        value = codes[row, column].view(torch.float8_e4m3fn).float()
        share[row, column] = (x[row, column] - value) * u[row] * v[column]
    return codes


def component_gradient(x: Tensor, generator: torch.Generator, iterations: int = 500) -> Tensor:
    """Codes after gradient descent on |u^T E v|^2; the step doubles on success, else halves."""
    u, v = _components(x)
    direction = u[:, None] * v
    q = _nearest(x)
    best, best_loss, rate = q, float("inf"), 1.0
    for _ in range(iterations):
        inner = ((x - q) * direction).sum()
        loss = float(inner.square())
        if loss < best_loss:
            best, best_loss, rate = q, loss, min(rate * 2, 100.0)
        else:
            rate = max(rate / 2, 1e-4)
        q = q + rate * 2 * inner * direction
    return to_e4m3(best)


PUBLISHED: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "AdaRound on a uniform grid": uniform_adaround,
    "top component, greedy": component_greedy,
    "top component, gradient": component_gradient,
}


def correlated(rows: int, columns: int, seed: int, sample: int) -> Tensor:
    """Inputs (rows, columns): a decaying spectrum, channels of various size, a few of them large.

    `seed` decides the distribution, `sample` the draw from it.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, columns // 6)
    mixing = torch.randn(rank, columns, generator=generator) / rank**0.5
    mixing *= torch.linspace(1, 0.05, rank)[:, None]
    size = torch.exp(0.5 * torch.randn(columns, generator=generator))
    size[:4] *= 8
    generator.manual_seed(seed * 1000 + sample)
    common = torch.randn(rows, rank, generator=generator) @ mixing
    return (common + 0.2 * torch.randn(rows, columns, generator=generator)) * size


class Layer(NamedTuple):
    """A weight (N, K), its bias (N,), H of what it is calibrated on, and held-out inputs (n, K)."""

    weight: Tensor
    bias: Tensor
    calibration: Gram
    held_out: Tensor


class Converted(NamedTuple):
    """What a converter made of a layer: e4m3 codes (N, K), their scale () and the bias (N,)."""

    codes: Tensor
    scale: Tensor
    bias: Tensor


def convert(command: str, layers: Mapping[str, Layer]) -> dict[str, Converted]:
    """Run a converter on a file of the layers and read what it wrote."""
    words = shlex.split(command)
    if words[0].endswith(".py"):
        words.insert(0, sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in.safetensors"), Path(folder, "out.safetensors")
        tensors = {f"{name}.weight": layer.weight.cpu() for name, layer in layers.items()}
        tensors |= {f"{name}.bias": layer.bias.cpu() for name, layer in layers.items()}
        save_file(tensors, source)
        subprocess.run(
            [*words, "--input", str(source), "--output", str(out)],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        made = load_file(out)
    result = {}
    for name, layer in layers.items():
        device = layer.weight.device
        scale = made.get(f"{name}.scale_weight", made.get(f"{name}.weight_scale"))
        codes = made[f"{name}.weight"].view(torch.uint8)
        result[name] = Converted(
            codes.to(device), scale.reshape(()).to(device), made[f"{name}.bias"].to(device)
        )
    return result


def compare(weight: Tensor, calibration: Gram, held_out: Gram) -> dict[str, float]:
    """Held-out output error of ours and the imitations over that of rounding to nearest."""
    scale = fp8_scale(weight)
    nearest = output_error(weight, quantise_fp8(weight)[0], scale, held_out)
    x = weight.float() / scale
    result = {}
    for name, method in PUBLISHED.items():
        codes = method(x, torch.Generator().manual_seed(0))
        result[name] = output_error(weight, codes, scale, held_out) / nearest
    return result | ours(weight, calibration, held_out)


def ours(weight: Tensor, calibration: Gram, held_out: Gram) -> dict[str, float]:
    """Learned rounding's errors over those of rounding to nearest, and its seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    rounded = quantise_fp8_learned(weight, calibration, device=weight.device)
    seconds = {
        "learned rounding: seconds": time.perf_counter() - wall,
        "learned rounding: processor seconds": time.process_time() - processor,
    }
    result = {}
    for name, made in (
        ("learned rounding", rounded),
        ("learned rounding, uncalibrated", quantise_fp8_learned(weight, None)),
    ):
        codes, scale = made.codes.to(weight.device), made.scale.to(weight.device)
        result |= errors(name, weight, codes, scale, held_out)
    return result | seconds


def errors(
    name: str, weight: Tensor, codes: Tensor, scale: Tensor, held_out: Gram
) -> dict[str, float]:
    """Errors of a layer's output and of the weights themselves, over those of nearest."""
    nearest, base = quantise_fp8(weight)
    return {
        key: output_error(weight, codes, scale, gram) / output_error(weight, nearest, base, gram)
        for key, gram in ((name, held_out), (f"{name}: weights", None))
    }


def bias_error(layer: Layer, made: Converted) -> float:
    """`errors` of a layer's output with the bias it was given: mean |E x - d|^2, d its change."""
    gram = Gram.of(layer.held_out, layer.weight.shape[1])
    nearest, base = quantise_fp8(layer.weight)
    error = layer.weight.float() - made.codes.view(torch.float8_e4m3fn).float() * made.scale
    change = made.bias.float() - layer.bias.float()
    total = output_error(layer.weight, made.codes, made.scale, gram)
    total += float(change.square().sum() - 2 * (error @ layer.held_out.float().mean(0)) @ change)
    return total / output_error(layer.weight, nearest, base, gram)


def measure(layers: Mapping[str, Layer], published: list[str]) -> dict[str, dict[str, float]]:
    """The comparison of each layer, with the published converters or imitations of them."""
    result: dict[str, dict[str, float]] = {}
    for name, (weight, _, calibration, held_out) in layers.items():
        way = ours if published else compare
        result[name] = way(weight, calibration, Gram.of(held_out, weight.shape[1]))
    for command in published:
        label = " ".join(Path(word).name for word in shlex.split(command))
        start = time.perf_counter()
        made = convert(command, layers)
        seconds = (time.perf_counter() - start) / len(layers)
        for name, layer in layers.items():
            gram = Gram.of(layer.held_out, layer.weight.shape[1])
            codes, scale, bias = made[name]
            result[name] |= errors(label, layer.weight, codes, scale, gram)
            if not torch.equal(bias, layer.bias):
                result[name][f"{label}: bias"] = bias_error(layer, made[name])
            result[name][f"{label}: seconds"] = seconds
    return result


def synthetic(rows: int, columns: int, device: str) -> Layer:
    """A layer with synthetic weights and inputs."""
    generator = torch.Generator().manual_seed(1)
    weight = (0.02 * torch.randn(rows, columns, generator=generator)).bfloat16().to(device)
    bias = (0.02 * torch.randn(rows, generator=generator)).bfloat16().to(device)
    known = Gram.of(correlated(_CALIBRATION, columns, 2, 0), columns).to(device)
    return Layer(weight, bias, known, correlated(_HELD_OUT, columns, 2, 1).to(device))


def small_model() -> dict[str, Layer]:
    """Layers of the included model; held out are other prompts and seeds."""
    from chroma_nodes.chroma.pipeline import Pipeline, Settings, generate
    from chroma_nodes.chroma.quant import calibrate

    pipeline = Pipeline.load(dtype=torch.float32, device=torch.device("cpu"))
    names = (
        "double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.2", "double_blocks.1.img_mlp.0",
        "single_blocks.1.linear2", "single_blocks.3.linear1",
    )  # fmt: skip
    prompts = ("a flat emoji of a fox on a green background", "a 3d emoji of a house", "a dog", "")

    def run() -> None:
        settings = Settings(width=128, height=128, steps=8, cfg=1.0, seed=9)
        generate(pipeline, prompts, settings=settings, disable_progress=True)

    known = calibrate.small_model()
    others = calibrate.sample(pipeline.transformer, run, names, rows=_HELD_OUT)
    result = {}
    for name in names:
        module = pipeline.transformer.get_submodule(name)
        weight, bias = (p.detach().bfloat16() for p in (module.weight, module.bias))
        gram = Gram.of(known[name], weight.shape[1])
        result[name] = Layer(weight, bias, gram, others[name].float())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--published", action="append", default=[], metavar="SCRIPT")
    parser.add_argument("--out", type=Path, help="results of other runs in it stay")
    args = parser.parse_args()
    if args.small:
        layers = small_model()
    else:
        size = f"{args.rows} x {args.columns}"
        layers = {size: synthetic(args.rows, args.columns, args.device)}
    machine = {
        "processor": platform.processor() or platform.machine(), "device": args.device,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    results = {"machine": machine, "layers": measure(layers, args.published)}
    print(json.dumps(results, indent=2))
    if args.out is not None:
        if args.out.exists():
            known = json.loads(args.out.read_text("utf-8"))
            results["layers"] = known["layers"] | results["layers"]
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
