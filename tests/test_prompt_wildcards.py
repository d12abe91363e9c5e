"""Wildcards: braces, files, and the bounds on both."""

import collections
import contextlib
import itertools
import random
import re

import numpy as np
import pytest
import scipy.stats
from chroma_nodes.chroma.errors import PromptError
from chroma_nodes.chroma.prompt import wildcard_files
from chroma_nodes.chroma.prompt.wildcard_files import WildcardFolders
from chroma_nodes.chroma.prompt.wildcards import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    escape,
    expand,
    expand_lines,
)
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**64 - 1)
# What the syntax is made of, and a few plain letters.
SIGNS = st.text(st.sampled_from("{}|_\\:.0123/ab\n"), max_size=60)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(st.one_of(WORDS, SIGNS), SEEDS)
def test_escaped_text_comes_out_as_it_was(text, seed):
    assert expand(escape(text), seed) == text


# A prompt is a list of words and choices, a choice a tuple of (weight, prompt). No word ends in a
# backslash, which would make the brace behind it plain.
WORDS = WORDS.map(lambda word: word.rstrip("\\"))
PROMPTS = st.recursive(
    st.lists(WORDS, max_size=2),
    lambda inner: st.lists(
        st.one_of(
            WORDS, st.lists(st.tuples(st.integers(0, 3), inner), min_size=1, max_size=3).map(tuple)
        ),
        max_size=3,
    ),
    max_leaves=6,
)


def written(prompt):
    return "".join(
        escape(part)
        if isinstance(part, str)
        else "{" + "|".join(f"{weight}::{written(inner)}" for weight, inner in part) + "}"
        for part in prompt
    )


def outcomes(prompt):
    """Everything the prompt can become; a choice without a weight above 0 has no outcome."""
    parts = [
        {part}
        if isinstance(part, str)
        else set().union(*(outcomes(inner) for weight, inner in part if weight))
        for part in prompt
    ]
    return {"".join(parts) for parts in itertools.product(*parts)}


@given(PROMPTS, SEEDS)
@settings(deadline=None)
def test_what_comes_out_is_one_of_the_ways_through_the_tree(prompt, seed):
    possible = outcomes(prompt)
    try:
        made = expand(written(prompt), seed)
    except PromptError as error:
        assert "add up to 0" in str(error)
        assert not possible or "0::" in written(prompt)
    else:
        assert made in possible
        assert expand(written(prompt), seed) == made


def test_weights_are_odds():
    text, wanted = "{3::a|b|0::c|.5::d|{e|f}}", {"a": 6, "b": 2, "d": 1, "e": 1, "f": 1}
    seen = collections.Counter(expand(text, seed) for seed in range(5500))
    assert seen.keys() == wanted.keys()
    expected = [5500 * share / 11 for share in wanted.values()]
    assert scipy.stats.chisquare([seen[key] for key in wanted], expected).pvalue > 1e-3


@pytest.mark.parametrize("seed", [0, 1, 7, 2**64 - 1])
def test_choices_are_those_of_pythons_generator_in_the_order_of_the_text(seed):
    draw = random.Random(seed)
    shares = [[1, 1], [5, 2, 3], [1] * 4]
    wanted = [int(np.searchsorted(np.cumsum(s), draw.random() * sum(s), "right")) for s in shares]
    made = expand("{0|1} {5::0|2::1|3::2} {0|1|2|3}", seed)
    assert [int(word) for word in made.split()] == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ""),
        ("a | b", "a | b"),
        (r"\{a\|b\} \_", "{a|b} _"),
        (r"(red:1.2) \(plain\)", r"(red:1.2) \(plain\)"),
        ("{}", ""),
        ("{a }b", "a b"),
        ("{-1::a}", "-1::a"),
        ("{1:2}", "1:2"),
        ("{ 2::a}", "a"),
        ("{{{a}}}", "a"),
        ("snake_case ____ __ _a_ __ a__", "snake_case ____ __ _a_ __ a__"),
        (r"\__init__", "__init__"),
    ],
)
def test_by_hand(text, wanted):
    assert expand(text, 0) == wanted


def test_several_prompts_have_a_line_and_a_seed_each():
    text = "{a|b|c|d}\nx {e|f|g|h}"
    lines = expand_lines(text, 5, 40).split("\n")
    assert lines == [expand(text, 5 + i).replace("\n", " ") for i in range(40)]
    assert len(set(lines)) > 5
    assert expand_lines(text, 5, 1) == expand(text, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a {b", r"a \{ without its partner at character 3.*\\\{"),
        ("{a|{b}", r"a \{ without its partner at character 1"),
        ("a}", r"a \} without its partner at character 2.*\\\}"),
        ("{0::a|0::b}", "weights of a choice in braces add up to 0"),
        ("{" + "9" * 400 + "::a}", "expected a smaller number"),
        ("{" + "9" * 308 + "::a|" + "9" * 308 + "::b}", "add up to inf"),
        ("{" * (MAX_DEPTH + 1) + "}" * (MAX_DEPTH + 1), "more than 32 deep"),
        ("{a}" * 1001, "more than 1000 choices"),
        ("a" * (MAX_CHARACTERS + 1), "past 100000 characters"),
        ("__colour__", "no folder for the wildcard file __colour__"),
    ],
)
def test_errors_say_what_and_where(text, message):
    with pytest.raises(PromptError, match=message) as error:
        expand(text, 0)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@given(SIGNS, SEEDS)
def test_any_text_gives_a_prompt_or_our_error(text, seed):
    with contextlib.suppress(PromptError):
        assert len(expand(text, seed, lambda name: ["x", "2::{y|__a__}"])) <= MAX_CHARACTERS


# Files


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "wildcards"
    (folder / "animals").mkdir(parents=True)
    (folder / "colour.txt").write_bytes(b"\xef\xbb\xbf# remark\r\nred\r\n\r\n  0::blue  \n")
    (folder / "animals" / "wild.txt").write_text("{small|big} __colour__ fox\n")
    (folder / "loop.txt").write_text("a __loop__\n")
    (folder / "bomb.txt").write_text("__bomb2__ __bomb2__\n")
    (folder / "bomb2.txt").write_text("__bomb__ __bomb__\n")
    (folder / "hollow.txt").write_text("# nothing\n\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "brace.txt").write_text("a {b\n")
    (tmp_path / "secret.txt").write_text("secret\n")
    (tmp_path / "wildcards-secret.txt").write_text("secret\n")
    return folder


def from_files(text, *folders, seed=0):
    return expand(text, seed, WildcardFolders(folders).read_lines)


def test_lines_of_files(folder):
    assert from_files("a __colour__ car", folder) == "a red car"
    made = {from_files("__animals/wild__, __colour__", folder, seed=seed) for seed in range(20)}
    assert made == {"small red fox, red", "big red fox, red"}
    assert from_files("__colour____colour__ __a", folder) == "redred __a"


def test_the_first_folder_that_has_the_file_counts(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "colour.txt").write_text("green")
    assert from_files("__colour__", other, folder) == "green"
    assert from_files("__colour__", folder, other) == "red"
    made = from_files("__animals/wild__", tmp_path / "gone", other, folder)
    assert made.endswith(" green fox")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret", "leads out of the wildcards folder"),
        ("animals/../../secret", "leads out of the wildcards folder"),
        ("animals/../colour", "leads out of the wildcards folder"),
        ("./colour", "leads out of the wildcards folder"),
        ("/etc/hostname", "leads out of the wildcards folder"),
        ("animals//wild", "leads out of the wildcards folder"),
        ("..x/../..-secret", "leads out of the wildcards folder"),
        ("colours", r"colours.txt is not in .*did you mean __colour__\?"),
        ("zzz", r"zzz.txt is not in .*write \\__zzz\\__"),
        ("é" * 200, "is not in"),
        ("loop", "more than 32 deep"),
        ("bomb", "more than 32 deep|more than 1000 choices"),
        ("hollow", "hollow.txt has no options"),
        ("latin", "latin.txt is not UTF-8"),
        ("brace", r"the wildcard file brace has a \{ without its partner"),
    ],
)
def test_file_errors(folder, name, message):
    with pytest.raises(PromptError, match=message) as error:
        from_files(f"a __{name}__", folder)
    assert "\n" not in str(error.value) and "secret\n" not in str(error.value)


def test_links_do_not_lead_out(folder, tmp_path):
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "away").symlink_to(tmp_path, target_is_directory=True)
    (folder / "ring.txt").symlink_to(folder / "ring.txt")
    for name in ("link", "away/secret"):
        with pytest.raises(PromptError, match="leads out"):
            from_files(f"__{name}__", folder)
    with pytest.raises(PromptError, match="is not in"):
        from_files("__ring__", folder)
    linked = tmp_path / "linked"
    linked.symlink_to(folder, target_is_directory=True)
    assert from_files("__colour__", linked) == "red"


def test_a_file_that_is_too_large_is_not_read_whole(folder, monkeypatch):
    monkeypatch.setattr(wildcard_files, "MAX_BYTES", 2**20)
    with (folder / "huge.txt").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(PromptError, match="larger than 1 MiB"):
        from_files("__huge__", folder)


def test_the_fingerprint_follows_the_files(folder):
    folders = WildcardFolders((folder,))
    seen = [folders.fingerprint(), folders.fingerprint()]
    (folder / "colour.txt").write_text("green")
    seen.append(folders.fingerprint())
    (folder / "new.txt").write_text("x")
    seen.append(folders.fingerprint())
    (folder / "picture.png").write_text("x")
    seen.append(folders.fingerprint())
    assert seen[0] == seen[1] and seen[3] == seen[4] and len(set(seen)) == 3
    assert re.fullmatch("[0-9a-f]{64}", seen[0])
