"""The README's set-up: what it installs, and what `make` does, run as it is written.

Nothing is fetched: the repository is cloned from its own folder, and requirements must be there.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
URL = "https://github.com/comfyui-chroma/comfyui-chroma"
HERE = {**os.environ, "PYTHONSAFEPATH": "", "PYTHONPATH": ""}
unix = pytest.mark.skipif(os.name == "nt", reason="the lines are for a POSIX shell")


def block_with(line: str) -> str:
    """The README's block in which a line starts like this."""
    blocks = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
    return next(block for block in blocks if re.search(f"^{re.escape(line)}", block, re.M))


def run(command: list[str], folder: Path, env: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def need_to_build() -> None:
    """Skip where pip could not build a package without fetching anything."""
    found = {each.name.lower(): each.version for each in distributions()}
    for name, least in (("pip", (21, 3)), ("setuptools", (70, 1))):
        version = tuple(int(part) for part in re.findall(r"\d+", found.get(name, "0"))[:2])
        if version < least:
            pytest.skip(f"{name} {'.'.join(map(str, least))} is needed to build a package")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone of what is committed; skipped where this is no repository."""
    if not ((ROOT / ".git").exists() and shutil.which("git")):
        pytest.skip("this is no git repository")
    folder = tmp_path_factory.mktemp("clone")
    run(["git", "clone", "--quiet", str(ROOT), "pack"], folder, HERE)
    return folder / "pack"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The variables of a virtual environment that sees this one's packages, but not this pack."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    (own,) = folder.glob("lib/python*/site-packages")
    outer = [path for path in sys.path if path.endswith("site-packages")]
    (own / "outer.pth").write_text("\n".join(outer) + "\n")
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return {**HERE, "PATH": path, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@unix
def test_installing_in_comfyui(clone, environment, tmp_path):
    need_to_build()
    lines = block_with("git clone")
    assert URL in lines
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    (tmp_path / ".gitconfig").write_text(f'[url "{clone}"]\n\tinsteadOf = {URL}\n')
    env = {**environment, "HOME": str(tmp_path), "PIP_NO_BUILD_ISOLATION": "false"}
    told = run(["bash", "-e", "-c", lines], tmp_path, env)
    assert "Successfully installed chroma-nodes" in told and "torch" not in told
    found = run(
        ["python", "-c", "import chroma_nodes; print(chroma_nodes.__file__)"], clone.parent, env
    )
    assert Path(found.strip()).parent == tmp_path / "ComfyUI" / "custom_nodes" / "ComfyUI-Chroma"


@unix
def test_a_wheel_has_the_small_model(clone, environment, tmp_path):
    need_to_build()
    env = {**environment, "PIP_NO_BUILD_ISOLATION": "false"}
    run(["python", "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), "."], clone, env)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as built:
        packed = {name.removeprefix("chroma_nodes/") for name in built.namelist()}
    layers = ("chroma", "nodes", "samplers", "schedulers")
    listed = run(["git", "ls-files", *layers], clone, HERE).splitlines()
    assert {name for name in listed if not name.startswith("nodes/web/")} <= packed


@unix
def test_make_demo_after_its_set_up(clone):
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (clone / ".venv" / "demo.stamp").touch()
    (line,) = re.findall(r"^make demo +# .* write (\S+)$", block_with("make demo"), re.M)
    assert line in run(["make", "demo"], clone, HERE)
    assert (clone / line).read_bytes().startswith(b"\x89PNG")


@unix
def test_the_lines_for_windows_do_what_make_does():
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    recipe = run(["make", "-n", "-B", "test", "demo"], ROOT, HERE).replace('"', "")
    recipe = recipe.replace(" --quiet --disable-pip-version-check", "").replace("python3", "python")
    for line in block_with(".venv").replace(".venv\\Scripts\\", ".venv/bin/").splitlines():
        assert not line or line in recipe.splitlines(), line
