"""Whatever stands in a file of adapters, it is read or refused in one line."""

from random import Random

import pytest
import torch
from chroma_nodes.chroma.errors import LoraError
from chroma_nodes.chroma.lora.read import read_lora
from chroma_nodes.chroma.lora.report import report
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_producers import CONFIG, PRODUCERS, TEXT_CONFIG
from safetensors.torch import save_file
from test_fuzz_headers import SAFETENSORS, change_the_structure

COUNT = 600
MODULES = (
    "diffusion_model.double_blocks.0.img_attn.qkv", "transformer.transformer_blocks.0.attn.to_k",
    "lora_unet_single_blocks_1_linear1", "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    "diffusion_model.double_blocks.0.img_attn.norm.key_norm", "lora_unet_img_in",
)  # fmt: skip
# Families of tensors that belong together, so that whole adapters are met, not halves only.
FAMILIES = (
    ("lora_down.weight", "lora_up.weight", "lora_mid.weight"),
    ("lora_A.weight", "lora_B.weight", "lora_B.bias"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("lokr_w1", "lokr_w2"),
    ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
    ("a1.weight", "a2.weight", "b1.weight", "b2.weight"), ("oft_blocks", "rescale"),
    ("oft_R.weight", "oft_R.scaled_oft"), ("weight", "on_input"), ("diff", "diff_b"),
    ("set_weight",), ("w_norm", "b_norm"),
)  # fmt: skip
MORE = ("alpha", "dora_scale", "magnitude", "hada_t1")
SIZES = (0, 1, 2, 3, 4, 8, 16, 32, 96, 160)
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool,
          torch.int64, torch.float64)  # fmt: skip


def attempt(path):
    """The message of the refusal, or None."""
    try:
        lora = read_lora(path, CONFIG, TEXT_CONFIG)
    except LoraError as error:
        message = str(error)
        assert message.startswith(path.name) and "\n" not in message and len(message) < 3000
        return message
    assert "\n" not in report(lora).line()
    for part in (lora.transformer, lora.text_encoder):
        for placed in part.values():
            for one in placed:
                assert all(bool(t.float().isfinite().all()) for t in one.adapter.tensors())
    return None


@pytest.mark.parametrize("name", ["OneTrainer legacy DoRA", "diffusers"])
def test_damaged_headers(name, tmp_path):
    producer, path = PRODUCERS[name], tmp_path / "x.safetensors"
    few = dict(list(producer.state.items())[:8])
    save_file(few, path, producer.metadata or None)
    valid, random, refused = path.read_bytes(), Random(20), 0
    assert attempt(path) is None
    # Faults in the data are rare with bits flipped anywhere; here they are in the header.
    length = int.from_bytes(valid[:8], "little")
    for _ in range(COUNT):
        data = bytearray(valid[: 8 + length])
        chosen = random.sample(SAFETENSORS, random.choice([1, 1, 2]))
        for mutation in sorted(chosen, key=lambda m: m is not change_the_structure):
            if len(data) >= 32:
                mutation(data, random)
        path.write_bytes(data + valid[8 + length :])
        refused += attempt(path) is not None
    assert COUNT / 2 < refused < COUNT


# Half of a surrogate pair cannot be written to a file.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


@st.composite
def tensors(draw):
    seed = draw(st.integers(0, 99))
    axes = draw(st.sampled_from((0, 1, 2, 2, 2, 3, 4)))
    shape = draw(st.lists(st.sampled_from(SIZES), min_size=axes, max_size=axes))
    if torch.Size(shape).numel() > 100_000:
        shape = shape[:2]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(draw(st.sampled_from(DTYPES)))


@st.composite
def states(draw):
    """Some tensors of some adapters, of any shape and dtype."""
    state = {}
    for module in draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=2, unique=True)):
        family = draw(st.sampled_from(FAMILIES))
        left_out = draw(st.sampled_from((None, None, *family)))
        names = [name for name in family if name != left_out]
        names += draw(st.lists(st.sampled_from(MORE), max_size=2, unique=True))
        state |= {f"{module}.{name}": draw(tensors()) for name in names}
    return state


@settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
@given(state=states())
def test_any_tensors(state, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    attempt(path)


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(TEXT, max_size=5, unique=True),
    text=TEXT | st.sampled_from(['{"transformer.r": {}}', "[]", '{".": 1}']),
)
def test_any_names_and_metadata(names, text, tmp_path):
    path = tmp_path / "x.safetensors"
    good = dict(list(PRODUCERS["diffusion-pipe"].state.items())[:2])
    save_file(good | {n: torch.ones(1) for n in names}, path, {"lora_adapter_metadata": text})
    attempt(path)
