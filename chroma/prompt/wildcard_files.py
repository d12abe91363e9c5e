"""Wildcard files: `<folder>/<name>.txt`, one option a line, `#` before a remark."""

import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..errors import PromptError

FOLDER = "wildcards"
MAX_BYTES = 16 * 2**20
# As many files as are looked at for a list of names.
MAX_FILES = 10_000


@dataclass(frozen=True)
class WildcardFolders:
    """Folders in which wildcard files are looked for, in this order, and nowhere else."""

    folders: tuple[Path, ...]

    def read_lines(self, name: str) -> list[str]:
        """The options in a file, without remarks and empty lines.

        Raises PromptError if it is missing, outside the folders, too large, not UTF-8 or empty.
        """
        path = self._find(name)
        try:
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise PromptError(f"cannot read {path}: {error.strerror}; check the file") from None
        if len(content) > MAX_BYTES:
            raise PromptError(f"{path} is larger than {MAX_BYTES // 2**20} MiB; split it")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise PromptError(f"{path} is not UTF-8 text; save it as that") from None
        lines = (line.strip() for line in text.splitlines())
        options = [line for line in lines if line and not line.startswith("#")]
        if not options:
            raise PromptError(f"{path} has no options; write one a line")
        return options

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or written."""
        state = hashlib.sha256()
        for _, path in sorted(self._files()):
            stat = path.stat()
            state.update(f"{path}\0{stat.st_mtime_ns}\0{stat.st_size}\0".encode("utf-8", "replace"))
        return state.hexdigest()

    def _find(self, name: str) -> Path:
        if not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise PromptError(_outside(name))
        for folder in self.folders:
            try:
                root = folder.resolve()
                path = (root / f"{name}.txt").resolve()
                found = path.is_file()
            except (OSError, RuntimeError):  # a name too long, a ring of links
                continue
            if found and not path.is_relative_to(root):
                raise PromptError(_outside(name))
            if found:
                return path
        near = difflib.get_close_matches(name, [known for known, _ in self._files()], 1)
        hint = f"did you mean __{near[0]}__?" if near else rf"for plain text write \__{name}\__"
        places = " or ".join(map(str, self.folders))
        raise PromptError(f"the wildcard file {name}.txt is not in {places}; {hint}")

    def _files(self) -> Iterator[tuple[str, Path]]:
        """(name, path) of the files there are."""
        for folder in self.folders:
            for path in islice(folder.rglob("*.txt"), MAX_FILES):
                if path.is_file():
                    yield path.relative_to(folder).with_suffix("").as_posix(), path


def _outside(name: str) -> str:
    return (
        f"the wildcard __{name}__ leads out of the wildcards folder; "
        "expected the name of a file in it"
    )
