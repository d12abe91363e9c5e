"""Between tensors and picture files, with ComfyUI's conventions."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .errors import ImageError


def to_uint8(pixels: Tensor) -> np.ndarray:
    """(..., H, W, 3) fp32 in [0, 1] -> uint8, rounded down as ComfyUI's SaveImage does."""
    return np.clip(255.0 * pixels.cpu().float().numpy(), 0, 255).astype(np.uint8)


def save_png(
    path: Path,
    image: Tensor,
    *,
    prompt: dict[str, Any] | None = None,
    workflow: dict[str, Any] | None = None,
) -> None:
    """Write (H, W, 3) in [0, 1] as PNG, whole or not at all.

    `prompt` (API format) and `workflow` (UI format) go in as the text chunks from which ComfyUI
    restores a graph when the file is dropped onto it. Raises ImageError where the file cannot be
    written.
    """
    info = PngInfo()
    for name, value in (("prompt", prompt), ("workflow", workflow)):
        if value is not None:
            info.add_text(name, json.dumps(value))
    pixels = Image.fromarray(to_uint8(image))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, because os.replace is atomic within one file system only.
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with part.open("xb") as file:
                pixels.save(file, "PNG", pnginfo=info, compress_level=4)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ImageError(
            f"cannot write {path} ({error.strerror or error}); choose another folder or make room"
        ) from None


def load_image(path: Path) -> tuple[Tensor, Tensor]:
    """A picture (1, H, W, 3) in [0, 1] and its mask (1, H, W), as ComfyUI's LoadImage gives them.

    The mask is 1 where the file is transparent; (1, 64, 64) of zeros where it has no alpha.
    Raises ImageError for a file that is missing, not a picture, or too large for Pillow's limit.
    """
    try:
        with Image.open(path) as file:
            picture = _eight_bit(ImageOps.exif_transpose(file))
            alpha = picture.convert("RGBA").getchannel("A") if _has_alpha(picture) else None
            rgb = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist; check the name and the input folder") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path.name} is too large ({error}); make it smaller") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise nearly every type for damaged files
        reason = " ".join(str(error).split())
        raise ImageError(
            f"{path.name} cannot be read as a picture ({reason}); expected PNG, JPEG or WebP"
        ) from None
    mask = torch.zeros(1, 64, 64)
    if alpha is not None:
        mask = 1 - torch.from_numpy(np.asarray(alpha, dtype=np.float32) / 255)[None]
    return torch.from_numpy(rgb)[None], mask


def _eight_bit(picture: Image.Image) -> Image.Image:
    """A picture of 16 or 32 bit integers scaled to 8 bits, which Pillow would only cut off."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray(np.clip(np.asarray(picture) // 255, 0, 255).astype(np.uint8))


def _has_alpha(picture: Image.Image) -> bool:
    # A single transparent colour of a picture without a palette counts as opaque in ComfyUI.
    return "A" in picture.getbands() or (picture.mode == "P" and "transparency" in picture.info)
