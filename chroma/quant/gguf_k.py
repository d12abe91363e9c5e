"""GGUF's formats of 256 columns to a block with scales of their own inside: Q2_K to Q6_K.

Layouts: ggml-org/ggml, `ggml-common.h`. Values are products in fp32, from left to right.
Shapes: R rows, n blocks in a row.
"""

import torch
from torch import Tensor

from .gguf_blocks import halves, unpacked


def _scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes to eight scales and eight minima of 6 bits, each (R, n, 8)."""
    low, middle, high = packed.split(4, dim=-1)
    scale = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], dim=-1)
    minimum = torch.cat([middle & 63, (high >> 4) | ((middle >> 6) << 4)], dim=-1)
    return scale, minimum


def decode_q2_k(data: Tensor, _: Tensor | None) -> Tensor:
    """d scale q - dmin minimum: scale and minimum nibbles[16], bit pairs[64], d[2], dmin[2]."""
    blocks = data.view(len(data), -1, 84)
    scale = halves(blocks, 80) * (blocks[..., :16] & 15).float()
    minimum = halves(blocks, 82) * (blocks[..., :16] >> 4).float()
    q = _bit_pairs(blocks[..., 16:80]).view(*scale.shape, 16)
    return q.to(torch.float32).mul_(scale[..., None]).sub_(minimum[..., None]).flatten(1)


def decode_q3_k(data: Tensor, _: Tensor | None) -> Tensor:
    """d (scale - 32) (q - 4): third bits[32], bit pairs[64], scales[12], d[2].

    Of the 16 scales' 6 bits, the low four are in 8 bytes' nibbles, the high two in 4 bytes' pairs.
    """
    blocks = data.view(len(data), -1, 110)
    scale = unpacked(blocks[..., 96:104], 4) | (unpacked(blocks[..., 104:108], 2) << 4)
    scale = halves(blocks, 108) * (scale.float() - 32)
    q = _bit_pairs(blocks[..., 32:96]) | (unpacked(blocks[..., :32], 1) << 2)
    q = q.to(torch.float32).sub_(4).view(*scale.shape, 16)
    return q.mul_(scale[..., None]).flatten(1)


def _bit_pairs(data: Tensor) -> Tensor:
    """64 bytes to (R, n, 256) numbers 0..3: each half of the bytes is for half of the columns."""
    return unpacked(data.unflatten(-1, (2, 32)), 2).flatten(-2)


def _low_nibbles(data: Tensor) -> Tensor:
    """128 bytes to (R, n, 256) numbers 0..15: every 32 bytes are for 64 columns."""
    return unpacked(data.unflatten(-1, (4, 32)), 4).flatten(-2)


def _affine(blocks: Tensor, q: Tensor) -> Tensor:
    """d scale q - dmin minimum, (R, K)."""
    scale, minimum = _scales(blocks[..., 4:16])
    scale = (halves(blocks, 0) * scale.float())[..., None]
    minimum = (halves(blocks, 2) * minimum.float())[..., None]
    return q.unflatten(-1, (8, 32)).to(torch.float32).mul_(scale).sub_(minimum).flatten(1)


def decode_q4_k(data: Tensor, _: Tensor | None) -> Tensor:
    """d[2], dmin[2], scales[12], nibbles[128]."""
    blocks = data.view(len(data), -1, 144)
    return _affine(blocks, _low_nibbles(blocks[..., 16:]))


def decode_q5_k(data: Tensor, _: Tensor | None) -> Tensor:
    """d[2], dmin[2], scales[12], fifth bits[32], low nibbles[128]."""
    blocks = data.view(len(data), -1, 176)
    return _affine(blocks, _low_nibbles(blocks[..., 48:]) | (unpacked(blocks[..., 16:48], 1) << 4))


def decode_q6_k(data: Tensor, _: Tensor | None) -> Tensor:
    """d scale (q - 32): low nibbles[128], high bit pairs[64], scales int8[16], d[2].

    Each half of the nibbles, as each half of the bit pairs, is for half of the columns.
    """
    blocks = data.view(len(data), -1, 210)
    scale = halves(blocks, 208) * blocks[..., 192:208].view(torch.int8).float()
    q = unpacked(blocks[..., :128].unflatten(-1, (2, 64)), 4).flatten(-2)
    q = q.bitwise_or_(_bit_pairs(blocks[..., 128:192]) << 4)
    q = q.to(torch.float32).sub_(32).view(*scale.shape, 16)
    return q.mul_(scale[..., None]).flatten(1)
