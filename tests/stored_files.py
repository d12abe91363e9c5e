"""Files of every storage format, written by the formats' own libraries and torch's casts.

Each maker takes a plain fp32 state dict and returns what the file's matrices stand for, in fp32.
"""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
# (state, path) -> {name: what it stands for}
Maker = Callable[[State, Path], State]
KEEP = ("distilled_guidance_layer.", "final_layer.", "img_in.", "txt_in.")


def is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.endswith(".weight") and "relative" not in name


def round_fp8(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Stored bytes and their scale, by one scale for the matrix."""
    scale = weight.abs().max() / torch.finfo(dtype).max
    return (weight / scale).to(dtype), scale


def bare_fp8(dtype: torch.dtype) -> Maker:
    def make(state: State, path: Path) -> State:
        file = {n: t.to(dtype) if is_matrix(n, t) else t for n, t in state.items()}
        save_file(file, path)
        return {n: t.float() for n, t in file.items()}

    return make


def scaled_fp8(marker_elements: int, keep: tuple[str, ...] = ()) -> Maker:
    """ComfyUI's older format. Kept layers are in bf16 and carry a scale of 1 nevertheless."""

    def make(state: State, path: Path) -> State:
        file, meant = {"scaled_fp8": torch.empty(marker_elements, dtype=torch.float8_e4m3fn)}, {}
        for name, tensor in state.items():
            if not is_matrix(name, tensor):
                file[name] = meant[name] = tensor
            elif name.startswith(keep) and keep:
                file[name] = tensor.bfloat16()
                file[name.replace(".weight", ".scale_weight")] = torch.ones(1)
                meant[name] = file[name].float()
            else:
                file[name], scale = round_fp8(tensor)
                file[name.replace(".weight", ".scale_weight")] = scale.reshape(1)
                meant[name] = file[name].float() * scale
        save_file(file, path)
        return meant

    return make


def comfy_quant(where: str, rows: bool = False, kind: str = "float8_e4m3fn") -> Maker:
    """ComfyUI's later format, stated per layer in a tensor or in the file's metadata."""

    def make(state: State, path: Path) -> State:
        file, meant, layers = {}, {}, {}
        for name, tensor in state.items():
            if not is_matrix(name, tensor) or name.startswith(KEEP):
                file[name] = tensor.bfloat16()
                meant[name] = file[name].float()
                continue
            largest = tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().max()
            if kind == "int8_tensorwise":
                scale = largest / 127
                file[name] = (tensor / scale).round().to(torch.int8)
            else:
                scale = largest / 448
                file[name] = (tensor / scale).to(torch.float8_e4m3fn)
            meant[name] = file[name].float() * scale
            layer = name.removesuffix(".weight")
            file[f"{layer}.weight_scale"] = scale
            settings = {"format": kind, "full_precision_matrix_mult": True}
            layers[layer] = settings
            if where == "tensor":
                text = json.dumps(settings).encode()
                file[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        text = json.dumps({"format_version": "1.0", "layers": layers})
        save_file(file, path, {"_quantization_metadata": text} if where == "metadata" else None)
        return meant

    return make


def gguf_file(
    kind: str, rename: Callable[[str], str] = str, architecture: str | None = "flux"
) -> Maker:
    """A GGUF file whose matrices are of one type; those that fill no blocks are F16."""

    def make(state: State, path: Path) -> State:
        writer = gguf.GGUFWriter(path, architecture or "")
        quant, meant = gguf.GGMLQuantizationType[kind], {}
        block = gguf.GGML_QUANT_SIZES[quant][0]
        for name, tensor in state.items():
            values = tensor.float().numpy()
            if not is_matrix(name, tensor):
                writer.add_tensor(rename(name), values)
                meant[name] = tensor.float()
                continue
            if values.shape[1] % block:
                writer.add_tensor(rename(name), values.astype(np.float16))
                meant[name] = torch.from_numpy(values.astype(np.float16)).float()
                continue
            data = gguf.quants.quantize(values, quant)
            writer.add_tensor(rename(name), data, raw_dtype=quant)
            meant[name] = torch.from_numpy(gguf.quants.dequantize(data, quant).copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return meant

    return make


def llama_name(name: str) -> str:
    """Hugging Face's name of a T5 tensor in llama.cpp's spelling."""
    for ours, theirs in (
        ("encoder.block.", "enc.blk."),
        ("layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"),
        ("layer.0.SelfAttention.", "attn_"), ("layer.0.layer_norm", "attn_norm"),
        ("layer.1.layer_norm", "ffn_norm"), ("layer.1.DenseReluDense.wi_0", "ffn_gate"),
        ("layer.1.DenseReluDense.wi_1", "ffn_up"), ("layer.1.DenseReluDense.wo", "ffn_down"),
        ("encoder.final_layer_norm", "enc.output_norm"), ("shared.", "token_embd."),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


SAFETENSORS: dict[str, Maker] = {
    "e4m3": bare_fp8(torch.float8_e4m3fn),
    "e5m2": bare_fp8(torch.float8_e5m2),
    "scaled_fp8": scaled_fp8(0),
    "scaled_fp8 weight only": scaled_fp8(2),
    "scaled_fp8 keep_distillation": scaled_fp8(2, KEEP),
    "comfy_quant tensors": comfy_quant("tensor"),
    "comfy_quant metadata": comfy_quant("metadata"),
    "comfy_quant rows": comfy_quant("tensor", rows=True),
    "int8_tensorwise": comfy_quant("tensor", kind="int8_tensorwise"),
    "int8_tensorwise rows": comfy_quant("metadata", rows=True, kind="int8_tensorwise"),
}
GGUF_KINDS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
