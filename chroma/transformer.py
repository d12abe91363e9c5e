"""Chroma: a noisy latent, its sigma and a text embedding in, the velocity out."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .approximator import Approximator, ModulationTable, approximator_input
from .blocks import DoubleBlock, FinalLayer, SingleBlock, layer_norm, run_double, run_single
from .caching import Batch, CachedRows
from .config import THETA, ChromaConfig
from .latents import pack, pad_to_patch, position_ids, text_mask, unpack
from .nag import NAG, join
from .ops import Attention, modulate, rope_table, sdpa


class ChromaTransformer(nn.Module):
    """The transformer of Chroma1 at any width and depth.

    `operations` is a namespace with Linear (default torch.nn); `attention` maps (q, k, v, mask)
    of (B, H, L, D) to (B, L, H*D).
    """

    def __init__(
        self,
        config: ChromaConfig,
        operations: Any = nn,
        attention: Attention = sdpa,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        self.img_in = operations.Linear(config.in_channels, config.hidden, **kw)
        self.txt_in = operations.Linear(config.context_dim, config.hidden, **kw)
        self.distilled_guidance_layer = Approximator(config, operations, **kw)
        self.double_blocks = nn.ModuleList(
            [DoubleBlock(config, operations, **kw) for _ in range(config.double_depth)]
        )
        self.single_blocks = nn.ModuleList(
            [SingleBlock(config, operations, **kw) for _ in range(config.single_depth)]
        )
        self.final_layer = FinalLayer(config, operations, **kw)

    def modulation_table(
        self, sigma: Tensor, guidance: Tensor | None, dtype: torch.dtype
    ) -> ModulationTable:
        """Every modulation vector at the given sigmas (S,); `guidance` is 0 where None."""
        config = self.config
        x = approximator_input(sigma, guidance, config.modulations, config.approximator_in)
        vectors = self.distilled_guidance_layer(x.to(dtype))
        return ModulationTable(vectors, config.double_depth, config.single_depth)

    def forward(
        self,
        latent: Tensor,
        sigma: Tensor,
        context: Tensor,
        lengths: Tensor | None = None,
        *,
        table: ModulationTable | None = None,
        nag: NAG | None = None,
        cached: CachedRows | None = None,
    ) -> Tensor:
        """Velocity (noise minus image) at `latent` (B, 16, h, w).

        sigma: (B,) in [0, 1], 1 is pure noise. context: text embedding (B, T, context_dim).
        lengths: (B,) tokens of each row that exist, where they differ. table: the modulation
        at these sigmas, when the caller has it already; it is made once here otherwise. nag: a
        negative prompt inside the attention. cached: what the run remembers of these rows.
        """
        h, w = latent.shape[-2:]
        latent = pad_to_patch(latent)
        tokens = pack(latent)
        if table is None:
            table = self.modulation_table(distinct(sigma), None, latent.dtype)
        mask = None
        if lengths is not None and bool((lengths != context.shape[1]).any()):
            mask = text_mask(lengths, context.shape[1], tokens.shape[1], latent.dtype)
        attention = self.attention
        if nag is not None:
            context, joint = join(nag, context, sigma, tokens.shape[1])
            if joint is not None:
                attention = joint.wrap(attention)
        velocity = self.run(tokens, context, table, latent.shape[-2:], mask, attention, cached)
        return unpack(velocity, *latent.shape[-2:])[..., :h, :w]

    def run(
        self,
        tokens: Tensor,
        context: Tensor,
        table: ModulationTable,
        size: torch.Size | tuple[int, int],
        mask: Tensor | None,
        attention: Attention | None = None,
        cached: CachedRows | None = None,
    ) -> Tensor:
        """Velocity of packed tokens (B, L, 64); size is the even latent's height and width."""
        attention = attention or self.attention
        img, txt = self.img_in(tokens), self.txt_in(context)
        ids = position_ids(txt.shape[1], size[0], size[1], tokens.device)
        rope = rope_table(ids, self.config.rope_axes, THETA)
        kw: dict[str, Any] = {"rope": rope, "attention": attention}
        batch = Batch(img, txt, table, mask)
        if cached is None:
            img = self._run_from(0, batch, **kw)
        else:
            first, later = partial(self._run_double, 0, **kw), partial(self._run_from, 1, **kw)
            img = cached.run(batch, first, later, together=attention is not self.attention)
        return self.final_layer.linear(modulate(layer_norm(img), *table.final()))

    def _run_double(self, i: int, batch: Batch, rope: Tensor, attention: Attention) -> Batch:
        block, mods = self.double_blocks[i], batch.table.double(i)
        img, txt = run_double(
            block, batch.img, batch.txt, mods, rope, batch.mask,
            heads=self.config.heads, attention=attention,
        )  # fmt: skip
        return Batch(img, txt, batch.table, batch.mask)

    def _run_from(self, start: int, batch: Batch, rope: Tensor, attention: Attention) -> Tensor:
        """The image (B, L, C) after all blocks from the double one with number `start` on."""
        for i in range(start, len(self.double_blocks)):
            batch = self._run_double(i, batch, rope, attention)
        heads, mask = self.config.heads, batch.mask
        x = torch.cat([batch.txt, batch.img], dim=1)
        for i, block in enumerate(self.single_blocks):
            mod = batch.table.single(i)
            x = run_single(block, x, mod, rope, mask, heads=heads, attention=attention)
        return x[:, batch.txt.shape[1] :]


def distinct(sigma: Tensor) -> Tensor:
    """One sigma where the whole batch shares it, so that the approximator runs one row."""
    return sigma[:1] if bool((sigma == sigma[0]).all()) else sigma
