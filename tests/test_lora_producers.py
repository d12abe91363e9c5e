"""Every producer's file resolves to the right module, rows, kind and alpha."""

import re
from pathlib import Path

import pytest
import torch
from chroma_nodes.chroma.lora.adapters import DoRA, LowRank
from chroma_nodes.chroma.lora.read import read_lora
from lora_producers import CONFIG, PRODUCERS, SPLIT, TEXT_CONFIG, numbers
from safetensors.torch import load_file, save_file


def write(state, path, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    return path


def found(lora):
    """(parameter key, rows, kind, alpha) of all adapters in a file, sorted."""
    rows = []
    for part in (lora.transformer, lora.text_encoder):
        for key, placed in part.items():
            for one in placed:
                adapter, kind = one.adapter, one.adapter.kind
                if isinstance(adapter, DoRA):
                    kind = f"dora {'rows' if adapter.per_row else 'columns'}"
                    adapter = adapter.inner
                rows.append((key, one.rows, kind, getattr(adapter, "alpha", None)))
    return sorted(rows, key=repr)


@pytest.mark.parametrize("name", PRODUCERS)
def test_producer(name, tmp_path):
    producer = PRODUCERS[name]
    path = write(producer.state, tmp_path / "x.safetensors", producer.metadata or None)
    lora = read_lora(path, CONFIG, TEXT_CONFIG)
    assert found(lora) == sorted(producer.expected, key=repr)
    assert not lora.unknown and not lora.skipped
    assert all(key.startswith("encoder.") for key in lora.text_encoder)
    assert not any(key.startswith("encoder.") for key in lora.transformer)


def test_the_documentation_lists_every_producer():
    text = (Path(__file__).parent.parent / "docs" / "lora.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    listed = {name for row in rows for name in re.findall("`([^`]*)`", row.split("|")[2])}
    assert listed == set(PRODUCERS)


@pytest.mark.parametrize("name", ["diffusers", "OneTrainer legacy DoRA"])
def test_tensors_are_the_files_own(name, tmp_path):
    """Each row slice holds the factors that the file names so, in the file's dtype."""
    path = write(PRODUCERS[name].state, tmp_path / "x.safetensors")
    state, lora = load_file(path), read_lora(path, CONFIG, TEXT_CONFIG)
    for theirs, (_, ours, rows) in SPLIT.items():
        (adapter,) = (p.adapter for p in lora.transformer[f"{ours}.weight"] if p.rows == rows)
        pair = adapter.inner if isinstance(adapter, DoRA) else adapter
        assert isinstance(pair, LowRank)
        kohya = f"lora_transformer_{theirs.replace('.', '_')}"
        for tensor, ends in (
            (pair.down, ("lora_A", "lora_down")),
            (pair.up, ("lora_B", "lora_up")),
        ):
            names = (f"transformer.{theirs}.{ends[0]}.weight", f"{kohya}.{ends[1]}.weight")
            (wanted,) = (state[key] for key in names if key in state)
            assert torch.equal(tensor, wanted) and tensor.dtype == wanted.dtype
        if name == "OneTrainer legacy DoRA":
            assert isinstance(adapter, DoRA)
            assert torch.equal(adapter.magnitude, state[f"{kohya}.dora_scale"])


def test_changes_of_norms_and_whole_weights(tmp_path):
    """A norm's own parameter is called `scale`, whatever the file calls it."""
    module = "double_blocks.0.img_attn.norm.query_norm"
    single = "single_transformer_blocks.1.attn.norm_k"
    state = {
        f"diffusion_model.{module}.scale.diff": numbers(16),
        "diffusion_model.double_blocks.0.txt_attn.norm.key_norm.diff": numbers(16),
        f"lora_transformer_{single.replace('.', '_')}.w_norm": numbers(16),
        "diffusion_model.single_blocks.0.linear2.set_weight": numbers(32, 96),
        "diffusion_model.txt_in.b_norm": numbers(32),
        "diffusion_model.img_in.bias.diff": numbers(32),
    }
    lora = read_lora(write(state, tmp_path / "x.safetensors"), CONFIG)
    assert found(lora) == [
        ("double_blocks.0.img_attn.norm.query_norm.scale", None, "diff", None),
        ("double_blocks.0.txt_attn.norm.key_norm.scale", None, "diff", None),
        ("img_in.bias", None, "diff", None),
        ("single_blocks.0.linear2.weight", None, "set", None),
        ("single_blocks.1.norm.key_norm.scale", None, "diff", None),
        ("txt_in.bias", None, "diff", None),
    ]


def test_ia3_and_glora(tmp_path):
    qkv, one = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear2"
    state = {
        f"{qkv}.weight": numbers(96), f"{qkv}.on_input": torch.tensor(False),
        f"{one}.a1.weight": numbers(96, 4), f"{one}.a2.weight": numbers(4, 96),
        f"{one}.b1.weight": numbers(32, 4), f"{one}.b2.weight": numbers(4, 96),
        f"{one}.alpha": torch.tensor(4),
    }  # fmt: skip
    lora = read_lora(write(state, tmp_path / "x.safetensors"), CONFIG)
    assert found(lora) == [
        ("double_blocks.0.img_attn.qkv.weight", None, "ia3", None),
        ("single_blocks.0.linear2.weight", None, "glora", 4.0),
    ]
    assert not lora.transformer["double_blocks.0.img_attn.qkv.weight"][0].adapter.on_input


@pytest.mark.parametrize(
    ("axes", "kind"), [((12, 8, 8), "oft"), ((2, 12, 8, 8), "boft")], ids=["oft", "boft"]
)
def test_oft(axes, kind, tmp_path):
    """LyCORIS' OFT has three axes, its BOFT four; alpha is the limit of the rotation."""
    module = "lycoris_double_blocks_1_img_attn_qkv"
    state = {
        f"{module}.oft_blocks": numbers(*axes), f"{module}.rescale": numbers(96, 1),
        f"{module}.alpha": torch.tensor(0.5),
    }  # fmt: skip
    lora = read_lora(write(state, tmp_path / "x.safetensors"), CONFIG)
    assert found(lora) == [("double_blocks.1.img_attn.qkv.weight", None, kind, None)]
    adapter = lora.transformer["double_blocks.1.img_attn.qkv.weight"][0].adapter
    assert adapter.constraint == 0.5 and adapter.rescale is not None


def test_bias_of_peft_is_scaled_like_the_weight(tmp_path):
    """`lora_bias`: the bias of lora_B is multiplied by alpha / r, as its weight is."""
    module = "transformer.transformer_blocks.0.attn.to_k"
    state = {
        f"{module}.lora_A.weight": numbers(4, 32), f"{module}.lora_B.weight": numbers(32, 4),
        f"{module}.lora_B.bias": numbers(32), f"{module}.alpha": torch.tensor(8.0),
    }  # fmt: skip
    lora = read_lora(write(state, tmp_path / "x.safetensors"), CONFIG)
    (placed,) = lora.transformer["double_blocks.0.img_attn.qkv.bias"]
    assert placed.rows == (32, 64)
    assert torch.equal(placed.adapter.diff, 2 * numbers(32))


def test_other_spellings_of_the_factors(tmp_path):
    """PEFT with the adapter's name, and diffusers before PEFT, in front of any prefix."""
    spellings = {
        "base_model.model.transformer_blocks.0.attn.to_q": (
            ".lora_A.default.weight", ".lora_B.default.weight"),
        "unet.transformer_blocks.0.attn.processor.to_k": (
            "_lora.down.weight", "_lora.up.weight"),
        "transformer.transformer_blocks.0.attn.to_v": (
            ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        "model.diffusion_model.double_blocks.0.img_attn.proj": (".lora.down.weight",
                                                                ".lora.up.weight"),
        "lora_unet_transformer_blocks_0_attn_to_add_out": (".lora_down", ".lora_up"),
    }  # fmt: skip
    state = {}
    for module, (down, up) in spellings.items():
        state |= {module + down: numbers(4, 32), module + up: numbers(32, 4)}
    lora = read_lora(write(state, tmp_path / "x.safetensors"), CONFIG)
    assert not lora.unknown
    assert [(key, rows) for key, rows, _, _ in found(lora)] == [
        ("double_blocks.0.img_attn.proj.weight", None),
        ("double_blocks.0.img_attn.qkv.weight", (0, 32)),
        ("double_blocks.0.img_attn.qkv.weight", (32, 64)),
        ("double_blocks.0.img_attn.qkv.weight", (64, 96)),
        ("double_blocks.0.txt_attn.proj.weight", None),
    ]
