"""The tokenizer in a T5 GGUF file, against SentencePiece and against tokenizer.json files."""

import json
import os
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from chroma_nodes.chroma.checkpoint.gguf import read_gguf_header
from chroma_nodes.chroma.errors import CheckpointError
from chroma_nodes.chroma.text.gguf_tokenizer import tokenizer_from_gguf
from chroma_nodes.chroma.text.tokenizer import Tokenizer
from gguf import GGUFWriter, TokenType
from test_gguf_file import write

TINY = Path(__file__).resolve().parent.parent / "chroma" / "tiny" / "tokenizer.json"
TEXTS = [
    "", " ", "   ", "a", "a red fox", "A photograph of a red fox, 35mm; (masterpiece:1.2)",
    " leading", "trailing ", "several   spaces  in a    row", "tab\tand\nnew\r\nlines\n",
    "café naïve Zürich Ångström", "cafe\u0301 n\u0303", "ﬁne ½ ² Ⅷ ™ …",
    "\uff26\uff35\uff2c\uff2c\u3000\uff57ide",
    "🦊", "a 🦊 and 👩‍👩‍👧 emoji", "赤い狐が走る", "红色的狐狸。", "여우 한 마리", "лиса",
    "</s>", "a </s> b", "<pad><unk>", "<extra_id_0> x", "x [PAD1010] [PAD32100] y", "▁", "a▁b ▁ c",
    "zero\u200bwidth\u00adsoft\u00a0hyphen", "\x00\x01 control", "x" * 300, "fox" * 50,
    "\u201cquotes\u201d \u2018and\u2019 \u2013 dashes \u2014",
    "$100% #hash @user_name", "don't won't I'm",
    "\ufeffmark",
]  # fmt: skip
CORPUS = [
    "a red fox in the snow, a photograph", "the quick brown fox jumps over the lazy dog",
    "a painting of a café in Zürich at night", "an old man's portrait (35mm), soft light",
    "three foxes and two dogs; a cat & a house", "don't look at the sun: 1/2 of it is dark",
] * 20  # fmt: skip


def store(path, tokens, scores, types, charsmap=b"", without=(), more=lambda writer: None):
    """A T5 file with the tokenizer's keys as llama.cpp writes them."""

    def keys(writer: GGUFWriter):
        add = {
            "model": lambda: writer.add_tokenizer_model("t5"),
            "tokens": lambda: writer.add_token_list(tokens),
            "scores": lambda: writer.add_token_scores(scores),
            "token_type": lambda: writer.add_token_types(types),
            "unknown_token_id": lambda: writer.add_unk_token_id(2),
        }
        for name, function in add.items():
            if name not in without:
                function()
        if charsmap:
            writer.add_precompiled_charsmap(charsmap)
        more(writer)

    return read_gguf_header(write(path, {"x": np.ones(1, np.float32)}, keys, arch="t5encoder"))


def types_of(tokens):
    special = {"<pad>": TokenType.CONTROL, "</s>": TokenType.CONTROL, "<unk>": TokenType.UNKNOWN}
    return [special.get(token, TokenType.NORMAL) for token in tokens]


def small(path, **changes):
    """A small valid file, with changes to what is stored."""
    tokens = ["<pad>", "</s>", "<unk>", "▁", "a", "b", "▁a"]
    content = {"tokens": tokens, "scores": [0.0] * 3 + [-2.0] * 4, "types": types_of(tokens)}
    return store(path, **(content | changes))


@pytest.fixture(scope="module")
def piece(tmp_path_factory):
    """A SentencePiece model trained as T5's was: Unigram, NMT's NFKC, pad 0, end 1, unknown 2."""
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = tmp_path_factory.mktemp("piece") / "spiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(prefix), vocab_size=150, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, hard_vocab_limit=False,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def charsmap_of(processor):
    pb = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = pb.ModelProto()
    model.ParseFromString(processor.serialized_model_proto())
    return model.normalizer_spec.precompiled_charsmap


def from_piece(path, piece, padded):
    """What llama.cpp's converter stores: unused pieces fill the vocabulary up to `padded`."""
    known = range(piece.vocab_size())
    fill = range(piece.vocab_size(), padded)
    kinds = [
        TokenType.CONTROL if piece.is_control(i)
        else TokenType.UNKNOWN if piece.is_unknown(i) else TokenType.NORMAL
        for i in known
    ]  # fmt: skip
    return store(
        path,
        [*map(piece.id_to_piece, known), *(f"[PAD{i}]" for i in fill)],
        [*map(piece.get_score, known), *(-10000.0 for _ in fill)],
        [*kinds, *(TokenType.UNUSED for _ in fill)],
        charsmap_of(piece),
    )


def test_ids_are_sentencepieces(tmp_path, piece):
    tokenizer = tokenizer_from_gguf(from_piece(tmp_path / "t5.gguf", piece, 1020))
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (1020, 0, 1)
    for text in TEXTS:
        assert tokenizer.encode(text) == piece.encode(text), text
    assert tokenizer.decode(piece.encode("a red fox")) == "a red fox"


def test_ids_are_the_small_models(tmp_path):
    """Its own rules for spelling have no place in the format: the texts are spelled so before."""
    settings = json.loads(TINY.read_text("utf-8"))
    pieces, scores = zip(*settings["model"]["vocab"], strict=True)
    tokenizer = tokenizer_from_gguf(store(tmp_path / "t5.gguf", pieces, scores, types_of(pieces)))
    want, backend = Tokenizer.from_file(TINY), tokenizers.Tokenizer.from_file(str(TINY))
    assert tokenizer.vocab_size == want.vocab_size
    for text in TEXTS:
        text = " ".join(backend.normalizer.normalize_str(text).replace("▁", " ").split())
        assert tokenizer.encode(text) == want.encode(text), text


def test_ids_are_t5s(tmp_path):
    """The published tokenizer.json of T5 v1.1, which ComfyUI carries."""
    if "COMFYUI_PATH" not in os.environ:
        pytest.skip("COMFYUI_PATH names no ComfyUI, whose folder holds T5's tokenizer.json")
    path = Path(os.environ["COMFYUI_PATH"], "comfy/text_encoders/t5_tokenizer/tokenizer.json")
    settings = json.loads(path.read_text("utf-8"))
    pieces, scores = zip(*settings["model"]["vocab"], strict=True)
    special = {token["content"] for token in settings["added_tokens"]} - {"<pad>", "</s>", "<unk>"}
    kinds = [
        TokenType.USER_DEFINED if piece in special else kind
        for piece, kind in zip(pieces, types_of(pieces), strict=True)
    ]
    charsmap = b64decode(settings["normalizer"]["normalizers"][0]["precompiled_charsmap"])
    tokenizer = tokenizer_from_gguf(store(tmp_path / "t5.gguf", pieces, scores, kinds, charsmap))
    want = Tokenizer.from_file(path)
    for text in TEXTS:
        assert tokenizer.encode(text) == want.encode(text), text


def test_rules_for_spaces_are_the_files(tmp_path):
    def more(writer):
        writer.add_add_space_prefix(False)
        writer.add_remove_extra_whitespaces(False)

    assert tokenizer_from_gguf(small(tmp_path / "x.gguf")).encode(" a  b ") == [6, 3, 5]
    kept = tokenizer_from_gguf(small(tmp_path / "x.gguf", more=more))
    assert kept.encode("a  b ") == [4, 3, 3, 5, 3]


def test_unknown_token_is_the_marked_one_or_the_stated_one(tmp_path):
    unmarked = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 4
    assert tokenizer_from_gguf(small(tmp_path / "x.gguf", types=unmarked)).encode("狐") == [3, 2]
    marked = small(tmp_path / "x.gguf", without=("unknown_token_id",))
    assert tokenizer_from_gguf(marked).encode("狐") == [3, 2]
    with pytest.raises(CheckpointError, match=r"no usable tokenizer\.ggml\.unknown_token_id"):
        neither = small(tmp_path / "x.gguf", types=unmarked, without=("unknown_token_id",))
        tokenizer_from_gguf(neither)


def test_special_tokens_cannot_be_typed(tmp_path):
    tokenizer = tokenizer_from_gguf(small(tmp_path / "x.gguf"))
    assert not {0, 1} & set(tokenizer.encode("</s> a <pad>"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"without": ("model",)}, "has no tokenizer (tokenizer.ggml.model), expected 't5'"),
        ({"without": ("tokens",)}, "has no tokenizer.ggml.tokens; give a tokenizer.json"),
        (
            {"without": ("scores", "token_type")},
            "has no tokenizer.ggml.scores, tokenizer.ggml.token_type; give",
        ),
        ({"scores": [0.0]}, "[7, 1, 7] tokens, scores and types"),
        ({"scores": [float("nan")] * 7}, "scores that are not finite"),
        ({"scores": [1] * 7}, "scores in int32"),
        ({"types": [0.5] * 7}, "token types in float32"),
        ({"tokens": [1, 2, 3, 4, 5, 6, 7]}, "of another kind"),
        ({"tokens": ["<pad>", "</s>", "<unk>", "", "a", "b", "c"]}, "an empty token"),
        ({"tokens": ["<pad>", "x", "<unk>", "y", "a", "b", "c"]}, "not a T5 tokenizer"),
        ({"charsmap": b"\0"}, "a tokenizer.ggml.precompiled_charsmap whose sizes disagree"),
        ({"charsmap": b"\0\4\0\0" + b"\xff" * 1023}, "whose sizes disagree"),
        ({"charsmap": b"\4\0\0\0" + b"\xff\xff\xff\x7f" + b"x\0"}, "points outside itself"),
    ],
)
def test_unusable_tokenizers_are_refused(tmp_path, changes, says):
    header = small(tmp_path / "t5.gguf", **changes)
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_gguf(header)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert "t5.gguf" in str(error.value)


def test_tokenizer_of_another_kind_is_named(tmp_path):
    def llama(writer):
        writer.add_tokenizer_model("llama")

    header = small(tmp_path / "t5.gguf", without=("model",), more=llama)
    with pytest.raises(CheckpointError, match=r"a tokenizer of the kind 'llama'"):
        tokenizer_from_gguf(header)


def test_damaged_character_maps_never_break_the_tokenizer(tmp_path, piece):
    """Each is refused, or gives some ids: the tokenizers library would panic on what points out."""
    charsmap, random = charsmap_of(piece), np.random.default_rng(0)
    size = int.from_bytes(charsmap[:4], "little")
    flips = [1, 1, 1, 1, 1, 1, 200, 200]
    refused = 0
    for count in flips:
        data = np.frombuffer(charsmap, np.uint8).copy()
        data[random.integers(4, size, count)] ^= 1 << random.integers(0, 8, count, np.uint8)
        try:
            tokenizer = tokenizer_from_gguf(small(tmp_path / "x.gguf", charsmap=data.tobytes()))
        except CheckpointError:
            refused += 1
            continue
        for text in TEXTS:
            tokenizer.encode(text)
    assert 2 <= refused < len(flips)
