"""Output error of learned rounding against rounding to nearest and the published scripts' methods.

    python benchmarks/learned_rounding.py [--rows N] [--columns K] [--device cuda] [--out FILE]

Weights are normal (0.02); inputs are correlated, with a few outlier channels. All methods use
absmax / 448 but ours, which chooses its scale. Errors are tr(E H E^T) on inputs that no method saw,
over that of rounding to nearest. `--small` compares on the included model's layers instead.
The published methods are written from their mathematics: they see synthetic normal inputs, or only
the weight's largest singular vectors.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from chroma_nodes.chroma.quant.gram import Gram
from chroma_nodes.chroma.quant.learned import output_error, quantise_fp8_learned
from chroma_nodes.chroma.quant.round_fp8 import fp8_scale, quantise_fp8, to_e4m3
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


def compare(weight: Tensor, calibration: Gram, held_out: Gram) -> dict[str, float]:
    """Held-out output error of each method over that of rounding to nearest, and our seconds."""
    scale = fp8_scale(weight)
    nearest = output_error(weight, quantise_fp8(weight)[0], scale, held_out)
    x = weight.float() / scale
    result = {}
    for name, method in PUBLISHED.items():
        codes = method(x, torch.Generator().manual_seed(0))
        result[name] = output_error(weight, codes, scale, held_out) / nearest
    wall, processor = time.perf_counter(), time.process_time()
    ours = quantise_fp8_learned(weight, calibration, device=weight.device)
    result["seconds"] = time.perf_counter() - wall
    result["processor seconds"] = time.process_time() - processor
    codes, scale = ours.codes.to(weight.device), ours.scale.to(weight.device)
    result["learned rounding"] = output_error(weight, codes, scale, held_out) / nearest
    return result


def synthetic(rows: int, columns: int, device: str) -> dict[str, float]:
    """The comparison for one layer with synthetic weights and inputs."""
    generator = torch.Generator().manual_seed(1)
    weight = (0.02 * torch.randn(rows, columns, generator=generator)).bfloat16().to(device)
    calibration, held_out = (
        Gram.of(correlated(count, columns, 2, sample), columns).to(device)
        for sample, count in enumerate((_CALIBRATION, _HELD_OUT))
    )
    return compare(weight, calibration, held_out)


def small_model() -> dict[str, dict[str, float]]:
    """The comparison for layers of the included model; held out are other prompts and seeds."""
    from chroma_nodes.chroma.pipeline import Pipeline, Settings, generate
    from chroma_nodes.chroma.quant import calibrate

    pipeline = Pipeline.load(dtype=torch.float32, device=torch.device("cpu"))
    layers = (
        "double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.2", "double_blocks.1.img_mlp.0",
        "single_blocks.1.linear2", "single_blocks.3.linear1",
    )  # fmt: skip
    prompts = ("a flat emoji of a fox on a green background", "a 3d emoji of a house", "a dog", "")

    def run() -> None:
        settings = Settings(width=128, height=128, steps=8, cfg=1.0, seed=9)
        generate(pipeline, prompts, settings=settings, disable_progress=True)

    known = calibrate.small_model()
    others = calibrate.collect(pipeline.transformer, run, layers)
    result = {}
    for layer in layers:
        weight = pipeline.transformer.get_submodule(layer).weight.detach()
        grams = (Gram.of(source[layer], weight.shape[1]) for source in (known, others))
        result[layer] = compare(weight, *grams)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.small:
        results = small_model()
    else:
        results = {f"{args.rows} x {args.columns}": synthetic(args.rows, args.columns, args.device)}
    text = json.dumps(results, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
