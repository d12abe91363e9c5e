"""What `inspect` says of files of this model and of others, by their structure and metadata."""

import json

import pytest
import torch
from bad_files import pair
from bad_workflows import ESCAPES
from chroma_nodes.chroma.checkpoint.inspect import describe, inspect_file
from chroma_nodes.chroma.errors import ChromaError
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.chroma.workflow import Context
from chroma_nodes.chroma.workflow.nodes_inspecting import NODES, inspect
from safetensors.torch import load_file, save_file

# Names as the models' own files have them, a few of each.
FOREIGN = {
    "a Chroma1-Radiance transformer": (
        "distilled_guidance_layer.norms.0.scale", "double_blocks.0.img_attn.qkv.weight",
        "nerf_blocks.0.param_generator.weight",
    ),
    "a Flux transformer": (
        "double_blocks.0.img_attn.qkv.weight", "guidance_in.in_layer.weight",
        "double_blocks.0.img_mod.lin.weight",
    ),
    "a Flux.2 transformer": (
        "double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight",
    ),
    "a Stable Diffusion 3 transformer": (
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    ),
    "a Stable Diffusion XL checkpoint": (
        "model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x",
        "model.diffusion_model.output_blocks.0.0.in_layers.0.weight",
    ),
    "a Wan video transformer": (
        "blocks.0.self_attn.q.weight", "blocks.0.cross_attn.q.weight", "blocks.0.ffn.0.weight",
        "patch_embedding.weight",
    ),
    "a Qwen-Image transformer": (
        "transformer_blocks.0.img_mlp.net.0.proj.weight",
        "transformer_blocks.0.txt_mlp.net.0.proj.weight",
    ),
    "a Hunyuan Video transformer": (
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "double_blocks.0.img_attn_qkv.weight",
    ),
    "a Lumina or Z-Image transformer": (
        "noise_refiner.0.attention.qkv.weight", "context_refiner.0.attention.qkv.weight",
    ),
    "a HiDream transformer": (
        "double_stream_blocks.0.block.attn1.to_q.weight",
        "single_stream_blocks.0.block.attn1.to_q.weight",
    ),
    "a UMT5 text encoder": (
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    "a language model used as a text encoder": (
        "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight",
    ),
    "of a kind that is not known here": ("weight",),
}  # fmt: skip


def write(folder, state, metadata=None):
    path = folder / "x.safetensors"
    save_file(state, path, metadata)
    return path


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_models_are_named_and_nothing_here_loads_them(tmp_path, kind):
    found = inspect_file(write(tmp_path, {name: torch.zeros(2) for name in FOREIGN[kind]}))
    assert found.kind == kind and found.loader is None and found.needs
    told = describe(found)
    assert told[0] == f"x.safetensors: {kind}" and f"  needs: {found.needs}" in told


@pytest.mark.parametrize(
    ("file", "kind", "needed"),
    [
        (small.TRANSFORMER, "a Chroma transformer", ("text encoder", "autoencoder")),
        (small.TEXT_ENCODER, "a T5 text encoder", ("Chroma transformer",)),
        (small.VAE, "a Flux autoencoder", ("Chroma transformer", "text encoder")),
    ],
)
def test_our_own_files_say_what_they_need(file, kind, needed):
    found = inspect_file(file)
    assert found.kind == kind and all(part in found.needs for part in needed)
    assert found.parameters == sum(tensor.numel() for tensor in load_file(file).values())


def test_a_lora_tells_what_it_changes(tmp_path):
    state = pair("diffusion_model.double_blocks.0.img_attn.qkv", rank=8)
    metadata = {"modelspec.trigger_phrase": "zxq style", "ss_base_model_version": "chroma"}
    found = inspect_file(write(tmp_path, state, metadata))
    assert found.kind == "a LoRA" and found.folder == "models/loras"
    words, line, made = found.lora
    assert "1 modules of the transformer" in line and "rank 8" in line
    assert (words, made) == ("trigger words: zxq style", "made for: chroma")


def test_a_lora_of_another_model_tells_whose_it_is(tmp_path):
    state = pair("diffusion_model.blocks.0.self_attn.q")
    found = inspect_file(write(tmp_path, state, {"trigger_word": "two\nlines"}))
    assert "a LoRA of Wan" in found.lora[0]
    assert all("\n" not in line for line in describe(found))


def test_the_node_without_comfyui(tmp_path):
    (tmp_path / "loras").mkdir()
    write(tmp_path / "loras", pair("diffusion_model.double_blocks.0.img_attn.qkv"))
    context = Context(torch.device("cpu"), tmp_path, tmp_path, tmp_path, {})
    (told,) = inspect(context, "loras/x.safetensors")
    assert told.splitlines() == describe(inspect_file(tmp_path / "loras" / "x.safetensors"))
    (told,) = inspect(context, NODES[0].inputs[0].default)
    assert "a Chroma transformer" in told


@pytest.mark.parametrize("name", [*ESCAPES.values(), "x", "loras/", "input/x.png"])
def test_names_that_are_no_model_file(tmp_path, name):
    (tmp_path / "secret.safetensors").write_bytes(b"")
    context = Context(torch.device("cpu"), tmp_path / "m", tmp_path, tmp_path, {})
    for given in {name, f"loras/{name}"}:
        with pytest.raises(ChromaError) as error:
            inspect(context, given)
        assert "\n" not in str(error.value) and "damaged" not in str(error.value)


def test_every_number_is_in_the_json(capsys):
    from chroma_nodes.chroma.cli import main

    assert main(["inspect", "--json", str(small.VAE)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["needs"] and found["lora"] == []
