"""Memory and compiled functions that the layers of one model share."""

import torch
from torch import Tensor

from .expand import expand
from .fused import Fused
from .tensor import QuantTensor


class Scratch:
    """Room for one matrix per device and dtype, used again by every layer of a model.

    What is in it lives only until the product that follows, so one thread and one stream at a time
    may use it. Fresh pages cost more than filling them on CPUs. `fused` holds compiled functions.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.fused = Fused()

    def expand(self, weight: QuantTensor, dtype: torch.dtype) -> Tensor:
        """The values of `weight` in memory from here, (N, K), rounded once from fp32 to `dtype`."""
        out = self.take(weight.shape, dtype, weight.data.device)
        expand(weight, out, self.fused)
        return out

    def take(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised (N, K) tensor that overlaps every other one taken from here."""
        size = shape[0] * shape[1]
        buffer = self._buffers.get((device, dtype))
        if buffer is None or buffer.numel() < size:
            self._buffers.pop((device, dtype), None)  # freed before the larger one is asked for
            with torch.inference_mode(False):  # or a backward pass could not use it later
                buffer = torch.empty(size, dtype=dtype, device=device)
            self._buffers[device, dtype] = buffer
        return buffer[:size].view(shape)

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers.clear()
