"""Between latent pictures and token sequences.

Shapes: B batch, C latent channels, h and w latent height and width, L image tokens, T text tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import PATCH


def pad_to_patch(latent: Tensor) -> Tensor:
    """Continue an odd latent by one row or column, wrapping around, as ComfyUI does."""
    h, w = latent.shape[-2:]
    return F.pad(latent, (0, -w % PATCH, 0, -h % PATCH), mode="circular")


def pack(latent: Tensor) -> Tensor:
    """2x2 patches to tokens, (B, C, h, w) -> (B, h/2 * w/2, 4C), channel-major within a token."""
    x = latent.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (B, C, h/2, 2, w/2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack` for an even latent of h by w."""
    x = tokens.unflatten(1, (h // PATCH, w // PATCH)).unflatten(3, (-1, PATCH, PATCH))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # (B, C, h, w)


def position_ids(text_tokens: int, h: int, w: int, device: torch.device) -> Tensor:
    """Positions of text (all zero), then of the patches (0, row, column): (T + L, 3), fp32.

    fp32 because bf16 counts exactly to 256 only, which is 4096 pixels.
    """
    rows = torch.arange(h // PATCH, dtype=torch.float32, device=device)
    columns = torch.arange(w // PATCH, dtype=torch.float32, device=device)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return F.pad(grid, (1, 0, text_tokens, 0))


def text_mask(lengths: Tensor, text_tokens: int, image_tokens: int, dtype: torch.dtype) -> Tensor:
    """Additive key mask that hides row i's text beyond lengths[i]: (B, 1, 1, T + L).

    Additive and of the queries' dtype: some attention backends read a bool mask as numbers.
    """
    position = torch.arange(text_tokens, device=lengths.device)
    hidden = F.pad(position >= lengths[:, None], (0, image_tokens))
    mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill(hidden, torch.finfo(dtype).min)[:, None, None]
