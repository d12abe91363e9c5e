"""Normalized Attention Guidance: a negative prompt inside the attention, at cfg 1.

Chen et al. 2025 (arXiv:2505.21179). Every block runs over one sequence of negative text, positive
text and image, so that the image passes each layer once. Only the attention runs twice, once for
each text with the image, and the two results for the image's queries are combined.

Shapes: B batch, T- and T+ negative and positive text tokens, L image tokens, C width,
H heads, D head dimension.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import SamplingError
from .latents import text_mask
from .ops import Attention

MAX_SCALE = 50.0
MAX_TAU = 10.0


@dataclass(frozen=True)
class NAGSettings:
    """How strongly the negative prompt acts; the defaults are the authors' for Flux.

    `scale` counts from 1, as cfg does: the paper's phi is scale - 1. `tau` limits how much longer
    a token may become, `alpha` is the guided share of the result. Below `sigma_end` it is off.
    Raises SamplingError for values that cannot be used.
    """

    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25
    sigma_end: float = 0.0

    def __post_init__(self) -> None:
        _check("scale", self.scale, 0.0, MAX_SCALE)
        _check("tau", self.tau, 1.0, MAX_TAU)
        _check("alpha", self.alpha, 0.0, 1.0)
        _check("sigma_end", self.sigma_end, 0.0, 1.0)

    @property
    def is_neutral(self) -> bool:
        """Whether the result would be the one without a negative prompt."""
        return self.scale == 1 or self.alpha == 0


def _check(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise SamplingError(
            f"NAG's {name} {value} is not usable; expected a number from {low:g} to {high:g}"
        )


@dataclass(frozen=True)
class NAG:
    """The settings with the negative text: hidden (N, T-, context_dim), valid to each length."""

    settings: NAGSettings
    hidden: Tensor
    lengths: tuple[int, ...]

    def rows(self, batch: int) -> "NAG":
        """The negative prompts repeated over the batch. Raises SamplingError if they do not fit."""
        count = len(self.hidden)
        if batch % count:
            raise SamplingError(
                f"{count} negative prompts do not fit a batch of {batch} pictures; "
                "expected one prompt, or one for each picture"
            )
        times = batch // count
        return NAG(self.settings, self.hidden.repeat(times, 1, 1), self.lengths * times)


def combine(positive: Tensor, negative: Tensor, settings: NAGSettings) -> Tensor:
    """The guided attention output of (B, L, C) from those with either text.

    z~ = z+ + (scale - 1) (z+ - z-), shortened so that |z~| <= tau |z+| in every token's L1 norm,
    then (1 - alpha) z+ + alpha z~. The norms are fp32, because 3072 terms overflow fp16.
    """
    away = positive + (settings.scale - 1) * (positive - negative)
    limit = settings.tau * _l1(positive)
    shrink = (limit / _l1(away).clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1)
    return torch.lerp(positive, away * shrink.to(away.dtype), settings.alpha)


def _l1(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, ord=1, dim=-1, keepdim=True, dtype=dtype)


@dataclass(frozen=True)
class JointText:
    """Where the texts and the image lie in the joint sequence, and how to attend over it.

    mask: additive key mask (B, 1, 1, T- + L) of the negative text. guided: (B,) bool; the other
    rows get the plain result.
    """

    settings: NAGSettings
    negative_tokens: int
    positive_tokens: int
    image_tokens: int
    mask: Tensor | None
    guided: Tensor | None

    @property
    def total(self) -> int:
        return self.negative_tokens + self.positive_tokens + self.image_tokens

    def attend(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """(B, H, total, D) -> (B, total, H*D); `mask` is the positive text's, for T+ + L keys."""
        n, p = self.negative_tokens, self.positive_tokens
        # The positive text lies beside the image, so that its own pass needs no copy.
        plain = attention(q[:, :, n:], k[:, :, n:], v[:, :, n:], mask)
        q, k, v = (self._without_positive(x) for x in (q, k, v))
        other = attention(q, k, v, self.mask)
        image = combine(plain[:, p:], other[:, n:], self.settings)
        if self.guided is not None:
            image = torch.where(self.guided[:, None, None], image, plain[:, p:])
        return torch.cat([other[:, :n], plain[:, :p], image], dim=1)

    def wrap(self, attention: Attention) -> Attention:
        """The same attention over the joint sequence."""

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return self.attend(attention, q, k, v, mask)

        return attend

    def _without_positive(self, x: Tensor) -> Tensor:
        n, p = self.negative_tokens, self.positive_tokens
        return torch.cat([x[:, :, :n], x[:, :, n + p :]], dim=2)


def join(
    nag: NAG, context: Tensor, sigma: Tensor, image_tokens: int, rows: Tensor | None = None
) -> tuple[Tensor, JointText | None]:
    """Negative before positive text, (B, T- + T+, context_dim), and the attention over them.

    The context alone and None where no row is guided: at neutral settings, below sigma_end, or
    outside `rows` (B,) bool. Raises SamplingError if the prompts fit neither batch nor width.
    """
    guided = _guided(nag.settings, sigma, rows)
    if nag.settings.is_neutral or (guided is not None and not bool(guided.any())):
        return context, None
    if nag.hidden.shape[-1] != context.shape[-1]:
        raise SamplingError(
            f"the negative prompt has vectors of {nag.hidden.shape[-1]}, the positive one of "
            f"{context.shape[-1]}; encode both with the same text encoder"
        )
    nag, longest = nag.rows(len(context)), max(nag.lengths)
    mask = None
    if min(nag.lengths) != longest:
        lengths = torch.tensor(nag.lengths, device=context.device)
        mask = text_mask(lengths, longest, image_tokens, context.dtype)
    hidden = nag.hidden[:, :longest].to(context)
    joint = JointText(nag.settings, longest, context.shape[1], image_tokens, mask, guided)
    return torch.cat([hidden, context], dim=1), joint


def _guided(settings: NAGSettings, sigma: Tensor, rows: Tensor | None) -> Tensor | None:
    """The rows (B,) that are guided; None where all are."""
    if settings.sigma_end == 0:
        return rows
    above = sigma >= settings.sigma_end
    return above if rows is None else above & rows
