"""Adapters of the same matrix, or of rows of it, to one adapter with the same result.

The fused q, k, v of (N, K) are parts of (N_j, K) below each other. A LoRA of each part is one LoRA
of the whole: the downs below each other, the ups along the diagonal. LoRAs of the same rows are
one LoRA whose ups lie beside each other.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import Adapter, Diff, DoRA, LoHa, LoKr, LowRank
from .scale import scaled
from .spell import Rows


class Block(NamedTuple):
    """An adapter, times `ratio`, of these rows (first, end) of a matrix."""

    adapter: Adapter
    rows: Rows
    ratio: float = 1.0


def join(blocks: Sequence[Block], shape: tuple[int, ...]) -> Adapter | None:
    """One adapter of a whole weight of this shape that does what the blocks do together.

    None where there is none: blocks of several kinds, or of a kind that has no blocks.
    """
    first = blocks[0].adapter
    if len(blocks) == 1 and blocks[0].rows == (0, shape[0]) and blocks[0].ratio == 1:
        return first
    adapters = [block.adapter for block in blocks]
    if all(isinstance(adapter, LowRank) for adapter in adapters):
        return _join_low_rank(blocks, shape[0])
    if all(isinstance(adapter, LoHa) for adapter in adapters):
        return _join_hadamard(blocks, shape[0])
    if all(isinstance(adapter, Diff) for adapter in adapters):
        return _join_differences(blocks, shape)
    if len(blocks) == 1 and blocks[0].rows == (0, shape[0]) and isinstance(first, LoKr):
        return _weighted(first, blocks[0].ratio)
    if all(isinstance(a, DoRA) and a.per_row for a in adapters) and _cover(blocks, shape[0]):
        return _join_doras(blocks, shape)
    return None


def _weighted(adapter: LoKr, ratio: float) -> LoKr:
    if isinstance(adapter.w1, Tensor):
        return replace(adapter, w1=scaled(adapter.w1, ratio))
    return replace(adapter, w1=(scaled(adapter.w1[0], ratio), adapter.w1[1]))


def _join_low_rank(blocks: Sequence[Block], height: int) -> LowRank:
    """Downs below each other, ups in their rows; parts with one down in common share it.

    Where all parts are scaled alike, alpha says so; else their ups differ from the files' by the
    ratio of their scale to the first one's.
    """
    groups: list[tuple[Tensor, list[Block]]] = []
    for block in blocks:
        adapter = _flat(block.adapter)
        block = block._replace(adapter=adapter)
        for down, members in groups:
            if _same(down, adapter.down) and not any(_overlap(block, m) for m in members):
                members.append(block)
                break
        else:
            groups.append((adapter.down, [block]))
    reference = _scale(blocks[0])
    ups = [_placed_up(members, height, reference) for _, members in groups]
    downs = [down for down, _ in groups]
    rank = sum(down.shape[0] for down in downs)
    return LowRank(_cat(downs, 0), _cat(ups, 1), alpha=reference * rank)


def _flat(adapter: Adapter) -> LowRank:
    """A LoRA as two matrices, whatever its middle factor or the shape of a convolution."""
    assert isinstance(adapter, LowRank)
    up, down = adapter.up.flatten(1), adapter.down.flatten(1)
    if adapter.mid is not None:
        up = up.float() @ adapter.mid.float().flatten(1)
    return replace(adapter, up=up, down=down, mid=None)


def _scale(block: Block) -> float:
    assert isinstance(block.adapter, LowRank | LoHa)
    # Never negative, which not every reader takes; a ratio of 0 leaves nothing, without a scale.
    return abs(block.adapter.scale * block.ratio) or 1.0


def _placed_up(members: Sequence[Block], height: int, reference: float) -> Tensor:
    """(height, r), zero outside of the members' rows."""
    ups = []
    for block in members:
        assert isinstance(block.adapter, LowRank)
        factor = block.adapter.scale * block.ratio / reference
        ups.append((block.rows, scaled(block.adapter.up, factor)))
    return _in_rows(ups, height)


def _in_rows(parts: Sequence[tuple[Rows, Tensor]], height: int) -> Tensor:
    dtype = _widest([tensor for _, tensor in parts])
    first = parts[0][1]
    whole = torch.zeros(height, *first.shape[1:], dtype=dtype)
    for rows, tensor in parts:
        whole[slice(*rows)] = tensor.to(dtype)
    return whole


def _join_hadamard(blocks: Sequence[Block], height: int) -> LoHa:
    """Along the diagonal, as LoRAs: what is outside of a block is zero in both products."""
    reference = _scale(blocks[0])
    tensors: dict[str, list[Tensor]] = {"w1_a": [], "w1_b": [], "w2_a": [], "w2_b": []}
    for block in blocks:
        adapter = block.adapter
        assert isinstance(adapter, LoHa)
        factor = adapter.scale * block.ratio / reference
        tensors["w1_a"].append(_in_rows([(block.rows, scaled(adapter.w1_a, factor))], height))
        tensors["w2_a"].append(_in_rows([(block.rows, adapter.w2_a)], height))
        tensors["w1_b"].append(adapter.w1_b)
        tensors["w2_b"].append(adapter.w2_b)
    joined = {name: _cat(parts, 1 if name.endswith("a") else 0) for name, parts in tensors.items()}
    return LoHa(**joined, alpha=reference * joined["w1_b"].shape[0])


def _join_differences(blocks: Sequence[Block], shape: tuple[int, ...]) -> Diff:
    """Their sum; in fp32 unless the parts do not meet."""
    tensors = []
    for block in blocks:
        assert isinstance(block.adapter, Diff)
        tensors.append((block.rows, scaled(block.adapter.diff, block.ratio)))
    if not any(_overlap(a, b) for i, a in enumerate(blocks) for b in blocks[:i]):
        return Diff(_in_rows([(rows, t.reshape(-1, *shape[1:])) for rows, t in tensors], shape[0]))
    whole = torch.zeros(shape)
    for rows, tensor in tensors:
        whole[slice(*rows)] += tensor.float().reshape(-1, *shape[1:])
    return Diff(whole)


def _join_doras(blocks: Sequence[Block], shape: tuple[int, ...]) -> DoRA | None:
    """Rows are normalised one by one, so that parts that make up the whole are independent."""
    inner, magnitudes = [], []
    for block in sorted(blocks, key=lambda block: block.rows):
        assert isinstance(block.adapter, DoRA)
        if block.ratio != 1:
            return None
        inner.append(Block(block.adapter.inner, block.rows))
        magnitudes.append(block.adapter.magnitude.flatten())
    whole = join(inner, shape)
    return None if whole is None else DoRA(whole, _cat(magnitudes, 0), True)


def _cover(blocks: Sequence[Block], height: int) -> bool:
    """Whether the rows follow each other without gap or overlap from the first to the last."""
    ends = sorted(block.rows for block in blocks)
    starts = [0, *(end for _, end in ends)]
    return all(start == rows[0] for start, rows in zip(starts, ends, strict=False)) and (
        starts[-1] == height
    )


def _overlap(a: Block, b: Block) -> bool:
    return a.rows[0] < b.rows[1] and b.rows[0] < a.rows[1]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    dtype = _widest(tensors)
    return torch.cat([tensor.to(dtype) for tensor in tensors], dim)


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """Their dtype, or fp32 where several meet."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
