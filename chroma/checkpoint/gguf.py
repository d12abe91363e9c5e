"""Open a GGUF file without trusting it: the header is checked before any tensor is read.

Format: magic, version, the counts of tensors and keys; keys with typed values; tensors as (name,
dimensions, type, offset); padding; data (ggml-org/ggml, docs/gguf.md). Arrays, which hold a
tokenizer's whole vocabulary, are located and skipped: they are read only when asked for.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CheckpointError
from ..quant.ggml_types import GGML_TYPES
from .gguf_cursor import Cursor
from .reader import damaged

# Bounds far above any real file, so that a lying header costs little time and memory.
MAX_COUNT = 100_000
MAX_ELEMENTS = 10**12
MAX_AXES = 4
_MAX_NESTING = 4
_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT = "general.alignment", 32
_VERSIONS = (2, 3)
# The least bytes that a key (empty name, a type, one byte) and a tensor without axes take.
_MIN_KEY, _MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8

_NAMES = {kind.number: name for name, kind in GGML_TYPES.items()}
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
# Numbers of the value types: the struct codes of the scalars, and those of varying length.
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# What is saved under a model's name by mistake.
_IMPOSTORS = {
    b"version https://git-lfs": "a Git LFS pointer without the model",
    b"PK\x03\x04": "a zip or pickle file",
    b"<": "a web page",
}


@dataclass(frozen=True)
class GGUFArray:
    """Where an array is: the number of its elements' type, how many, and its first byte."""

    element_type: int
    count: int
    offset: int


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: GGML's type name, the shape with rows last as in torch, and its bytes' place.

    `offset` counts from the start of the file.
    """

    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """The tensors in one file, its scalar metadata, and where its arrays are."""

    path: Path
    tensors: dict[str, GGUFTensor]
    metadata: dict[str, int | float | bool | str]
    arrays: dict[str, GGUFArray]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read and check the header alone; time and memory are bounded whatever the file claims.

    Raises CheckpointError for a missing file, another format or version, or a damaged one.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; check the name and the folder")
    try:
        size = path.stat().st_size
        if size == 0:
            raise CheckpointError(f"{path.name} is empty; download it again")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(Cursor(path, data))
    except OSError as error:
        raise _unreadable(path, error) from None


def read_array(header: GGUFHeader, key: str) -> list[str] | NDArray[Any]:
    """The values of one array: a list of texts, or numbers (count,) of the file's dtype.

    Raises CheckpointError if the file has no such array, or one of arrays.
    """
    if key not in header.arrays:
        raise CheckpointError(
            f"{header.path.name} lacks the array {key}; choose another version of the model"
        )
    array = header.arrays[key]
    kind, count, offset = array.element_type, array.count, array.offset
    if kind == _ARRAY:
        raise damaged(header.path, f"{key} is an array of arrays, expected texts or numbers")
    try:
        with header.path.open("rb") as file:
            if kind == _STRING:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    cursor = Cursor(header.path, data, offset)
                    return [cursor.string() for _ in range(count)]
            file.seek(offset)
            values = np.fromfile(file, _SCALARS[kind], count)
    except (OSError, ValueError) as error:
        raise _unreadable(header.path, error) from None
    if len(values) < count:
        raise damaged(header.path, f"{key} has {len(values)} of {count} values")
    return values


def map_tensors(header: GGUFHeader, names: dict[str, str]) -> dict[str, Tensor]:
    """The named tensors, memory-mapped, under new names: {name in the file: new name}.

    Floats and integers have their dtype and shape; a type of blocks gives its bytes, uint8
    (rows, bytes of a row). Writing to them does not change the file. Raises CheckpointError.
    """
    try:
        data = np.memmap(header.path, np.uint8, mode="c")
    except (OSError, ValueError) as error:
        raise _unreadable(header.path, error) from None
    tensors = {}
    for old, new in names.items():
        info = header.tensors[old]
        end = info.offset + info.nbytes
        if end > len(data):
            raise _incomplete(header.path, len(data), end)
        stored = torch.from_numpy(data[info.offset : end])
        dtype = _DTYPES.get(info.type_name)
        if dtype is None:
            tensors[new] = stored.view(math.prod(info.shape[:-1]), -1)
            continue
        if stored.data_ptr() % dtype.itemsize:
            stored = stored.clone()
        tensors[new] = stored.view(dtype).view(info.shape)
    return tensors


def _parse(cursor: Cursor) -> GGUFHeader:
    path = cursor.path
    _check_start(cursor)
    tensor_count = _count(cursor, "tensors")
    key_count = _count(cursor, "keys")
    if tensor_count * _MIN_TENSOR + key_count * _MIN_KEY > cursor.size - cursor.position:
        raise damaged(
            path,
            f"it claims {tensor_count} tensors and {key_count} keys in {cursor.size} bytes",
        )
    metadata, arrays = _metadata(cursor, key_count)
    found: dict[str, GGUFTensor] = {}
    for _ in range(tensor_count):
        name = cursor.name()
        if name in found:
            raise damaged(path, f"it has two tensors {name}")
        found[name] = _tensor(cursor, name)
    alignment = _alignment(path, metadata, arrays)
    start = -(-cursor.position // alignment) * alignment
    tensors = {
        name: GGUFTensor(t.type_name, t.shape, start + t.offset, t.nbytes)
        for name, t in found.items()
    }
    _check_places(path, tensors, start, alignment, cursor.size)
    return GGUFHeader(path, tensors, metadata, arrays)


def _check_start(cursor: Cursor) -> None:
    """Magic and version."""
    path, start = cursor.path, cursor.data[:24]
    if start[:4] != b"GGUF":
        text = start.lstrip()
        found = next((what for magic, what in _IMPOSTORS.items() if text.startswith(magic)), None)
        raise CheckpointError(
            f"{path.name} is not a GGUF file{f' but {found}' if found else ''}: it starts with "
            f"{start[:8]!a}, expected b'GGUF'; download it again"
        )
    cursor.skip(4)
    version = cursor.number("<I")
    if version in _VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
        raise CheckpointError(
            f"{path.name} is a big-endian GGUF file, which is not read here; expected "
            "little-endian, so choose the version for PCs"
        )
    raise CheckpointError(
        f"{path.name} has GGUF version {version}, expected 2 or 3; choose another file of the model"
    )


def _count(cursor: Cursor, what: str) -> int:
    count = cursor.number("<Q")
    if count > MAX_COUNT:
        raise damaged(cursor.path, f"its header claims {count} {what}")
    return count


def _metadata(
    cursor: Cursor, count: int
) -> tuple[dict[str, int | float | bool | str], dict[str, GGUFArray]]:
    """The scalars by key, and the places of the arrays."""
    metadata: dict[str, int | float | bool | str] = {}
    arrays: dict[str, GGUFArray] = {}
    for _ in range(count):
        key = cursor.name()
        if key in metadata or key in arrays:
            raise damaged(cursor.path, f"it states {key} twice")
        kind = cursor.number("<I")
        if kind == _ARRAY:
            arrays[key] = _skip_array(cursor, key)
        elif kind == _STRING:
            metadata[key] = cursor.string()
        elif kind in _SCALARS:
            metadata[key] = cursor.number(_SCALARS[kind])
        else:
            raise damaged(cursor.path, f"{key} has the unknown value type {kind}")
    return metadata, arrays


def _skip_array(cursor: Cursor, key: str, nesting: int = 1) -> GGUFArray:
    kind, count = cursor.number("<I"), cursor.number("<Q")
    array = GGUFArray(kind, count, cursor.position)
    if kind in _SCALARS:
        cursor.skip(count * struct.calcsize(_SCALARS[kind]))
    elif kind == _STRING:
        cursor.skip_strings(count)
    elif kind == _ARRAY and nesting < _MAX_NESTING:
        for _ in range(count):
            _skip_array(cursor, key, nesting + 1)
    else:
        what = "is nested too deep" if kind == _ARRAY else f"has the unknown value type {kind}"
        raise damaged(cursor.path, f"the array {key} {what}")
    return array


def _tensor(cursor: Cursor, name: str) -> GGUFTensor:
    """What the header says of one tensor; its offset still counts from the start of the data."""
    path, axes = cursor.path, cursor.number("<I")
    if axes > MAX_AXES:
        raise damaged(path, f"{name} has {axes} axes, expected at most {MAX_AXES}")
    shape = tuple(cursor.number("<Q") for _ in range(axes))[::-1]
    number, offset = cursor.number("<I"), cursor.number("<Q")
    if number not in _NAMES:
        raise CheckpointError(
            f"{path.name}: {name} is stored in type number {number}, which is not known here; "
            "choose the model's Q8_0 version"
        )
    type_name = _NAMES[number]
    _, block, block_bytes = GGML_TYPES[type_name]
    elements = math.prod(shape)
    if not 0 < elements <= MAX_ELEMENTS:
        raise damaged(path, f"{name} cannot have the shape {shape}")
    if (shape[-1] if shape else 1) % block:
        raise damaged(
            path, f"the rows of {name}, {shape}, do not fill the blocks of {block} of {type_name}"
        )
    return GGUFTensor(type_name, shape, offset, elements // block * block_bytes)


def _alignment(path: Path, metadata: dict[str, Any], arrays: dict[str, GGUFArray]) -> int:
    value = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    power_of_two = type(value) is int and value > 0 and value & (value - 1) == 0
    if not power_of_two or _ALIGNMENT_KEY in arrays:
        raise damaged(path, f"{_ALIGNMENT_KEY} is {str(value)[:40]!a}, expected a power of two")
    return value


def _check_places(
    path: Path, tensors: dict[str, GGUFTensor], start: int, alignment: int, size: int
) -> None:
    """The data must be aligned, without overlap and within the file."""
    end, before = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if (tensor.offset - start) % alignment:
            raise damaged(path, f"the data of {name} is not at a multiple of {alignment} bytes")
        if tensor.offset < end:
            raise damaged(path, f"the data of {before} and {name} overlap")
        end, before = tensor.offset + tensor.nbytes, name
    if end > size and tensors:
        raise _incomplete(path, size, end)


def _incomplete(path: Path, size: int, needed: int) -> CheckpointError:
    return CheckpointError(
        f"{path.name} is incomplete: it has {size} of {needed} bytes; download it again"
    )


def _unreadable(path: Path, error: OSError | ValueError) -> CheckpointError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return CheckpointError(
        f"{path.name} cannot be read ({reason}); check its permissions and the disk"
    )


_T5_BLOCK = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")
_T5_TOP = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
}
# The parts of a T5 encoder's block: llama.cpp's name -> Hugging Face's.
T5_NAMES = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}


def t5_name(name: str) -> str | None:
    """Hugging Face's name of a T5 encoder's tensor that llama.cpp wrote; None for any other."""
    if (match := _T5_BLOCK.fullmatch(name)) is None:
        return _T5_TOP.get(name)
    part = T5_NAMES.get(match[2])
    return part and f"encoder.block.{match[1]}.{part}.weight"
