"""What LoRAs cost per step beside Q8_0 and fp8 matrices, and what they do to pictures there.

    python benchmarks/lora.py --json benchmarks/results/lora.json

Time: blocks of Chroma1's own width with random weights. Every repeat runs all ways in turn, each
once before it is timed, so that a busy machine slows them alike; a way's ratio is the median of its
times over the median of the same base's without LoRAs. With COMFYUI_PATH and COMFYUI_GGUF_PATH set
to checkouts, the same blocks run in ComfyUI-GGUF's layers with the same LoRAs as its patches.
Pictures: the small model with one LoRA on bf16, fp8 and Q8_0, against bf16's own.
"""

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from chroma_nodes.chroma.approximator import ModulationTable
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.config import ChromaConfig
from chroma_nodes.chroma.lora.adapters import LowRank
from chroma_nodes.chroma.lora.apply import Lora, apply_lora, with_loras
from chroma_nodes.chroma.lora.file import LoraFile, Placed
from chroma_nodes.chroma.lora.strengths import Strengths
from chroma_nodes.chroma.pipeline import Pipeline, Settings, generate
from chroma_nodes.chroma.quant.floats import E4M3
from chroma_nodes.chroma.quant.gguf_encode import encode
from chroma_nodes.chroma.quant.gguf_formats import GGUF_FORMATS
from chroma_nodes.chroma.quant.layers import place
from chroma_nodes.chroma.quant.round_fp8 import quantise_fp8
from chroma_nodes.chroma.quant.tensor import QuantTensor
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.chroma.transformer import ChromaTransformer
from pictures import PROMPTS, psnr
from torch import Tensor, nn

Step = Callable[[], Tensor]
State = dict[str, Tensor]
TEXT_TOKENS = 64
ALONE = "no LoRA"
# At which a random LoRA changes the small model's pictures as visibly as a style does.
SMALL_STRENGTH = 16.0
FEW = PROMPTS[:4]


def blocks_only(doubles: int, singles: int) -> ChromaConfig:
    """Chroma1's blocks, some of them, behind an approximator that is not timed."""
    return ChromaConfig(
        double_depth=doubles, single_depth=singles, approximator_hidden=64, approximator_depth=1
    )


def random_state(config: ChromaConfig) -> State:
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in ChromaTransformer(config).state_dict().items()}
    return {
        key: torch.ones(shape) if key.endswith(".scale") else torch.randn(shape) * 0.02
        for key, shape in shapes.items()
    }


def in_blocks(state: State) -> list[str]:
    return [k for k, w in state.items() if "_blocks." in k and w.ndim == 2]


def quantised(state: State, base: str) -> dict[str, Tensor | QuantTensor]:
    """The state with the blocks' matrices in one format."""
    out: dict[str, Tensor | QuantTensor] = dict(state)
    for key in in_blocks(state):
        shape = (state[key].shape[0], state[key].shape[1])
        if base == "Q8_0":
            data = encode("Q8_0", state[key])
            out[key] = QuantTensor(GGUF_FORMATS["Q8_0"], data, None, shape)
        elif base == "fp8":
            out[key] = QuantTensor(E4M3, *quantise_fp8(state[key]), shape)
    return out


def build(config: ChromaConfig, state: State, base: str, device: torch.device) -> ChromaTransformer:
    with torch.device("meta"):
        model = ChromaTransformer(config)
    place(model, quantised(state, base), torch.bfloat16)
    return model.to(device).eval().requires_grad_(False)


def random_lora(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> LoraFile:
    """A LoRA of matrices {key: (N, K)} in bf16, each change a few hundredths of a usual weight."""
    g = torch.Generator().manual_seed(seed)
    keyed = {}
    for key, (rows, columns) in shapes.items():
        down = torch.randn(rank, columns, generator=g) / columns**0.5
        up = torch.randn(rows, rank, generator=g) * 0.02 / rank**0.5
        keyed[key] = [Placed(LowRank(down.bfloat16(), up.bfloat16()))]
    return LoraFile(Path(f"rank{rank}-{seed}.safetensors"), keyed)


def lora_sets(
    state: State, ranks: list[int], counts: list[int]
) -> dict[str, list[tuple[LoraFile, Strengths]]]:
    """{label: LoRAs}, such as "4 x rank 16"; every matrix of the blocks has one."""
    shapes = {k: (state[k].shape[0], state[k].shape[1]) for k in in_blocks(state)}
    return {
        f"{count} x rank {rank}": [
            (random_lora(shapes, rank, seed), Strengths(0.8)) for seed in range(count)
        ]
        for rank in ranks
        for count in counts
    }


class Inputs:
    """One picture's tokens in the middle of sampling."""

    def __init__(self, config: ChromaConfig, tokens: int, device: torch.device) -> None:
        side = round(tokens**0.5)
        if side * side != tokens:
            raise SystemExit(f"--tokens {tokens} is no square number")
        kw = {"device": device, "dtype": torch.bfloat16}
        self.size = (2 * side, 2 * side)
        self.tokens = torch.randn(1, tokens, config.in_channels, **kw)
        self.context = torch.randn(1, TEXT_TOKENS, config.context_dim, **kw)
        vectors = torch.randn(1, config.modulations, config.hidden, **kw) * 0.1
        self.table = ModulationTable(vectors, config.double_depth, config.single_depth)

    def step(self, model: ChromaTransformer) -> Step:
        return lambda: model.run(self.tokens, self.context, self.table, self.size, None)


def measure(ways: dict[str, Step], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, step in ways.items():
            step()
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            if repeat:  # the first round chooses kernels
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(own) for name, own in times.items()}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def city_ways(
    config: ChromaConfig, state: State, sets: dict, inputs: Inputs, device: torch.device
) -> dict[str, Step]:
    """The Q8_0 blocks in ComfyUI-GGUF's layers; nothing where it is not there."""
    folders = os.environ.get("COMFYUI_PATH"), os.environ.get("COMFYUI_GGUF_PATH")
    if None in folders:
        return {}
    ops, lora = _import_city(*map(str, folders), device)
    import gguf

    q8_0 = gguf.GGMLQuantizationType.Q8_0
    tensors: dict[str, Tensor] = {}
    for key, weight in quantised(state, "Q8_0").items():
        if isinstance(weight, QuantTensor):
            shape = torch.Size(weight.shape)
            data = weight.data.to(device)
            tensors[key] = ops.GGMLTensor(data, tensor_type=q8_0, tensor_shape=shape)
        else:
            tensors[key] = weight.to(device, torch.bfloat16)
    ways = {}
    for label, loras in {ALONE: [], **sets}.items():
        model = ChromaTransformer(config, ops.GGMLOps)
        missing, unexpected = model.load_state_dict(
            {k: _fresh(v, ops) for k, v in tensors.items()}, strict=False
        )
        assert not missing and not unexpected, (missing, unexpected)
        for key in in_blocks(state):
            patches = [_city_patch(lora, key, *pair, device) for pair in loras]
            model.get_submodule(key.removesuffix(".weight")).weight.patches = (
                [(patches, key)] if patches else []
            )
        ways[label] = inputs.step(model.to(device).eval().requires_grad_(False))
    return ways


def _fresh(tensor: Tensor, ops: object) -> Tensor:
    """The same bytes as a tensor whose patches are its own."""
    kind = ops.GGMLTensor  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(tensor, kind):
        return tensor
    return kind(tensor.data, tensor_type=tensor.tensor_type, tensor_shape=tensor.tensor_shape)


def _city_patch(lora: object, key: str, file: LoraFile, strengths: Strengths, device) -> tuple:
    """One LoRA as ComfyUI's core reads it: (strength, adapter, 1, no offset, no function)."""
    adapter = file.transformer[key][0].adapter
    assert isinstance(adapter, LowRank)
    tensors = {"x.lora_up.weight": adapter.up, "x.lora_down.weight": adapter.down}
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    load = lora.load_lora  # pyright: ignore[reportAttributeAccessIssue]
    return (strengths.of(key), load(tensors, {"x": key})[key], 1.0, None, None)


def _import_city(comfyui: str, folder: str, device: torch.device):
    """ComfyUI-GGUF's `ops` and ComfyUI's `comfy.lora`."""
    sys.path.insert(0, comfyui)
    cpu = ["--cpu"] if device.type == "cpu" else []
    argv, sys.argv = sys.argv, ["comfyui", *cpu]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.lora

    sys.argv = argv
    spec = importlib.util.spec_from_file_location("comfyui_gguf", Path(folder, "__init__.py"))
    assert spec is not None
    # Not executed: it would register nodes, and only a running ComfyUI can do that.
    sys.modules["comfyui_gguf"] = importlib.util.module_from_spec(spec)
    return importlib.import_module("comfyui_gguf.ops"), comfy.lora


def time_all(args: argparse.Namespace, device: torch.device) -> list[dict]:
    torch.manual_seed(0)
    config = blocks_only(args.double, args.single)
    state, inputs = random_state(config), Inputs(config, args.tokens, device)
    sets = lora_sets(state, args.ranks, args.counts)
    rows = []
    for base in (*args.bases, "Q8_0 in ComfyUI-GGUF"):
        if base in args.bases:
            model = build(config, state, base, device)
            ways = {ALONE: inputs.step(model)}
            for label, loras in sets.items():
                other = with_loras(model, [Lora(*pair) for pair in loras])
                ways[label] = inputs.step(other)
        else:
            ways = city_ways(config, state, sets, inputs, device)
        figures = measure(ways, args.repeats, device)
        for label, ms in figures.items():
            ratio = ms / figures[ALONE]
            rows.append(
                {"base": base, "loras": label, "ms": round(ms, 2), "ratio": round(ratio, 3)}
            )
            print(f"{base:22} {label:14} {ms:10.2f} ms {ratio:7.3f}", flush=True)
    return rows


def compare_pictures(steps: int) -> dict[str, dict[str, float]]:
    """PSNR of each base's pictures against bf16's, without and with the LoRA on both."""
    settings = Settings(width=small.SIZE, height=small.SIZE, steps=steps, seed=3)
    rows: dict[str, dict[str, float]] = {}
    references: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        for base, target in (("bf16", None), ("fp8", "fp8"), ("Q8_0", "q8_0")):
            path = small.TRANSFORMER
            if target is not None:
                path = Path(folder, f"x.{'gguf' if target == 'q8_0' else 'safetensors'}")
                quantise_file(small.TRANSFORMER, target, path)
            pipeline = Pipeline.load(
                path, small.TEXT_ENCODER, small.TOKENIZER, small.VAE, dtype=torch.bfloat16
            )
            found = [generate(pipeline, FEW, "", settings, disable_progress=True)]
            lora = small_lora(pipeline.transformer)
            apply_lora(pipeline.transformer, [(lora, Strengths(SMALL_STRENGTH))])
            found.append(generate(pipeline, FEW, "", settings, disable_progress=True))
            references = references or found
            without, with_lora = (
                round(psnr(*pair), 2) for pair in zip(found, references, strict=True)
            )
            if target is None:
                rows[base] = {"change by the LoRA": round(psnr(found[1], found[0]), 2)}
            else:
                rows[base] = {"without LoRA": without, "with LoRA": with_lora}
            print(base, rows[base], flush=True)
    return rows


def small_lora(model: nn.Module) -> LoraFile:
    """A random LoRA of rank 8 on the small model's blocks."""
    shapes = {
        f"{name}.weight": (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if "_blocks." in name and hasattr(module, "in_features")
    }
    return random_lora(shapes, rank=8, seed=0)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--tokens", type=int, default=1024, help="of the picture, a square number")
    parser.add_argument("--double", type=int, default=1, help="double blocks")
    parser.add_argument("--single", type=int, default=2, help="single blocks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 96])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4], help="of LoRAs")
    parser.add_argument("--bases", nargs="+", default=["Q8_0", "fp8"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=26, help="of the pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    args = parser.parse_args()
    result = {
        "machine": {
            "torch": torch.__version__, "threads": torch.get_num_threads(),
            "device": str(args.device),
        },
        "blocks": {"double": args.double, "single": args.single, "tokens": args.tokens},
        "repeats": args.repeats,
        "times": time_all(args, args.device),
        "psnr": compare_pictures(args.steps),
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
