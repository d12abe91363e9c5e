"""The difference of two checkpoints as a LoRA, read and decomposed one tensor at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint.identify import Kind
from ...config import ChromaConfig
from ...errors import LoraError
from ...quant.tensor import QuantTensor
from ..adapters import Diff
from ..file import Placed
from .base import Base, open_base, whole_in_fp32
from .convert import Written, check_dtype, check_style, write
from .headers import title
from .pack import pack
from .reduce import as_lora
from .rules import RankRule
from .save import check_out
from .spell import COMFYUI, Names
from .svd import Factors, quantile, truncate_matrix

# (parameters done, of how many, the one that was just done)
Progress = Callable[[int, int, str], None]


def extract_lora(
    original: Path,
    tuned: Path,
    out: Path,
    rule: RankRule,
    *,
    clamp_quantile: float = 1.0,
    style: str = COMFYUI,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Written:
    """Write `out`, tuned minus original, with the ranks that `rule` chooses.

    Biases and scales are stored whole, as are matrices whose factors would be larger. Factors are
    clamped to that quantile of their values (sd-scripts: 0.99); 1 leaves them as they are. Any two
    formats will do, in fp32. Memory: one matrix of each, their difference, and the LoRA. Raises a
    ChromaError for files that are not of one model, or are the same.
    """
    if not rule.bounded:
        raise LoraError("nothing says how large the LoRA is to be; expected a rank or an energy")
    if not 0 < clamp_quantile <= 1:
        raise LoraError(
            f"the clamp quantile is {clamp_quantile}, expected more than 0 and at most 1"
        )
    check_dtype(dtype)
    check_style(style)
    check_out(out, [original, tuned])
    first, second = open_base(original), open_base(tuned)
    _check_pair(first, second)
    run = _Extraction(rule, clamp_quantile, dtype, device)
    total = len(first.parts)
    for done, key in enumerate(first.parts, 1):
        run.add(key, first, second)
        if progress is not None:
            progress(done, total, key)
    if not run.found:
        raise LoraError(f"{tuned.name} equals {original.name}; there is nothing to extract")
    parts = (run.found, {}) if first.kind is Kind.CHROMA else ({}, run.found)
    config = first.config if isinstance(first.config, ChromaConfig) else None
    packed = pack(*parts, Names.of(config), style)
    names = title(second.checkpoint.metadata, tuned), title(first.checkpoint.metadata, original)
    metadata = {"modelspec.description": f"{names[0]} minus {names[1]}, by singular values"}
    return write(out, packed, metadata, notes=run.notes())


@dataclass
class _Extraction:
    """What has been found, and what its truncation has lost, in squares."""

    rule: RankRule
    clamp_quantile: float
    dtype: torch.dtype
    device: torch.device | str
    found: dict[str, list[Placed]] = field(default_factory=dict)
    wanted: float = 0.0
    lost: float = 0.0
    quantised: set[str] = field(default_factory=set)

    def add(self, key: str, first: Base, second: Base) -> None:
        """Take up the difference in one parameter, where there is one."""
        difference = self._values(key, second) - self._values(key, first)
        power = _power(difference)
        if power == 0:
            return
        self.wanted += power
        if difference.ndim == 2:
            (factors, error) = truncate_matrix(difference, self.rule)
            if factors.rank * sum(difference.shape) < difference.numel():
                self.lost += power * error**2
                self.found[key] = [Placed(as_lora(self._clamped(factors), self.dtype))]
                return
        self.found[key] = [Placed(Diff(difference.to("cpu", self.dtype)))]

    def _values(self, key: str, base: Base) -> Tensor:
        """The parameter in fp32."""
        parts = base.read(key).values()
        if any(isinstance(part, QuantTensor) for part in parts):
            self.quantised.add(base.path.name)
        return whole_in_fp32(parts, self.device)

    def _clamped(self, factors: Factors) -> Factors:
        if self.clamp_quantile == 1:
            return factors
        both = torch.cat((factors.up.flatten(), factors.down.flatten()))
        limit = abs(quantile(both, self.clamp_quantile))
        return Factors(factors.up.clamp(-limit, limit), factors.down.clamp(-limit, limit))

    def notes(self) -> list[str]:
        share = math.sqrt(self.lost / self.wanted)
        notes = [f"{len(self.found)} parameters differ; the truncation lost {share:.2%} of it"]
        notes += [
            f"{name} is quantised: its rounding errors are part of the difference"
            for name in sorted(self.quantised)
        ]
        return notes


def _power(tensor: Tensor) -> float:
    """The sum of squares; parts of the tensor at a time in fp64."""
    return sum(float(part.double().square().sum()) for part in tensor.split(1024))


def _check_pair(first: Base, second: Base) -> None:
    """Raise LoraError unless both have the same parameters in the same shapes."""
    names = f"{first.path.name} and {second.path.name}"
    if first.kind is not second.kind:
        raise LoraError(f"{names} are {first.kind.value} and {second.kind.value}")
    only = sorted(first.parts.keys() ^ second.parts.keys())
    if only:
        raise LoraError(f"{names} differ in {only[0]}, which only one of them has")
    for key in first.parts:
        if first.shape(key) != second.shape(key):
            raise LoraError(
                f"{names} are of different sizes: {key} is {first.shape(key)} and "
                f"{second.shape(key)}; expected two versions of one model"
            )
