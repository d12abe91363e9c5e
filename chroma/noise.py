"""Starting noise as ComfyUI makes it, so that a seed means the same picture everywhere."""

import torch
from torch import Tensor

from .errors import SamplingError

MAX_SEED = 2**64 - 1


def make_noise(shape: tuple[int, ...] | torch.Size, seed: int) -> Tensor:
    """Normal noise (B, 16, h, w), fp32, drawn on the CPU in one go for the whole batch.

    Raises SamplingError for a seed outside 0 .. 2**64 - 1.
    """
    if not 0 <= seed <= MAX_SEED:
        raise SamplingError(f"seed {seed} is out of range; expected 0 to {MAX_SEED}")
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
