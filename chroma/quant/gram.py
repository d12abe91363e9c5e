"""How the inputs of a linear layer vary together: H = X^T X / n, from n inputs X (n, K).

The squared change of the layer's output that an error E (N, K) of its weight makes is, summed over
outputs and averaged over inputs, tr(E H E^T).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ChromaError


@dataclass(frozen=True)
class Gram:
    """H of one layer: the matrix itself, or the inputs that it follows from.

    Where K is large, a few thousand inputs take less room than K x K numbers.
    """

    data: Tensor
    is_inputs: bool

    @classmethod
    def of(cls, data: Tensor, columns: int) -> "Gram":
        """From H (K, K), or from inputs (n, K); a symmetric square is taken for H.

        Raises ChromaError unless the width is `columns` and all values are finite.
        """
        if data.ndim != 2 or data.shape[1] != columns or not data.is_floating_point():
            raise ChromaError(
                f"calibration data of shape {tuple(data.shape)}, expected H ({columns}, {columns}) "
                f"or inputs (n, {columns}) as floats"
            )
        if not bool(torch.isfinite(torch.stack(data.aminmax())).all()):
            raise ChromaError("calibration data holds NaN or infinity; collect it again in fp32")
        return cls(data, is_inputs=not _is_symmetric(data))

    def to(self, device: torch.device | str) -> "Gram":
        """The same on another device, in fp32."""
        return Gram(self.data.to(device=device, dtype=torch.float32), self.is_inputs)

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The part of H at some rows and columns, given by their numbers."""
        if self.is_inputs:
            return self.data[:, rows].T @ self.data[:, columns] / len(self.data)
        return self.data[rows[:, None], columns]

    def diagonal(self) -> Tensor:
        """Mean square of each input, (K,)."""
        return self.data.square().mean(0) if self.is_inputs else self.data.diagonal()

    def output_error(self, error: Tensor) -> Tensor:
        """Mean squared change of each output, (R,), for an error (R, K) of the weight's rows."""
        if self.is_inputs:
            return (error @ self.data.T).square().sum(1) / len(self.data)
        return ((error @ self.data) * error).sum(1)


def _is_symmetric(data: Tensor) -> bool:
    """Whether this is H: a product of matrices is symmetric but for its rounding."""
    if data.shape[0] != data.shape[1]:
        return False
    difference = (data - data.T).abs().max()
    return bool(difference <= 1e-2 * data.diagonal().abs().max())
