"""From rows to workflows: each row's values put into its own copy of the graph."""

import hashlib
import json
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import QueueError, WorkflowError
from ..workflow import apply_overrides
from .refusals import node_label
from .rows import Row
from .server import Prompt, Server

BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class Job:
    """One row's workflow; `where` names the row and `number` counts it, from 1."""

    where: str
    number: int
    prompt: Prompt

    @cached_property
    def key(self) -> str:
        """SHA-256 of what decides the picture: node classes and inputs, not titles."""
        content = {
            node_id: [node["class_type"], node.get("inputs", {})]
            for node_id, node in self.prompt.items()
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Target(NamedTuple):
    """The input a field sets, and its declared type, or None where the server declares none."""

    node: str
    input: str
    type: Any


def make_jobs(
    server: Server, prompt: Prompt, overrides: Sequence[str], rows: Sequence[Row]
) -> list[Job]:
    """A job for each row. Overrides and fields are `node.input`, as in `apply_overrides`.

    Raises WorkflowError or QueueError, naming the row, for a node or input there is not.
    """
    server.check()
    changed = apply_overrides(prompt, overrides)
    types: dict[str, dict[str, Any]] = {}
    for override in overrides:
        _target(server, prompt, override.partition("=")[0], types, f"--set {override}")
    prompt = changed
    targets: dict[str, Target] = {}
    jobs = []
    for number, row in enumerate(rows, 1):
        # Only the nodes that differ are copied, because a batch can have many rows.
        own = dict(prompt)
        for field, value in row.values.items():
            where = f"{row.where}, field {field}"
            if field not in targets:
                targets[field] = _target(server, prompt, field, types, where)
            target = targets[field]
            value = _typed(where, value, target.type) if row.is_text else value
            node = own[target.node]
            inputs = {**node.get("inputs", {}), target.input: value}
            own[target.node] = {**node, "inputs": inputs}
        jobs.append(Job(row.where, number, own))
    return jobs


def _target(
    server: Server, prompt: Prompt, field: str, types: dict[str, dict[str, Any]], where: str
) -> Target:
    if "." not in field:
        raise QueueError(f"{where}: expected node.input, for instance Prompt.text")
    # The one node that a value which occurs nowhere changes.
    override = f'{field}="{uuid.uuid4()}"'
    try:
        changed = apply_overrides(prompt, [override])
    except WorkflowError as error:
        raise QueueError(f"{where}: {str(error).removeprefix(f'--set {override}: ')}") from None
    node_id = next(node_id for node_id in prompt if changed[node_id] != prompt[node_id])
    name, node = field.rpartition(".")[2], prompt[node_id]
    if node["class_type"] not in types:
        types[node["class_type"]] = server.input_types(node["class_type"])
    known = types[node["class_type"]]
    # Inputs that grow with the graph are declared nowhere, but those in use are in it.
    if name not in known and name not in node.get("inputs", {}):
        raise QueueError(
            f"{where}: {node_label(prompt, node_id)} has no input {name}; "
            f"expected one of {', '.join(known)}"
        )
    return Target(node_id, name, known.get(name))


def _typed(where: str, text: str, kind: Any) -> Any:
    """A cell as the value its input takes; text where the input is no number and no switch."""
    try:
        if kind == "INT":
            return int(text)
        if kind == "FLOAT" and math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    if kind == "BOOLEAN" and text.strip().lower() in BOOLEANS:
        return BOOLEANS[text.strip().lower()]
    expected = {"INT": "a whole number", "FLOAT": "a number", "BOOLEAN": "true or false"}
    if isinstance(kind, str) and kind in expected:
        raise QueueError(f"{where}: {text[:60]!r} is not usable; expected {expected[kind]}")
    return text
