"""Quantised files inside ComfyUI: the values of the file, memory management, and LoRA on top.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment.
"""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import dataclasses

import pytest
import torch
from chroma_nodes.chroma.errors import CheckpointError
from chroma_nodes.chroma.quant.prefetch import Copy
from chroma_nodes.chroma.text.t5 import T5Config, T5Encoder
from comfy_inprocess import import_comfyui
from oracles import SMALL, random_transformer
from stored_files import SAFETENSORS, gguf_file, llama_name

import_comfyui()

import comfy.sd
import folder_paths
from chroma_nodes.chroma.transformer import ChromaTransformer
from chroma_nodes.nodes import host, host_model, host_quant, host_text
from chroma_nodes.nodes.host_quant import HostLinear

CPU = torch.device("cpu")
# Wide enough for blocks of 32 columns.
CONFIG = dataclasses.replace(SMALL, context_dim=64)
T5 = T5Config(vocab_size=1020, d_model=64, heads=2, d_kv=32, d_ff=96, layers=2)
MAKERS = {**{name: (make, "safetensors") for name, make in SAFETENSORS.items()},
          "Q8_0": (gguf_file("Q8_0"), "gguf"), "Q4_0": (gguf_file("Q4_0"), "gguf")}  # fmt: skip
QKV = "double_blocks.1.img_attn.qkv"


def case(seed=1):
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(2, 16, 6, 8, generator=g)
    return latent, torch.full((2,), 0.7), torch.randn(2, 5, CONFIG.context_dim, generator=g)


@pytest.fixture(scope="module")
def state():
    return random_transformer(CONFIG).state_dict()


def write(name, state, folder):
    make, suffix = MAKERS[name]
    path = folder / f"chroma.{suffix}"
    return path, make(state, path)


def plain(meant):
    model = ChromaTransformer(CONFIG)
    model.load_state_dict(meant)
    return model.eval().requires_grad_(False)


def run(patcher):
    """One forward pass as ComfyUI prepares it: loaded, patched, and taken out again."""
    patcher.patch_model(device_to=CPU)
    try:
        with torch.no_grad():
            return patcher.model.diffusion_model(*case())
    finally:
        patcher.unpatch_model(device_to=CPU)


@pytest.mark.parametrize("name", MAKERS)
def test_the_values_of_the_file_are_computed_with(tmp_path, state, name):
    path, meant = write(name, state, tmp_path)
    patcher = host_model.build_model(path, torch.float32)
    assert any(isinstance(m, HostLinear) for m in patcher.model.modules())
    with torch.no_grad():
        expected = plain(meant)(*case())
    difference = (run(patcher) - expected).abs().max()
    assert difference <= 1e-4 * expected.std()


def test_the_loader_takes_them_and_says_so_in_its_memory(tmp_path, state):
    sizes = {}
    for name in ("Q8_0", "Q4_0"):
        path, _ = write(name, state, tmp_path)
        patcher = host_model.load_model(path, "auto")
        sizes[name] = patcher.model_size()
        assert isinstance(patcher.model.diffusion_model.img_in, HostLinear)
    assert sizes["Q8_0"] > 1.5 * sizes["Q4_0"]


def test_a_chosen_dtype_expands_what_fits(tmp_path, state, monkeypatch, caplog):
    path, meant = write("Q8_0", state, tmp_path)
    patcher = host_model.load_model(path, "fp32")
    weight = patcher.model.diffusion_model.img_in.weight
    assert torch.equal(weight, meant["img_in.weight"])
    monkeypatch.setattr(host_model.management, "get_free_memory", lambda *_: 10)
    patcher = host_model.load_model(path, "fp32")
    assert isinstance(patcher.model.diffusion_model.img_in, HostLinear)
    assert "stays quantised" in caplog.text


def lora(rank=4):
    g = torch.Generator().manual_seed(7)
    rows, columns = 3 * CONFIG.hidden, CONFIG.hidden
    up, down = torch.randn(rows, rank, generator=g), torch.randn(rank, columns, generator=g) / 8
    key = f"diffusion_model.{QKV}"
    return {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}, up @ down


@pytest.mark.parametrize("name", ["Q8_0", "scaled_fp8", "int8_tensorwise rows"])
def test_a_lora_by_comfyui_is_exact_and_leaves_no_trace(tmp_path, state, name):
    path, meant = write(name, state, tmp_path)
    patcher = host_model.build_model(path, torch.float32)
    before = run(patcher)
    bytes_before = patcher.model.diffusion_model.double_blocks[1].img_attn.qkv.weight.clone()
    factors, delta = lora()
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, factors, 0.7, 0.0)
    merged = {**meant, f"{QKV}.weight": meant[f"{QKV}.weight"] + 0.7 * delta}
    with torch.no_grad():
        expected = plain(merged)(*case())
    with_lora = run(patched)
    assert (with_lora - expected).abs().max() <= 1e-4 * expected.std()
    assert (with_lora - before).abs().max() > 0.01
    assert torch.equal(run(patcher), before)
    weight = patcher.model.diffusion_model.double_blocks[1].img_attn.qkv.weight
    assert torch.equal(weight, bytes_before)


def test_two_loras_and_little_memory_add_up_the_same(tmp_path, state):
    path, _ = write("Q8_0", state, tmp_path)
    patcher = host_model.build_model(path, torch.float32)
    factors, _ = lora()
    once, _ = comfy.sd.load_lora_for_models(patcher, None, factors, 1.0, 0.0)
    half, _ = comfy.sd.load_lora_for_models(patcher, None, factors, 0.5, 0.0)
    twice, _ = comfy.sd.load_lora_for_models(half, None, factors, 0.5, 0.0)
    expected = run(once)
    assert (run(twice) - expected).abs().max() <= 1e-4 * expected.std()
    # The way of a GPU that cannot hold the model: layers stay behind and are patched when used.
    twice.patch_model(device_to=CPU, lowvram_model_memory=1000)
    try:
        with torch.no_grad():
            streamed = twice.model.diffusion_model(*case())
        twice.partially_unload(CPU, 1e9)
        with torch.no_grad():
            unloaded = twice.model.diffusion_model(*case())
    finally:
        twice.unpatch_model(device_to=CPU)
    assert (streamed - expected).abs().max() <= 1e-4 * expected.std()
    assert torch.equal(unloaded, streamed)


class MetaLane:
    """Counts what is copied to a device whose computations have no values."""

    def __init__(self):
        self.on_the_way, self.awaited, self.direct = [], 0, 0

    def send(self, weight):
        self.direct += 1
        return weight.to("meta")

    def reserve(self, weight):
        return Copy(weight, weight.to("meta"), None)

    def start(self, copy):
        self.on_the_way.append(copy)

    def wait(self, copy):
        self.on_the_way.remove(copy)
        self.awaited += 1
        return copy.sent

    def drain(self):
        self.on_the_way.clear()


@pytest.mark.parametrize("patch", [False, True])
def test_layers_off_the_gpu_are_copied_ahead_and_nothing_is_left(
    tmp_path, state, monkeypatch, patch
):
    lane = MetaLane()
    monkeypatch.setattr(host_quant, "cuda_lane", lambda _: lane)
    monkeypatch.setattr(host_quant.management, "NUM_STREAMS", 2)
    path, _ = write("int8_tensorwise rows", state, tmp_path)
    patcher = host_model.build_model(path, torch.float32)
    if patch:
        monkeypatch.setattr(host_quant._Patches, "__call__", lambda _, weight: weight)
        patcher.add_patches({f"diffusion_model.{QKV}.weight": (torch.ones(1),)})
    layers = [m for m in patcher.model.modules() if isinstance(m, HostLinear)]

    def forward(layers):
        for layer in layers:
            out = layer(torch.empty(3, layer.in_features, device="meta"))
            assert out.shape == (3, layer.out_features) and out.is_meta

    for end in ("unpatch_model", "partially_unload", "cleanup", "load"):
        patcher.patch_model(device_to=CPU, lowvram_model_memory=1000)
        forward(layers)
        lane.awaited = lane.direct = 0
        forward(layers)
        assert (lane.direct, lane.awaited) == (1, len(layers) - 1)
        forward(layers[:2])
        assert lane.on_the_way
        {"unpatch_model": lambda: patcher.unpatch_model(CPU), "cleanup": patcher.cleanup,
         "partially_unload": lambda: patcher.partially_unload(CPU, 0),
         "load": lambda: patcher.load(CPU)}[end]()  # fmt: skip
        assert not lane.on_the_way
    patcher.unpatch_model(CPU)


def test_comfyui_can_be_told_to_copy_nothing_ahead(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(host_quant, "cuda_lane", lambda _: "lane")
    monkeypatch.setattr(host_quant.management, "NUM_STREAMS", 2)
    assert host_quant._lane(gpu) == "lane"
    monkeypatch.setattr(host_quant.management, "NUM_STREAMS", 0)
    assert host_quant._lane(gpu) is None
    monkeypatch.setattr(host_quant.management, "NUM_STREAMS", 2)
    monkeypatch.setattr(host_quant.management, "device_supports_non_blocking", lambda _: False)
    assert host_quant._lane(gpu) is None


def test_merging_nodes_read_the_values(tmp_path, state):
    path, meant = write("scaled_fp8", state, tmp_path)
    patcher = host_model.build_model(path, torch.float32)
    key = f"diffusion_model.{QKV}.weight"
    weight, convert = patcher.get_key_patches("diffusion_model.double_blocks.")[key][0]
    assert torch.equal(convert(weight.float(), inplace=True), meant[f"{QKV}.weight"])


def test_two_scaled_models_merge_by_their_values(tmp_path, state):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, meant = write("scaled_fp8", state, tmp_path / "a")
    other = random_transformer(CONFIG, seed=5).state_dict()
    second, meant_too = write("int8_tensorwise rows", other, tmp_path / "b")
    model = host_model.build_model(first, torch.float32).clone()
    patches = host_model.build_model(second, torch.float32).get_key_patches("diffusion_model.")
    for key, value in patches.items():
        model.add_patches({key: value}, 0.5, 0.5)
    mean = {name: (value + meant_too[name]) / 2 for name, value in meant.items()}
    with torch.no_grad():
        expected = plain(mean)(*case())
    assert (run(model) - expected).abs().max() <= 1e-4 * expected.std()


def test_saving_a_quantised_model_is_refused_in_one_line(tmp_path, state):
    path, _ = write("Q8_0", state, tmp_path)
    patcher = host_model.build_model(path, torch.float32)
    with pytest.raises(CheckpointError, match="cannot be saved from ComfyUI; expected bf16"):
        patcher.patch_model(device_to=CPU, force_patch_weights=True)


def test_a_patch_reaches_a_quantised_embedding(tmp_path):
    torch.manual_seed(0)
    state = {k: torch.randn(v.shape) * 0.3 for k, v in T5Encoder(T5).state_dict().items()}
    path = tmp_path / "t5.safetensors"
    SAFETENSORS["e4m3"](state, path)
    (tmp_path / "tokenizer.json").write_bytes(host_text.small.TOKENIZER.read_bytes())
    patcher = host_text.load_clip(path, "auto").patcher
    (key,) = [k for k in patcher.model.state_dict() if k.endswith("shared.weight")]
    patcher.add_patches({key: (torch.ones(T5.vocab_size, T5.d_model),)})
    table = patcher.model.get_submodule(key.removesuffix(".weight"))
    tokens = torch.tensor([[3, 9]])
    before = table(tokens, torch.float32)
    patcher.patch_model(device_to=CPU)
    assert torch.allclose(table(tokens, torch.float32), before + 1)
    patcher.unpatch_model(device_to=CPU)
    assert torch.equal(table(tokens, torch.float32), before)


def test_lora_hooks_are_refused_in_one_line(tmp_path, state):
    path, _ = write("Q8_0", state, tmp_path)
    patcher = host_model.build_model(path, torch.float32)
    key = f"diffusion_model.{QKV}.weight"
    with pytest.raises(CheckpointError, match="which is quantised; expected bf16"):
        patcher.patch_hook_weight_to_device(key=key, combined_patches={key: []})


@pytest.mark.parametrize("name", ["Q8_0", "scaled_fp8"])
def test_a_quantised_text_encoder(tmp_path, name):
    torch.manual_seed(0)
    state = {k: torch.randn(v.shape) * 0.3 for k, v in T5Encoder(T5).state_dict().items()}
    suffix = "gguf" if name == "Q8_0" else "safetensors"
    path = tmp_path / f"t5.{suffix}"
    make = gguf_file("Q8_0", llama_name, "t5encoder") if name == "Q8_0" else SAFETENSORS[name]
    meant = make(state, path)
    (tmp_path / "tokenizer.json").write_bytes(host_text.small.TOKENIZER.read_bytes())
    clip = host_text.load_clip(path, "auto")
    tokens = clip.tokenize("a flat emoji of an apple")
    ((hidden, _),) = clip.encode_from_tokens_scheduled(tokens)
    model = T5Encoder(T5)
    model.load_state_dict(meant)
    encoder = dataclasses.replace(clip.cond_stage_model.encoder, model=model.eval())
    expected = encoder.encode(["a flat emoji of an apple"]).hidden
    assert torch.allclose(hidden, expected, atol=1e-4)


def test_gguf_files_are_in_the_menu(tmp_path, state):
    folder_paths.add_model_folder_path("diffusion_models", str(tmp_path))
    (tmp_path / "sub").mkdir()
    path, _ = write("Q8_0", state, tmp_path / "sub")
    try:
        (entry,) = [n for n in host.choices("diffusion_models") if n.endswith("chroma.gguf")]
        assert host.locate("diffusion_models", entry, path) == path
    finally:
        folder_paths.folder_names_and_paths["diffusion_models"][0].remove(str(tmp_path))
