"""Tensors as safetensors files hold them, with their scales, to matrices with a meaning.

Formats: ComfyUI's `scaled_fp8` files (`<layer>.scale_weight`, the marker tensor `scaled_fp8`), its
later `comfy_quant` files (`<layer>.weight_scale`, a JSON text per layer or in the file's metadata),
and bare fp8 weights. What counts is the dtype of each tensor on disk: a layer that was left in bf16
is bf16, whatever the file as a whole is called.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quant.finite import codes_finite
from ..quant.floats import E4M3, E5M2, INT8
from ..quant.tensor import Format, QuantTensor
from .keys import strip_prefix

# What a canonical state dict holds.
Weight = Tensor | QuantTensor
State = dict[str, Weight]

FORMATS: dict[torch.dtype, Format] = {
    torch.float8_e4m3fn: E4M3,
    torch.float8_e5m2: E5M2,
    torch.int8: INT8,
}
# Both spellings of what a file says of `<layer>.weight`.
_SCALE = (".weight_scale", ".scale_weight")
_INPUT_SCALE = (".input_scale", ".scale_input")
_SETTINGS = ".comfy_quant"
SIDE_TENSORS = (*_SCALE, *_INPUT_SCALE, _SETTINGS)
_METADATA = "_quantization_metadata"
_MARKER = "scaled_fp8"
# The names of the formats that `<layer>.comfy_quant` may state and that are read here.
_READ = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "int8_tensorwise")


def layer_settings(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """{canonical layer name: settings} of a file that states them in its metadata.

    Raises CheckpointError if that text is not what it should be.
    """
    if _METADATA not in metadata:
        return {}
    layers = _parse(metadata[_METADATA].encode(), _METADATA).get("layers")
    if not isinstance(layers, dict):
        raise CheckpointError(f"{_METADATA} names no layers; the file is damaged")
    out = {}
    for name, settings in layers.items():
        if not isinstance(settings, dict):
            raise CheckpointError(f"{_METADATA}: {name} has no settings; the file is damaged")
        out[strip_prefix(name)] = settings
    return out


def weight_only(markers: Mapping[str, Tensor]) -> bool:
    """Whether a `scaled_fp8` marker asks for products in 16 or 32 bits: it then has two elements.

    markers: the tensors of that name in the file, none or one.
    """
    return any(marker.numel() == 2 for marker in markers.values())


def marked(name: str) -> str | None:
    """The prefix of the model that a `scaled_fp8` marker is about; None for any other tensor."""
    is_marker = name == _MARKER or name.endswith(f".{_MARKER}")
    return name.removesuffix(_MARKER) if is_marker else None


def scale_names(tensors: Collection[str]) -> set[str]:
    """The tensors that only describe `<layer>.weight`: its scales and settings."""
    return {name for name in tensors if name.endswith(SIDE_TENSORS)}


def assemble(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], full_precision: bool
) -> State:
    """Canonical tensors and their scales to a state dict; nothing is copied.

    full_precision: what the file's marker says of all layers. Raises CheckpointError for a format
    that is not read here, and for scales that do not fit.
    """
    stated = layer_settings(metadata)
    side: dict[str, dict[str, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for suffix in SIDE_TENSORS:
            if name.endswith(suffix):
                side.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
                break
        else:
            weights[name] = tensor
    state: State = {}
    for name, tensor in weights.items():
        layer = name.removesuffix(".weight")
        given = side.pop(layer, {}) if name.endswith(".weight") else {}
        settings = stated.get(layer) or _settings_of(layer, given)
        state[name] = _weight(name, tensor, given, settings, full_precision)
    if side:
        layer = next(iter(side))
        raise CheckpointError(f"{layer} has a scale but no weight; the file is damaged")
    return state


def _settings_of(layer: str, given: Mapping[str, Tensor]) -> dict[str, Any]:
    text = given.get(_SETTINGS)
    if text is None:
        return {}
    if text.dtype is not torch.uint8 or text.ndim != 1:
        raise CheckpointError(f"{layer}{_SETTINGS} is no text; the file is damaged")
    return _parse(bytes(text.tolist()), f"{layer}{_SETTINGS}")


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where} is not a JSON object; the file is damaged")
    return settings


def _weight(
    name: str,
    tensor: Tensor,
    given: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    full_precision: bool,
) -> Weight:
    stated = settings.get("format")
    stored = FORMATS.get(tensor.dtype)
    in_few_bits = stored is not None or not tensor.is_floating_point()
    if stated is not None and stated not in _READ and in_few_bits:
        raise CheckpointError(
            f"{name} is in {str(stated)[:40]!a}, which is not read here; expected fp8 or int8 with "
            "one scale for the matrix or for each row, so choose another version of the model"
        )
    scale = _scale(name, tensor, given)
    if stored is None:
        # Core would take a marked layer for fp8 even so; its scale is then 1.
        if scale is None or bool((scale == 1).all()):
            return tensor
        return tensor.float().mul_(scale).to(tensor.dtype)
    options = settings.get("params")
    if settings.get("convrot") or (isinstance(options, dict) and options.get("convrot")):
        raise CheckpointError(
            f"{name} is stored rotated (convrot), which is not read here; "
            "choose a version of the model without it"
        )
    if stored is INT8 and scale is None:
        raise CheckpointError(f"{name} is int8 without a scale; choose another version of it")
    if not codes_finite(stored, tensor.view(stored.dtype)):
        raise CheckpointError(f"{name} holds NaN or infinity; the file is damaged")
    if tensor.ndim != 2:
        values = stored.decode(tensor.view(stored.dtype), scale)
        return values.to(torch.bfloat16)
    inputs = next((given[s] for s in _INPUT_SCALE if s in given), None)
    return QuantTensor(
        stored,
        tensor.view(stored.dtype),
        scale,
        (tensor.shape[0], tensor.shape[1]),
        None if inputs is None or inputs.numel() != 1 else float(inputs),
        bool(settings.get("full_precision_matrix_mult", full_precision)),
    )


def _scale(name: str, tensor: Tensor, given: Mapping[str, Tensor]) -> Tensor | None:
    """The scale in fp32 with the shape () or (N, 1)."""
    scale = next((given[suffix] for suffix in _SCALE if suffix in given), None)
    if scale is None:
        return None
    if not scale.is_floating_point():
        raise CheckpointError(
            f"the scale of {name} is {scale.dtype}, expected fp32; choose another file"
        )
    if not bool(torch.isfinite(scale.float()).all()):
        raise CheckpointError(f"the scale of {name} is not finite; download the file again")
    if scale.numel() == 1:
        return scale.float().reshape(())
    if tensor.ndim == 2 and scale.shape in ((tensor.shape[0],), (tensor.shape[0], 1)):
        return scale.float().reshape(-1, 1)
    raise CheckpointError(
        f"the scale of {name} has shape {tuple(scale.shape)}, expected one number or one for each "
        f"of the {tensor.shape[0] if tensor.ndim else 1} rows; choose another version of the model"
    )
