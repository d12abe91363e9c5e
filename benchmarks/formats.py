"""What each storage format costs on the small model: picture, bytes, time.

    python benchmarks/formats.py --json benchmarks/results/formats.json

Every format is made from the shipped bf16 weights and drawn with the same prompts and seeds. PSNR
is that of the pictures against bf16's own; time is one step's, as the median of ratios to bf16's in
the same round.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.checkpoint.recipe import GGUF_TARGETS, TARGETS
from chroma_nodes.chroma.pipeline import Pipeline, Settings, generate
from chroma_nodes.chroma.quant.calibrate import small_model
from chroma_nodes.chroma.tiny import files as small
from pictures import PROMPTS, psnr


def render(pipeline: Pipeline, settings: Settings) -> tuple[torch.Tensor, float]:
    """Pictures of all prompts and the seconds they took."""
    started = time.perf_counter()
    pictures = generate(pipeline, PROMPTS, "", settings, disable_progress=True)
    return pictures, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=26)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings = Settings(width=small.SIZE, height=small.SIZE, steps=args.steps, seed=3)
    bf16 = Pipeline.load(dtype=torch.bfloat16)
    fp32 = Pipeline.load(dtype=torch.float32)
    reference, _ = render(bf16, settings)
    rows = {"bf16 weights, fp32 products": {"psnr": psnr(render(fp32, settings)[0], reference)}}
    int8 = Pipeline.load(dtype=torch.bfloat16, products="int8")
    rows["bf16 weights, int8 products"] = {"psnr": psnr(render(int8, settings)[0], reference)}
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            suffix = ".gguf" if target in GGUF_TARGETS else ".safetensors"
            path = Path(folder) / f"{target}{suffix}"
            calibration = small_model() if target == "fp8-learned" else None
            report = quantise_file(small.TRANSFORMER, target, path, calibration=calibration)
            pipeline = Pipeline.load(path, small.TEXT_ENCODER, small.TOKENIZER, small.VAE,
                                     dtype=torch.bfloat16)  # fmt: skip
            ratios = []
            for _ in range(args.repeats):
                pictures, seconds = render(pipeline, settings)
                ratios.append(seconds / render(bf16, settings)[1])
            rows[target] = {
                "psnr": psnr(pictures, reference),
                "bytes": report.bytes / report.source_bytes,
                "time": statistics.median(ratios),
            }
    print("| format | PSNR, dB | bytes | time of a step |\n|---|---|---|---|")
    for name, row in rows.items():
        cells = [f"{row['psnr']:.1f}", *(f"{row[k]:.2f} x" for k in ("bytes", "time") if k in row)]
        print(f"| {name} | " + " | ".join(cells + ["-"] * (3 - len(cells))) + " |")
    if args.json:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(),
                   "processor": platform.processor() or platform.machine()}  # fmt: skip
        args.json.write_text(json.dumps({"machine": machine, "formats": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
