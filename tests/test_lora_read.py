"""What a file of adapters comes out as: alpha, what is left out, and one clear error if bad."""

import json
import pickle
from math import inf, nan

import pytest
import torch
from chroma_nodes.chroma.checkpoint import read_transformer
from chroma_nodes.chroma.checkpoint.reader import read_header
from chroma_nodes.chroma.config import ChromaConfig
from chroma_nodes.chroma.errors import LoraError
from chroma_nodes.chroma.lora.adapters import LowRank
from chroma_nodes.chroma.lora.read import read_lora
from chroma_nodes.chroma.lora.report import report, trigger_words
from chroma_nodes.chroma.lora.tools.concatenate import concatenate_loras
from chroma_nodes.chroma.lora.tools.convert import convert_lora
from chroma_nodes.chroma.lora.tools.extract import extract_lora
from chroma_nodes.chroma.lora.tools.rules import RankRule
from chroma_nodes.chroma.tiny.files import TRANSFORMER
from lora_producers import CONFIG, PRODUCERS, TEXT_CONFIG, loha, lokr, numbers, peft, plain
from safetensors.torch import load_file, save_file

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
KEY = "double_blocks.0.img_attn.qkv.weight"
T5 = "lora_te3_encoder_block_0_layer_0_SelfAttention"
ATTENTION = "transformer.transformer_blocks.0.attn"
GOOD = plain(QKV, (96, 32))


@pytest.fixture
def write(tmp_path):
    def write(state, metadata=None, name="x.safetensors"):
        save_file(state, tmp_path / name, metadata)
        return tmp_path / name

    return write


@pytest.fixture
def read(write):
    return lambda *args, **kw: read_lora(write(*args, **kw), CONFIG, TEXT_CONFIG)


def adapter(lora, key=KEY):
    (placed,) = lora.transformer[key]
    assert isinstance(placed.adapter, LowRank)
    return placed.adapter


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (torch.tensor(2.0), 0.5), (torch.tensor([2.0]), 0.5), (torch.tensor(2), 0.5),
        (torch.tensor(2.0).bfloat16(), 0.5), (torch.tensor(-2.0), -0.5),
        (None, 1.0),
    ],
)  # fmt: skip
def test_alpha(alpha, scale, read):
    """alpha / r; missing, it is the rank."""
    state = GOOD if alpha is None else {**GOOD, f"{QKV}.alpha": alpha}
    assert adapter(read(state)).scale == scale


def header(**entries):
    return {
        "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in entries.items()})
    }


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        (header(r=4, lora_alpha=2), 0.5),
        (header(r=4, lora_alpha=2.0, use_rslora=True), 1.0),
        (header(r=4, lora_alpha=2, alpha_pattern={"transformer_blocks.0.attn.to_q": 6}), 1.5),
        (header(r=4, lora_alpha=2, alpha_pattern={r"^transformer_blocks\.0\.attn\.to_q$": 6}), 1.5),
        (header(r=4, lora_alpha=2, alpha_pattern={"to_q": 6}), 1.5),
        (header(lora_alpha=2, alpha_pattern={"o_q": 6, "transformer_blocks.1.attn.to_q": 6}), 0.5),
        (header(r=4), 1.0),
        (header(lora_alpha=None, alpha_pattern=None), 1.0),
        ({"lora_adapter_metadata": '{"text_encoder.lora_alpha": 2}'}, 1.0),
    ],
)  # fmt: skip
def test_alpha_in_the_header(metadata, scale, read):
    state = peft(f"{ATTENTION}.to_q", (32, 32))
    assert adapter(read(state, metadata)).scale == scale


def test_alpha_of_a_tensor_comes_first(read):
    name = f"{ATTENTION}.to_q"
    state = {**peft(name, (32, 32)), f"{name}.alpha": torch.tensor(8.0)}
    assert adapter(read(state, header(lora_alpha=2))).scale == 2


def test_alpha_of_the_text_encoder_is_its_own(read):
    name = "text_encoder.encoder.block.0.layer.0.SelfAttention.q"
    metadata = {
        "lora_adapter_metadata": '{"transformer.lora_alpha": 2, "text_encoder.lora_alpha": 8}'
    }
    lora = read(peft(name, (12, 24)) | GOOD, metadata)
    (placed,) = lora.text_encoder["encoder.block.0.layer.0.SelfAttention.q.weight"]
    assert placed.adapter.scale == 2 and adapter(lora).scale == 0.5


def test_alpha_beside_the_file(read, tmp_path):
    """PEFT's own pair of files; the settings beside a file of another name are not its own."""
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "peft_type": "LORA"}')
    state = peft("base_model.model.transformer_blocks.0.attn.to_q", (32, 32))
    assert adapter(read(state, name="adapter_model.safetensors")).scale == 2
    assert adapter(read(state)).scale == 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "x", '{"transformer.lora_alpha": "2"}', '{"transformer.lora_alpha": 1e999}',
     '{"transformer.lora_alpha": true}', '{"transformer.alpha_pattern": [1]}',
     '{"transformer.alpha_pattern": {"a": null}}', '{"transformer.alpha_pattern": {"(a+)+$": 1}}',
     "[" * 100_000, '{"transformer.lora_alpha": 1' + "0" * 4000 + "}"],
)  # fmt: skip
def test_bad_header(text, write):
    refuse(write(GOOD, {"lora_adapter_metadata": text}), "x.safetensors: ")


def refuse(path, *parts, config=CONFIG):
    """The message names the file, has one line, and says all of these."""
    with pytest.raises(LoraError) as error:
        read_lora(path, config, TEXT_CONFIG)
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000
    for part in (path.name, *parts):
        assert part in message


BAD = {
    "NaN": ({**GOOD, f"{QKV}.lora_up.weight": torch.full((96, 4), nan)}, [QKV, "NaN"]),
    "infinity in fp8": (
        {**GOOD, f"{QKV}.lora_up.weight": torch.full((96, 4), inf).to(torch.float8_e5m2)}, ["NaN"]),
    "NaN of the text encoder": (
        {n: t * nan for n, t in plain(f"{T5}_k", (12, 24)).items()}, [f"{T5}_k", "NaN"]),
    "alpha NaN": ({**GOOD, f"{QKV}.alpha": torch.tensor(nan)}, [QKV, "alpha is nan"]),
    "alpha 0": ({**GOOD, f"{QKV}.alpha": torch.tensor(0.0)}, [QKV, "alpha is 0", "its rank"]),
    "alpha of many": ({**GOOD, f"{QKV}.alpha": torch.ones(2)}, ["alpha", "expected one number"]),
    "ranks differ": ({**GOOD, f"{QKV}.lora_up.weight": numbers(96, 5)}, [QKV, "rank 4", "5 in up"]),
    "wide": (plain(QKV, (96, 33)), [QKV, "(4, 33)", "expected (4, 32)", "other sizes"]),
    "tall": (plain(QKV, (97, 32)), ["(97, 4)", "expected (96, 4)"]),
    "wide slice": (peft(f"{ATTENTION}.to_q", (96, 32)), ["expected (32, 4)"]),
    "one half": ({f"{QKV}.lora_down.weight": numbers(4, 32)}, ["down but no up", "incomplete"]),
    "half of LoHa": (dict([*loha(QKV, (96, 32)).items()][:3]), ["no hada_w2_b"]),
    "half of LoKr": (dict([*lokr(QKV, (96, 32)).items()][:1]), ["lokr_w1 but no lokr_w2"]),
    "one axis": ({**GOOD, f"{QKV}.lora_up.weight": numbers(96)}, ["expected 2 axes"]),
    "no axis": ({**GOOD, f"{QKV}.lora_up.weight": torch.tensor(1.0)}, ["expected 2 axes"]),
    "empty": ({**GOOD, f"{QKV}.lora_up.weight": torch.ones(96, 0)}, ["is empty"]),
    "integers": ({**GOOD, f"{QKV}.lora_up.weight": torch.ones(96, 4, dtype=torch.int8)}, ["I8"]),
    "Tucker": ({**loha(QKV, (96, 32)), f"{QKV}.hada_t1": numbers(4, 4)}, ["convolutions"]),
    "norm": (plain("lora_unet_double_blocks_0_img_attn_norm_key_norm", (16, 16)), ["(16,)"]),
    "bias of T5": ({f"{T5}_q.diff_b": numbers(12)}, ["does not have"]),
    "twice": ({**GOOD, **peft(f"{ATTENTION}.to_qkv", (96, 32))}, ["a second lora of", KEY]),
    "two adapters": (
        {f"unet.txt_in.lora_A.{name}.weight": numbers(4, 24) for name in ("x", "y")},
        ["several LoRAs"]),
    "alpha alone": ({f"{QKV}.alpha": torch.tensor(1.0)}, ["no tensor in it changes", QKV]),
    "no tensors": ({}, ["matches nothing", "no tensors"]),
    "nothing known": ({"a.lora_A.weight": numbers(4, 4)}, ["matches nothing", "a.lora_A.weight"]),
    "Flux only": (
        plain("lora_unet_double_blocks_0_img_mod_lin", (192, 32)), ["Flux modulation", "only"]),
    "CLIP only": (plain("lora_te1_text_model_encoder_layers_0_mlp_fc1", (8, 8)), ["CLIP"]),
    "control": (peft("img_in", (32, 32)) | GOOD, ["control LoRA", "32 channels"]),
    "control, diffusers": (peft("transformer.x_embedder", (32, 96)), ["control LoRA"]),
    "PEFT's VeRA": (
        {"base_model.model.double_blocks.0.img_attn.qkv.vera_lambda_b": numbers(96),
         "base_model.vera_A": numbers(4, 96)}, ["matches nothing", "qkv.vera_lambda_b"]),
    "whole model": ({KEY: numbers(96, 32)}, ["a Flux transformer"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_tensors(name, write):
    state, parts = BAD[name]
    refuse(write(state), *parts)


OTHERS = {
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q": "Stable Diffusion XL",
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": "Stable Diffusion",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": "Stable Diffusion",
    "diffusion_model.joint_blocks.0.x_block.attn.qkv": "Stable Diffusion 3",
    "diffusion_model.blocks.0.self_attn.q": "Wan",
    "lora_unet_blocks_0_cross_attn_k": "Wan",
    "transformer.transformer_blocks.0.img_mlp.net.0.proj": "Qwen-Image",
    "lora_unet_double_blocks_19_img_attn_qkv": "a model of more blocks (double_blocks 19)",
    "lora_unet_transformer_blocks_0_img_mod_1": "Qwen-Image",
    "transformer.transformer_blocks.59.attn.to_q": "a model of more blocks, such as Qwen-Image",
    "lora_unet_double_blocks_0_img_mlp_fc1": "Hunyuan Video",
    "diffusion_model.layers.0.attention.qkv": "Z-Image or Lumina",
    "transformer.transformer_blocks.0.attn1.to_q": "PixArt or LTX-Video",
    "joint_transformer_blocks.0.attn.to_q": "AuraFlow",
    "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": "Flux.2",
    "double_stream_blocks.0.block.attn1.to_q": "HiDream",
    "diffusion_model.nerf_blocks.0.param_generator": "Chroma1-Radiance",
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model(name, write):
    """Also where some names of the other model are Chroma's too."""
    for more in ({}, GOOD):
        refuse(write(peft(name, (32, 32)) | more), f"a LoRA of {OTHERS[name]}", "Chroma or Flux.1")


def blocks_of(kind, count, inner):
    return {k: v for i in range(count) for k, v in peft(f"{kind}.{i}.{inner}", (32, 32)).items()}


@pytest.mark.parametrize(
    ("count", "told"), [(18, "a LoRA of a larger Chroma than this one"), (60, "such as Qwen-Image")]
)
def test_blocks_that_a_small_model_does_not_have(write, count, told):
    """Up to Chroma1's number it is for Chroma1, beyond that for another model."""
    refuse(write(blocks_of("transformer.transformer_blocks", count, "attn.to_q")), told)


def test_no_producer_is_taken_for_another_model(read):
    """With a tensor that is not known beside it, each file is still read."""
    for producer in PRODUCERS.values():
        lora = read({**producer.state, "strange.tensor": numbers(2)}, producer.metadata or None)
        assert lora.unknown == ["strange.tensor"]


def test_a_lora_of_another_width(write):
    refuse(write(GOOD), "(4, 32)", "(4, 3072)", "other sizes", config=ChromaConfig())


def test_flux_lora(read):
    """What fits is read; the rest is counted by the reason, in one line of the report."""
    extra = {}
    for name in ("double_blocks_0_img_mod_lin", "double_blocks_1_txt_mod_lin", "vector_in_in_layer",
                 "single_blocks_0_modulation_lin", "final_layer_adaLN_modulation_1"):  # fmt: skip
        extra |= plain(f"lora_unet_{name}", (64, 32))
    extra |= plain("lora_te1_text_model_encoder_layers_0_mlp_fc1", (8, 8))
    lora = read({**GOOD, **extra})
    assert list(lora.transformer) == [KEY] and not lora.text_encoder and not lora.unknown
    assert lora.skipped == {"Flux modulation": 8, "vector_in": 2, "CLIP": 2}
    line = report(lora).line()
    assert "\n" not in line and "1 modules of the transformer" in line and "rank 4" in line
    for text in ("Flux modulation (8 tensors)", "vector_in (2 tensors)", "CLIP (2 tensors)"):
        assert text in line


def test_unknown_tensors_are_named(read):
    """All in the file's account, the first five and the count in the report."""
    names = [f"z.{i}.what" for i in range(7)]
    lora = read({**GOOD, **{n: numbers(1) for n in names}, f"{QKV}.rescale": numbers(96)})
    assert lora.unknown == sorted([f"{QKV}.rescale", *names])
    line = report(lora).line()
    assert "8 tensors not understood" in line and "z.3.what" in line and "z.4.what" not in line
    assert report(lora).unknown == tuple(lora.unknown)


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin", "PT"])
def test_pickles_are_refused(suffix, tmp_path):
    """Without being opened; the message says how to convert it."""
    path = tmp_path / f"x.{suffix}"
    torch.save(GOOD, path)
    refuse(path, "pickle", "safetensors.torch.save_file", "weights_only=True")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("the file was unpickled",)


@pytest.mark.parametrize("protocol", [None, 2, 3, 4, 5])
def test_renamed_pickles(protocol, tmp_path):
    path = tmp_path / "x.safetensors"
    if protocol is None:
        torch.save({"a": Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps({"a": Bomb(), "b": list(range(9))}, protocol))
    refuse(path, "pickle under a wrong name")


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer"),
        (b"", "too few"),
        (b"\x00" * 7, "too few"),
        (b"\xff" * 100, "header claims"),
    ],
)
def test_other_files(data, part, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    refuse(path, part, "download it again")


def test_missing_and_unknown_files(tmp_path):
    refuse(tmp_path / "x.safetensors", "does not exist")
    (tmp_path / "x.txt").write_text("a")
    refuse(tmp_path / "x.txt", "not a model file")
    refuse(tmp_path, "expected")


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_truncated(kept, write):
    path = write(GOOD)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refuse(path, "damaged or incomplete")


def test_a_model_is_not_a_lora():
    refuse(TRANSFORMER, "is a Chroma transformer, not a LoRA")
    assert read_header(TRANSFORMER).tensors


def test_report(read):
    metadata = {
        "ss_network_module": "networks.lora_flux", "ss_base_model_version": "chroma",
        "ss_tag_frequency": json.dumps({"10_x": {"a fox": 3, "tree": 1}, "5_y": {"tree": 4}}),
    }  # fmt: skip
    te = plain(f"{T5}_q", (12, 24))
    lora = read({**GOOD, **te, **loha("lora_unet_txt_in", (32, 24))}, metadata)
    found = report(lora)
    assert (found.transformer, found.text_encoder, found.ranks) == (2, 1, (4,))
    assert found.kinds == {"lora": 2, "loha": 1}
    assert (found.trainer, found.base_model) == ("sd-scripts", "chroma")
    assert found.trigger_words == ("tree", "a fox")
    assert found.line() == (
        "x.safetensors: 2 modules of the transformer, 1 of the text encoder, lora + loha, rank 4, "
        "sd-scripts"
    )


@pytest.mark.parametrize(
    ("metadata", "trainer"),
    [
        ({"software": '{"name": "ai-toolkit"}'}, "ai-toolkit"),
        ({"ot_branch": "master"}, "OneTrainer"),
        ({"ss_network_module": "lycoris.kohya"}, "sd-scripts with LyCORIS"),
        (header(lora_alpha=4), "diffusers"),
        ({"software": "[]", "ss_tag_frequency": "{"}, None),
    ],
)
def test_trainer(metadata, trainer, read):
    assert report(read(GOOD, metadata)).trainer == trainer


@pytest.mark.parametrize(
    ("name", "trainer"), [("OneTrainer legacy", "OneTrainer"), ("ai-toolkit lora", "ai-toolkit")]
)
def test_trainer_of_a_producer(name, trainer, read):
    """By the metadata, else by a prefix that nobody else writes."""
    producer = PRODUCERS[name]
    assert report(read(producer.state, producer.metadata or None)).trainer == trainer


def test_files_of_this_packages_tools_name_it(write, tmp_path):
    """What is made anew is its own; what is spelled anew stays the trainer's, where one is told."""
    theirs = write(GOOD, {"ss_network_module": "networks.lora_flux"}, "theirs.safetensors")
    unnamed = write(GOOD, name="unnamed.safetensors")
    out = tmp_path / "out.safetensors"

    def trainer(config=CONFIG):
        return report(read_lora(out, config, TEXT_CONFIG)).trainer

    concatenate_loras([(theirs, 1.0), (theirs, 0.5)], out, config=CONFIG)
    assert trainer() == "chroma-nodes"
    for source, expected in ((theirs, "sd-scripts"), (unnamed, "chroma-nodes")):
        convert_lora(source, "comfyui", out, CONFIG)
        assert trainer() == expected
    state = load_file(TRANSFORMER)
    state["img_in.bias"] = state["img_in.bias"] + 1
    save_file(state, tmp_path / "tuned.safetensors")
    extract_lora(TRANSFORMER, tmp_path / "tuned.safetensors", out, RankRule(4))
    assert trainer(read_transformer(TRANSFORMER)[0]) == "chroma-nodes"


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": " sks fox "}, ("sks fox",)),
        ({"ss_tag_frequency": '{"a": {"b": "x", "c": 1}, "d": 3}'}, ("c",)),
        ({"ss_tag_frequency": "[" * 100_000}, ()),
        ({}, ()),
    ],
)
def test_trigger_words(metadata, words):
    assert trigger_words(metadata) == words
