"""Tags as the captions of Chroma's training had them, behind the sentences of a prompt."""

import re
from collections.abc import Sequence

from ..errors import PromptError

# The guide's usual quality tags, best first.
QUALITY = ("masterpiece", "best quality", "amazing quality", "low quality", "worst quality")
# "aesthetic 0" to "aesthetic 10" are scores; 11 marks chosen pictures of other models.
AESTHETIC = range(12)
# A sentence that the captions of photographs often repeat, unfinished.
PHOTOGRAPH = "The photograph is a ."
# Periods suit realistic pictures; commas pull toward cartoon and anime.
SEPARATORS = {"period": ". ", "comma": ", "}

_ENDS = (".", "!", "?", ",", ";", ":")


def aesthetic_tag(score: int) -> str:
    """The tag of an aesthetic score from 0 to 11; raises PromptError for others."""
    if score not in AESTHETIC:
        raise PromptError(f"the aesthetic score is {score}; expected 0 to {AESTHETIC[-1]}")
    return f"aesthetic {score}"


def split_tags(text: str) -> list[str]:
    """The tags of a text, without what stood between them.

    They end at commas, semicolons and new lines; where there is none of these, at periods that
    a space or the end follows. Not inside parentheses, since `(a, b:1.2)` is weighed as one.
    """
    pieces = cut(text, r"[,;\n]")
    if len(pieces) == 1:
        pieces = cut(text, r"\.(?=\s|$)")
    stripped = (piece.strip().removesuffix(".").strip() for piece in pieces)
    return [piece for piece in stripped if piece]


def cut(text: str, separator: str) -> list[str]:
    """The pieces between matches of a regular expression that lie outside parentheses."""
    pieces, start, depth = [], 0, 0
    for match in re.finditer(rf"\\[()]|[()]|(?:{separator})", text):
        sign = match[0]
        if sign in ("(", ")"):
            depth = max(0, depth + (1 if sign == "(" else -1))
        elif not sign.startswith("\\") and depth == 0:
            pieces.append(text[start : match.start()])
            start = match.end()
    return [*pieces, text[start:]]


def join_tags(tags: Sequence[str], separator: str = "period") -> str:
    """`a. b.` or `a, b`; raises PromptError for a separator that is not one of SEPARATORS."""
    if separator not in SEPARATORS:
        raise PromptError(
            f"the separator is {separator!r}; expected one of {', '.join(SEPARATORS)}"
        )
    joined = SEPARATORS[separator].join(tags)
    return joined + "." if tags and separator == "period" else joined


def add_tags(text: str, tags: Sequence[str], separator: str = "period") -> str:
    """The prompt with tags at its end, parted from its sentences as from each other."""
    text, joined = text.strip(), join_tags(tags, separator)
    if not text or not joined:
        return text or joined
    between = " " if text.endswith(_ENDS) else SEPARATORS[separator]
    return text + between + joined


def add_repeats(text: str, phrase: str, times: int) -> str:
    """The prompt with a sentence at its end, a number of times."""
    return " ".join(piece for piece in (text.strip(), *[phrase.strip()] * times) if piece)


def tagged(
    text: str, *, quality: str | None, aesthetic: int | None, tags: str, separator: str,
    phrase: str, repeats: int,
) -> str:  # fmt: skip
    """A prompt, its quality tag, aesthetic score and other tags, then the repeated sentence."""
    every = [
        *([quality] if quality else []),
        *([] if aesthetic is None else [aesthetic_tag(aesthetic)]),
        *split_tags(tags),
    ]
    return add_repeats(add_tags(text, every, separator), phrase, repeats)
