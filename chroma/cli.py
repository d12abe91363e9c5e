"""The command line: `chroma-nodes generate`, `run`, `quantize`, `inspect`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .cli_files import add_file_commands
from .devices import best_device
from .errors import CheckpointError, ChromaError, ImageError, SamplingError
from .pipeline import Settings
from .presets import BASE
from .quant.products import EIGHT_BIT
from .tiny import files as small
from .workflow import REGISTRY, Context, apply_overrides, execute, read_prompt, to_interface
from .workflow.graph import Prompt
from .workflow.nodes_chroma import DTYPES
from .workflow.single import text_to_image

INTERRUPTED = 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="chroma-nodes", description="Chroma text-to-image without ComfyUI."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="a prompt to a picture")
    generate.add_argument("prompt")
    generate.add_argument("--negative", default="", metavar="TEXT")
    generate.add_argument("--width", type=int, help="pixels, in 16s (1024; small model 128)")
    generate.add_argument("--height", type=int, help="pixels, in 16s (1024; small model 128)")
    generate.add_argument("--steps", type=int, default=BASE.steps)
    generate.add_argument("--cfg", type=float, default=BASE.cfg)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--sampler", default=BASE.sampler)
    generate.add_argument("--scheduler", default=BASE.scheduler)
    generate.add_argument("--shift", type=float, default=BASE.shift)
    generate.add_argument("--model", type=Path, metavar="FILE", help="else the small model")
    generate.add_argument("--text-encoder", type=Path, metavar="FILE", help="else the small one")
    generate.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json of T5")
    generate.add_argument("--vae", type=Path, metavar="FILE", help="else the small one")
    generate.add_argument("--out", type=Path, default=Path("chroma.png"), metavar="FILE.png")

    run = commands.add_parser("run", help="a workflow in ComfyUI's API format")
    run.add_argument("workflow", type=Path, metavar="WORKFLOW_API.json")
    run.add_argument("--set", action="append", default=[], metavar="node.input=value")
    run.add_argument("--out", type=Path, default=Path("output"), metavar="DIR")
    run.add_argument("--models", type=Path, default=Path("models"), metavar="DIR")
    run.add_argument("--input", type=Path, metavar="DIR", help="else inputs beside the workflow")
    generate.add_argument(
        "--dtype", default="auto", choices=("auto", *DTYPES, *EIGHT_BIT),
        help="of weights; int8 and fp8 also multiply the transformer's blocks in 8 bits",
    )  # fmt: skip
    generate.set_defaults(function=generate_picture)
    run.set_defaults(function=run_workflow)
    quantize = add_file_commands(commands)
    for command in (generate, run, quantize):
        command.add_argument("--device", help="for instance cpu; else what torch finds")
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def run_workflow(args: argparse.Namespace) -> list[Path]:
    """Execute a workflow file; the pictures it saved."""
    prompt = apply_overrides(read_prompt(args.workflow), args.set)
    inputs = args.input or args.workflow.parent / "inputs"
    context = _context(args, prompt, args.models, inputs, args.out)
    return _execute(context)


def generate_picture(args: argparse.Namespace) -> list[Path]:
    """Build the graph of one text-to-image run and execute it."""
    if args.out.suffix.lower() != ".png":
        raise ImageError(f"--out {args.out}: expected a name ending in .png")
    if (args.text_encoder is None) != (args.vae is None):
        raise CheckpointError(
            "expected --text-encoder and --vae together: the small model's do not fit other files"
        )
    side = small.SIZE if args.model is None else 1024
    settings = Settings(
        width=side if args.width is None else args.width,
        height=side if args.height is None else args.height,
        steps=args.steps, cfg=args.cfg, seed=args.seed,
        sampler=args.sampler, scheduler=args.scheduler, shift=args.shift,
    )  # fmt: skip
    files = {"model": args.model, "text_encoder": args.text_encoder, "vae": args.vae}
    prompt = text_to_image(args.prompt, args.negative, settings, files, args.dtype)
    context = _context(args, prompt, Path(), Path(), Path())
    context.out_file = args.out
    outside = {
        "diffusion_models": args.model, "text_encoders": args.text_encoder, "vae": args.vae,
    }  # fmt: skip
    context.files = {(k, path.name): path for k, path in outside.items() if path is not None}
    if args.tokenizer is not None:
        context.files["text_encoders", "tokenizer.json"] = args.tokenizer
    return _execute(context)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 2 after a user's error, 130 after Ctrl-C."""
    args = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        lines = args.function(args)
    except ChromaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    for line in lines:
        print(line)
    return 0


def _device(name: str | None) -> torch.device:
    """Raises SamplingError for a device that cannot compute here."""
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise SamplingError(
            f"--device {name} cannot be used ({str(error).splitlines()[0]}); expected cpu or an "
            "accelerator of this machine"
        ) from None
    return device


def _context(
    args: argparse.Namespace, prompt: Prompt, models: Path, inputs: Path, outputs: Path
) -> Context:
    workflow = to_interface(prompt, REGISTRY)
    device = _device(args.device)
    return Context(device, models, inputs, outputs, prompt, workflow, progress=not args.quiet)


def _execute(context: Context) -> list[Path]:
    execute(context)
    if context.steps:
        each = context.seconds / context.steps
        print(f"{context.steps} steps, {each:.3f} s per step on {context.device}")
    return context.saved
