"""Open a safetensors file without trusting it: the header is checked before any tensor is read.

Format: 8 bytes little-endian header length, JSON {name: {dtype, shape, data_offsets}}, data
(huggingface/safetensors, README).
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError

SUFFIXES = (".safetensors", ".sft")
MAX_HEADER = 100 * 1024 * 1024
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor: safetensors' dtype name and the shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The names, dtypes and shapes in one file, and its free-form metadata."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header alone; time and memory are bounded whatever the file claims.

    Raises CheckpointError for a missing file, another format, or a damaged one.
    """
    _check_name(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise _damaged(path, f"it has {size} bytes, too few for a header")
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER, size - 8):
            raise _damaged(path, f"its header claims {length} bytes, the file has {size}")
        text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        tensors = {name: _tensor_info(entry) for name, entry in entries.items()}
        ends = [entry["data_offsets"][1] for entry in entries.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise _damaged(path, "its header is not the JSON of a safetensors file") from None
    if max(ends, default=0) + 8 + length > size:
        raise _damaged(
            path, f"its tensors need {max(ends) + 8 + length} bytes, the file has {size}"
        )
    return Header(path, tensors, metadata if isinstance(metadata, dict) else {})


def _tensor_info(entry: dict) -> TensorInfo:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("a size is not a whole number")
    if (end - begin) * 8 != math.prod(shape) * BITS[entry["dtype"]]:
        raise ValueError("shape and offsets disagree")
    return TensorInfo(entry["dtype"], shape)


def read_tensors(header: Header, names: dict[str, str]) -> dict[str, Tensor]:
    """The named tensors, memory-mapped, under new names: {name in the file: new name}."""
    try:
        with safe_open(header.path, framework="pt", device="cpu") as file:
            return {new: file.get_tensor(old) for old, new in names.items()}
    except Exception as error:  # safetensors' own error type differs by version
        raise _damaged(header.path, str(error).splitlines()[0]) from None


def _check_name(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        raise CheckpointError(
            f"{path.name} is a pickle file, which can run code when opened; "
            "expected .safetensors, so convert it or download that version"
        )
    if suffix == ".gguf":
        raise CheckpointError(
            f"{path.name} is a GGUF file; expected .safetensors, so choose the model's "
            "bf16 safetensors file"
        )
    if suffix not in SUFFIXES:
        raise CheckpointError(f"{path.name} is not a model file; expected {' or '.join(SUFFIXES)}")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; check the name and the folder")


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path.name} is damaged or incomplete: {why}; download it again")
