"""What the guide to Chroma advises against, found in a prompt."""

import re
from collections.abc import Callable

from .tags import AESTHETIC, cut
from .tokens import Length

# A negative prompt is to be at least this long, or not used at all.
NEGATIVE_TOKENS = 70
# Flash does best with tags and short prompts; the guide gives no number, this is a quarter of 512.
FLASH_TOKENS = 128
# So many short pieces in a row between commas are taken for tags and not for a sentence.
TAGS, TAG_WORDS = 5, 4

_AESTHETIC = re.compile(r"\baesthetic[ _](\d{1,4})\b", re.IGNORECASE)


def check_prompts(
    positive: str, negative: str, measure: Callable[[str], Length], *, flash: bool = False
) -> list[str]:
    """One line for each thing that the guide warns of; `measure` counts a prompt's tokens."""
    length, against = measure(positive), measure(negative)
    found = [_too_long(name, each) for name, each in (("", length), ("negative ", against))]
    found += [_comma_tags(positive), *_aesthetic(positive)]
    if negative.strip():
        found += [_negative(against), _flash_negative() if flash else None]
    if flash and length.tokens > FLASH_TOKENS:
        found.append(
            f"The prompt has {length.tokens} tokens: Flash models do best with short prompts and "
            f"tags, about {FLASH_TOKENS} tokens or fewer."
        )
    return [line for line in found if line]


def has_comma_tags(text: str) -> bool:
    """Whether tags are listed between commas: five or more pieces of at most four words."""
    for sentence in cut(text, r"[.!?](?=\s|$)|\n"):
        run = 0
        for piece in cut(sentence, ","):
            run = run + 1 if 0 < len(piece.split()) <= TAG_WORDS else 0
            if run == TAGS:
                return True
    return False


def _too_long(name: str, length: Length) -> str | None:
    if not length.excess:
        return None
    return f"The {name}prompt is too long: {length}. Shorten it, or use Chroma Long Text Encode."


def _comma_tags(text: str) -> str | None:
    if not has_comma_tags(text):
        return None
    return (
        "Tags between commas pull the style toward cartoon and anime: for a realistic picture "
        "separate them by periods, as Chroma Prompt Tags does."
    )


def _aesthetic(text: str) -> list[str]:
    scores = sorted({int(score) for score in _AESTHETIC.findall(text)})
    lines = []
    if AESTHETIC[-1] in scores:
        lines.append(
            "aesthetic 11 stands for chosen pictures of other models: parts of the prompt may "
            "bleed into each other. 0 to 10 are plain scores."
        )
    if unknown := [score for score in scores if score not in AESTHETIC]:
        lines.append(f"aesthetic {unknown[0]} is no tag of Chroma's: expected 0 to 11.")
    return lines


def _negative(length: Length) -> str | None:
    if length.tokens >= NEGATIVE_TOKENS:
        return None
    return (
        f"The negative prompt has {length.tokens} tokens: use none at all, or at least "
        f"{NEGATIVE_TOKENS}."
    )


def _flash_negative() -> str:
    return "At cfg 1, at which Flash models run, the negative prompt is not used."
