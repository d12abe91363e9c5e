"""What a batch has done, in a file beside its pictures."""

import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import QueueError

NAME = "chroma-queue.json"
VERSION = 1


class State:
    """The rows of all batches into one folder, by key; every change is on disk when it returns."""

    def __init__(self, folder: Path) -> None:
        """Read the folder's state, if it has any; raises QueueError for a file that is none."""
        self.folder, self.file = folder, folder / NAME
        self._rows: dict[str, dict[str, Any]] = {}
        try:
            self._rows = _rows(json.loads(self.file.read_text("utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError, RecursionError):
            raise QueueError(
                f"{self.file} is not the state of a batch; "
                "move it away to begin anew, or choose another folder with --out"
            ) from None

    def is_done(self, key: str) -> bool:
        """Whether a row's pictures were saved and are still there."""
        names = self._rows.get(key, {}).get("pictures", [])
        return bool(names) and all((self.folder / name).is_file() for name in names)

    def prompt_id(self, key: str) -> str | None:
        """The id under which a row was queued last, unless it is done."""
        row = self._rows.get(key, {})
        return None if "pictures" in row else row.get("prompt_id")

    def queued(self, key: str, prompt_id: str) -> None:
        self._put(key, {"prompt_id": prompt_id})

    def done(self, key: str, prompt_id: str, pictures: list[str]) -> None:
        self._put(key, {"prompt_id": prompt_id, "pictures": pictures})

    def forget(self, key: str) -> None:
        self._rows.pop(key, None)
        self._write()

    def _put(self, key: str, row: dict[str, Any]) -> None:
        self._rows[key] = row
        self._write()

    def _write(self) -> None:
        text = json.dumps({"version": VERSION, "rows": self._rows}, indent=1) + "\n"
        with whole(self.file) as part:
            part.write_text(text, "utf-8")


class whole:
    """`with whole(path) as part:` writes `part`, which becomes `path` at the end, or is removed.

    Raises QueueError where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Beside the target, because os.replace is atomic within one file system only.
        self.part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")

    def __enter__(self) -> Path:
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.part

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        try:
            if kind is None:
                os.replace(self.part, self.path)
        except OSError as failed:
            error, kind = failed, OSError
        finally:
            with suppress(OSError):
                self.part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise QueueError(
                f"cannot write {self.path} ({error.strerror or error}); "
                "choose another folder or make room"
            ) from None


def _rows(found: Any) -> dict[str, dict[str, Any]]:
    """Raises ValueError for anything but what `_put` writes."""
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise ValueError
    rows = found.get("rows")
    if not isinstance(rows, dict):
        raise ValueError
    for row in rows.values():
        names = row.get("pictures", []) if isinstance(row, dict) else None
        if not isinstance(names, list) or not isinstance(row.get("prompt_id"), str):
            raise ValueError
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError
    return rows
