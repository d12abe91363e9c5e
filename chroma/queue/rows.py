"""The rows of a batch, from CSV or JSON lines."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import QueueError

SUFFIXES = (".jsonl", ".csv")


class Row(NamedTuple):
    """Values by field; those of a CSV file are text that has still to be read as what it is for."""

    where: str
    values: dict[str, Any]
    is_text: bool = False


def read_rows(path: Path) -> list[Row]:
    """The rows of a .csv file with a header or of a .jsonl file, empty lines left out.

    An empty cell is no value. Raises QueueError, naming the line.
    """
    read = {".jsonl": _json_lines, ".csv": _csv}.get(path.suffix.lower())
    if read is None:
        raise QueueError(f"{path.name} is no batch; expected a file ending in .jsonl or .csv")
    try:
        # With utf-8-sig, because spreadsheets put a byte order mark in front.
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(read(path.name, lines))
    except FileNotFoundError:
        raise QueueError(f"{path} does not exist; check the name and the folder") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise QueueError(f"{path.name} cannot be read ({error}); expected UTF-8") from None
    if not rows:
        raise QueueError(f"{path.name} has no rows; expected one for each picture")
    return rows


def _json_lines(name: str, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            values = json.loads(line, parse_constant=_refuse, object_pairs_hook=_no_twins)
        except (ValueError, RecursionError) as error:
            raise QueueError(f"{where} is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise QueueError(f'{where}: expected an object like {{"Prompt.text": "..."}}')
        for field, value in values.items():
            if not isinstance(value, str | int | float):
                raise QueueError(
                    f"{where}, {field}: {json.dumps(value)[:60]} is no value; "
                    "expected text, a number, true or false"
                )
        yield Row(where, values)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a field comes twice")
    return dict(pairs)


def _csv(name: str, lines: Iterator[str]) -> Iterator[Row]:
    reader = csv.reader(lines, strict=True)
    header = [field.strip() for field in next(reader, [])]
    if len(set(header)) < len(header) or "" in header:
        raise QueueError(f"{name} line 1: a field is empty or comes twice; expected node.input,...")
    for cells in reader:
        if not any(cells):
            continue
        where = f"{name} line {reader.line_num}"
        if len(cells) > len(header):
            raise QueueError(
                f"{where}: {len(cells)} cells for {len(header)} fields; "
                'put text that has a comma between " and "'
            )
        values = {field: cell for field, cell in zip(header, cells, strict=False) if cell}
        yield Row(where, values, is_text=True)
