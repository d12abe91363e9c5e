"""Several LoRA files into one that does what they do together."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from ...config import ChromaConfig
from ...errors import LoraError
from ..adapters import Additive, LowRank
from ..file import Placed
from ..read import read_lora
from .convert import Written, check_dtype, check_style, left_out, write
from .headers import shared, title
from .join import Block, join
from .pack import pack
from .reduce import as_lora
from .resize import Progress, Reduction
from .rules import RankRule
from .save import check_out
from .spell import DIFFUSERS, Names, style_of
from .svd import truncate_matrix

_WHOLE = RankRule()


def concatenate_loras(
    sources: Sequence[tuple[Path, float]],
    out: Path,
    rule: RankRule = _WHOLE,
    *,
    style: str | None = None,
    dtype: torch.dtype | None = None,
    config: ChromaConfig | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Written:
    """Write `out`, the sum of LoRAs (file, ratio), each ratio applied once.

    Without a rule exactly: the factors are put beside each other, and the ranks add up. With one,
    their sum is reduced to it. style: by default the first file's. Raises LoraError for adapters
    without a common form, CheckpointError where the disk does not take the file.
    """
    check_dtype(dtype)
    check_out(out, [path for path, _ in sources])
    files = [(read_lora(path, config), ratio) for path, ratio in sources]
    style = style or style_of(files[0][0])
    check_style(style)
    names = Names.of(config)
    sums = [
        _sum([(getattr(file, part), ratio) for file, ratio in files], names, style, rule)
        for part in ("transformer", "text_encoder")
    ]
    notes = [note for file, _ in files for note in left_out(file)]
    if rule.bounded:
        run = Reduction(rule, device, progress, sum(map(len, sums)))
        sums = [run.over(one) for one in sums]
        notes = run.notes() + notes
    packed = pack(sums[0], sums[1], names, style, dtype)
    merged = tuple(f"{title(file.metadata, file.path)}:{ratio:g}" for file, ratio in files)
    return write(out, packed, shared([f.metadata for f, _ in files]), notes=notes, merged=merged)


def _sum(
    parts: Sequence[tuple[Mapping[str, Sequence[Placed]], float]],
    names: Names,
    style: str,
    rule: RankRule,
) -> dict[str, list[Placed]]:
    """{parameter key: the sum of all that changes it}."""
    keys = dict.fromkeys(key for adapters, _ in parts for key in adapters)
    made = {}
    for key in keys:
        found = [(one, ratio) for adapters, ratio in parts for one in adapters.get(key, ())]
        shape = names.table.shapes.get(key) or _shape_of(found[0][0], key)
        rows = {one.rows or (0, shape[0]) for one, _ in found}
        apart = style == DIFFUSERS and _apart(rows)
        groups = [[f for f in found if (f[0].rows or (0, shape[0])) == r] for r in sorted(rows)]
        made[key] = [
            _total(key, group, shape, rule, within=apart)
            for group in (groups if apart else [found])
        ]
    return made


def _total(
    key: str,
    found: Sequence[tuple[Placed, float]],
    shape: tuple[int, ...],
    rule: RankRule,
    *,
    within: bool,
) -> Placed:
    """One adapter of the whole parameter, or of the rows that all of these share (`within`)."""
    rows = found[0][0].rows if within else None
    if rows is not None:
        shape = (rows[1] - rows[0], *shape[1:])
        blocks = [Block(one.adapter, (0, shape[0]), ratio) for one, ratio in found]
    else:
        blocks = [Block(one.adapter, one.rows or (0, shape[0]), ratio) for one, ratio in found]
    adapter = join(blocks, shape)
    if adapter is not None:
        return Placed(adapter, rows)
    kinds = ", ".join(sorted({block.adapter.kind for block in blocks}))
    if not rule.bounded or not all(isinstance(block.adapter, Additive) for block in blocks):
        raise LoraError(
            f"{key}: {kinds} have no exact sum in one LoRA; expected adapters that add, and a "
            "rank to reduce their sum to, or merge them into a checkpoint"
        )
    total = torch.zeros(shape)
    for block in blocks:
        assert isinstance(block.adapter, Additive)
        delta = block.adapter.delta(total.device)
        total[slice(*block.rows)] += block.ratio * delta.reshape(-1, *shape[1:])
    dtype = next(blocks[0].adapter.tensors()).dtype
    return Placed(as_lora(truncate_matrix(total, rule).factors, dtype), rows)


def _apart(rows: set[tuple[int, int]]) -> bool:
    """Whether no two ranges of rows meet."""
    ends = sorted(rows)
    return all(a[1] <= b[0] for a, b in pairwise(ends))


def _shape_of(placed: Placed, key: str) -> tuple[int, ...]:
    """The shape of a weight of unknown sizes, from a LoRA of all of it."""
    if isinstance(placed.adapter, LowRank) and placed.rows is None:
        return placed.adapter.up.shape[0], placed.adapter.down.shape[1]
    raise LoraError(f"the sizes of {key} are not known; name the model that the LoRAs belong to")
