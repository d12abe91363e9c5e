"""The nodes that make files of LoRA files: what is in those, their names, and interrupts.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment.
"""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.checkpoint import read_text_encoder, read_transformer
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.checkpoint.read import plain
from chroma_nodes.chroma.errors import ChromaError, LoraError
from chroma_nodes.chroma.lora.adapters import LowRank
from chroma_nodes.chroma.lora.read import read_lora
from chroma_nodes.chroma.tiny import files as small
from comfy_inprocess import COMFYUI, complaint, import_comfyui
from comfy_queue import Server
from lora_files import TEXT_PREFIX, write_lora
from safetensors.torch import load_file, save_file
from test_quantize_node import files_in, shown

import_comfyui()

import comfy.model_management
import comfy.utils
import folder_paths
from chroma_nodes.chroma.lora.rows import ROWS
from chroma_nodes.nodes import lora_tools
from chroma_nodes.nodes.host_model import build_model
from chroma_nodes.nodes.loading import ChromaLoadModel
from chroma_nodes.nodes.lora import ChromaLoadLora, lora_names

KEYS = (
    "double_blocks.0.img_attn.qkv.weight",
    "single_blocks.1.linear1.weight",
    "single_blocks.0.linear2.weight",
)
TEXT_KEY = "encoder.block.1.layer.0.SelfAttention.q.weight"
CATEGORIES = ("loras", "diffusion_models", "text_encoders")
CONFIG, STATE = read_transformer(small.TRANSFORMER)
STATE = {key: value.float() for key, value in plain(STATE, torch.float32).items()}
TEXT_CONFIG, TEXT_STATE = read_text_encoder(small.TEXT_ENCODER)
BASE, TEXT_BASE = f"diffusion_models/{small.LABEL}", f"text_encoders/{small.LABEL}"


@pytest.fixture(scope="module")
def model():
    """A MODEL of the small size."""
    return build_model(small.TRANSFORMER, torch.float32)


@pytest.fixture
def comfy_folders(tmp_path, monkeypatch):
    """ComfyUI's folders as empty ones, and what it shows of a node's progress."""
    folders = {}
    for category in CATEGORIES:
        folders[category] = tmp_path / "models" / category
        folders[category].mkdir(parents=True)
        known = ([str(folders[category])], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, category, known)
    seen = []

    def hook(value, total, preview=None, node_id=None):
        seen.append((value, total))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    # Newer ones report at intervals only.
    for limit in ("PROGRESS_THROTTLE_MIN_INTERVAL", "PROGRESS_THROTTLE_MIN_PERCENT"):
        monkeypatch.setattr(comfy.utils, limit, -1, raising=False)
    return SimpleNamespace(root=tmp_path / "models", seen=seen, **folders)


@pytest.fixture
def loras(comfy_folders):
    """a.safetensors and b.safetensors of ranks 3 and 2, and their changes."""
    keep = {key: STATE[key] for key in KEYS}
    a = write_lora(comfy_folders.loras / "a.safetensors", keep, rank=3, seed=1, alpha=1.5)
    first = {key: keep[key] for key in KEYS[:2]}
    b = write_lora(comfy_folders.loras / "b.safetensors", first, rank=2, seed=2)
    return a, b


@torch.inference_mode()  # as ComfyUI runs its nodes
def make(node, **values):
    """Run a node; the name it returns and the text it shows."""
    output = node.execute(**{"filename_prefix": "", **values})
    (text,) = output.ui.as_dict()["text"]
    assert text.startswith(output.result[0])
    return output.result[0], text


def rows(*chosen):
    """The inputs of rows that name (file, strength)."""
    chosen = [*chosen, *[("none", 1.0)] * (ROWS - len(chosen))]
    pairs = {f"lora_{i}": name for i, (name, _) in enumerate(chosen, 1)}
    return pairs | {f"strength_{i}": value for i, (_, value) in enumerate(chosen, 1)}


def changes_of(path):
    """{parameter: its whole change} of a file of additive adapters."""
    file, found = read_lora(path, CONFIG, TEXT_CONFIG), {}
    for key, placed in (file.transformer | file.text_encoder).items():
        found[key] = torch.zeros({**STATE, **TEXT_STATE}[key].shape)
        for one in placed:
            part = slice(*(one.rows or (0, len(found[key]))))
            found[key][part] += one.adapter.delta(torch.device("cpu"))
    return found


def ranks_of(path):
    placed = read_lora(path, CONFIG, TEXT_CONFIG).transformer.values()
    assert all(isinstance(one.adapter, LowRank) for each in placed for one in each)
    return {one.adapter.rank for each in placed for one in each}


def close(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert (found[key] - value).norm() <= tolerance * value.norm(), key


def total(*parts):
    """{parameter: sum of strength times change}."""
    out = {}
    for changes, strength in parts:
        for key, change in changes.items():
            out[key] = out.get(key, 0) + strength * change
    return out


# What is made


@pytest.mark.parametrize("style", ["kohya", "diffusers", "comfyui"])
def test_convert(comfy_folders, loras, model, style):
    values = {"lora_name": "a.safetensors", "style": style, "model": model}
    name, text = make(lora_tools.ChromaConvertLora, **values)
    assert name == f"a-{style}.safetensors" and " tensors, " in text
    prefix = {"kohya": "lora_unet_", "diffusers": "transformer.", "comfyui": "diffusion_model."}
    path = comfy_folders.loras / name
    assert all(tensor.startswith(prefix[style]) for tensor in load_file(path))
    close(changes_of(path), loras[0])
    assert str(comfy_folders.root) not in text


def test_merging_loras_is_exact_without_a_rank(comfy_folders, loras, model):
    stack = [("b.safetensors", -0.5, -0.5)]
    chosen = rows(("a.safetensors", 0.7), ("b.safetensors", 0.0))
    name, text = make(lora_tools.ChromaMergeLoras, rank=0, lora_stack=stack, model=model, **chosen)
    assert name == "b-merged.safetensors" and "\n" in text
    close(changes_of(comfy_folders.loras / name), total((loras[0], 0.7), (loras[1], -0.5)))
    assert ranks_of(comfy_folders.loras / name) == {3, 5}


def test_merging_loras_to_a_rank_comes_as_near_as_that_rank_can(comfy_folders, loras, model):
    chosen = rows(("a.safetensors", 1.0), ("b.safetensors", 2.0))
    name, text = make(lora_tools.ChromaMergeLoras, rank=2, model=model, **chosen)
    wanted = total((loras[0], 1.0), (loras[1], 2.0))
    least(changes_of(comfy_folders.loras / name), wanted, 2)
    assert "rank 2; relative error" in text
    assert comfy_folders.seen[-1] == (len(KEYS), len(KEYS))


def least(found, wanted, rank):
    """The error is that of numpy's truncated decomposition (Eckart-Young)."""
    for key, change in wanted.items():
        values = np.linalg.svd(change.double().numpy(), compute_uv=False)
        error = np.sqrt((values[rank:] ** 2).sum())
        assert float((found[key] - change).norm()) <= 1.001 * error + 1e-5 * change.norm()


def test_resize(comfy_folders, loras, model):
    values = {"lora_name": "a.safetensors", "value": 0.9, "model": model}
    node = lora_tools.ChromaResizeLora
    name, text = make(node, rank=2, measure="none", **values)
    assert name == "a-r2.safetensors" and "rank 2; relative error" in text
    least(changes_of(comfy_folders.loras / name), loras[0], 2)
    assert comfy_folders.seen[-1] == (len(KEYS), len(KEYS))
    name, _ = make(node, rank=0, measure="sv_fro", **values)
    assert name == "a-sv_fro0.9.safetensors"
    found = changes_of(comfy_folders.loras / name)
    for key, change in loras[0].items():
        assert (found[key] - change).norm() <= (1 - 0.9**2) ** 0.5 * change.norm() + 1e-4
    assert make(node, rank=1, measure="sv_ratio", **{**values, "value": 2.5})[0].startswith(
        "a-r1-sv_ratio2.5"
    )


def test_extract(comfy_folders, loras):
    tuned = total((STATE, 1.0), (loras[0], 1.0))
    save_file(tuned, comfy_folders.diffusion_models / "tuned.safetensors")
    values = {"original": small.LABEL, "tuned": "tuned.safetensors", "energy": 0.0}
    name, text = make(lora_tools.ChromaExtractLora, rank=3, **values)
    assert name == "tuned-lora.safetensors" and f"{len(KEYS)} parameters differ" in text
    # fp16 factors: 2^-11 each.
    close(changes_of(comfy_folders.loras / name), loras[0], 2e-3)
    assert ranks_of(comfy_folders.loras / name) == {3}
    assert comfy_folders.seen[-1] == (len(STATE), len(STATE))
    name, _ = make(lora_tools.ChromaExtractLora, rank=0, **{**values, "energy": 0.8})
    found = changes_of(comfy_folders.loras / name)
    for key, change in loras[0].items():
        assert (found[key] - change).norm() <= 0.2**0.5 * change.norm() + 2e-3 * change.norm()


def test_merging_into_the_base_and_into_bf16(comfy_folders, loras):
    node, chosen = lora_tools.ChromaMergeLoraIntoCheckpoint, rows(("a.safetensors", 0.5))
    source = comfy_folders.diffusion_models / "q.gguf"
    quantise_file(small.TRANSFORMER, "q8_0", source)
    old = values_of(source)
    wanted = total((old, 1.0), (loras[0], 0.5), (loras[1], 2.0))
    stack = [("b.safetensors", 2.0, 0.0)]
    for to, suffix, tolerance in (("base", "gguf", 1e-2), ("bf16", "safetensors", 4e-3)):
        name, text = make(
            node, model_name="diffusion_models/q.gguf", to=to, lora_stack=stack, **chosen
        )
        assert name == f"q-merged.{suffix}" and f"{len(KEYS)} parameters changed" in text
        made = values_of(comfy_folders.diffusion_models / name)
        close(made, wanted, tolerance)
        left_alone = all(torch.equal(made[key], old[key]) for key in old if key not in KEYS)
        assert left_alone or to == "bf16"
        assert name in ChromaLoadModel.define_schema().inputs[0].options
        done, of = comfy_folders.seen[-1]
        assert done == of


def values_of(path):
    state = plain(read_transformer(path)[1], torch.float32)
    return {key: value.float() for key, value in state.items()}


def test_what_rounding_takes_away_is_told(comfy_folders, loras):
    chosen = rows(("a.safetensors", 1e-4))
    _, text = make(lora_tools.ChromaMergeLoraIntoCheckpoint, model_name=BASE, to="base", **chosen)
    assert "rounding to the base's format kept" in text


def test_a_text_encoder_takes_the_strengths_for_clip(comfy_folders):
    keyed = {TEXT_KEY: TEXT_STATE[TEXT_KEY]}
    changes = write_lora(comfy_folders.loras / "t.safetensors", keyed, TEXT_PREFIX)
    name, _ = make(
        lora_tools.ChromaMergeLoraIntoCheckpoint, model_name=TEXT_BASE, to="bf16",
        lora_stack=[("t.safetensors", 0.0, 0.5)], **rows(("t.safetensors", 0.25)),
    )  # fmt: skip
    assert files_in(comfy_folders.text_encoders) == [name]
    found = load_file(comfy_folders.text_encoders / name)[TEXT_KEY].float()
    wanted = TEXT_STATE[TEXT_KEY].float() + 0.75 * changes[TEXT_KEY]
    assert (found - wanted).norm() <= 4e-3 * wanted.norm()


def test_one_file_has_one_strength(comfy_folders, loras, model):
    """A stack's two strengths are one where the file has one part, and an error where not."""
    text = {TEXT_KEY: TEXT_STATE[TEXT_KEY].float()}
    changes = write_lora(comfy_folders.loras / "t.safetensors", text, TEXT_PREFIX)
    stack = [("a.safetensors", 0.5, 1.0), ("t.safetensors", 1.0, 0.25)]
    values = {"rank": 0, "model": model, **rows()}
    name, _ = make(lora_tools.ChromaMergeLoras, lora_stack=stack, **values)
    found = changes_of(comfy_folders.loras / name)
    close(found, total((loras[0], 0.5), (changes, 0.25)))
    stack = [(name, 0.5, 1.0)]
    with pytest.raises(LoraError, match=r"at strength 0.5 and the text encoder at 1; expected one"):
        make(lora_tools.ChromaMergeLoras, lora_stack=stack, **values)


# Names, menus and interrupts


def test_names_are_the_users_and_nothing_is_overwritten(comfy_folders, loras, model):
    (comfy_folders.loras / "sub").mkdir()
    values = {"lora_name": "a.safetensors", "style": "kohya", "model": model}
    for prefix, expected in (
        ("a", "a_00002_.safetensors"), (" sub/x.sft ", "sub/x.safetensors"),
        ("sub\\x", "sub/x_00002_.safetensors"), ("", "a-kohya.safetensors"),
    ):  # fmt: skip
        before = (comfy_folders.loras / "a.safetensors").read_bytes()
        name, _ = make(lora_tools.ChromaConvertLora, **values, filename_prefix=prefix)
        assert Path(name) == Path(expected) and name in lora_names()
        assert name in ChromaLoadLora.define_schema().inputs[2].options
        assert (comfy_folders.loras / "a.safetensors").read_bytes() == before


def cases(comfy_folders, model):
    """A node each that reports progress, and its inputs."""
    tuned = comfy_folders.diffusion_models / "tuned.safetensors"
    save_file({k: v + 0.1 for k, v in STATE.items()}, tuned)
    quantise_file(small.TRANSFORMER, "q8_0", comfy_folders.diffusion_models / "q.gguf")
    into, chosen = lora_tools.ChromaMergeLoraIntoCheckpoint, rows(("a.safetensors", 1.0))
    return [
        (lora_tools.ChromaMergeLoras, {"rank": 1, "model": model, **chosen}),
        (lora_tools.ChromaResizeLora, {"lora_name": "a.safetensors", "rank": 1, "measure": "none",
                                       "value": 1.0, "model": model}),
        (lora_tools.ChromaExtractLora, {"original": small.LABEL, "tuned": tuned.name, "rank": 2,
                                        "energy": 0.0}),
        (into, {"model_name": "diffusion_models/q.gguf", "to": "bf16", **chosen}),
        (into, {"model_name": "diffusion_models/q.gguf", "to": "base", **chosen}),
        (into, {"model_name": BASE, "to": "base", **chosen}),
    ]  # fmt: skip


def test_an_interrupt_leaves_nothing(comfy_folders, loras, model, monkeypatch):
    every = cases(comfy_folders, model)
    before = files_in(comfy_folders.root)
    for node, values in every:
        seen = []

        def stop(value, total, preview=None, node_id=None, seen=seen):
            seen.append(value)
            if len(seen) == 2:
                comfy.model_management.interrupt_current_processing()

        monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", stop)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            make(node, **values)
        assert len(seen) == 2 and files_in(comfy_folders.root) == before


def test_what_is_refused_is_one_line_and_leaves_nothing(comfy_folders, loras, model):
    before = files_in(comfy_folders.root)
    merge, into = lora_tools.ChromaMergeLoras, lora_tools.ChromaMergeLoraIntoCheckpoint
    one = rows(("a.safetensors", 1.0))
    for node, values, match in (
        (merge, {"rank": 0, **rows()}, "no LoRA is chosen; choose one"),
        (merge, {"rank": 0, "model": model, **rows(("a.safetensors", 0.0))}, "at strength 0"),
        (merge, {"rank": 0, **one}, r"a.safetensors"),  # of another size than Chroma1
        (merge, {"rank": 0, **one, "model": model, "filename_prefix": "../x"}, "is no name for"),
        (merge, {"rank": 0, "lora_stack": ["a"], **rows()}, "LORA_STACK is not a list"),
        (into, {"model_name": BASE, "to": "base", **rows(("gone", 1.0))}, "gone is not in"),
        (into, {"model_name": TEXT_BASE, "to": "base", **one}, "a.safetensors"),
        (lora_tools.ChromaExtractLora, {"original": small.LABEL, "tuned": small.LABEL, "rank": 4,
                                        "energy": 0.0}, "there is nothing to extract"),
        (lora_tools.ChromaConvertLora, {"lora_name": "a.safetensors", "style": "kohya",
                                        "model": model, "filename_prefix": "no/x"},
         "does not exist; make it first"),
    ):  # fmt: skip
        with pytest.raises(ChromaError, match=match) as error:
            make(node, **values)
        assert "\n" not in str(error.value)
        assert files_in(comfy_folders.root) == before


ROWS_OF = {"lora_1": "a.safetensors", "lora_2": "none", "lora_4": "b.safetensors"}
GOOD = {
    "ChromaConvertLora": {
        "lora_name": "a.safetensors", "style": "kohya", "filename_prefix": "",
    },
    "ChromaMergeLoras": {**ROWS_OF, "filename_prefix": "x"},
    "ChromaResizeLora": {
        "lora_name": "a.safetensors", "rank": 4, "measure": "none", "value": 0.9,
        "filename_prefix": "",
    },
    "ChromaExtractLora": {
        "original": small.LABEL, "tuned": small.LABEL, "rank": 4, "energy": 0.0,
        "filename_prefix": "",
    },
    "ChromaMergeLoraIntoCheckpoint": {
        "model_name": BASE, **ROWS_OF, "to": "bf16", "filename_prefix": "",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("node", "changes", "says"),
    [
        *((node, {}, None) for node in GOOD),
        *((node, dict.fromkeys(GOOD[node]), None) for node in GOOD),
        ("ChromaConvertLora", {"lora_name": "../a.safetensors"}, "lora_name '../a.safetensors'"),
        ("ChromaConvertLora", {"style": "flux"}, "style 'flux' is not in the list"),
        ("ChromaConvertLora", {"filename_prefix": "../x"}, "'../x' is no name"),
        ("ChromaMergeLoras", {"lora_4": "/etc/passwd"}, "lora_4 '/etc/passwd'"),
        ("ChromaMergeLoras", {"filename_prefix": "C:x"}, "'C:x' is no name"),
        ("ChromaResizeLora", {"rank": 0, "measure": "sv_ratio", "value": 20.0}, None),
        ("ChromaResizeLora", {"rank": None}, None),
        ("ChromaResizeLora", {"measure": None}, None),
        ("ChromaResizeLora", {"rank": 0}, "a limit by measure; expected"),
        ("ChromaResizeLora", {"measure": "sv_ratio"}, "sv_ratio is 0.9"),
        ("ChromaResizeLora", {"measure": "sv_fro", "value": 20.0}, "sv_fro is 20.0"),
        ("ChromaResizeLora", {"measure": "energy", "value": 0.5}, "measure 'energy'"),
        ("ChromaExtractLora", {"tuned": "../x"}, "tuned '../x' is not in"),
        ("ChromaExtractLora", {"rank": 0}, "a limit by energy; expect"),
        ("ChromaMergeLoraIntoCheckpoint", {"model_name": "loras/x"}, "model_name 'loras/x'"),
        ("ChromaMergeLoraIntoCheckpoint", {"lora_4": "/etc/passwd"}, "lora_4 '/etc/passwd'"),
        ("ChromaMergeLoraIntoCheckpoint", {"to": "kohya"}, "to 'kohya' is not in"),
    ],
)
def test_values_are_checked_before_the_run(loras, node, changes, says):
    told = complaint(getattr(lora_tools, node), **GOOD[node] | changes)
    if says is None:
        assert told is None
    else:
        assert told and says in told and "\n" not in told


@pytest.mark.parametrize("kind", ["cpu", "mps", "cuda"])
def test_an_accelerator_of_cudas_kind_gets_room(monkeypatch, kind):
    asked, device = [], torch.device(kind)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: device)
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda *args: asked.append(args))
    found = lora_tools._device()
    assert found == (device if kind == "cuda" else torch.device("cpu"))
    assert asked == ([(lora_tools.NEEDED, device)] if kind == "cuda" else [])


def test_on_a_real_server(tmp_path):
    with Server(Path(COMFYUI or ""), tmp_path / "base") as server:
        folder = server.base / "models" / "loras"
        folder.mkdir(exist_ok=True)
        write_lora(folder / "a.safetensors", {key: STATE[key] for key in KEYS})
        loader = {"model_name": small.LABEL, "weight_dtype": "fp32"}
        resize = {"lora_name": "a.safetensors", "rank": 2, "measure": "none", "value": 0.9,
                  "filename_prefix": "made", "model": ["m", 0]}  # fmt: skip
        into = {"model_name": BASE, "to": "bf16", "filename_prefix": "made",
                **rows(("a.safetensors", 0.5))}  # fmt: skip
        prompt = {
            "m": {"class_type": "ChromaLoadModel", "inputs": loader},
            "r": {"class_type": "ChromaResizeLora", "inputs": resize},
            "i": {"class_type": "ChromaMergeLoraIntoCheckpoint", "inputs": into},
        }
        run = server.run(prompt)
        assert run.ending == "execution_success", run.data
        (text,) = shown(server, run)["r"]["text"]
        assert text.startswith("made.safetensors\n") and "rank 2; relative error" in text
        assert f"{len(KEYS)} parameters changed" in shown(server, run)["i"]["text"][0]
        of_node = {"r": [], "i": []}
        for place, value, top in run.progress:
            of_node.get(place, []).append((value, top))
        assert all(steps == sorted(steps) for steps in of_node.values())
        assert of_node["r"][-1] == (len(KEYS), len(KEYS))
        assert of_node["i"][-1][0] == of_node["i"][-1][1]
        for loader, menu in (("ChromaLoadLora", "lora_name"), ("ChromaLoadModel", "model_name")):
            offered = server.get(f"/object_info/{loader}")[loader]["input"]["required"][menu]
            assert "made.safetensors" in str(offered)
        bad = {"r": {**prompt["r"], "inputs": {**resize, "rank": 0}}, "m": prompt["m"]}
        status, reply = server.post("/prompt", {"prompt": bad})
        details = reply["node_errors"]["r"]["errors"][0]["details"]
        assert status == 400 and "a limit by measure" in details and "\n" not in details
