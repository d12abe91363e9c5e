"""Look for NaN and infinity without a second copy of what is looked at."""

import torch
from torch import Tensor

from .floats import E4M3, E5M2
from .tensor import CHUNK, Format, QuantTensor

# Without the sign, NaN is e4m3's largest code; e5m2's infinity is 0x7C, and NaN lies above.
_FIRST_BAD = {E4M3.name: 0x7F, E5M2.name: 0x7C}


def all_finite(weight: Tensor | QuantTensor) -> bool:
    """Whether every value is a finite number."""
    if isinstance(weight, Tensor):
        # The extremes instead of a mask as large as the tensor: NaN becomes both of them.
        return bool(torch.isfinite(torch.stack(weight.aminmax())).all())
    if weight.format.name in _FIRST_BAD:
        return codes_finite(weight.format, weight.data)
    return all(
        bool(torch.isfinite(torch.stack(weight.rows(slice(i, i + CHUNK)).aminmax())).all())
        for i in range(0, weight.shape[0], CHUNK)
    )


def codes_finite(stored: Format, data: Tensor) -> bool:
    """Whether no byte is fp8's code of NaN or infinity, which the decoders do not look at."""
    bad = _FIRST_BAD.get(stored.name)
    return bad is None or all(int((part & 0x7F).max()) < bad for part in data.split(CHUNK))
