"""Factors times numbers, without a loss."""

from dataclasses import replace

from torch import Tensor

from ..adapters import LowRank


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """The tensor times a factor: in its own dtype where that is exact, else in fp32."""
    if factor == 1:
        return tensor
    exact = tensor.double() * factor
    narrow = exact.to(tensor.dtype)
    return narrow if bool((narrow.double() == exact).all()) else exact.float()


def unscaled(adapter: LowRank) -> LowRank:
    """The same LoRA with alpha equal to the rank, the scale being in up."""
    up = scaled(adapter.up, adapter.scale)
    return replace(adapter, up=up, alpha=None, rank_stabilised=False)
