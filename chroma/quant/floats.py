"""8-bit floats and integers with a scale in fp32: values = stored number times scale.

Formats: OCP 8-bit floating point (Micikevicius et al. 2022, arXiv:2209.05433).
"""

import torch
from torch import Tensor

from .tensor import Format

# Where the stored exponent and fraction land among fp32's bits, and the power of two by which the
# exponent is then short: fp32's bias 127 minus the format's own.
_E4M3 = (20, 0x87F00000 - (1 << 32), 2.0**120)
_E5M2 = (21, 0x8FE00000 - (1 << 32), 2.0**112)


def _decode_fp8(data: Tensor, scale: Tensor | None, layout: tuple[int, int, float]) -> Tensor:
    """Exact fp32 values of fp8 bytes, by moving bits: a cast is several times slower on CPUs.

    The codes that mean NaN or infinity are not looked at; files are checked for them when read.
    """
    shift, mask, power = layout
    bits = data.view(torch.int8).to(torch.int32)
    values = bits.bitwise_left_shift_(shift).bitwise_and_(mask).view(torch.float32)
    # First the power, which is exact, and then the scale: their product may not be a finite number.
    values = values.mul_(power)
    return values if scale is None else values.mul_(scale)


def decode_e4m3(data: Tensor, scale: Tensor | None) -> Tensor:
    return _decode_fp8(data, scale, _E4M3)


def decode_e5m2(data: Tensor, scale: Tensor | None) -> Tensor:
    return _decode_fp8(data, scale, _E5M2)


def decode_int8(data: Tensor, scale: Tensor | None) -> Tensor:
    values = data.to(torch.float32)
    return values if scale is None else values.mul_(scale)


# Held as plain bytes, so that casting a whole module to bf16 leaves them alone.
E4M3 = Format("float8_e4m3fn", torch.uint8, decode_e4m3)
E5M2 = Format("float8_e5m2", torch.uint8, decode_e5m2)
INT8 = Format("int8_tensorwise", torch.int8, decode_int8)
