"""Prompts to the text embedding that Chroma's transformer reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError, PromptError
from .t5 import MAX_TOKENS, PadRule, T5Encoder
from .tokenizer import Tokenizer
from .weighting import weigh_tokens

__all__ = ["PadRule", "TextEmbedding", "TextEncoder"]


# Ids and weights of one prompt, the end token included.
TokenRow = tuple[list[int], list[float]]


@dataclass(frozen=True)
class TextEmbedding:
    """Hidden states (B, L, C) fp32; row i is valid up to `lengths[i]` (B,) and 0 behind it.

    The valid part is the prompt's tokens, the end token and, except under COMFY_NOPAD or where
    the prompt fills all 512 tokens, one pad token. The transformer attends exactly these.
    """

    hidden: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and the T5 encoder it belongs to.

    Raises CheckpointError if the tokenizer has ids for which the encoder has no embedding.
    """

    tokenizer: Tokenizer
    model: T5Encoder

    def __post_init__(self) -> None:
        rows = self.model.config.vocab_size
        if self.tokenizer.vocab_size > rows:
            raise CheckpointError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the text encoder only "
                f"{rows} embeddings; choose a tokenizer and a text encoder that belong together"
            )

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        pad_rule: PadRule = PadRule.REFERENCE,
        *,
        weighted: bool = True,
    ) -> TextEmbedding:
        """Encode a batch of prompts, each exactly as it would be alone.

        With `weighted`, ComfyUI's `(word:1.2)` syntax applies: the segments are tokenized one by
        one, and a token of weight w becomes empty + (z - empty) * w, where empty is T5's output
        for nothing but pad tokens. The end and the pad token always weigh 1. Prompts longer than
        512 tokens are cut, with a warning. Raises PromptError for an empty batch, a lone string
        or broken Unicode.
        """
        if isinstance(prompts, str) or not prompts:
            raise PromptError(f"expected a list of at least one prompt, got {prompts!r}")
        return self.encode_tokens([self.tokenize(p, weighted=weighted) for p in prompts], pad_rule)

    @torch.no_grad()
    def encode_tokens(
        self,
        rows: Sequence[TokenRow],
        pad_rule: PadRule = PadRule.REFERENCE,
        *,
        device: torch.device | None = None,
    ) -> TextEmbedding:
        """Encode rows of (ids, weights) as `tokenize` makes them.

        `device` is where the tokens go: the first weight's place, unless the host moves weights.
        """
        counts = torch.tensor([len(ids) for ids, _ in rows])
        pads = 0 if pad_rule is PadRule.COMFY_NOPAD else 1
        kept = (counts + pads).clamp(max=MAX_TOKENS)
        longest = int(kept.max())
        width = MAX_TOKENS if pad_rule is PadRule.UNMASKED512 else longest

        device = device or next(self.model.parameters()).device
        tokens = torch.full((len(rows), width), self.tokenizer.pad_id)
        weights = torch.ones(len(rows), longest)
        for i, (ids, row_weights) in enumerate(rows):
            tokens[i, : len(ids)] = torch.tensor(ids)
            weights[i, : len(ids)] = torch.tensor(row_weights)
        hidden = self.model(tokens.to(device), counts.to(device), pad_rule)[:, :longest]
        if bool((weights != 1).any()):
            hidden = self._weigh(hidden, weights.to(device))
        behind = torch.arange(longest) >= kept[:, None]  # (B, L)
        return TextEmbedding(hidden.masked_fill(behind[..., None].to(device), 0), kept.to(device))

    def tokenize(self, prompt: str, *, weighted: bool = True) -> TokenRow:
        """Ids and weights of at most 512 tokens, the end token included."""
        ids, weights = weigh_tokens(self.tokenizer.encode, prompt, weighted=weighted)
        ids = self.tokenizer.truncate(ids)
        return self.tokenizer.with_eos(ids), [*weights[: len(ids)], 1.0]

    def _weigh(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """Move every token's (B, L, C) state away from the empty one by its weight (B, L).

        One pad token stands for any number of them: among equal tokens, attention returns their
        common value, so all positions of an all-pad sequence hold this same state.
        """
        empty = self.model(torch.tensor([[self.tokenizer.pad_id]], device=hidden.device))
        scaled = empty + (hidden - empty) * weights[..., None]
        return torch.where(weights[..., None] == 1, hidden, scaled)
