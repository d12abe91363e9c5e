"""docs/comfyui-versions.md names code that exists, and no node compares versions."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "comfyui-versions.md").read_text("utf-8")
# A file, then one or more names in it.
PLACES = re.findall(r"`([\w/]+\.py)`: (`[\w.]+`(?:, `[\w.]+`)*)", PAGE)
NODES = sorted((ROOT / "nodes").glob("*.py"))


def defined(body, prefix=""):
    """The dotted names of all functions and classes."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + node.name
            yield from defined(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize(("file", "names"), PLACES)
def test_what_the_page_names_exists(file, names):
    found = set(defined(ast.parse((ROOT / file).read_text("utf-8")).body))
    assert set(re.findall(r"[\w.]+", names)) <= found


def test_every_place_of_the_page_is_looked_at():
    assert len(PLACES) == PAGE.count(".py`") > 0


@pytest.mark.parametrize("file", NODES, ids=lambda file: file.stem)
def test_no_version_is_compared(file):
    assert not re.search(r"comfyui_version|__version__", file.read_text("utf-8"))
