"""A matrix in the bytes it is stored in, and what these stand for.

Shapes: N rows (output features), K columns (input features), R some of the rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rows decoded at a time: the fp32 intermediate stays in the processor's cache.
CHUNK = 256

# (data of R rows, their scales (R, 1) fp32 or None) -> their values, (R, K) fp32
Decode = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Format:
    """One way to store a matrix row by row.

    `dtype` is that of the stored elements; every `block` columns take `block_bytes` bytes.
    """

    name: str
    dtype: torch.dtype
    decode: Decode
    block: int = 1
    block_bytes: int = 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row. Raises ValueError where the columns do not fill whole blocks."""
        if columns % self.block:
            raise ValueError(
                f"{columns} columns do not fill blocks of {self.block}, which {self.name} needs"
            )
        return columns // self.block * self.block_bytes


@dataclass(frozen=True)
class QuantTensor:
    """A stored matrix: `data` (N, row bytes / element size), `scale` fp32 () or (N, 1) or None.

    For products in 8 bits: `eight_bit` asks for them; `input_scale` is the file's scale of the
    activations, where it has one; `full_precision` says that the file's maker wants this matrix
    multiplied in 16 or 32 bits.
    """

    format: Format
    data: Tensor
    scale: Tensor | None
    shape: tuple[int, int]
    input_scale: float | None = None
    full_precision: bool = False
    eight_bit: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def to(self, device: torch.device | str) -> "QuantTensor":
        """The same bytes on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, data=self.data.to(device), scale=scale)

    def rows(self, index: slice | Tensor) -> Tensor:
        """The values of some rows, (R, K) fp32."""
        scale = self.scale
        if scale is not None and scale.ndim:
            scale = scale[index]
        return self.format.decode(self.data[index], scale)

    def dequantise(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """All values, (N, K), rounded once from fp32 to `dtype`; into `out` where it is given."""
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.data.device)
        for start in range(0, self.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            out[part].copy_(self.rows(part))
        return out


def concatenate(parts: Sequence[QuantTensor]) -> QuantTensor:
    """Matrices of one format and width below each other, as the fused q, k, v are stored.

    Raises ValueError if formats or widths differ.
    """
    first = parts[0]
    if any(p.format is not first.format or p.shape[1] != first.shape[1] for p in parts):
        raise ValueError("the parts of a fused matrix differ in format or width")
    scale = None
    if first.scale is not None:
        scale = torch.cat([_row_scales(part) for part in parts])
    rows = sum(part.shape[0] for part in parts)
    data = torch.cat([part.data for part in parts])
    return QuantTensor(first.format, data, scale, (rows, first.shape[1]))


def _row_scales(part: QuantTensor) -> Tensor:
    if part.scale is None:
        raise ValueError("the parts of a fused matrix differ in having a scale")
    return part.scale.expand(part.shape[0], 1)
