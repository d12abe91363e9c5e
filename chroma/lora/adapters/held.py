"""Frozen dataclasses of tensors that move between devices and dtypes as one."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self", bound="Held")


@dataclass(frozen=True, eq=False)
class Held:
    """Tensors in its fields, in tuples there, and in other instances of this class."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor it holds."""
        for field in fields(self):
            yield from _tensors(getattr(self, field.name))

    def to(self: Self, device: torch.device | str | None, dtype: torch.dtype | None = None) -> Self:
        """The same on another device, or in another dtype; None leaves either as it is."""
        moved = {f.name: _moved(getattr(self, f.name), device, dtype) for f in fields(self)}
        return replace(self, **moved)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Held):
        yield from value.tensors()
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _moved(value: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device=value.device if device is None else device, dtype=dtype)
    if isinstance(value, Held):
        return value.to(device, dtype)
    if isinstance(value, tuple):
        return tuple(_moved(part, device, dtype) for part in value)
    return value
