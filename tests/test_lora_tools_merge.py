"""`lora merge --base`: W + the sum of the changes in every format, and what else is in the file."""

import struct

import pytest
import torch
from chroma_nodes.chroma.checkpoint.container import open_checkpoint
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.checkpoint.read import plain, read_text_encoder, read_transformer
from chroma_nodes.chroma.checkpoint.recipe import GGUF_TARGETS
from chroma_nodes.chroma.errors import ChromaError, LoraError
from chroma_nodes.chroma.lora.tools.merge import merge_into_checkpoint
from chroma_nodes.chroma.tiny import files as small
from lora_files import TEXT_PREFIX, merged, write_lora
from lora_producers import numbers
from oracles import diffusers_state
from safetensors import safe_open
from safetensors.torch import load_file, save_file

# A layer of each kind, and one that the quantised files keep in 16 bits.
KEYS = [
    "double_blocks.0.img_attn.qkv.weight", "double_blocks.1.txt_mlp.2.weight",
    "single_blocks.1.linear1.weight", "single_blocks.0.linear2.weight", "img_in.weight",
]  # fmt: skip


def values(path):
    """A transformer's canonical state dict in fp32."""
    state = plain(read_transformer(path)[1], torch.float32)
    return {key: tensor.float() for key, tensor in state.items()}


def loras(tmp_path, size=0.3):
    """Two files on some layers of the small model, and {parameter: change} of each."""
    state = values(small.TRANSFORMER)
    keep = {key: state[key] for key in KEYS}
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first = write_lora(a, keep, rank=3, size=size, seed=1, alpha=2.0)
    second = write_lora(b, {key: keep[key] for key in KEYS[:2]}, rank=5, size=size, seed=2)
    return [(a, 0.8), (b, -0.5)], [(first, 0.8), (second, -0.5)]


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def test_a_plain_base_is_the_sum_rounded_once(tmp_path):
    files, changes = loras(tmp_path)
    out = tmp_path / "out.safetensors"
    report = merge_into_checkpoint(small.TRANSFORMER, files, out)
    base = load_file(small.TRANSFORMER)
    wanted = merged(base, changes)
    found = load_file(out)
    assert found.keys() == base.keys() and report.parameters == len(KEYS)
    for key, tensor in found.items():
        assert tensor.dtype == base[key].dtype
        if key in KEYS:
            # Half a unit in the last of bf16's 8 bits, and the sums' own rounding.
            near = (tensor.float() - wanted[key]).abs() <= 1.01 * 2**-8 * wanted[key].abs() + 1e-7
            assert bool(near.all()), key
        else:
            assert torch.equal(tensor, base[key])
    assert report.kept == pytest.approx(1, abs=0.01)
    assert header(out)["modelspec.merged_from"].endswith("a:0.8, b:-0.5")


@pytest.mark.parametrize("target", ["q8_0", "q4_k", "q5_0", "f16", "fp8", "fp8mixed", "int8"])
def test_a_quantised_base_keeps_its_format_and_all_that_is_not_changed(tmp_path, target):
    suffix = ".gguf" if target in GGUF_TARGETS else ".safetensors"
    base, out = tmp_path / f"base{suffix}", tmp_path / f"out{suffix}"
    quantise_file(small.TRANSFORMER, target, base)
    files, changes = loras(tmp_path)
    report = merge_into_checkpoint(base, files, out)
    assert open_checkpoint(out).tensors == open_checkpoint(base).tensors
    original, old, new = values(small.TRANSFORMER), values(base), values(out)
    wanted = merged(old, changes)
    for key in old:
        if key not in KEYS:
            assert torch.equal(old[key], new[key]), key
            continue
        rounding = (original[key] - old[key]).norm() / old[key].norm()
        error = (new[key] - wanted[key]).norm() / wanted[key].norm()
        assert error <= 1.5 * rounding + 3e-3, (key, float(error), float(rounding))
    power = sum(float((wanted[k] - old[k]).square().sum()) for k in KEYS)
    product = sum(float(((new[k] - old[k]) * (wanted[k] - old[k])).sum()) for k in KEYS)
    assert report.kept == pytest.approx(product / power, abs=1e-3)
    if target in GGUF_TARGETS:
        assert out.stat().st_size == base.stat().st_size


@pytest.mark.parametrize(("target", "to"), [("q8_0", "base"), ("fp8", "base"), ("fp8", "bf16")])
def test_progress_rises_to_the_end(tmp_path, target, to):
    suffix = ".gguf" if target in GGUF_TARGETS else ".safetensors"
    base = tmp_path / f"base{suffix}"
    quantise_file(small.TRANSFORMER, target, base)
    seen = []
    out = tmp_path / f"out{suffix if to == 'base' else '.safetensors'}"
    merge_into_checkpoint(base, loras(tmp_path)[0], out, to, lambda *told: seen.append(told))
    done = [told[0] for told in seen]
    assert done == sorted(set(done)) and done[-1] == seen[-1][1]
    assert {key for _, _, key in seen} >= set(KEYS)


def test_the_files_own_bytes_are_left_alone_around_the_changed_tensors(tmp_path):
    """A GGUF's header, and every tensor that no LoRA names, byte for byte."""
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    quantise_file(small.TRANSFORMER, "q8_0", base)
    state = values(small.TRANSFORMER)
    lora = tmp_path / "a.safetensors"
    write_lora(lora, {KEYS[3]: state[KEYS[3]]})
    merge_into_checkpoint(base, [(lora, 1.0)], out)
    old, new = base.read_bytes(), out.read_bytes()
    place = open_checkpoint(base).header.tensors[KEYS[3]]
    end = place.offset + place.nbytes
    assert old[: place.offset] == new[: place.offset] and old[end:] == new[end:]
    assert old[place.offset : end] != new[place.offset : end]


def test_fp8_scales_stay_unless_the_values_outgrow_them(tmp_path):
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    quantise_file(small.TRANSFORMER, "fp8", base)
    key = KEYS[2]
    scale = key.replace(".weight", ".scale_weight")
    weight = {key: values(base)[key]}
    for size, grows in ((1e-4, False), (30.0, True)):
        lora = tmp_path / "a.safetensors"
        change = write_lora(lora, weight, size=size)[key]
        merge_into_checkpoint(base, [(lora, 1.0)], out)
        old, new = load_file(base)[scale], load_file(out)[scale]
        assert (float(new) > float(old)) is grows
        top = (weight[key] + change).abs().max()
        assert values(out)[key].abs().max() == pytest.approx(float(top), rel=0.04)


def test_a_weak_lora_lost_to_rounding_is_said(tmp_path):
    """Of a change of 0.3 % of the weight, fp8 to nearest keeps a part; bf16 all of it."""
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    quantise_file(small.TRANSFORMER, "fp8", base)
    state = values(base)
    lora = tmp_path / "a.safetensors"
    write_lora(lora, {key: state[key] for key in KEYS[:4]}, size=0.003)
    report = merge_into_checkpoint(base, [(lora, 1.0)], out)
    assert report.kept < 0.5 and any("bf16" in line for line in report.lines())
    report = merge_into_checkpoint(base, [(lora, 1.0)], out, "bf16")
    assert report.kept == pytest.approx(1, abs=0.05) and len(report.lines()) == 2


@pytest.mark.parametrize("target", ["q8_0", "fp8mixed", None])
def test_into_bf16_from_any_base(tmp_path, target):
    base = small.TRANSFORMER
    if target:
        base = tmp_path / ("base.gguf" if target == "q8_0" else "base.safetensors")
        quantise_file(small.TRANSFORMER, target, base)
    files, changes = loras(tmp_path)
    out = tmp_path / "out.safetensors"
    merge_into_checkpoint(base, files, out, "bf16")
    found, wanted = load_file(out), merged(values(base), changes)
    assert found.keys() == wanted.keys()
    assert "_quantization_metadata" not in header(out)
    for key, tensor in found.items():
        assert tensor.dtype is torch.bfloat16
        assert torch.allclose(tensor.float(), wanted[key], rtol=2**-8, atol=1e-7), key


def test_a_base_in_diffusers_layout_keeps_it(tmp_path):
    config, state = read_transformer(small.TRANSFORMER)[0], values(small.TRANSFORMER)
    base, out = tmp_path / "diffusers.safetensors", tmp_path / "out.safetensors"
    theirs = diffusers_state(state, config.hidden)
    save_file({name: tensor.clone().contiguous() for name, tensor in theirs.items()}, base)
    files, changes = loras(tmp_path)
    merge_into_checkpoint(base, files, out)
    wanted = diffusers_state(merged(state, changes), config.hidden)
    found = load_file(out)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6), name


def test_what_else_is_in_the_file_comes_along(tmp_path):
    """A checkpoint with an autoencoder beside the transformer; hashes that are no longer true."""
    state = {f"model.diffusion_model.{k}": t for k, t in load_file(small.TRANSFORMER).items()}
    vae = {f"vae.{name}": tensor for name, tensor in load_file(small.VAE).items()}
    base, out = tmp_path / "all.safetensors", tmp_path / "out.safetensors"
    save_file(state | vae, base, {"modelspec.hash_sha256": "0xold", "modelspec.author": "me"})
    files, _ = loras(tmp_path)
    merge_into_checkpoint(base, files, out)
    found = load_file(out)
    assert found.keys() == (state | vae).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in vae.items())
    assert header(out)["modelspec.author"] == "me" and "modelspec.hash_sha256" not in header(out)


@pytest.mark.parametrize("target", [None, "q8_0"])
def test_a_text_encoder_takes_its_part_of_a_lora(tmp_path, target):
    base, suffix = small.TEXT_ENCODER, ".safetensors"
    if target:
        suffix = ".gguf"
        base = tmp_path / "base.gguf"
        quantise_file(small.TEXT_ENCODER, target, base)
    state = plain(read_text_encoder(base)[1], torch.float32)
    keys = [key for key in state if "SelfAttention.q" in key or "wo" in key]
    lora, out = tmp_path / "a.safetensors", tmp_path / f"out{suffix}"
    change = write_lora(lora, {key: state[key] for key in keys}, TEXT_PREFIX)
    merge_into_checkpoint(base, [(lora, 1.0)], out)
    found, wanted = plain(read_text_encoder(out)[1], torch.float32), merged(state, [(change, 1.0)])
    for key, tensor in found.items():
        error = (tensor - wanted[key]).norm() / wanted[key].norm()
        assert error <= (0.01 if key in keys else 0), key


def test_a_dora_of_columns_is_merged_into_every_layout(tmp_path):
    """The norm of a fused matrix's columns goes over all its rows, also where they lie apart."""
    config, state = read_transformer(small.TRANSFORMER)[0], values(small.TRANSFORMER)
    key = KEYS[0]
    module, (n, k) = f"diffusion_model.{key.removesuffix('.weight')}", state[key].shape
    down, up, magnitude = numbers(2, k), numbers(n, 2), numbers(1, k).abs() + 1
    lora = tmp_path / "a.safetensors"
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up,
               f"{module}.dora_scale": magnitude}, lora)  # fmt: skip
    direction = state[key] + up @ down
    wanted = magnitude * direction / direction.norm(dim=0, keepdim=True)
    base, out = tmp_path / "diffusers.safetensors", tmp_path / "out.safetensors"
    theirs = diffusers_state(state, config.hidden)
    save_file({name: tensor.clone().contiguous() for name, tensor in theirs.items()}, base)
    merge_into_checkpoint(base, [(lora, 1.0)], out)
    assert torch.allclose(values(out)[key], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["sizes", "text only", "name", "target", "itself", "damaged"])
def test_after_an_error_nothing_is_written(tmp_path, case):
    base, out, to = small.TRANSFORMER, tmp_path / "out.safetensors", "base"
    lora = tmp_path / "a.safetensors"
    state = values(small.TRANSFORMER)
    write_lora(lora, {KEYS[0]: state[KEYS[0]]})
    if case == "sizes":
        write_lora(lora, {KEYS[0]: torch.randn(30, 20)})
    elif case == "text only":
        write_lora(lora, {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.randn(4, 4)},
                   TEXT_PREFIX)  # fmt: skip
    elif case == "name":
        out = tmp_path / "out.gguf"
    elif case == "target":
        to = "fp4"
    elif case == "itself":
        base = out = tmp_path / "base.safetensors"
        base.write_bytes(small.TRANSFORMER.read_bytes())
    else:
        data = lora.read_bytes()
        lora.write_bytes(struct.pack("<Q", 10**12) + data[8:])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ChromaError) as error:
        merge_into_checkpoint(base, [(lora, 1.0)], out, to)
    assert "\n" not in str(error.value) and isinstance(error.value, LoraError)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_formats_that_are_only_read_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    from chroma_nodes.chroma.lora.tools import encode

    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    quantise_file(small.TRANSFORMER, "q4_k", base)
    files, _ = loras(tmp_path)
    monkeypatch.setattr(encode, "ENCODABLE", ("Q8_0",))
    with pytest.raises(LoraError, match="to: bf16"):
        merge_into_checkpoint(base, files, out)
    assert not out.exists()
