"""The node that makes quantised files: names, results, and what an interrupt leaves behind.

What needs ComfyUI takes COMFYUI_PATH, the folder of a checkout, and runs in its environment.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chroma_nodes.chroma.checkpoint import read_text_encoder, read_transformer
from chroma_nodes.chroma.checkpoint.calibration import save_calibration
from chroma_nodes.chroma.checkpoint.new_file import new_file, relative_name
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.checkpoint.work_folder import WorkFolder
from chroma_nodes.chroma.errors import CheckpointError, ChromaError
from chroma_nodes.chroma.quant.tensor import QuantTensor
from chroma_nodes.chroma.tiny import files as small
from comfy_inprocess import COMFYUI, complaint, import_comfyui
from comfy_queue import Server
from safetensors.torch import load_file

SMALL = {
    "diffusion_models": f"diffusion_models/{small.LABEL}",
    "text_encoders": f"text_encoders/{small.LABEL}",
}
OUTSIDE = [
    "../x", "a/../../x", "..", "..\\x", "/etc/x", "\\x", "//server/x", "C:\\x", "C:x", "x:stream",
    "", "  ", ".", "x\0y", "x\ny",
]  # fmt: skip


# Names


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_the_folder_are_refused_in_one_line(tmp_path, name):
    with pytest.raises(CheckpointError, match="is no name for a new file") as error:
        new_file(tmp_path, name, "q8_0")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "target", "file"),
    [
        ("Chroma1-HD", "q8_0", "Chroma1-HD.gguf"),
        ("v1.5", "f16", "v1.5.gguf"),
        ("x.gguf", "q8_0", "x.gguf"),
        ("x.SFT", "int8", "x.safetensors"),
        ("x.gguf", "fp8mixed", "x.safetensors"),
        (" sub/x ", "q8_0", "sub/x.gguf"),
        ("sub\\x", "q8_0", "sub/x.gguf"),
        ("..x", "q8_0", "..x.gguf"),
    ],
)
def test_the_ending_comes_from_the_format(tmp_path, name, target, file):
    assert new_file(tmp_path, name, target) == tmp_path / file


def test_a_taken_name_gets_a_number(tmp_path):
    (tmp_path / "x.gguf").touch()
    assert new_file(tmp_path, "x", "q8_0") == tmp_path / "x_00002_.gguf"
    assert new_file(tmp_path, "x", "fp8") == tmp_path / "x.safetensors"
    (tmp_path / "x_00002_.gguf.part").touch()
    assert new_file(tmp_path, "x", "q8_0") == tmp_path / "x_00003_.gguf"


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_a_link_to_nowhere_is_a_taken_name(tmp_path):
    (tmp_path / "x.gguf").symlink_to(tmp_path / "nowhere")
    assert new_file(tmp_path, "x", "q8_0") == tmp_path / "x_00002_.gguf"


@pytest.mark.parametrize("name", ["..gguf", "..safetensors", "...", ". .", "a/..gguf", ".gguf"])
def test_names_of_dots_stand_for_folders(name):
    with pytest.raises(CheckpointError, match="is no name for a new file"):
        relative_name(name)


def test_relative_names_have_no_ending():
    assert str(relative_name("a/b.safetensors")) == "a/b"


# Without a work folder


class Stop(BaseException):
    """As ComfyUI's own exception for an interrupt."""


def test_a_run_that_is_not_resumable_leaves_nothing(tmp_path, monkeypatch):
    def progress(done, total, name):
        if done > total / 2:
            raise Stop

    monkeypatch.setattr(WorkFolder, "save", lambda *_: pytest.fail("a layer was kept"))
    with pytest.raises(Stop):
        quantise_file(
            small.TRANSFORMER, "fp8-learned", tmp_path / "x.safetensors", progress=progress,
            resumable=False,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_the_summary_states_the_sizes_of_the_tensors(tmp_path):
    report = quantise_file(small.TEXT_ENCODER, "int8", tmp_path / "x.safetensors")
    before, after = (
        sum(t.nbytes for t in load_file(path).values())
        for path in (small.TEXT_ENCODER, tmp_path / "x.safetensors")
    )
    described = sum(
        t.nbytes for n, t in load_file(tmp_path / "x.safetensors").items() if "comfy_quant" in n
    )
    text = report.summary()
    assert text.startswith(f"{before / 1e9:.3f} GB -> {after / 1e9:.3f} GB ({after / before:.2f} x")
    assert described < 0.001 * after and "\n" not in text


# In ComfyUI


@pytest.fixture
def comfy(tmp_path, monkeypatch):
    """The node, and ComfyUI's folders as empty ones; what it shows of its progress."""
    import_comfyui()
    import comfy.model_management
    import comfy.utils
    import folder_paths
    from chroma_nodes.nodes import loading, quantizing

    folders = {}
    for category, old in (("diffusion_models", "unet"), ("text_encoders", "clip")):
        folders[category] = tmp_path / "models" / category
        both = [tmp_path / "models" / old, folders[category]]
        for folder in both:
            folder.mkdir(parents=True)
        known = ([str(folder) for folder in both], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, category, known)
    (tmp_path / "input").mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    seen = []

    def hook(value, total, preview=None, node_id=None):
        seen.append((value, total))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    # Newer ones report at intervals only.
    for limit in ("PROGRESS_THROTTLE_MIN_INTERVAL", "PROGRESS_THROTTLE_MIN_PERCENT"):
        monkeypatch.setattr(comfy.utils, limit, -1, raising=False)
    return SimpleNamespace(
        node=quantizing.ChromaQuantize, loading=loading, folders=folders, seen=seen,
        management=comfy.model_management, utils=comfy.utils, module=quantizing,
        models=tmp_path / "models", input=tmp_path / "input",
    )  # fmt: skip


@torch.inference_mode()  # as ComfyUI runs its nodes
def quantise(comfy, **changes):
    """Run the node; the name it returns and the text it shows."""
    values = {
        "model_name": SMALL["diffusion_models"], "target_format": "q8_0", "filename_prefix": "",
        "keep": "", "calibration": "none", **changes,
    }  # fmt: skip
    output = comfy.node.execute(**values)
    (text,) = output.ui.as_dict()["text"]
    return output.result[0], text


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def values_of(state):
    return {
        name: value.dequantise(torch.float32) if isinstance(value, QuantTensor) else value.float()
        for name, value in state.items()
    }


@pytest.mark.parametrize("target", ["q8_0", "q4_0", "fp8mixed", "int8"])
def test_a_transformer_is_made_and_loaded(comfy, tmp_path, target):
    suffix = "gguf" if target.startswith("q") else "safetensors"
    name, text = quantise(comfy, target_format=target)
    assert name == f"chroma-small-{target}.{suffix}"
    assert files_in(comfy.models) == [f"diffusion_models/{name}"]
    out = tmp_path / f"library.{suffix}"
    report = quantise_file(small.TRANSFORMER, target, out)
    assert text == f"{name} ({target})\n{report.summary()}"
    assert comfy.seen[-1] == (report.source_bytes, report.source_bytes)
    assert len(comfy.seen) == len(report.layers)
    expected = values_of(read_transformer(out)[1])
    loader = comfy.loading.ChromaLoadModel
    assert name in loader.define_schema().inputs[0].options
    loaded = loader.execute(name, "fp32").result[0].model.diffusion_model.state_dict()
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(loaded[key].float(), value, rtol=0, atol=0)


def test_a_text_encoder_is_made_and_loaded(comfy, tmp_path):
    name, _ = quantise(comfy, model_name=SMALL["text_encoders"], filename_prefix="t5.gguf")
    assert name == "t5.gguf" and files_in(comfy.models) == ["text_encoders/t5.gguf"]
    out = tmp_path / "library.gguf"
    quantise_file(small.TEXT_ENCODER, "q8_0", out)
    key = "encoder.block.1.layer.0.SelfAttention.q.weight"
    expected = values_of(read_text_encoder(out)[1])[key]
    loader = comfy.loading.ChromaLoadTextEncoder
    assert name in loader.define_schema().inputs[0].options
    (comfy.folders["text_encoders"] / "tokenizer.json").write_bytes(small.TOKENIZER.read_bytes())
    clip = loader.execute(name, "fp32").result[0]
    loaded = clip.cond_stage_model.state_dict()[f"t5xxl.transformer.{key}"]
    torch.testing.assert_close(loaded.float(), expected, rtol=0, atol=0)


def test_nothing_is_overwritten(comfy):
    taken = comfy.folders["diffusion_models"] / "mine.gguf"
    taken.write_bytes(b"mine")
    name, _ = quantise(comfy, filename_prefix="mine")
    assert name == "mine_00002_.gguf" and taken.read_bytes() == b"mine"
    assert quantise(comfy, filename_prefix="mine")[0] == "mine_00003_.gguf"


@pytest.mark.parametrize("target", ["q8_0", "fp8-learned"])
@pytest.mark.parametrize("after", [1, 40])
def test_an_interrupt_leaves_nothing(comfy, monkeypatch, target, after):
    def stop(value, total, preview=None, node_id=None):
        comfy.seen.append(value)
        if len(comfy.seen) == after:
            comfy.management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", stop)
    with pytest.raises(comfy.management.InterruptProcessingException):
        quantise(comfy, target_format=target)
    assert len(comfy.seen) == after
    assert not files_in(comfy.models)
    assert not [path for path in comfy.models.rglob("*.work")]


def test_patterns_and_calibration_reach_the_file(comfy, tmp_path):
    layer = "single_blocks.1.linear2"
    width = load_file(small.TRANSFORMER)[f"{layer}.weight"].shape[1]
    data = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    path = comfy.input / "inputs.safetensors"
    save_calibration(path, {layer: data})
    assert comfy.node.define_schema().inputs[-1].options == ["none", path.name]
    patterns = "single_blocks.0.linear\n\n  double_blocks.*.img_mlp  \n"
    name, _ = quantise(
        comfy, target_format="fp8-learned", keep=patterns, calibration=path.name
    )  # fmt: skip
    out = tmp_path / "library.safetensors"
    keep = ("single_blocks.0.linear", "double_blocks.*.img_mlp")
    quantise_file(small.TRANSFORMER, "fp8-learned", out, keep, path)
    assert (comfy.folders["diffusion_models"] / name).read_bytes() == out.read_bytes()
    assert load_file(out)["single_blocks.0.linear1.weight"].dtype == torch.bfloat16
    path.unlink()
    with pytest.raises(CheckpointError, match=r"inputs.safetensors is not in ComfyUI's input"):
        quantise(comfy, target_format="fp8-learned", calibration=path.name)


def test_what_is_refused_is_one_line(comfy):
    name, _ = quantise(comfy, target_format="fp8")
    before = files_in(comfy.models)
    for changes, match in (
        ({"model_name": f"diffusion_models/{name}"}, "is quantised already"),
        ({"keep": "no.such"}, "no tensor of a Chroma transformer is called 'no.such'"),
        ({"filename_prefix": "../x"}, r"'../x' is no name for a new file"),
        ({"filename_prefix": "sub/x"}, "sub does not exist; make it first"),
        ({"model_name": "diffusion_models/gone.safetensors"}, "is not in ComfyUI's diffusion_mod"),
    ):
        with pytest.raises(ChromaError, match=match) as error:
            quantise(comfy, **changes)
        assert "\n" not in str(error.value)
    assert files_in(comfy.models) == before and not list(comfy.models.glob("x*"))


def test_values_are_checked_before_the_run(comfy):
    good = {
        "model_name": SMALL["diffusion_models"], "target_format": "q8_0", "filename_prefix": "",
        "calibration": "none",
    }  # fmt: skip
    assert complaint(comfy.node, **good) is None
    others = {"model_name": SMALL["text_encoders"], "target_format": "int8"}
    assert complaint(comfy.node, **good | others | {"filename_prefix": None}) is None
    assert complaint(comfy.node, **good | {"filename_prefix": " "}) is None
    for name, value in zip(good, (small.LABEL, "q9", "../x", "../../secret"), strict=True):
        told = complaint(comfy.node, **good | {name: value})
        assert told and repr(value) in told and "\n" not in told


def test_folders_that_cannot_be_written_to_are_passed_over(comfy, monkeypatch):
    wanted, old = comfy.folders["diffusion_models"], comfy.models / "unet"
    monkeypatch.setattr(comfy.module.os, "access", lambda path, _: Path(path) == old)
    quantise(comfy, filename_prefix="x")
    assert files_in(comfy.models) == ["unet/x.gguf"]
    wanted.rmdir()
    monkeypatch.setattr(comfy.module.os, "access", lambda path, _: False)
    quantise(comfy, filename_prefix="x")
    assert files_in(wanted) == ["x.gguf"]
    with pytest.raises(CheckpointError, match="folders for diffusion_models can be written to"):
        quantise(comfy, filename_prefix="y")


@pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH is not set: no real ComfyUI to test against")
def test_on_a_real_server(tmp_path):
    inputs = {
        "model_name": SMALL["diffusion_models"], "target_format": "q8_0",
        "filename_prefix": "made", "keep": "", "calibration": "none",
    }  # fmt: skip
    node = {"class_type": "ChromaQuantize", "inputs": inputs}
    with Server(Path(COMFYUI or ""), tmp_path / "base") as server:
        run = server.run({"q": node})
        assert run.ending == "execution_success", run.data
        models = server.base / "models"
        assert files_in(models) == ["diffusion_models/made.gguf"]
        steps = [(value, top) for place, value, top in run.progress if place == "q"]
        assert steps == sorted(steps) and steps[-1][0] == steps[-1][1] > 1
        (text,) = shown(server, run)["q"]["text"]
        assert text.startswith("made.gguf (q8_0)\n") and " GB -> " in text
        menu = server.get("/object_info/ChromaLoadModel")["ChromaLoadModel"]["input"]["required"]
        assert "made.gguf" in str(menu["model_name"])
        for change, match in (
            ({"filename_prefix": "../made"}, "is no name for a new file"),
            ({"model_name": "text_encoders/../../x"}, "not in"),
        ):
            bad = {"q": {**node, "inputs": {**inputs, **change}}}
            status, reply = server.post("/prompt", {"prompt": bad})
            details = reply["node_errors"]["q"]["errors"][0]["details"]
            assert status == 400 and match in details and "\n" not in details
        assert files_in(models) == ["diffusion_models/made.gguf"]


def shown(server, run):
    """{node: what it showed}; the history follows the last event a moment later."""
    for _ in range(100):
        if history := server.get(f"/history/{run.prompt_id}"):
            return history[run.prompt_id]["outputs"]
        time.sleep(0.1)
    raise AssertionError("no history")
