"""Ten thousand damaged headers for each container: each is read, or refused in one line."""

import json
import struct
import tracemalloc
from random import Random

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.checkpoint.gguf import map_tensors, read_array, read_gguf_header
from chroma_nodes.chroma.checkpoint.reader import read_header
from chroma_nodes.chroma.errors import CheckpointError
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import save_file

COUNT = 10_000
MAX_MEMORY = 64 * 1024 * 1024
SIZES = [0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 10**12, 2**62, 2**63, 2**64 - 1]


def flip_bits(data, random):
    for _ in range(random.choice([1, 1, 2, 8, 64])):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def cut(data, random):
    del data[random.randrange(len(data)) :]


def claim_a_size(data, random):
    """Overwrite a random place with a number that is a bad length, count, offset or type."""
    code = random.choice(["<I", "<Q"])
    number = random.choice([*SIZES, random.getrandbits(64)]) % 256 ** struct.calcsize(code)
    place = random.randrange(len(data) - 8)
    data[place : place + struct.calcsize(code)] = struct.pack(code, number)


def change_counts(data, random):
    """In GGUF the counts of tensors and keys; in safetensors the header's length."""
    first, second = data[8:16], data[16:24]
    data[8:24] = second + first
    if random.random() < 0.5:
        place = random.choice([0, 8, 16])
        data[place : place + 8] = struct.pack("<Q", random.choice(SIZES))


def move_a_piece(data, random):
    start, end = sorted(random.randrange(len(data)) for _ in range(2))
    piece = data[start:end][:40]
    del data[start : start + len(piece)]
    place = random.randrange(len(data) + 1)
    data[place:place] = piece * random.choice([1, 1, 2, 50])


def change_a_number(data, random):
    """Replace digits in a JSON text by a number of another size or kind."""
    digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    new = random.choice([*map(str, SIZES), "-1", "1e999", "0.5", "null", "[]", "9" * 5000, '"x"'])
    if digits:
        place = random.choice(digits)
        data[place : place + 1] = new.encode()
        length = struct.unpack("<Q", data[:8])[0] + len(new) - 1
        data[:8] = struct.pack("<Q", length % 2**64)


def change_the_structure(data, random):
    """Replace a part of a safetensors file's JSON by something of another kind."""
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + length])
    name = random.choice(list(entries))
    field = random.choice(["dtype", "shape", "data_offsets", "extra"])
    odd = random.choice([
        None, 1, -1, 0.5, True, "F32", [], [1], [1] * 9, [2**40] * 8, [0, -1], ["a", "b"], {},
        {"a": {}}, "\n", "\ud800", [[1], [2]], [0.0, 16.0], [True, False], [0, 1, 2], "x" * 10_000,
    ])  # fmt: skip
    if random.random() < 0.3:
        entries[name] = odd
    elif random.random() < 0.3:
        entries[str(odd)] = entries.pop(name)
    else:
        entries[name][field] = odd
    text = json.dumps(entries).encode()
    data[: 8 + length] = struct.pack("<Q", len(text)) + text


COMMON = [flip_bits, cut, claim_a_size, change_counts, move_a_piece]
SAFETENSORS = [*COMMON, change_a_number, change_the_structure]


@pytest.fixture
def valid_safetensors(tmp_path):
    path = tmp_path / "valid.safetensors"
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file({**tensors, "c": torch.ones(())}, path, {"format": "pt", "note": "x"})
    return path.read_bytes()


@pytest.fixture
def valid_gguf(tmp_path):
    path = tmp_path / "valid.gguf"
    writer = GGUFWriter(path, "t5encoder")
    writer.add_uint32("general.alignment", 32)
    writer.add_float64("number", 0.5)
    writer.add_array("texts", ["a", "bc", "def"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("nested", [["a"], ["b", "c"]])
    writer.add_tensor("a", np.ones((2, 3), np.float32))
    writer.add_tensor("q", np.ones((2, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("b", np.ones(5, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def fuzz(path, valid, mutations, read):
    """The messages of all refusals; anything but a refusal in one line fails."""
    path.write_bytes(valid)
    read(path)
    random, refusals = Random(20), []
    tracemalloc.start()
    try:
        for number in range(COUNT):
            data = bytearray(valid)
            chosen = random.sample(mutations, random.choice([1, 1, 2]))
            # This one needs JSON that is still valid.
            for mutation in sorted(chosen, key=lambda m: m is not change_the_structure):
                if len(data) >= 32:
                    mutation(data, random)
            path.write_bytes(data)
            try:
                read(path)
            except CheckpointError as error:
                refusals.append(str(error))
                assert "\n" not in refusals[-1] and len(refusals[-1]) < 2000, f"header {number}"
            except Exception as error:
                raise AssertionError(f"header {number}: {bytes(data)!r}") from error
        assert tracemalloc.get_traced_memory()[1] < MAX_MEMORY
    finally:
        tracemalloc.stop()
    assert all(message.startswith(path.name) for message in refusals)
    return refusals


def test_damaged_safetensors_headers(tmp_path, valid_safetensors):
    def read(path):
        metadata = read_header(path).metadata
        assert all(isinstance(text, str) for text in metadata.values())

    refusals = fuzz(tmp_path / "fuzzed.safetensors", valid_safetensors, SAFETENSORS, read)
    assert COUNT / 2 < len(refusals) < COUNT


def test_damaged_gguf_headers(tmp_path, valid_gguf):
    """What is not refused can be mapped and its arrays be read."""

    def read(path):
        header = read_gguf_header(path)
        map_tensors(header, {name: name for name in header.tensors})
        for key, array in header.arrays.items():
            if array.element_type != 9:
                assert len(read_array(header, key)) == array.count

    refusals = fuzz(tmp_path / "fuzzed.gguf", valid_gguf, COMMON, read)
    assert COUNT / 2 < len(refusals) < COUNT
