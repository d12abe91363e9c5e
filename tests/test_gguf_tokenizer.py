"""A tokenizer written into a GGUF file and read back splits every text as its tokenizer.json does."""

import base64
import json
import os
from pathlib import Path

import gguf
import pytest
from chroma_nodes.chroma.checkpoint.gguf import read_gguf_header
from chroma_nodes.chroma.errors import CheckpointError
from chroma_nodes.chroma.text.gguf_tokenizer import tokenizer_from_gguf
from chroma_nodes.chroma.text.tokenizer import Tokenizer
from chroma_nodes.chroma.tiny import files as small

TEXTS = (
    "a flat emoji of an apple on a red background", "", " ", "  two  spaces\tand\nlines ",
    "</s> typed <pad> as text <unk>", "Émile's naïve café, ﬁne", "猫の絵 🐈 ½ ①", "ALL CAPS 123,456.78",
    "(weights:1.2) [brackets] <extra_id_0>", "\u200bzero\u00a0width", "x" * 300,
)  # fmt: skip
COMFYUI = os.environ.get("COMFYUI_PATH")


def write(path: Path, tokenizer_json: Path, **changes) -> None:
    settings = json.loads(tokenizer_json.read_text("utf-8"))
    vocabulary = settings["model"]["vocab"]
    special = {token["id"] for token in settings["added_tokens"]}
    writer = gguf.GGUFWriter(path, "t5encoder")
    values = {
        "tokenizer.ggml.model": changes.get("model", "t5"),
        "tokenizer.ggml.tokens": [piece for piece, _ in vocabulary],
        "tokenizer.ggml.scores": [score for _, score in vocabulary][: changes.get("scores")],
    }
    writer.add_string("tokenizer.ggml.model", values["tokenizer.ggml.model"])
    writer.add_array("tokenizer.ggml.tokens", values["tokenizer.ggml.tokens"])
    writer.add_array("tokenizer.ggml.scores", values["tokenizer.ggml.scores"])
    kinds = [3 if index in special else 1 for index in range(len(vocabulary))]
    writer.add_array("tokenizer.ggml.token_type", kinds)
    writer.add_uint32("tokenizer.ggml.unknown_token_id", settings["model"]["unk_id"])
    normalizer = settings["normalizer"] or {}
    charsmap = normalizer.get("precompiled_charsmap")
    for part in normalizer.get("normalizers", ()):
        charsmap = part.get("precompiled_charsmap", charsmap)
    if charsmap:
        writer.add_array("tokenizer.ggml.precompiled_charsmap", list(base64.b64decode(charsmap)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(path: Path, source: Path) -> None:
    write(path, source)
    ours = tokenizer_from_gguf(read_gguf_header(path))
    theirs = Tokenizer.from_file(source)
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_id, theirs.pad_id)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.skipif(COMFYUI is None, reason="COMFYUI_PATH is not set: T5's tokenizer.json is there")
def test_the_real_t5(tmp_path):
    folder = Path(str(COMFYUI)) / "comfy" / "text_encoders" / "t5_tokenizer"
    check(tmp_path / "t5.gguf", folder / "tokenizer.json")


def test_wrong_ones_are_one_line(tmp_path):
    path = tmp_path / "t5.gguf"
    write(path, small.TOKENIZER, model="llama")
    with pytest.raises(CheckpointError, match="carries a 'llama' tokenizer, expected T5's"):
        tokenizer_from_gguf(read_gguf_header(path))
    write(path, small.TOKENIZER, scores=9)
    with pytest.raises(CheckpointError, match="tokens and 9 scores"):
        tokenizer_from_gguf(read_gguf_header(path))
