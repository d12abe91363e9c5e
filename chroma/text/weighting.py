r"""The prompt weighting syntax of ComfyUI: `(word)`, `((word))`, `(word:1.2)`, `\(` and `\)`."""

import math
from collections.abc import Callable

PARENTHESES = 1.1
# 1.1 to this power is 13,780; each further level would read the whole prompt once more.
MOST_NESTED = 100

# Stand-ins for escaped parentheses while the others are matched; nobody can type them.
_ESCAPES = ((r"\(", "\x01", "("), (r"\)", "\x02", ")"))


def parse_weights(text: str) -> list[tuple[str, float]]:
    r"""Split a prompt into (text, weight) segments, in order, spaces kept.

    Every pair of parentheses multiplies the weight by 1.1; a number behind the pair's last colon
    replaces it, whatever surrounds the pair: `((a:1.2))` weighs 1.2, `((a) b:1.5)` weighs 1.65
    and 1.5. `\(` and `\)` are plain characters, and so are parentheses without a partner. A colon
    without a finite number behind it, or without text before it, is plain text too, and so are
    parentheses within MOST_NESTED others. Never fails.
    """
    for escape, stand_in, _ in _ESCAPES:
        text = text.replace(escape, stand_in)
    segments = []
    pending = [(piece, 1.0, 0) for piece in reversed(_split(text))]
    while pending:
        piece, weight, nested = pending.pop()
        if piece[0] == "(" and piece[-1] == ")" and nested < MOST_NESTED:
            content, weight = _open(piece[1:-1], weight)
            pending.extend((inner, weight, nested + 1) for inner in reversed(_split(content)))
        else:
            segments.append((_unescape(piece), weight))
    return segments


def weigh_tokens(
    encode: Callable[[str], list[int]], prompt: str, *, weighted: bool = True
) -> tuple[list[int], list[float]]:
    """Ids and weights of all tokens of a prompt, each segment of one weight encoded by itself.

    Not `weighted`, the prompt is one segment, parentheses included.
    """
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in parse_weights(prompt) if weighted else [(prompt, 1.0)]:
        segment = encode(text)
        ids += segment
        weights += [weight] * len(segment)
    return ids, weights


def _split(text: str) -> list[str]:
    """Cut before and behind every outermost pair of parentheses."""
    pieces, start, depth = [], 0, 0
    for i, character in enumerate(text):
        if character == "(":
            if depth == 0 and i > start:
                pieces.append(text[start:i])
                start = i
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                pieces.append(text[start : i + 1])
                start = i + 1
    return pieces + [text[start:]] * (start < len(text))


def _open(content: str, weight: float) -> tuple[str, float]:
    """Text and weight of what stands between two parentheses; `weight` is that around them."""
    text, colon, number = content.rpartition(":")
    try:
        explicit = float(number) if colon and text else math.nan
    except ValueError:
        explicit = math.nan
    return (text, explicit) if math.isfinite(explicit) else (content, weight * PARENTHESES)


def _unescape(text: str) -> str:
    for _, stand_in, character in _ESCAPES:
        text = text.replace(stand_in, character)
    return text
