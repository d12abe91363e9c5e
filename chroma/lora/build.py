"""The tensors of one module to the adapters they are."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoraError
from .adapters import (
    BOFT,
    IA3,
    OFT,
    Adapter,
    Diff,
    DoRA,
    GLoRA,
    LoHa,
    LoKr,
    LowRank,
    OFTv2,
    SetWeight,
)  # fmt: skip
from .adapters.lokr import Factor
from .metadata import Settings

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Change:
    """An adapter of the module's weight (or of its norm's scale), or else of its bias."""

    adapter: Adapter
    bias: bool = False


@dataclass(frozen=True)
class _Kind:
    """The tensors a kind needs, those it can have, and how it is made of them and alpha."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    make: Callable[[Parts, float | None, Settings], Adapter]


def build(parts: Parts, settings: Settings, module: str) -> tuple[list[Change], list[str]]:
    """(what the tensors of one module change, which of them nothing here understands).

    parts: {what it is, as `spelling` calls it: tensor}. module: its name in the file, for alpha's
    patterns. Raises LoraError if a tensor is missing or alpha is 0 or no number.
    """
    alpha = _alpha(parts["alpha"]) if "alpha" in parts else settings.alpha_of(module)
    changes: list[Change] = []
    used: set[str] = set()
    for kind in (*_KINDS, *_lokr_kinds(parts)):
        if not _complete(kind, parts):
            continue
        adapter = kind.make(parts, alpha, settings)
        if getattr(adapter, "scale", 1) == 0:
            raise LoraError("alpha is 0, with which it changes nothing; expected usually its rank")
        used |= {*kind.needed, *kind.optional, "alpha"}
        if "up_bias" in parts and isinstance(adapter, LowRank):
            bias = Diff(adapter.scale * parts["up_bias"].to(torch.float32))
            changes.append(Change(bias, bias=True))
            used.add("up_bias")
        if "magnitude" in parts and not isinstance(adapter, Diff | SetWeight | IA3):
            adapter = _with_magnitude(adapter, parts["magnitude"])
            used.add("magnitude")
        changes.append(Change(adapter))
    for part in ("diff_b", "b_norm"):
        if part in parts:
            changes.append(Change(Diff(parts[part]), bias=True))
            used.add(part)
    return changes, [part for part in parts if part not in used]


def _alpha(tensor: Tensor) -> float:
    alpha = float(tensor) if tensor.numel() == 1 else math.nan
    if not math.isfinite(alpha):
        raise LoraError(f"alpha is {alpha} of shape {tuple(tensor.shape)}, expected one number")
    return alpha


def _complete(kind: _Kind, parts: Parts) -> bool:
    """Whether the kind's tensors are there. Raises LoraError if only some of them are."""
    present = [part for part in kind.needed if part in parts]
    missing = [part for part in kind.needed if part not in parts]
    if not present:
        return False
    if missing:
        raise LoraError(f"it has {present[0]} but no {missing[0]}; the file is incomplete")
    for part in (*present, *(part for part in kind.optional if part in parts)):
        axes = _AXES.get(part, (2, 4))
        if axes and parts[part].ndim not in axes:
            shape = tuple(parts[part].shape)
            raise LoraError(f"{part} has shape {shape}, expected {axes[0]} axes; it is damaged")
    if convolution := next((part for part in _CONVOLUTIONS if part in parts), None):
        raise LoraError(f"it has {convolution}, which is for convolutions; Chroma has none")
    return True


def _with_magnitude(adapter: Adapter, magnitude: Tensor) -> DoRA:
    """(N,) and (N, 1) are of the rows, (1, K) of the columns, with more axes of 1 behind them."""
    return DoRA(adapter, magnitude, per_row=magnitude.ndim < 2 or magnitude.shape[0] != 1)


def _low_rank(parts: Parts, alpha: float | None, settings: Settings) -> Adapter:
    return LowRank(parts["down"], parts["up"], parts.get("mid"), alpha, settings.rank_stabilised)


def _loha(parts: Parts, alpha: float | None, _: Settings) -> Adapter:
    w1_a, w1_b, w2_a, w2_b = (parts[part] for part in _LOHA)
    return LoHa(w1_a, w1_b, w2_a, w2_b, alpha)


def _glora(parts: Parts, alpha: float | None, _: Settings) -> Adapter:
    return GLoRA(parts["a1"], parts["a2"], parts["b1"], parts["b2"], alpha)


def _lokr(parts: Parts, alpha: float | None, _: Settings) -> Adapter:
    return LoKr(_factor(parts, "lokr_w1"), _factor(parts, "lokr_w2"), alpha)


def _factor(parts: Parts, name: str) -> Factor:
    return parts[name] if name in parts else (parts[f"{name}_a"], parts[f"{name}_b"])


def _lokr_kinds(parts: Parts) -> tuple[_Kind, ...]:
    """LoKr, each of whose factors is one tensor or two."""
    if not any(part.startswith("lokr_w") for part in parts):
        return ()
    needed: list[str] = []
    for name in ("lokr_w1", "lokr_w2"):
        split = f"{name}_a" in parts or f"{name}_b" in parts
        needed += [f"{name}_a", f"{name}_b"] if split else [name]
    return (_Kind(tuple(needed), (), _lokr),)


def _oft(parts: Parts, _: float | None, __: Settings) -> Adapter:
    """LyCORIS stores the limit of the rotation as alpha."""
    kind = BOFT if parts["oft_blocks"].ndim == 4 else OFT
    limit = _alpha(parts["alpha"]) if "alpha" in parts else None
    return kind(parts["oft_blocks"], parts.get("rescale"), limit)


def _oft_v2(parts: Parts, _: float | None, settings: Settings) -> Adapter:
    scaled = "scaled_oft" in parts and bool(parts["scaled_oft"].any())
    return OFTv2(parts["oft_R"], settings.neumann, scaled)


def _ia3(parts: Parts, _: float | None, __: Settings) -> Adapter:
    return IA3(parts["factor"], bool(parts["on_input"].any()))


_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CONVOLUTIONS = ("hada_t1", "hada_t2", "lokr_t2", "bm")
# How many axes a tensor can have; (2, 4) where nothing is said, () for any number.
_AXES = {
    "oft_blocks": (3, 4), "oft_R": (2,), "factor": (), "on_input": (), "diff": (), "rescale": (),
    "scaled_oft": (), "w_norm": (), "set_weight": (),
}  # fmt: skip
_KINDS = (
    _Kind(("down", "up"), ("mid",), _low_rank),
    _Kind(_LOHA, (), _loha),
    _Kind(("a1", "a2", "b1", "b2"), (), _glora),
    _Kind(("oft_blocks",), ("rescale",), _oft),
    _Kind(("oft_R",), ("scaled_oft",), _oft_v2),
    _Kind(("factor", "on_input"), (), _ia3),
    _Kind(("diff",), (), lambda parts, *_: Diff(parts["diff"])),
    _Kind(("w_norm",), (), lambda parts, *_: Diff(parts["w_norm"])),
    _Kind(("set_weight",), (), lambda parts, *_: SetWeight(parts["set_weight"])),
)
