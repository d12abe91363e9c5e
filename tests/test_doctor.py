"""What `doctor` tells is true of this machine, and tells nothing private."""

import argparse
import getpass
import json
import platform
import socket
import sys
from pathlib import Path

import psutil
import pytest
import torch
from chroma_nodes.chroma import doctor
from chroma_nodes.chroma.cli_doctor import add_doctor_command
from chroma_nodes.chroma.devices import best_dtype
from chroma_nodes.chroma.quant.kernels import available


def told(*flags):
    parser = argparse.ArgumentParser()
    add_doctor_command(parser.add_subparsers())
    args = parser.parse_args(["doctor", *flags])
    return "\n".join(args.function(args))


@pytest.fixture
def comfyui(tmp_path, monkeypatch):
    folder = tmp_path / "secret-user" / "ComfyUI"
    folder.mkdir(parents=True)
    (folder / "comfyui_version.py").write_text('# made\n__version__ = "1.22.333"\n')
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    return folder


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_nothing_private(comfyui, monkeypatch, flags):
    monkeypatch.setenv("HOME", "/home/secret-user")
    monkeypatch.setenv("USER", "secret-user")
    text = told(*flags)
    private = {
        "secret-user", str(comfyui), str(Path.home()), str(Path.cwd()), sys.prefix,
        str(Path(torch.__file__).parent), str(Path(doctor.__file__).parent),
    }  # fmt: skip
    assert not [part for part in private if part in text]
    assert "/home" not in text and "\\\\" not in text and ":\\" not in text
    for name in (getpass.getuser(), socket.gethostname(), platform.node()):
        assert name not in text.split()


def test_versions_devices_and_memory():
    found = json.loads(told("--json"))
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["numpy"] == __import__("numpy").__version__
    cpu = found["devices"][-1]
    assert cpu["name"] == "cpu" and cpu["total"] == psutil.virtual_memory().total
    assert 0 < cpu["free"] <= cpu["total"]
    assert cpu["dtype"] == str(best_dtype(torch.device("cpu"))).removeprefix("torch.")


def test_formats_are_those_of_the_kernels_that_are_there():
    found = json.loads(told("--json"))
    kernels = available(torch.device(found["used"]))
    for kind, there in (("int8", kernels.int8), ("fp8", kernels.fp8_matmul)):
        line = found["formats"][f"products in {kind} (weight_dtype {kind})"]
        assert line.startswith("fast: ") is there


@pytest.mark.parametrize("content", ["1.22.333", None, "junk"])
def test_comfyui(comfyui, content):
    file = comfyui / "comfyui_version.py"
    if content is None:
        file.unlink()
        assert told("--json") and "ComfyUI: not found, " in told()
        return
    if content == "junk":
        file.write_text("")
    version = "unknown" if content == "junk" else content
    assert f"ComfyUI: found, version {version}" in told().splitlines()
    assert json.loads(told("--json"))["comfyui"] == {"found": "yes", "version": version}
