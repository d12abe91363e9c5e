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
from ..chroma.quant.beside import Layer
from .host_adapter import compute_dtype

KEY = "chroma_lora_beside"


class _Adapted(Layer):
    """A layer's forward with adapters added to its output.

    No forward hook, as what torch.compile made of the model earlier would run on without it.
    """

    def __init__(self, layer: nn.Module, affine: Affine) -> None:
        self._layer, self._before = layer, vars(layer).get("forward")
        self._forward, self.affine = layer.forward, affine
        layer.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output (..., N) for the input (..., K)."""
        return self.adapted(x, lambda x, _: self._forward(x), None)

    def remove(self) -> None:
        """The layer is as before; who took over its forward meanwhile keeps one that adds none."""
        self.affine = None
        if vars(self._layer).get("forward") is not self:
            return
        if self._before is None:
            del self._layer.forward
        else:
            self._layer.forward = self._before


@dataclass(frozen=True)
class Beside:
    """What runs beside a MODEL's weights: {key of a weight: its adapters in their order}."""

    placements: Mapping[str, Sequence[Placement]]

    def start_run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """A wrapper around ComfyUI's outer_sample: the model is as before when the run ends."""
        patcher = executor.class_obj.model_patcher
        dtype, adapted = compute_dtype(patcher), []
        try:
            for key, placed in self.placements.items():
                layer = patcher.model.get_submodule(key.removesuffix(".weight"))
                shape = (layer.out_features, layer.in_features)
                affine = compose(placed, shape, partial(_never, key), patcher.load_device)
                adapted.append(_Adapted(layer, affine.to(None, dtype)))
            return executor(*args, **kwargs)
        finally:
            for one in reversed(adapted):
                one.remove()


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
