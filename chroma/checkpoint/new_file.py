"""Names for new model files: always below a given folder, and never one that is taken."""

import os
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError
from .reader import SUFFIXES
from .recipe import GGUF_TARGETS

# Bytes of one name in a path: file systems hold 255, behind it come a number and the ending.
_MAX_NAME = 220
# What Windows takes for drives, streams and wildcards, and control characters.
_FORBIDDEN = {*'<>:"|?*', *map(chr, range(32))}


def relative_name(name: str) -> PurePosixPath:
    """A file's name below a folder, without a model file's ending; `/` and `\\` part subfolders.

    Raises CheckpointError for a name that is empty or leads out of the folder.
    """
    name = name.strip()
    stem = name.replace("\\", "/")
    for suffix in (".gguf", *SUFFIXES):
        if stem.lower().endswith(suffix):
            stem = stem[: -len(suffix)]
            break
    path = PurePosixPath(stem)
    stays = not path.is_absolute() and ".." not in path.parts
    fits = all(len(part.encode("utf-8", "replace")) <= _MAX_NAME for part in path.parts)
    whole = not any("\ud800" <= letter <= "\udfff" for letter in stem)
    # A name of dots alone, such as that of "..gguf", stands for a folder.
    named = bool(stem.split("/")[-1].strip(". "))
    if not (stays and fits and whole and named and _FORBIDDEN.isdisjoint(name)):
        raise CheckpointError(
            f"{name[:80]!r} is no name for a new file; expected one inside the models folder, "
            "such as Chroma1-HD-q8_0, without .., drive or leading /"
        )
    return path


def new_file(folder: Path, name: str, target: str) -> Path:
    """Where a file of `target` (of `recipe.TARGETS`) called `name` goes below `folder`.

    The ending comes from the target. Where the name is taken, it gets a number as ComfyUI's saved
    files do: name_00002_, name_00003_. Raises CheckpointError as `relative_name` does.
    """
    path = relative_name(name)
    suffix = ".gguf" if target in GGUF_TARGETS else ".safetensors"
    whole = folder / path
    if not whole.parent.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{name!r} leads out of {folder.name} by a link in it; expected a name that stays "
            "inside"
        )
    file, number = whole.with_name(path.name + suffix), 1
    # Another program may be writing <file>.part right now; see atomic.py.
    while os.path.lexists(file) or os.path.lexists(f"{file}.part"):
        number += 1
        file = whole.with_name(f"{path.name}_{number:05}_{suffix}")
    return file
