"""How quantised tensors are called and described in the files of other programs.

GGUF: architecture `flux` with the original names, `t5encoder` with llama.cpp's names. safetensors:
ComfyUI's `scaled_fp8` files, and its later ones with a JSON text per layer (`comfy_quant`).
"""

import json
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import ChromaConfig
from ..text.t5 import MAX_TOKENS, T5Config
from .gguf import T5_NAMES
from .reader import TensorInfo
from .recipe import FP8, FP8_LEARNED, GGUF_TARGETS, INT8, Recipe

# ggml-org/llama.cpp, include/llama.h, enum llama_ftype.
_FILE_TYPES = {
    "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 14, "Q5_K": 16,
    "Q6_K": 18, "BF16": 32,
}  # fmt: skip
_QUANTISATION_VERSION = 2
_T5_EPSILON = 1e-6
_LLAMA_PARTS = {ours: theirs for theirs, ours in T5_NAMES.items()}
_T5_LAYER = re.compile(r"encoder\.block\.(\d+)\.(layer\.\d\..+)\.weight")

MARKER = "scaled_fp8"
# Two elements tell ComfyUI to multiply in 16 or 32 bits, without rounding the inputs to fp8.
MARKER_INFO = TensorInfo("F8_E4M3", (2,))
_SETTINGS = {
    FP8: {"format": "float8_e4m3fn", "full_precision_matrix_mult": True},
    INT8: {"format": "int8_tensorwise", "per_row": True},
}


def gguf_name(name: str) -> str:
    """What a canonical tensor is called in a GGUF file."""
    if name == "shared.weight":
        return "token_embd.weight"
    if name == "encoder.final_layer_norm.weight":
        return "enc.output_norm.weight"
    match = _T5_LAYER.fullmatch(name)
    if match is None:
        return name
    return f"enc.blk.{match[1]}.{_LLAMA_PARTS[match[2]]}.weight"


def gguf_metadata(config: ChromaConfig | T5Config, recipe: Recipe) -> dict[str, str | int | float]:
    """The key-values that tell loaders which model this is."""
    shared: dict[str, str | int | float] = {
        "general.quantization_version": _QUANTISATION_VERSION,
        "general.file_type": _FILE_TYPES[GGUF_TARGETS[recipe.target]],
    }
    if isinstance(config, ChromaConfig):
        return {"general.architecture": "flux", **shared}
    return {
        "general.architecture": "t5encoder",
        **shared,
        "t5encoder.context_length": MAX_TOKENS,
        "t5encoder.embedding_length": config.d_model,
        "t5encoder.feed_forward_length": config.d_ff,
        "t5encoder.block_count": config.layers,
        "t5encoder.attention.head_count": config.heads,
        "t5encoder.attention.key_length": config.d_kv,
        "t5encoder.attention.value_length": config.d_kv,
        "t5encoder.attention.layer_norm_epsilon": _T5_EPSILON,
        "t5encoder.attention.layer_norm_rms_epsilon": _T5_EPSILON,
        "t5encoder.attention.relative_buckets_count": config.buckets,
    }


def has_settings(recipe: Recipe) -> bool:
    """Whether the file describes its layers in JSON, instead of marking the whole file."""
    return recipe.target in ("fp8mixed", INT8)


def stored_infos(name: str, info: TensorInfo, form: str, recipe: Recipe) -> dict[str, TensorInfo]:
    """{name in the file: dtype and shape} of what one tensor in the format `form` becomes."""
    if recipe.is_gguf:
        return {gguf_name(name): TensorInfo(form, info.shape)}
    if form not in (FP8, FP8_LEARNED, INT8):
        return {name: info}
    layer = name.removesuffix(".weight")
    if not has_settings(recipe):
        scale = {f"{layer}.scale_weight": TensorInfo("F32", ())}
        return {name: TensorInfo("F8_E4M3", info.shape), **scale}
    scales = () if form == FP8 else (info.shape[0], 1)
    return {
        name: TensorInfo("F8_E4M3" if form == FP8 else "I8", info.shape),
        f"{layer}.weight_scale": TensorInfo("F32", scales),
        f"{layer}.comfy_quant": TensorInfo("U8", (len(settings_text(form)),)),
    }


def settings_text(form: str) -> Tensor:
    """The JSON text that describes a layer, as uint8."""
    return torch.tensor(list(json.dumps(_SETTINGS[form]).encode()), dtype=torch.uint8)


def safetensors_metadata(
    formats: Mapping[str, str], recipe: Recipe, kept: Mapping[str, str]
) -> dict[str, str]:
    """The file's free-form metadata; of the source's, what describes the model."""
    metadata = {key: text for key, text in kept.items() if key.startswith("modelspec.")}
    if has_settings(recipe):
        layers = {
            name.removesuffix(".weight"): _SETTINGS[form]
            for name, form in formats.items()
            if form in _SETTINGS
        }
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    return metadata
