"""First-block caching: passes in which little has changed since an earlier one are cut short.

The image after the first double block tells how much the later ones would change: while its
relative L1 change since the last whole pass, summed over the passes (TeaCache, Liu et al. 2024,
arXiv:2411.19108), is below a threshold, what the later blocks added then is added again.

A pass is one prompt for one picture: one row of a batch, and every row is decided on its own.
Shapes: B rows, T text tokens, L image tokens, C width.
"""

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .approximator import ModulationTable
from .errors import SamplingError

# Sigmas come in fp32, bounds as typed: 0.3 in fp32 is not below 0.3.
SLACK = 1e-6


@dataclass(frozen=True)
class CacheSettings:
    """When passes may be cut short.

    `threshold` bounds the summed relative change of the image after the first block; at 0 nothing
    is compared or stored. Only from `sigma_start` down to `sigma_end`, and no more than `max_skips`
    times in a row (0: no limit). Raises SamplingError for values that cannot be used.
    """

    threshold: float = 0.0
    sigma_start: float = 1.0
    sigma_end: float = 0.0
    max_skips: int = 0

    def __post_init__(self) -> None:
        usable = math.isfinite(self.threshold) and self.threshold >= 0
        self._require("threshold", usable, "0 for off, or a positive number, usually 0.1")
        for name in ("sigma_start", "sigma_end"):
            self._require(name, 0 <= getattr(self, name) <= 1, "a number from 0 to 1")
        if self.sigma_start < self.sigma_end:
            raise SamplingError(
                f"the cache's sigma_start {self.sigma_start} is below its sigma_end "
                f"{self.sigma_end}; expected the larger sigma first, since sigma falls over a run"
            )
        self._require("max_skips", self.max_skips >= 0, "0 for no limit, or a number of steps")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise SamplingError(
                f"the cache's {name} {getattr(self, name)} is not usable; expected {expected}"
            )


class Batch(NamedTuple):
    """What the blocks work on; the modulation is of one sigma, or of one for each row.

    img (B, L, C), txt (B, T, C), mask (B or 1, 1, 1, T + L) or None.
    """

    img: Tensor
    txt: Tensor
    table: ModulationTable
    mask: Tensor | None

    def pick(self, rows: Sequence[int]) -> "Batch":
        """The rows of these numbers alone."""
        chosen = torch.tensor(rows, device=self.img.device)
        table, mask = self.table, self.mask
        if len(table.vectors) > 1:
            table = copy.copy(table)
            table.vectors = table.vectors[chosen]
        if mask is not None and len(mask) == len(self.img):
            mask = mask[chosen]
        return Batch(self.img[chosen], self.txt[chosen], table, mask)


class _Pass(NamedTuple):
    """A whole pass of one row: the image after the first block, and what the later ones added.

    Both (L, C).
    """

    first: Tensor
    added: Tensor


@dataclass
class _Row:
    """The last whole pass of one row, and what has gone on since."""

    last: _Pass | None = None
    change: float = 0.0
    skips: int = 0


class BlockCache:
    """What one sampling run keeps between its passes; a new run needs a new one.

    passes: how many there were. skipped: how many of these ended after the first block.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self.settings = settings
        self.passes = self.skipped = 0
        self._prompts: dict[Hashable, tuple[object, list[_Row]]] = {}

    def __str__(self) -> str:
        share = self.skipped / max(self.passes, 1)
        return f"{self.skipped} of {self.passes} passes ended after the first block ({share:.0%})"

    def rows(self, prompts: Sequence[Hashable], sigma: Tensor) -> "CachedRows":
        """The cache for one forward over all pictures for each prompt, one prompt after another.

        Anything may name the prompts that tells those of a run apart. sigma: (pictures,).
        """
        return CachedRows(self, tuple(prompts), tuple(sigma.tolist()))

    def stored(self, prompt: Hashable, pictures: int, kind: object) -> list[_Row]:
        """The rows of a prompt; new ones where their number or kind is another than before."""
        before, rows = self._prompts.get(prompt, (None, []))
        if before != kind or len(rows) != pictures:
            rows = [_Row() for _ in range(pictures)]
            self._prompts[prompt] = (kind, rows)
        return rows

    def clear(self) -> None:
        """Free what is stored; the counts stay."""
        self._prompts.clear()


@dataclass(frozen=True)
class CachedRows:
    """The rows of one forward: every prompt with every picture, at the pictures' sigmas."""

    cache: BlockCache
    prompts: tuple[Hashable, ...]
    sigmas: tuple[float, ...]

    def run(
        self,
        batch: Batch,
        first: Callable[[Batch], Batch],
        later: Callable[[Batch], Tensor],
        *,
        together: bool = False,
    ) -> Tensor:
        """The image (B, L, C) after all blocks, or what stands for it in the rows that are skipped.

        together: skip all rows or none, where the blocks cannot run on a part of the batch.
        """
        batch = first(batch)
        img = batch.img
        self.cache.passes += len(img)
        if self.cache.settings.threshold == 0:
            return later(batch)
        kind = (img.shape[1:], img.dtype, img.device)
        rows = [r for p in self.prompts for r in self.cache.stored(p, len(self.sigmas), kind)]
        skipped = self._choose(rows, img)
        if together and len(skipped) < len(rows):
            skipped = set()
        self.cache.skipped += len(skipped)
        return self._finish(batch, later, rows, skipped)

    def _choose(self, rows: Sequence[_Row], img: Tensor) -> set[int]:
        """The rows that may be skipped; every row's change is added to what there was."""
        settings, changes = self.cache.settings, {}
        for i, (row, sigma) in enumerate(zip(rows, self._all_sigmas(), strict=True)):
            within = settings.sigma_end - SLACK <= sigma <= settings.sigma_start + SLACK
            if within and row.last is not None:
                changes[i] = relative_change(img[i], row.last.first)
        if not changes:
            return set()
        # One wait for the device for the whole batch.
        for i, change in zip(changes, torch.stack([*changes.values()]).tolist(), strict=True):
            rows[i].change += change
        most = settings.max_skips or math.inf
        return {i for i in changes if rows[i].change < settings.threshold and rows[i].skips < most}

    def _finish(
        self,
        batch: Batch,
        later: Callable[[Batch], Tensor],
        rows: Sequence[_Row],
        skipped: set[int],
    ) -> Tensor:
        img, out = batch.img, dict[int, Tensor]()
        if chosen := [i for i in range(len(rows)) if i not in skipped]:
            part = batch if not skipped else batch.pick(chosen)
            out = dict(zip(chosen, later(part), strict=True))
        for i, (row, sigma) in enumerate(zip(rows, self._all_sigmas(), strict=True)):
            if i in skipped and row.last is not None:
                row.skips += 1
                out[i] = img[i] + row.last.added
            else:
                # Below the end nothing is skipped any more.
                useful = sigma >= self.cache.settings.sigma_end - SLACK
                # A view would keep the other rows alive.
                row.last = _Pass(img[i].clone(), out[i] - img[i]) if useful else None
                row.change, row.skips = 0.0, 0
        return torch.stack([out[i] for i in range(len(rows))])

    def _all_sigmas(self) -> tuple[float, ...]:
        return self.sigmas * len(self.prompts)


def relative_change(now: Tensor, then: Tensor) -> Tensor:
    """|now - then| / |then| in the L1 norm, fp32 without axes; fp16 would overflow."""
    dtype = torch.promote_types(now.dtype, torch.float32)
    change, length = (torch.linalg.vector_norm(x, ord=1, dtype=dtype) for x in (now - then, then))
    return change / length
