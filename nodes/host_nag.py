"""NAG inside a ComfyUI run: which rows it guides, and how it goes around ComfyUI's attention."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..chroma.nag import NAG, JointText, join

# Keys in transformer_options: our NAG, and ComfyUI's replacement of the attention function.
NAG_KEY = "chroma_nag"
OVERRIDE = "optimized_attention_override"


def join_negative(
    context: Tensor, sigma: Tensor, image_tokens: int, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """The texts (B, T, C) and the options of a forward with the run's NAG, if it has one.

    Only positive prompts are guided, so that cfg above 1 keeps its own negative as it is.
    Raises SamplingError for negative prompts that do not fit.
    """
    nag: NAG | None = options.get(NAG_KEY)
    sides = options.get("cond_or_uncond") or [0]
    if nag is None or 0 not in sides:
        return context, options
    pictures, rows = len(context) // len(sides), None
    if any(sides):
        positive = torch.tensor([side == 0 for side in sides], device=context.device)
        rows = positive.repeat_interleave(pictures)
    context, joint = join(nag.rows(pictures), context, sigma, image_tokens, rows)
    if joint is None:
        return context, options
    return context, {**options, OVERRIDE: _override(joint, options.get(OVERRIDE))}


def _override(joint: JointText, previous: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    def attend(function, q, k, v, heads, mask=None, **kw) -> Tensor:
        inner = function if previous is None else partial(previous, function)

        def once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return inner(q, k, v, heads, mask=mask, **kw)

        # A node may call the attention on sequences of its own.
        ours = q.ndim == 4 and q.shape[2] == k.shape[2] == joint.total
        return joint.attend(once, q, k, v, mask) if ours else once(q, k, v, mask)

    return attend
