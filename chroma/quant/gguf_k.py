"""GGUF's formats of 256 columns to a block with scales of their own inside: Q4_K, Q5_K, Q6_K.

Layouts: ggml-org/ggml, `ggml-common.h`. Values are exact in fp32.
Shapes: R rows, n blocks in a row.
"""

import torch
from torch import Tensor

from .gguf_blocks import halves

SUPER_BLOCK = 256


def _scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes to eight scales and eight minima of 6 bits, each (R, n, 8)."""
    low, middle, high = packed.split(4, dim=-1)
    scale = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], dim=-1)
    minimum = torch.cat([middle & 63, (high >> 4) | ((middle >> 6) << 4)], dim=-1)
    return scale, minimum


def _low_nibbles(data: Tensor) -> Tensor:
    """128 bytes to (R, n, 8, 32): of every 32 bytes first the low halves, then the high ones."""
    parts = data.unflatten(-1, (4, 1, 32))
    return torch.cat([parts & 15, parts >> 4], dim=-2).flatten(-3, -2)


def _affine(blocks: Tensor, q: Tensor) -> Tensor:
    """d scale q - dmin minimum, (R, K)."""
    scale, minimum = _scales(blocks[..., 4:16])
    scale = (halves(blocks, 0) * scale.float())[..., None]
    minimum = (halves(blocks, 2) * minimum.float())[..., None]
    return q.to(torch.float32).mul_(scale).sub_(minimum).flatten(1)


def decode_q4_k(data: Tensor, _: Tensor | None) -> Tensor:
    """d[2], dmin[2], scales[12], nibbles[128]."""
    blocks = data.view(len(data), -1, 144)
    return _affine(blocks, _low_nibbles(blocks[..., 16:]))


def decode_q5_k(data: Tensor, _: Tensor | None) -> Tensor:
    """d[2], dmin[2], scales[12], fifth bits[32], low nibbles[128].

    Bit j of byte i of the fifth bits is for column 32 j + i.
    """
    blocks = data.view(len(data), -1, 176)
    places = torch.arange(8, dtype=torch.uint8, device=data.device)[:, None]
    high = ((blocks[..., None, 16:48] >> places) & 1) << 4
    return _affine(blocks, _low_nibbles(blocks[..., 48:]) | high)


def decode_q6_k(data: Tensor, _: Tensor | None) -> Tensor:
    """d scale (q - 32): low nibbles[128], high bits[64], scales int8[16], d[2].

    In each half of 128 columns, 64 low bytes and 32 high bytes hold four groups of 32 columns.
    """
    blocks = data.view(len(data), -1, 210)
    low = blocks[..., :128].unflatten(-1, (2, 1, 64))
    low = torch.cat([low & 15, low >> 4], dim=-2).flatten(-2).unflatten(-1, (4, 32))
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=data.device)[:, None]
    high = ((blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> places) & 3) << 4
    q = (low | high).flatten(-3).to(torch.float32).sub_(32).unflatten(-1, (16, 16))
    scale = halves(blocks, 208) * blocks[..., 192:208].view(torch.int8).float()
    return q.mul_(scale[..., None]).flatten(1)
