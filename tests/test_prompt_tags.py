"""Tags, token counts, and the advice of the guide."""

import pytest
from chroma_nodes.chroma.errors import PromptError
from chroma_nodes.chroma.prompt.check import check_prompts, has_comma_tags
from chroma_nodes.chroma.prompt.tags import (
    PHOTOGRAPH,
    SEPARATORS,
    add_tags,
    aesthetic_tag,
    join_tags,
    split_tags,
    tagged,
)
from chroma_nodes.chroma.prompt.tokens import Length, describe, measure
from chroma_nodes.chroma.text.tokenizer import Tokenizer
from chroma_nodes.chroma.tiny import files as small
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

WORD = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=6)
TAGS = st.lists(st.lists(WORD, min_size=1, max_size=3).map(" ".join), max_size=6)
LONG = "a red fox " * 40
PLAIN = {
    "quality": None, "aesthetic": None, "tags": "", "separator": "period", "phrase": PHOTOGRAPH,
    "repeats": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(small.TOKENIZER)


# Tags


@given(TAGS, st.sampled_from([*SEPARATORS]))
def test_tags_that_were_joined_come_apart(tags, separator):
    assert split_tags(join_tags(tags, separator)) == tags


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("", []),
        (" , ;\n.", []),
        ("red, green;blue\nsky.", ["red", "green", "blue", "sky"]),
        ("red. green fox. f/1.8", ["red", "green fox", "f/1.8"]),
        ("(a, b:1.2), c", ["(a, b:1.2)", "c"]),
        (r"fox \(animal, wild, c", [r"fox \(animal", "wild", "c"]),
        ("mt. fuji, dawn", ["mt. fuji", "dawn"]),
        ("a), b", ["a)", "b"]),
    ],
)
def test_tags_of_a_text(text, tags):
    assert split_tags(text) == tags


@pytest.mark.parametrize(
    ("text", "separator", "wanted"),
    [
        ("A fox.", "period", "A fox. a. b."),
        ("A fox ", "period", "A fox. a. b."),
        ("A fox!", "period", "A fox! a. b."),
        ("A fox", "comma", "A fox, a, b"),
        ("A fox,", "comma", "A fox, a, b"),
        ("", "comma", "a, b"),
    ],
)
def test_tags_follow_the_sentences(text, separator, wanted):
    assert add_tags(text, ["a", "b"], separator) == wanted
    assert add_tags(text, [], separator) == text.strip()


def test_everything_together():
    options = {
        **PLAIN, "quality": "best quality", "aesthetic": 8, "tags": "dawn, mist", "repeats": 2,
    }  # fmt: skip
    wanted = (
        "A fox. best quality. aesthetic 8. dawn. mist. The photograph is a . The photograph is a ."
    )
    assert tagged("A fox", **options) == wanted
    assert tagged("A fox", **PLAIN) == "A fox"
    assert tagged("", **{**PLAIN, "repeats": 1}) == PHOTOGRAPH
    assert tagged("x", **{**PLAIN, "phrase": " ", "repeats": 3}) == "x"


def test_values_that_are_none():
    for score in (-1, 12):
        with pytest.raises(PromptError, match=f"score is {score}; expected 0 to 11"):
            aesthetic_tag(score)
    with pytest.raises(PromptError, match="separator is 'dash'; expected one of period, comma"):
        join_tags(["a"], "dash")


# Tokens


@pytest.mark.parametrize("words", [0, 1, 510, 511, 512, 700])
def test_tokens_are_those_of_the_tokenizer_and_what_is_cut_is_named(tokenizer, words):
    backend = Backend.from_file(str(small.TOKENIZER))
    text = " ".join(("a", "red", "fox")[i % 3] for i in range(words))
    ids = backend.encode(text, add_special_tokens=False).ids
    assert len(ids) == words  # each of them is one token
    length = measure(tokenizer, text)
    assert (length.tokens, length.excess) == (words + 1, max(0, words + 1 - 512))
    assert length.cut == " ".join(text.split()[511:])
    if length.excess:
        assert " ".join(text.split()[:511]).endswith(length.kept) and length.kept
        assert f"{length.excess} too many. Cut off behind '...{length.kept}'" in str(length)
    else:
        assert str(length) == f"{words + 1} of 512 tokens"


def test_weights_and_their_parentheses_are_not_counted(tokenizer):
    plain, weighted = measure(tokenizer, "a red fox"), measure(tokenizer, "a (red:1.5) fox")
    assert weighted.tokens == plain.tokens


def test_lines_about_prompts():
    assert describe([Length(5)]) == ["5 of 512 tokens"]
    over = Length(600, "kept", "x" * 1000)
    lines = describe([Length(5), over, Length(9)])
    assert lines == ["3 prompts, 5 to 600 of 512 tokens", f"prompt 2: {over}"]
    assert len(str(over)) < 400 and str(over).endswith("...")


# Advice


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1girl, solo, red hair, blue eyes, smile", True),
        ("A portrait of a girl in the rain. solo, red hair, blue eyes, smile, hat", True),
        ("1girl. solo. red hair. blue eyes. smile. hat.", False),
        ("A fox, which is red, sits in the tall grass of a meadow, near a lake, at dawn.", False),
        ("There is a red, a green, and a blue balloon over the town.", False),
        ("(a, b, c, d, e:1.2) in one weight", False),
        ("a,,,,,,,b", False),
        ("", False),
    ],
)
def test_tags_between_commas_are_told_from_sentences(text, found):
    assert has_comma_tags(text) is found


@pytest.mark.parametrize(
    ("positive", "negative", "flash", "starts"),
    [
        ("A fox on a mat.", "", False, []),
        ("A fox on a mat. aesthetic 10. sharp.", LONG, False, []),
        ("A fox on a mat.", " \n", True, []),
        ("A fox.", "blurry", False, ["The negative prompt has"]),
        ("A fox.", LONG, True, ["At cfg 1"]),
        ("a fox " * 300, "", False, ["The prompt is too long"]),
        ("A fox.", "a fox " * 300, False, ["The negative prompt is too long"]),
        ("red, fox, mat, dawn, mist, rain", "", False, ["Tags between commas"]),
        ("A fox. Aesthetic 11", "", False, ["aesthetic 11 stands"]),
        ("A fox. aesthetic 12. aesthetic 3", "", False, ["aesthetic 12 is no tag"]),
        ("A fox on a mat. " * 20, "", False, []),
        ("A fox on a mat. " * 30, "", True, ["The prompt has"]),
    ],
)
def test_what_the_guide_warns_of(tokenizer, positive, negative, flash, starts):
    def count(prompt):
        return measure(tokenizer, prompt)

    lines = check_prompts(positive, negative, count, flash=flash)
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start) and "\n" not in line


@pytest.mark.parametrize(("tokens", "warned"), [(69, True), (70, False)])
def test_a_negative_prompt_needs_seventy_tokens(tokens, warned):
    lines = check_prompts("A fox.", "blurry", lambda prompt: Length(tokens))
    assert bool(lines) is warned
