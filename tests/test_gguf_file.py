"""GGUF files as the gguf package writes and reads them, and the damaged ones people have."""

import struct
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.checkpoint.gguf import map_tensors, read_array, read_gguf_header, t5_name
from chroma_nodes.chroma.errors import CheckpointError
from gguf import GGUFEndian, GGUFReader, GGUFWriter, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

PLAIN = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
VALUES = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float16)}


def write(path, tensors=VALUES, keys=lambda writer: None, arch="flux", endian=GGUFEndian.LITTLE):
    """A file of float arrays, or of (raw bytes, type); arch None leaves it without any key."""
    writer = GGUFWriter(path, arch or "", endianess=endian)
    if arch is None:
        writer.kv_data[0].clear()
    keys(writer)
    for name, value in tensors.items():
        raw, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def raw_rows(kind, shape=(2, 3)):
    """Random bytes of a tensor in any type, with 2 x 3 x 2 blocks."""
    size = GGML_QUANT_SIZES[kind][1]
    return np.random.default_rng(int(kind)).integers(0, 256, (*shape, 2 * size), np.uint8), kind


def error_of(path):
    with pytest.raises(CheckpointError) as error:
        read_gguf_header(path)
    assert "\n" not in str(error.value)
    assert path.name in str(error.value)
    return str(error.value)


def every_type():
    tensors = {kind.name: raw_rows(kind) for kind in GGML_QUANT_SIZES}
    return {**tensors, "vector": np.arange(7, dtype=np.float32), "odd": np.ones((3, 5), np.int8)}


def set_version(path, version):
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", version)
    path.write_bytes(data)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [None, 64])
def test_every_type_is_what_the_gguf_package_reads(tmp_path, version, alignment):
    def keys(writer):
        if alignment:
            writer.add_custom_alignment(alignment)

    path = write(tmp_path / "m.gguf", every_type(), keys)
    set_version(path, version)
    header = read_gguf_header(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped = map_tensors(header, {name: f"new.{name}" for name in header.tensors})
    theirs = GGUFReader(path).tensors
    assert [t.name for t in theirs] == list(header.tensors)
    for want in theirs:
        info, got = header.tensors[want.name], mapped[f"new.{want.name}"]
        assert info.shape == tuple(int(n) for n in reversed(want.shape))
        assert (info.type_name, info.offset, info.nbytes) == (
            want.tensor_type.name, want.data_offset, want.n_bytes,
        )  # fmt: skip
        assert info.offset % (alignment or 32) == 0
        if info.type_name in PLAIN:
            assert got.dtype is PLAIN[info.type_name] and got.shape == info.shape
        else:
            rows = int(np.prod(info.shape[:-1]))
            assert got.dtype is torch.uint8 and got.shape == (rows, info.nbytes // rows)
        assert got.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == want.data.tobytes()


def test_every_type_of_the_gguf_package_is_known(tmp_path):
    path = write(tmp_path / "m.gguf", every_type())
    kinds = {t.type_name for t in read_gguf_header(path).tensors.values()}
    assert kinds == {kind.name for kind in GGML_QUANT_SIZES}


def test_values_keep_their_types_and_arrays_are_read_when_asked(tmp_path):
    def keys(writer):
        writer.add_uint32("u", 7)
        writer.add_int64("i", -(2**40))
        writer.add_float64("f", 0.1)
        writer.add_bool("yes", True)
        writer.add_string("text", "Zürich 狐")
        writer.add_array("texts", ["a", "", "狐 b"])
        writer.add_array("numbers", [3, -1, 2])
        writer.add_array("floats", [0.5, 0.25])
        writer.add_array("flags", [True, False])
        writer.add_array("bytes", bytes(range(4)))
        writer.add_array("nested", [["ab", "c"], ["d"]])
        writer.add_uint8("last", 255)

    header = read_gguf_header(write(tmp_path / "m.gguf", keys=keys))
    assert header.metadata == {
        "general.architecture": "flux", "u": 7, "i": -(2**40), "f": 0.1, "yes": True,
        "text": "Zürich 狐", "last": 255,
    }  # fmt: skip
    assert header.metadata["yes"] is True
    assert read_array(header, "texts") == ["a", "", "狐 b"]
    assert read_array(header, "numbers").tolist() == [3, -1, 2]
    assert read_array(header, "floats").tolist() == [0.5, 0.25]
    assert read_array(header, "flags").tolist() == [True, False]
    assert read_array(header, "bytes").tobytes() == bytes(range(4))
    with pytest.raises(CheckpointError, match="nested is an array of arrays"):
        read_array(header, "nested")
    with pytest.raises(CheckpointError, match=r"m\.gguf lacks the array other"):
        read_array(header, "other")


def test_file_without_any_key(tmp_path):
    header = read_gguf_header(write(tmp_path / "sd.gguf", arch=None))
    assert header.metadata == {} and list(header.tensors) == ["a", "b"]
    tensors = map_tensors(header, {"a": "a", "b": "b"})
    assert all(torch.equal(tensors[k], torch.from_numpy(v)) for k, v in VALUES.items())


def test_mapping_copies_nothing_and_writing_leaves_the_file_alone(tmp_path):
    path = write(tmp_path / "m.gguf", {**VALUES, "q": raw_rows(GGMLQuantizationType.Q8_0)})
    header, before = read_gguf_header(path), path.read_bytes()
    tensors = map_tensors(header, {name: name for name in header.tensors})
    base = tensors["a"].data_ptr() - header.tensors["a"].offset
    for name, tensor in tensors.items():
        assert tensor.data_ptr() - base == header.tensors[name].offset
        tensor.zero_()
    assert path.read_bytes() == before


def test_unaligned_data_is_copied(tmp_path):
    values = np.arange(4, dtype=np.float32)
    path = write(
        tmp_path / "m.gguf",
        {"f": values, "one byte": np.ones(1, np.int8), "g": values},
        lambda writer: writer.add_custom_alignment(1),
    )
    header = read_gguf_header(path)
    assert header.tensors["f"].offset % 4 or header.tensors["g"].offset % 4
    for tensor in map_tensors(header, {"f": "f", "g": "g"}).values():
        assert tensor.data_ptr() % 4 == 0 and tensor.tolist() == [0, 1, 2, 3]


def test_vocabulary_is_skipped_without_python_objects(tmp_path):
    def keys(writer):
        writer.add_array("tokens", [f"piece {i}" for i in range(32128)])
        writer.add_array("scores", [0.5] * 32128)
        writer.add_array("charsmap", bytes(240_000))
        writer.add_uint32("after", 5)

    path = write(tmp_path / "t5.gguf", keys=keys)
    read_gguf_header(path)
    tracemalloc.start()
    try:
        header = read_gguf_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000  # the list of texts alone takes 2 MB
    assert header.metadata["after"] == 5
    assert [(k, a.count) for k, a in header.arrays.items()] == [
        ("tokens", 32128), ("scores", 32128), ("charsmap", 240_000),
    ]  # fmt: skip
    assert read_array(header, "tokens")[-1] == "piece 32127"


def test_t5_names_are_llama_cpps():
    config = T5Config(
        d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=2, vocab_size=8,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    table = get_tensor_name_map(MODEL_ARCH.T5ENCODER, 2)
    names = [n for n in T5EncoderModel(config).state_dict() if "embed_tokens" not in n]
    assert len(names) == 2 * 9 + 3
    for name in names:
        assert t5_name(table.get_name(name, (".weight",))) == name


def test_what_is_no_encoder_tensor_of_llama_cpp_has_no_name():
    for name in (
        "dec.blk.0.attn_q.weight", "dec.output_norm.weight", "output.weight",
        "enc.blk.0.cross_attn_q.weight", "enc.blk.x.attn_q.weight", "double_blocks.0.img_in.weight",
    ):  # fmt: skip
        assert t5_name(name) is None


def header_bytes(*parts):
    """GGUF version 3 from its pieces: texts, and (struct code, number) pairs."""
    out = b"GGUF" + struct.pack("<I", 3)
    for part in parts:
        if isinstance(part, str):
            out += struct.pack("<Q", len(part.encode())) + part.encode()
        else:
            out += struct.pack("<" + part[0], part[1])
    return out


def one_tensor(name="w", dims=(32,), kind=0, offset=0, size=4096):
    """A file that claims one tensor, with zeros behind the header."""
    axes = [("I", len(dims)), *(("Q", n) for n in dims)]
    head = header_bytes(("Q", 1), ("Q", 0), name, *axes, ("I", kind), ("Q", offset))
    return head + bytes(size)


def key(*value, name="k"):
    return header_bytes(("Q", 0), ("Q", 1), name, *value) + bytes(64)


def two_tensors(second, offset):
    head = header_bytes(
        ("Q", 2), ("Q", 0), "w", ("I", 1), ("Q", 32), ("I", 0), ("Q", 0),
        second, ("I", 1), ("Q", 32), ("I", 0), ("Q", offset),
    )  # fmt: skip
    return head + bytes(4096)


ALIGNMENT = "general.alignment"
BAD = {
    "empty": (b"", "is empty; download it again"),
    "zeros": (bytes(100), "is not a GGUF file: it starts with"),
    "html": (b"\n<!DOCTYPE html><html>", "not a GGUF file but a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "but a Git LFS pointer"),
    "zip": (b"PK\x03\x04" + bytes(50), "but a zip or pickle file"),
    "magic alone": (b"GGUF", "needs 8 bytes or more, the file has 4"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(99), "has GGUF version 1, expected 2 or"),
    "version 99": (b"GGUF" + struct.pack("<I", 99) + bytes(99), "has GGUF version 99"),
    "many tensors": (header_bytes(("Q", 2**63), ("Q", 0)), f"claims {2**63} tensors"),
    "many keys": (header_bytes(("Q", 0), ("Q", 2**64 - 1)), f"claims {2**64 - 1} keys"),
    "counts beyond the file": (header_bytes(("Q", 9), ("Q", 9)), "claims 9 tensors and 9 keys in"),
    "long name": (one_tensor("w" * 501), "the name b'www"),
    "unprintable name": (one_tensor("w\nx"), "is not usable"),
    "long text": (key(("I", 8), ("Q", 2**60)), "its header needs 11529"),
    "long array": (key(("I", 9), ("I", 0), ("Q", 2**62)), "its header needs 46116"),
    "wide array": (key(("I", 9), ("I", 12), ("Q", 2**64 - 1)), "its header needs 14757"),
    "long array of texts": (key(("I", 9), ("I", 8), ("Q", 2**62)), "its header needs"),
    "array of a long text": (
        key(("I", 9), ("I", 8), ("Q", 1), ("Q", 2**64 - 1)), "its header needs 18446",
    ),
    "long array of arrays": (key(("I", 9), ("I", 9), ("Q", 2**62)), "its header needs"),
    "deep array": (
        key(("I", 9), *[("I", 9), ("Q", 1)] * 9), "the array k is nested too deep",
    ),
    "type of array": (key(("I", 9), ("I", 13), ("Q", 1)), "array k has the unknown value type 13"),
    "type of value": (key(("I", 13)), "k has the unknown value type 13"),
    "key twice": (
        header_bytes(("Q", 0), ("Q", 2), "k", ("I", 0), ("B", 1), "k", ("I", 9), ("I", 0),
                     ("Q", 0)),
        "it states k twice",
    ),
    "alignment 0": (key(("I", 4), ("I", 0), name=ALIGNMENT), "alignment is '0', expected a power"),
    "alignment 48": (key(("I", 4), ("I", 48), name=ALIGNMENT), "'48', expected a power of two"),
    "alignment text": (key(("I", 8), "x", name=ALIGNMENT), "'x', expected a power of two"),
    "alignment array": (key(("I", 9), ("I", 4), ("Q", 0), name=ALIGNMENT), "a power of two"),
    "removed type": (one_tensor(kind=31), "w is stored in type number 31, which is not known"),
    "unknown type": (one_tensor(kind=200), "type number 200"),
    "five axes": (one_tensor(dims=(1,) * 5), "w has 5 axes, expected at most 4"),
    "many axes": (one_tensor(dims=()).replace(struct.pack("<QcI", 1, b"w", 0),
                                              struct.pack("<QcI", 1, b"w", 2**32 - 1)),
                  "w has 4294967295 axes"),
    "no elements": (one_tensor(dims=(0, 3)), "cannot have the shape (3, 0)"),
    "too many elements": (one_tensor(dims=(2**20, 2**20)), "cannot have the shape"),
    "overflowing shape": (one_tensor(dims=(2**63,) * 4), "cannot have the shape"),
    "half a block": (one_tensor(dims=(33, 32), kind=8), "do not fill the blocks of 32 of Q8_0"),
    "unaligned": (one_tensor(offset=8), "data of w is not at a multiple of 32 bytes"),
    "far offset": (one_tensor(offset=2**64 - 32), "is incomplete: it has 4153 of 184467"),
    "too large": (one_tensor(dims=(10**9,), size=200), "is incomplete: it has 257 of 4000000064"),
    "overlap": (two_tensors("v", 96), "the data of w and v overlap"),
    "same place": (two_tensors("v", 0), "overlap"),
    "name twice": (two_tensors("w", 128), "it has two tensors w"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_file_gives_one_clear_line(tmp_path, name):
    data, says = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    assert says in error_of(path)


def test_safetensors_and_big_endian_files_are_named(tmp_path):
    path = tmp_path / "renamed.gguf"
    save_file({"a": torch.ones(2)}, path)
    assert "is not a GGUF file: it starts with" in error_of(path)
    write(path, endian=GGUFEndian.BIG)
    assert "is a big-endian GGUF file, which is not read here" in error_of(path)
    path.unlink()
    assert "does not exist" in error_of(path)


def test_a_file_cut_anywhere_is_told_to_be_downloaded_again(tmp_path):
    q8 = np.zeros((2, 34), np.uint8), GGMLQuantizationType.Q8_0
    path = write(tmp_path / "cut.gguf", {"q": q8, **VALUES})
    data, header = path.read_bytes(), read_gguf_header(path)
    last = header.tensors["b"]
    needed = last.offset + last.nbytes
    for end in range(1, needed):
        path.write_bytes(data[:end])
        message = error_of(path)
        assert "download it again" in message
        if end >= header.tensors["q"].offset:
            assert f"is incomplete: it has {end} of {needed} bytes" in message
    path.write_bytes(data[:needed])  # the padding behind the last tensor is not needed
    assert read_gguf_header(path).tensors == header.tensors


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    path = write(tmp_path / "m.gguf")
    header, data = read_gguf_header(path), path.read_bytes()
    path.write_bytes(data[: header.tensors["b"].offset])
    with pytest.raises(CheckpointError, match=r"m\.gguf is incomplete: it has \d+ of \d+ bytes"):
        map_tensors(header, {"b": "b"})
