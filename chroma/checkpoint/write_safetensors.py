"""Write a safetensors file tensor by tensor: the header first, from what is known beforehand.

Format: 8 bytes little-endian header length, JSON {name: {dtype, shape, data_offsets}}, data
(huggingface/safetensors, README).
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .atomic import replacing
from .reader import BITS, TensorInfo


class TensorWriter:
    """Places for named tensors in an open file; each is written once, in any order."""

    def __init__(self, file: BinaryIO, places: Mapping[str, tuple[int, int]]) -> None:
        self._file, self._places, self._missing = file, places, set(places)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of any dtype as its bytes. Raises ValueError where they do not fit."""
        start, size = self._places[name]
        if tensor.nbytes != size:
            raise ValueError(f"{name} has {tensor.nbytes} bytes, its place {size}")
        self._file.seek(start)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(data.numpy().data)
        self._missing.discard(name)

    def finish(self) -> None:
        """Raises ValueError unless every tensor has been written."""
        if self._missing:
            raise ValueError(f"{min(self._missing)} was not written")


@contextmanager
def write_safetensors(
    path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> Iterator[TensorWriter]:
    """A writer for the given tensors; the file appears at `path` when the block ends well.

    Raises CheckpointError where the disk does not take it, ValueError if a tensor is missing.
    """
    entries: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, at = {}, 0
    # The widest elements first, as the reference writer has it: so each is aligned to its size.
    for name in sorted(tensors, key=lambda name: (-BITS[tensors[name].dtype], name)):
        info = tensors[name]
        size = math.prod(info.shape) * BITS[info.dtype] // 8
        entries[name] = {
            "dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + size],
        }  # fmt: skip
        offsets[name] = at, size
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        writer = TensorWriter(file, {n: (begin + at, size) for n, (at, size) in offsets.items()})
        yield writer
        writer.finish()
