"""One adapter to a LoRA of the rank that a rule chooses."""

from dataclasses import replace
from typing import NamedTuple

import torch

from ..adapters import Adapter, Additive, Diff, DoRA, LowRank
from .rules import RankRule
from .svd import Factors, truncate_matrix, truncate_product


class Reduced(NamedTuple):
    """The adapter, and what was left out of the change, |lost| / |change|; None: not reduced."""

    adapter: Adapter
    error: float | None


def reduce(adapter: Adapter, rule: RankRule, device: torch.device | str = "cpu") -> Reduced:
    """A LoRA in place of whatever adds a matrix; of a DoRA, within it, under its magnitudes.

    A LoRA of no more than the rank stays as it is, as do vectors and what does not add. The
    dtype is that of the adapter.
    """
    if isinstance(adapter, DoRA):
        inner = reduce(adapter.inner, rule, device)
        return Reduced(replace(adapter, inner=inner.adapter), inner.error)
    if isinstance(adapter, LowRank):
        if rule.counts_only and rule.rank is not None and adapter.rank <= rule.rank:
            return Reduced(adapter, 0.0)
        up, down = adapter.up.to(device).flatten(1), adapter.down.to(device).flatten(1)
        if adapter.mid is not None:
            up = up.double() @ adapter.mid.to(device).double().flatten(1)
        factors, error = truncate_product(up.double() * adapter.scale, down, rule)
        return Reduced(as_lora(factors, adapter.down.dtype), error)
    if isinstance(adapter, Additive) and not (isinstance(adapter, Diff) and adapter.diff.ndim < 2):
        dtype = next(adapter.tensors()).dtype
        factors, error = truncate_matrix(adapter.delta(torch.device(device)), rule)
        return Reduced(as_lora(factors, dtype), error)
    return Reduced(adapter, None)


def as_lora(factors: Factors, dtype: torch.dtype) -> LowRank:
    """Factors as an adapter in the computer's memory, alpha being the rank."""
    return LowRank(factors.down.to("cpu", dtype), factors.up.to("cpu", dtype))
