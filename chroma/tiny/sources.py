"""Fetch the artwork and the names: two npm packages; the font is Debian's."""

import subprocess
import tarfile
from pathlib import Path

PACKAGES = {
    "fluent-emoji-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "emojibase-data": "emojibase-data@17.0.0",
}


def fetch(folder: Path) -> None:
    """Unpack each npm package below `folder`, unless it is there already.

    Raises FileNotFoundError where npm is not installed, CalledProcessError where it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        if (folder / name).exists():
            continue
        packed = subprocess.run(
            ["npm", "pack", "--silent", package],
            cwd=folder, check=True, capture_output=True, text=True,
        ).stdout.split()[-1]  # fmt: skip
        with tarfile.open(folder / packed) as archive:
            archive.extractall(folder / name, filter="data")
        (folder / packed).unlink()
