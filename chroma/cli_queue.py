"""`chroma-nodes queue`: a workflow, or one for each row of a file, on a ComfyUI server."""

import argparse
from pathlib import Path

from tqdm import tqdm

from .errors import QueueError
from .queue import Row, Server, make_jobs, read_rows, run_batch
from .workflow.graph import read_prompt


def add_queue_command(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Define `queue`; returns its parser."""
    queue = commands.add_parser("queue", help="a workflow, or a batch of it, on a ComfyUI server")
    queue.add_argument("url", metavar="URL", help="for instance http://127.0.0.1:8188")
    queue.add_argument("workflow", type=Path, metavar="WORKFLOW_API.json")
    queue.add_argument("--set", action="append", default=[], metavar="node.input=value")
    queue.add_argument("--batch", type=Path, metavar="ROWS.jsonl|csv",
                       help="one picture a row; its fields are node.input")  # fmt: skip
    queue.add_argument("--out", type=Path, default=Path("output"), metavar="DIR",
                       help="what it has already is not made again")  # fmt: skip
    queue.add_argument("--quiet", action="store_true", help="no progress bar")
    queue.set_defaults(function=queue_workflow)
    return queue


def queue_workflow(args: argparse.Namespace) -> list[str]:
    """Run what is not done yet; the pictures saved, and a line in all. Raises a ChromaError."""
    prompt = read_prompt(args.workflow)
    rows = [Row(args.workflow.name, {})] if args.batch is None else read_rows(args.batch)
    server = Server(args.url)
    jobs = make_jobs(server, prompt, args.set, rows)
    with tqdm(total=len(jobs), unit="row", disable=args.quiet) as bar:
        report = run_batch(server, jobs, args.out, progress=bar.update)
    saved = [str(path) for path in report.saved]
    if report.failed:
        raise QueueError(
            f"{len(report.failed)} of {len(jobs)} rows failed, the first: {report.failed[0]}; "
            f"{len(saved)} pictures were saved, and the same command tries the others again"
        )
    before = f", {report.before} of them done before" if report.before else ""
    return [*saved, f"{len(jobs)} rows{before}; {len(saved)} pictures saved in {args.out}"]
