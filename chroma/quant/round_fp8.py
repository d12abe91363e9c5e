"""A matrix to 8-bit floats with one scale, each value to the nearest code.

Format: OCP 8-bit floating point (Micikevicius et al. 2022, arXiv:2209.05433), e4m3.
"""

import torch
from torch import Tensor

from ..errors import ChromaError
from .tensor import CHUNK

MAX_E4M3 = 448.0
_TINY = torch.finfo(torch.float32).tiny


def largest(weight: Tensor) -> Tensor:
    """The largest magnitude, fp32 (), without a copy of the matrix.

    Raises ChromaError for NaN or infinity, which every comparison here would hide.
    """
    found = torch.stack(weight.aminmax()).float().abs().max()
    if not bool(torch.isfinite(found)):
        raise ChromaError(
            "the matrix holds NaN or infinity; the file is damaged, download it again"
        )
    return found


def to_e4m3(values: Tensor) -> Tensor:
    """Bytes of the nearest e4m3 codes, ties to even, saturating; fp32 -> uint8, same shape."""
    return values.clamp(-MAX_E4M3, MAX_E4M3).to(torch.float8_e4m3fn).view(torch.uint8)


def fp8_scale(weight: Tensor) -> Tensor:
    """The scale at which the largest magnitude becomes the largest code: absmax / 448, fp32 ().

    A matrix of zeros gets 1. Raises ChromaError for NaN or infinity.
    """
    top = largest(weight)
    return torch.where(top > 0, (top / MAX_E4M3).clamp(min=_TINY), torch.ones_like(top))


def quantise_fp8(weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A float matrix (N, K) to its e4m3 bytes, uint8 (N, K), and the scale, fp32 ().

    The scale is `fp8_scale` unless given. Raises ChromaError for NaN or infinity.
    """
    scale = fp8_scale(weight) if scale is None else scale
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, weight.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        codes[part] = to_e4m3(weight[part].float() / scale)
    return codes, scale
