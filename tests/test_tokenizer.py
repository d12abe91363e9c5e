"""The tokenizer on a tiny unigram vocabulary, and the prompt weighting syntax."""

import importlib.util
import json
import logging
import math
import os
import random
import sys
from pathlib import Path

import pytest
import tokenizers
from chroma_nodes.chroma.errors import CheckpointError, PromptError
from chroma_nodes.chroma.text.tokenizer import Tokenizer
from chroma_nodes.chroma.text.weighting import parse_weights

WORDS = ["▁a", "▁red", "▁fox", "▁", "s", "<", ">", "/", "p", "a", "d", "(", ")", "x"]


def tiny_backend(special=("<pad>", "</s>", "<unk>")):
    """A unigram tokenizer shaped like T5's: pad 0, end 1, unknown 2, an end-token processor."""
    vocabulary = [(token, 0.0) for token in special] + [(word, -2.0) for word in WORDS]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=len(special) - 1))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()]
    )
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(list(special))
    if "</s>" in special:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
        )
    return backend


def ids(*words):
    return [3 + WORDS.index(word) for word in words]


def save(backend, folder):
    path = folder / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.from_file(save(tiny_backend(), tmp_path))


def test_special_ids_are_read_from_the_vocabulary(tmp_path):
    swapped = Tokenizer(tiny_backend(("</s>", "<unk>", "<pad>")))
    assert (swapped.eos_id, swapped.pad_id) == (0, 2)


def test_tokenizer_of_another_kind_is_refused():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1}))
    with pytest.raises(CheckpointError, match="expected a Unigram model, got WordLevel"):
        Tokenizer(backend)


def test_encode_adds_no_end_token(tokenizer):
    assert (tokenizer.eos_id, tokenizer.pad_id) == (1, 0)
    assert tokenizer.encode("a red fox") == ids("▁a", "▁red", "▁fox")
    assert tokenizer.with_eos(tokenizer.encode("a red")) == [*ids("▁a", "▁red"), 1]


def test_empty_prompt_is_the_end_token_alone(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.with_eos([]) == [1]


def test_ids_are_those_of_the_backend(tokenizer):
    text = "a redfox  sad\n(a) xs 狐 pad"
    assert tokenizer.with_eos(tokenizer.encode(text)) == tiny_backend().encode(text).ids


def test_unknown_characters_become_the_unknown_token(tokenizer):
    assert 2 in tokenizer.encode("狐")


@pytest.mark.parametrize("typed", ["</s>", "<pad>"])
def test_typed_special_tokens_are_text(tokenizer, typed):
    assert tokenizer.encode(f"a {typed}") == ids("▁a", "▁", *typed)
    assert tiny_backend().token_to_id(typed) in tiny_backend().encode(f"a {typed}").ids[:-1]


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    backend = tiny_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_file(save(backend, tmp_path))
    assert tokenizer.encode("a red fox") == ids("▁a", "▁red", "▁fox")


def test_truncate_keeps_room_for_the_end_token(tokenizer, caplog):
    whole = tokenizer.encode("a " * 508 + "red fox fox")
    assert len(whole) == 511
    with caplog.at_level(logging.WARNING, "chroma"):
        assert tokenizer.truncate(whole) == whole
    assert not caplog.records
    kept = tokenizer.truncate([*whole, *ids("▁red", "▁fox")])
    assert kept == whole
    (record,) = caplog.records
    assert record.name == "chroma" and record.levelname == "WARNING"
    message = record.getMessage()
    assert "514 tokens" in message and "2 more than the 512" in message and "'red fox'" in message


def test_truncate_shortens_a_long_tail_in_the_warning(tokenizer, caplog):
    tokenizer.truncate(tokenizer.encode("a" + "x" * 5000), limit=3)
    assert len(caplog.records[0].getMessage()) < 450


def test_broken_unicode_is_refused(tokenizer):
    with pytest.raises(PromptError, match="surrogate"):
        tokenizer.encode("a \ud83d fox")


@pytest.mark.parametrize("content", [None, "", "{}", json.dumps({"model": {}}), b"\xff\xfe\x00"])
def test_unreadable_file_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"cannot read the tokenizer .*tokenizer\.json") as e:
        Tokenizer.from_file(path)
    assert "\n" not in str(e.value)


def test_file_without_t5_tokens_is_refused(tmp_path):
    path = save(tiny_backend(("<pad>", "<unk>")), tmp_path)
    with pytest.raises(CheckpointError, match="not a T5 tokenizer"):
        Tokenizer.from_file(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("()", []),
        ("a red fox", [("a red fox", 1)]),
        ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red: 0.5 )", [("red", 0.5)]),
        ("(red:-1)", [("red", -1)]),
        ("((red:1.2))", [("red", 1.2)]),
        ("((red) fox:1.5)", [("red", 1.5 * 1.1), (" fox", 1.5)]),
        ("(a (red:0.8) fox:2)", [("a ", 2), ("red", 0.8), (" fox", 2)]),
        ("(a)(red:2)", [("a", 1.1), ("red", 2)]),
        ("(time 12:30:1.2)", [("time 12:30", 1.2)]),
        ("(word:abc)", [("word:abc", 1.1)]),
        ("(word:)", [("word:", 1.1)]),
        ("(:1.2)", [(":1.2", 1.1)]),
        ("word:1.2", [("word:1.2", 1)]),
        (r"\(red\)", [("(red)", 1)]),
        (r"(\(red\):1.2)", [("(red)", 1.2)]),
        (r"(red\)", [("(red)", 1)]),
        ("(red", [("(red", 1)]),
        ("red)", [("red)", 1)]),
        ("a) (red)", [("a) (red)", 1)]),
        ("(a (red)", [("a ", 1.1), ("(red", 1.1)]),
        ("[red] {fox}", [("[red] {fox}", 1)]),
    ],
)
def test_weights(text, expected):
    assert parse_weights(text) == [(part, pytest.approx(weight)) for part, weight in expected]


@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "1e999"])
def test_numbers_that_would_blacken_the_picture_are_text(number):
    assert parse_weights(f"(red:{number})") == [(f"red:{number}", pytest.approx(1.1))]


def test_nesting_has_an_end():
    """Behind a hundred levels parentheses are text: each would read the whole prompt again."""
    for depth, left in ((100, 0), (sys.getrecursionlimit(), sys.getrecursionlimit() - 100)):
        ((text, weight),) = parse_weights("(" * depth + "red" + ")" * depth)
        assert text == "(" * left + "red" + ")" * left
        assert math.log(weight) == pytest.approx(100 * math.log(1.1))


def test_equals_comfyui():
    root = os.environ.get("COMFYUI_PATH")
    if not root:
        pytest.skip("COMFYUI_PATH is not set")
    path = Path(root) / "comfy" / "sd1_clip.py"
    source = path.read_text(encoding="utf-8").split("\ndef parse_parentheses", 1)[1]
    source = "def parse_parentheses" + source.split("\ndef safe_load_embed_zip", 1)[0]
    spec = importlib.util.spec_from_loader("comfyui_weights", loader=None)
    assert spec is not None
    comfyui = importlib.util.module_from_spec(spec)
    exec(compile(source, str(path), "exec"), comfyui.__dict__)  # noqa: S102
    generator = random.Random(0)
    for _ in range(5000):
        text = "".join(generator.choice("()ab:1.2\\ -") for _ in range(generator.randrange(15)))
        segments = comfyui.token_weights(comfyui.escape_important(text), 1.0)
        theirs = [(comfyui.unescape_important(part), weight) for part, weight in segments]
        assert parse_weights(text) == theirs, text
