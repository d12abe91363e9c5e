"""Every storage format means what its own library says, through the loaders that users use."""

import dataclasses

import pytest
import torch
from chroma_nodes.chroma.checkpoint import load_text_encoder, load_transformer
from chroma_nodes.chroma.errors import CheckpointError
from chroma_nodes.chroma.quant.layers import QuantLinear
from chroma_nodes.chroma.text.t5 import T5Config, T5Encoder
from chroma_nodes.chroma.transformer import ChromaTransformer
from oracles import SMALL, random_transformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored_files import (
    GGUF_KINDS,
    SAFETENSORS,
    comfy_quant,
    gguf_file,
    llama_name,
    scaled_fp8,
)

CONFIG = dataclasses.replace(SMALL, context_dim=64)
T5 = T5Config(vocab_size=40, d_model=64, heads=2, d_kv=32, d_ff=96, layers=2)
GGUF = {kind: gguf_file(kind) for kind in GGUF_KINDS}
ALL = {**{k: (v, "safetensors") for k, v in SAFETENSORS.items()},
       **{k: (v, "gguf") for k, v in GGUF.items()}}  # fmt: skip


@pytest.fixture(scope="module")
def state():
    return random_transformer(CONFIG).state_dict()


def t5_state(seed=0):
    torch.manual_seed(seed)
    return {k: torch.randn(v.shape) * 0.3 for k, v in T5Encoder(T5).state_dict().items()}


def case():
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(2, 16, 6, 4, generator=generator)
    return latent, torch.tensor([0.7, 0.7]), torch.randn(2, 5, 64, generator=generator)


def with_weights(meant, dtype):
    """Our transformer with plain weights: the oracle's values, rounded once."""
    model = ChromaTransformer(CONFIG, dtype=dtype)
    model.load_state_dict({name: value.to(dtype) for name, value in meant.items()})
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_the_reference_ones_to_the_last_bit(tmp_path, state, name, dtype):
    make, suffix = ALL[name]
    path = tmp_path / f"chroma.{suffix}"
    meant = make(state, path)
    expanded = load_transformer(path, dtype=dtype, expand=True).state_dict()
    assert expanded.keys() == state.keys()
    for key, value in meant.items():
        assert torch.equal(expanded[key], value.to(dtype)), key


@pytest.mark.parametrize("name", ALL)
def test_stored_layers_compute_what_plain_ones_would(tmp_path, state, name):
    make, suffix = ALL[name]
    path = tmp_path / f"chroma.{suffix}"
    meant = make(state, path)
    model = load_transformer(path, dtype=torch.float32)
    quantised = [m for m in model.modules() if isinstance(m, QuantLinear)]
    plain = name in ("F32", "F16", "BF16")
    assert bool(quantised) is not plain
    with torch.no_grad():
        ours, theirs = model(*case()), with_weights(meant, torch.float32)(*case())
    assert torch.equal(ours, theirs)


def test_layers_left_in_bf16_are_not_cast_to_fp8(tmp_path, state):
    path = tmp_path / "keep.safetensors"
    SAFETENSORS["scaled_fp8 keep_distillation"](state, path)
    model = load_transformer(path)
    kept = model.distilled_guidance_layer.layers[0].in_layer
    assert isinstance(kept, torch.nn.Linear) and kept.weight.dtype == torch.bfloat16
    original = state["distilled_guidance_layer.layers.0.in_layer.weight"].bfloat16()
    assert torch.equal(kept.weight, original)


def test_stored_bytes_are_kept_in_memory(tmp_path, state):
    sizes = {}
    for name in ("F32", "Q8_0", "Q4_0"):
        GGUF[name](state, tmp_path / "x.gguf")
        model = load_transformer(tmp_path / "x.gguf", dtype=torch.float32)
        sizes[name] = sum(p.nbytes for n, p in model.named_parameters() if p.ndim == 2)
    assert sizes["Q8_0"] / sizes["F32"] == pytest.approx(34 / 128, rel=0.02)
    assert sizes["Q4_0"] / sizes["F32"] == pytest.approx(18 / 128, rel=0.02)


def test_the_markers_two_meanings(tmp_path, state):
    for elements, expected in ((0, False), (2, True)):
        path = tmp_path / "x.safetensors"
        scaled_fp8(elements)(state, path)
        layer = load_transformer(path).double_blocks[0].img_attn.qkv
        assert layer.stored.full_precision is expected


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_text_encoders(tmp_path, suffix):
    path, state = tmp_path / f"t5.{suffix}", t5_state()
    if suffix == "gguf":
        meant = gguf_file("Q8_0", llama_name, "t5encoder")(state, path)
    else:
        meant = scaled_fp8(0)(state, path)
    model = load_text_encoder(path, dtype=torch.float32)
    assert model.config == T5
    plain = T5Encoder(T5)
    plain.load_state_dict(meant)
    tokens = torch.tensor([[3, 7, 1, 0], [9, 1, 0, 0]])
    lengths = torch.tensor([3, 2])
    with torch.no_grad():
        assert torch.equal(model(tokens, lengths), plain(tokens, lengths))


def test_a_model_in_parts(tmp_path, state):
    names = sorted(state)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    for number, half in enumerate(halves, 1):
        path = tmp_path / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in half}, path)
    loaded = load_transformer(path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    path.unlink()
    first = tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors"
    with pytest.raises(CheckpointError, match="of which 1 are missing"):
        load_transformer(first)


def test_a_folder_with_an_index(tmp_path, state):
    save_file(dict(list(state.items())[:9]), tmp_path / "a.safetensors")
    save_file(dict(list(state.items())[9:]), tmp_path / "b.safetensors")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    loaded = load_transformer(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    index.write_text('{"weight_map": ["a"]}')
    with pytest.raises(CheckpointError, match="does not list the parts"):
        load_transformer(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match="holds no model"):
        load_transformer(tmp_path)


def test_leftovers_of_flux_are_dropped(tmp_path, state):
    path = tmp_path / "early.safetensors"
    extra = {
        "time_in.in_layer.weight": torch.ones(3, 3), "vector_in.in_layer.bias": torch.ones(3),
        "double_blocks.0.img_mod.lin.weight": torch.ones(3, 3),
        "single_blocks.0.modulation.lin.weight": torch.ones(3, 3),
        "final_layer.adaLN_modulation.1.bias": torch.ones(3),
    }  # fmt: skip
    save_file(state | extra, path)
    assert load_transformer(path).state_dict().keys() == state.keys()


def damaged(path, name, change, metadata=None):
    with safe_open(path, "pt") as file:
        metadata = metadata or file.metadata()
    state = load_file(path)
    state[name] = change(state[name])
    save_file(state, path, metadata)
    with pytest.raises(CheckpointError) as error:
        load_transformer(path)
    message = str(error.value)
    assert path.name in message and "\n" not in message
    return message


QKV = "double_blocks.0.img_attn.qkv"


@pytest.mark.parametrize(
    ("maker", "name", "change", "says"),
    [
        (scaled_fp8(0), f"{QKV}.weight",
         lambda t: torch.full(t.shape, 0x7F, dtype=torch.uint8).view(t.dtype), "holds NaN"),
        (scaled_fp8(0), f"{QKV}.scale_weight", lambda t: t * float("nan"), "is not finite"),
        (scaled_fp8(0), f"{QKV}.scale_weight", lambda t: torch.ones(7), "expected one number or"),
        (comfy_quant("tensor"), f"{QKV}.comfy_quant", lambda t: t[:5], "not a JSON object"),
        (comfy_quant("tensor"), f"{QKV}.comfy_quant", lambda t: t.float(), "is no text"),
        (comfy_quant("tensor"), f"{QKV}.comfy_quant",
         lambda t: torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8), "is in 'mxfp8'"),
        (comfy_quant("tensor"), f"{QKV}.comfy_quant",
         lambda t: torch.tensor(list(b'{"format": "int8_tensorwise", "convrot": true}'),
                                dtype=torch.uint8), "stored rotated"),
        (comfy_quant("tensor"), f"{QKV}.comfy_quant",
         lambda t: torch.tensor(list(b'{"format": "int8_tensorwise", "params": {"convrot": true}}'),
                                dtype=torch.uint8), "stored rotated"),
        (comfy_quant("tensor"), f"{QKV}.weight_scale", lambda t: t.byte(), "torch.uint8, expected"),
        (comfy_quant("tensor"), f"{QKV}.weight", lambda t: t[:9], "has shape"),
        (scaled_fp8(0), f"{QKV}.bias",
         lambda t: torch.full(t.shape, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn),
         "holds NaN"),
    ],
)  # fmt: skip
def test_damaged_quantised_files_are_one_line(tmp_path, state, maker, name, change, says):
    path = tmp_path / "x.safetensors"
    maker(state, path)
    assert says in damaged(path, name, change)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": []}', '{"layers": {"a": "b"}}'])
def test_damaged_metadata_is_one_line(tmp_path, state, text):
    path = tmp_path / "x.safetensors"
    comfy_quant("metadata")(state, path)
    metadata = {"_quantization_metadata": text}
    assert "_quantization_metadata" in damaged(path, f"{QKV}.weight", lambda t: t, metadata)


def test_a_scale_without_its_weight_is_named(tmp_path, state):
    path = tmp_path / "x.safetensors"
    scaled_fp8(0)(state, path)
    file = load_file(path)
    del file[f"{QKV}.weight"]
    save_file(file, path)
    with pytest.raises(CheckpointError, match=f"{QKV} has a scale but no weight"):
        load_transformer(path)


def test_integers_without_a_scale_are_refused(tmp_path, state):
    path = tmp_path / "x.safetensors"
    save_file(state | {f"{QKV}.weight": state[f"{QKV}.weight"].to(torch.int8)}, path)
    with pytest.raises(CheckpointError, match="is int8 without a scale"):
        load_transformer(path)


def test_gradients_reach_the_input_through_stored_layers(tmp_path, state):
    path = tmp_path / "x.gguf"
    meant = GGUF["Q8_0"](state, path)
    latent, sigma, context = case()
    grads = []
    for model in (
        load_transformer(path, dtype=torch.float32),
        with_weights(meant, torch.float32),
    ):
        x = latent.clone().requires_grad_(True)
        model(x, sigma, context).square().sum().backward()
        grads.append(x.grad)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-5)
