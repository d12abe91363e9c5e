"""What several benchmarks paint with the small model, and how they compare the pictures."""

import torch
from torch import Tensor

PROMPTS = [
    f"a {style} emoji of a {noun} on a {colour} background"
    for style, noun, colour in (
        ("flat", "tiger", "green"), ("3d", "guitar", "blue"), ("3d", "red apple", "white"),
        ("flat", "owl", "orange"), ("3d", "panda", "yellow"), ("flat", "pizza", "black"),
        ("flat", "sailboat", "red"), ("3d", "octopus", "purple"),
    )
]  # fmt: skip


def psnr(pictures: Tensor, reference: Tensor) -> float:
    """Peak signal to noise in dB over all pictures together, values in [0, 1]."""
    return float(-10 * torch.log10((pictures - reference).square().mean()))
