"""Every bad input, tried in a process of its own under limits of time and memory.

    python tests/bad_run.py SURFACE

prints one JSON object a line: first of the limits, then one of each case, last of a good picture.
"""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bad_case import Case

# For one case, beyond what the process has once it drew a picture.
MEMORY = 512 * 1024 * 1024
SECONDS = 20
MAX_MESSAGE = 1500
SURFACES = {
    "headers": ("bad_files", "HEADERS"),
    "models": ("bad_files", "MODELS"),
    "loras": ("bad_files", "LORAS"),
    "pictures": ("bad_files", "PICTURES"),
    "workflows": ("bad_workflows", "WORKFLOWS"),
    "prompts": ("bad_workflows", "PROMPTS"),
    "names": ("bad_workflows", "NAMES"),
    "commands": ("bad_commands", "COMMANDS"),
}


@dataclass(frozen=True)
class Outcome:
    """How one case ended: the error's class, "" where there was none, its text, and its cost."""

    name: str
    error: str
    message: str
    seconds: float
    bytes: int


def cases(surface: str) -> tuple[Case, ...]:
    """The cases of one part of the pack."""
    module, table = SURFACES[surface]
    return getattr(__import__(module), table)


def complaint(case: Case, outcome: Outcome) -> str:
    """What is wrong with how a case ended, or ""."""
    if outcome.error != case.error:
        ended = outcome.error or "nothing raised"
        return f"expected {case.error}, got {ended}: {outcome.message}"
    if case.says not in outcome.message or "\n" in outcome.message:
        return f"expected one line with {case.says!r}, got {outcome.message!r}"
    if not 0 < len(outcome.message) <= MAX_MESSAGE:
        return f"the message has {len(outcome.message)} letters"
    if outcome.seconds > SECONDS or outcome.bytes > MEMORY:
        return f"it took {outcome.seconds:.1f} s and {outcome.bytes} bytes"
    return ""


def run_surface(surface: str) -> tuple[list[Outcome], bool]:
    """Every outcome, and whether a good picture came out as it did before them."""
    command = [sys.executable, str(Path(__file__)), surface]
    limit = 60 + SECONDS * len(cases(surface))
    told = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    if told.returncode:
        raise RuntimeError(
            f"{surface}: the process died\n{told.stdout[-500:]}{told.stderr[-3000:]}"
        )
    *outcomes, last = map(json.loads, told.stdout.splitlines())
    return [Outcome(**one) for one in outcomes], last["same"]


def by_class(outcomes: list[Outcome]) -> Counter[str]:
    return Counter(outcome.error for outcome in outcomes)


def _status(field: str) -> int:
    """A size in bytes that Linux tells of this process."""
    text = Path("/proc/self/status").read_text("ascii")
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(field))) * 1024


@contextmanager
def _limited() -> Iterator[None]:
    """No more than MEMORY of address space beyond today's, and SECONDS, for what is inside."""

    def late(*_: object) -> None:
        raise TimeoutError(f"it took more than {SECONDS} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MEMORY, before[1]))
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _attempt(case: Case) -> Outcome:
    began, error, message = time.perf_counter(), "", ""
    # Starts the peak of resident memory anew.
    Path("/proc/self/clear_refs").write_text("5")
    resident = _status("VmRSS")
    with tempfile.TemporaryDirectory() as folder, _limited():
        try:
            case.attempt(Path(folder))
        except BaseException as raised:
            error, message = type(raised).__name__, str(raised)
    grown = max(_status("VmHWM") - resident, 0)
    return Outcome(case.name, error, message, time.perf_counter() - began, grown)


def _digest() -> str:
    from bad_workflows import good_picture

    with tempfile.TemporaryDirectory() as folder:
        return hashlib.sha256(good_picture(Path(folder))).hexdigest()


def main(surface: str) -> None:
    """Try the cases of a surface; tells on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    before = _digest()
    for case in cases(surface):
        print(json.dumps(asdict(_attempt(case))), file=out, flush=True)
    print(json.dumps({"same": _digest() == before}), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
