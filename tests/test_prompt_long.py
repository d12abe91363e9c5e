"""Prompts past 512 tokens, and prompts joined with each other."""

import pytest
import torch
from chroma_nodes.chroma.errors import PromptError
from chroma_nodes.chroma.prompt.long import MAX_PARTS, concatenate, encode_long, split_prompt
from chroma_nodes.chroma.text.encoder import PadRule, TextEmbedding, TextEncoder
from chroma_nodes.chroma.text.tokenizer import Tokenizer
from chroma_nodes.chroma.text.weighting import parse_weights
from chroma_nodes.chroma.tiny import files as small
from comfy_inprocess import random_t5
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import random_transformer

TOKENIZER = Tokenizer.from_file(small.TOKENIZER)
SENTENCES = "a red fox sits on a mat. the sun is up! is it cold, or is it warm? "


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(TOKENIZER, random_t5())


@given(st.text(st.sampled_from("ab .,!(:1)xy"), max_size=120), st.integers(4, 20))
@settings(deadline=None)
def test_no_token_and_no_weight_is_lost(text, limit):
    ids, weights = [], []
    for segment, weight in parse_weights(text):
        ids += TOKENIZER.encode(segment)
        weights += [weight] * len(TOKENIZER.encode(segment))
    try:
        rows = split_prompt(TOKENIZER, text, limit)
    except PromptError:
        assert len(ids) > MAX_PARTS * (limit // 2)
        return
    assert [token for row, _ in rows for token in row[:-1]] == ids
    assert [weight for _, row in rows for weight in row[:-1]] == weights
    for row, row_weights in rows:
        assert len(row) == len(row_weights) <= limit
        assert (row[-1], row_weights[-1]) == (TOKENIZER.eos_id, 1.0)
    assert len(rows) == 1 or all(len(row) > 1 for row, _ in rows)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        (SENTENCES * 60, (".", "!", "?")),
        ("a red fox, on a mat, " * 150, (",",)),
        ("sitting outside " * 300, ("sitting", "outside")),
    ],
)
def test_parts_end_where_the_text_pauses(text, ends):
    rows = split_prompt(TOKENIZER, text)
    assert len(rows) > 2
    for row, _ in rows[:-1]:
        assert TOKENIZER.decode(row).endswith(ends) and 256 <= len(row) <= 512


def test_a_text_without_any_place_to_cut_is_cut_anyway():
    rows = split_prompt(TOKENIZER, "x" * 3000)
    assert len(rows) > 1 and {len(row) for row, _ in rows[:-1]} == {512}


def test_the_number_of_parts_has_a_bound():
    with pytest.raises(PromptError, match="take more than 16 parts of 512; shorten it"):
        split_prompt(TOKENIZER, SENTENCES * 1000)


@pytest.mark.parametrize("rule", PadRule)
@pytest.mark.parametrize("text", ["", "a (red:1.3) fox", "a red fox " * 170 + "red"])
def test_up_to_512_tokens_it_is_the_plain_encoding(encoder, rule, text):
    long, plain = encode_long(encoder, text, rule), encoder.encode([text], rule)
    assert torch.equal(long.hidden, plain.hidden) and torch.equal(long.lengths, plain.lengths)


@pytest.mark.parametrize(("rule", "pads"), [("reference", 1), ("hf", 1), ("comfy_nopad", 0)])
def test_parts_stand_behind_each_other_with_one_pad_at_the_end(encoder, rule, pads):
    text = SENTENCES * 25 + "(a small mat:1.4)"
    rows = split_prompt(TOKENIZER, text)
    assert len(rows) > 1
    made = encode_long(encoder, text, PadRule(rule))
    alone = [encoder.encode_tokens([row], PadRule(rule)).hidden[0] for row in rows]
    parts = [hidden[: len(ids)] for hidden, (ids, _) in zip(alone, rows, strict=True)]
    wanted = torch.cat([*parts, alone[-1][len(rows[-1][0]) :]])
    assert made.hidden.shape[1] == sum(len(ids) for ids, _ in rows) + pads
    torch.testing.assert_close(made.hidden[0], wanted, rtol=0, atol=1e-5)
    assert made.lengths.tolist() == [made.hidden.shape[1]]


def by_hand(first, i, second, j):
    rows = (first.hidden[i, : first.lengths[i]], second.hidden[j, : second.lengths[j]])
    return torch.cat(rows)[None]


@torch.no_grad()
def test_joined_prompts_are_read_as_one_without_gaps(encoder):
    model = random_transformer()
    first = encoder.encode(["a red fox", "a mat", "the sun is up over the red mat"])
    second = encoder.encode(["in the rain on a long day", "x", ""])
    torch.manual_seed(0)
    latent, sigma = torch.randn(3, 16, 4, 4), torch.tensor([0.9, 0.5, 0.2])
    for behind, rows in ((second, (0, 1, 2)), (encoder.encode(["at dawn"]), (0, 0, 0))):
        joined = concatenate(first, behind)
        made = model(latent, sigma, joined.hidden, joined.lengths)
        for i, j in enumerate(rows):
            text = by_hand(first, i, behind, j)
            assert int(joined.lengths[i]) == text.shape[1]
            alone = model(latent[i : i + 1], sigma[i : i + 1], text)
            torch.testing.assert_close(made[i : i + 1], alone, rtol=1e-4, atol=1e-5)
            swapped = model(latent[i : i + 1], sigma[i : i + 1], by_hand(behind, j, first, i))
            torch.testing.assert_close(alone, swapped, rtol=1e-4, atol=1e-5)


def test_one_prompt_goes_before_many_and_the_rest_is_zero(encoder):
    one, many = encoder.encode(["a red fox"]), encoder.encode(["x", "on a long mat"])
    joined = concatenate(one, many)
    for i in range(2):
        text = by_hand(one, 0, many, i)
        torch.testing.assert_close(joined.hidden[i : i + 1, : text.shape[1]], text)
        assert not joined.hidden[i, text.shape[1] :].any()


def test_prompts_that_do_not_go_together(encoder):
    two, three = encoder.encode(["a", "b"]), encoder.encode(["a", "b", "c"])
    with pytest.raises(PromptError, match="cannot join 2 prompts with 3; expected as many, or one"):
        concatenate(two, three)
    wide = TextEmbedding(torch.zeros(2, 3, 5), torch.tensor([3, 3]))
    with pytest.raises(PromptError, match=r"widths \d+ and 5; encode both with the same"):
        concatenate(two, wide)
