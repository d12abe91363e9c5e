"""A file on disk to a ready module: checked, strict, memory-mapped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..autoencoder import Autoencoder, AutoencoderConfig
from ..config import ChromaConfig
from ..errors import CheckpointError
from ..text.t5 import T5Config, T5Encoder
from ..transformer import ChromaTransformer
from .identify import Kind, identify, quantisation
from .keys import AUTOENCODER_PARTS, T5_PARTS, TRANSFORMER_PARTS, belonging
from .reader import Header, read_header, read_tensors

Model = TypeVar("Model", bound=nn.Module)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ADVICE = {
    Kind.CHROMA: "choose Chroma1-HD.safetensors or another Chroma file",
    Kind.T5: "choose t5xxl_fp16.safetensors or another T5 v1.1 XXL file",
    Kind.AUTOENCODER: "choose ae.safetensors, the autoencoder of Flux",
}


def read_transformer(path: Path) -> tuple[ChromaConfig, dict[str, Tensor]]:
    """Config and canonical state dict of a Chroma transformer. Raises CheckpointError."""
    header = open_as(path, Kind.CHROMA)
    state = read_tensors(header, belonging(header.tensors, TRANSFORMER_PARTS))
    return _configure(path, ChromaConfig.from_state_dict, state), state


def read_text_encoder(path: Path) -> tuple[T5Config, dict[str, Tensor]]:
    """Config and canonical state dict of a T5 v1.1 encoder. Raises CheckpointError."""
    header = open_as(path, Kind.T5)
    state = read_tensors(header, belonging(header.tensors, T5_PARTS))
    # Many files hold the embedding under a second name as well.
    embedding = state.pop("encoder.embed_tokens.weight", None)
    if embedding is not None:
        state.setdefault("shared.weight", embedding)
    return _configure(path, T5Config.from_state_dict, state), state


def read_autoencoder(path: Path) -> tuple[AutoencoderConfig, dict[str, Tensor]]:
    """Config and canonical state dict of a Flux autoencoder. Raises CheckpointError."""
    header = open_as(path, Kind.AUTOENCODER)
    state = read_tensors(header, belonging(header.tensors, AUTOENCODER_PARTS))
    config = _configure(path, AutoencoderConfig.from_state_dict, state)
    if config.latent_channels != 16:
        raise CheckpointError(
            f"{path.name} has {config.latent_channels} latent channels, expected 16; "
            f"{ADVICE[Kind.AUTOENCODER]}"
        )
    return config, state


def load_transformer(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    operations: Any = nn,
) -> ChromaTransformer:
    """A transformer ready to run, in the file's own dtype unless one is given."""
    config, state = read_transformer(path)
    with torch.device("meta"):
        model = ChromaTransformer(config, operations)
    return fill(model, state, path, dtype, device)


def load_text_encoder(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    operations: Any = nn,
) -> T5Encoder:
    """A T5 encoder ready to run, in the file's own dtype unless one is given."""
    config, state = read_text_encoder(path)
    with torch.device("meta"):
        model = T5Encoder(config, operations)
    return fill(model, state, path, dtype, device)


def load_autoencoder(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    operations: Any = nn,
) -> Autoencoder:
    """An autoencoder ready to run, in the file's own dtype unless one is given."""
    config, state = read_autoencoder(path)
    with torch.device("meta"):
        model = Autoencoder(config, operations)
    return fill(model, state, path, dtype, device)


def open_as(path: Path, expected: Kind) -> Header:
    """The header of a file that is of the expected kind with plain weights, else an error."""
    header = read_header(path)
    found = identify(header.tensors)
    if found is not expected:
        raise CheckpointError(
            f"{path.name} is {found.value}, expected {expected.value}; {ADVICE[expected]}"
        )
    if (format_name := quantisation(header.tensors)) is not None:
        raise CheckpointError(
            f"{path.name} is in {format_name}, expected bf16, fp16 or fp32; "
            f"{ADVICE[expected]} in one of these"
        )
    return header


def _configure(path: Path, read: Any, state: Mapping[str, Tensor]) -> Any:
    try:
        return read(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from None


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
        # One reduction instead of a mask as large as the tensor: NaN and infinity survive a sum.
        if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
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
    """Give a model on the meta device its weights, without a second copy where none is needed."""
    check_state(model, state, path)
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
