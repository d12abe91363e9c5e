"""What a node of a workflow looks like: its inputs, its outputs, and the function behind it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Input:
    """One input. A widget type holds a value (or a link); any other type takes a link only."""

    name: str
    type: str
    default: Any = REQUIRED
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] | None = None
    # The folder in which the value names a file: a models subfolder, "input" or "output".
    folder: str | None = None
    # Widgets behind which ComfyUI's interface shows another one: what happens to the seed.
    is_seed: bool = False
    # Pictures, for which the interface shows an upload button behind the node's widgets.
    is_upload: bool = False

    @property
    def is_widget(self) -> bool:
        return self.type in WIDGETS


@dataclass(frozen=True)
class NodeType:
    """One kind of node. `run(context, **inputs)` returns the outputs in order."""

    id: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str], ...]  # (name, type)
    run: Callable[..., tuple[Any, ...]]
    is_output: bool = False


Registry = dict[str, NodeType]
