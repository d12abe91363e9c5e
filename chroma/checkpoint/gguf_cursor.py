"""Read the primitive values of a GGUF header from a mapped file, without trusting any length."""

import mmap
import struct
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .reader import MAX_HEADER, MAX_NAME, damaged


class Cursor:
    """A place in a mapped file that moves forward over what is read, never past the end."""

    def __init__(self, path: Path, data: mmap.mmap, position: int = 0) -> None:
        self.path, self.data, self.position = path, data, position
        self.size = len(data)
        self.end = min(self.size, position + MAX_HEADER)

    def skip(self, count: int) -> int:
        """Move over `count` bytes and return where they start."""
        start = self.position
        if count > self.end - start:
            raise self.too_short(start, count)
        self.position = start + count
        return start

    def number(self, code: str) -> Any:
        start = self.skip(struct.calcsize(code))
        return struct.unpack_from(code, self.data, start)[0]

    def raw(self) -> bytes:
        start = self.skip(self.number("<Q"))
        return self.data[start : self.position]

    def string(self) -> str:
        return self.raw().decode("utf-8", errors="replace")

    def name(self) -> str:
        """The name of a key or tensor."""
        text = self.raw()
        try:
            name = text.decode("utf-8")
        except UnicodeError:
            name = ""
        if not name or not name.isprintable() or len(name) > MAX_NAME:
            raise damaged(self.path, f"the name {text[:40]!a} in its header is not usable")
        return name

    def skip_strings(self, count: int) -> None:
        """Move over texts by their lengths alone."""
        length, data, position, end = (
            struct.Struct("<Q").unpack_from,
            self.data,
            self.position,
            self.end,
        )
        for _ in range(count):
            if position + 8 > end:
                raise self.too_short(position, 8)
            position += 8 + length(data, position)[0]
        self.skip(position - self.position)

    def too_short(self, position: int, count: int) -> CheckpointError:
        if self.end < self.size:
            return damaged(self.path, f"its header is larger than {MAX_HEADER >> 20} MiB")
        return damaged(
            self.path,
            f"its header needs {position + count} bytes or more, the file has {self.size}",
        )
