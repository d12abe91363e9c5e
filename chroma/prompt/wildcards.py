r"""Choices in prompts: `{red|2::blue}` picks an option, `__colour__` a line of colour.txt.

Options may hold choices and files, and lines of files may, too. A number and `::` before an option
or a line is its weight, 1 without. `\{`, `\|`, `\}` and `\_` are plain characters.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import PromptError

# Choices inside choices, files included.
MAX_DEPTH = 32
# Of one prompt: what is chosen, and what comes out.
MAX_CHOICES = 1_000
MAX_CHARACTERS = 100_000

ESCAPED = "{}|_"
# The bound on a name keeps the search linear, whatever the text.
_MARK = re.compile(r"\\([{}|_])|([{}|])|__(?!_)([\w./-]{0,199}?[^\W_])__")
_WEIGHT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)::")

# The lines of a wildcard file by its name; raises PromptError where there is none.
ReadLines = Callable[[str], Sequence[str]]


class _File(NamedTuple):
    name: str


@dataclass
class _Option:
    weight: float = 1.0
    parts: "list[str | _File | list[_Option]]" = field(default_factory=list)


def expand(text: str, seed: int, read_lines: ReadLines | None = None) -> str:
    """The prompt with every choice made, the same ones for the same seed and files everywhere.

    Raises PromptError for a brace without its partner, weights that allow no option, a file that
    is missing, or more than the bounds above; where there are no files, `__name__` is one of these.
    """
    return _Expansion(random.Random(seed), read_lines or _no_files).run(_parse(text, "the prompt"))


def expand_lines(text: str, seed: int, count: int, read_lines: ReadLines | None = None) -> str:
    """One prompt as it is written, or several, each on a line of its own, with seeds one apart."""
    prompts = [expand(text, seed + i, read_lines) for i in range(count)]
    one_line = (" ".join(prompt.splitlines()) for prompt in prompts)
    return prompts[0] if count == 1 else "\n".join(one_line)


def escape(text: str) -> str:
    """The text in a form that `expand` turns back into it, whatever it holds."""
    return "".join("\\" + letter if letter in ESCAPED else letter for letter in text)


def _no_files(name: str) -> Sequence[str]:
    raise PromptError(
        rf"there is no folder for the wildcard file __{name}__; for plain text write \__{name}\__"
    )


def _parse(text: str, where: str) -> _Option:
    """The text as a tree, of which only the chosen branches are expanded."""
    parser, position = _Parser(text, where), 0
    while mark := _MARK.search(text, position):
        parser.add(text[position : mark.start()])
        escaped, sign, name = mark.groups()
        if sign is None:
            parser.add(escaped or _File(name))
            position = mark.end()
        else:
            position = parser.sign(sign, mark.start())
    parser.add(text[position:])
    return parser.end()


class _Parser:
    """The options that are being read, the outermost first, and where their braces are."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where
        self.branch, self.braces = [_Option()], list[int]()

    def add(self, part: str | _File) -> None:
        self.branch[-1].parts.append(part)

    def sign(self, sign: str, position: int) -> int:
        """Take a brace or a bar at a position; returns where the text goes on."""
        after = position + 1
        if sign == "{":
            return self._open(position)
        if sign == "|" and not self.braces:
            self.add(sign)
        elif sign == "|":
            option, after = self._option(after)
            self.branch[-1] = option
            options = self.branch[-2].parts[-1]
            assert isinstance(options, list)
            options.append(option)
        elif self.braces:
            self.branch.pop()
            self.braces.pop()
        else:
            raise PromptError(_lonely("}", position, self.where))
        return after

    def end(self) -> _Option:
        if self.braces:
            raise PromptError(_lonely("{", self.braces[-1], self.where))
        return self.branch[0]

    def _open(self, position: int) -> int:
        if len(self.braces) == MAX_DEPTH:
            raise PromptError(f"{self.where} nests braces more than {MAX_DEPTH} deep; simplify it")
        option, after = self._option(position + 1)
        self.branch[-1].parts.append([option])
        self.branch.append(option)
        self.braces.append(position)
        return after

    def _option(self, position: int) -> tuple[_Option, int]:
        weight, after = _weight(self.text, position, self.where)
        return _Option(weight), after


def _lonely(sign: str, position: int, where: str) -> str:
    return (
        f"{where} has a {sign} without its partner at character {position + 1}; "
        f"add it, or write \\{sign} for a plain brace"
    )


def _weight(text: str, position: int, where: str) -> tuple[float, int]:
    """The weight written at a position, 1 where there is none, and where the option begins."""
    match = _WEIGHT.match(text, position)
    if match is None:
        return 1.0, position
    weight = float(match[1])
    if not math.isfinite(weight):
        raise PromptError(f"{where} has the weight {match[1][:20]}..., expected a smaller number")
    return weight, match.end()


@dataclass
class _Expansion:
    """One prompt on its way, and how much of the bounds it has used."""

    random: random.Random
    read_lines: ReadLines
    choices: int = 0
    characters: int = 0
    lines: dict[str, list[tuple[float, str]]] = field(default_factory=dict)

    def run(self, option: _Option, depth: int = 0) -> str:
        if depth > MAX_DEPTH:
            raise PromptError(
                f"wildcards nest more than {MAX_DEPTH} deep; does a file name itself?"
            )
        return "".join(self._part(part, depth + 1) for part in option.parts)

    def _part(self, part: str | _File | list[_Option], depth: int) -> str:
        if isinstance(part, str):
            self.characters += len(part)
            if self.characters > MAX_CHARACTERS:
                raise PromptError(f"the prompt grows past {MAX_CHARACTERS} characters; shorten it")
            return part
        if isinstance(part, list):
            where = "a choice in braces"
            return self.run(self._choose([(o.weight, o) for o in part], where), depth)
        where = f"the wildcard file {part.name}"
        line = self._choose(self._weighted(part.name, where), where)
        return self.run(_parse(line, where), depth)

    def _weighted(self, name: str, where: str) -> list[tuple[float, str]]:
        if name not in self.lines:
            found = [(line, *_weight(line, 0, where)) for line in self.read_lines(name)]
            self.lines[name] = [(weight, line[start:]) for line, weight, start in found]
        return self.lines[name]

    def _choose(self, options: list, where: str):
        """One of [(weight, value), ...] by a number from random(), alike in every Python."""
        self.choices += 1
        if self.choices > MAX_CHOICES:
            raise PromptError(f"the prompt makes more than {MAX_CHOICES} choices; simplify it")
        total = sum(weight for weight, _ in options)
        if not 0 < total < math.inf:
            raise PromptError(
                f"the weights of {where} add up to {total:g}; expected more than 0, and finite"
            )
        point = self.random.random() * total
        for weight, value in options:
            point -= weight
            if point < 0:
                return value
        return [value for weight, value in options if weight > 0][-1]
