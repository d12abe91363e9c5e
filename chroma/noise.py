"""Starting noise as ComfyUI makes it, so that a seed means the same picture everywhere."""

import torch
from torch import Tensor

from ..samplers.noise import RowSeeds
from .errors import SamplingError

MAX_SEED = 2**64 - 1


def make_noise(shape: tuple[int, ...] | torch.Size, seed: int) -> Tensor:
    """Normal noise (B, 16, h, w), fp32, drawn on the CPU in one go for the whole batch.

    With RowSeeds each row is what its own seed draws for a single picture. Raises SamplingError for
    a seed outside 0 .. 2**64 - 1, or fewer seeds than rows.
    """
    if isinstance(seed, RowSeeds):
        return torch.cat([make_noise((1, *shape[1:]), row) for row in seed.take(shape[0])])
    if not 0 <= seed <= MAX_SEED:
        raise SamplingError(f"seed {seed} is out of range; expected 0 to {MAX_SEED}")
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
