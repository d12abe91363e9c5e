"""Products in 8-bit integers: one scale per output row of the weight, one per token.

Shapes: M tokens, N output features, K input features. The sum over K is exact in int32.
"""

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

# Tokens quantised at a time: the fp32 intermediate stays in the processor's cache.
_CHUNK = 128
# oneDNN's fast kernels multiply unsigned activations; with signed ones it falls back to a
# reference kernel that is four orders of magnitude slower.
_ZERO_POINT = 128
_CPU_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}
_INT_MM_MIN_TOKENS = 17


def has_int8(device: torch.device) -> bool:
    """Whether int8 products are fast here: x86 with VNNI or AMX, NVIDIA from compute 7.5 on."""
    if device.type == "cpu":
        return _cpu_has_vnni() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(torch, "_int_mm"):
        return False
    return torch.cuda.get_device_capability(device) >= (7, 5)


@functools.cache
def _cpu_has_vnni() -> bool:
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    flags = Path("/proc/cpuinfo").read_text("ascii", "ignore").split()
    return not _CPU_FLAGS.isdisjoint(flags)


def quantise_tokens(x: Tensor, zero_point: int = 0) -> tuple[Tensor, Tensor]:
    """Nearest integers per token, (M, K) -> (M, K) int8 and fp32 scales (M, 1).

    x = scale * (integer - zero point). With zero point 128 the integers are uint8. The scale is
    absmax / 127 rounded to bf16, so that a product in bf16 can be scaled without a second error;
    that rounding is too small to carry an integer past 127. A token that is not finite gets a
    scale that is not finite.
    """
    scale = (_row_absmax(x).float() / 127).bfloat16().float()
    inverse = torch.where(scale > 0, scale, 1.0).reciprocal_()
    out = torch.empty(x.shape, dtype=torch.uint8 if zero_point else torch.int8, device=x.device)
    for start in range(0, len(x), _CHUNK):
        part = slice(start, start + _CHUNK)
        values = x[part].to(torch.float32, copy=True).mul_(inverse[part])
        # Cut off to integers by the copy: above zero that is half a step from rounding.
        out[part].copy_(values.add_(zero_point + 0.5) if zero_point else values.round_())
    return out, scale


def _row_absmax(x: Tensor) -> Tensor:
    """Largest magnitude per row, (R, K) -> (R, 1): floats without their sign order as integers."""
    integer, mask = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF)}[x.element_size()]
    return x.view(integer).bitwise_and(mask).amax(-1, keepdim=True).view(x.dtype)


def prepack(weight: Tensor) -> Tensor:
    """The weight (N, K) int8 as `linear_int8` wants it here: once per layer, not per product.

    On CPUs with int8 instructions oneDNN's opaque layout (int8, `is_mkldnn`), which neither moves
    to another device nor is saved; elsewhere the weight itself.
    """
    if weight.device.type == "cpu" and has_int8(weight.device):
        return torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return weight


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times weight int8 (N, K), as stored or from `prepack`, scale fp32 () or (N, 1).

    Tokens are quantised one by one. Where there is no fast int8 product, or x needs a gradient,
    the weight is de-quantised and x is not quantised.
    """
    tokens = x.reshape(-1, x.shape[-1])
    differentiable = torch.is_grad_enabled() and x.requires_grad
    if differentiable or tokens.numel() == 0:
        y = _dequantised(tokens, weight, scale, bias)
    elif weight.is_mkldnn:
        y = _onednn(tokens, weight, scale, bias)
    elif has_int8(x.device) and x.device.type != "cpu" and _int_mm_takes(weight):
        y = _int_mm(tokens, weight, scale, bias)
    else:
        y = _dequantised(tokens, weight, scale, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _dequantised(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if weight.is_mkldnn:
        weight = weight.to_dense().t()  # packed as (K, N)
    return F.linear(x, weight.float().mul_(scale).to(x.dtype), bias)


def _onednn(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    integers, token_scale = quantise_tokens(x, _ZERO_POINT)
    features = packed.shape[1]
    row_scales = scale.expand(features, 1).contiguous().view(-1)
    # fp16 could overflow before the token's scale is applied
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    y = torch.ops.onednn.qlinear_pointwise(
        integers, 1.0, _ZERO_POINT,
        packed, row_scales, torch.zeros(features, dtype=torch.int32),
        None, 1.0, 0, dtype, "none", [], "",
    )  # fmt: skip
    return _scale_tokens(y, token_scale, bias, x.dtype)


def _int_mm_takes(weight: Tensor) -> bool:
    return weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0


def _int_mm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """cuBLAS's int8 product, which asks for more than 16 tokens."""
    integers, token_scale = quantise_tokens(x)
    missing = _INT_MM_MIN_TOKENS - len(x)
    if missing > 0:
        integers = F.pad(integers, (0, 0, 0, missing))
    product = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
    sums = product(integers, weight.t())[: len(x)]
    y = sums.float().mul_(scale.expand(weight.shape[0], 1).flatten())
    return _scale_tokens(y, token_scale, bias, x.dtype)


def _scale_tokens(y: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale * y + bias; the scales are exact in bf16."""
    scale = scale.to(y.dtype)
    y = y.mul_(scale) if bias is None else torch.addcmul(bias.to(y.dtype), y, scale)
    return y.to(dtype)
