"""ComfyUI's core node that enlarges pictures, with the results ComfyUI gives."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import ImageError
from .schema import Input, NodeType
from .values import Context

LANCZOS = "lanczos"
METHODS = ("nearest-exact", "bilinear", "area", "bicubic", LANCZOS)


def _lanczos(image: Tensor, width: int, height: int) -> Tensor:
    # ComfyUI lets Pillow do it on 8 bits, rounded down.
    pixels = (image * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()
    rows = [
        np.asarray(Image.fromarray(row).resize((width, height), Image.Resampling.LANCZOS))
        for row in pixels
    ]
    return torch.from_numpy(np.stack(rows)).to(image.dtype) / 255


def scale_image(_: Context, image: Tensor, upscale_method: str, scale_by: float):
    """IMAGE (B, H, W, C) with both sides times `scale_by`. Raises ImageError if none is left."""
    height, width = (round(side * scale_by) for side in image.shape[1:3])
    if min(height, width) < 1:
        raise ImageError(
            f"{image.shape[2]} x {image.shape[1]} pixels times {scale_by:g} leave nothing; "
            "use a larger scale_by"
        )
    if upscale_method == LANCZOS:
        return (_lanczos(image, width, height),)
    rows = F.interpolate(image.movedim(-1, 1), (height, width), mode=upscale_method)
    return (rows.movedim(1, -1),)


NODES = (
    NodeType(
        "ImageScaleBy",
        (
            Input("image", "IMAGE"),
            Input("upscale_method", "COMBO", choices=METHODS),
            Input("scale_by", "FLOAT", 1.0, 0.01, 8.0),
        ),
        (("IMAGE", "IMAGE"),),
        scale_image,
    ),
)
