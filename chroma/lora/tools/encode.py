"""Values back into the format that a tensor is stored in, each to the nearest.

Scales stay what they are: then what a LoRA leaves alone keeps its bytes. Only where the values
have outgrown a scale does it grow with them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoint.reader import TensorInfo
from ...checkpoint.source import DTYPES
from ...errors import LoraError
from ...quant.floats import E4M3, E5M2, INT8
from ...quant.gguf_encode import ENCODABLE, encode
from ...quant.gguf_formats import GGUF_FORMATS
from ...quant.tensor import CHUNK

# safetensors' dtypes of codes: the format, the largest code, half the step to it, torch's dtype.
_CODES = {
    "F8_E4M3": (E4M3, 448.0, 16.0, torch.float8_e4m3fn),
    "F8_E5M2": (E5M2, 57344.0, 4096.0, torch.float8_e5m2),
    "I8": (INT8, 127.0, 0.5, torch.int8),
}


class Stored(NamedTuple):
    """What is written for a tensor, its scale where it has one, and the values of both, fp32."""

    data: Tensor
    scale: Tensor | None
    values: Tensor


def check_encodable(name: str, info: TensorInfo) -> None:
    """Raise LoraError where `encode_as` cannot write the format."""
    if info.dtype not in (*DTYPES, *_CODES, *ENCODABLE):
        raise LoraError(
            f"{name} is stored as {info.dtype}, which cannot be written here; merge into bf16 "
            "(to: bf16), or choose a base in Q8_0, fp8 or bf16"
        )


def encode_as(name: str, values: Tensor, info: TensorInfo, scale: Tensor | None) -> Stored:
    """Values, fp32, in the format of `info`; `scale` is the stored one: one number, or (N, 1).

    Raises LoraError for values beyond the format's range.
    """
    if info.dtype in DTYPES:
        factor = 1.0 if scale is None else scale.float()
        data = (values / factor).to(DTYPES[info.dtype])
        if not bool(torch.isfinite(torch.stack(data.aminmax())).all()):
            raise LoraError(f"{name}: a merged value is too large for {info.dtype}; choose bf16")
        return Stored(data, scale, data.float() * factor)
    if info.dtype in _CODES:
        return _as_codes(name, values, info.dtype, scale)
    data = torch.cat([encode(info.dtype, part) for part in values.split(CHUNK)])
    form = GGUF_FORMATS[info.dtype]
    decoded = [form.decode(part, None) for part in data.split(CHUNK)]
    return Stored(data, None, torch.cat(decoded))


def _as_codes(name: str, values: Tensor, dtype: str, scale: Tensor | None) -> Stored:
    form, most, half_step, torch_dtype = _CODES[dtype]
    if scale is not None:
        scale = _grown(scale, values, most, half_step)
    factor = 1.0 if scale is None else scale.float().reshape(-1, *[1] * (values.ndim - 1))
    codes = values / factor
    if scale is None and float(codes.abs().max()) > most + half_step:
        raise LoraError(f"{name}: a merged value is beyond {dtype}'s {most:g}; choose bf16")
    codes = codes.clamp_(-most, most)
    data = codes.round_().to(torch.int8) if dtype == "I8" else codes.to(torch_dtype)
    held = data.view(form.dtype)
    return Stored(data, scale, form.decode(held, None) * factor)


def _grown(scale: Tensor, values: Tensor, most: float, half_step: float) -> Tensor:
    """The scale, in its shape and dtype, or the one at which the largest value fits.

    What lies within half a step above the largest code has that for its nearest.
    """
    whole = values.abs().amax() if scale.numel() == 1 else values.abs().amax(1)
    top, old = whole.reshape(scale.shape), scale.float()
    return torch.where(top > (most + half_step) * old, top / most, old).to(scale.dtype)


def share_kept(pairs: Mapping[str, tuple[float, float]]) -> float:
    """Of the wanted changes, what the stored ones hold: <stored, wanted> / <wanted, wanted>."""
    wanted = sum(power for _, power in pairs.values())
    return sum(product for product, _ in pairs.values()) / wanted if wanted else 1.0
