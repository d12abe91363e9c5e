"""Open a safetensors file without trusting it: the header is checked before any tensor is read.

Format: 8 bytes little-endian header length, JSON {name: {dtype, shape, data_offsets}}, data
(huggingface/safetensors, README).
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError

SUFFIXES = (".safetensors", ".sft")
MAX_HEADER = 100 * 1024 * 1024
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
# No model has more axes; without a bound, multiplying a lying shape could take hours.
MAX_AXES = 8
MAX_NAME = 500


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
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            text = _header_text(path, file, size)
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be read ({error.strerror}); check its permissions and the disk"
        ) from None
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise damaged(path, "its header is not the JSON of a safetensors file")
    metadata = entries.pop("__metadata__", {})
    tensors, needed = {}, 0
    for name, entry in entries.items():
        if not name.isprintable() or len(name) > MAX_NAME:
            raise damaged(path, f"the tensor name {name[:MAX_NAME]!a} is not usable")
        try:
            tensors[name], end = _tensor_info(entry)
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(path, f"the header's entry of {name} is unusable ({error})") from None
        needed = max(needed, end + 8 + len(text))
    if needed > size:
        raise damaged(path, f"its tensors need {needed} bytes, the file has {size}")
    if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
        raise damaged(path, "its metadata is not text")
    return Header(path, tensors, metadata)


def _header_text(path: Path, file: BinaryIO, size: int) -> bytes:
    start = file.read(8)
    if len(start) < 8:
        raise damaged(path, f"it has {size} bytes, too few for a header")
    (length,) = struct.unpack("<Q", start)
    if length > min(MAX_HEADER, size - 8):
        raise damaged(path, f"its header claims {length} bytes, the file has {size}")
    return file.read(length)


def _tensor_info(entry: dict) -> tuple[TensorInfo, int]:
    """Dtype and shape, and where the data ends, in bytes behind the header."""
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in BITS:
        raise ValueError("its dtype is not known")
    if len(shape) > MAX_AXES:
        raise ValueError(f"it has {len(shape)} axes")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
        raise ValueError("a size is not a usable whole number")
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError("shape and offsets disagree")
    return TensorInfo(dtype, shape), end


def read_tensors(header: Header, names: dict[str, str]) -> dict[str, Tensor]:
    """The named tensors, memory-mapped, under new names: {name in the file: new name}."""
    try:
        with safe_open(header.path, framework="pt", device="cpu") as file:
            return {new: file.get_tensor(old) for old, new in names.items()}
    except MemoryError:
        raise
    except Exception as error:  # safetensors' own error type differs by version
        raise damaged(header.path, " ".join(str(error).split())) from None


def _check_name(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        raise CheckpointError(
            f"{path.name} is a pickle file, which can run code when opened; "
            "expected .safetensors, so convert it or download that version"
        )
    if suffix not in SUFFIXES:
        raise CheckpointError(
            f"{path.name} is not a model file; expected {', '.join(SUFFIXES)} or .gguf"
        )
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; check the name and the folder")


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file that stopped early or was altered."""
    return CheckpointError(f"{path.name} is damaged or incomplete: {why}; download it again")
