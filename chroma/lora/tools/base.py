"""A model file of any format as the base of a merge or an extraction, parameter by parameter."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.container import Checkpoint, open_checkpoint
from ...checkpoint.diffusers import transformer_from_diffusers
from ...checkpoint.identify import Kind, identify
from ...checkpoint.read import find_model
from ...checkpoint.reader import TensorInfo
from ...checkpoint.stored import Weight, scale_names
from ...config import ChromaConfig
from ...errors import CheckpointError
from ...quant.tensor import QuantTensor
from ...text.t5 import T5Config

EMBEDDING, SECOND_NAME = "shared.weight", "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class Base:
    """A transformer (CHROMA) or a text encoder (T5).

    parts: {parameter key: {name in the file: name in its layout}}, fused matrices having several.
    sides: {name in the file: {name in the file: name in its layout} of its scales and settings}.
    """

    checkpoint: Checkpoint
    kind: Kind
    config: ChromaConfig | T5Config
    parts: Mapping[str, Mapping[str, str]]
    sides: Mapping[str, Mapping[str, str]]

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    def shape(self, key: str) -> tuple[int, ...]:
        """That of the whole parameter."""
        shapes = [self.checkpoint.tensors[name].shape for name in self.parts[key]]
        return _stacked(shapes)

    def read(self, key: str) -> dict[str, Weight]:
        """{name in the file: stored tensor} of a parameter's parts, in the order of their rows."""
        names = dict(self.parts[key])
        wanted = dict(names)
        for name in names:
            wanted |= self.sides[name]
        state = self.checkpoint.read(wanted)
        return {old: state[new] for old, new in names.items()}


def in_fp32(weight: Weight, device: torch.device | str = "cpu") -> Tensor:
    """A stored tensor's values."""
    if isinstance(weight, QuantTensor):
        return weight.to(device).dequantise(torch.float32)
    return weight.to(device, torch.float32)


def whole_in_fp32(parts: Iterable[Weight], device: torch.device | str = "cpu") -> Tensor:
    """The values of a parameter's parts below each other; not a copy of what is fp32 already."""
    values = [in_fp32(part, device) for part in parts]
    return values[0] if len(values) == 1 else torch.cat(values)


def open_base(path: Path) -> Base:
    """Find the model in a file or folder by its headers.

    Raises CheckpointError unless it is a Chroma transformer or a T5 encoder.
    """
    checkpoint = open_checkpoint(path)
    found = identify(checkpoint.tensors)
    if found not in (Kind.CHROMA, Kind.CHROMA_DIFFUSERS, Kind.T5):
        raise CheckpointError(
            f"{path.name} is {found.value}, expected a Chroma transformer or a T5 text encoder"
        )
    kind = Kind.T5 if found is Kind.T5 else Kind.CHROMA
    layout, names = find_model(checkpoint, kind)
    beside = scale_names(names)
    weights = {old: new for old, new in names.items() if old not in beside}
    sides: dict[str, dict[str, str]] = {old: {} for old in weights}
    for old in beside:
        owner = old.rpartition(".")[0] + ".weight"
        if owner in sides:
            sides[owner][old] = names[old]
    parts = _parts(weights, layout)
    config = _config(checkpoint, kind, parts)
    return Base(checkpoint, kind, config, parts, sides)


def _parts(names: Mapping[str, str], layout: Kind) -> dict[str, dict[str, str]]:
    if layout is not Kind.CHROMA_DIFFUSERS:
        return {new: {old: new} for old, new in names.items()}
    olds = list(names)
    # Each tensor is stood in for by its number: a fused matrix comes out as those it is made of.
    numbers: dict[str, Any] = {names[old]: torch.tensor([i]) for i, old in enumerate(olds)}
    return {
        new: {olds[i]: names[olds[i]] for i in made_of.tolist()}
        for new, made_of in transformer_from_diffusers(numbers).items()
        if isinstance(made_of, Tensor)
    }


def _config(
    checkpoint: Checkpoint, kind: Kind, parts: Mapping[str, Mapping[str, str]]
) -> ChromaConfig | T5Config:
    tensors = checkpoint.tensors
    state: dict[str, Any] = {
        key: TensorInfo("", _stacked([tensors[old].shape for old in olds]))
        for key, olds in parts.items()
    }
    if kind is Kind.T5 and SECOND_NAME in state:
        state.setdefault(EMBEDDING, state[SECOND_NAME])
    try:
        return (T5Config if kind is Kind.T5 else ChromaConfig).from_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path.name}: {error}") from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise CheckpointError(
            f"{checkpoint.path.name} has tensors of other shapes than {kind.value}; it is damaged "
            "or of another version"
        ) from None


def _stacked(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    first = shapes[0]
    return first if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *first[1:])
