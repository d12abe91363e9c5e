"""LoRAs as nodes ask for them: by name, in rows of a node or in a stack between nodes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import LoraError
from .strengths import Strengths, parse_blocks

NONE = "none"
ROWS = 4


@dataclass(frozen=True)
class Row:
    """One LoRA as it is asked for."""

    name: str
    strength: float = 1.0
    text_encoder: float = 1.0
    blocks: str = ""

    @property
    def strengths(self) -> Strengths:
        """Raises LoraError for blocks that cannot be read."""
        return Strengths(self.strength, self.text_encoder, parse_blocks(self.blocks))


def chosen_rows(rows: Mapping[str, Any]) -> list[Row]:
    """The rows of a node's inputs lora_1, strength_1, text_encoder_strength_1 ... with a file.

    Where there is no strength of its own for the text encoder, it has that of the model.
    """
    chosen = []
    for i in range(1, ROWS + 1):
        name, strength = rows[f"lora_{i}"], rows[f"strength_{i}"]
        if name != NONE:
            chosen.append(Row(name, strength, rows.get(f"text_encoder_strength_{i}", strength)))
    return chosen


def stacked_rows(stack: Iterable[tuple[str, float, float]] | None) -> list[Row]:
    """A LORA_STACK of (name, strength on the model, on the text encoder), as other packs make it.

    Raises LoraError for anything else.
    """
    try:
        return [
            Row(str(name), float(strength), float(text_encoder))
            for name, strength, text_encoder in stack or ()
        ]
    except (TypeError, ValueError):
        raise LoraError(
            "the LORA_STACK is not a list of (name, model strength, clip strength); connect the "
            "stack output of a LoRA node"
        ) from None


def stack_of(rows: Iterable[Row]) -> list[tuple[str, float, float]]:
    """The LORA_STACK of rows; strengths of blocks have no place in one."""
    return [(row.name, row.strength, row.text_encoder) for row in rows]
