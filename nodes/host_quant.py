"""Quantised layers under ComfyUI's memory management, and its LoRA patches on them.

A quantised matrix keeps its bytes: patches are added to its values each time it is used, in fp32,
as ComfyUI itself does for layers that it keeps off the GPU.
"""

from functools import cached_property
from typing import Any

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.nn import functional as F

from ..chroma.errors import CheckpointError
from ..chroma.quant.layers import QuantLinear, StoredWeight


class HostLinear(QuantLinear):
    """A quantised layer that ComfyUI may keep off the GPU, and may patch."""

    # ComfyUI leaves layers with this attribute where they are when memory is short.
    comfy_cast_weights = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if not (self.weight_function or self.bias_function):
            return super().forward(x)
        weight = self.stored.to(x.device).dequantise(torch.float32)
        bias = None if self.bias is None else self.bias.to(x.device, torch.float32)
        for function in self.weight_function:
            weight = function(weight)
        for function in self.bias_function:
            bias = function(bias)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def convert_weight(self, weight: Tensor, inplace: bool = False) -> Tensor:
        """The values of this layer's bytes, fp32, for nodes that merge models.

        ComfyUI hands the bytes over as numbers in any dtype.
        """
        stored = self.stored.to(weight.device)
        data = weight.to(stored.data.dtype)
        return type(stored)(stored.format, data, stored.scale, stored.shape).dequantise(
            torch.float32
        )


class _Patches:
    """What LoRA nodes add to one matrix, as ComfyUI calls it: values in, values out."""

    def __init__(self, key: str, patches: dict[str, list]) -> None:
        self.key, self.patches = key, patches

    def __call__(self, weight: Tensor) -> Tensor:
        return comfy.lora.calculate_weight(self.patches[self.key], weight, self.key)


class QuantPatcher(ModelPatcher):
    """A ModelPatcher that never writes into quantised matrices."""

    @cached_property
    def _stored(self) -> dict[str, StoredWeight]:
        """The quantised layers by the key of their weight; they stay while the model lives."""
        return {
            f"{name}.weight": module
            for name, module in self.model.named_modules()
            if isinstance(module, StoredWeight)
        }

    def _attach(self) -> None:
        for key, module in self._stored.items():
            if isinstance(module, HostLinear):
                own = [_Patches(key, self.patches)] if key in self.patches else []
                module.weight_function = [*own, *self.weight_wrapper_patches.get(key, [])]

    def load(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load(*args, **kwargs)
        self._attach()
        return result

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        result = super().partially_unload(*args, **kwargs)
        self._attach()
        return result

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        result = super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for module in self._stored.values():
                if isinstance(module, HostLinear):
                    module.weight_function, module.bias_function = [], []
        return result

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's merge of a LoRA into a weight; quantised ones are patched when used."""
        if key not in self._stored:
            return super().patch_weight_to_device(key, *args, **kwargs)
        return None

    def patch_hook_weight_to_device(self, *args: Any, **kwargs: Any) -> Any:
        """Raises CheckpointError for a quantised weight, whose bytes must not be overwritten."""
        key = kwargs.get("key")
        if key in self._stored and key in kwargs.get("combined_patches", {}):
            raise CheckpointError(
                f"a LoRA hook wants to change {key}, which is quantised; expected bf16, so set "
                "weight_dtype to bf16 in the loader, or use a LoRA loader instead of a hook"
            )
        return super().patch_hook_weight_to_device(*args, **kwargs)
