"""A ComfyUI MODEL that runs our transformer: adopted from a loaded one, or built from a file."""

import logging
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.model_base
import comfy.model_management as management
import comfy.sd
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..chroma.checkpoint import check_state, read_header, read_transformer
from ..chroma.checkpoint.container import is_gguf
from ..chroma.checkpoint.load import main_dtype
from ..chroma.checkpoint.read import expanded, is_plain
from ..chroma.checkpoint.stored import State
from ..chroma.config import ChromaConfig
from ..chroma.quant.layers import pack, place
from ..chroma.quant.products import EIGHT_BIT, EXACT, in_8_bits
from ..chroma.transformer import ChromaTransformer
from .host import DTYPES, compute_natively, weight_dtype
from .host_memory import advise_in_sampling
from .host_quant import HostLinear, QuantPatcher
from .host_transformer import (
    MEMO,
    HostTransformer,
    ModulationMemo,
    adopt,
    build,
    core_settings,
)

KEY = "chroma"
log = logging.getLogger("chroma")


def apply_transformer(model: ModelPatcher) -> ModelPatcher:
    """A clone of any loader's Chroma MODEL that runs our forward; the original is left as it is.

    Raises CheckpointError if the MODEL is not Chroma.
    """
    native = model.get_model_object("diffusion_model")
    clone = model.clone()
    if isinstance(native, HostTransformer):
        return clone
    _patch(clone, adopt(native))
    clone.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, _adopt_again)
    _wrap_runs(clone)
    return clone


def _wrap_runs(patcher: ModelPatcher) -> None:
    for wrapper in (advise_in_sampling, share_modulation):
        patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, wrapper)


def _patch(patcher: ModelPatcher, transformer: HostTransformer) -> None:
    # Weak, because ComfyUI makes both patches attributes of the model itself.
    model = weakref.ref(patcher.model)

    def conds(**kwargs: Any) -> dict[str, Any]:
        base = model()
        return extra_conds(partial(type(base).extra_conds, base), **kwargs)

    patcher.add_object_patch("diffusion_model", transformer)
    patcher.add_object_patch("extra_conds", conds)


def _adopt_again(source: ModelPatcher, clone: ModelPatcher) -> None:
    """A clone may get a model of its own (torch.compile, hooks, several GPUs): adopt that one."""
    if clone.model is not source.model:
        _patch(clone, adopt(clone.model.diffusion_model))


def extra_conds(original: Callable[..., dict[str, Any]], **kwargs: Any) -> dict[str, Any]:
    """What a prompt hands to the transformer, with the lengths of the batch's texts."""
    if kwargs.get("guidance"):
        log.warning(
            "Guidance %s is ignored: Chroma was trained at 0. Remove FluxGuidance and set cfg in "
            "the sampler instead.",
            kwargs["guidance"],
        )
    conds = original(**{"pooled_output": None, **kwargs})
    if (lengths := kwargs.get("chroma_lengths")) is not None:
        conds["chroma_lengths"] = comfy.conds.CONDRegular(lengths)
    return conds


def share_modulation(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Let one sampling run compute its modulation once per sigma.

    Not where prompts bring weights of their own (hooks): these change within a step.
    """
    guider = executor.class_obj
    hooked = any("hooks" in cond for conds in guider.conds.values() for cond in conds)
    if not hooked:
        options = guider.model_options.setdefault("transformer_options", {})
        options[MEMO] = ModulationMemo()
    return executor(*args, **kwargs)


class HostChroma(comfy.model_base.Chroma):
    """ComfyUI's Chroma around our transformer, at any width."""

    def __init__(self, model_config: Any, device: Any = None) -> None:
        super().__init__(model_config, device=device, unet_model=build)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        return extra_conds(super().extra_conds, **kwargs)


class HostConfig(comfy.supported_models.Chroma):
    """Chroma's settings in ComfyUI, for a model of any width."""

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> HostChroma:
        return HostChroma(self, device=device)

    def process_unet_state_dict(self, state_dict: dict) -> dict:
        return state_dict  # our norms keep the file's names, whatever ComfyUI's are called


def load_model(path: Path, dtype_choice: str) -> ModelPatcher:
    """A MODEL from any Chroma file. Raises CheckpointError.

    ComfyUI loads plain weights of the full width, because it streams them in ways of its own. All
    others are ours: quantised ones, other widths, other layouts, and what multiplies in 8 bits.
    """
    config, state = read_transformer(path)
    with torch.device("meta"):
        check_state(ChromaTransformer(config), state, path)
    dtype = weight_dtype(dtype_choice, management.get_torch_device())
    products = dtype_choice if dtype_choice in EIGHT_BIT else EXACT
    ours = products != EXACT or not is_full_width(config) or not is_plain(state)
    if not ours and is_canonical(path, state):
        options = {} if dtype is None else {"dtype": dtype}
        patcher = apply_transformer(comfy.sd.load_diffusion_model(str(path), model_options=options))
    else:
        patcher = _build(config, state, path, dtype, dtype_choice in DTYPES, products)
    compute_natively(patcher, dtype)
    return patcher


def is_full_width(config: ChromaConfig) -> bool:
    """Whether ComfyUI's loader, which takes most widths for granted, can build the model."""
    full = ChromaConfig(double_depth=config.double_depth, single_depth=config.single_depth)
    return config == full


def is_canonical(path: Path, state: State) -> bool:
    """Whether one safetensors file holds exactly these tensors under these names."""
    return not is_gguf(path) and read_header(path).tensors.keys() == state.keys()


def build_model(
    path: Path,
    dtype: torch.dtype | None,
    expand: bool = False,
    products: str = EXACT,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """A MODEL of any width from any Chroma file. Raises CheckpointError.

    `expand` turns quantised matrices into `dtype`; `products` in 8 bits take the blocks' matrices
    in these. `disable_dynamic` is part of the signature by which ComfyUI asks for a second copy;
    these models are always held whole.
    """
    config, state = read_transformer(path)
    return _build(config, state, path, dtype, expand, products)


def _build(
    config: ChromaConfig,
    state: State,
    path: Path,
    dtype: torch.dtype | None,
    expand: bool,
    products: str,
) -> ModelPatcher:
    settings = HostConfig(core_settings(config))
    device, offload = management.get_torch_device(), management.unet_offload_device()
    supported = list(settings.supported_inference_dtypes)
    dtype = dtype or management.unet_dtype(
        model_params=sum(weight.numel() for weight in state.values()),
        supported_dtypes=supported,
        weight_dtype=main_dtype(state),
    )
    if expand:
        state = expanded(state, dtype, management.get_free_memory(offload), path)
    if products != EXACT:
        state = in_8_bits(state, products, device, management.get_free_memory(offload))
    settings.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))
    model = settings.get_model(state, device=torch.device("meta"))
    place(model.diffusion_model, state, dtype, HostLinear)
    # Before packing, which hides the matrices from ComfyUI's own count and copies each of them.
    size = management.module_size(model)
    del state
    if device.type == "cpu":
        pack(model.diffusion_model)
    patcher = QuantPatcher(model.to(offload).eval().requires_grad_(False), device, offload, size)
    _wrap_runs(patcher)
    if hasattr(patcher, "cached_patcher_init"):
        patcher.cached_patcher_init = (build_model, (path, dtype, expand, products))
    return patcher
