"""A matrix to 8-bit integers with a scale for each row, each value to the nearest."""

import torch
from torch import Tensor

from .round_fp8 import largest
from .tensor import CHUNK

_MAX_INT8 = 127
_TINY = torch.finfo(torch.float32).tiny


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float matrix (N, K) to int8 (N, K), ties to even, and scales fp32 (N, 1): absmax / 127.

    A row of zeros gets the scale 1. Raises ChromaError for NaN or infinity.
    """
    largest(weight)
    rows = weight.shape[0]
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=weight.device)
    for start in range(0, rows, CHUNK):
        part = slice(start, start + CHUNK)
        values = weight[part].float()
        top = values.abs().amax(1, keepdim=True)
        scales[part] = torch.where(top > 0, (top / _MAX_INT8).clamp(min=_TINY), 1.0)
        codes[part] = (values / scales[part]).round_().clamp_(-_MAX_INT8, _MAX_INT8)
    return codes, scales
