"""`chroma-nodes doctor`: what this machine has, to be pasted into a bug report."""

import argparse
import json
from dataclasses import asdict

from .doctor import diagnose, lines


def add_doctor_command(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Define `doctor`; returns its parser."""
    doctor = commands.add_parser("doctor", help="versions, devices and formats, for bug reports")
    doctor.add_argument("--json", action="store_true", help="everything, for programs")
    doctor.set_defaults(function=tell)
    return doctor


def tell(args: argparse.Namespace) -> list[str]:
    """Lines, or one JSON text."""
    found = diagnose()
    return [json.dumps(asdict(found), indent=2)] if args.json else lines(found)
