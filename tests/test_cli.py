"""The command line, as a user runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chroma_nodes.chroma.tiny import files as small
from PIL import Image
from workflow_files import ROOT

SMALL = ROOT / "workflows" / "api" / "chroma-small.json"


def chroma(*arguments, cwd, **kw):
    command = [sys.executable, "-m", "chroma_nodes", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **kw)


def test_generate_writes_a_picture_that_drops_back_into_comfyui(tmp_path):
    done = chroma("generate", "a 3d emoji of a cat", "--steps", 2, "--out", "c.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "c.png"
    assert "2 steps," in done.stdout and "s per step" in done.stdout
    with Image.open(tmp_path / "c.png") as file:
        assert file.size == (128, 128)
        prompt, workflow = json.loads(file.text["prompt"]), json.loads(file.text["workflow"])
    assert prompt["5"]["inputs"]["text"] == "a 3d emoji of a cat"
    assert {n["type"] for n in workflow["nodes"]} == {n["class_type"] for n in prompt.values()}
    (tmp_path / "again.json").write_text(json.dumps(prompt))
    again = chroma("run", "again.json", "--out", "o", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    with (
        Image.open(tmp_path / again.stdout.splitlines()[-1]) as a,
        Image.open(tmp_path / "c.png") as b,
    ):
        assert a.tobytes() == b.tobytes()


def test_generate_takes_files_that_share_a_name(tmp_path):
    for source, folder in ((small.TRANSFORMER, "t"), (small.TEXT_ENCODER, "e"), (small.VAE, "v")):
        (tmp_path / folder).mkdir()
        shutil.copy(source, tmp_path / folder / "model.safetensors")
    files = ["--model", "t/model.safetensors", "--text-encoder", "e/model.safetensors",
             "--vae", "v/model.safetensors"]  # fmt: skip
    rest = ["--width", 64, "--height", 32, "--steps", 1, "--dtype", "fp32", "--quiet"]
    done = chroma("generate", "a cat", *files, *rest, cwd=tmp_path)
    assert done.returncode == 2 and "needs its tokenizer" in done.stderr
    done = chroma("generate", "a cat", *files, *rest, "--tokenizer", small.TOKENIZER, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "chroma.png") as file:
        assert file.size == (64, 32)
        prompt = json.loads(file.text["prompt"])
    assert prompt["1"]["inputs"] == {"model_name": "model.safetensors", "weight_dtype": "fp32"}
    done = chroma("generate", "a cat", *rest, "--out", "own.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "own.png") as a, Image.open(tmp_path / "chroma.png") as b:
        assert a.tobytes() == b.tobytes()


def test_run_with_overrides(tmp_path):
    done = chroma(
        "run", SMALL, "--set", "10.steps=1", "--set", "7.width=64", "--out", "o", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.splitlines()[-1])
    with Image.open(tmp_path / path) as file:
        assert file.size == (64, 128)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "x", "--width", "100"], "width 100 is not usable; expected a multiple of 16"),
        (["generate", "x", "--height", "0"], "height 0 is not usable"),
        (["generate", "x", "--device", "nonsense"], "--device nonsense cannot be used"),
        (["generate", "x", "--device", "meta"], "--device meta cannot be used"),
        (["generate", "x", "--vae", "v.safetensors"], "expected --text-encoder and --vae together"),
        (
            [
                "generate",
                "x",
                "--text-encoder",
                str(small.TEXT_ENCODER.with_name("tokenizer.json")),
                "--vae",
                str(small.VAE),
            ],
            "tokenizer.json is not a model file",
        ),
        (["generate", "x", "--steps", "0"], "input steps: 0 is not usable"),
        (["generate", "x", "--cfg", "nan"], "cfg nan is not usable"),
        (["generate", "x", "--sampler", "dpm"], "unknown sampler 'dpm'; expected one of flow_pec"),
        (["generate", "x", "--scheduler", "karras"], "unknown scheduler 'karras'"),
        (["generate", "x", "--shift", "0"], "input shift: 0.0 is not usable"),
        (["generate", "x", "--seed", "-1"], "input noise_seed: -1 is not usable"),
        (["generate", "x", "--out", "x.bmp"], "expected a name ending in .png"),
        (
            ["generate", "x", "--model", "no.safetensors"],
            "--model: there is no file no.safe",
        ),
        (["generate", "x", "--model", "no.ckpt"], "no.ckpt"),
        (["run", "no.json"], "no.json does not exist"),
        (["run", str(SMALL), "--set", "Save.filename_prefix=../x"], "leads out of its folder"),
        (["run", str(SMALL), "--set", "x"], "expected node.input=value"),
        (["run", str(ROOT / "workflows" / "Chroma Nodes - Inpaint.json")], "Export (API)"),
        (["run", str(ROOT / "workflows" / "api" / "chroma-flash.json")], "Chroma1-HD-Flash"),
    ],
)
def test_a_user_error_is_one_line_and_leaves_nothing(tmp_path, arguments, says):
    done = chroma(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_long_prompt_says_what_was_cut(tmp_path):
    words = "tiger " * 511 + "zebra " + "tiger " * 90
    done = chroma("generate", words, "--steps", 1, "--quiet", cwd=tmp_path)
    assert done.returncode == 0
    assert "512" in done.stderr and "zebra" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for a child process")
def test_ctrl_c_leaves_no_half_file(tmp_path):
    command = [sys.executable, "-m", "chroma_nodes", "generate", "x", "--steps", "5000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    seen = ""
    while "/5000" not in seen:
        seen += process.stderr.read(1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert list(tmp_path.iterdir()) == []
