"""Shared fixtures. Keeps the repository root off sys.path: `python -m pytest` puts it there, and
our nodes/ would then shadow ComfyUI's nodes.py."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT]
sys.path.append(str(ROOT / "tests"))
