"""Every command and every Python block of the README and the docs runs as it is written.

The files that they name stand ready under these names: the small model's, and LoRAs for it. What
installs or fetches something is left to `make demo` and `make test`; what talks to a server is run
by test_comfy_api.py.
"""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from chroma_nodes.chroma.checkpoint import load_transformer
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.cli import main
from chroma_nodes.chroma.tiny import files as small
from lora_files import linears, write_lora
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Commands of other programs, and ours that need a server, artwork or hours.
ELSEWHERE = ("make ", "cd ", "git ", "python -m", ".venv", "COMFYUI_PATH=", "curl", "pip ", "npm ",
             "chroma-nodes queue")  # fmt: skip
QUICK = ["--steps", "1"]
SMALL_SIDE = ["--width", "64", "--height", "64"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def commands() -> list[str]:
    """Each line of a block without a language that is a command of ours."""
    found = []
    for page in PAGES:
        for block in blocks(page, ""):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line.startswith("chroma-nodes ")]
    return [line for line in dict.fromkeys(found) if not line.startswith(ELSEWHERE)]


def test_there_is_no_other_kind_of_command():
    """A new kind of line in a block must be run, or be named above."""
    for page in (ROOT / "README.md",):
        for block in blocks(page, ""):
            for line in block.replace("\\\n", " ").splitlines():
                known = not line.strip() or line.startswith(("chroma-nodes ", *ELSEWHERE))
                assert known, f"{page.name}: {line}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with every file that the pages speak of."""
    path = tmp_path_factory.mktemp("documented")
    models = path / "ComfyUI" / "models"
    names = {
        "Chroma1-HD.safetensors": small.TRANSFORMER, "t5xxl_fp16.safetensors": small.TEXT_ENCODER,
        "tokenizer.json": small.TOKENIZER, "ae.safetensors": small.VAE,
    }  # fmt: skip
    for name, source in names.items():
        shutil.copy(source, path / name)
    tuned = load_file(small.TRANSFORMER)
    key = "double_blocks.0.img_attn.qkv.weight"
    g = torch.Generator().manual_seed(0)
    tuned[key] = (tuned[key].float() + 0.01 * torch.randn(tuned[key].shape, generator=g)).bfloat16()
    save_file(tuned, path / "tuned.safetensors")
    quantise_file(small.TRANSFORMER, "q8_0", path / "Chroma1-HD-Q8_0.gguf")
    weights = linears(load_transformer(small.TRANSFORMER))
    for seed, name in enumerate(("style.safetensors", "flash.safetensors")):
        write_lora(path / name, {key: weights[key]}, size=0.05, seed=seed)
    # The tools take a LoRA for one of Chroma1 where no model is named.
    (path / "full").mkdir()
    write_lora(path / "full" / "style.safetensors", {key: torch.ones(9216, 3072)}, rank=32)
    (path / "prompts.txt").write_text("a 3d emoji of a cat\na flat emoji of a dog\n")
    Image.new("RGB", (64, 64), "white").save(path / "photo.png")
    Image.new("L", (64, 64), 255).save(path / "mask.png")
    shutil.copytree(ROOT / "workflows", path / "workflows")
    shutil.copy(ROOT / "workflows/api/chroma-small.json", path / "my_api_workflow.json")
    for part in ("diffusion_models", "text_encoders", "vae", "loras"):
        (models / part).mkdir(parents=True)
    (path / "ComfyUI" / "input").mkdir()
    return path


@pytest.mark.parametrize("line", commands())
def test_command(line, folder, monkeypatch, capsys):
    # The shell's own work: quotes are taken off, nothing else is special in these lines.
    _, *arguments = shlex.split(line)
    tool = arguments[:2] in (["lora", "info"], ["lora", "convert"], ["lora", "resize"])
    monkeypatch.chdir(folder / "full" if tool else folder)
    if arguments[0] == "generate":
        arguments += [*QUICK, "--quiet"]
        arguments += [] if "--width" in arguments or "--image" in arguments else SMALL_SIDE
    out = folder / arguments[arguments.index("--out") + 1] if "--out" in arguments else None
    if out is not None and out.suffix in (".gguf", ".safetensors"):
        out.unlink(missing_ok=True)
    assert main(arguments) == 0, capsys.readouterr().err
    if out is not None and not tool:
        assert out.exists()


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "api.md"], ids=lambda p: p.name)
def test_python(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {"__name__": "documented"})  # noqa: S102


def test_pages_link_to_files_that_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if not target.startswith("http"):
                assert os.path.exists(page.parent / target), f"{page.name}: {target}"
