"""The approximator: Chroma's replacement for the modulation layers of Flux.

It depends on sigma alone (guidance is always 0), so one run serves cond, uncond and the batch.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ChromaConfig
from .ops import RMSNorm, sinusoid


class Modulation(NamedTuple):
    """Shift, scale and gate of one site, each (S, 1, C) for S sigmas."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class _Layer(nn.Module):
    def __init__(self, width: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.in_layer = ops.Linear(width, width, **kw)
        self.out_layer = ops.Linear(width, width, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Approximator(nn.Module):
    """A residual MLP, (S, M, in) -> (S, M, C): one row per modulation vector."""

    def __init__(self, config: ChromaConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        width, depth = config.approximator_hidden, config.approximator_depth
        self.in_proj = ops.Linear(config.approximator_in, width, **kw)
        self.layers = nn.ModuleList([_Layer(width, ops, **kw) for _ in range(depth)])
        self.norms = nn.ModuleList([RMSNorm(width, **kw) for _ in range(depth)])
        self.out_proj = ops.Linear(width, config.hidden, **kw)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.out_proj(x)


def approximator_input(
    sigma: Tensor, guidance: Tensor | None, modulations: int, width: int
) -> Tensor:
    """Embeddings of sigma, guidance and row index, (S,) -> (S, M, width), fp32.

    The quarters and the half of the width are Chroma's (lodestone-rock/flow): 16 + 16 + 32.
    """
    if guidance is None:
        guidance = torch.zeros_like(sigma)
    time = sinusoid(sigma, width // 4)
    strength = sinusoid(guidance, width // 4)
    index = sinusoid(torch.arange(modulations, device=sigma.device), width // 2)
    shared = torch.cat([time, strength], dim=-1)[:, None].expand(-1, modulations, -1)
    return torch.cat([shared, index[None].expand(len(sigma), -1, -1)], dim=-1)


class ModulationTable:
    """All modulation vectors of one forward pass, (S, M, C), handed out site by site.

    Row order: single blocks, then the image sides of the double blocks, then their text sides,
    then the final layer's shift and scale.
    """

    def __init__(self, vectors: Tensor, double_depth: int, single_depth: int) -> None:
        self.vectors = vectors
        self._img_start = 3 * single_depth
        self._txt_start = self._img_start + 6 * double_depth

    def _site(self, row: int) -> Modulation:
        return Modulation(*(self.vectors[:, row + k, None] for k in range(3)))

    def single(self, block: int) -> Modulation:
        return self._site(3 * block)

    def double(self, block: int) -> Iterator[tuple[Modulation, Modulation]]:
        """(attention, MLP) of the image side, then of the text side."""
        for start in (self._img_start, self._txt_start):
            yield self._site(start + 6 * block), self._site(start + 6 * block + 3)

    def final(self) -> tuple[Tensor, Tensor]:
        """Shift and scale of the final layer."""
        return self.vectors[:, -2, None], self.vectors[:, -1, None]
