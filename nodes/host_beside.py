"""Adapters beside weights that are not ours to replace, for as long as a sampling run lasts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..chroma.errors import LoraError
from ..chroma.lora.adapters.base import Placement
from ..chroma.lora.affine import Affine, compose

KEY = "chroma_lora_beside"


class _Hook:
    """Adds one layer's adapters to its output."""

    def __init__(self, affine: Affine) -> None:
        self._affine, self._at = affine, None

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The output (..., N) for the input (..., K)."""
        x = inputs[0]
        if self._at != (x.device, x.dtype):
            self._affine, self._at = self._affine.to(x.device, x.dtype), (x.device, x.dtype)
        return self._affine.apply(x, lambda _: output)


@dataclass(frozen=True)
class Beside:
    """What runs beside a MODEL's weights: {key of a weight: its adapters in their order}."""

    placements: Mapping[str, Sequence[Placement]]

    def start_run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """A wrapper around ComfyUI's outer_sample: the model is as before when the run ends."""
        patcher = executor.class_obj.model_patcher
        handles = []
        try:
            for key, placed in self.placements.items():
                layer = patcher.model.get_submodule(key.removesuffix(".weight"))
                shape = (layer.out_features, layer.in_features)
                affine = compose(placed, shape, partial(_never, key), patcher.load_device)
                handles.append(layer.register_forward_hook(_Hook(affine)))
            return executor(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def _never(key: str) -> Tensor:
    raise LoraError(f"{key}: these adapters need its values; set how to patch")


def add_beside(clone: ModelPatcher, added: Mapping[str, Sequence[Placement]]) -> None:
    """Let a clone run with these, and with what its source has, beside the weights.

    They must be such as `check_beside` takes where the weight is not known.
    """
    before = clone.get_attachment(KEY)
    old = {} if before is None else before.placements
    beside = Beside({key: [*old.get(key, ()), *added.get(key, ())] for key in {**old, **added}})
    clone.set_attachments(KEY, beside)
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, beside.start_run)
