"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` when the block ends well.

    Until then it is `<path>.part`; an error or Ctrl-C removes it and leaves `path` as it was.
    Raises CheckpointError where the disk does not take the file.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        _remove(part)
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}); check the folder, its permissions and "
            "the room on the disk"
        ) from None
    except BaseException:
        _remove(part)
        raise


def _remove(part: Path) -> None:
    """Take away a file that may not even exist, without hiding the error that led here."""
    try:
        part.unlink(missing_ok=True)
    except OSError:
        # The folder itself is missing or read-only: there is nothing of ours in it.
        return
