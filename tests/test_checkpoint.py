"""Files people have, and files people have by mistake."""

import json
import struct

import pytest
import torch
from chroma_nodes.chroma.autoencoder import Autoencoder
from chroma_nodes.chroma.checkpoint import (
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    read_header,
)
from chroma_nodes.chroma.errors import CheckpointError
from chroma_nodes.chroma.text.t5 import T5Config, T5Encoder
from oracles import SMALL, random_transformer
from safetensors.torch import save_file
from test_autoencoder import CONFIGS

T5 = T5Config(vocab_size=40, d_model=48, heads=2, d_kv=16, d_ff=64, layers=2)


@pytest.fixture(scope="module")
def state():
    return random_transformer().state_dict()


def error_of(load, path):
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert path.name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "_orig_mod.", "transformer."])
def test_every_prefix_loads_bit_equal(tmp_path, state, prefix):
    path = tmp_path / "chroma.safetensors"
    save_file({prefix + k: v for k, v in state.items()} | {"vae.x": torch.ones(2)}, path)
    model = load_transformer(path)
    assert model.config == SMALL and not model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_the_files_own_unless_asked(tmp_path, state, dtype):
    path = tmp_path / "chroma.sft"
    save_file({k: v.to(dtype) for k, v in state.items()}, path)
    assert {p.dtype for p in load_transformer(path).parameters()} == {dtype}
    cast = load_transformer(path, dtype=torch.float32)
    assert {p.dtype for p in cast.parameters()} == {torch.float32}


def test_text_encoder_and_autoencoder(tmp_path):
    path = tmp_path / "t5.safetensors"
    t5 = T5Encoder(T5).state_dict()
    aliased = {f"text_encoders.t5xxl.transformer.{k}": v for k, v in t5.items()}
    aliased["text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"] = t5[
        "shared.weight"
    ].clone()
    save_file(aliased, path)
    assert load_text_encoder(path).config == T5
    path = tmp_path / "ae.safetensors"
    save_file(Autoencoder(CONFIGS[0]).state_dict(), path)
    assert load_autoencoder(path).config == CONFIGS[0]
    assert "expected a T5 text encoder" in error_of(load_text_encoder, path)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_mod.lin.weight"], "a Flux"),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model."
             "output_blocks.0.0.weight", "conditioner.embedders.0.x"],
            "Stable Diffusion XL",
        ),
        (["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"], "a T5 text"),
        (["decoder.up.0.block.0.conv1.weight", "encoder.down.0.block.0.conv1.weight"],
         "a Flux autoencoder"),
        (["joint_blocks.0.x"], "Stable Diffusion 3"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "a LoRA"),
        (["text_model.encoder.layers.0.x"], "a CLIP"),
        (["distilled_guidance_layer.a", "double_blocks.0.b", "nerf_blocks.0.c"], "Radiance"),
        (["single_transformer_blocks.0.a", "distilled_guidance_layer.b"], "diffusers' layout"),
        (["whatever"], "not known"),
    ],
)  # fmt: skip
def test_other_models_are_named(tmp_path, keys, says):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.ones(2, 2) for key in keys}, path)
    message = error_of(load_transformer, path)
    assert says in message and "expected a Chroma transformer; choose Chroma1-HD" in message


def test_missing_extra_misshapen_and_non_finite_tensors(tmp_path, state):
    def message(**changes):
        path = tmp_path / "chroma.safetensors"
        save_file({k: v for k, v in {**state, **changes}.items() if v is not None}, path)
        return error_of(load_transformer, path)

    bias = "double_blocks.1.img_attn.proj.bias"
    assert bias in message(**{bias: None}) and "lacks 1 " in message(**{bias: None})
    many = {k: None for k in state if k.startswith("double_blocks.1.txt_")}
    assert f"lacks {len(many)} tensors" in message(**many) and ", ..." in message(**many)
    assert "txt_in.weight" in message(**{"txt_in.weight": None})
    extra = message(**{"double_blocks.0.extra": torch.ones(1)})
    assert "unknown 1 tensors (double_blocks.0.extra)" in extra
    assert "shape (3,), expected (128,)" in message(**{bias: torch.ones(3)})
    for bad in (float("nan"), float("inf")):
        weight = state["single_blocks.2.linear2.weight"].clone()
        weight[3, 5] = bad
        found = message(**{"single_blocks.2.linear2.weight": weight})
        assert "single_blocks.2.linear2.weight holds NaN or infinity" in found


def test_quantised_files_are_named(tmp_path, state):
    path = tmp_path / "chroma.safetensors"
    for change, says in (
        ({"scaled_fp8": torch.zeros(2)}, "scaled fp8"),
        ({"double_blocks.0.img_attn.qkv.comfy_quant": torch.zeros(2)}, "comfy_quant"),
        ({"img_in.weight": state["img_in.weight"].to(torch.float8_e4m3fn)}, "in fp8"),
        ({"img_in.weight": state["img_in.weight"].to(torch.int8)}, "integers"),
    ):
        save_file({**state, **change}, path)
        message = error_of(load_transformer, path)
        assert says in message and "expected bf16, fp16 or fp32" in message


def test_pickles_and_other_formats_are_refused_unopened(tmp_path):
    for name, says in (
        ("x.ckpt", "pickle"), ("x.pt", "pickle"), ("x.pth", "pickle"), ("x.bin", "pickle"),
        ("x.gguf", "GGUF"), ("x.txt", "not a model file"), ("x.safetensors", "does not exist"),
    ):  # fmt: skip
        assert says in error_of(load_transformer, tmp_path / name)


def test_truncation_anywhere_is_one_line(tmp_path, state):
    path = tmp_path / "chroma.safetensors"
    save_file(state, path)
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for length in (0, 1, 7, 8, 9, header // 2, header + 7, header + 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "damaged or incomplete" in error_of(load_transformer, path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"{", b"null", b'{"a": 1}', b'{"a": {}}', b"[" * 5000,
        b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}',
        b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}',
        b'{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]}}',
        b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
    ],
)  # fmt: skip
def test_lying_headers_are_one_line(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert "damaged or incomplete" in error_of(read_header, path)


def test_a_header_longer_than_the_file_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert "claims 4611686018427387904 bytes" in error_of(read_header, path)


def test_metadata_and_names_come_without_the_data(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, path, metadata={"k": "v"})
    header = read_header(path)
    assert header.metadata == {"k": "v"}
    assert json.dumps(header.tensors["a"].__dict__) == '{"dtype": "BF16", "shape": [2, 3]}'
