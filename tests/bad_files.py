"""Bad model files, LoRAs and pictures: what is wrong with each, and the error it must end in."""

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bad_case import Case
from chroma_nodes.chroma.checkpoint import (
    load_autoencoder,
    load_text_encoder,
    load_transformer,
)
from chroma_nodes.chroma.checkpoint.inspect import inspect_file
from chroma_nodes.chroma.image import load_image
from chroma_nodes.chroma.lora.read import read_lora
from chroma_nodes.chroma.text.tokenizer import Tokenizer
from chroma_nodes.chroma.tiny import files as small
from safetensors.torch import load_file, save_file

HUGE = 10**12
Read = Callable[[Path], object]


def safetensors(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of this header, as JSON or raw bytes; `length` is what it claims of itself."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def text(value: bytes) -> bytes:
    """A string of GGUF."""
    return struct.pack("<Q", len(value)) + value


def tensor(
    name: bytes = b"a", dims: Sequence[int] = (32,), kind: int = 0, offset: int = 0,
    axes: int | None = None,
) -> bytes:  # fmt: skip
    """One tensor's entry in a GGUF header."""
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    count = struct.pack("<I", len(dims) if axes is None else axes)
    return text(name) + count + sizes + struct.pack("<IQ", kind, offset)


def key(name: bytes, kind: int, payload: bytes) -> bytes:
    """One key's entry in a GGUF header."""
    return text(name) + struct.pack("<I", kind) + payload


def gguf(
    tensors: Sequence[bytes] = (), keys: Sequence[bytes] = (), data: bytes = b"",
    counts: tuple[int, int] | None = None, magic: bytes = b"GGUF", version: int = 3,
) -> bytes:  # fmt: skip
    """A file of these entries; `counts` is what it claims of their numbers."""
    stated = (len(tensors), len(keys)) if counts is None else counts
    head = magic + struct.pack("<IQQ", version, *stated) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def file_case(
    name: str, content: bytes, says: str, *, file: str, read: Read = inspect_file,
    error: str = "CheckpointError",
) -> Case:  # fmt: skip
    return Case(name, error, says, lambda folder: read(written(folder, file, content)))


_st = partial(file_case, file="bad.safetensors")
_gg = partial(file_case, file="bad.gguf")
_ONES = torch.ones(4).numpy().tobytes()

HEADERS = (
    _st("empty", b"", "0 bytes"),
    _st("seven bytes", b"1234567", "7 bytes"),
    _st("zeros", bytes(64), "not the JSON"),
    _st("header length beyond the file", safetensors({}, length=10_000), "claims 10000 bytes"),
    _st("header length 10^12", safetensors({}, length=HUGE), f"claims {HUGE} bytes"),
    _st("header length 2^64-1", safetensors({}, length=2**64 - 1), "claims"),
    _st("header length 0", safetensors({}, length=0), "not the JSON"),
    _st("header is no JSON", safetensors(b"{nonsense"), "not the JSON"),
    _st("header is a list", safetensors([]), "not the JSON"),
    _st("header is a number", safetensors(b"1" * 6000), "not the JSON"),
    _st("header is no UTF-8", safetensors(b'{"\xff\xfe": 1}'), "not the JSON"),
    _st("header nested 100000 deep", safetensors(b"[" * 100_000), "not the JSON"),
    _st("entry is a number", safetensors({"a": 1}), "entry of a"),
    _st("entry is null", safetensors({"a": None}), "entry of a"),
    _st("entry lacks the shape", safetensors({"a": {"dtype": "F32"}}), "entry of a"),
    _st("dtype unknown", safetensors({"a": entry("F99")}, _ONES), "dtype is not known"),
    _st("dtype is a list", safetensors({"a": entry([])}, _ONES), "entry of a"),
    _st("shape is a number", safetensors({"a": entry(shape=4)}, _ONES), "entry of a"),
    _st("shape of 10^12 elements in 200 bytes",
        safetensors({"a": entry(shape=[HUGE], offsets=[0, 4 * HUGE])}, _ONES), "the file has"),
    _st("shape 10^6 x 10^6 with short offsets",
        safetensors({"a": entry(shape=[10**6, 10**6])}, _ONES), "shape and offsets disagree"),
    _st("shape negative", safetensors({"a": entry(shape=[-1])}, _ONES), "usable whole number"),
    _st("shape of fractions", safetensors({"a": entry(shape=[1.0])}, _ONES), "usable whole"),
    _st("shape of true", safetensors({"a": entry(shape=[True])}, _ONES), "usable whole"),
    _st("shape 2^70", safetensors({"a": entry(shape=[2**70])}, _ONES), "usable whole"),
    _st("shape of 100000 axes", safetensors({"a": entry(shape=[2**62] * 100_000)}), "axes"),
    _st("shape as a number of 5000 digits",
        safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"), "damaged"),
    _st("offsets swapped", safetensors({"a": entry(offsets=[4, 0])}, _ONES), "disagree"),
    _st("offsets are three", safetensors({"a": entry(offsets=[0, 4, 8])}, _ONES), "entry of a"),
    _st("offsets negative", safetensors({"a": entry(offsets=[-4, 0])}, _ONES), "usable whole"),
    _st("offsets behind the end", safetensors({"a": entry(offsets=[96, 100])}), "need"),
    _st("data cut off", safetensors({"a": entry(shape=[4], offsets=[0, 16])}, b"1"), "need"),
    _st("name with a line break", safetensors({"a\nb": entry()}, _ONES), "not usable"),
    _st("name of half a character", safetensors(b'{"\\ud800": 1}'), "not usable"),
    _st("name of 10000 letters", safetensors({"a" * 10_000: entry()}, _ONES), "not usable"),
    _st("metadata is a list", safetensors({"__metadata__": []}), "metadata is not text"),
    _st("metadata of numbers", safetensors({"__metadata__": {"a": 1}}), "metadata is not text"),
    _st("a web page", b"<!DOCTYPE html>" + b" " * 500, "damaged"),
    _st("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid 1\n", "damaged"),
    file_case("a pickle by its name", b"\x80\x02}", "pickle", file="bad.ckpt"),
    file_case("a pickle named .pt", b"PK\x03\x04", "pickle", file="bad.pt"),
    file_case("a picture", b"\x89PNG", "not a model file", file="bad.png"),
    file_case("a name without an ending", b"x", "not a model file", file="model"),
    Case("missing", "CheckpointError", "does not exist", lambda f: inspect_file(f / "x.sft")),
    Case("an empty folder", "CheckpointError", "holds no model", lambda f: inspect_file(f)),
    file_case("index without a map", b"{}", "does not list", file="model.safetensors.index.json"),
    file_case("index of numbers", b'{"weight_map": {"a": 1}}', "does not list",
              file="model.safetensors.index.json"),
    file_case("index of missing parts", b'{"weight_map": {"a": "b.safetensors"}}', "are missing",
              file="model.safetensors.index.json"),
    file_case("index that leads out of the folder",
              b'{"weight_map": {"a": "../../../etc/passwd"}}', "are missing",
              file="model.safetensors.index.json"),
    file_case("one part of 99999", b"", "99998 are missing",
              file="x-00001-of-99999.safetensors"),
    _gg("gguf: empty", b"", "is empty"),
    _gg("gguf: another magic", gguf(magic=b"GGML"), "expected b'GGUF'"),
    _gg("gguf: a web page", b"<html>" + bytes(99), "a web page"),
    _gg("gguf: a zip file", b"PK\x03\x04" + bytes(99), "zip or pickle"),
    _gg("gguf: magic alone", b"GGUF", "damaged"),
    _gg("gguf: version 1", gguf(version=1), "version 1"),
    _gg("gguf: version 2^32-1", gguf(version=2**32 - 1), "version"),
    _gg("gguf: big-endian", gguf(version=3 << 24), "big-endian"),
    _gg("gguf: 10^12 tensors", gguf(counts=(HUGE, 0)), f"claims {HUGE} tensors"),
    _gg("gguf: 2^64-1 keys", gguf(counts=(0, 2**64 - 1)), "keys"),
    _gg("gguf: 100000 tensors in 24 bytes", gguf(counts=(100_000, 0)), "100000 tensors"),
    _gg("gguf: key without a value", gguf(counts=(0, 1)), "damaged"),
    _gg("gguf: key of 10^12 bytes",
        gguf(keys=[struct.pack("<Q", HUGE) + b"abcdefgh"]), "damaged"),
    _gg("gguf: text of 2^63 bytes",
        gguf(keys=[key(b"a", 8, struct.pack("<Q", 2**63))]), "damaged"),
    _gg("gguf: array of 10^12 numbers", gguf(keys=[key(b"a", 9, array(4, HUGE))]), "damaged"),
    _gg("gguf: array of 10^12 texts", gguf(keys=[key(b"a", 9, array(8, HUGE))]), "damaged"),
    _gg("gguf: array of 10^12 arrays", gguf(keys=[key(b"a", 9, array(9, HUGE))]), "damaged"),
    _gg("gguf: array of unknown type", gguf(keys=[key(b"a", 9, array(77, 1))]), "unknown value"),
    _gg("gguf: arrays 5 deep",
        gguf(keys=[key(b"a", 9, array(9, 1) * 5 + array(4, 0))]), "nested too deep"),
    _gg("gguf: key of unknown type", gguf(keys=[key(b"a", 99, b"12345678")]), "unknown value"),
    _gg("gguf: a key twice", gguf(keys=[key(b"a", 0, b"1")] * 2), "a twice"),
    _gg("gguf: a key without a name", gguf(keys=[key(b"", 0, b"1")] * 2), "not usable"),
    _gg("gguf: a key with a line break", gguf(keys=[key(b"a\n", 0, b"1")]), "not usable"),
    _gg("gguf: alignment 0",
        gguf(keys=[key(b"general.alignment", 4, bytes(4))]), "power of two"),
    _gg("gguf: alignment of text",
        gguf(keys=[key(b"general.alignment", 8, text(b"32"))]), "power of two"),
    _gg("gguf: a tensor twice", gguf([tensor()] * 2, data=bytes(256)), "two tensors a"),
    _gg("gguf: a tensor of 10^12 elements", gguf([tensor(dims=[HUGE])]), "is incomplete"),
    _gg("gguf: a tensor of 10^13 elements", gguf([tensor(dims=[10 * HUGE])]), "cannot have"),
    _gg("gguf: a tensor of 2^64 in each axis",
        gguf([tensor(dims=[2**64 - 1] * 4)]), "cannot have"),
    _gg("gguf: a tensor without elements", gguf([tensor(dims=[0])]), "cannot have"),
    _gg("gguf: a tensor of 2^32-1 axes", gguf([tensor(axes=2**32 - 1)]), "axes"),
    _gg("gguf: a tensor of unknown type", gguf([tensor(kind=250)]), "type number 250"),
    _gg("gguf: rows that fill no blocks", gguf([tensor(dims=[33], kind=8)]), "do not fill"),
    _gg("gguf: data not aligned",
        gguf([tensor(offset=7)], data=bytes(256)), "not at a multiple"),
    _gg("gguf: data that overlap",
        gguf([tensor(), tensor(b"b")], data=bytes(256)), "overlap"),
    _gg("gguf: data cut off", gguf([tensor()], data=bytes(4)), "incomplete"),
    _gg("gguf: offset 2^64-32", gguf([tensor(offset=2**64 - 32)]), "incomplete"),
)  # fmt: skip


def changed(source: Path, change: Callable[[dict], object], read: Read) -> Callable[[Path], object]:
    """Read one of the small model's files with something wrong in it."""

    def attempt(folder: Path) -> object:
        state = {name: value.clone() for name, value in load_file(source).items()}
        change(state)
        path = folder / "bad.safetensors"
        save_file(state, path)
        return read(path)

    return attempt


def _rename(old: str, new: str) -> Callable[[dict], object]:
    return lambda state: state.update({new: state.pop(old)})


def _set(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], object]:
    return lambda state: state.update({name: value(state[name]).contiguous()})


_QKV, _IMG = "double_blocks.0.img_attn.qkv.weight", "img_in.weight"
_MODELS: tuple[tuple[str, Path, Callable[[dict], object], Read, str], ...] = (
    ("a block is missing", small.TRANSFORMER, lambda s: s.pop(_QKV), load_transformer, "lacks"),
    ("the last layer is missing", small.TRANSFORMER,
     lambda s: s.pop("final_layer.linear.weight"), load_transformer, "bad.safetensors"),
    ("the input layer is missing", small.TRANSFORMER,
     lambda s: s.pop(_IMG), load_transformer, "bad.safetensors"),
    ("a tensor too many", small.TRANSFORMER,
     lambda s: s.update({"double_blocks.0.extra.weight": torch.ones(1)}), load_transformer,
     "unknown"),
    ("a block numbered 10^9", small.TRANSFORMER,
     _rename(_QKV, "double_blocks.1000000000.img_attn.qkv.weight"), load_transformer, "beyond"),
    ("a matrix transposed", small.TRANSFORMER, _set(_QKV, lambda t: t.T), load_transformer,
     "shape"),
    ("a matrix of one axis", small.TRANSFORMER, _set(_IMG, torch.flatten), load_transformer,
     "bad.safetensors"),
    ("a matrix of no elements", small.TRANSFORMER, _set(_IMG, lambda t: t[:0]),
     load_transformer, "empty"),
    ("a matrix of whole numbers", small.TRANSFORMER, _set(_QKV, torch.Tensor.long),
     load_transformer, "int64"),
    ("a matrix of int8 without a scale", small.TRANSFORMER, _set(_QKV, torch.Tensor.char),
     load_transformer, "without a scale"),
    ("NaN", small.TRANSFORMER, _set(_QKV, lambda t: t * torch.nan), load_transformer, "NaN"),
    ("infinity", small.TRANSFORMER, _set(_QKV, lambda t: t / 0), load_transformer, "NaN"),
    ("NaN in fp8", small.TRANSFORMER,
     _set(_QKV, lambda t: (t.float() * torch.nan).to(torch.float8_e4m3fn)), load_transformer,
     "NaN"),
    ("a scale without a weight", small.TRANSFORMER,
     lambda s: s.update({"double_blocks.0.x.scale_weight": torch.ones(1)}), load_transformer,
     "no weight"),
    ("a scale of two numbers", small.TRANSFORMER,
     lambda s: s.update({_QKV.replace("weight", "weight_scale"): torch.ones(2)}),
     load_transformer, "scale of"),
    ("a scale that is NaN", small.TRANSFORMER,
     lambda s: s.update({_QKV.replace("weight", "weight_scale"): torch.tensor(torch.nan)}),
     load_transformer, "not finite"),
    ("settings of a layer that are no JSON", small.TRANSFORMER,
     lambda s: s.update({_QKV.replace("weight", "comfy_quant"): torch.ones(3).byte()}),
     load_transformer, "not a JSON object"),
    ("Radiance", small.TRANSFORMER,
     lambda s: s.update({"nerf_blocks.0.weight": torch.ones(1)}), load_transformer, "Radiance"),
    ("a text encoder as a transformer", small.TEXT_ENCODER, lambda _: None, load_transformer,
     "a T5 text encoder"),
    ("an autoencoder as a transformer", small.VAE, lambda _: None, load_transformer,
     "a Flux autoencoder"),
    ("a transformer as a text encoder", small.TRANSFORMER, lambda _: None, load_text_encoder,
     "a Chroma transformer"),
    ("a text encoder without its embedding", small.TEXT_ENCODER,
     lambda s: s.pop("shared.weight"), load_text_encoder, "bad.safetensors"),
    ("a text encoder with NaN", small.TEXT_ENCODER,
     _set("shared.weight", lambda t: t * torch.nan), load_text_encoder, "NaN"),
    ("a transformer as an autoencoder", small.TRANSFORMER, lambda _: None, load_autoencoder,
     "a Chroma transformer"),
    ("an autoencoder without its first layer", small.VAE,
     lambda s: s.pop("decoder.conv_in.weight"), load_autoencoder, "bad.safetensors"),
    ("an autoencoder with a kernel of two axes", small.VAE,
     _set("decoder.conv_in.weight", lambda t: t.flatten(1)), load_autoencoder, "bad.safetensors"),
)  # fmt: skip
MODELS = (
    *(Case(name, "CheckpointError", says, changed(source, change, read))
      for name, source, change, read, says in _MODELS),
    file_case("no tensors at all", safetensors({}), "not known here", file="bad.safetensors",
              read=load_transformer),
    file_case("gguf without tensors", gguf(), "not known here", file="bad.gguf",
              read=load_transformer),
    file_case("a tokenizer that is no JSON", b"{", "cannot read", file="tokenizer.json",
              read=Tokenizer.from_file),
    file_case("a tokenizer of nothing", b"{}", "cannot read", file="tokenizer.json",
              read=Tokenizer.from_file),
    file_case("a tokenizer in a foreign encoding", b"\xff\xfe\x00", "cannot read",
              file="tokenizer.json", read=Tokenizer.from_file),
)  # fmt: skip


def lora_case(name: str, state: Callable[[], dict], says: str, **metadata: str) -> Case:
    """A LoRA file of these tensors."""

    def attempt(folder: Path) -> object:
        save_file(state(), folder / "bad.safetensors", metadata or None)
        return read_lora(folder / "bad.safetensors")

    return Case(name, "LoraError", says, attempt)


def pair(module: str, rank: int = 4, width: int = 3072, rows: int = 9216) -> dict:
    """The two matrices of a LoRA of one module of Chroma1."""
    return {
        f"{module}.lora_A.weight": torch.zeros(rank, width),
        f"{module}.lora_B.weight": torch.zeros(rows, rank),
    }


_MODULE = "diffusion_model.double_blocks.0.img_attn.qkv"
_lora_file = partial(file_case, file="bad.safetensors", read=read_lora, error="LoraError")
LORAS = (
    _lora_file("lora: empty", b"", "0 bytes"),
    _lora_file("lora: header of 10^12 bytes", safetensors({}, length=HUGE), "claims"),
    _lora_file("lora: 10^12 elements", safetensors(
        {f"{_MODULE}.lora_A.weight": entry(shape=[HUGE], offsets=[0, 4 * HUGE])}), "the file has"),
    _lora_file("lora: a pickle under a wrong name", b"PK\x03\x04" + bytes(99), "pickle"),
    _lora_file("lora: a web page", b"<!doctype html>" + bytes(99), "web page"),
    _lora_file("lora: no tensors", safetensors({}), "matches nothing"),
    file_case("lora: a pickle by its name", b"\x80\x02}", "pickle", file="bad.pt",
              read=read_lora, error="LoraError"),
    file_case("lora: a GGUF file", gguf(), "expected", file="bad.gguf", read=read_lora,
              error="LoraError"),
    Case("lora: missing", "LoraError", "does not exist", lambda f: read_lora(f / "x.safetensors")),
    Case("lora: a model", "LoraError", "not a LoRA", lambda _: read_lora(small.TRANSFORMER)),
    lora_case("lora: of Stable Diffusion XL", lambda: pair(
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"), "Stable Diffusion XL"),
    lora_case("lora: of Wan", lambda: pair("diffusion_model.blocks.0.self_attn.q"), "Wan"),
    lora_case("lora: of Qwen-Image",
              lambda: pair("transformer.transformer_blocks.0.img_mlp.net.0.proj"), "Qwen"),
    lora_case("lora: of a deeper model",
              lambda: pair("diffusion_model.double_blocks.999.img_attn.qkv"), "more blocks"),
    lora_case("lora: only one half",
              lambda: {f"{_MODULE}.lora_A.weight": torch.zeros(4, 3072)}, "bad.safetensors"),
    lora_case("lora: of another width", lambda: pair(_MODULE, width=100), "other sizes"),
    lora_case("lora: halves of different ranks", lambda: {
        **pair(_MODULE), f"{_MODULE}.lora_A.weight": torch.zeros(8, 3072)}, "bad.safetensors"),
    lora_case("lora: of rank 0", lambda: pair(_MODULE, rank=0), "empty"),
    lora_case("lora: of five axes", lambda: {
        **pair(_MODULE), f"{_MODULE}.lora_A.weight": torch.zeros(4, 3072, 1, 1, 1)},
        "bad.safetensors"),
    lora_case("lora: NaN", lambda: {
        **pair(_MODULE), f"{_MODULE}.lora_B.weight": torch.full((9216, 4), torch.nan)}, "NaN"),
    lora_case("lora: alpha is NaN", lambda: {
        **pair(_MODULE), f"{_MODULE}.alpha": torch.tensor(torch.nan)}, "bad.safetensors"),
    lora_case("lora: alpha of many numbers", lambda: {
        **pair(_MODULE), f"{_MODULE}.alpha": torch.ones(7)}, "bad.safetensors"),
    lora_case("lora: whole numbers", lambda: {
        **pair(_MODULE), f"{_MODULE}.lora_A.weight": torch.zeros(4, 3072).long()},
        "floating-point"),
    lora_case("lora: twice in one file", lambda: {
        **pair(_MODULE), f"{_MODULE}.lora_down.weight": torch.zeros(4, 3072)}, "two tensors"),
    lora_case("lora: settings that are no JSON", lambda: pair(_MODULE), "not a JSON object",
              lora_adapter_metadata="{"),
    lora_case("lora: settings nested 100000 deep", lambda: pair(_MODULE), "not a JSON object",
              lora_adapter_metadata="[" * 100_000),
    lora_case("lora: alpha is infinite", lambda: pair(_MODULE), "bad.safetensors",
              lora_adapter_metadata='{"transformer.lora_alpha": 1e999}'),
    lora_case("lora: a pattern that never ends", lambda: pair(_MODULE), "plain names",
              lora_adapter_metadata='{"transformer.alpha_pattern": {"(a+)+$": 1}}'),
)  # fmt: skip


def png(width: int, height: int) -> bytes:
    """A PNG of this claimed size whose data are a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


_picture = partial(file_case, file="bad.png", read=load_image, error="ImageError")
PICTURES = (
    _picture("picture: empty", b"", "cannot be read"),
    _picture("picture: text", b"hello", "cannot be read"),
    _picture("picture: a web page", b"<html>", "cannot be read"),
    _picture("picture: cut off", png(64, 64)[:40], "cannot be read"),
    _picture("picture: without data", png(64, 64), "cannot be read"),
    _picture("picture: 2 x 10^9 pixels", png(50_000, 40_000), "too large"),
    _picture("picture: 4 x 10^18 pixels", png(2**31 - 1, 2**31 - 1), "bad.png"),
    _picture("picture: 0 x 0 pixels", png(0, 0), "cannot be read"),
    Case("picture: missing", "ImageError", "does not exist", lambda f: load_image(f / "x.png")),
    Case("picture: a folder", "ImageError", "cannot be read", load_image),
)  # fmt: skip
