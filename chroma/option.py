"""Options of samplers and schedules, with range and advice, for whoever offers them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One number that a sampler or schedule takes by this name, usable from `low` to `high`.

    It is a whole number where its default is an int.
    """

    name: str
    default: float
    low: float
    high: float
    advice: str

    @property
    def is_whole(self) -> bool:
        return isinstance(self.default, int)


# By the name of the sampler or schedule.
Options = dict[str, tuple[Option, ...]]
