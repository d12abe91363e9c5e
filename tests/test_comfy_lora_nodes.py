"""The LoRA nodes inside ComfyUI, and LoRAs on a CLIP.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment.
"""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import logging

import pytest
import torch
from chroma_nodes.chroma.errors import LoraError
from chroma_nodes.chroma.presets import FLASH
from chroma_nodes.chroma.text.encoder import TextEncoder
from chroma_nodes.chroma.text.t5 import T5Encoder
from comfy_inprocess import complaint, import_comfyui
from lora_files import TEXT_PREFIX, linears, write_lora
from safetensors.torch import load_file, save_file
from stored_files import SAFETENSORS, gguf_file, llama_name
from test_comfy_lora import CPU, build, close, expected_of, kohya, merged, run, state
from test_comfy_quant import T5
from test_nodes import XXL, core_clip

import_comfyui()

import folder_paths
from chroma_nodes.nodes import host_text, lora
from chroma_nodes.nodes.host_quant import HostLinear
from chroma_nodes.nodes.lora import ChromaFlashLora, ChromaLoadLora, ChromaLoraInfo, ChromaLoraStack

__all__ = ["state"]  # a fixture
PROMPT = "a flat emoji of an apple"
UNKNOWN = "something.of.its.own"


@pytest.fixture
def loras(tmp_path):
    """A folder of LoRAs that ComfyUI lists."""
    folder = tmp_path / "loras"
    folder.mkdir()
    folder_paths.add_model_folder_path("loras", str(folder))
    folder_paths.filename_list_cache.clear()
    yield folder
    folder_paths.folder_names_and_paths["loras"][0].remove(str(folder))
    folder_paths.filename_list_cache.clear()


@pytest.fixture
def model(tmp_path, state):
    return build(tmp_path, state, "Q8_0")


def put(folder, name, extra=None, metadata=None, seed=7):
    """sd-scripts' file of two modules among the LoRAs; returns its changes."""
    tensors, changes = kohya(seed)
    save_file({**tensors, **(extra or {})}, folder / name, metadata)
    return changes


def load(model, name, strength=1.0, text_encoder=1.0, how="auto", blocks="", clip=None):
    out = ChromaLoadLora.execute(model, name, strength, text_encoder, how, blocks, clip)
    return out.result, out.ui.as_dict()["text"][0]


def random_t5(config, seed=0):
    torch.manual_seed(seed)
    return {k: torch.randn(v.shape) * 0.3 for k, v in T5Encoder(config).state_dict().items()}


def our_clip(tmp_path, base):
    """A CLIP of ours in a format, and what its matrices stand for."""
    weights = random_t5(T5)
    path = tmp_path / f"t5.{'gguf' if base == 'Q8_0' else 'safetensors'}"
    (tmp_path / "tokenizer.json").write_bytes(host_text.small.TOKENIZER.read_bytes())
    if base == "fp32":
        save_file(weights, path)
        return host_text.load_clip(path, "auto"), weights
    make = gguf_file("Q8_0", llama_name, "t5encoder") if base == "Q8_0" else SAFETENSORS[base]
    meant = make(weights, path)
    return host_text.load_clip(path, "auto"), meant


def text_lora(path, weights, config, prefix=TEXT_PREFIX):
    """A LoRA of every linear layer of the encoder; returns {key: change}."""
    model = T5Encoder(config)
    keys = linears(model)
    return write_lora(path, {key: weights[key] for key in keys}, prefix)


def encoded(clip):
    ((hidden, _),) = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    return hidden


def expected_text(config, weights, tokenizer):
    model = T5Encoder(config)
    model.load_state_dict(weights)
    return TextEncoder(tokenizer, model.eval()).encode([PROMPT]).hidden


@pytest.mark.parametrize("base", ["fp32", "Q8_0", "scaled_fp8"])
def test_our_clip(tmp_path, loras, model, base):
    clip, meant = our_clip(tmp_path, base)
    changes = text_lora(loras / "t.safetensors", meant, T5)
    before = encoded(clip)
    (_, patched), text = load(model[0], "t.safetensors", text_encoder=0.5, clip=clip)
    both = {k: v + 0.5 * changes[k] if k in changes else v for k, v in meant.items()}
    tokenizer = clip.cond_stage_model.tokenizer
    wanted = expected_text(T5, both, tokenizer)
    close(encoded(patched), wanted)
    assert (encoded(patched) - before).abs().max() > 0.01
    way = "merged" if base == "fp32" else "beside the weights"
    assert f"text encoder strength 0.5: {len(changes)} {way}" in text
    assert torch.equal(encoded(clip), before)


@pytest.mark.parametrize("prefix", [TEXT_PREFIX, "lora_te3_", "lora_te_", "text_encoder."])
def test_comfyuis_own_t5(tmp_path, loras, model, prefix):
    """With names that ComfyUI's own loader takes, and with names that it does not."""
    clip = core_clip()
    weights = random_t5(XXL)
    clip.cond_stage_model.t5xxl.transformer.load_state_dict(weights)
    changes = text_lora(loras / "t.safetensors", weights, XXL)
    if prefix != TEXT_PREFIX:
        renamed = {}
        for key, value in load_file(loras / "t.safetensors").items():
            module, _, leaf = key.removeprefix(TEXT_PREFIX).partition(".lora_")
            module = module.replace(".", "_") if prefix.endswith("_") else module
            renamed[f"{prefix}{module}.lora_{leaf}"] = value
        save_file(renamed, loras / "t.safetensors")
    (_, patched), text = load(model[0], "t.safetensors", text_encoder=0.5, clip=clip)
    both = {k: v + 0.5 * changes[k] if k in changes else v for k, v in weights.items()}
    wanted = expected_text(XXL, both, host_text.t5_tokenizer())
    close(encoded(host_text.adopt_clip(patched)), wanted)
    assert f"{len(changes)} merged" in text


def test_a_clip_without_t5_or_with_another_is_refused(tmp_path, loras, model):
    clip, _ = our_clip(tmp_path, "fp32")
    write_lora(loras / "w.safetensors",
                      {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(64, 32)},
                      TEXT_PREFIX)  # fmt: skip
    with pytest.raises(LoraError, match=r"w.safetensors.*down has shape.*made for this"):
        load(model[0], "w.safetensors", clip=clip)
    other = core_clip()
    other.patcher.model = torch.nn.Linear(2, 2)
    with pytest.raises(LoraError, match="holds Linear, which has no T5 encoder"):
        load(model[0], "w.safetensors", clip=other)


def test_the_node_tells_everything(tmp_path, loras, model, caplog):
    patcher, meant = model
    extra = {
        "lora_unet_double_blocks_0_img_mod_lin.lora_up.weight": torch.ones(12, 4),
        "lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": torch.ones(4, 2),
        UNKNOWN: torch.ones(3),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": torch.ones(64, 4),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": torch.ones(4, 64),
    }
    changes = put(loras, "x.safetensors", extra)
    with caplog.at_level(logging.INFO, "chroma"):
        (patched, clip), text = load(patcher, "x.safetensors", 0.7)
    assert clip is None and text in caplog.text
    for part in ("x.safetensors", "rank 4", "Flux modulation (2 tensors)", UNKNOWN,
                 "strength 0.7: 2 beside the weights", "no CLIP is connected"):  # fmt: skip
        assert part in text
    close(run(patched), expected_of(merged(meant, changes, 0.7)))
    assert any(r.levelno == logging.WARNING for r in caplog.records)


def test_a_stack_is_its_rows_after_the_tuples_of_another_pack(loras, model):
    patcher, meant = model
    first, second = (put(loras, f"{seed}.safetensors", seed=seed) for seed in (1, 2))
    rows = {}
    for i in range(1, lora.ROWS + 1):
        rows |= {f"lora_{i}": "none", f"strength_{i}": 1.0, f"text_encoder_strength_{i}": 1.0}
    rows |= {"lora_2": "2.safetensors", "strength_2": -0.5}
    stack = [("1.safetensors", 0.3, 1)]
    out = ChromaLoraStack.execute(patcher, "auto", lora_stack=stack, **rows)
    patched, clip, onward = out.result
    close(run(patched), expected_of(merged(merged(meant, first, 0.3), second, -0.5)))
    assert clip is None and onward == [("1.safetensors", 0.3, 1.0), ("2.safetensors", -0.5, 1.0)]
    assert out.ui.as_dict()["text"][0].count("\n") == 1
    with pytest.raises(LoraError, match=r"not a list of \(name, model strength, clip strength\)"):
        ChromaLoraStack.execute(patcher, "auto", lora_stack=["1.safetensors"], **rows)
    with pytest.raises(LoraError, match=r"gone.safetensors is not in ComfyUI's loras folder"):
        ChromaLoraStack.execute(patcher, "auto", lora_stack=[("gone.safetensors", 1, 1)], **rows)


def test_flash_sets_what_belongs_to_it(loras, model):
    patcher, meant = model
    changes = put(loras, "flash.safetensors")
    out = ChromaFlashLora.execute(patcher, "flash.safetensors", 1.0, FLASH.steps, "auto")
    patched, _, sigmas, cfg = out.result
    close(run(patched), expected_of(merged(meant, changes, 1.0)))
    assert cfg == 1.0 and len(sigmas) == FLASH.steps + 1 and sigmas[0] == 1 and sigmas[-1] == 0
    shown = out.ui.as_dict()["text"][0]
    assert "flash, 8 steps, beta (alpha 0.6 beta 0.6), shift 1, cfg 1" in shown


def test_info_tells_what_a_file_is(loras, model):
    metadata = {"ss_network_module": "networks.lora_flux", "modelspec.trigger_phrase": "by hand"}
    put(loras, "i.safetensors", metadata=metadata)
    (text,) = ChromaLoraInfo.execute("i.safetensors", model[0]).result
    for part in ("2 modules of the transformer", "rank 4", "sd-scripts", "trigger words: by hand"):
        assert part in text


def test_menus_and_texts_are_checked_before_the_run(loras):
    put(loras, "a.safetensors")
    good = {"lora_name": "a.safetensors", "how": "auto", "blocks": "double: 1"}
    assert complaint(ChromaLoadLora, **good) is None
    assert complaint(ChromaLoadLora, **good | {"lora_name": None}) is None
    for changes, told in (
        ({"lora_name": "../a.safetensors"}, "lora_name '../a.safetensors' is not in the list"),
        ({"how": "merge"}, "how 'merge' is not in the list"),
        ({"blocks": "doubles 1"}, "is not usable"),
    ):
        assert told in (complaint(ChromaLoadLora, **good | changes) or "")
    rows = {"lora_1": "a.safetensors", "lora_2": "none", "lora_4": "/etc/passwd"}
    assert "lora_4 '/etc/passwd'" in (complaint(ChromaLoraStack, **rows) or "")
    for node in (ChromaLoraInfo, ChromaFlashLora):
        assert "not in the list" in (complaint(node, lora_name="x") or "")


def test_a_quantised_clip_is_as_before(tmp_path, loras, model):
    """Its layers hold nothing of a LoRA once it is unloaded."""
    clip, meant = our_clip(tmp_path, "Q8_0")
    text_lora(loras / "t.safetensors", meant, T5)
    (_, patched), _ = load(model[0], "t.safetensors", clip=clip)
    patched.patcher.patch_model(device_to=CPU)
    layers = [m for m in clip.patcher.model.modules() if isinstance(m, HostLinear)]
    assert any(m.affine is not None for m in layers)
    patched.patcher.unpatch_model(device_to=CPU)
    assert not any(m.affine is not None or m.weight_function for m in layers)


def test_a_file_without_a_part_for_the_text_encoder_leaves_the_clip_alone(tmp_path, loras, model):
    clip, _ = our_clip(tmp_path, "fp32")
    put(loras, "a.safetensors")
    (_, same), text = load(model[0], "a.safetensors", clip=clip)
    assert same is clip and "text encoder" not in text
