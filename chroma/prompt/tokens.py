"""How long prompts are in tokens, and what is cut off those that are too long."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..text.t5 import MAX_TOKENS
from ..text.tokenizer import Tokenizer
from ..text.weighting import weigh_tokens

_SHOWN = 300
_KEPT = 12


@dataclass(frozen=True)
class Length:
    """Tokens of a prompt, the end token included, and the text around the cut, if there is one."""

    tokens: int
    kept: str = ""
    cut: str = ""

    @property
    def excess(self) -> int:
        """Tokens more than Chroma reads."""
        return max(0, self.tokens - MAX_TOKENS)

    def __str__(self) -> str:
        """One line that marks what was cut."""
        if not self.excess:
            return f"{self.tokens} of {MAX_TOKENS} tokens"
        cut = self.cut if len(self.cut) <= _SHOWN else self.cut[:_SHOWN] + "..."
        return (
            f"{self.tokens} of {MAX_TOKENS} tokens, {self.excess} too many. "
            f"Cut off behind '...{self.kept}': {cut}"
        )


def measure(tokenizer: Tokenizer, prompt: str) -> Length:
    """The length of a prompt; raises PromptError for broken Unicode."""
    ids, _ = weigh_tokens(tokenizer.encode, prompt)
    count, last = len(ids) + 1, MAX_TOKENS - 1  # the end token takes the last place
    if count <= MAX_TOKENS:
        return Length(count)
    kept = tokenizer.decode(ids[last - _KEPT : last], skip_special=False)
    return Length(count, kept, tokenizer.decode(ids[last:], skip_special=False))


def describe(lengths: Sequence[Length]) -> list[str]:
    """Lines about one prompt or, in sum, several, with one more for each that is cut."""
    if len(lengths) == 1:
        return [str(lengths[0])]
    counts = [length.tokens for length in lengths]
    lines = [f"{len(lengths)} prompts, {min(counts)} to {max(counts)} of {MAX_TOKENS} tokens"]
    return lines + [
        f"prompt {number}: {length}" for number, length in enumerate(lengths, 1) if length.excess
    ]
