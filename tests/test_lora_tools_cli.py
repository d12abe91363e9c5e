"""`chroma-nodes lora …`: every tool from the command line, on the model that ships."""

import argparse
import json

import pytest
import torch
from chroma_nodes.chroma.checkpoint.read import plain, read_transformer
from chroma_nodes.chroma.errors import ChromaError
from chroma_nodes.chroma.lora.cli import add_lora_commands
from chroma_nodes.chroma.tiny import files as small
from lora_files import merged, write_lora
from lora_producers import PRODUCERS
from safetensors.torch import load_file, save_file

MODEL = ["--model", str(small.TRANSFORMER)]
KEYS = ["double_blocks.0.img_attn.qkv.weight", "single_blocks.1.linear2.weight"]


def run(*arguments):
    parser = argparse.ArgumentParser()
    add_lora_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(["lora", *map(str, arguments)])
    return args.function(args)


@pytest.fixture(scope="module")
def state():
    found = plain(read_transformer(small.TRANSFORMER)[1], torch.float32)
    return {key: tensor.float() for key, tensor in found.items()}


@pytest.fixture
def files(tmp_path, state):
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    weights = {key: state[key] for key in KEYS}
    changes = [write_lora(path, weights, rank=3 + i, seed=i) for i, path in enumerate(paths)]
    return paths, changes


def test_info_counts_what_safetensors_counts(tmp_path, files):
    (path, _), _ = files
    lines = run("info", path, *MODEL)
    assert "2 modules of the transformer" in lines[0] and "rank 3" in lines[0]
    tensors = load_file(path)
    (found,) = json.loads(run("info", path, "--json", *MODEL)[0])
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["bytes"] == path.stat().st_size and found["dtypes"] == {"float32": 4}
    assert found["style"] == "comfyui" and found["scales"] == [1.0]
    assert found["report"]["kinds"] == {"lora": 2} and found["report"]["ranks"] == [3]


def test_info_on_metadata_and_what_does_not_fit(tmp_path):
    path = tmp_path / "x.safetensors"
    g = torch.Generator().manual_seed(0)
    names = {"lora_unet_double_blocks_0_img_attn_proj": (3072, 3072),
             "lora_unet_double_blocks_0_img_mod_lin": (18432, 3072)}  # fmt: skip
    state = {}
    for name, (n, k) in names.items():
        state[f"{name}.lora_down.weight"] = torch.randn(1, k, generator=g).half()
        state[f"{name}.lora_up.weight"] = torch.randn(n, 1, generator=g).half()
        state[f"{name}.alpha"] = torch.tensor(0.5)
    save_file(state, path, {"ss_network_module": "networks.lora_flux",
                            "modelspec.trigger_phrase": "a green cat"})  # fmt: skip
    lines = run("info", path)
    text = "\n".join(lines)
    assert "sd-scripts" in text and "trigger words: a green cat" in text
    assert "Flux modulation (3 tensors)" in text and "alpha / rank 0.5" in text
    assert "spelled as for kohya" in text


def test_convert_resize_and_merge_loras(tmp_path, files):
    (a, b), changes = files
    kohya, both, less = (tmp_path / f"{name}.safetensors" for name in ("k", "both", "less"))
    assert run("convert", a, "--to", "kohya", "--out", kohya, *MODEL)[0] == str(kohya)
    lines = run("merge", "--lora", f"{kohya}:0.5", "--lora", b, "--out", both, "--quiet", *MODEL)
    assert lines[0] == str(both)
    tensors = load_file(both)
    for key in KEYS:
        name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        scale = float(tensors[f"{name}.alpha"]) / len(down)
        wanted = 0.5 * changes[0][key] + changes[1][key]
        assert len(down) == 7 and (scale * up @ down - wanted).norm() <= 1e-5 * wanted.norm()
    lines = run("resize", both, "--rank", "2", "--dtype", "bf16", "--out", less, "--quiet", *MODEL)
    assert any("rank 2" in line for line in lines)
    kinds = {t.dtype for name, t in load_file(less).items() if not name.endswith("alpha")}
    assert kinds == {torch.bfloat16}


def test_merge_into_a_checkpoint_and_extract(tmp_path, files, state):
    (a, b), changes = files
    base, tuned, out = (tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "out"))
    save_file(state, base)
    run("merge", "--base", base, "--lora", f"{a}:0.5", "--lora", b, "--out", tuned, "--quiet")
    wanted = merged(state, [(changes[0], 0.5), (changes[1], 1.0)])
    assert all(torch.allclose(t, wanted[k], atol=1e-5) for k, t in load_file(tuned).items())
    lines = run("extract", base, tuned, "--rank", "7", "--dtype", "fp32", "--out", out, "--quiet")
    assert "2 parameters differ" in "\n".join(lines)
    tensors = load_file(out)
    for key in KEYS:
        name = f"diffusion_model.{key.removesuffix('.weight')}"
        found = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        difference = wanted[key] - state[key]
        assert (found - difference).norm() <= 1e-3 * difference.norm()


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge", "--lora", "A", "--to", "bf16"],
        ["merge", "--lora", "A", "--base", "MODEL", "--rank", "4"],
        ["merge", "--lora", "A", "--base", "MODEL", "--to", "kohya"],
        ["merge", "--lora", "nowhere.safetensors"],
        ["resize", "A"],
        ["resize", "A", "--rank", "0"],
        ["extract", "MODEL", "MODEL", "--rank", "4"],
        ["extract", "MODEL", "MODEL"],
        ["convert", "MODEL", "--to", "kohya"],
        ["resize", "A", "--rank", "2", "--device", "abacus"],
    ],
)
def test_requests_that_make_no_sense_are_one_line(tmp_path, files, arguments):
    (a, _), _ = files
    named = {"A": str(a), "MODEL": str(small.TRANSFORMER)}
    out = tmp_path / "out.safetensors"
    extra = [] if arguments[0] == "extract" else MODEL
    with pytest.raises(ChromaError) as error:
        run(*(named.get(word, word) for word in arguments), "--out", out, *extra)
    assert "\n" not in str(error.value) and not out.exists()


def test_progress_reaches_its_end(tmp_path, files, capsys):
    (a, _), _ = files
    run("resize", a, "--rank", "2", "--out", tmp_path / "out.safetensors", *MODEL)
    assert "100%" in capsys.readouterr().err


def test_every_producers_file_can_be_described(tmp_path):
    from chroma_nodes.chroma.lora.tools.info import lora_info
    from lora_producers import CONFIG

    for name, producer in PRODUCERS.items():
        path = tmp_path / "x.safetensors"
        save_file({k: t.contiguous() for k, t in producer.state.items()}, path)
        lines = lora_info(path, CONFIG).lines()
        assert lines[0].startswith("x.safetensors: ") and len(lines) >= 3, name
