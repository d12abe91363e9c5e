"""A model file as a source of tensors, read one at a time under their canonical names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import ChromaConfig
from ..errors import CheckpointError
from ..quant.finite import all_finite
from ..text.t5 import T5Config, T5Encoder
from ..transformer import ChromaTransformer
from .container import Checkpoint, open_checkpoint
from .diffusers import transformer_from_diffusers
from .identify import Kind, identify
from .read import find_model
from .reader import TensorInfo
from .recipe import FLOATS

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EMBEDDING, _SECOND_NAME = "shared.weight", "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class Source:
    """A transformer (kind CHROMA) or text encoder (T5) of plain floats.

    parts: {canonical name: {name in the file: name in its layout}} of each tensor.
    """

    checkpoint: Checkpoint
    kind: Kind
    config: ChromaConfig | T5Config
    tensors: Mapping[str, TensorInfo]
    parts: Mapping[str, Mapping[str, str]]

    def read(self, name: str) -> Tensor:
        """The tensor, memory-mapped where the file has it in one piece.

        Raises CheckpointError for NaN, infinity and what cannot be read.
        """
        state = self.checkpoint.read(dict(self.parts[name]))
        pieces = [state[piece] for piece in self.parts[name].values()]
        tensors = [piece for piece in pieces if isinstance(piece, Tensor)]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if not all_finite(tensor):
            raise CheckpointError(
                f"{self.checkpoint.path.name}: {name} holds NaN or infinity; the file is damaged, "
                "download it again"
            )
        return tensor


def open_source(path: Path) -> Source:
    """Find the model in a file or folder, and check from the headers that it is complete.

    Raises CheckpointError for another model, a quantised one, and one with tensors missing.
    """
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors
    found = identify(tensors)
    if found not in (Kind.CHROMA, Kind.CHROMA_DIFFUSERS, Kind.T5):
        raise CheckpointError(
            f"{path.name} is {found.value}, expected a Chroma transformer or a T5 text encoder; "
            "only these are quantised"
        )
    kind = Kind.T5 if found is Kind.T5 else Kind.CHROMA
    layout, names = find_model(checkpoint, kind)
    for name in names:
        if tensors[name].dtype not in FLOATS:
            raise CheckpointError(
                f"{path.name} is quantised already ({name} is {tensors[name].dtype}), expected "
                "bf16, fp16 or fp32; choose the original file"
            )
    parts = _parts(names, layout)
    if _SECOND_NAME in parts:
        second = parts.pop(_SECOND_NAME)
        parts.setdefault(_EMBEDDING, second)
    infos = {name: _joined([tensors[old] for old in olds]) for name, olds in parts.items()}
    state = {name: _empty(info) for name, info in infos.items()}
    try:
        config = (T5Config if kind is Kind.T5 else ChromaConfig).from_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise CheckpointError(
            f"{path.name} has tensors of other shapes than {kind.value}; it is damaged or of "
            "another version"
        ) from None
    _check_complete(path, config, infos)
    return Source(checkpoint, kind, config, infos, parts)


def _parts(names: Mapping[str, str], layout: Kind) -> dict[str, dict[str, str]]:
    """{canonical name: {name in the file: name in its layout}}, the parts in their order."""
    if layout is not Kind.CHROMA_DIFFUSERS:
        return {new: {old: new} for old, new in names.items()}
    olds = list(names)
    # Each tensor is stood in for by its number: a fused matrix comes out as those it is made of.
    numbers = {names[old]: torch.tensor([i]) for i, old in enumerate(olds)}
    parts = {}
    for new, made_of in transformer_from_diffusers(dict(numbers)).items():
        assert isinstance(made_of, Tensor)  # no matrix went in quantised
        parts[new] = {olds[i]: names[olds[i]] for i in made_of.tolist()}
    return parts


def _joined(parts: list[TensorInfo]) -> TensorInfo:
    """What becomes of tensors that are put below each other."""
    first = parts[0]
    if any(part.shape[1:] != first.shape[1:] or not part.shape for part in parts[1:]):
        raise CheckpointError("the parts of a fused matrix differ in width; download it again")
    if len(parts) == 1:
        return first
    dtype = first.dtype if all(part.dtype == first.dtype for part in parts) else "F32"
    return TensorInfo(dtype, (sum(part.shape[0] for part in parts), *first.shape[1:]))


def _empty(info: TensorInfo) -> Tensor:
    return torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")


def _check_complete(
    path: Path, config: ChromaConfig | T5Config, infos: Mapping[str, TensorInfo]
) -> None:
    """Raises CheckpointError unless these are the model's tensors, so that the result loads."""
    try:
        with torch.device("meta"):
            model: nn.Module = (
                ChromaTransformer(config) if isinstance(config, ChromaConfig) else T5Encoder(config)
            )
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path.name} does not fit together: {' '.join(str(error).split())}"
        ) from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted({*wanted, *infos}):
        shape = infos[name].shape if name in infos else None
        if shape != wanted.get(name):
            raise CheckpointError(
                f"{path.name}: {name} has shape {shape}, expected {wanted.get(name)}; the file is "
                "incomplete or of another version, download it again"
            )
