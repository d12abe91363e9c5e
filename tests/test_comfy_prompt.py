"""The prompt nodes in ComfyUI and without it: the same texts, and the same conditioning.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment.
"""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import logging
from pathlib import Path

import pytest
import torch
from chroma_nodes.chroma.errors import PromptError
from chroma_nodes.chroma.prompt.long import concatenate, encode_long
from chroma_nodes.chroma.prompt.tags import PHOTOGRAPH
from chroma_nodes.chroma.prompt.wildcards import expand, expand_lines
from chroma_nodes.chroma.text.encoder import PadRule, TextEncoder
from chroma_nodes.chroma.text.tokenizer import Tokenizer
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.chroma.workflow import Context, nodes_prompt
from comfy_inprocess import complaint, import_comfyui, random_t5, write_small_files

import_comfyui()

import comfy.samplers
import folder_paths
from chroma_nodes.nodes import host_model, host_text, prompting
from chroma_nodes.nodes.conditioning import ChromaTextEncode

TEXT = "a {red|blue} __animals/kind__ on {3::a mat|a rock}"
SENTENCES = "a red fox sits on a mat. the sun is up. " * 40
STANDALONE = {node.id: node for node in nodes_prompt.NODES}
NODES = [getattr(prompting, name) for name in STANDALONE]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_small_files(tmp_path_factory.mktemp("models"))


@pytest.fixture
def clip(files):
    return host_text.load_clip(files["text_encoders"], "fp32")


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(Tokenizer.from_file(small.TOKENIZER), random_t5())


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A models folder with wildcards in it, ComfyUI's own for the time of the test."""
    (tmp_path / "wildcards" / "animals").mkdir(parents=True)
    (tmp_path / "wildcards" / "animals" / "kind.txt").write_text("fox\n2::{small|big} dog\n")
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    return tmp_path


def standalone(kind, models=None, **inputs):
    context = Context(torch.device("cpu"), models, None, None, {}, progress=False)
    return STANDALONE[kind].run(context, **inputs)[0]


def result(output):
    assert len(output.result) == 1
    return output.result[0]


def shown(output):
    return output.ui.as_dict()["text"][0]


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_menus_and_outputs_are_those_of_the_standalone_node(node):
    schema, ours = node.define_schema(), STANDALONE[node.__name__]
    assert [output.display_name for output in schema.outputs] == [name for name, _ in ours.outputs]
    assert schema.is_output_node == ours.is_output
    theirs = {socket.id: socket for socket in schema.inputs}
    assert list(theirs) == [spec.name for spec in ours.inputs]
    for spec in ours.inputs:
        if spec.choices is not None:
            assert tuple(theirs[spec.name].options) == spec.choices
            assert theirs[spec.name].default == spec.default


# The prompt node


def test_the_prompt_node_counts_tokens_and_marks_what_is_cut(clip, caplog):
    with caplog.at_level(logging.INFO, "chroma"):
        text = shown(ChromaTextEncode.execute(clip, "a red (fox:1.2)", "reference", False))
    assert text == "4 of 512 tokens" and text in caplog.text
    over = " ".join(["red"] * 509 + ["a", "fox", "red", "fox", "a"])
    output = ChromaTextEncode.execute(clip, over, "reference", False)
    assert shown(output).startswith("515 of 512 tokens, 3 too many. Cut off behind '...red ")
    assert shown(output).endswith("red a fox': red fox a")
    assert result(output)[0][0].shape[1] == 512


def test_prompts_on_lines_are_counted_one_by_one(clip):
    lines = "a red fox\n\n" + "fox " * 600 + "\na\n"
    first, second = shown(ChromaTextEncode.execute(clip, lines, "reference", True)).split("\n")
    assert first == "3 prompts, 2 to 601 of 512 tokens"
    assert second.startswith("prompt 2: 601 of 512 tokens, 89 too many")


# Texts


@pytest.mark.parametrize("count", [1, 3])
def test_wildcards(models, count):
    read_lines = prompting.wildcard_folders().read_lines
    for seed in range(8):
        output = prompting.ChromaWildcards.execute(TEXT, seed, count)
        assert result(output) == shown(output) == expand_lines(TEXT, seed, count, read_lines)
        same = standalone("ChromaWildcards", models, text=TEXT, seed=seed, count=count)
        assert result(output) == same
    assert expand(TEXT, 0, read_lines).split()[2] in ("fox", "small", "big")


def test_wildcard_folders_of_extra_model_paths_come_first(models, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "wildcards", ([str(other)], {".txt"}))
    assert prompting.wildcard_folders().folders == (other, models / "wildcards")
    (other / "mood.txt").write_text("calm")
    made = result(prompting.ChromaWildcards.execute("__mood__ __animals/kind__", 0, 1))
    assert made.startswith("calm ")


def test_wildcards_run_again_when_a_file_changed(models):
    before = prompting.ChromaWildcards.fingerprint_inputs(text=TEXT, seed=0, count=1)
    assert before == prompting.ChromaWildcards.fingerprint_inputs(text=TEXT, seed=1, count=2)
    (models / "wildcards" / "animals" / "kind.txt").write_text("cat")
    assert before != prompting.ChromaWildcards.fingerprint_inputs(text=TEXT, seed=0, count=1)


def test_wildcards_stay_in_their_folder(models):
    Path(models / "secret.txt").write_text("secret")
    for run in (
        lambda text: prompting.ChromaWildcards.execute(text, 0, 1),
        lambda text: standalone("ChromaWildcards", models, text=text, seed=0, count=1),
    ):
        with pytest.raises(PromptError, match="leads out of the wildcards folder"):
            run("__../secret__")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "A fox."),
        ({"quality": "masterpiece", "aesthetic": 0}, "A fox. masterpiece. aesthetic 0."),
        ({"tags": "dawn. mist", "separator": "comma"}, "A fox. dawn, mist"),
        ({"repeats": 2}, f"A fox. {PHOTOGRAPH} {PHOTOGRAPH}"),
    ],
)
def test_tags(changes, wanted):
    inputs = {
        "text": "A fox.", "quality": "none", "aesthetic": -1, "tags": "", "separator": "period",
        "phrase": PHOTOGRAPH, "repeats": 0, **changes,
    }  # fmt: skip
    assert result(prompting.ChromaPromptTags.execute(**inputs)) == wanted
    assert standalone("ChromaPromptTags", **inputs) == wanted


def test_menus_refuse_what_is_not_in_them():
    tags = prompting.ChromaPromptTags
    assert complaint(tags, quality="none", separator="comma") is None
    assert "'best' is not in the list" in (complaint(tags, quality="best") or "")
    assert "'dash' is not in the list" in (complaint(tags, quality=None, separator="dash") or "")
    assert "'x' is not" in (complaint(prompting.ChromaLongTextEncode, pad_rule="x") or "")


def test_the_check_reports_in_the_node_and_the_log(clip, encoder, caplog):
    inputs = {"positive": "red, fox, mat, sun, sky", "negative": "a fox", "flash": False}
    with caplog.at_level(logging.INFO, "chroma"):
        output = prompting.ChromaPromptCheck.execute(clip, **inputs)
    first, *rest = result(output).split("\n")
    assert first.startswith("prompt: ") and first.endswith("; negative: 3 of 512 tokens")
    assert [line.split()[0] for line in rest] == ["Tags", "The"]
    assert shown(output) == result(output)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert standalone("ChromaPromptCheck", clip=encoder, **inputs) == result(output)


# Conditioning


@pytest.mark.parametrize("rule", PadRule)
def test_a_long_prompt_equals_ours(clip, encoder, rule):
    output = prompting.ChromaLongTextEncode.execute(clip, SENTENCES + "(red:1.3)", rule.value)
    ((hidden, extra),) = result(output)
    assert hidden.shape[1] > 512 and extra == {"pooled_output": None}
    close(hidden, encode_long(encoder, SENTENCES + "(red:1.3)", rule).hidden)
    assert shown(output).startswith("parts of ")


def test_a_short_prompt_is_that_of_the_usual_node(clip):
    ((hidden, _),) = result(prompting.ChromaLongTextEncode.execute(clip, "a fox", "reference"))
    ((usual, _),) = result(ChromaTextEncode.execute(clip, "a fox", "reference", False))
    assert torch.equal(hidden, usual)


def encode(clip, *prompts):
    return result(ChromaTextEncode.execute(clip, "\n".join(prompts), "reference", True))


def test_joined_prompts_equal_ours_and_keep_their_settings(clip, encoder):
    first, second = ("a red fox", "a fox", "the sun"), ("at dawn", "a", "on a mat in the rain")
    theirs = encode(clip, *first)
    theirs[0][1]["area"] = (1, 2, 3, 4)
    before = theirs[0][0].clone()
    ((hidden, extra),) = result(prompting.ChromaTextConcat.execute(theirs, encode(clip, *second)))
    wanted = concatenate(encoder.encode(first), encoder.encode(second))
    close(hidden, wanted.hidden)
    assert torch.equal(extra["chroma_lengths"], wanted.lengths) and extra["area"] == (1, 2, 3, 4)
    assert torch.equal(theirs[0][0], before)
    inputs = {"first": encoder.encode(first), "second": encoder.encode(second)}
    assert torch.equal(standalone("ChromaTextConcat", **inputs).hidden, wanted.hidden)


def test_joined_prompts_of_equal_length_need_no_mask(clip):
    ((hidden, extra),) = result(
        prompting.ChromaTextConcat.execute(encode(clip, "a fox"), encode(clip, "a mat"))
    )
    assert "chroma_lengths" not in extra
    (first, _), (second, _) = encode(clip, "a fox")[0], encode(clip, "a mat")[0]
    assert torch.equal(hidden, torch.cat([first, second], 1))


def test_only_one_prompt_goes_behind(clip):
    fox = encode(clip, "a fox")
    with pytest.raises(PromptError, match="second conditioning holds 2 prompts, expected one"):
        prompting.ChromaTextConcat.execute(fox, fox + fox)
    assert len(result(prompting.ChromaTextConcat.execute(fox + fox, fox))) == 2


def test_a_batch_of_joined_prompts_makes_the_pictures_of_each_alone(clip, files):
    model = host_model.build_model(files["diffusion_models"], torch.float32)
    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.0])
    torch.manual_seed(3)
    noise = torch.randn(2, 16, 4, 4)

    def picture(noise, first, second):
        guider = comfy.samplers.CFGGuider(model)
        joined = result(prompting.ChromaTextConcat.execute(first, second))
        guider.set_conds(joined, encode(clip, "blurry and dull"))
        guider.set_cfg(3.0)
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)

    style = encode(clip, "at dawn")
    together = picture(noise, encode(clip, "a red fox", "the sun is up"), style)
    for i, prompt in enumerate(("a red fox", "the sun is up")):
        alone = picture(noise[i : i + 1], encode(clip, prompt), style)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2
