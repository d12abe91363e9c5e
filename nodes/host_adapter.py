"""Our adapters among ComfyUI's patches, and ComfyUI's LoRA among our adapters."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Tensor

from ..chroma.errors import LoraError
from ..chroma.lora.adapters import Adapter, LowRank
from ..chroma.lora.adapters.base import Placement
from ..chroma.lora.adapters.held import Held
from ..chroma.lora.affine import Affine, compose


class HostAdapter(WeightAdapterBase):
    """One of our adapters as a patch of ComfyUI's.

    `weights` is the adapter and its tensors. ComfyUI makes another one with tensors on the GPU by
    `type(patch)(patch.loaded_keys, weights)`.
    """

    name = "chroma"
    # Whether it may run beside a quantised weight; ComfyUI keeps nothing of a patch but its type.
    may_bypass = True

    def __init__(self, loaded_keys: set[str], weights: tuple) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def of(cls, adapter: Adapter) -> "HostAdapter":
        return cls(set(), (adapter, *adapter.tensors()))

    @property
    def adapter(self) -> Adapter:
        """The adapter on the tensors that `weights` holds now."""
        return with_tensors(self.weights[0], iter(self.weights[1:]))

    def calculate_weight(
        self, weight: Tensor, key: str, strength: float, *_: Any, **__: Any
    ) -> Tensor:
        """Change `weight` in place, as ComfyUI expects of rows of a larger one; any float dtype."""
        adapter = self.adapter.to(weight.device)
        return weight.copy_(adapter.change(weight.float(), strength))


class MergedAdapter(HostAdapter):
    """The same, always added to the values of the weight."""

    may_bypass = False


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure on other tensors, which come in the order of its `tensors()`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        return tuple(with_tensors(part, tensors) for part in value)
    if isinstance(value, Held):
        held = {f.name: with_tensors(getattr(value, f.name), tensors) for f in fields(value)}
        return replace(value, **held)
    return value


def compute_dtype(patcher: ModelPatcher) -> torch.dtype:
    """The one of the model's computations; fp32 for T5."""
    if not hasattr(patcher.model, "manual_cast_dtype"):
        return torch.float32
    return patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()


def placements(patches: Iterable[Sequence[Any]]) -> list[Placement]:
    """The adapters behind one weight's patches, in their order; raises LoraError for others."""
    return [_placement(*patch) for patch in patches]


def compose_beside(
    placed: Sequence[Placement],
    shape: Sequence[int],
    weight: Callable[[], Tensor],
    device: torch.device,
) -> Affine:
    """What runs beside a weight of this shape, fp32. Raises LoraError if that is a whole matrix."""
    affine = compose(placed, shape, weight, device)
    if affine.dense:
        kinds = ", ".join(dict.fromkeys(adapter.kind for adapter, _, _ in placed))
        raise LoraError(f"{kinds} here changes it by a matrix as large as itself")
    return affine


def check_beside(placed: Sequence[Placement], shape: Sequence[int], known: bool = True) -> None:
    """Raises LoraError unless adapters can run beside a weight, of which nothing is computed.

    Where the weight is not `known`, they may only add something to the layer's output.
    """
    nothing = torch.device("meta")

    def weight() -> Tensor:
        if known:
            return torch.empty(*shape, device=nothing)
        raise LoraError("what it does depends on the weight, which other nodes may still change")

    affine = compose_beside(placed, shape, weight, nothing)
    if not (known or affine.additive):
        kinds = ", ".join(dict.fromkeys(adapter.kind for adapter, _, _ in placed))
        raise LoraError(f"{kinds} changes more than what is added to the layer's output")


def _placement(
    strength: float, value: Any, strength_model: float, offset: Any, function: Any, *_: Any
) -> Placement:
    if strength_model != 1 or function is not None:
        raise LoraError("another node's patch scales it or is a function")
    adapter = _adapter(value)
    if offset is None:
        return adapter, strength, None
    axis, first, count = offset
    if axis != 0:
        raise LoraError("another node's patch changes some of its columns")
    return adapter, strength, (first, first + count)


def _adapter(value: Any) -> Adapter:
    """Ours, or ComfyUI's plain LoRA as ours."""
    if isinstance(value, HostAdapter):
        if value.may_bypass:
            return value.adapter
        raise LoraError(f"{value.weights[0].kind} is to be merged")
    if type(value) is LoRAAdapter:
        up, down, alpha, *others = value.weights
        if all(other is None for other in others):
            return LowRank(down, up, alpha=alpha)
    kind = getattr(value, "name", None) or type(value).__name__
    raise LoraError(f"it is another node's patch of kind {kind}")
