"""What one bad input is: how to try it, and the error it must end in."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """`attempt(empty folder)` must raise an error of the class called `error` that says `says`.

    The class is one of the pack's, or of those with which `bad_commands` and `bad_requests` tell
    how a command or a request ended.
    """

    name: str
    error: str
    says: str
    attempt: Callable[[Path], object]
