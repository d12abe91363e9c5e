"""Products in 8-bit integers: one scale per output row of the weight, one per token.

Shapes: M tokens, N output features, K input features. The sum over K is exact in int32.
"""

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .scratch import Scratch

_MAX_INT8 = 127
# Tokens quantised at a time: the fp32 intermediate stays in the processor's cache.
_CHUNK = 128
# Elements of the activations.
_WORTH_COMPILING = 2**20
# Output features and tokens of one product.
_PART_ROWS, _PART_TOKENS = 3072, 1024
# oneDNN's fast kernels multiply unsigned activations; with signed ones it falls back to a
# reference kernel that is four orders of magnitude slower.
_ZERO_POINT = 128
_CPU_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}
# cuBLAS asks for more than 16 tokens, and some versions compute wrongly with just over that.
_MIN_TOKENS = 32
_MULTIPLE = 8


def has_int8(device: torch.device) -> bool:
    """Whether int8 products are fast here: x86 with VNNI or AMX, NVIDIA from compute 7.5 on."""
    if device.type == "cpu":
        return _cpu_has_vnni() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(torch, "_int_mm"):
        return False
    return torch.cuda.get_device_capability(device) >= (7, 5) and _int_mm_runs(device)


@functools.cache
def _int_mm_runs(device: torch.device) -> bool:
    """Whether this build of torch has the kernel for this device, by trying."""
    a = torch.zeros(_MIN_TOKENS, _MIN_TOKENS, dtype=torch.int8, device=device)
    try:
        torch._int_mm(a, a.t())  # pyright: ignore[reportPrivateImportUsage]
    except RuntimeError:
        return False
    return True


@functools.cache
def _cpu_has_vnni() -> bool:
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    flags = Path("/proc/cpuinfo").read_text("ascii", "ignore").split()
    return not _CPU_FLAGS.isdisjoint(flags)


def quantise_tokens(
    x: Tensor, zero_point: int = 0, scratch: Scratch | None = None
) -> tuple[Tensor, Tensor]:
    """Nearest integers per token, (M, K) -> (M, K) int8 and bf16 scales (M, 1).

    x = scale * (integer - zero point). With zero point 128 the integers are uint8. The scale is
    absmax / 127 rounded to bf16, so that a product in bf16 can be scaled without a second error;
    that rounding is too small to carry an integer past 127 where scales are normal numbers. A
    token that is not finite gets a scale that is not finite. The integers are in `scratch`'s
    memory where it is given.
    """
    dtype = torch.uint8 if zero_point else torch.int8
    scratch = scratch or Scratch()
    out = scratch.take((len(x), x.shape[1]), dtype, x.device)
    largest = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)

    def find_largest() -> None:
        largest.copy_(_row_absmax(x))

    def by_parts() -> None:
        size = _CHUNK if x.device.type == "cpu" else len(x)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            values = x[part].to(torch.float32, copy=True).mul_(inverse[part]).round_()
            out[part].copy_(values.add_(zero_point))

    worth = x.numel() >= _WORTH_COMPILING
    if worth:
        scratch.fused.run(find_largest, _largest, (x,), (largest,))
    else:
        find_largest()
    scale = (largest / _MAX_INT8).bfloat16()
    # Not in the compiled function: GPUs' compilers take the reciprocal by approximation.
    inverse = torch.where(scale > 0, scale, 1.0).float().reciprocal_()
    if worth:
        scratch.fused.run(by_parts, _unsigned if zero_point else _signed, (x, inverse), (out,))
    else:
        by_parts()
    return out, scale


def _largest(x: Tensor, out: Tensor) -> None:
    out.copy_(x.float().abs().amax(-1, keepdim=True))


def _signed(x: Tensor, inverse: Tensor, out: Tensor) -> None:
    out.copy_((x.float() * inverse).round())


def _unsigned(x: Tensor, inverse: Tensor, out: Tensor) -> None:
    out.copy_((x.float() * inverse).round() + _ZERO_POINT)


def _row_absmax(x: Tensor) -> Tensor:
    """Largest magnitude per row, (R, K) -> (R, 1): floats without their sign order as integers."""
    integer, mask = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF)}[x.element_size()]
    return x.view(integer).bitwise_and(mask).amax(-1, keepdim=True).view(x.dtype)


@dataclass(frozen=True)
class PackedWeight:
    """An int8 weight in oneDNN's opaque layout, in parts of some rows; it stays on its CPU."""

    parts: tuple[Tensor, ...]
    shape: tuple[int, int]

    def unpacked(self) -> Tensor:
        """The weight, int8 (N, K)."""
        return torch.cat([part.to_dense().t() for part in self.parts])  # packed as (K, rows)

    def __deepcopy__(self, _: dict) -> "PackedWeight":
        return self  # its parts have no storage that could be copied, and never change


def prepack(weight: Tensor) -> PackedWeight:
    """The weight (N, K) int8 as a CPU's int8 instructions want it: once per layer."""
    parts = [torch.ops.onednn.qlinear_prepack(part, None) for part in _parts(weight)]
    return PackedWeight(tuple(parts), (weight.shape[0], weight.shape[1]))


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.contiguous().split(_PART_ROWS)


def takes_int8(shape: tuple[int, int]) -> bool:
    """Whether a weight (N, K) has the multiples of 8 that cuBLAS asks for."""
    return shape[0] % _MULTIPLE == 0 and shape[1] % _MULTIPLE == 0


def linear_int8(
    x: Tensor,
    weight: Tensor | PackedWeight,
    scale: Tensor,
    bias: Tensor | None,
    scratch: Scratch | None = None,
) -> Tensor:
    """x (..., K) times weight int8 (N, K), packed on CPUs, scale fp32 () or (N, 1), -> (..., N).

    For devices with `has_int8` and weights with `takes_int8`. Tokens are quantised one by one.
    Not differentiable: x must not need a gradient.
    """
    tokens = x.reshape(-1, x.shape[-1])
    if tokens.numel() == 0:
        return x.new_zeros(*x.shape[:-1], weight.shape[0])
    if isinstance(weight, PackedWeight):
        y = _onednn(tokens, weight, scale, bias, scratch)
    else:
        y = _int_mm(tokens, weight, scale, bias, scratch)
    return y.view(*x.shape[:-1], y.shape[-1])


@torch.compiler.disable()
def _onednn(
    x: Tensor, packed: PackedWeight, scale: Tensor, bias: Tensor | None, scratch: Scratch | None
) -> Tensor:
    """Some tokens by some output features at a time, whose sums are scaled in the cache."""
    # fp16 could overflow before the token's scale is applied
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    scales = _parts(scale.expand(packed.shape[0], 1).flatten())
    biases = [None] * len(scales) if bias is None else _parts(bias.to(dtype))
    out = x.new_empty(len(x), packed.shape[0], dtype=dtype)
    for tokens, rows in zip(x.split(_PART_TOKENS), out.split(_PART_TOKENS), strict=True):
        integers, token_scale = quantise_tokens(tokens, _ZERO_POINT, scratch)
        places = rows.split(_PART_ROWS, dim=1)
        for i, weight in enumerate(packed.parts):
            sums = _sums(integers, weight, scales[i], dtype)
            _scale_tokens(sums, token_scale, biases[i], places[i])
    return out.to(x.dtype)


def _sums(integers: Tensor, weight: Tensor, row_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The integer product, scaled by the weight's rows."""
    return torch.ops.onednn.qlinear_pointwise(
        integers, 1.0, _ZERO_POINT,
        weight, row_scales, torch.zeros(len(row_scales), dtype=torch.int32),
        None, 1.0, 0, dtype, "none", [], "",
    )  # fmt: skip


def _int_mm(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, scratch: Scratch | None
) -> Tensor:
    """torch's int8 product, of a number of tokens that cuBLAS likes."""
    integers, token_scale = quantise_tokens(x, scratch=scratch)
    missing = max(_MIN_TOKENS - len(x), -len(x) % _MULTIPLE)
    if missing:
        integers = F.pad(integers, (0, 0, 0, missing))
    product = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
    sums = product(integers, weight.t())[: len(x)]
    y = sums.float().mul_(scale.expand(weight.shape[0], 1).flatten())
    bias = None if bias is None else bias.float()
    return _scale_tokens(y, token_scale, bias, y).to(x.dtype)


def _scale_tokens(y: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """scale * y + bias into `out`; the scales are exact in bf16."""
    scale = scale.to(y.dtype)
    if bias is None:
        return torch.mul(y, scale, out=out)
    return torch.addcmul(bias, y, scale, out=out)
