"""How many singular values to keep: by count, or by what they amount to.

The three measures of `resize` are those of kohya-ss/sd-scripts' resize_lora.py, so that the same
number gives the same rank.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import LoraError


@dataclass(frozen=True)
class RankRule:
    """The smallest rank that satisfies one measure, `rank` being the most; without either, all.

    sv_ratio: keep the values above the largest divided by this. sv_fro: the part of the Frobenius
    norm to reach. sv_cumulative: the part of the values' sum to reach. energy: the part of the
    squared Frobenius norm to reach, sv_fro squared. Raises LoraError for numbers out of range and
    for two measures.
    """

    rank: int | None = None
    sv_ratio: float | None = None
    sv_fro: float | None = None
    sv_cumulative: float | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise LoraError(f"rank is {self.rank}, expected 1 or more")
        if self.sv_ratio is not None and not 1 <= self.sv_ratio < math.inf:
            raise LoraError(f"sv_ratio is {self.sv_ratio}, expected 1 or more, such as 20")
        parts = {"sv_fro": self.sv_fro, "sv_cumulative": self.sv_cumulative, "energy": self.energy}
        for name, part in parts.items():
            if part is not None and not 0 < part <= 1:
                raise LoraError(f"{name} is {part}, expected more than 0 and at most 1")
        given = [name for name, part in parts.items() if part is not None]
        if len(given) + (self.sv_ratio is not None) > 1:
            raise LoraError("expected one measure only: sv_ratio, sv_fro, sv_cumulative or energy")

    @property
    def counts_only(self) -> bool:
        """Whether the rank is known before the singular values are."""
        measures = (self.sv_ratio, self.sv_fro, self.sv_cumulative, self.energy)
        return self.rank is not None and all(measure is None for measure in measures)

    @property
    def bounded(self) -> bool:
        """Whether anything is asked for at all."""
        return self != RankRule()

    def choose(self, values: Tensor) -> int:
        """The rank, from 1 to their number, for singular values (n,) in falling order."""
        values = values.double()
        most = len(values) if self.rank is None else min(self.rank, len(values))
        if self.sv_ratio is not None:
            wanted = int((values > values[0] / self.sv_ratio).sum())
        elif self.sv_fro is not None:
            wanted = _reaching(values.square(), self.sv_fro**2)
        elif self.energy is not None:
            wanted = _reaching(values.square(), self.energy)
        elif self.sv_cumulative is not None:
            wanted = _reaching(values, self.sv_cumulative)
        else:
            wanted = most
        return max(1, min(wanted, most))


def _reaching(parts: Tensor, share: float) -> int:
    """How many of the parts it takes to reach a share of their sum."""
    sums = parts.cumsum(0)
    return int(torch.searchsorted(sums, sums[-1] * share)) + 1
