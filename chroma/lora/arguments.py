"""`--lora FILE[:STRENGTH]` on the command line."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from ..errors import LoraError


@dataclass(frozen=True)
class LoraArgument:
    """One LoRA as it was asked for: its file, and one strength for all it changes."""

    path: Path
    strength: float = 1.0


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """The option for LoRAs; several are added up in the order in which they are given."""
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH]",
        help="a LoRA, with its strength (1) behind a colon; may be given several times",
    )  # fmt: skip


def loras_from(args: argparse.Namespace) -> list[LoraArgument]:
    """The LoRAs of a command line. Raises LoraError for a file that is not there."""
    return [parse_lora(text) for text in args.lora]


def parse_lora(text: str) -> LoraArgument:
    """FILE or FILE:STRENGTH; what exists as a file under the whole text is one.

    Only a number behind the last colon is a strength, so that drives ("C:\\x.safetensors") and
    colons in names stay what they are. Raises LoraError if there is no such file, or the strength
    is not finite.
    """
    whole = Path(text)
    if whole.is_file():
        return LoraArgument(whole)
    name, colon, tail = text.rpartition(":")
    strength = _number(tail) if colon else None
    if strength is None:
        raise LoraError(f"--lora {text}: there is no such file; check the name and the folder")
    if not math.isfinite(strength):
        raise LoraError(f"--lora {text}: the strength is {tail}; expected a number such as 0.8")
    path = Path(name)
    if not path.is_file():
        raise LoraError(f"--lora {text}: {name} is not a file; check the name and the folder")
    return LoraArgument(path, strength)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
