"""Stored matrices to floats: compiled into one pass over memory, or in a few."""

import torch
from torch import Tensor

from .floats import E4M3, E5M2, INT8, decode_e4m3, decode_e5m2, decode_int8
from .fused import Function, Fused
from .gguf_blocks import decode_q8_0
from .gguf_formats import GGUF_FORMATS
from .tensor import Format, QuantTensor

# Elements of a matrix: what is smaller is quick anyway.
_WORTH_COMPILING = 2**20


# One function for each format: the compiler keeps a limited number of variants of each.
def _q8_0(data: Tensor, scale: Tensor | None, out: Tensor) -> None:
    out.copy_(decode_q8_0(data, scale))


def _int8(data: Tensor, scale: Tensor | None, out: Tensor) -> None:
    out.copy_(decode_int8(data, scale))


def _e4m3(data: Tensor, scale: Tensor | None, out: Tensor) -> None:
    out.copy_(decode_e4m3(data, scale))


def _e5m2(data: Tensor, scale: Tensor | None, out: Tensor) -> None:
    out.copy_(decode_e5m2(data, scale))


def _e4m3_cast(data: Tensor, scale: Tensor | None, out: Tensor) -> None:
    out.copy_(decode_int8(data, scale))


def _e5m2_cast(data: Tensor, scale: Tensor | None, out: Tensor) -> None:
    out.copy_(decode_int8(data, scale))


_Q8_0 = GGUF_FORMATS["Q8_0"]
# The formats of which the compiled form was measured to be faster, and the dtype it reads. On CPUs
# the compiler makes vector instructions of a cast from 8-bit floats, but not of moved bits.
_FUNCTIONS: dict[str, dict[Format, tuple[Function, torch.dtype]]] = {
    "cpu": {
        _Q8_0: (_q8_0, torch.uint8),
        INT8: (_int8, torch.int8),
        E4M3: (_e4m3_cast, torch.float8_e4m3fn),
        E5M2: (_e5m2_cast, torch.float8_e5m2),
    },
    "cuda": {
        _Q8_0: (_q8_0, torch.uint8),
        INT8: (_int8, torch.int8),
        E4M3: (_e4m3, torch.uint8),
        E5M2: (_e5m2, torch.uint8),
    },
}


def expand(weight: QuantTensor, out: Tensor, fused: Fused) -> None:
    """All values of `weight` into `out` (N, K), rounded once from fp32 to its dtype."""
    function, dtype = _FUNCTIONS.get(out.device.type, {}).get(weight.format, (None, None))
    if function is None or dtype is None or weight.numel() < _WORTH_COMPILING:
        weight.dequantise(out.dtype, out)
        return
    data, blocks = weight.data.view(dtype), out
    if weight.scale is None or weight.scale.ndim == 0:
        # One block to a row, so that one program fits every width.
        data, blocks = data.flatten(), out.flatten()
        if weight.format.block > 1:
            data = data.unflatten(0, (-1, weight.format.block_bytes))
            blocks = blocks.unflatten(0, (-1, weight.format.block))
    fused.run(lambda: weight.dequantise(out.dtype, out), function, (data, weight.scale), (blocks,))
