"""How strong a LoRA is: on the transformer, on the text encoder, and block by block."""

import math
import re
from dataclasses import dataclass

from ..errors import LoraError

# The transformer's parts: both kinds of blocks by number, and what is outside of them.
DOUBLE, SINGLE, OTHER = "double", "single", "other"
_MODULE = re.compile(r"(double|single)_blocks\.(\d+)\.")
# No model has blocks of more digits, and Python refuses numbers of thousands.
_NUMBER = r"\d{1,6}"
_ITEM = re.compile(
    rf"({DOUBLE}|{SINGLE}|{OTHER})((?:\s+{_NUMBER}(?:\s*-\s*{_NUMBER})?)*)\s*:\s*(\S+)", re.I
)
_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
EXAMPLE = "'double 0-9: 0.5, single: 1'"


@dataclass(frozen=True)
class BlockStrength:
    """A factor for one kind of blocks: those from `first` to `last`, both included."""

    part: str
    factor: float
    first: int = 0
    last: int | None = None

    def covers(self, part: str, number: int) -> bool:
        """Whether block `number` of this part is meant; `last` None is the end."""
        upper = number if self.last is None else self.last
        return self.part == part and self.first <= number <= upper


@dataclass(frozen=True)
class Strengths:
    """Strength 1 is the LoRA as it was trained; `blocks` multiply that of the transformer."""

    model: float = 1.0
    text_encoder: float = 1.0
    blocks: tuple[BlockStrength, ...] = ()

    def of(self, module: str) -> float:
        """The strength on one module of the transformer, by its own name.

        Where several block strengths cover a module, the last one counts.
        """
        match = _MODULE.match(module)
        part, number = (match[1], int(match[2])) if match else (OTHER, 0)
        factors = [block.factor for block in self.blocks if block.covers(part, number)]
        return self.model * (factors[-1] if factors else 1.0)

    def check(self, double_depth: int, single_depth: int) -> None:
        """Raises LoraError where a block is meant that a model of these depths does not have."""
        depths = {DOUBLE: double_depth, SINGLE: single_depth}
        for block in self.blocks:
            depth = depths.get(block.part)
            number = block.first if block.last is None else block.last
            if depth is not None and number >= depth:
                raise LoraError(
                    f"block strengths: there is no {block.part} block {number}; "
                    f"expected 0 to {depth - 1}"
                )


def parse_blocks(text: str) -> tuple[BlockStrength, ...]:
    """Block strengths from text such as "double 0-9: 0.5, single 3 5-7: 0, other: 1".

    "double", "single" and "other" (what is outside the blocks) with numbers, ranges or neither,
    and a factor; blocks that are not named keep 1, later items win. Raises LoraError naming the
    item that is none.
    """
    items = [item.strip() for item in re.split(r"[,;\n]", text)]
    return tuple(block for item in items if item for block in _parse_item(item))


def _parse_item(item: str) -> list[BlockStrength]:
    match = _ITEM.fullmatch(item)
    factor = _number(match[3]) if match else None
    shown = repr(item[:60])
    if match is None or factor is None:
        raise LoraError(f"block strengths: {shown} is not usable; expected text like {EXAMPLE}")
    part, ranges = match[1].lower(), _RANGE.findall(match[2])
    if not ranges:
        return [BlockStrength(part, factor)]
    if part == OTHER:
        raise LoraError(
            f"block strengths: {shown} numbers what is outside the blocks; expected 'other: 0.5'"
        )
    found = [BlockStrength(part, factor, int(a), int(b or a)) for a, b in ranges]
    if any(block.last is not None and block.last < block.first for block in found):
        raise LoraError(
            f"block strengths: {shown} has a range that runs backwards; "
            f"expected the smaller number first, like {EXAMPLE}"
        )
    return found


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
