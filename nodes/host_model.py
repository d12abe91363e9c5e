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
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..chroma.checkpoint import (
    Kind,
    check_state,
    identify,
    quantisation,
    read_header,
    read_transformer,
)
from ..chroma.checkpoint.keys import TRANSFORMER_PARTS, belonging
from ..chroma.checkpoint.reader import Header
from ..chroma.config import ChromaConfig
from ..chroma.errors import CheckpointError
from ..chroma.transformer import ChromaTransformer
from .host import compute_natively, weight_dtype
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
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, share_modulation)
    return clone


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
    """A MODEL from any Chroma file that this ComfyUI can compute with. Raises CheckpointError."""
    header = read_header(path)
    config = _check(header)
    dtype = weight_dtype(dtype_choice, management.get_torch_device())
    if quantisation(header.tensors) is not None or is_full_width(config):
        options = {} if dtype is None else {"dtype": dtype}
        patcher = apply_transformer(comfy.sd.load_diffusion_model(str(path), model_options=options))
    else:
        patcher = build_model(path, dtype)
    compute_natively(patcher, dtype)
    return patcher


def is_full_width(config: ChromaConfig) -> bool:
    """Whether ComfyUI's loader, which takes most widths for granted, can build the model."""
    full = ChromaConfig(double_depth=config.double_depth, single_depth=config.single_depth)
    return config == full


def refuse_unreadable(header: Header) -> None:
    """Raises CheckpointError for a quantised format that this ComfyUI would read as noise."""
    name = quantisation(header.tensors)
    mixed = any(tensor.endswith(".comfy_quant") for tensor in header.tensors)
    mixed = mixed or "_quantization_metadata" in header.metadata
    if mixed and not hasattr(comfy.utils, "convert_old_quants"):
        raise CheckpointError(
            f"{header.path.name} is in {name}, which this ComfyUI cannot read; "
            "expected bf16 or scaled fp8, so update ComfyUI to 0.4 or later or choose another file"
        )


def _check(header: Header) -> ChromaConfig:
    """The model's widths, from a header that is complete. Raises CheckpointError."""
    kind = identify(header.tensors)
    if kind is not Kind.CHROMA:
        raise CheckpointError(
            f"{header.path.name} is {kind.value}, expected a Chroma transformer; "
            "choose Chroma1-HD.safetensors or another Chroma file"
        )
    refuse_unreadable(header)
    names = belonging(header.tensors, TRANSFORMER_PARTS)
    shapes = {short: header.tensors[name] for name, short in names.items()}
    try:
        config = ChromaConfig.from_state_dict(shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{header.path.name}: {error}") from None
    with torch.device("meta"):
        wanted = ChromaTransformer(config).state_dict()
    if missing := [name for name in wanted if name not in shapes]:
        raise CheckpointError(
            f"{header.path.name} lacks {len(missing)} tensors ({missing[0]}, ...); "
            "it is incomplete, download it again"
        )
    return config


def build_model(
    path: Path, dtype: torch.dtype | None, disable_dynamic: bool = False
) -> ModelPatcher:
    """A MODEL of any width from a file with plain weights. Raises CheckpointError.

    `disable_dynamic` is part of the signature by which ComfyUI asks for a second copy; these
    models are always held whole.
    """
    config, state = read_transformer(path)
    with torch.device("meta"):
        check_state(ChromaTransformer(config), state, path)
    settings = HostConfig(core_settings(config))
    device, offload = management.get_torch_device(), management.unet_offload_device()
    supported = list(settings.supported_inference_dtypes)
    dtype = dtype or management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(state),
    )
    settings.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))
    model = settings.get_model(state).to(offload)
    model.load_model_weights({name: tensor.to(dtype) for name, tensor in state.items()})
    patcher = ModelPatcher(model.eval().requires_grad_(False), device, offload)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, share_modulation)
    if hasattr(patcher, "cached_patcher_init"):
        patcher.cached_patcher_init = (build_model, (path, dtype))
    return patcher
