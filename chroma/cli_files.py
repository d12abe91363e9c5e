"""The commands for model files: `chroma-nodes quantize` and `chroma-nodes inspect`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from .checkpoint.inspect import describe, inspect_file
from .checkpoint.quantise import quantise_file
from .checkpoint.recipe import TARGETS
from .errors import CheckpointError


def add_file_commands(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Define both commands; returns the parser of `quantize`."""
    quantize = commands.add_parser("quantize", help="make a smaller file of a transformer or T5")
    quantize.add_argument("source", type=Path, metavar="IN", help="bf16, fp16 or fp32 safetensors")
    quantize.add_argument("--to", required=True, choices=TARGETS, metavar="FORMAT",
                          help=", ".join(TARGETS))  # fmt: skip
    quantize.add_argument("--out", type=Path, required=True, metavar="FILE")
    quantize.add_argument("--keep", action="append", default=[], metavar="PATTERN",
                          help="part of names of tensors to keep; may be repeated")  # fmt: skip
    quantize.add_argument("--calibration", type=Path, metavar="FILE",
                          help="safetensors of layers' inputs, for fp8-learned")  # fmt: skip
    quantize.add_argument("--report", type=Path, metavar="FILE.json", help="errors layer by layer")
    quantize.set_defaults(function=quantize_model)
    inspect = commands.add_parser("inspect", help="what a model file is and what loads it")
    inspect.add_argument("files", type=Path, nargs="+", metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="everything, for programs")
    inspect.set_defaults(function=inspect_models)
    return quantize


def quantize_model(args: argparse.Namespace) -> list[str]:
    """Write the file; a line that says what it cost. Raises a ChromaError."""
    with tqdm(total=1, unit="B", unit_scale=True, disable=args.quiet) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(name[-40:], refresh=False)
            bar.update(done - bar.n)

        report = quantise_file(
            args.source, args.to, args.out, tuple(args.keep), args.calibration, progress,
            device=args.device or "cpu",
        )  # fmt: skip
    if args.report is not None:
        _write_report(args.report, json.dumps(asdict(report), indent=2) + "\n")
    return [str(args.out), report.summary()]


def _write_report(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise CheckpointError(
            f"the model was written, but not its report {path} ({error.strerror}); choose a folder "
            "that exists and can be written to"
        ) from None


def inspect_models(args: argparse.Namespace) -> list[str]:
    """Lines, or one JSON text, about each file. Raises CheckpointError."""
    found = [inspect_file(path) for path in args.files]
    if args.json:
        return [json.dumps([asdict(one) for one in found], indent=2)]
    return [line for one in found for line in describe(one)]
