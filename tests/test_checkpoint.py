"""Files people have, and files people have by mistake."""

import json
import struct
from pathlib import Path
from random import Random

import pytest
import torch
from chroma_nodes.chroma.autoencoder import Autoencoder, AutoencoderConfig
from chroma_nodes.chroma.checkpoint import (
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    read_header,
)
from chroma_nodes.chroma.errors import CheckpointError
from chroma_nodes.chroma.quant.layers import QuantEmbedding
from chroma_nodes.chroma.text.t5 import T5Config, T5Encoder
from oracles import SMALL, diffusers_state, random_transformer
from safetensors.torch import save_file
from test_autoencoder import CONFIGS, diffusers_autoencoder, random_autoencoder

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
        (["single_transformer_blocks.0.a", "transformer_blocks.0.b"], "a Flux transformer in diff"),
        (["decoder.up_blocks.0.a", "encoder.down_blocks.0.b"], "a Flux autoencoder in diffusers'"),
        (["decoder.up.0.a", "encoder.down.0.b", "decoder.conv_in.weight"], "of another model"),
        (["input_blocks.0.a", "output_blocks.0.b", "cond_stage_model.c"], "Diffusion 1 or 2"),
        (["double_blocks.0.img_attn_qkv.weight", "single_blocks.0.linear1.weight"], "not known"),
        (["whatever"], "not known"),
    ],
)  # fmt: skip
def test_other_models_are_named(tmp_path, keys, says):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.ones(2, 2) for key in keys}, path)
    message = error_of(load_transformer, path)
    assert says in message and "expected a Chroma transformer; choose Chroma1-HD" in message


def test_diffusers_layout_loads_bit_equal(tmp_path, state):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    theirs = {k: v.contiguous() for k, v in diffusers_state(state, SMALL.hidden).items()}
    save_file(theirs, path)
    model = load_transformer(path)
    assert model.config == SMALL
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    del theirs["transformer_blocks.1.attn.to_k.bias"]
    save_file(theirs, path)
    assert "lacks 1 tensors (double_blocks.1.img_attn.qkv.bias)" in error_of(load_transformer, path)
    theirs["transformer_blocks.1.attn.to_k.weight"] = torch.ones(3, 5)
    save_file(theirs, path)
    assert "does not fit together" in error_of(load_transformer, path)


@pytest.mark.parametrize("config", CONFIGS)
def test_diffusers_autoencoder_loads_bit_equal(tmp_path, config):
    path = tmp_path / "vae.safetensors"
    ours = random_autoencoder(config)
    save_file(diffusers_autoencoder(ours).state_dict(), path)
    model = load_autoencoder(path)
    assert model.config == config
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in ours.state_dict().items())


def test_each_loader_takes_its_own_part_of_a_full_checkpoint(tmp_path, state):
    path = tmp_path / "full.safetensors"
    t5, vae = T5Encoder(T5).state_dict(), Autoencoder(CONFIGS[0]).state_dict()
    parts = {f"model.diffusion_model.{k}": v for k, v in state.items()}
    parts |= {f"text_encoders.t5xxl.transformer.{k}": v for k, v in t5.items()}
    parts |= {f"vae.{k}": v for k, v in vae.items()}
    save_file(parts, path)
    for load, expected in (
        (load_transformer, state), (load_text_encoder, t5), (load_autoencoder, vae),
    ):  # fmt: skip
        found = load(path).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], v) for k, v in expected.items())
    quantised = "text_encoders.t5xxl.transformer.shared.weight"
    save_file(parts | {quantised: t5["shared.weight"].to(torch.float8_e4m3fn)}, path)
    assert load_transformer(path).config == SMALL
    assert isinstance(load_text_encoder(path).shared, QuantEmbedding)


def test_an_autoencoder_with_other_latents_is_refused(tmp_path):
    state = Autoencoder(CONFIGS[0]).state_dict()
    path = tmp_path / "sd3.safetensors"
    save_file({f"first_stage_model.{k}": v for k, v in state.items()}, path)
    assert load_autoencoder(path).config == CONFIGS[0]
    inside = {f"first_stage_model.{k}": v for k, v in state.items()}
    save_file(inside | {"model.diffusion_model.joint_blocks.0.x": torch.ones(1)}, path)
    assert "is a Stable Diffusion 3 transformer, expected a Flux" in error_of(
        load_autoencoder, path
    )
    for channels in (4, 32):
        other = Autoencoder(AutoencoderConfig(32, (1, 2), 1, channels)).state_dict()
        save_file(other, path)
        assert "is an autoencoder of another model" in error_of(load_autoencoder, path)
    save_file(state | {"decoder.conv_in.weight": torch.ones(8, 16, 3, 3, 3)}, path)
    assert "is an autoencoder of another model" in error_of(load_autoencoder, path)


def test_a_whole_radiance_is_not_taken_for_chroma(tmp_path, state):
    path = tmp_path / "radiance.safetensors"
    save_file({**state, "nerf_blocks.0.norm.scale": torch.ones(1)}, path)
    assert "is a Chroma1-Radiance transformer, expected" in error_of(load_transformer, path)


def test_mixed_dtypes_become_that_of_most_weights(tmp_path, state):
    path = tmp_path / "chroma.safetensors"
    mixed = {k: v if "norm" in k or "img_in" in k else v.bfloat16() for k, v in state.items()}
    save_file(mixed, path)
    assert {p.dtype for p in load_transformer(path).parameters()} == {torch.bfloat16}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' list of mappings")
def test_weights_stay_in_the_mapped_file(tmp_path, state):
    path = tmp_path / "chroma.safetensors"
    save_file(state, path)
    model = load_transformer(path)
    lines = [x.split() for x in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [x[0].split("-") for x in lines if x[-1] == str(path.resolve())]
    spans = [(int(begin, 16), int(end, 16)) for begin, end in ranges]
    assert all(any(a <= p.data_ptr() < b for a, b in spans) for p in model.parameters())


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
    assert "too few axes" in message(**{"txt_in.weight": torch.ones(9)})
    assert "img_in.weight is empty" in message(**{"img_in.weight": torch.ones(10**6, 0)})
    for number in (10**9, 10**30):
        far = f"double_blocks.{number}.img_mlp.0.bias"
        assert f"{far} is numbered beyond" in message(**{far: torch.ones(1)})
    extra = message(**{"double_blocks.0.extra": torch.ones(1)})
    assert "unknown 1 tensors (double_blocks.0.extra)" in extra
    assert "shape (3,), expected (128,)" in message(**{bias: torch.ones(3)})
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = state["single_blocks.2.linear2.weight"].clone()
        weight[3, 5] = bad
        found = message(**{"single_blocks.2.linear2.weight": weight})
        assert "single_blocks.2.linear2.weight holds NaN or infinity" in found


def test_pickles_and_other_formats_are_refused_unopened(tmp_path):
    for name, says in (
        ("x.ckpt", "pickle"), ("x.pt", "pickle"), ("x.pth", "pickle"), ("x.bin", "pickle"),
        ("x.gguf", "does not exist"),
        ("x.txt", "not a model file"), ("x.safetensors", "does not exist"),
    ):  # fmt: skip
        assert says in error_of(load_transformer, tmp_path / name)


def test_truncation_anywhere_is_one_line(tmp_path, state):
    path = tmp_path / "chroma.safetensors"
    save_file(state, path)
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    edges = (0, 1, 7, 8, 9, header // 2, header + 7, header + 8, header + 9, len(whole) - 1)
    for length in (*edges, *range(10, len(whole), len(whole) // 40)):
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
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 4299 + b'], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [' + b"9" * 4300 + b","
        + b"9" * 4300 + b"]}}",
        b'{"a\\nb": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"' + b"a" * 10**6 + b'": 1}',
        b'[["a", {}]]', b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]}}',
        b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
    ],
)  # fmt: skip
def test_lying_headers_are_one_line(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    message = error_of(read_header, path)
    assert "damaged or incomplete" in message and len(message) < 1000


def test_a_shape_of_many_axes_is_not_multiplied_out(tmp_path):
    path = tmp_path / "x.safetensors"
    shape = b"[" + b"3," * 10**5 + b"1]"
    header = b'{"a": {"dtype": "F32", "shape": ' + shape + b', "data_offsets": [0, 4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert "entry of a is unusable (it has 100001 axes)" in error_of(read_header, path)


def test_random_damage_to_a_header_never_shows_python(tmp_path, state):
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    random, refused = Random(0), 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(random.randrange(1, 4)):
            damaged[random.randrange(8 + header)] = random.choice(b'0123456789.,:[]{}"aF\x00\xff')
        path.write_bytes(damaged)
        try:
            load_transformer(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, state, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_file(state, path)

    def refuse(*args, **kw):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read (Permission denied)" in error_of(load_transformer, path)


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
