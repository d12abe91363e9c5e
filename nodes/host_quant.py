"""Quantised layers under ComfyUI's memory management, and its LoRA patches on them.

A quantised matrix keeps its bytes: patches are added to its values each time it is used, in fp32,
as ComfyUI itself does for layers that it keeps off the GPU.
"""

from dataclasses import replace
from functools import cached_property
from typing import Any

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.nn import functional as F

from ..chroma.errors import CheckpointError
from ..chroma.quant.layers import QuantEmbedding, QuantLinear, StoredWeight


class _Patched(StoredWeight):
    """A quantised matrix that ComfyUI may keep off the GPU, and may patch."""

    # ComfyUI leaves layers with this attribute where they are when memory is short.
    comfy_cast_weights = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []

    def patched(self, device: torch.device) -> Tensor:
        """The matrix's values with all patches, (N, K) fp32 on `device`."""
        weight = self.stored.to(device).dequantise(torch.float32)
        for function in self.weight_function:
            weight = function(weight)
        return weight

    def convert_weight(self, weight: Tensor, inplace: bool = False) -> Tensor:
        """The values of this layer's bytes, fp32, for nodes that merge models.

        ComfyUI hands the bytes over as numbers in any dtype.
        """
        stored = self.stored.to(weight.device)
        bytes_ = replace(stored, data=weight.to(stored.data.dtype))
        return bytes_.dequantise(torch.float32)


class HostLinear(_Patched, QuantLinear):
    """A quantised layer under ComfyUI's management."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if not (self.weight_function or self.bias_function):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(x.device, torch.float32)
        for function in self.bias_function:
            bias = function(bias)
        weight = self.patched(x.device).to(x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


class HostEmbedding(_Patched, QuantEmbedding):
    """A quantised table under ComfyUI's management."""

    # ComfyUI asks every layer that it may keep off the GPU for one.
    bias = None

    def forward(self, tokens: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """(...) int64 -> (..., K)."""
        if not self.weight_function:
            return super().forward(tokens, out_dtype)
        return F.embedding(tokens, self.patched(tokens.device)).to(out_dtype or self.dtype)


class _Patches:
    """What LoRA nodes add to one matrix, as ComfyUI calls it: values in, values out."""

    def __init__(self, key: str, patches: dict[str, list]) -> None:
        self.key, self.patches = key, patches

    def __call__(self, weight: Tensor) -> Tensor:
        return comfy.lora.calculate_weight(self.patches[self.key], weight, self.key)


class QuantPatcher(ModelPatcher):
    """A ModelPatcher that never writes into quantised matrices."""

    @cached_property
    def _stored(self) -> dict[str, _Patched]:
        """The quantised layers by the key of their weight; they stay while the model lives."""
        return {
            f"{name}.weight": module
            for name, module in self.model.named_modules()
            if isinstance(module, _Patched)
        }

    def _attach(self) -> None:
        for key, module in self._stored.items():
            own = [_Patches(key, self.patches)] if key in self.patches else []
            module.weight_function = [*own, *self.weight_wrapper_patches.get(key, [])]

    def load(self, *args: Any, **kwargs: Any) -> Any:
        """Raises CheckpointError where ComfyUI is about to save, when it merges all patches."""
        if kwargs.get("force_patch_weights") and self._stored:
            raise CheckpointError(
                "a quantised model cannot be saved from ComfyUI; expected bf16, so set "
                "weight_dtype to bf16 in the loader"
            )
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
                module.weight_function, module.bias_function = [], []
                if isinstance(module, QuantLinear):
                    module.scratch.clear()
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
                "weight_dtype to bf16 in the loader (if memory allows), or use a LoRA loader"
            )
        return super().patch_hook_weight_to_device(*args, **kwargs)
