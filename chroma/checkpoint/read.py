"""A file on disk to a configuration and a canonical state dict: checked, memory-mapped."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..autoencoder import AutoencoderConfig
from ..config import ChromaConfig
from ..errors import CheckpointError
from ..out_of_memory import is_out_of_memory
from ..quant.tensor import QuantTensor
from ..text.t5 import T5Config
from .container import Checkpoint, open_checkpoint
from .diffusers import autoencoder_from_diffusers, transformer_from_diffusers
from .identify import Kind, identify
from .keys import (
    AUTOENCODER_PARTS,
    DIFFUSERS_AUTOENCODER_PARTS,
    DIFFUSERS_TRANSFORMER_PARTS,
    T5_PARTS,
    TRANSFORMER_PARTS,
    belonging,
)
from .reader import TensorInfo
from .stored import State

log = logging.getLogger("chroma")
Config = TypeVar("Config")
Convert = Callable[[Any], Any]

ADVICE = {
    Kind.CHROMA: "choose Chroma1-HD.safetensors or another Chroma file",
    Kind.T5: "choose t5xxl_fp16.safetensors or another T5 v1.1 XXL file",
    Kind.AUTOENCODER: "choose ae.safetensors, the autoencoder of Flux",
}
# For each kind wanted: the layouts it is found in, their tensors, and the way to canonical names.
LAYOUTS: dict[Kind, dict[Kind, tuple[tuple[str, ...], Convert]]] = {
    Kind.CHROMA: {
        Kind.CHROMA: (TRANSFORMER_PARTS, dict),
        Kind.CHROMA_DIFFUSERS: (DIFFUSERS_TRANSFORMER_PARTS, transformer_from_diffusers),
    },
    Kind.T5: {Kind.T5: (T5_PARTS, dict)},
    Kind.AUTOENCODER: {
        Kind.AUTOENCODER: (AUTOENCODER_PARTS, dict),
        Kind.AUTOENCODER_DIFFUSERS: (DIFFUSERS_AUTOENCODER_PARTS, autoencoder_from_diffusers),
    },
}
# Radiance has Chroma's blocks around other ends; the checkpoints of the others hold an autoencoder
# of their own, which in SD3's case has the shapes of Flux'.
LOOKALIKES = {Kind.CHROMA: (Kind.RADIANCE,), Kind.AUTOENCODER: (Kind.SD, Kind.SDXL, Kind.SD3)}


# Tensors of Flux that Chroma's approximator replaces, which some early files still carry.
_LEFTOVERS = re.compile(
    r"time_in\.|vector_in\.|guidance_in\.|final_layer\.adaLN_modulation\.|"
    r"(double|single)_blocks\.\d+\.(img_mod|txt_mod|modulation)\."
)


def read_transformer(path: Path) -> tuple[ChromaConfig, State]:
    """Config and canonical state dict of a Chroma transformer. Raises CheckpointError."""
    state = read_state(path, Kind.CHROMA)
    return _configure(path, ChromaConfig.from_state_dict, state), state


def read_text_encoder(path: Path) -> tuple[T5Config, State]:
    """Config and canonical state dict of a T5 v1.1 encoder. Raises CheckpointError."""
    state = read_state(path, Kind.T5)
    # Many files hold the embedding under a second name as well.
    embedding = state.pop("encoder.embed_tokens.weight", None)
    if embedding is not None:
        state.setdefault("shared.weight", embedding)
    return _configure(path, T5Config.from_state_dict, state), state


def read_autoencoder(path: Path) -> tuple[AutoencoderConfig, dict[str, Tensor]]:
    """Config and canonical state dict of a Flux autoencoder. Raises CheckpointError."""
    state = plain(read_state(path, Kind.AUTOENCODER), torch.bfloat16)
    return _configure(path, AutoencoderConfig.from_state_dict, state), state


def is_plain(state: State) -> bool:
    """Whether no matrix is quantised."""
    return all(isinstance(weight, Tensor) for weight in state.values())


def plain(state: State, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict with every quantised matrix de-quantised to `dtype`."""
    return {
        name: weight.dequantise(dtype) if isinstance(weight, QuantTensor) else weight
        for name, weight in state.items()
    }


def expanded(state: State, dtype: torch.dtype, free: int, path: Path) -> State:
    """The state dict in `dtype` if that needs no more than `free` bytes, else as it is stored.

    What does not fit is said in a warning.
    """
    if is_plain(state):
        return state
    needed = sum(weight.numel() for weight in state.values()) * dtype.itemsize
    if needed <= free:
        return dict(plain(state, dtype))
    log.warning(
        "%s stays quantised: in %s it needs %.1f GB and %.1f GB are free.",
        path.name, str(dtype).removeprefix("torch."), needed / 1e9, free / 1e9,
    )  # fmt: skip
    return state


def read_state(path: Path, wanted: Kind) -> State:
    """Canonical state dict of one model in a file, which may hold other models beside it.

    Raises CheckpointError for a file without that model, and for one that does not fit together.
    """
    checkpoint = open_checkpoint(path)
    layout, names = find_model(checkpoint, wanted)
    try:
        return LAYOUTS[wanted][layout][1](checkpoint.read(names))
    except (RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError) or is_out_of_memory(error):
            raise
        raise misshapen(path, error) from None


def configure(checkpoint: Checkpoint, kind: Kind) -> Any:
    """The configuration that the header of a file in the original layout states, else None."""
    readers: dict[Kind, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
        Kind.CHROMA: (TRANSFORMER_PARTS, ChromaConfig.from_state_dict),
        Kind.T5: (T5_PARTS, T5Config.from_state_dict),
        Kind.AUTOENCODER: (AUTOENCODER_PARTS, AutoencoderConfig.from_state_dict),
    }
    if kind not in readers:
        return None
    parts, read = readers[kind]
    tensors = checkpoint.tensors
    shapes = {short: tensors[name] for name, short in belonging(tensors, parts).items()}
    return _configure(checkpoint.path, read, shapes)


def find_model(checkpoint: Checkpoint, wanted: Kind) -> tuple[Kind, dict[str, str]]:
    """The layout of a model in a file, and {name in the file: its name in that layout}.

    Raises CheckpointError for a file without that model, and for a header that makes no sense.
    """
    stored = checkpoint.tensors
    found = identify(stored)
    for layout, (parts, _) in LAYOUTS[wanted].items():
        names = {
            name: short
            for name, short in belonging(stored, parts).items()
            if not (wanted is Kind.CHROMA and _LEFTOVERS.match(short))
        }
        tensors = {name: stored[name] for name in names}
        if identify(tensors) is layout and found not in LOOKALIKES.get(wanted, ()):
            _check_header(checkpoint.path, tensors, names.values())
            return layout, names
    raise CheckpointError(
        f"{checkpoint.path.name} is {found.value}, expected {wanted.value}; {ADVICE[wanted]}"
    )


def _check_header(path: Path, tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> None:
    for name, info in tensors.items():
        if 0 in info.shape:
            raise misshapen(path, f"{name} is empty")
    # A block numbered 1000000000 would make a model of as many blocks.
    for name in names:
        for number in re.findall(r"\.(\d+)\.", name):
            if int(number) >= len(tensors):
                raise misshapen(path, f"{name} is numbered beyond its {len(tensors)} tensors")


def misshapen(path: Path, why: object) -> CheckpointError:
    """The error for a file whose parts do not fit together."""
    reason = " ".join(str(why).split())
    return CheckpointError(
        f"{path.name} does not fit together: {reason}; it is damaged or of another version"
    )


def _configure(path: Path, read: Callable[[Any], Config], state: Mapping[str, Any]) -> Config:
    try:
        return read(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise misshapen(path, "a tensor that decides the widths has too few axes") from None
