"""An adapter to the tensors that a LoRA file holds of it, by the ends of their names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import LoraError
from ..adapters import (
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
from .scale import unscaled
from .spell import COMFYUI, DIFFUSERS, KOHYA

_UP = {KOHYA: ".lora_up.weight", COMFYUI: ".lora_B.weight", DIFFUSERS: ".lora_B.weight"}
_DOWN = {KOHYA: ".lora_down.weight", COMFYUI: ".lora_A.weight", DIFFUSERS: ".lora_A.weight"}
_ALPHA = ".alpha"


def parts_of(adapter: Adapter, style: str, parameter: str = "weight") -> dict[str, Tensor]:
    """{end of the name: tensor} of an adapter of a module's weight, bias or scale.

    Diffusers knows no alpha beside a LoRA's factors: there it is in them (see `unscaled`). Raises
    LoraError for an adapter of a bias that is no difference.
    """
    if parameter == "bias":
        if not isinstance(adapter, Diff):
            raise LoraError(f"a {adapter.kind} of a bias cannot be stored; merge it instead")
        return {".diff_b": adapter.diff}
    if isinstance(adapter, DoRA):
        return _dora(adapter, style)
    if isinstance(adapter, LowRank):
        return _low_rank(adapter, style)
    return _other(adapter)


def _low_rank(adapter: LowRank, style: str) -> dict[str, Tensor]:
    if style == DIFFUSERS:
        adapter = unscaled(adapter)
    parts = {_UP[style]: adapter.up, _DOWN[style]: adapter.down}
    if adapter.mid is not None:
        parts[".lora_mid.weight"] = adapter.mid
    if style != DIFFUSERS:
        # In this form whatever the file said of rank stabilisation is in alpha.
        parts[_ALPHA] = _number(adapter.scale * adapter.rank)
    return parts


def _dora(adapter: DoRA, style: str) -> dict[str, Tensor]:
    flat = adapter.magnitude.flatten()
    parts = parts_of(adapter.inner, style)
    if style == DIFFUSERS and adapter.per_row and isinstance(adapter.inner, LowRank):
        return parts | {".lora_magnitude_vector": flat}
    return parts | {".dora_scale": flat[:, None] if adapter.per_row else flat[None]}


def _other(adapter: Adapter) -> dict[str, Tensor]:
    if isinstance(adapter, LoHa):
        named = {
            "hada_w1_a": adapter.w1_a, "hada_w1_b": adapter.w1_b,
            "hada_w2_a": adapter.w2_a, "hada_w2_b": adapter.w2_b,
        }  # fmt: skip
        return _dotted(named) | _alpha(adapter.alpha)
    if isinstance(adapter, LoKr):
        named = _factor("lokr_w1", adapter.w1) | _factor("lokr_w2", adapter.w2)
        return _dotted(named) | _alpha(adapter.alpha if adapter.rank else None)
    if isinstance(adapter, GLoRA):
        named = {
            "a1.weight": adapter.a1, "a2.weight": adapter.a2,
            "b1.weight": adapter.b1, "b2.weight": adapter.b2,
        }  # fmt: skip
        return _dotted(named) | _alpha(adapter.alpha)
    if isinstance(adapter, OFT | BOFT):
        rescale = {} if adapter.rescale is None else {".rescale": adapter.rescale}
        return {".oft_blocks": adapter.blocks} | rescale | _alpha(adapter.constraint)
    if isinstance(adapter, OFTv2):
        scaled = {".oft_R.scaled_oft": _number(1.0)} if adapter.scaled else {}
        return {".oft_R.weight": adapter.vectors} | scaled
    if isinstance(adapter, IA3):
        return {".weight": adapter.factor, ".on_input": torch.tensor(adapter.on_input)}
    if isinstance(adapter, Diff):
        return {".diff": adapter.diff}
    if isinstance(adapter, SetWeight):
        return {".set_weight": adapter.value}
    raise LoraError(f"a {adapter.kind} cannot be stored in another spelling")


def _factor(name: str, factor: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    if isinstance(factor, Tensor):
        return {name: factor}
    return {f"{name}_a": factor[0], f"{name}_b": factor[1]}


def _dotted(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f".{name}": tensor for name, tensor in parts.items()}


def _alpha(alpha: float | None) -> dict[str, Tensor]:
    return {} if alpha is None else {_ALPHA: _number(alpha)}


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
