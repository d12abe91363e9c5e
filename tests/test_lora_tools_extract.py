"""`lora extract`: the difference of two checkpoints, its least error, and its memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.checkpoint.read import plain, read_text_encoder, read_transformer
from chroma_nodes.chroma.errors import ChromaError, LoraError
from chroma_nodes.chroma.lora.adapters import changed
from chroma_nodes.chroma.lora.read import read_lora
from chroma_nodes.chroma.lora.tools.extract import extract_lora
from chroma_nodes.chroma.lora.tools.merge import merge_into_checkpoint
from chroma_nodes.chroma.lora.tools.rules import RankRule
from chroma_nodes.chroma.tiny import files as small
from oracles import SMALL, random_transformer
from safetensors.torch import load_file, save_file


def pair(tmp_path, layers=("double_blocks.0.img_attn.qkv", "single_blocks.2.linear2", "img_in")):
    """Two fp32 models that differ in some matrices, a bias and a scale; and {key: difference}."""
    first = {key: tensor.clone() for key, tensor in random_transformer().state_dict().items()}
    g = torch.Generator().manual_seed(5)
    change = {}
    for layer in layers:
        n, k = first[f"{layer}.weight"].shape
        noise = torch.randn(n, k, generator=g) * torch.logspace(0, -3, k)
        change[f"{layer}.weight"] = 0.05 * noise
    change["single_blocks.0.linear1.bias"] = 0.1 * torch.randn(896, generator=g)
    change["single_blocks.0.norm.key_norm.scale"] = 0.1 * torch.randn(64, generator=g)
    second = {key: t + change[key] if key in change else t.clone() for key, t in first.items()}
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(first, a)
    save_file(second, b)
    return a, b, {key: (second[key] - first[key]).double() for key in change}


def found(path, config=SMALL):
    """{parameter: change} of a file of LoRAs and differences."""
    out = {}
    lora = read_lora(path, config)
    for key, placed in (lora.transformer | lora.text_encoder).items():
        rows = sorted(placed, key=lambda p: p.rows or (0, 0))
        out[key] = torch.cat([p.adapter.delta(torch.device("cpu")).double() for p in rows])
    return out


@pytest.mark.parametrize("style", ["comfyui", "kohya"])
def test_no_lora_of_that_rank_is_nearer(tmp_path, style):
    a, b, wanted = pair(tmp_path)
    out = tmp_path / "lora.safetensors"
    extract_lora(a, b, out, RankRule(8), dtype=torch.float32, style=style)
    made = found(out)
    assert made.keys() == wanted.keys()
    for key, difference in wanted.items():
        error = float((made[key] - difference).norm())
        if difference.ndim == 1:
            assert error <= 1e-6
            continue
        values = np.linalg.svd(difference.numpy(), compute_uv=False)
        assert error <= 1.001 * np.sqrt((values[8:] ** 2).sum()) + 1e-6
        assert np.linalg.matrix_rank(made[key].numpy(), tol=1e-5 * values[0]) == 8


def test_an_energy_is_reached_and_no_rank_is_wasted(tmp_path):
    a, b, wanted = pair(tmp_path)
    out = tmp_path / "lora.safetensors"
    extract_lora(a, b, out, RankRule(energy=0.95), dtype=torch.float32)
    ranks = {key: p.adapter.rank for key, (p,) in read_lora(out, SMALL).transformer.items()}
    for key, difference in wanted.items():
        if difference.ndim == 2 and ranks[key] is not None:
            squares = np.linalg.svd(difference.numpy(), compute_uv=False) ** 2
            shares = np.cumsum(squares) / squares.sum()
            assert shares[ranks[key] - 1] >= 0.95 - 1e-6 and shares[ranks[key] - 2] < 0.95


def test_what_a_lora_put_in_comes_out(tmp_path):
    """Merge into the small model, extract again: the tuned model to bf16's rounding."""
    from lora_files import write_lora

    config, state = read_transformer(small.TRANSFORMER)
    state = {key: tensor.float() for key, tensor in plain(state, torch.float32).items()}
    lora, base = tmp_path / "lora.safetensors", tmp_path / "base.safetensors"
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    save_file(state, base)
    change = write_lora(lora, {k: t for k, t in state.items() if "img_mlp" in k and t.ndim == 2})
    merge_into_checkpoint(base, [(lora, 1.0)], tuned)
    extract_lora(base, tuned, out, RankRule(4), dtype=torch.float32)
    made = found(out, config)
    for key, wanted in change.items():
        assert (made[key] - wanted).norm() <= 1e-4 * wanted.norm(), key
    lora = read_lora(out, config)
    for key, placed in lora.transformer.items():
        weight = changed(state[key], [(p.adapter, 1.0, p.rows) for p in placed])
        assert (weight - load_file(tuned)[key]).norm() <= 1e-4 * weight.norm()


def test_diffusers_names_and_quantised_files(tmp_path):
    a, b, wanted = pair(tmp_path)
    tuned, out = tmp_path / "b.gguf", tmp_path / "lora.safetensors"
    quantise_file(b, "q8_0", tuned)
    written = extract_lora(a, tuned, out, RankRule(64), style="diffusers")
    assert any("b.gguf is quantised" in note for note in written.notes)
    key = "double_blocks.0.img_attn.qkv.weight"
    placed = read_lora(out, SMALL).transformer[key]
    assert sorted(p.rows for p in placed) == [(0, 128), (128, 256), (256, 384)]
    errors = found(out)[key] - wanted[key]
    assert errors.norm() <= 0.5 * wanted[key].norm()


def test_text_encoders_too(tmp_path):
    state = {k: t.float() for k, t in plain(read_text_encoder(small.TEXT_ENCODER)[1],
                                            torch.float32).items()}  # fmt: skip
    key = "encoder.block.0.layer.0.SelfAttention.q.weight"
    a, b, out = (tmp_path / f"{name}.safetensors" for name in "abc")
    save_file(state, a)
    change = torch.outer(torch.ones(len(state[key])), torch.linspace(-1, 1, state[key].shape[1]))
    save_file(state | {key: state[key] + 0.1 * change}, b)
    extract_lora(a, b, out, RankRule(2), style="kohya", dtype=torch.float32)
    assert all(name.startswith("lora_te3_encoder_block_0") for name in load_file(out))
    made = found(out)[key]
    assert (made - 0.1 * change).norm() <= 1e-4 * change.norm()


def test_clamping_is_at_the_quantile_of_all_factors(tmp_path):
    a, b, _ = pair(tmp_path, layers=("single_blocks.2.linear2",))
    plain_out, out = tmp_path / "c.safetensors", tmp_path / "d.safetensors"
    extract_lora(a, b, plain_out, RankRule(8), dtype=torch.float32)
    extract_lora(a, b, out, RankRule(8), clamp_quantile=0.9, dtype=torch.float32)
    names = [f"diffusion_model.single_blocks.2.linear2.lora_{x}.weight" for x in "AB"]
    before, after = load_file(plain_out), load_file(out)
    limit = np.quantile(np.concatenate([before[name].numpy().ravel() for name in names]), 0.9)
    for name in names:
        assert torch.allclose(after[name], before[name].clamp(-limit, limit), atol=1e-6)


@pytest.mark.parametrize("case", ["same", "sizes", "kinds", "nothing asked", "quantile", "lora"])
def test_what_cannot_be_extracted_is_one_error(tmp_path, case):
    a, b, _ = pair(tmp_path)
    rule, options = RankRule(4), {}
    if case == "same":
        b = tmp_path / "same.safetensors"
        b.write_bytes(a.read_bytes())
    elif case == "sizes":
        b = small.TRANSFORMER
    elif case == "kinds":
        b = small.TEXT_ENCODER
    elif case == "nothing asked":
        rule = RankRule()
    elif case == "quantile":
        options = {"clamp_quantile": 0.0}
    else:
        save_file({"diffusion_model.img_in.lora_A.weight": torch.ones(2, 2)}, b)
    out = tmp_path / "lora.safetensors"
    with pytest.raises(ChromaError) as error:
        extract_lora(a, b, out, rule, **options)
    assert "\n" not in str(error.value) and not out.exists()
    assert case in ("lora",) or isinstance(error.value, LoraError)


# Extracts in a process of its own and prints by how many bytes memory grew at most, beyond what the
# libraries take. Pages of mapped files, which the system may drop at any time, are left out where
# it tells them apart (Linux).
_MEASURE = """
import json, sys, threading, time
from pathlib import Path
import psutil, torch
from chroma_nodes.chroma.lora.tools.extract import extract_lora
from chroma_nodes.chroma.lora.tools.rules import RankRule
torch.set_num_threads(1)
a, b, warm_a, warm_b, out = map(Path, sys.argv[1:])
process, top, stop = psutil.Process(), 0, False
def own():
    info = process.memory_info()
    return info.rss - getattr(info, "shared", 0)
start = own()
extract_lora(warm_a, warm_b, out, RankRule(2))
def watch():
    global top
    while not stop:
        top = max(top, own())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
extract_lora(a, b, out, RankRule(2))
stop = True
thread.join()
print(json.dumps(top - start))
"""


def test_memory_is_that_of_a_layer_and_not_of_the_model(tmp_path):
    """Seven times as many layers of one size take hardly more than the few."""
    from chroma_nodes.chroma.config import ChromaConfig
    from chroma_nodes.chroma.transformer import ChromaTransformer

    sizes = {"context_dim": 32, "hidden": 512, "heads": 4, "mlp_hidden": 2048,
             "approximator_hidden": 64, "approximator_depth": 1}  # fmt: skip
    pairs = []
    for depth in (2, 14):
        with torch.device("meta"):
            model = ChromaTransformer(ChromaConfig(**sizes, double_depth=1, single_depth=depth))
        pairs.append([tmp_path / f"{name}{depth}.safetensors" for name in "ab"])
        g = torch.Generator().manual_seed(depth)
        for path in pairs[-1]:
            state = {key: torch.randn(tensor.shape, generator=g).bfloat16()
                     for key, tensor in model.state_dict().items()}  # fmt: skip
            save_file(state, path)
    peaks = []
    for files in pairs:
        command = [sys.executable, "-c", _MEASURE, *map(str, files), *map(str, pairs[0]),
                   str(tmp_path / "out.safetensors")]  # fmt: skip
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks.append(json.loads(out))
    # What the layers more are in fp32, in one model alone.
    more = 2 * (pairs[1][0].stat().st_size - pairs[0][0].stat().st_size)
    assert peaks[1] - peaks[0] <= 0.15 * more, (peaks, more)
