"""Look for NaN and infinity without a second copy of what is looked at."""

import torch
from torch import Tensor

from .floats import E4M3, E5M2
from .tensor import CHUNK, QuantTensor


def all_finite(weight: Tensor | QuantTensor) -> bool:
    """Whether every value is a finite number."""
    if isinstance(weight, Tensor):
        # The extremes instead of a mask as large as the tensor: NaN becomes both of them.
        return bool(torch.isfinite(torch.stack(weight.aminmax())).all())
    return all(
        _rows_finite(weight, slice(start, start + CHUNK))
        for start in range(0, weight.shape[0], CHUNK)
    )


def _rows_finite(weight: QuantTensor, part: slice) -> bool:
    if weight.format in (E4M3, E5M2):
        # Without the sign, NaN is e4m3's largest code; e5m2's infinity is 0x7C, NaN is above.
        largest = int((weight.data[part] & 0x7F).max())
        return largest < (0x7F if weight.format is E4M3 else 0x7C)
    return bool(torch.isfinite(torch.stack(weight.rows(part).aminmax())).all())
