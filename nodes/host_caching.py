"""First-block caching inside a ComfyUI run: where it lives, and where it stays out of the way."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..chroma.caching import BlockCache, CacheSettings
from .host_nag import OVERRIDE

# Keys in transformer_options: the run's CacheRun, and one forward's CachedRows.
RUN = "chroma_block_cache"
ROWS = "chroma_cached_rows"
log = logging.getLogger("chroma")


@dataclass
class CacheRun:
    """The cache of one sampling run; `override` took the attention's place when it began."""

    cache: BlockCache
    override: Any
    has_told: bool = False

    def obstacle(self, control: Any, options: dict[str, Any]) -> str | None:
        """Why this forward must run whole: what acts on later blocks, unseen by the first."""
        if control:
            return "ControlNet acts"
        if options.get("patches_replace", {}).get("dit"):
            return "another node replaces blocks"
        patches = options.get("patches", {})
        if patches.get("attn1_patch") or patches.get("attn1_output_patch"):
            return "another node patches the attention"
        if options.get(OVERRIDE) is not self.override:
            return "another node replaces the attention in some passes"
        named = options.get("uuids") and options.get("cond_or_uncond")
        return None if named else "the sampler does not tell prompts apart"

    def tell(self, obstacle: str) -> None:
        """Say once a run that there are passes without caching."""
        if not self.has_told:
            log.info("Chroma Block Cache is off where %s", obstacle)
        self.has_told = True

    def report(self) -> None:
        if self.cache.passes:
            log.info("Chroma Block Cache: %s", self.cache)
        elif not self.has_told:
            log.info("Chroma Block Cache is off: torch.compile or another node runs all blocks")


@dataclass(frozen=True)
class CachePatch:
    """A wrapper around ComfyUI's outer_sample that gives each run a cache, which ends with it."""

    settings: CacheSettings

    def start_run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        if any("hooks" in cond for conds in guider.conds.values() for cond in conds):
            log.info("Chroma Block Cache is off: prompts bring weights of their own (hooks)")
            return executor(*args, **kwargs)
        options = guider.model_options.setdefault("transformer_options", {})
        run = options[RUN] = CacheRun(BlockCache(self.settings), options.get(OVERRIDE))
        try:
            result = executor(*args, **kwargs)
            run.report()
            return result
        finally:
            run.cache.clear()


def patch_cache(model: ModelPatcher, settings: CacheSettings) -> ModelPatcher:
    """A clone whose runs are cached; a second patch replaces the first."""
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, RUN)
    if settings.threshold:
        patch = CachePatch(settings)
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, RUN, patch.start_run)
    return clone


def with_cached_rows(sigma: Tensor, control: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a forward at sigma (B,) with its share of the run's cache, if it has one."""
    if torch.compiler.is_compiling() or options.get(RUN) is None:
        return options
    run: CacheRun = options[RUN]
    if (obstacle := run.obstacle(control, options)) is not None:
        run.tell(obstacle)
        return options
    prompts = _names(options["cond_or_uncond"], options["uuids"])
    return {**options, ROWS: run.cache.rows(prompts, sigma[: len(sigma) // len(prompts)])}


def _names(sides: Sequence[int], uuids: Sequence[Any]) -> list[tuple[Any, ...]]:
    # Where a prompt has an area, ComfyUI gives the other side one of the same id for it.
    pairs = list(zip(sides, uuids, strict=True))
    return [(*pair, pairs[:i].count(pair)) for i, pair in enumerate(pairs)]
