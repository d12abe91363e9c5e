"""Programs that take minutes, artwork or a browser: their documented lines fit what they take.

Each says what it takes when it is asked, which needs all that it imports; test_comfy_soak.py and
test_bad_inputs_table.py run what two of them consist of.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path
    for pattern in ("README.md", "docs/*.md", "docs/*.py", "benchmarks/*.py")
    for path in ROOT.glob(pattern)
]
LINE = re.compile(
    r"^ *(?:COMFYUI_PATH=\S+ )?python ((?:-m chroma_nodes\.|benchmarks/|docs/)\S+.*)$"
)


def documented() -> dict[str, list[str]]:
    """{program: the lines that start it}; the docs' client is run by test_comfy_api.py."""
    found: dict[str, list[str]] = {}
    for source in sorted(SOURCES):
        for match in filter(None, map(LINE.match, source.read_text("utf-8").splitlines())):
            words = match[1].partition("#")[0]
            program = " ".join(words.split()[: 2 if words.startswith("-m") else 1])
            if not program.startswith("docs/examples/"):
                found.setdefault(program, []).append(words)
    return found


LINES = documented()


def test_every_benchmark_is_documented():
    programs = {
        f"benchmarks/{path.name}"
        for path in (ROOT / "benchmarks").glob("*.py")
        if '__name__ == "__main__"' in path.read_text("utf-8")
    }
    assert programs and programs <= set(LINES)


@pytest.mark.parametrize("program", LINES)
def test_a_program_takes_what_its_lines_give_it(program):
    command = [sys.executable, *program.split(), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "No module named 'matplotlib'" in done.stderr:
        pytest.skip("matplotlib, which only this program needs, is not installed")
    assert done.returncode == 0, done.stderr
    for line in LINES[program]:
        for word in shlex.split(line.replace("[", " ").replace("]", " ")):
            assert not word.startswith("--") or re.search(rf"{word}\b", done.stdout), line
