"""Classifier-free guidance (Ho & Salimans 2022) around the transformer, and inpainting.

Shapes: B batch, C latent channels, h and w latent height and width, T text tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import SamplingError
from .text.encoder import TextEmbedding
from .transformer import ChromaTransformer

# (x (B, C, h, w), sigma (B,)) -> denoised (B, C, h, w): what samplers call.
DenoiseFunction = Callable[..., Tensor]


def check_cfg(cfg: float) -> float:
    """The scale itself if it is usable. Raises SamplingError otherwise."""
    if not (math.isfinite(cfg) and 0 <= cfg <= 100):
        raise SamplingError(f"cfg {cfg} is not usable; expected a number from 0 to 100, usually 4")
    return cfg


def repeat_rows(embedding: TextEmbedding, batch: int) -> TextEmbedding:
    """One embedding for a batch: repeated when it holds a single row.

    Raises SamplingError if the rows fit the batch in no such way.
    """
    rows = embedding.hidden.shape[0]
    if rows == batch:
        return embedding
    if batch % rows:
        raise SamplingError(
            f"{rows} prompts do not fit a batch of {batch} pictures; "
            "expected one prompt, or one for each picture"
        )
    times = batch // rows
    return TextEmbedding(embedding.hidden.repeat(times, 1, 1), embedding.lengths.repeat(times))


@dataclass
class Denoiser:
    """The transformer as samplers see it: (x, sigma) -> denoised = x - sigma * velocity.

    `uncond` is the negative prompt; it is not run at cfg 1, where it has no effect.
    """

    transformer: ChromaTransformer
    cond: TextEmbedding
    uncond: TextEmbedding | None = None
    cfg: float = 1.0

    def __post_init__(self) -> None:
        check_cfg(self.cfg)
        if self.uncond is None and self.cfg != 1:
            raise SamplingError(f"cfg {self.cfg} needs a negative prompt; an empty one will do")

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        """x (B, 16, h, w) fp32, sigma (B,) -> denoised, fp32.

        Raises SamplingError if the model returns anything but finite numbers.
        """
        weight = self.transformer.img_in.bias
        sigma = sigma.float()
        rows = sigma[:1] if bool((sigma == sigma[0]).all()) else sigma
        table = self.transformer.modulation_table(rows, None, weight.dtype)
        latent = x.to(weight.dtype)
        cond = repeat_rows(self.cond, len(x))
        if self.uncond is None or math.isclose(self.cfg, 1.0):
            velocity = self.transformer(latent, sigma, *_to(cond, weight), table=table).float()
        else:
            uncond = repeat_rows(self.uncond, len(x))
            positive, negative = self._both(latent, sigma, cond, uncond, weight, table)
            velocity = negative + self.cfg * (positive - negative)
        if not bool(torch.isfinite(velocity).all()):
            raise SamplingError(
                f"the model returned NaN or infinity at sigma {float(sigma[0]):.4f}; "
                "the weights or their precision are unsuitable: try bf16 or fp32 instead of fp16"
            )
        return x - sigma.view(-1, *[1] * (x.ndim - 1)) * velocity

    def _both(self, latent, sigma, cond, uncond, weight, table) -> tuple[Tensor, Tensor]:
        if cond.hidden.shape != uncond.hidden.shape or len(table.vectors) > 1:
            runs = [
                self.transformer(latent, sigma, *_to(text, weight), table=table)
                for text in (cond, uncond)
            ]
            return runs[0].float(), runs[1].float()
        both = TextEmbedding(
            torch.cat([cond.hidden, uncond.hidden]), torch.cat([cond.lengths, uncond.lengths])
        )
        out = self.transformer(
            torch.cat([latent, latent]), sigma.repeat(2), *_to(both, weight), table=table
        )
        positive, negative = out.float().chunk(2)
        return positive, negative


def _to(embedding: TextEmbedding, weight: Tensor) -> tuple[Tensor, Tensor]:
    return embedding.hidden.to(weight), embedding.lengths.to(weight.device)


@dataclass
class InpaintDenoiser:
    """Keeps everything outside the mask as it was, as ComfyUI does.

    mask: (B or 1, 1 or C, h, w), 1 where the picture may change. latent, noise: (B, C, h, w).
    """

    model: DenoiseFunction
    mask: Tensor
    latent: Tensor
    noise: Tensor

    def __call__(self, x: Tensor, sigma: Tensor, **extra: object) -> Tensor:
        """Denoise, seeing the kept part at the right noise level and returning it untouched."""
        level = sigma.view(-1, *[1] * (x.ndim - 1))
        kept = torch.lerp(self.latent, self.noise, level)
        denoised = self.model(torch.lerp(kept, x, self.mask), sigma, **extra)
        return torch.lerp(self.latent, denoised, self.mask)
