"""Values to GGUF's block formats.

The formats of 32 columns are rounded as ggml-org/ggml does, byte for byte. For the K formats our
own search chooses the scales: for each group of columns, of several trial scales the one with the
least squared error after a linear fit of scale and offset to the rounded numbers.
Shapes: R rows, K columns, n blocks, G groups of g columns in a block.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..errors import ChromaError
from .gguf_formats import GGUF_FORMATS
from .tensor import CHUNK

# What the scales and offsets, which are fp16, can hold.
_LARGEST = 65504.0
# Trial scales relative to the one that just spans a group.
_TRIALS = tuple(1 + 0.025 * i for i in range(-8, 5))
_TINY = 1e-30


def encode(name: str, values: Tensor) -> Tensor:
    """Values (R, K) fp32 to the bytes of their rows, uint8 (R, row bytes).

    Raises ValueError for a format not in ENCODABLE and for columns that do not fill whole blocks;
    ChromaError for values that are not finite or beyond fp16's range.
    """
    if name not in ENCODABLE:
        raise ValueError(f"{name} cannot be written; expected one of {', '.join(ENCODABLE)}")
    # The negation catches NaN, which compares false.
    if values.numel() and not bool((torch.stack(values.aminmax()).abs() <= _LARGEST).all()):
        raise ChromaError(
            f"the values are not all finite and within {_LARGEST:.0f}, fp16's range, as {name} "
            "needs; keep this tensor in bf16"
        )
    fmt = GGUF_FORMATS[name]
    shape = (len(values), fmt.row_bytes(values.shape[1]))
    data = torch.empty(shape, dtype=torch.uint8, device=values.device)
    for part, out in zip(values.split(CHUNK), data.split(CHUNK), strict=True):
        blocks = part.float().unflatten(1, (-1, fmt.block)).flatten(0, 1)
        out.view(-1, fmt.block_bytes).copy_(_ENCODERS[name](blocks))
    return data


def _half_bytes(numbers: Tensor) -> Tensor:
    """(n, 1) to fp16's two bytes each, (n, 2)."""
    return numbers.half().view(torch.uint8)


def _half_above(numbers: Tensor) -> Tensor:
    """The nearest fp16 number that is no closer to zero, as fp32.

    Small weights have scales among fp16's subnormal numbers; rounded down, they would clip.
    """
    half = numbers.half()
    further = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float().abs() < numbers.abs(), further, half).float()


def _divided(numbers: Tensor, by: int) -> Tensor:
    """The rounded quotient; GPUs multiply by the rounded inverse if the divisor is no tensor."""
    return numbers / torch.full_like(numbers, by)


def _inverse(numbers: Tensor) -> Tensor:
    """1 / x, or 0 where that is not finite."""
    return torch.nan_to_num(1 / numbers, nan=0.0, posinf=0.0, neginf=0.0)


def _nibble_pairs(q: Tensor) -> Tensor:
    """(..., 2, g) numbers to (..., g) bytes of their low four bits: low nibbles, then high ones."""
    low = q & 15
    return low[..., 0, :] | (low[..., 1, :] << 4)


def _gathered_bits(bits: Tensor, dim: int) -> Tensor:
    """Eight numbers 0 or 1 along `dim`, lowest first, to one byte."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.movedim(dim, -1) << places).sum(-1).to(torch.uint8)


def _packed(q: Tensor, bits: int) -> list[Tensor]:
    """(n, 32) uint8 to the fifth bits' bytes, where there are any, and the nibbles'."""
    nibbles = _nibble_pairs(q.unflatten(1, (2, 16)))
    if bits == 4:
        return [nibbles]
    return [_gathered_bits(q.unflatten(1, (4, 8)) >> 4, -1), nibbles]


def _encode_q8_0(blocks: Tensor) -> Tensor:
    """(n, 32) -> (n, 34), rounding halves away from zero."""
    d = _divided(blocks.abs().amax(1, keepdim=True), 127)
    q = blocks * _inverse(d)
    whole = q.trunc()
    q = whole + (2 * (q - whole)).trunc()
    return torch.cat([_half_bytes(d), q.to(torch.int8).view(torch.uint8)], dim=1)


def _encode_centred(blocks: Tensor, bits: int) -> Tensor:
    """x = d (q - 2^(bits - 1)), for Q4_0 and Q5_0: the largest value lands on q = 0."""
    half = 2 ** (bits - 1)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    d = largest / -half
    q = (blocks * _inverse(d) + (half + 0.5)).clamp(max=2 * half - 1).to(torch.uint8)
    return torch.cat([_half_bytes(d), *_packed(q, bits)], dim=1)


def _encode_spanned(blocks: Tensor, bits: int) -> Tensor:
    """x = d q + m, for Q4_1 and Q5_1: the extremes land on the first and the last q."""
    top = 2**bits - 1
    low, high = blocks.aminmax(dim=1, keepdim=True)
    d = _divided(high - low, top)
    q = ((blocks - low) * _inverse(d) + 0.5).clamp(max=top).to(torch.uint8)
    return torch.cat([_half_bytes(d), _half_bytes(low), *_packed(q, bits)], dim=1)


def _nonzero(scale: Tensor) -> Tensor:
    """A divisor that makes 0 of everything where the scale is 0."""
    return torch.where(scale.abs() < _TINY, torch.full_like(scale, torch.inf), scale)


def _fit_scale(groups: Tensor) -> Tensor:
    """The scale s of x = s q, q in -32..31, for each group (n, G, g) -> (n, G)."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = torch.zeros_like(largest)
    least = torch.full_like(largest, torch.inf)
    for trial in _TRIALS:
        # The largest value lands on -32, the side with one number more.
        scale = largest / (-32 * trial)
        q = (groups / _nonzero(scale)).round().clamp(-32, 31)
        fitted = (groups * q).sum(-1, keepdim=True) / (q * q).sum(-1, keepdim=True).clamp(min=1)
        error = (groups - fitted * q).square().sum(-1, keepdim=True)
        better = error < least
        best, least = torch.where(better, fitted, best), torch.where(better, error, least)
    return best[..., 0]


def _encode_q6_k(blocks: Tensor) -> Tensor:
    """(n, 256) -> (n, 210)."""
    groups = blocks.unflatten(1, (16, 16))
    scale = _fit_scale(groups)
    largest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    d = _half_above(largest / -128)
    codes = (scale / _nonzero(d)).round().clamp(-128, 127)
    q = (groups / _nonzero(d * codes)[..., None]).round().clamp(-32, 31) + 32
    q = q.to(torch.uint8).view(-1, 2, 4, 32)
    pairs = (q >> 4) << torch.arange(0, 8, 2, dtype=torch.uint8, device=q.device)[:, None]
    parts = [
        _nibble_pairs(q.view(-1, 2, 2, 64)).flatten(1),
        pairs.sum(2).to(torch.uint8).flatten(1),
        codes.to(torch.int8).view(torch.uint8),
        _half_bytes(d),
    ]
    return torch.cat(parts, dim=1)


def _fit_affine(groups: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale s >= 0 and offset m >= 0 of x = s q - m, q in 0..top, for (n, G, g) -> two (n, G)."""
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    span = groups.amax(-1, keepdim=True) - low
    best_scale, best_offset = span / top, -low
    least = torch.full_like(span, torch.inf)
    size = groups.shape[-1]
    for trial in _TRIALS:
        q = ((groups - low) / _nonzero(span * trial / top)).round().clamp(0, top)
        sum_q, sum_x = q.sum(-1, keepdim=True), groups.sum(-1, keepdim=True)
        sum_qq, sum_qx = (q * q).sum(-1, keepdim=True), (q * groups).sum(-1, keepdim=True)
        # The least squares line; where its offset has the wrong sign, the one through zero.
        spread = (size * sum_qq - sum_q * sum_q).clamp(min=1)
        scale = ((size * sum_qx - sum_q * sum_x) / spread).clamp(min=0)
        offset = (scale * sum_q - sum_x) / size
        through_zero = (sum_qx / sum_qq.clamp(min=1)).clamp(min=0)
        scale = torch.where(offset < 0, through_zero, scale)
        offset = offset.clamp(min=0)
        error = (groups - scale * q + offset).square().sum(-1, keepdim=True)
        better = error < least
        best_scale = torch.where(better, scale, best_scale)
        best_offset = torch.where(better, offset, best_offset)
        least = torch.where(better, error, least)
    return best_scale[..., 0], best_offset[..., 0]


def _encode_affine(blocks: Tensor, bits: int) -> Tensor:
    """(n, 256) -> (n, 144) for Q4_K, (n, 176) for Q5_K."""
    top = 2**bits - 1
    groups = blocks.unflatten(1, (8, 32))
    scale, offset = _fit_affine(groups, top)
    d, dmin = (_half_above(x.amax(1, keepdim=True) / 63) for x in (scale, offset))
    scale_code = (scale / _nonzero(d)).round().clamp(0, 63)
    offset_code = (offset / _nonzero(dmin)).round().clamp(0, 63)
    q = (groups + (dmin * offset_code)[..., None]) / _nonzero(d * scale_code)[..., None]
    q = q.round().clamp(0, top).to(torch.uint8)
    codes = _packed_codes(scale_code.to(torch.uint8), offset_code.to(torch.uint8))
    parts = [_half_bytes(d), _half_bytes(dmin), codes]
    if bits == 5:
        parts.append(_gathered_bits(q >> 4, 1))
    parts.append(_nibble_pairs(q.unflatten(1, (4, 2))).flatten(1))
    return torch.cat(parts, dim=1)


def _packed_codes(scale: Tensor, offset: Tensor) -> Tensor:
    """Eight 6-bit scales and offsets, each (n, 8), to twelve bytes."""
    first = scale[:, :4] | ((scale[:, 4:] >> 4) << 6)
    second = offset[:, :4] | ((offset[:, 4:] >> 4) << 6)
    third = (scale[:, 4:] & 15) | ((offset[:, 4:] & 15) << 4)
    return torch.cat([first, second, third], dim=1)


# (n, block) fp32 -> (n, block bytes) uint8
_ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _encode_q8_0,
    "Q5_1": partial(_encode_spanned, bits=5),
    "Q5_0": partial(_encode_centred, bits=5),
    "Q4_1": partial(_encode_spanned, bits=4),
    "Q4_0": partial(_encode_centred, bits=4),
    "Q6_K": _encode_q6_k,
    "Q5_K": partial(_encode_affine, bits=5),
    "Q4_K": partial(_encode_affine, bits=4),
}
ENCODABLE = tuple(_ENCODERS)
