"""Ten thousand damaged headers for each container: refused in one line, or read; nothing else."""

import struct
import tracemalloc
from random import Random

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.checkpoint.gguf import read_gguf_header
from chroma_nodes.chroma.checkpoint.reader import read_header
from chroma_nodes.chroma.errors import CheckpointError
from safetensors.torch import save_file

COUNT = 10_000
NASTY = (0, 1, 2, 8, 9, 31, 255, 2**31 - 1, 2**32 - 1, 10**12, 2**62, 2**63, 2**64 - 1)


def small_safetensors(path):
    tensors = {f"double_blocks.{i}.weight": torch.zeros(2, 3) for i in range(4)}
    save_file(tensors, path, {"format": "pt", "_quantization_metadata": "{}"})
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def small_gguf(path):
    import gguf

    writer = gguf.GGUFWriter(path, "flux")
    writer.add_uint32("general.alignment", 32)
    writer.add_array("texts", ["a", "bc", ""])
    writer.add_array("numbers", [1, 2, 3])
    for i in range(3):
        writer.add_tensor(f"blk.{i}", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size - 3 * 256


def damage(whole: bytes, header: int, random: Random) -> bytes:
    data = bytearray(whole)
    for _ in range(random.randrange(1, 4)):
        at = random.randrange(header)
        kind = random.randrange(6)
        if kind == 0:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[at] = random.randrange(256)
        elif kind == 2:
            data[at : at + 8] = struct.pack("<Q", random.choice(NASTY))
        elif kind == 3:
            data[at : at + 4] = struct.pack("<I", random.choice(NASTY) & 0xFFFFFFFF)
        elif kind == 4:
            data[at : at + random.randrange(16)] = b""
        else:
            data = data[: random.randrange(len(data) + 1)]
            if len(data) <= at:
                break
        header = min(header, len(data))
        if header == 0:
            break
    return bytes(data)


@pytest.mark.parametrize(
    ("make", "read", "suffix"),
    [(small_safetensors, read_header, ".safetensors"), (small_gguf, read_gguf_header, ".gguf")],
)
def test_damaged_headers(tmp_path, make, read, suffix):
    path = tmp_path / f"x{suffix}"
    header = make(path)
    whole, random, refused = path.read_bytes(), Random(0), 0
    tracemalloc.start()
    for _ in range(COUNT):
        path.write_bytes(damage(whole, header, random))
        try:
            read(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > COUNT // 2
    assert peak < 64 * 2**20
