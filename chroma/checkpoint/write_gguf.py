"""Write a GGUF v3 file tensor by tensor: the header first, from what is known beforehand.

Format: magic, version, counts, key-values, tensor infos (name, axes from the fastest, type,
offset), then the data, each tensor at a multiple of 32 bytes (ggml-org/ggml, docs/gguf.md).
"""

import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..quant.ggml_types import GGML_TYPES
from .atomic import replacing
from .reader import TensorInfo
from .write_safetensors import TensorWriter

ALIGNMENT = 32
_VERSION = 3
_UINT32, _FLOAT32, _STRING = 4, 6, 8


def stored_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor, whose dtype is a GGML type's name. Raises ValueError for odd columns."""
    ggml = GGML_TYPES[info.dtype]
    columns = info.shape[-1] if info.shape else 1
    if columns % ggml.block:
        raise ValueError(f"{columns} columns do not fill {info.dtype}'s blocks of {ggml.block}")
    return math.prod(info.shape) // ggml.block * ggml.block_bytes


@contextmanager
def write_gguf(
    path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str | int | float]
) -> Iterator[TensorWriter]:
    """A writer for the given tensors; the file appears at `path` when the block ends well.

    tensors: dtypes are GGML type names, shapes in torch's order. Text, whole numbers (32 bits,
    unsigned) and floats (32 bits) can be metadata. Raises CheckpointError where the disk does not
    take the file, ValueError if a tensor is missing.
    """
    header = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    header += [_string(key) + _value(value) for key, value in metadata.items()]
    places, at = {}, 0
    for name, info in tensors.items():
        axes = tuple(reversed(info.shape))
        header += [
            _string(name),
            struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, GGML_TYPES[info.dtype].number, at),
        ]
        size = stored_bytes(info)
        places[name] = at, size
        at += size + -size % ALIGNMENT
    text = b"".join(header)
    text += b"\0" * (-len(text) % ALIGNMENT)
    with replacing(path) as file:
        file.write(text)
        # Readers that check whole files want the padding behind the last tensor, too.
        file.truncate(len(text) + at)
        writer = TensorWriter(file, {n: (len(text) + at, size) for n, (at, size) in places.items()})
        yield writer
        writer.finish()


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    return struct.pack("<If", _FLOAT32, value)
