"""Decode large latents in overlapping tiles: memory follows the tile and not the picture."""

import torch
from torch import Tensor

from .autoencoder import SPATIAL_FACTOR, Autoencoder
from .errors import ImageError


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover `length` and the last one ends with it."""
    if length <= tile:
        return [0]
    starts = list(range(0, length - tile, tile - overlap))
    return [*starts, length - tile]


def _ramp(length: int, overlap: int) -> Tensor:
    """Weights of one tile along one side: rising and falling linearly over the overlap."""
    index = torch.arange(length, dtype=torch.float32)
    nearest_edge = torch.minimum(index, length - 1 - index) + 1
    return (nearest_edge / (overlap + 1)).clamp(max=1.0)


@torch.no_grad()
def decode_tiled(
    autoencoder: Autoencoder, latent: Tensor, tile: int = 64, overlap: int = 16
) -> Tensor:
    """Latent (B, 16, h, w) -> picture (B, 3, 8h, 8w) on the CPU, fp32; sizes in latent pixels.

    An approximation: the normalisation and attention of each tile see that tile alone, which the
    overlap blends. A latent no larger than one tile is decoded exactly. Raises ImageError unless
    tile >= 8 and 0 <= overlap <= tile / 2.
    """
    if tile < 8 or not 0 <= overlap <= tile // 2:
        raise ImageError(
            f"tiles of {tile} with an overlap of {overlap} are not usable; expected at least 8, "
            "and an overlap of at most half of that"
        )
    b, _, h, w = latent.shape
    if max(h, w) <= tile:
        return autoencoder.decode(latent).float().cpu()
    picture = torch.zeros(b, 3, h * SPATIAL_FACTOR, w * SPATIAL_FACTOR)
    total = torch.zeros(h * SPATIAL_FACTOR, w * SPATIAL_FACTOR)
    for y in _starts(h, tile, overlap):
        for x in _starts(w, tile, overlap):
            part = autoencoder.decode(latent[:, :, y : y + tile, x : x + tile]).float().cpu()
            rows, columns = part.shape[-2:]
            edge = max(1, overlap * SPATIAL_FACTOR)
            weight = _ramp(rows, edge)[:, None] * _ramp(columns, edge)
            top, left = y * SPATIAL_FACTOR, x * SPATIAL_FACTOR
            area = (slice(top, top + rows), slice(left, left + columns))
            picture[:, :, area[0], area[1]] += part * weight
            total[area] += weight
    return picture / total
