"""Values to GGUF's block formats.

The formats of 32 columns are written by the gguf package, bit for bit as llama.cpp does. For the
K formats our own search chooses the scales: for each group of columns, of several trial scales the
one with the least squared error after a linear fit of scale and offset to the rounded numbers.
Shapes: R rows, K columns, G groups of g columns.
"""

import gguf
import torch
from torch import Tensor

from .gguf_k import SUPER_BLOCK
from .tensor import CHUNK

_BY_PACKAGE = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
_K_BITS = {"Q4_K": 4, "Q5_K": 5}
ENCODABLE = (*_BY_PACKAGE, "Q6_K", "Q5_K", "Q4_K")
# Trial scales relative to the one that just spans a group.
_TRIALS = tuple(1 + 0.025 * i for i in range(-8, 5))
_TINY = 1e-30


def encode(name: str, values: Tensor) -> Tensor:
    """Finite values (R, K) fp32 to the bytes of their rows, uint8 (R, row bytes).

    Raises ValueError for an unknown format, other numbers than finite ones, and for columns that
    do not fill whole blocks.
    """
    if name not in ENCODABLE:
        raise ValueError(f"{name} cannot be written; expected one of {', '.join(ENCODABLE)}")
    if values.numel() and not bool(torch.isfinite(torch.stack(values.aminmax())).all()):
        raise ValueError("the values are not all finite")
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0]
    if values.shape[1] % block:
        raise ValueError(f"{values.shape[1]} columns do not fill blocks of {block}")
    parts = [_encode_rows(name, part.float()) for part in values.split(CHUNK)]
    return torch.cat(parts)


def _encode_rows(name: str, values: Tensor) -> Tensor:
    if name in _BY_PACKAGE:
        kind = gguf.GGMLQuantizationType[name]
        return torch.from_numpy(gguf.quants.quantize(values.cpu().numpy(), kind))
    blocks = values.reshape(-1, SUPER_BLOCK)
    packed = _encode_q6_k(blocks) if name == "Q6_K" else _encode_affine(blocks, _K_BITS[name])
    return packed.reshape(len(values), -1)


def _half_bytes(numbers: Tensor) -> Tensor:
    """(n,) to fp16's two bytes each, (n, 2)."""
    return numbers.half()[:, None].view(torch.uint8)


def _rounded_up(numbers: Tensor) -> Tensor:
    """The value that fp16 keeps of each number."""
    return numbers.half().float()


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


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < _TINY, torch.full_like(scale, torch.inf), scale)


def _encode_q6_k(blocks: Tensor) -> Tensor:
    """(n, 256) -> (n, 210)."""
    groups = blocks.unflatten(1, (16, 16))
    scale = _fit_scale(groups)
    largest = scale.gather(1, scale.abs().argmax(1, keepdim=True))[:, 0]
    d = _rounded_up(largest / -128)
    codes = (scale / _nonzero(d)[:, None]).round().clamp(-128, 127)
    q = (groups / _nonzero(d[:, None] * codes)[..., None]).round().clamp(-32, 31) + 32
    q = q.to(torch.uint8).view(-1, 2, 4, 32)
    low = (q & 15).view(-1, 2, 2, 64)
    low = low[:, :, 0] | (low[:, :, 1] << 4)
    high = q >> 4
    high = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    codes = codes.to(torch.int8).view(torch.uint8)
    return torch.cat([low.flatten(1), high.flatten(1), codes, _half_bytes(d)], dim=1)


def _fit_affine(groups: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale s and offset m >= 0 of x = s q - m, q in 0..top, for (n, G, g) -> two (n, G)."""
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
        spread = size * sum_qq - sum_q * sum_q
        scale = (size * sum_qx - sum_q * sum_x) / spread.clamp(min=1)
        offset = (scale * sum_q - sum_x) / size
        through_zero = (offset < 0) | (spread < 1)
        scale = torch.where(through_zero, sum_qx / sum_qq.clamp(min=1), scale).clamp(min=0)
        offset = torch.where(through_zero, 0.0, offset)
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
    d, dmin = (_rounded_up(numbers.amax(1) / 63) for numbers in (scale, offset))
    scale_code = (scale / _nonzero(d)[:, None]).round().clamp(0, 63)
    offset_code = (offset / _nonzero(dmin)[:, None]).round().clamp(0, 63)
    step = _nonzero(d[:, None] * scale_code)[..., None]
    q = (groups + (dmin[:, None] * offset_code)[..., None]) / step
    q = q.round().clamp(0, top).to(torch.uint8)
    low = (q & 15).view(-1, 4, 2, 32)
    parts = [
        _half_bytes(d), _half_bytes(dmin),
        _pack_codes(scale_code.to(torch.uint8), offset_code.to(torch.uint8)),
    ]  # fmt: skip
    if bits == 5:
        places = torch.arange(8, dtype=torch.uint8, device=q.device)[:, None]
        parts.append(((q >> 4) << places).sum(1, dtype=torch.int32).to(torch.uint8))
    parts.append((low[:, :, 0] | (low[:, :, 1] << 4)).flatten(1))
    return torch.cat(parts, dim=1)


def _pack_codes(scale: Tensor, offset: Tensor) -> Tensor:
    """Eight 6-bit scales and offsets, each (n, 8), to twelve bytes."""
    first = scale[:, :4] | ((scale[:, 4:] >> 4) << 6)
    second = offset[:, :4] | ((offset[:, 4:] >> 4) << 6)
    third = (scale[:, 4:] & 15) | ((offset[:, 4:] & 15) << 4)
    return torch.cat([first, second, third], dim=1)
