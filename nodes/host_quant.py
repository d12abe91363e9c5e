"""Quantised layers under ComfyUI's memory management, and its LoRA patches on them.

A quantised matrix keeps its bytes: adapters are computed beside it. Patches that have no such form
are added to its values each time it is used, in fp32, as ComfyUI itself does for layers that it
keeps off the GPU.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import comfy.lora
import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.nn import functional as F

from ..chroma.errors import CheckpointError, LoraError
from ..chroma.lora.affine import Affine
from ..chroma.quant.layers import QuantEmbedding, QuantLinear, StoredWeight
from ..chroma.quant.prefetch import Lane, Prefetch, cuda_lane
from ..chroma.quant.products import product
from .host_adapter import compose_beside, compute_dtype, placements, with_tensors

log = logging.getLogger("chroma")


def _lane(device: torch.device) -> Lane | None:
    """Copies beside the computations, unless ComfyUI was told to make none."""
    # Without streams the count is 0 where ComfyUI uses them by default, and 1 in older versions.
    told = getattr(management, "NUM_STREAMS", 1) == 0
    if told or not management.device_supports_non_blocking(device):
        return None
    return cuda_lane(device)


class _Patched(StoredWeight):
    """A quantised matrix that ComfyUI may keep off the GPU, and may patch."""

    # ComfyUI leaves layers with this attribute where they are when memory is short.
    comfy_cast_weights = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.prefetch = Prefetch(_lane)
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []

    def patched(self, device: torch.device) -> Tensor:
        """The matrix's values with all patches, (N, K) fp32 on `device`."""
        if torch.compiler.is_compiling():
            weight = self.stored.to(device).dequantise(torch.float32)
        else:
            with self.prefetch.fetch(self, device) as stored:
                weight = stored.dequantise(torch.float32)
        for function in self.weight_function:
            weight = function(weight)
        return weight

    def convert_weight(self, weight: Tensor, inplace: bool = False) -> Tensor:
        """The values of this layer's bytes, fp32, for nodes that merge models.

        ComfyUI hands the bytes over as numbers in any dtype; of a packed matrix it has none.
        """
        stored = self.stored.to(weight.device)
        if weight.numel():
            stored = replace(stored, data=weight.to(stored.data.dtype))
        return stored.dequantise(torch.float32)


class HostLinear(_Patched, QuantLinear):
    """A quantised layer under ComfyUI's management, with the adapters that run beside it."""

    affine: Affine | None = None
    # Of which patches of ComfyUI's the adapters were made.
    patches_uuid: Any = None
    _affine_at: tuple[torch.device, torch.dtype] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        bias = self._bias(x.device, x.dtype)
        if self.weight_function:
            return F.linear(x, self.patched(x.device).to(x.dtype), bias)
        if self.affine is None:
            return self._product(x, bias)
        affine = self._affine_on(x)
        if affine.additive:
            return affine.apply(x, partial(self._product, bias=bias))
        return affine.apply(x, partial(self._product, bias=None), bias)

    def run_beside(self, affine: Affine | None, dtype: torch.dtype) -> None:
        """Let adapters, None for none, run in `dtype` from where the matrix is now."""
        device = self.weight.device
        self._affine_at = (device, dtype)
        self.affine = None if affine is None else affine.to(device, dtype)
        # As ComfyUI does with a matrix that it keeps off the GPU, within its user's limits.
        if self.affine is not None and self.weight.is_pinned():
            pinned = (tensor.pin_memory() for tensor in self.affine.tensors())
            self.affine = with_tensors(self.affine, pinned)

    def _affine_on(self, x: Tensor) -> Affine:
        """The adapters where x is, in x's dtype."""
        if (x.device, x.dtype) == self._affine_at:
            return self.affine
        tensors = self.affine.tensors()
        sent = (tensor.to(x.device, x.dtype, non_blocking=True) for tensor in tensors)
        return with_tensors(self.affine, sent)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.weight.device == x.device or torch.compiler.is_compiling():
            return product(x, self._held().to(x.device), bias, self.scratch, self.packed)
        with self.prefetch.fetch(self, x.device) as stored:
            return product(x, stored, bias, self.scratch)

    def _bias(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        # The host would else wait here until the GPU has nothing left to do.
        ahead = device.type == "cuda"
        if self.bias is None or not self.bias_function:
            return None if self.bias is None else self.bias.to(device, dtype, non_blocking=ahead)
        bias = self.bias.to(device, torch.float32, copy=True)
        for function in self.bias_function:
            bias = function(bias)
        return bias.to(dtype)


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

    @cached_property
    def _prefetch(self) -> Prefetch:
        """The one of the model's first layer, for all of them."""
        prefetch = next((m.prefetch for m in self._stored.values()), Prefetch())
        for module in self._stored.values():
            module.prefetch = prefetch
        return prefetch

    def _attach(self) -> None:
        """Bring the patches to the layers. What comes last acts on values, and so do all then."""
        dtype, reasons = compute_dtype(self), dict[str, str]()
        for key, module in self._stored.items():
            affine, functions = None, list(self.weight_wrapper_patches.get(key, []))
            patches = self.patches.get(key, [])
            if patches and not functions and isinstance(module, HostLinear):
                known = module.affine is not None and module.patches_uuid == self.patches_uuid
                affine = module.affine if known else self._compose(key, module, patches, reasons)
            if patches and affine is None:
                functions = [_Patches(key, self.patches), *functions]
            module.weight_function = functions
            if isinstance(module, HostLinear):
                module.run_beside(affine, dtype)
                module.patches_uuid = self.patches_uuid
        if reasons:
            key, reason = next(iter(reasons.items()))
            log.info(
                "Patches on %d quantised matrices cannot run beside them and are added at every "
                "use (%s: %s)", len(reasons), key, reason,
            )  # fmt: skip

    def _compose(
        self, key: str, module: HostLinear, patches: Sequence[Any], reasons: dict[str, str]
    ) -> Affine | None:
        def weight() -> Tensor:
            return module.stored.to(self.load_device).dequantise(torch.float32)

        try:
            shape = (module.out_features, module.in_features)
            return compose_beside(placements(patches), shape, weight, self.load_device)
        except LoraError as error:
            reasons[key] = str(error)
            return None

    def load(self, *args: Any, **kwargs: Any) -> Any:
        """Raises CheckpointError where ComfyUI is about to save, when it merges all patches."""
        if kwargs.get("force_patch_weights") and self._stored:
            raise CheckpointError(
                "a quantised model cannot be saved from ComfyUI; expected bf16, so set "
                "weight_dtype to bf16 in the loader"
            )
        self._prefetch.clear()
        result = super().load(*args, **kwargs)
        self._merge_into_small()
        self._attach()
        return result

    def _merge_into_small(self) -> None:
        """Patches on norms that stay off the GPU when memory is short; ComfyUI leaves these out."""
        for key in self.patches:
            module = self.model.get_submodule(key.rpartition(".")[0])
            can_patch_when_used = hasattr(module, "comfy_cast_weights")
            if not (can_patch_when_used or getattr(module, "comfy_patched_weights", False)):
                self.patch_weight_to_device(key, device_to=self.offload_device)
                module.comfy_patched_weights = True

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        self._prefetch.clear()
        result = super().partially_unload(*args, **kwargs)
        self._attach()
        return result

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        self._prefetch.clear()
        result = super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for module in self._stored.values():
                module.weight_function, module.bias_function = [], []
                if isinstance(module, HostLinear):
                    module.run_beside(None, torch.float32)
                    module.scratch.clear()
        return result

    def cleanup(self) -> Any:
        """After a sampling run, also one that was interrupted with copies on their way."""
        self._prefetch.clear()
        return super().cleanup()

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
