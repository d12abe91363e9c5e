"""Inpainting around a denoiser."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import DenoiseFunction


@dataclass
class InpaintDenoiser:
    """Keeps everything outside the mask as it was, as ComfyUI does.

    mask: (B or 1, 1 or C, h, w), 1 where the picture may change. latent, noise: (B, C, h, w).
    """

    model: DenoiseFunction
    mask: Tensor
    latent: Tensor
    noise: Tensor

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        uncond_callback: Callable[[Tensor], None] | None = None,
        **extra: object,
    ) -> Tensor:
        """Denoise, seeing the kept part at the right noise level and returning it untouched."""
        level = sigma.view(-1, *[1] * (x.ndim - 1))
        kept = torch.lerp(self.latent, self.noise, level)
        if uncond_callback is not None:
            extra["uncond_callback"] = lambda uncond: uncond_callback(self._masked(uncond))
        return self._masked(self.model(torch.lerp(kept, x, self.mask), sigma, **extra))

    def _masked(self, denoised: Tensor) -> Tensor:
        return torch.lerp(self.latent, denoised, self.mask)
