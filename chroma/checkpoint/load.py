"""A file on disk to a ready module: checked, strict, memory-mapped."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..autoencoder import Autoencoder, AutoencoderConfig
from ..config import ChromaConfig
from ..errors import CheckpointError
from ..text.t5 import T5Config, T5Encoder
from ..transformer import ChromaTransformer
from .diffusers import autoencoder_from_diffusers, transformer_from_diffusers
from .identify import Kind, identify, quantisation
from .keys import (
    AUTOENCODER_PARTS,
    DIFFUSERS_AUTOENCODER_PARTS,
    DIFFUSERS_TRANSFORMER_PARTS,
    T5_PARTS,
    TRANSFORMER_PARTS,
    belonging,
)
from .reader import TensorInfo, read_header, read_tensors

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")
Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
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


def read_transformer(path: Path) -> tuple[ChromaConfig, dict[str, Tensor]]:
    """Config and canonical state dict of a Chroma transformer. Raises CheckpointError."""
    state = read_state(path, Kind.CHROMA)
    return _configure(path, ChromaConfig.from_state_dict, state), state


def read_text_encoder(path: Path) -> tuple[T5Config, dict[str, Tensor]]:
    """Config and canonical state dict of a T5 v1.1 encoder. Raises CheckpointError."""
    state = read_state(path, Kind.T5)
    # Many files hold the embedding under a second name as well.
    embedding = state.pop("encoder.embed_tokens.weight", None)
    if embedding is not None:
        state.setdefault("shared.weight", embedding)
    return _configure(path, T5Config.from_state_dict, state), state


def read_autoencoder(path: Path) -> tuple[AutoencoderConfig, dict[str, Tensor]]:
    """Config and canonical state dict of a Flux autoencoder. Raises CheckpointError."""
    state = read_state(path, Kind.AUTOENCODER)
    return _configure(path, AutoencoderConfig.from_state_dict, state), state


def load_transformer(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    operations: Any = nn,
) -> ChromaTransformer:
    """A transformer ready to run, in the file's own dtype unless one is given."""
    config, state = read_transformer(path)
    return fill(_build(path, ChromaTransformer, config, operations), state, path, dtype, device)


def load_text_encoder(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    operations: Any = nn,
) -> T5Encoder:
    """A T5 encoder ready to run, in the file's own dtype unless one is given."""
    config, state = read_text_encoder(path)
    return fill(_build(path, T5Encoder, config, operations), state, path, dtype, device)


def load_autoencoder(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    operations: Any = nn,
) -> Autoencoder:
    """An autoencoder ready to run, in the file's own dtype unless one is given."""
    config, state = read_autoencoder(path)
    return fill(_build(path, Autoencoder, config, operations), state, path, dtype, device)


def read_state(path: Path, wanted: Kind) -> dict[str, Tensor]:
    """Canonical state dict of one model in a file, which may hold other models beside it.

    Raises CheckpointError for a file without that model, and for one with quantised weights.
    """
    header = read_header(path)
    found = identify(header.tensors)
    for layout, (parts, convert) in LAYOUTS[wanted].items():
        names = belonging(header.tensors, parts)
        tensors = {name: header.tensors[name] for name in names}
        if identify(tensors) is layout and found not in LOOKALIKES.get(wanted, ()):
            _check_header(path, tensors, names.values(), wanted)
            try:
                return convert(read_tensors(header, names))
            except RuntimeError as error:
                raise _misshapen(path, error) from None
    raise CheckpointError(
        f"{path.name} is {found.value}, expected {wanted.value}; {ADVICE[wanted]}"
    )


def _check_header(
    path: Path, tensors: Mapping[str, TensorInfo], names: Iterable[str], wanted: Kind
) -> None:
    if (format_name := quantisation(tensors)) is not None:
        raise CheckpointError(
            f"{path.name} is in {format_name}, expected bf16, fp16 or fp32; "
            f"{ADVICE[wanted]} in one of these"
        )
    for name, info in tensors.items():
        if 0 in info.shape:
            raise _misshapen(path, f"{name} is empty")
    # A block numbered 1000000000 would make a model of as many blocks.
    for name in names:
        for number in re.findall(r"\.(\d+)\.", name):
            if int(number) >= len(tensors):
                raise _misshapen(path, f"{name} is numbered beyond its {len(tensors)} tensors")


def _misshapen(path: Path, why: object) -> CheckpointError:
    reason = " ".join(str(why).split())
    return CheckpointError(
        f"{path.name} does not fit together: {reason}; it is damaged or of another version"
    )


def _configure(
    path: Path, read: Callable[[Mapping[str, Tensor]], Config], state: Mapping[str, Tensor]
) -> Config:
    try:
        return read(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise _misshapen(path, "a tensor that decides the widths has too few axes") from None


def _build(
    path: Path, model: Callable[[Config, Any], Model], config: Config, operations: Any
) -> Model:
    """The model without memory for its weights, which come out of the file."""
    try:
        with torch.device("meta"):
            return model(config, operations)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise _misshapen(path, error) from None


def check_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError unless names, shapes and values are what the model needs."""
    wanted = model.state_dict()
    for what, names, remedy in (
        ("lacks", [n for n in wanted if n not in state], "download it again"),
        ("has unknown", [n for n in state if n not in wanted], "it is of another version"),
    ):
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise CheckpointError(f"{path.name} {what} {len(names)} tensors ({shown}); {remedy}")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{path.name}: {name} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(wanted[name].shape)}; the file is damaged or of another version"
            )
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{path.name}: {name} is {tensor.dtype}, expected bf16, fp16 or fp32; "
                "download the file again"
            )
        # The extremes instead of a mask as large as the tensor: NaN becomes both of them.
        if not bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
            raise CheckpointError(
                f"{path.name}: {name} holds NaN or infinity; the file is damaged, download it again"
            )


def fill(
    model: Model,
    state: dict[str, Tensor],
    path: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Model:
    """Give a model on the meta device its weights, without a second copy where none is needed.

    A file of several dtypes is loaded in that of most of its weights, unless one is given.
    """
    check_state(model, state, path)
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        sizes[tensor.dtype] += tensor.numel()
    dtype = dtype or sizes.most_common(1)[0][0]
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
