"""State dicts in diffusers' layout to the original one.

Diffusers keeps q, k, v and the MLP's input apart where the original holds one matrix, numbers the
decoder's levels from the coarsest, and writes the autoencoder's attention as linear layers
(huggingface/diffusers, Apache-2.0, `loaders/single_file_utils.py`). Chroma's final layer has no
modulation of its own, so that nothing is swapped in it.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..quant.tensor import QuantTensor, concatenate
from .stored import State, Weight

# (their name, our name, which part of the fused matrix it is, of how many), tried in this order.
_TRANSFORMER: tuple[tuple[str, str, int, int], ...] = (
    (r"single_transformer_blocks\.(\d+)\.attn\.to_q\.", r"single_blocks.\1.linear1.", 0, 4),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_k\.", r"single_blocks.\1.linear1.", 1, 4),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_v\.", r"single_blocks.\1.linear1.", 2, 4),
    (r"single_transformer_blocks\.(\d+)\.proj_mlp\.", r"single_blocks.\1.linear1.", 3, 4),
    (r"single_transformer_blocks\.(\d+)\.proj_out\.", r"single_blocks.\1.linear2.", 0, 1),
    (r"single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight",
     r"single_blocks.\1.norm.query_norm.scale", 0, 1),
    (r"single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight",
     r"single_blocks.\1.norm.key_norm.scale", 0, 1),
    (r"transformer_blocks\.(\d+)\.attn\.to_q\.", r"double_blocks.\1.img_attn.qkv.", 0, 3),
    (r"transformer_blocks\.(\d+)\.attn\.to_k\.", r"double_blocks.\1.img_attn.qkv.", 1, 3),
    (r"transformer_blocks\.(\d+)\.attn\.to_v\.", r"double_blocks.\1.img_attn.qkv.", 2, 3),
    (r"transformer_blocks\.(\d+)\.attn\.add_q_proj\.", r"double_blocks.\1.txt_attn.qkv.", 0, 3),
    (r"transformer_blocks\.(\d+)\.attn\.add_k_proj\.", r"double_blocks.\1.txt_attn.qkv.", 1, 3),
    (r"transformer_blocks\.(\d+)\.attn\.add_v_proj\.", r"double_blocks.\1.txt_attn.qkv.", 2, 3),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0\.", r"double_blocks.\1.img_attn.proj.", 0, 1),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out\.", r"double_blocks.\1.txt_attn.proj.", 0, 1),
    (r"transformer_blocks\.(\d+)\.attn\.norm_q\.weight",
     r"double_blocks.\1.img_attn.norm.query_norm.scale", 0, 1),
    (r"transformer_blocks\.(\d+)\.attn\.norm_k\.weight",
     r"double_blocks.\1.img_attn.norm.key_norm.scale", 0, 1),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight",
     r"double_blocks.\1.txt_attn.norm.query_norm.scale", 0, 1),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight",
     r"double_blocks.\1.txt_attn.norm.key_norm.scale", 0, 1),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"double_blocks.\1.img_mlp.0.", 0, 1),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.", r"double_blocks.\1.img_mlp.2.", 0, 1),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj\.",
     r"double_blocks.\1.txt_mlp.0.", 0, 1),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2\.", r"double_blocks.\1.txt_mlp.2.", 0, 1),
    (r"(distilled_guidance_layer\.layers\.\d+)\.linear_1\.", r"\1.in_layer.", 0, 1),
    (r"(distilled_guidance_layer\.layers\.\d+)\.linear_2\.", r"\1.out_layer.", 0, 1),
    (r"(distilled_guidance_layer\.norms\.\d+)\.weight", r"\1.scale", 0, 1),
    (r"x_embedder\.", "img_in.", 0, 1),
    (r"context_embedder\.", "txt_in.", 0, 1),
    (r"proj_out\.", "final_layer.linear.", 0, 1),
)  # fmt: skip

_AUTOENCODER = (
    (r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.up.\1.block."),
    (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.up.\1.upsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
_DECODER_LEVEL = re.compile(r"decoder\.up\.(\d+)\.")


def transformer_from_diffusers(state: State) -> State:
    """Chroma's transformer under the original names; fused matrices are joined copies.

    A fused matrix of which a part is missing is left out; names that are not known stay as they
    are. Raises RuntimeError or ValueError if parts that belong together differ in width or format.
    """
    parts: dict[str, dict[int, Weight]] = {}
    counts: dict[str, int] = {}
    for name, tensor in state.items():
        target, part, count = _place(name)
        parts.setdefault(target, {})[part] = tensor
        counts[target] = count
    out: State = {}
    for target, found in parts.items():
        if len(found) == counts[target]:
            rows = [found[part] for part in sorted(found)]
            out[target] = rows[0] if len(rows) == 1 else _join(rows)
    return out


def _join(rows: list[Weight]) -> Weight:
    matrices = [row for row in rows if isinstance(row, QuantTensor)]
    if len(matrices) == len(rows):
        return concatenate(matrices)
    whole = (r.dequantise(torch.bfloat16) if isinstance(r, QuantTensor) else r for r in rows)
    return torch.cat(list(whole))


def _place(name: str) -> tuple[str, int, int]:
    for pattern, target, part, count in _TRANSFORMER:
        if match := re.match(pattern, name):
            return match.expand(target) + name[match.end() :], part, count
    return name, 0, 1


def autoencoder_from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Flux autoencoder under the original names, its attention as 1x1 convolutions."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, target in _AUTOENCODER:
            name = re.sub(pattern, target, name)
        linear = ".attn_1." in name and tensor.ndim == 2
        renamed[name] = tensor[:, :, None, None] if linear else tensor
    last = max((int(m[1]) for name in renamed if (m := _DECODER_LEVEL.match(name))), default=0)
    return {
        _DECODER_LEVEL.sub(lambda m: f"decoder.up.{last - int(m[1])}.", name): tensor
        for name, tensor in renamed.items()
    }
