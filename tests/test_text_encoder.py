"""Prompts to embeddings: pad rules, weights and batches against transformers' T5EncoderModel."""

import logging

import pytest
import torch
from chroma_nodes.chroma.errors import CheckpointError, PromptError
from chroma_nodes.chroma.text.encoder import PadRule, TextEncoder
from chroma_nodes.chroma.text.t5 import T5Config, T5Encoder
from chroma_nodes.chroma.text.tokenizer import Tokenizer
from test_t5 import expected, hf_model, ours
from test_tokenizer import ids, tiny_backend

PROMPTS = ["a red fox", "", "a", "red fox " * 20]


@pytest.fixture(scope="module")
def model():
    return hf_model()


@pytest.fixture(scope="module")
def encoder(model):
    return TextEncoder(Tokenizer(tiny_backend()), ours(model))


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("rule", PadRule)
def test_prompt_equals_transformers(model, encoder, rule):
    tokens = torch.tensor([[*ids("▁a", "▁red", "▁fox"), 1]])
    text = encoder.encode(["a red fox"], rule)
    assert text.lengths.tolist() == [4 if rule is PadRule.COMFY_NOPAD else 5]
    close(text.hidden, expected(model, tokens, rule))


def test_reference_is_the_default(encoder):
    default, reference = (encoder.encode(["a"]), encoder.encode(["a"], PadRule.REFERENCE))
    assert torch.equal(default.hidden, reference.hidden)


@pytest.mark.parametrize("prompt", ["", " "])
def test_empty_prompt_is_end_token_and_pad(model, encoder, prompt):
    text = encoder.encode([prompt])
    assert text.lengths.tolist() == [2]
    if prompt == "":
        close(text.hidden, expected(model, torch.tensor([[1]]), PadRule.REFERENCE))


@pytest.mark.parametrize("rule", PadRule)
def test_batch_equals_single_runs(encoder, rule):
    batch = encoder.encode(PROMPTS, rule)
    for i, prompt in enumerate(PROMPTS):
        single = encoder.encode([prompt], rule)
        n = int(single.lengths[0])
        assert int(batch.lengths[i]) == n == single.hidden.shape[1]
        close(batch.hidden[i, :n], single.hidden[0])
        assert not batch.hidden[i, n:].any()


@pytest.mark.parametrize("rule", PadRule)
def test_weights_scale_away_from_an_all_pad_sequence(model, encoder, rule):
    """The empty sequence here is as long as the prompt; the encoder runs one pad token."""
    tokens = torch.tensor([[*ids("▁a", "▁red", "▁fox"), 1]])
    plain = expected(model, tokens, rule)
    empty = model(torch.zeros(1, plain.shape[1], dtype=torch.long)).last_hidden_state
    weights = torch.tensor([1, 1.3, 0.5, 1, 1])[: plain.shape[1], None]
    text = encoder.encode(["a (red:1.3) (fox:0.5)"], rule)
    close(text.hidden, empty + (plain - empty) * weights)


def test_segments_are_tokenized_one_by_one(encoder):
    weighted = encoder.encode(["(a)p"])
    # Alone, "p" starts a word: "▁" + "p"; inside "ap" it does not.
    assert int(weighted.lengths[0]) == len(ids("▁a", "▁", "p")) + 2
    assert int(encoder.encode(["ap"]).lengths[0]) == len(ids("▁a", "p")) + 2


def test_weight_one_changes_nothing(encoder):
    assert torch.equal(encoder.encode(["(red fox:1)"]).hidden, encoder.encode(["red fox"]).hidden)


def test_weights_of_one_row_leave_the_others_alone(encoder):
    batch = encoder.encode(["a red", "a (red:2)"])
    close(batch.hidden[0], encoder.encode(["a red"]).hidden[0])
    assert (batch.hidden[0] - batch.hidden[1]).abs().max() > 0.01


def test_unweighted_prompt_keeps_its_parentheses(encoder):
    text = encoder.encode(["(a)"], weighted=False)
    escaped = encoder.encode([r"\(a\)"])
    assert torch.equal(text.hidden, escaped.hidden)
    assert not torch.equal(text.lengths, encoder.encode(["(a)"]).lengths)


@pytest.mark.parametrize("rule", [PadRule.REFERENCE, PadRule.COMFY_NOPAD])
def test_long_prompt_is_cut_to_511_tokens_and_the_end(model, encoder, rule, caplog):
    with caplog.at_level(logging.WARNING, "chroma"):
        text = encoder.encode(["a " * 600 + "(fox:1.5)"], rule)
    assert "'a a" in caplog.text and "fox" in caplog.text
    assert text.lengths.tolist() == [512]
    tokens = torch.tensor([[*ids("▁a") * 511, 1]])
    close(text.hidden, model(tokens).last_hidden_state)


def test_510_words_still_get_their_pad(encoder):
    assert encoder.encode(["a " * 509 + "a"]).lengths.tolist() == [512]
    assert encoder.encode(["a " * 509 + "a"], PadRule.COMFY_NOPAD).lengths.tolist() == [511]


def test_encoding_keeps_no_graph(model):
    encoder = TextEncoder(Tokenizer(tiny_backend()), ours(model).requires_grad_(True))
    assert not encoder.encode(["a (red:2)"]).hidden.requires_grad


@pytest.mark.parametrize("prompts", ["a red fox", []])
def test_only_a_list_of_prompts_is_accepted(encoder, prompts):
    with pytest.raises(PromptError, match="list of at least one prompt"):
        encoder.encode(prompts)


def test_tokenizer_of_another_model_is_refused():
    small = T5Encoder(T5Config(10, 8, 2, 4, 16, 1))
    with pytest.raises(CheckpointError, match="only 10 embeddings"):
        TextEncoder(Tokenizer(tiny_backend()), small)
