"""Guidance around the transformer.

Shapes: B batch, C latent channels, h and w latent height and width, T text tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...samplers.steps import check_finite
from ..caching import BlockCache, CachedRows
from ..errors import SamplingError
from ..nag import NAG
from ..text.encoder import TextEmbedding
from ..transformer import ChromaTransformer
from .plan import Guidance, is_one
from .run import GuidanceRun

# (x (B, C, h, w), sigma (B,)) -> denoised (B, C, h, w): what samplers call.
DenoiseFunction = Callable[..., Tensor]


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

    `uncond` is the negative prompt; it is not run where the scale is 1 and it has no effect.
    `cfg` is the scale, or a whole Guidance; `nag` guides the positive prompt within the attention;
    `cache` cuts passes short in which little changes. One Denoiser serves one run: momentum,
    zero-init and the cache remember what went before.
    """

    transformer: ChromaTransformer
    cond: TextEmbedding
    uncond: TextEmbedding | None = None
    cfg: float | Guidance = 1.0
    nag: NAG | None = None
    cache: BlockCache | None = None
    run: GuidanceRun = field(init=False)

    def __post_init__(self) -> None:
        plan = self.cfg if isinstance(self.cfg, Guidance) else Guidance(self.cfg)
        self.run = GuidanceRun(plan)
        if self.uncond is None and plan.uses_uncond:
            raise SamplingError(f"cfg {plan.cfg} needs a negative prompt; an empty one will do")

    @property
    def passes(self) -> int:
        """How often a prompt went through the transformer; cond and uncond count one each."""
        return self.run.passes

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        uncond_callback: Callable[[Tensor], None] | None = None,
        **_: object,
    ) -> Tensor:
        """x (B, 16, h, w) fp32, sigma (B,) -> denoised, fp32.

        A Guidance that depends on sigma takes the first row's for all. `uncond_callback` is given
        the negative prompt's own denoised latent, which is then computed at every scale: CFG++
        samplers need it. Raises SamplingError if the model returns anything but finite numbers.
        """
        level = float(sigma[0])
        if self.run.holds_still(level):
            self.run.count(0)
            if uncond_callback is not None:
                uncond_callback(x)
            return x
        scale = self.run.plan.scale(level)
        texts = [self.cond]
        if uncond_callback is not None or not is_one(scale):
            texts.append(self._negative())
        denoised = self._predict(x, sigma.float(), [repeat_rows(text, len(x)) for text in texts])
        self.run.count(len(texts))
        if uncond_callback is not None:
            uncond_callback(denoised[1])
        guided = denoised[0]
        if len(denoised) == 2:
            guided = self.run.guide(x, denoised[0], denoised[1], scale)
        check_finite(guided, level)
        return guided

    def _negative(self) -> TextEmbedding:
        if self.uncond is None:
            raise SamplingError("this sampler needs a negative prompt; an empty one will do")
        return self.uncond

    def _predict(self, x: Tensor, sigma: Tensor, texts: Sequence[TextEmbedding]) -> list[Tensor]:
        """The denoised latent for each prompt, in one batch where their lengths agree."""
        weight = self.transformer.img_in.bias
        rows = sigma[:1] if bool((sigma == sigma[0]).all()) else sigma
        table = self.transformer.modulation_table(rows, None, weight.dtype)
        latent, n = x.to(weight.dtype), len(texts)
        apart = len({text.hidden.shape for text in texts}) > 1 or len(table.vectors) > 1
        if apart or self.nag is not None:
            velocities = [
                self.transformer(
                    latent,
                    sigma,
                    *_to(text, weight),
                    table=table,
                    nag=None if i else self.nag,
                    cached=self._cached([i], sigma),
                )
                for i, text in enumerate(texts)
            ]
        else:
            both = TextEmbedding(
                torch.cat([text.hidden for text in texts]),
                torch.cat([text.lengths for text in texts]),
            )
            latent = latent.repeat(n, *[1] * (x.ndim - 1))
            velocities = self.transformer(
                latent, sigma.repeat(n), *_to(both, weight), table=table,
                cached=self._cached(range(n), sigma),
            ).chunk(n)  # fmt: skip
        level = sigma.view(-1, *[1] * (x.ndim - 1))
        return [x - level * velocity.float() for velocity in velocities]

    def _cached(self, prompts: Sequence[int], sigma: Tensor) -> CachedRows | None:
        return None if self.cache is None else self.cache.rows(prompts, sigma)


def _to(embedding: TextEmbedding, weight: Tensor) -> tuple[Tensor, Tensor]:
    return embedding.hidden.to(weight), embedding.lengths.to(weight.device)
