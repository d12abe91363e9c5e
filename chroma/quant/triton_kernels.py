"""Fused kernels for GPUs, each with the values of the plain function it stands for, rounded once.

Import this only where the package triton is installed; nothing uses it unless the user asks.
Shapes: N output features, K input features, M tokens, B batch, L tokens, H heads, D head
dimension, C width.
"""

# Triton is not always installed, and pyright cannot follow the types of its calls.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_Q8_BLOCK = 32
_FUSED_TOKENS = 128


@triton.jit
def _q8_0_kernel(quants, scales, out, blocks, GROUP: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    inside = (block < blocks)[:, None]
    column = tl.arange(0, 32)[None, :]
    scale = tl.load(scales + block * 17, mask=block < blocks).to(tl.float32)
    quant = tl.load(quants + block[:, None] * 34 + 2 + column, mask=inside).to(tl.float32)
    values = (quant * scale[:, None]).to(out.dtype.element_ty)
    tl.store(out + block[:, None] * 32 + column, values, mask=inside)


def dequantise_q8_0(data: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """GGML's Q8_0, bytes (N, K/32*34) -> (N, K): a block is an fp16 scale and 32 int8."""
    rows, columns = data.shape[0], data.shape[1] // 34 * _Q8_BLOCK
    if out is None:
        out = torch.empty(rows, columns, dtype=dtype, device=data.device)
    blocks, group = rows * columns // _Q8_BLOCK, 64
    with torch.cuda.device_of(data):
        _q8_0_kernel[(triton.cdiv(blocks, group),)](
            data.view(torch.int8), data.view(torch.float16), out, blocks, GROUP=group
        )
    return out


@triton.jit
def _q8_0_linear_kernel(
    x, quants, scales, bias, out, M, N,
    BLOCKS: tl.constexpr, HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(1).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    column = tl.arange(0, 32)
    total = tl.zeros((TOKENS, FEATURES), dtype=tl.float32)
    for block in range(0, BLOCKS):
        index = feature * BLOCKS + block
        scale = tl.load(scales + index * 17, mask=feature < N, other=0.0).to(tl.float32)
        quant = tl.load(
            quants + index[None, :] * 34 + 2 + column[:, None], mask=(feature < N)[None, :], other=0
        )  # (32, FEATURES)
        part = tl.load(
            x + (token[:, None] * BLOCKS + block) * 32 + column[None, :],
            mask=(token < M)[:, None],
            other=0.0,
        )  # (TOKENS, 32)
        weight = (quant.to(tl.float32) * scale[None, :]).to(part.dtype)
        total += tl.dot(part, weight, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + feature, mask=feature < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + token[:, None] * N + feature[None, :],
        total.to(out.dtype.element_ty),
        mask=(token < M)[:, None] & (feature < N)[None, :],
    )


def linear_q8_0(x: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) times Q8_0 bytes (N, K/32*34) without expanding them in memory, -> (M, N).

    For few tokens, where reading the weight is what takes the time. Raises ValueError for M > 128:
    expanding the matrix once is faster there.
    """
    (tokens, columns), features = x.shape, data.shape[0]
    if tokens > _FUSED_TOKENS:
        raise ValueError(
            f"the fused Q8_0 product takes {_FUSED_TOKENS} tokens at most, not {tokens}"
        )
    x, out = x.contiguous(), x.new_empty(tokens, features)
    size = (16, 64)
    grid = (triton.cdiv(tokens, size[0]), triton.cdiv(features, size[1]))
    with torch.cuda.device_of(x):
        _q8_0_linear_kernel[grid](
            x, data.view(torch.int8), data.view(torch.float16), x if bias is None else bias, out,
            tokens, features,
            BLOCKS=columns // _Q8_BLOCK, HAS_BIAS=bias is not None,
            TOKENS=size[0], FEATURES=size[1],
        )  # fmt: skip
    return out


@triton.jit
def _e4m3_kernel(data, scale, out, K, SCALE_STEP: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < K
    bits = tl.load(data + row * K + column, mask=inside, other=0).to(tl.int32)
    # Sign, exponent and fraction where fp32 has them; the exponent is then 120 short.
    bits = (bits << 20) & -2014314496  # 0x87F00000
    values = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    values = values * tl.load(scale + row * SCALE_STEP)
    tl.store(out + row * K + column, values.to(out.dtype.element_ty), mask=inside)


def dequantise_e4m3(
    data: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """e4m3 bytes uint8 (N, K) times fp32 scales () or (N, 1) -> (N, K). NaN codes give +-480."""
    rows, columns = data.shape
    if out is None:
        out = torch.empty(rows, columns, dtype=dtype, device=data.device)
    size = 1024
    with torch.cuda.device_of(data):
        _e4m3_kernel[(rows, triton.cdiv(columns, size))](
            data.view(torch.int8), scale, out, columns, SCALE_STEP=int(scale.numel() > 1), SIZE=size
        )
    return out


@triton.jit
def _ada_norm_kernel(
    x, shift, scale, out, L, C, eps, STEP: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < C
    values = tl.load(x + row * C + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / C
    centred = tl.where(inside, values - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / C + eps)
    modulation = row // L * STEP * C + column
    gain = 1.0 + tl.load(scale + modulation, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + modulation, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * C + column, (normed * gain + offset).to(out.dtype.element_ty), mask=inside)


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm without its own affine step, then `modulate`: x (B, L, C) by (B or 1, 1, C)."""
    batch, length, width = x.shape
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(x):
        _ada_norm_kernel[(batch * length,)](
            x, shift.contiguous(), scale.contiguous(), out, length, width, eps,
            STEP=int(shift.shape[0] > 1), WIDTH=triton.next_power_of_2(width),
        )  # fmt: skip
    return out


@triton.jit
def _rms_norm_kernel(x, scale, out, C, eps, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < C
    values = tl.load(x + row * C + column, mask=inside, other=0.0).to(tl.float32)
    normed = values * tl.rsqrt(tl.sum(values * values, axis=0) / C + eps)
    gain = tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * C + column, (normed * gain).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich 2019) of the last dimension, x (..., C) by (C)."""
    width = x.shape[-1]
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(x.numel() // width,)](
            x, scale, out, width, eps, WIDTH=triton.next_power_of_2(width)
        )
    return out


@triton.jit
def _rope_kernel(x, table, out, L, PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, WIDTH)
    inside = pair < PAIRS
    first = tl.load(x + (row * PAIRS + pair) * 2, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + (row * PAIRS + pair) * 2 + 1, mask=inside, other=0.0).to(tl.float32)
    turn = table + (row % L * PAIRS + pair) * 4  # (2, 2) row-major
    upper = tl.load(turn, mask=inside) * first + tl.load(turn + 1, mask=inside) * second
    lower = tl.load(turn + 2, mask=inside) * first + tl.load(turn + 3, mask=inside) * second
    tl.store(out + (row * PAIRS + pair) * 2, upper.to(out.dtype.element_ty), mask=inside)
    tl.store(out + (row * PAIRS + pair) * 2 + 1, lower.to(out.dtype.element_ty), mask=inside)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved channel pairs, (B, H, L, D) by fp32 (L, D/2, 2, 2) (Su et al. 2021)."""
    batch, heads, length, width = x.shape
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    pairs = width // 2
    with torch.cuda.device_of(x):
        _rope_kernel[(batch * heads * length,)](
            x, table.contiguous(), out, length, PAIRS=pairs, WIDTH=triton.next_power_of_2(pairs)
        )
    return out
