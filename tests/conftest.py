"""Shared fixtures. Keeps the repository root off sys.path: `python -m pytest` puts it there, and
our nodes/ would then shadow ComfyUI's nodes.py."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT]
sys.path.append(str(ROOT / "tests"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real ComfyUI server with this pack, for tests that are skipped without COMFYUI_PATH."""
    from comfy_queue import Server

    checkout = Path(os.environ["COMFYUI_PATH"])
    with Server(checkout, tmp_path_factory.mktemp("comfy") / "base") as running:
        yield running
