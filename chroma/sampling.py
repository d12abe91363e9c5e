"""One sampling run: noise and a latent in, a finished latent out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .guidance import DenoiseFunction, InpaintDenoiser

# Called once a step with {"i", "x", "sigma", "sigma_hat", "denoised"}, as in k-diffusion.
StepCallback = Callable[[dict[str, Any]], None]


def fit_mask(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask (N, H, W) or (N, 1, H, W) of the picture scaled to the latent's size, (N, 1, h, w)."""
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return F.interpolate(mask, size=latent.shape[-2:], mode="bilinear").to(latent)


@torch.no_grad()
def sample_latent(
    model: DenoiseFunction,
    sampler: Callable[..., Tensor],
    sigmas: Tensor,
    noise: Tensor,
    latent: Tensor,
    *,
    mask: Tensor | None = None,
    seed: int | None = None,
    callback: StepCallback | None = None,
    disable_progress: bool = False,
) -> Tensor:
    """Noise `latent` to sigmas[0], integrate to sigmas[-1], return the latent, fp32.

    noise, latent: (B, 16, h, w); latent is zero for text-to-image. sigmas: (steps + 1,) falling.
    mask: 1 where the picture may change, at any size. seed: of the noise that stochastic samplers
    add; RowSeeds has one for each row. With fewer than two sigmas the latent comes back as it is.
    Where the last sigma is not 0 the result is divided by 1 minus it, as in ComfyUI, so that
    another run can take it up.
    """
    if len(sigmas) < 2:
        return latent
    first, last = float(sigmas[0]), float(sigmas[-1])
    if mask is not None:
        model = InpaintDenoiser(model, fit_mask(mask, latent), latent, noise)
    x = first * noise + (1 - first) * latent
    extra = {} if seed is None else {"seed": seed}
    x = sampler(model, x, sigmas, extra_args=extra, callback=callback, disable=disable_progress)
    return x / (1 - last)
