"""`chroma-nodes run`: a workflow file; and how any graph is run on the command line."""

import argparse
from pathlib import Path

from .devices import parse_device
from .lora.arguments import add_lora_arguments, loras_from
from .workflow import REGISTRY, Context, apply_overrides, execute, read_prompt, to_interface
from .workflow.graph import Prompt
from .workflow.insert_loras import insert_loras, lora_files


def add_run_command(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Define `run`; returns its parser."""
    run = commands.add_parser("run", help="a workflow in ComfyUI's API format")
    run.add_argument("workflow", type=Path, metavar="WORKFLOW_API.json")
    run.add_argument("--set", action="append", default=[], metavar="node.input=value")
    run.add_argument("--out", type=Path, default=Path("output"), metavar="DIR")
    run.add_argument("--models", type=Path, default=Path("models"), metavar="DIR")
    run.add_argument("--input", type=Path, metavar="DIR", help="else inputs beside the workflow")
    add_lora_arguments(run)
    run.set_defaults(function=run_workflow)
    return run


def run_workflow(args: argparse.Namespace) -> list[str]:
    """Execute a workflow file; what `run_context` tells."""
    loras = loras_from(args)
    prompt = insert_loras(apply_overrides(read_prompt(args.workflow), args.set), loras, REGISTRY)
    inputs = args.input or args.workflow.parent / "inputs"
    context = new_context(args, prompt, args.models, inputs, args.out)
    context.files |= lora_files(loras)
    return run_context(context)


def new_context(
    args: argparse.Namespace, prompt: Prompt, models: Path, inputs: Path, outputs: Path
) -> Context:
    """What the run shares, with `args.device` and `args.quiet`. Raises a ChromaError."""
    workflow = to_interface(prompt, REGISTRY)
    device = parse_device(args.device)
    return Context(device, models, inputs, outputs, prompt, workflow, progress=not args.quiet)


def run_context(context: Context) -> list[str]:
    """Execute; a line on what it took, and one for each picture saved."""
    execute(context)
    saved = [str(path) for path in context.saved]
    if not context.steps:
        return saved
    passes = f"{context.passes} passes"
    if context.skipped:
        passes += f" ({context.skipped} of them skipped behind the first block)"
    each = context.seconds / context.steps
    return [f"{context.steps} steps, {passes}, {each:.3f} s per step on {context.device}", *saved]
