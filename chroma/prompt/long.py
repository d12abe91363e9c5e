"""Prompts of more than 512 tokens: encoded in parts, whose states stand one behind the other.

Chroma gives all text tokens the same position, so their order means nothing to it. Shapes: P parts
or B prompts, L tokens, C width.
"""

from collections.abc import Sequence

import torch

from ..errors import PromptError
from ..text.encoder import PadRule, TextEmbedding, TextEncoder, TokenRow
from ..text.t5 import MAX_TOKENS
from ..text.tokenizer import Tokenizer
from ..text.weighting import weigh_tokens

# Time and memory of every step grow with the text; this many parts are twice a picture of 1024².
MAX_PARTS = 16

_SENTENCE, _CLAUSE = (".", "!", "?"), (",", ";", ":")


def split_prompt(tokenizer: Tokenizer, prompt: str, limit: int = MAX_TOKENS) -> list[TokenRow]:
    """A prompt as rows of at most `limit` tokens, each with its end token; none is lost.

    Cut behind a sentence in the second half of the row, else behind a comma, else between words.
    Raises PromptError for more than 16 rows.
    """
    ids, weights = weigh_tokens(tokenizer.encode, prompt)
    rows, start = [], 0
    while len(ids) - start > limit - 1:
        end = start + _cut(tokenizer, ids[start : start + limit], limit - 1)
        rows.append((tokenizer.with_eos(ids[start:end]), [*weights[start:end], 1.0]))
        start = end
        if len(rows) == MAX_PARTS:
            raise PromptError(
                f"the prompt has {len(ids) + 1} tokens, which take more than {MAX_PARTS} parts of "
                f"{limit}; shorten it"
            )
    return [*rows, (tokenizer.with_eos(ids[start:]), [*weights[start:], 1.0])]


def _cut(tokenizer: Tokenizer, ids: Sequence[int], room: int) -> int:
    """How many of the ids, at most `room`, to keep together."""
    places = range(room, room // 2, -1)
    for ends in (_SENTENCE, _CLAUSE):
        for place in places:
            if tokenizer.decode([ids[place - 1]]).endswith(ends):
                return place
    for place in places:
        if " " in tokenizer.decode(list(ids[place - 1 : place + 1])).strip():
            return place
    return room


def encode_long(
    encoder: TextEncoder, prompt: str, pad_rule: PadRule = PadRule.REFERENCE
) -> TextEmbedding:
    """A prompt of any length as (1, L, C) fp32; up to 512 tokens exactly as `encode` has it."""
    rows = split_prompt(encoder.tokenizer, prompt)
    return join_parts(encoder.encode_tokens(rows, pad_rule), rows)


def join_parts(parts: TextEmbedding, rows: Sequence[TokenRow]) -> TextEmbedding:
    """The states (P, L, C) of a prompt's rows one behind the other, (1, L, C).

    Only the last one's pad token stays: the transformer was trained to see one.
    """
    kept = [len(ids) for ids, _ in rows[:-1]] + [int(parts.lengths[-1])]
    hidden = torch.cat([part[:n] for part, n in zip(parts.hidden, kept, strict=True)])
    return TextEmbedding(hidden[None], parts.lengths.new_tensor([len(hidden)]))


def concatenate(first: TextEmbedding, second: TextEmbedding) -> TextEmbedding:
    """Two prompts as one, row by row: (B, L1, C) and (B or 1, L2, C) -> (B, L, C).

    The tokens that exist stand together at the beginning of each row, with zeros behind them.
    Raises PromptError where the widths or the numbers of prompts do not go together.
    """
    widths, counts = ({x.shape[i] for x in (first.hidden, second.hidden)} for i in (2, 0))
    if len(widths) > 1:
        raise PromptError(
            f"the prompts were encoded at the widths {first.hidden.shape[2]} and "
            f"{second.hidden.shape[2]}; encode both with the same text encoder"
        )
    if len(counts | {1}) > 2:
        raise PromptError(
            f"cannot join {len(first.hidden)} prompts with {len(second.hidden)}; "
            "expected as many, or one"
        )
    count = max(counts)
    lengths = first.lengths + second.lengths.to(first.lengths.device)
    hidden = first.hidden.new_zeros(count, int(lengths.max()), *widths)
    for i in range(count):
        start = 0
        for part in (first, second):
            row = i % len(part.hidden)
            end = start + int(part.lengths[row])
            hidden[i, start:end] = part.hidden[row, : end - start]
            start = end
    return TextEmbedding(hidden, lengths)
