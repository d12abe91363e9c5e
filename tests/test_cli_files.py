"""`chroma-nodes quantize` and `inspect`, and the pictures that quantised files give."""

import json

import pytest
import torch
from chroma_nodes.chroma.checkpoint.recipe import GGUF_TARGETS, TARGETS
from chroma_nodes.chroma.cli import main
from chroma_nodes.chroma.pipeline import Pipeline, Settings, generate
from chroma_nodes.chroma.tiny import files as small
from safetensors import safe_open

PROMPTS = [
    "a flat emoji of a tiger on a green background",
    "a 3d emoji of an owl on a red background",
    "a 3d emoji of a guitar on a blue background",
    "a flat emoji of a pizza on a black background",
]
SETTINGS = Settings(width=small.SIZE, height=small.SIZE, seed=3)
# The least PSNR in dB, as docs/formats.md states it.
STATED = {
    "q8_0": 47, "q6_k": 40, "q5_k": 32, "q4_k": 26, "q5_1": 32, "q5_0": 32, "q4_1": 26, "q4_0": 26,
    "bf16": 70, "f16": 55, "fp8": 34, "fp8-learned": 34, "fp8mixed": 34, "int8": 45,
}  # fmt: skip


def pictures(model=None):
    files = (model, small.TEXT_ENCODER, small.TOKENIZER, small.VAE) if model else ()
    pipeline = Pipeline.load(*files, dtype=torch.bfloat16)
    return generate(pipeline, PROMPTS, settings=SETTINGS, disable_progress=True)


def psnr(drawn, reference):
    """Median over the pictures, in dB: now and then a sensitive one takes another course."""
    errors = (drawn - reference).square().flatten(1).mean(1).clamp(min=1e-10)
    return float(-10 * torch.log10(errors).median())


@pytest.fixture(scope="module")
def reference():
    return pictures()


@pytest.mark.parametrize("target", TARGETS)
def test_every_format_is_made_and_draws_within_its_stated_quality(
    tmp_path, capsys, reference, target
):
    out = tmp_path / ("small.gguf" if target in GGUF_TARGETS else "small.safetensors")
    command = ["quantize", str(small.TRANSFORMER), "--to", target, "--out", str(out), "--quiet"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(out) and "largest relative error" in lines[1]
    assert psnr(pictures(out), reference) >= STATED[target]


def test_a_quantised_text_encoder_draws_the_same(tmp_path, reference):
    out = tmp_path / "t5.gguf"
    command = ["quantize", str(small.TEXT_ENCODER), "--to", "q8_0", "--out", str(out), "--quiet"]
    assert main(command) == 0
    pipeline = Pipeline.load(None, out, small.TOKENIZER, dtype=torch.bfloat16)
    drawn = generate(pipeline, PROMPTS, settings=SETTINGS, disable_progress=True)
    assert psnr(drawn, reference) >= 35


def test_kept_layers_and_the_report(tmp_path):
    out, report = tmp_path / "x.gguf", tmp_path / "report.json"
    command = ["quantize", str(small.TRANSFORMER), "--to", "q8_0", "--out", str(out), "--quiet"]
    assert main([*command, "--keep", "single_blocks.0", "--report", str(report)]) == 0
    layers = {layer["name"]: layer for layer in json.loads(report.read_text())["layers"]}
    assert layers["single_blocks.0.linear1.weight"]["format"] == "BF16"
    assert layers["single_blocks.1.linear1.weight"]["format"] == "Q8_0"
    assert 0 < layers["single_blocks.1.linear1.weight"]["weight_error"] < 0.01


def test_inspect_counts_what_safetensors_counts(capsys):
    assert main(["inspect", "--json", str(small.TRANSFORMER), str(small.VAE)]) == 0
    found, vae = json.loads(capsys.readouterr().out)
    with safe_open(small.TRANSFORMER, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert found["kind"] == "a Chroma transformer"
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors)
    assert found["bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert found["sizes"]["double_depth"] == 2 and found["loader"] == "Load Chroma Model"
    assert vae["kind"] == "a Flux autoencoder" and vae["folder"] == "models/vae"


def test_inspect_names_the_formats_of_quantised_files(tmp_path, capsys):
    names = {"q8_0": "Q8_0", "fp8": "F8_E4M3, scaled", "fp8mixed": "float8_e4m3fn, scaled",
             "int8": "int8_tensorwise, scaled"}  # fmt: skip
    for target, name in names.items():
        out = tmp_path / ("x.gguf" if target in GGUF_TARGETS else "x.safetensors")
        out.unlink(missing_ok=True)
        assert main(["quantize", str(small.TRANSFORMER), "--to", target, "--out", str(out),
                     "--quiet"]) == 0  # fmt: skip
        capsys.readouterr()
        assert main(["inspect", str(out)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{out.name}: a Chroma transformer"
        assert any(line.strip().startswith(f"{name}: 24 tensors") for line in lines)


def test_foreign_and_broken_files_are_one_line(tmp_path, capsys):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    assert main(["inspect", str(broken)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    command = ["quantize", str(small.VAE), "--to", "q8_0", "--out", str(tmp_path / "x.gguf")]
    assert main([*command, "--quiet"]) == 2
    assert "a Flux autoencoder" in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()
