"""Prompts to T5's token ids and back, by a tokenizer.json file."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from ..errors import CheckpointError, PromptError
from .t5 import MAX_TOKENS

_END, _PAD = "</s>", "<pad>"
_UNTYPEABLE = "\uffff"  # no character, by the Unicode standard
_log = logging.getLogger("chroma")


class Tokenizer:
    """A Unigram `tokenizers.Tokenizer` that reads text only: a typed "</s>" is four characters."""

    def __init__(self, backend: tokenizers.Tokenizer, name: str = "the tokenizer") -> None:
        """Build on `backend`, leaving it as it is; `name` is for error messages.

        Raises CheckpointError if the vocabulary lacks T5's end or pad token, or is no Unigram.
        """
        end, pad = backend.token_to_id(_END), backend.token_to_id(_PAD)
        if end is None or pad is None:
            raise CheckpointError(
                f"{name} is not a T5 tokenizer: its vocabulary lacks {_END} or {_PAD}; "
                "choose the tokenizer.json of T5 v1.1"
            )
        self.eos_id, self.pad_id = end, pad
        self._backend = backend
        self._text_only = _text_only(backend, name)

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json; raises CheckpointError if it is missing or cannot be read."""
        try:
            backend = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"cannot read the tokenizer {path}: {reason}; expected a tokenizer.json of T5 v1.1"
            ) from None
        return cls(backend, str(path))

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included; the embedding needs at least as many rows."""
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without the end token; raises PromptError for broken Unicode."""
        try:
            return self._text_only.encode(text).ids
        except (TypeError, UnicodeError):
            raise PromptError(
                f"the prompt {text[:40]!a} holds half of a Unicode surrogate pair; retype it"
            ) from None

    def with_eos(self, ids: Sequence[int]) -> list[int]:
        """The ids with the end token behind them."""
        return [*ids, self.eos_id]

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """The text that ids stand for."""
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def truncate(self, ids: Sequence[int], limit: int = MAX_TOKENS) -> list[int]:
        """The first `limit` - 1 ids, so that the end token still fits; warns of what is cut."""
        kept, cut = list(ids[: limit - 1]), list(ids[limit - 1 :])
        if cut:
            tail = self.decode(cut, skip_special=False)
            _log.warning(
                "The prompt has %d tokens, %d more than the %d that Chroma reads. Cut off: %r",
                len(ids) + 1,
                len(cut),
                limit,
                tail if len(tail) <= 300 else tail[:300] + "...",
            )
        return kept


def _text_only(backend: tokenizers.Tokenizer, name: str) -> tokenizers.Tokenizer:
    """The same tokenizer with the same ids, whose special tokens cannot be typed.

    Besides being marked as special they are pieces of the Unigram vocabulary, which would match
    them too; they are renamed there, because removing them would shift the ids.
    """
    settings = json.loads(backend.to_str())
    if settings["model"]["type"] != "Unigram":
        raise CheckpointError(
            f"{name} is not a T5 tokenizer: expected a Unigram model, got "
            f"{settings['model']['type']}; choose the tokenizer.json of T5 v1.1"
        )
    vocabulary = settings["model"]["vocab"]
    for token in settings["added_tokens"]:
        if token["id"] < len(vocabulary):
            vocabulary[token["id"]][0] = _UNTYPEABLE + token["content"]
    settings |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return tokenizers.Tokenizer.from_str(json.dumps(settings))
