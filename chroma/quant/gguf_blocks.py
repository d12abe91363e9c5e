"""GGUF's formats of 32 columns to a block: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

Layouts: ggml-org/ggml, `ggml-common.h`; d and m are fp16. Values are exact products in fp32.
Shapes: R rows, n blocks in a row.
"""

import torch
from torch import Tensor

_COPIES = 0x0101010101010101
_DIAGONAL = 0x8040201008040201 - (1 << 64)


def halves(blocks: Tensor, start: int) -> Tensor:
    """The fp16 number at byte `start` of every block (R, n, bytes), as fp32 (R, n, 1)."""
    return blocks.view(torch.float16)[..., start // 2 : start // 2 + 1].float()


def unpacked(data: Tensor, bits: int) -> Tensor:
    """(..., g) bytes to (..., g 8 / bits) small numbers: first the lowest bits of all g bytes."""
    data = data.contiguous()
    parts = torch.cat([data >> place for place in range(0, 8, bits)], dim=-1)
    return parts.bitwise_and_(2**bits - 1)


def fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """The 32 bits at byte `start` of every block, lowest first, as 16 or 0, (R, n, 32) uint8."""
    # Eight copies of a byte in one word, of which copy j keeps bit j; adding 127 moves that to the
    # copy's highest bit, without a carry to the next copy.
    words = blocks[..., start : start + 4].to(torch.int64).mul_(_COPIES).bitwise_and_(_DIAGONAL)
    words = words.add_(127 * _COPIES).bitwise_right_shift_(3).bitwise_and_(16 * _COPIES)
    return words.view(torch.uint8)


def decode_q8_0(data: Tensor, _: Tensor | None) -> Tensor:
    """d q: d[2], q int8[32]."""
    blocks = data.view(len(data), -1, 34)
    values = blocks[..., 2:].view(torch.int8).to(torch.float32)
    return values.mul_(halves(blocks, 0)).flatten(1)


def decode_q4_0(data: Tensor, _: Tensor | None) -> Tensor:
    """d (q - 8): d[2], q nibbles[16]."""
    blocks = data.view(len(data), -1, 18)
    values = unpacked(blocks[..., 2:], 4).to(torch.float32).sub_(8)
    return values.mul_(halves(blocks, 0)).flatten(1)


def decode_q4_1(data: Tensor, _: Tensor | None) -> Tensor:
    """d q + m: d[2], m[2], q nibbles[16]."""
    blocks = data.view(len(data), -1, 20)
    values = unpacked(blocks[..., 4:], 4).to(torch.float32)
    return values.mul_(halves(blocks, 0)).add_(halves(blocks, 2)).flatten(1)


def decode_q5_0(data: Tensor, _: Tensor | None) -> Tensor:
    """d (q - 16): d[2], fifth bits[4], low nibbles[16]."""
    blocks = data.view(len(data), -1, 22)
    q = unpacked(blocks[..., 6:], 4) | fifth_bits(blocks, 2)
    return q.to(torch.float32).sub_(16).mul_(halves(blocks, 0)).flatten(1)


def decode_q5_1(data: Tensor, _: Tensor | None) -> Tensor:
    """d q + m: d[2], m[2], fifth bits[4], low nibbles[16]."""
    blocks = data.view(len(data), -1, 24)
    q = unpacked(blocks[..., 8:], 4) | fifth_bits(blocks, 4)
    return q.to(torch.float32).mul_(halves(blocks, 0)).add_(halves(blocks, 2)).flatten(1)
