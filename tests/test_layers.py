"""One direction only: the plain-torch layers know neither ComfyUI nor nodes/."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("chroma", "samplers", "schedulers")
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview"}
# Training and its data need more than torch; nothing else imports them.
TOOLS = {"chroma/tiny/" + n for n in ("build.py", "captions.py", "dataset.py", "train.py")}


def modules(layer: str) -> list[str]:
    paths = sorted((ROOT / layer).rglob("*.py"))
    relative = [p.relative_to(ROOT) for p in paths if str(p.relative_to(ROOT)) not in TOOLS]
    return [
        "chroma_nodes." + ".".join(p.with_suffix("").parts).removesuffix(".__init__")
        for p in relative
    ]


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_imports_without_comfyui_and_without_nodes(layer):
    code = (
        "import importlib, sys\n"
        f"for name in {modules(layer)!r}: importlib.import_module(name)\n"
        "print(*sorted(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert not {name for name in loaded if name.split(".")[0] in HOST}
    assert not {name for name in loaded if name.startswith("chroma_nodes.nodes")}
    assert set(modules(layer)) <= loaded


def test_the_root_imports_nothing():
    heavy = ("torch", "chroma_nodes.nodes")
    code = f"import sys, chroma_nodes; print(*(m for m in {heavy} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr


@pytest.mark.parametrize("layer", ("samplers", "schedulers"))
def test_samplers_and_schedulers_need_nothing_of_chroma_but_errors_and_options(layer):
    for path in (ROOT / layer).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                assert node.module in ("chroma.errors", "chroma.option"), (
                    f"{path.name}: {node.module}"
                )


def test_every_package_is_listed_for_the_wheel():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for layer in (*LAYERS, "nodes"):
        for init in (ROOT / layer).rglob("__init__.py"):
            package = ".".join(("chroma_nodes", *init.parent.relative_to(ROOT).parts))
            assert f'"{package}"' in text


def test_nothing_unpickles():
    """torch.load and pickle run code from the file; only the build's own state may use them."""
    for layer in (*LAYERS, "nodes"):
        for path in (ROOT / layer).rglob("*.py"):
            if path.relative_to(ROOT).as_posix() == "chroma/tiny/train.py":
                continue
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr == "load":
                    assert getattr(node.value, "id", "") not in ("torch", "pickle"), path
                if isinstance(node, ast.Import):
                    assert "pickle" not in {alias.name for alias in node.names}, path
