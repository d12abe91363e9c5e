"""The command line: `chroma-nodes generate` and `chroma-nodes run`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .devices import best_device
from .errors import ChromaError, ImageError
from .pipeline import Settings
from .presets import BASE
from .tiny import files as small
from .workflow import REGISTRY, Context, apply_overrides, execute, read_prompt, to_interface
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
    for command in (generate, run):
        command.add_argument("--device", type=torch.device, help="for instance cpu")
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> list[Path]:
    """Execute a workflow file; the pictures it saved."""
    prompt = apply_overrides(read_prompt(args.workflow), args.set)
    inputs = args.input or args.workflow.parent / "inputs"
    context = _context(args, prompt, models=args.models, inputs=inputs, outputs=args.out)
    return _execute(context)


def generate(args: argparse.Namespace) -> list[Path]:
    """Build the graph of one text-to-image run and execute it."""
    if args.out.suffix.lower() != ".png":
        raise ImageError(f"--out {args.out}: expected a name ending in .png")
    side = small.SIZE if args.model is None else 1024
    settings = Settings(
        width=args.width or side, height=args.height or side, steps=args.steps, cfg=args.cfg,
        seed=args.seed, sampler=args.sampler, scheduler=args.scheduler, shift=args.shift,
    )  # fmt: skip
    files = {"model": args.model, "text_encoder": args.text_encoder, "vae": args.vae}
    prompt = text_to_image(args.prompt, args.negative, settings, files)
    context = _context(args, prompt, models=Path(), inputs=Path(), outputs=Path())
    context.out_file = args.out
    context.files = {path.name: path for path in files.values() if path is not None}
    if args.tokenizer is not None:
        context.files["tokenizer.json"] = args.tokenizer
    return _execute(context)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 2 after a user's error, 130 after Ctrl-C."""
    args = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        paths = generate(args) if args.command == "generate" else run(args)
    except ChromaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    for path in paths:
        print(path)
    return 0


def _context(args: argparse.Namespace, prompt: dict[str, Any], **folders: Path) -> Context:
    return Context(
        args.device or best_device(), **folders, prompt=prompt,
        workflow=to_interface(prompt, REGISTRY), progress=not args.quiet,
    )  # fmt: skip


def _execute(context: Context) -> list[Path]:
    execute(context)
    if context.steps:
        each = context.seconds / context.steps
        print(f"{context.steps} steps, {each:.3f} s per step on {context.device}")
    return context.saved
