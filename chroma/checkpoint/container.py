"""Open any model file or folder: one view of what is in it, whichever container it is in."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quant.gguf_formats import GGUF_FORMATS, is_decodable
from ..quant.tensor import QuantTensor
from .gguf import GGUFHeader, map_tensors, read_gguf_header, t5_name
from .reader import Header, TensorInfo, read_header, read_tensors
from .stored import State, assemble, marked, weight_only

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})$")
# The files that diffusers' and transformers' folders hold, in the order they are looked for.
_FOLDER_FILES = (
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
)


class Checkpoint(Protocol):
    """The tensors of a model file by name, and how to get them."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> dict[str, TensorInfo]: ...

    @property
    def metadata(self) -> dict[str, str]: ...

    def read(self, names: dict[str, str]) -> State:
        """{name in the file: canonical name} to memory-mapped tensors. Raises CheckpointError."""
        ...


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """One safetensors file, or the parts of a model that was split over several."""

    path: Path
    parts: tuple[Header, ...]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: info for part in self.parts for name, info in part.tensors.items()}

    @property
    def metadata(self) -> dict[str, str]:
        return {key: text for part in self.parts for key, text in part.metadata.items()}

    def read(self, names: dict[str, str]) -> State:
        tensors: dict[str, Tensor] = {}
        markers: dict[str, Tensor] = {}
        for part in self.parts:
            wanted = {old: new for old, new in names.items() if old in part.tensors}
            tensors |= read_tensors(part, wanted)
            stems = {old.removesuffix(new) for old, new in wanted.items()}
            found = [name for name in part.tensors if marked(name) in stems]
            markers |= read_tensors(part, dict(zip(found, found, strict=True)))
        try:
            return assemble(tensors, self.metadata, weight_only(markers))
        except CheckpointError as error:
            raise CheckpointError(f"{self.path.name}: {error}") from None


@dataclass(frozen=True)
class GGUFCheckpoint:
    """A GGUF file; llama.cpp's names of T5's tensors appear as Hugging Face's."""

    path: Path
    header: GGUFHeader

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        named = {self._name(name): tensor for name, tensor in self.header.tensors.items()}
        return {
            name: TensorInfo(tensor.type_name, tensor.shape)
            for name, tensor in named.items()
            if name is not None
        }

    @property
    def metadata(self) -> dict[str, str]:
        return {key: str(value) for key, value in self.header.metadata.items()}

    def _name(self, name: str) -> str | None:
        llama = name.startswith(("enc.", "dec.")) or name == "token_embd.weight"
        return t5_name(name) if llama else name

    def read(self, names: dict[str, str]) -> State:
        here = {self._name(name): name for name in self.header.tensors}
        stored = map_tensors(self.header, {here[old]: new for old, new in names.items()})
        infos = {new: self.header.tensors[here[old]] for old, new in names.items()}
        state: State = {}
        for name, data in stored.items():
            type_name, shape = infos[name].type_name, infos[name].shape
            if data.is_floating_point():
                state[name] = data
                continue
            if type_name not in GGUF_FORMATS:
                raise CheckpointError(
                    f"{self.path.name}: {name} is in {type_name}, which is not read here; "
                    "expected Q8_0 or another common GGUF type, so choose that version"
                )
            if not is_decodable(type_name):
                raise CheckpointError(
                    f"{self.path.name}: {name} is in {type_name}, which needs a recent package "
                    "gguf; run 'python -m pip install -U gguf' with the Python of ComfyUI, or "
                    "choose a version in Q8_0"
                )
            rows = data.shape[0]
            columns = shape[-1] if shape else 1
            matrix = QuantTensor(GGUF_FORMATS[type_name], data, None, (rows, columns))
            flat = len(shape) == 2
            state[name] = matrix if flat else matrix.dequantise(torch.bfloat16).reshape(shape)
        return state


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its name."""
    return path.suffix.lower() == ".gguf"


def open_checkpoint(path: Path) -> Checkpoint:
    """The file, GGUF or safetensors, or the folder of a model in parts. Raises CheckpointError."""
    if path.is_dir():
        path = _in_folder(path)
    if is_gguf(path):
        return GGUFCheckpoint(path, read_gguf_header(path))
    if path.name.endswith(".index.json"):
        return _indexed(path)
    if (match := _SHARD.match(path.stem)) is not None:
        count = int(match[3])
        stems = [f"{match[1]}-{i:05}-of-{match[3]}" for i in range(1, count + 1)]
        return _join(path, [path.with_name(stem + path.suffix) for stem in stems])
    return SafetensorsCheckpoint(path, (read_header(path),))


def _in_folder(folder: Path) -> Path:
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"the folder {folder.name} holds no model; expected {_FOLDER_FILES[2]} or its parts, so "
        "choose the folder 'transformer' or 'text_encoder' of the download, or a single file"
    )


def _indexed(path: Path) -> SafetensorsCheckpoint:
    try:
        names = set(json.loads(path.read_text("utf-8"))["weight_map"].values())
        files = sorted(path.with_name(Path(name).name) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{path.name} is damaged: it does not list the parts of a model; download it again"
        ) from None
    return _join(path, files)


def _join(path: Path, files: list[Path]) -> SafetensorsCheckpoint:
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise CheckpointError(
            f"{path.name} is part of a model of {len(files)} files, of which {len(missing)} are "
            f"missing ({', '.join(missing[:3])}); download them into the same folder"
        )
    parts = tuple(read_header(file) for file in files)
    seen: set[str] = set()
    for part in parts:
        if twice := seen.intersection(part.tensors):
            raise CheckpointError(
                f"{part.path.name} repeats {min(twice)} of another part; download the parts again"
            )
        seen.update(part.tensors)
    return SafetensorsCheckpoint(path, parts)
