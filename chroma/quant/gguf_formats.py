"""GGUF's block formats by ggml's names."""

from functools import partial

import torch
from torch import Tensor

from .ggml_types import GGML_TYPES
from .gguf_blocks import decode_q4_0, decode_q4_1, decode_q5_0, decode_q5_1, decode_q8_0
from .gguf_k import decode_q2_k, decode_q3_k, decode_q4_k, decode_q5_k, decode_q6_k
from .tensor import Decode, Format

_OURS: dict[str, Decode] = {
    "Q8_0": decode_q8_0,
    "Q4_0": decode_q4_0,
    "Q4_1": decode_q4_1,
    "Q5_0": decode_q5_0,
    "Q5_1": decode_q5_1,
    "Q2_K": decode_q2_k,
    "Q3_K": decode_q3_k,
    "Q4_K": decode_q4_k,
    "Q5_K": decode_q5_k,
    "Q6_K": decode_q6_k,
}
# Rarer ones, which the gguf package decodes on the CPU. NVFP4 is not among them: a file keeps a
# second scale of each such matrix in a tensor of its own, so that a block's bytes are not enough.
_THEIRS = (
    "IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS", "IQ4_NL",
    "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip


def _decode_by_package(name: str, data: Tensor, _: Tensor | None) -> Tensor:
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.quants.dequantize(data.cpu().numpy(), kind)).to(data.device)


def is_decodable(name: str) -> bool:
    """Whether a format of the table can be decoded here: the rarer ones need the gguf package."""
    if name in _OURS:
        return True
    try:
        import gguf
    except ImportError:
        return False
    return name in gguf.GGMLQuantizationType.__members__  # older releases know fewer


def _format(name: str) -> Format:
    _, block, block_bytes = GGML_TYPES[name]
    decode = _OURS.get(name) or partial(_decode_by_package, name)
    return Format(name, torch.uint8, decode, block, block_bytes)


GGUF_FORMATS = {name: _format(name) for name in (*_OURS, *_THEIRS)}
