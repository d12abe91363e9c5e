"""Quantised files read back with the reference readers: gguf, safetensors, torch's casts."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from chroma_nodes.chroma.checkpoint import (
    quantise,
    read_text_encoder,
    read_transformer,
    recipe,
)
from chroma_nodes.chroma.checkpoint.atomic import replacing
from chroma_nodes.chroma.checkpoint.calibration import save_calibration
from chroma_nodes.chroma.checkpoint.identify import Kind
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.checkpoint.reader import TensorInfo
from chroma_nodes.chroma.checkpoint.recipe import Recipe, plan
from chroma_nodes.chroma.checkpoint.write_gguf import write_gguf
from chroma_nodes.chroma.checkpoint.write_safetensors import write_safetensors
from chroma_nodes.chroma.errors import CheckpointError, ChromaError
from chroma_nodes.chroma.quant.tensor import QuantTensor
from chroma_nodes.chroma.tiny import files
from oracles import diffusers_state, random_transformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

BLOCKS = [t for t in recipe.GGUF_TARGETS if t not in ("bf16", "f16")]
SENSITIVE = "distilled_guidance_layer.", "img_in.", "txt_in.", "final_layer."
T5_NAMES = {
    "shared.weight": "token_embd.weight",
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
    "encoder.block.1.layer.0.SelfAttention.q.weight": "enc.blk.1.attn_q.weight",
    "encoder.block.1.layer.0.SelfAttention.o.weight": "enc.blk.1.attn_o.weight",
    "encoder.block.1.layer.0.layer_norm.weight": "enc.blk.1.attn_norm.weight",
    "encoder.block.1.layer.1.layer_norm.weight": "enc.blk.1.ffn_norm.weight",
    "encoder.block.1.layer.1.DenseReluDense.wi_0.weight": "enc.blk.1.ffn_gate.weight",
    "encoder.block.1.layer.1.DenseReluDense.wi_1.weight": "enc.blk.1.ffn_up.weight",
    "encoder.block.1.layer.1.DenseReluDense.wo.weight": "enc.blk.1.ffn_down.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight":
        "enc.blk.0.attn_rel_b.weight",
}  # fmt: skip


def read_gguf(path):
    """{name: (type name, values)}, and the key-values, by the reference reader."""
    reader = gguf.GGUFReader(path)
    assert reader.alignment == 32 and all(t.data_offset % 32 == 0 for t in reader.tensors)
    tensors = {}
    for t in reader.tensors:
        values = t.data
        if t.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            values = gguf.quants.dequantize(t.data, t.tensor_type)
        shape = tuple(int(n) for n in reversed(t.shape))
        values = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
        tensors[t.name] = t.tensor_type.name, values
    return tensors, {key: field.contents() for key, field in reader.fields.items()}


def relative(values, exact):
    return float((values.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("target", BLOCKS)
def test_gguf_of_a_transformer(tmp_path, target):
    out = tmp_path / "small.gguf"
    report = quantise_file(files.TRANSFORMER, target, out)
    state, (tensors, values) = load_file(files.TRANSFORMER), read_gguf(out)
    assert values["general.architecture"] == "flux"
    assert values["general.quantization_version"] == 2
    name = recipe.GGUF_TARGETS[target]
    prefix = "MOSTLY_" + name + ("_S" if name in ("Q4_K", "Q5_K") else "")
    assert values["general.file_type"] == gguf.LlamaFileType[prefix]
    assert set(tensors) == set(state) == {layer.name for layer in report.layers}
    most = {"8": 0.006, "6": 0.025, "5": 0.05, "4": 0.1}[target[1]]
    for layer in report.layers:
        form, read = tensors[layer.name]
        exact = state[layer.name]
        if exact.ndim == 1:
            assert form == "F32" and torch.equal(read, exact.float())
        elif layer.name.startswith(SENSITIVE):
            assert form == "BF16" and torch.equal(read, exact.float())
        else:
            assert form == layer.format == name
            assert layer.weight_error == pytest.approx(relative(read, exact), rel=1e-4)
            assert 1e-3 < layer.weight_error < most
    assert report.source_bytes == sum(t.nbytes for t in state.values())
    padding = out.stat().st_size - report.bytes
    assert 0 < padding < 32 * len(tensors) + 20_000


@pytest.mark.parametrize(("target", "form"), [("bf16", "BF16"), ("f16", "F16"), ("q8_0", "Q8_0")])
def test_gguf_of_a_text_encoder(tmp_path, target, form):
    out = tmp_path / "t5.gguf"
    quantise_file(files.TEXT_ENCODER, target, out)
    state, (tensors, values) = load_file(files.TEXT_ENCODER), read_gguf(out)
    assert values["general.architecture"] == "t5encoder" and len(tensors) == len(state)
    for key, number in (
        ("context_length", 512), ("embedding_length", 192), ("feed_forward_length", 448),
        ("block_count", 2), ("attention.head_count", 4), ("attention.key_length", 48),
        ("attention.relative_buckets_count", 32),
    ):  # fmt: skip
        assert values[f"t5encoder.{key}"] == number
    assert values["t5encoder.attention.layer_norm_epsilon"] == pytest.approx(1e-6)
    for old, new in T5_NAMES.items():
        spared = "norm" in old or "relative" in old
        assert tensors[new][0] == ("F32" if spared else form)
        assert relative(tensors[new][1], state[old]) <= (0 if spared else 0.006)


def test_rows_that_fill_no_blocks_fall_back_to_f16(tmp_path):
    out = tmp_path / "t5.gguf"
    quantise_file(files.TEXT_ENCODER, "q4_k", out)
    form, values = read_gguf(out)[0]["enc.blk.0.attn_q.weight"]
    exact = load_file(files.TEXT_ENCODER)["encoder.block.0.layer.0.SelfAttention.q.weight"]
    assert form == "F16" and torch.equal(values, exact.half().float())


@pytest.mark.parametrize("target", ["fp8", "fp8-learned", "fp8mixed", "int8"])
@pytest.mark.parametrize("model", [files.TRANSFORMER, files.TEXT_ENCODER])
def test_safetensors(tmp_path, target, model):
    out = tmp_path / "small.safetensors"
    report = quantise_file(model, target, out)
    state, stored = load_file(model), load_file(out)
    with safe_open(out, "pt") as file:
        metadata = file.metadata() or {}
    mixed = target in ("fp8mixed", "int8")
    scale_name = "weight_scale" if mixed else "scale_weight"
    described = {}
    for layer in report.layers:
        exact, tensor = state[layer.name], stored.pop(layer.name)
        linear = exact.ndim == 2 and not layer.name.startswith(("shared", *SENSITIVE))
        if not linear or "relative" in layer.name:
            assert torch.equal(tensor, exact) and tensor.dtype == exact.dtype
            continue
        stem = layer.name.removesuffix(".weight")
        scale = stored.pop(f"{stem}.{scale_name}")
        assert scale.dtype == torch.float32
        assert scale.shape == ((len(exact), 1) if target == "int8" else ())
        assert tensor.dtype == (torch.int8 if target == "int8" else torch.float8_e4m3fn)
        if target in ("fp8", "fp8mixed"):
            absmax = exact.float().abs().max()
            expected = (exact.float() / (absmax / 448)).to(torch.float8_e4m3fn)
            assert scale == absmax / 448 and torch.equal(tensor.float(), expected.float())
        found = relative(tensor.double() * scale.double(), exact)
        assert layer.weight_error == pytest.approx(found, rel=1e-4)
        assert found < 0.028 and layer.output_error is None
        if mixed:
            described[stem] = json.loads(bytes(stored.pop(f"{stem}.comfy_quant").tolist()))
    if mixed:
        wanted = "int8_tensorwise" if target == "int8" else "float8_e4m3fn"
        assert described and {entry["format"] for entry in described.values()} == {wanted}
        told = json.loads(metadata["_quantization_metadata"])
        assert told == {"format_version": "1.0", "layers": described}
    else:
        marker = stored.pop("scaled_fp8")
        assert marker.dtype == torch.float8_e4m3fn and marker.numel() == 2
    assert not stored
    assert not list(tmp_path.glob("*.work")) and not list(tmp_path.glob("*.part"))


def test_plan_keeps_what_it_is_told_to():
    tensors = {
        "double_blocks.0.img_attn.qkv.weight": TensorInfo("F16", (96, 64)),
        "double_blocks.1.img_attn.qkv.weight": TensorInfo("F32", (96, 64)),
        "double_blocks.1.img_mlp.0.weight": TensorInfo("BF16", (96, 64)),
        "double_blocks.1.img_mlp.0.bias": TensorInfo("BF16", (96,)),
        "img_in.weight": TensorInfo("F32", (64, 64)),
    }
    keep = ("blocks.?.img_attn",)
    assert list(plan(tensors, Kind.CHROMA, Recipe("q5_0", keep)).values()) == [
        "F16", "BF16", "Q5_0", "F32", "BF16",
    ]  # fmt: skip
    assert list(plan(tensors, Kind.CHROMA, Recipe("fp8", keep)).values()) == [
        "F16", "F32", "fp8", "BF16", "F32",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="called 'mlp7'"):
        plan(tensors, Kind.CHROMA, Recipe("fp8", ("mlp7",)))
    with pytest.raises(CheckpointError, match="expected one of q8_0"):
        Recipe("q9")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_prefixes_and_layouts_give_the_same_file(tmp_path, dtype):
    model = random_transformer()
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    plain, prefixed, other = (tmp_path / f"{n}.safetensors" for n in ("plain", "prefix", "other"))
    save_file(state, plain)
    save_file({f"model.diffusion_model.{n}": t for n, t in state.items()}, prefixed)
    parts = {
        n: t.to(dtype).contiguous()
        for n, t in diffusers_state(model.state_dict(), model.config.hidden).items()
    }
    save_file(parts, other)
    outs = []
    for path in (plain, prefixed, other):
        outs.append(tmp_path / f"{path.stem}-out.safetensors")
        quantise_file(path, "fp8", outs[-1])
    first = load_file(outs[0])
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in first.values())
    for path in outs[1:]:
        again = load_file(path)
        assert again.keys() == first.keys()
        for name, tensor in first.items():
            assert torch.equal(again[name].float(), tensor.float()), name


def test_calibration_lowers_the_output_error(tmp_path):
    layer = "single_blocks.1.linear2"
    weight = load_file(files.TRANSFORMER)[f"{layer}.weight"].double()
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(100, weight.shape[1], generator=generator)
    x = torch.randn(500, 100, generator=generator) @ mixing
    path, out = tmp_path / "calibration.safetensors", tmp_path / "out.safetensors"
    save_calibration(path, {f"model.diffusion_model.{layer}": x.bfloat16()})
    report = quantise_file(files.TRANSFORMER, "fp8-learned", out, calibration=path)
    stored = load_file(out)
    learned = stored[f"{layer}.weight"].double() * stored[f"{layer}.scale_weight"].double()
    scale = weight.abs().max().float() / 448
    nearest = (weight.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()
    inputs = x.bfloat16().double()
    found = (inputs @ (learned - weight).T).norm() / (inputs @ (nearest - weight).T).norm()
    reported = {entry.name: entry.output_error for entry in report.layers}
    assert reported[f"{layer}.weight"] == pytest.approx(float(found), rel=1e-3)
    assert found < 0.6
    assert sum(error is not None for error in reported.values()) == 1
    for wrong, match in (
        ({"no.such.layer": x}, "other layers"),
        ({layer: x[:, :-1]}, f"{layer}.weight: calibration data of shape"),
    ):
        with pytest.raises(ChromaError, match=match):
            quantise_file(files.TRANSFORMER, "fp8-learned", out, calibration=wrong)
    with pytest.raises(ChromaError, match="needs no calibration"):
        quantise_file(files.TRANSFORMER, "q8_0", tmp_path / "x.gguf", calibration={layer: x})


@pytest.mark.parametrize("target", recipe.TARGETS)
@pytest.mark.parametrize("model", [files.TRANSFORMER, files.TEXT_ENCODER])
def test_what_is_made_is_read_here(tmp_path, target, model):
    out = tmp_path / ("x.gguf" if target in recipe.GGUF_TARGETS else "x.safetensors")
    quantise_file(model, target, out)
    read = read_transformer if model is files.TRANSFORMER else read_text_encoder
    config, state = read(out)
    exact_config, exact = read(model)
    assert config == exact_config and state.keys() == exact.keys()
    for name, tensor in exact.items():
        values = state[name]
        if isinstance(values, QuantTensor):
            values = values.dequantise(torch.float32)
        assert relative(values, tensor) < 0.1, name


def test_gguf_can_be_the_source(tmp_path):
    middle, direct, out = (tmp_path / n for n in ("m.gguf", "d.safetensors", "o.safetensors"))
    quantise_file(files.TEXT_ENCODER, "bf16", middle)
    quantise_file(middle, "int8", out)
    quantise_file(files.TEXT_ENCODER, "int8", direct)
    found, expected = load_file(out), load_file(direct)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n].float(), t.float()) for n, t in expected.items())


def interrupt(after):
    """A progress function that stops as Ctrl-C does."""
    calls = []

    def progress(done, total, name):
        calls.append(name)
        if len(calls) == after:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("target", ["q8_0", "fp8"])
def test_nothing_is_left_behind_on_ctrl_c(tmp_path, target):
    out = tmp_path / ("x.gguf" if target == "q8_0" else "x.safetensors")
    out.write_bytes(b"what was there")
    with pytest.raises(KeyboardInterrupt):
        quantise_file(files.TRANSFORMER, target, out, progress=interrupt(40))
    assert list(tmp_path.iterdir()) == [out] and out.read_bytes() == b"what was there"


def test_learned_rounding_goes_on_where_it_stopped(tmp_path, monkeypatch):
    names, whole, out = [], tmp_path / "whole.safetensors", tmp_path / "x.safetensors"
    original = quantise.quantise_fp8_learned

    def count(weight, gram, **options):
        names.append(weight.shape)
        return original(weight, gram, **options)

    monkeypatch.setattr(quantise, "quantise_fp8_learned", count)
    quantise_file(files.TRANSFORMER, "fp8-learned", whole)
    total = len(names)
    names.clear()
    with pytest.raises(KeyboardInterrupt):
        quantise_file(files.TRANSFORMER, "fp8-learned", out, progress=interrupt(45))
    finished = len(names)
    work = tmp_path / "x.safetensors.work"
    assert 0 < finished < total and len(list(work.iterdir())) == finished
    assert not out.exists() and not list(tmp_path.glob("*.part"))
    victims = sorted(work.iterdir())
    victims[0].write_bytes(victims[0].read_bytes()[:100])
    quantise_file(files.TRANSFORMER, "fp8-learned", out)
    assert len(names) == total + 1
    assert out.read_bytes() == whole.read_bytes() and not work.exists()


def test_finished_layers_of_another_source_are_not_used(tmp_path):
    state, changed = load_file(files.TRANSFORMER), tmp_path / "changed.safetensors"
    save_file({name: -tensor for name, tensor in state.items()}, changed)
    out = tmp_path / "x.safetensors"
    with pytest.raises(KeyboardInterrupt):
        quantise_file(files.TRANSFORMER, "fp8-learned", out, progress=interrupt(60))
    report = quantise_file(changed, "fp8-learned", out)
    assert max(layer.weight_error for layer in report.layers) < 0.03


def test_progress_ends_at_the_whole(tmp_path):
    seen = []
    quantise_file(
        files.TEXT_ENCODER, "q4_0", tmp_path / "x.gguf", progress=lambda *a: seen.append(a)
    )
    done = [entry[0] for entry in seen]
    assert done == sorted(done) and done[-1] == seen[-1][1]
    assert {entry[2] for entry in seen} == set(load_file(files.TEXT_ENCODER))


def damaged(tmp_path, change):
    state = load_file(files.TRANSFORMER)
    change(state)
    path = tmp_path / "damaged.safetensors"
    save_file(state, path)
    return path


def put_nan(state):
    state["single_blocks.0.linear1.weight"][3, 4] = torch.nan


def make_fp8(state):
    name = "single_blocks.0.linear1.weight"
    state[name] = state[name].to(torch.float8_e4m3fn)


def drop(state):
    del state["single_blocks.0.linear1.bias"]


def widen(state):
    state["single_blocks.0.linear2.weight"] = torch.zeros(256, 9)


def make_huge(state):
    state["img_in.weight"][0, 0] = 1e6
    state["single_blocks.0.linear1.weight"][0, 0] = 1e6


@pytest.mark.parametrize(
    ("change", "target", "match"),
    [
        (put_nan, "fp8", "linear1.weight holds NaN or infinity"),
        (make_fp8, "q8_0", "quantised already"),
        (drop, "fp8", "linear1.bias has shape None"),
        (widen, "fp8", "linear2.weight has shape"),
        (make_huge, "f16", "too large for F16"),
    ],
)
def test_sources_that_are_refused(tmp_path, change, target, match):
    path = damaged(tmp_path, change)
    out = tmp_path / ("x.safetensors" if target == "fp8" else "x.gguf")
    with pytest.raises(ChromaError, match=match) as error:
        quantise_file(path, target, out)
    assert "\n" not in str(error.value) and path.name in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_made_or_written(tmp_path, monkeypatch):
    for path, target, match in (
        (tmp_path / "x.safetensors", "q8_0", r"end in \.gguf"),
        (tmp_path / "x.gguf", "int8", r"end in \.safetensors or \.sft"),
        (tmp_path / "no" / "x.gguf", "q8_0", "does not exist"),
        (files.TRANSFORMER, "fp8", "the source itself"),
    ):
        with pytest.raises(CheckpointError, match=match):
            quantise_file(files.TRANSFORMER, target, path)
    with pytest.raises(CheckpointError, match="expected a Chroma transformer or a T5"):
        quantise_file(files.VAE, "fp8", tmp_path / "x.safetensors")
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(quantise.shutil, "disk_usage", lambda _: full)
    with pytest.raises(CheckpointError, match="make room"):
        quantise_file(files.TRANSFORMER, "q8_0", tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="room on the disk"), replacing(tmp_path / "x") as f:
        f.write(b"some")
        raise OSError(28, "No space left on device")
    with pytest.raises(CheckpointError, match="cannot be written"), replacing(tmp_path / "n" / "x"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_gguf, write_safetensors])
def test_writers_refuse_a_tensor_that_is_missing_or_of_another_size(tmp_path, write):
    infos = {"a": TensorInfo("F32", (3,)), "b": TensorInfo("F16", (2, 5))}
    path = tmp_path / "x"
    with pytest.raises(ValueError, match="b was not written"), write(path, infos, {}) as writer:
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="its place 12"), write(path, infos, {}) as writer:
        writer.write("a", torch.zeros(4))
    assert not list(tmp_path.iterdir())


def test_writers_take_tensors_in_any_order(tmp_path):
    tensors = {
        "byte": torch.arange(7, dtype=torch.uint8), "half": torch.randn(3, 5).half(),
        "number": torch.tensor(2.5), "wide": torch.randn(5, 3).T,
    }  # fmt: skip
    names = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}
    infos = {n: TensorInfo(names[t.dtype], tuple(t.shape)) for n, t in tensors.items()}
    path = tmp_path / "x.safetensors"
    with write_safetensors(path, infos, {"key": "text"}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    assert all(torch.equal(t, tensors[n]) for n, t in load_file(path).items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"key": "text"} and len(file.keys()) == 4
    del infos["byte"], infos["number"]
    with write_gguf(tmp_path / "x.gguf", infos, {"a": 7, "b": 0.5, "c": "ä"}) as writer:
        for name in ("wide", "half"):
            writer.write(name, tensors[name])
    read, values = read_gguf(tmp_path / "x.gguf")
    assert (values["a"], values["b"], values["c"]) == (7, 0.5, "ä")
    assert all(torch.equal(read[name][1], tensors[name].float()) for name in infos)


_PEAK = """
import resource, sys, torch
from pathlib import Path
from chroma_nodes.chroma.checkpoint import quantise, source
source._check_complete = lambda *a: None
torch.set_num_threads(1)
folder, target, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
quantise.quantise_file(folder / "little.safetensors", target, folder / name)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantise.quantise_file(folder / "large.safetensors", target, folder / name)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("target", ["q8_0", "fp8", "fp8-learned", "int8"])
def test_peak_memory_is_a_few_times_the_largest_tensor(tmp_path, target):
    """Three large tensors: the peak must not grow with their number."""
    state = load_file(files.TRANSFORMER)
    save_file(state, tmp_path / "little.safetensors")
    largest = 24 << 20
    for i in range(3):
        name = f"single_blocks.{i}.linear1.weight"
        state[name] = torch.full((largest // 2 // 256, 256), 0.01 * (i + 1)).bfloat16()
    save_file(state, tmp_path / "large.safetensors")
    out = "x.gguf" if target == "q8_0" else "x.safetensors"
    command = [sys.executable, "-c", _PEAK, str(tmp_path), target, out]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4 * largest
