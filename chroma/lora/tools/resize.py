"""A LoRA file to one of other ranks."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ...config import ChromaConfig
from ...errors import LoraError
from ..file import Placed
from ..read import read_lora
from .convert import Written, check_dtype, check_style, left_out, write
from .headers import carried
from .join import Block, join
from .pack import Adapters, pack
from .reduce import reduce
from .rules import RankRule
from .save import check_out
from .spell import DIFFUSERS, Names, style_of

# (modules done, of how many, the parameter that was just done)
Progress = Callable[[int, int, str], None]


def resize_lora(
    source: Path,
    out: Path,
    rule: RankRule,
    *,
    style: str | None = None,
    dtype: torch.dtype | None = None,
    config: ChromaConfig | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Written:
    """Write `out`, the LoRA `source` with the ranks that `rule` chooses, module by module.

    LoHa, LoKr and full differences become LoRAs. style and dtype are by default the file's own.
    Raises LoraError, CheckpointError where the disk does not take the file.
    """
    if not rule.bounded:
        raise LoraError("nothing to resize to; expected a rank, sv_ratio, sv_fro or sv_cumulative")
    check_dtype(dtype)
    check_out(out, [source])
    file = read_lora(source, config)
    style = style or style_of(file)
    check_style(style)
    names = Names.of(config)
    run = Reduction(rule, device, progress, len(file.transformer) + len(file.text_encoder))
    transformer = run.over(_fused(file.transformer, names, style))
    text_encoder = run.over(file.text_encoder)
    packed = pack(transformer, text_encoder, names, style, dtype)
    return write(out, packed, carried(file.metadata), notes=[*run.notes(), *left_out(file)])


class Reduction:
    """Adapters reduced one after another, and what that cost."""

    def __init__(
        self, rule: RankRule, device: torch.device | str, progress: Progress | None, total: int
    ) -> None:
        self.rule, self.device = rule, device
        self._progress, self._total, self._done = progress, total, 0
        self._errors: list[float] = []
        self._ranks: list[int] = []
        self._kept: Counter[str] = Counter()

    def over(self, adapters: Adapters) -> dict[str, list[Placed]]:
        """The same adapters with the ranks of the rule."""
        return {key: self._one(key, placed) for key, placed in adapters.items()}

    def _one(self, key: str, placed: Sequence[Placed]) -> list[Placed]:
        made = []
        for one in placed:
            adapter, error = reduce(one.adapter, self.rule, self.device)
            if error is None:
                self._kept[adapter.kind] += 1
            else:
                self._errors.append(error)
                self._ranks.append(adapter.rank or 0)
            made.append(Placed(adapter, one.rows))
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total, key)
        return made

    def notes(self) -> list[str]:
        notes = []
        if self._ranks:
            low, high = min(self._ranks), max(self._ranks)
            mean = sum(self._errors) / len(self._errors)
            ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
            notes.append(
                f"{ranks}; relative error {mean:.2%} on average, {max(self._errors):.2%} at most"
            )
        notes += [f"{count} {kind} adapters stay as they are" for kind, count in self._kept.items()]
        return notes


def _fused(adapters: Adapters, names: Names, style: str) -> Mapping[str, Sequence[Placed]]:
    """Parts of a module as one adapter where the style stores them so: the rank is of that one."""
    if style == DIFFUSERS:
        return adapters
    made = {}
    for key, placed in adapters.items():
        whole = placed
        if any(one.rows is not None for one in placed):
            shape = names.shape(key)
            blocks = [Block(one.adapter, one.rows or (0, shape[0])) for one in placed]
            adapter = join(blocks, shape)
            whole = placed if adapter is None else [Placed(adapter)]
        made[key] = whole
    return made
