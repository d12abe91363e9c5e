"""An adapter of a fused matrix to one of some of its rows, without a change of the result.

Every part takes the whole down and its own rows of up.
"""

from dataclasses import replace

from torch import Tensor

from ..adapters import IA3, Adapter, Diff, DoRA, GLoRA, LoHa, LoKr, LowRank, OFTv2, SetWeight
from .spell import Rows


def cut(adapter: Adapter, rows: Rows, height: int) -> Adapter | None:
    """The adapter of some rows of the matrix of `height` rows that this one is for.

    None where the kind has no such adapter: LoKr across its blocks, column norms, rotations of
    rows. A LoRA keeps only what reaches these rows; nothing at all is rank 0.
    """
    if rows == (0, height):
        return adapter
    part = slice(*rows)
    if isinstance(adapter, LowRank):
        return _without_zeros(replace(adapter, up=adapter.up[part]))
    if isinstance(adapter, LoHa):
        return replace(adapter, w1_a=adapter.w1_a[part], w2_a=adapter.w2_a[part])
    if isinstance(adapter, LoKr):
        return _cut_kronecker(adapter, rows)
    if isinstance(adapter, GLoRA):
        old = adapter.a1.shape[0] < adapter.a1.shape[1]
        return (
            replace(adapter, b2=adapter.b2[part]) if old else replace(adapter, b1=adapter.b1[part])
        )
    if isinstance(adapter, Diff):
        return replace(adapter, diff=adapter.diff[part])
    if isinstance(adapter, SetWeight):
        return replace(adapter, value=adapter.value[part])
    if isinstance(adapter, IA3):
        return (
            adapter if adapter.on_input else replace(adapter, factor=adapter.factor.flatten()[part])
        )
    if isinstance(adapter, OFTv2):
        return adapter
    if isinstance(adapter, DoRA) and adapter.per_row:
        inner = _cut_whole(adapter.inner, rows, height)
        magnitude = adapter.magnitude.flatten()[part]
        return None if inner is None else replace(adapter, inner=inner, magnitude=magnitude)
    return None


def _without_zeros(adapter: LowRank) -> LowRank:
    """A LoRA without the columns of up that are zero."""
    kept = (adapter.up.flatten(1) != 0).any(0)
    if adapter.mid is not None or bool(kept.all()):
        return adapter
    scale, rank = adapter.scale, int(kept.sum())
    return LowRank(adapter.down[kept], adapter.up[:, kept], alpha=scale * rank)


def _cut_whole(adapter: Adapter, rows: Rows, height: int) -> Adapter | None:
    """As `cut`, but a LoRA keeps its rank: a DoRA's magnitudes say something without it, too."""
    if isinstance(adapter, LowRank):
        return replace(adapter, up=adapter.up[slice(*rows)])
    return cut(adapter, rows, height)


def _cut_kronecker(adapter: LoKr, rows: Rows) -> LoKr | None:
    """Whole blocks: each row of w1 makes as many rows as w2 has."""
    w2 = adapter.w2 if isinstance(adapter.w2, Tensor) else adapter.w2[0]
    height = w2.shape[0]
    if rows[0] % height or rows[1] % height:
        return None
    part = slice(rows[0] // height, rows[1] // height)
    if isinstance(adapter.w1, Tensor):
        return replace(adapter, w1=adapter.w1[part])
    return replace(adapter, w1=(adapter.w1[0][part], adapter.w1[1]))
