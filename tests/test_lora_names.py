"""Names in every spelling mean what diffusers and transformers themselves say they mean."""

import dataclasses
from collections import defaultdict

import pytest
import torch
from chroma_nodes.chroma.config import ChromaConfig
from chroma_nodes.chroma.lora.names import CLIP, T5_XXL, name_table, resolve, why_foreign
from chroma_nodes.chroma.lora.spelling import bodies, prefix_of, split_suffix
from chroma_nodes.chroma.transformer import ChromaTransformer
from diffusers import FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_producers import CONFIG, TEXT_CONFIG
from transformers import T5Config as HFConfig
from transformers import T5EncoderModel

# Diffusers' converter has Chroma1's widths written into it.
WIDE = dataclasses.replace(CONFIG, hidden=3072, heads=24, mlp_hidden=12288)
TABLE = name_table(CONFIG, TEXT_CONFIG)
DOTTED = ("", "diffusion_model.", "model.diffusion_model.", "transformer.", "unet.",
          "base_model.model.", "base_model.model.transformer.")  # fmt: skip
UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
T5_DOTTED = ("", "text_encoder.", "text_encoder_2.", "text_encoders.t5xxl.transformer.",
             "t5xxl.transformer.")  # fmt: skip
T5_UNDERSCORED = ("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lycoris_te_")
PAIRS = (
    (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight"),
    (".lora_A", ".lora_B"), (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"), ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora.lora_A", ".lora.lora_B"), (".lora_down", ".lora_up"),
)  # fmt: skip


def diffusers_rows():
    """{diffusers' parameter: (original parameter, first row, end)}, by diffusers' own converter.

    Every row of every parameter carries its number.
    """
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in ChromaTransformer(WIDE).state_dict().items()}
    state, numbers = {}, {}
    for number, (key, shape) in enumerate(shapes.items()):
        numbers[number] = key
        state[key] = number * 100_000.0 + torch.arange(shape[0], dtype=torch.float64)
    converted = single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers(state)
    out = {}
    for name, rows in converted.items():
        number, first = divmod(int(rows[0]), 100_000)
        assert torch.equal(rows, rows[0] + torch.arange(len(rows)))
        key = numbers[number]
        out[name] = (key, first, first + len(rows), len(rows) == shapes[key][0])
    return out


def test_diffusers_names():
    """All parameters, under each prefix, with dots and with underscores."""
    table, names = name_table(WIDE), diffusers_rows()
    assert len(names) > 100
    for name, (key, first, end, whole) in names.items():
        module, _, parameter = name.rpartition(".")
        for spelled in (module, f"transformer.{module}", f"diffusion_model.{module}",
                        f"lora_transformer_{module.replace('.', '_')}"):  # fmt: skip
            target = resolve(spelled, table)
            assert target is not None, spelled
            assert target.rows == (None if whole else (first, end)), spelled
            if parameter == "bias":
                target = dataclasses.replace(target, parameter="bias")
            assert target.key == key, spelled


def test_own_names():
    """All parameters of the model, by the module and by the parameter."""
    for key in ChromaTransformer(CONFIG).state_dict():
        module, _, parameter = key.rpartition(".")
        for spelled in (key, f"diffusion_model.{key}", f"lora_unet_{key.replace('.', '_')}"):
            target = resolve(spelled, TABLE)
            assert target is not None and target.key == key and target.rows is None
        if parameter != "bias":
            target = resolve(f"lora_unet_{module.replace('.', '_')}", TABLE)
            assert target is not None and target.key == key


def test_text_encoder_names():
    """All matrices and norms of transformers' T5, and their shapes."""
    config = HFConfig(
        vocab_size=TEXT_CONFIG.vocab_size, d_model=TEXT_CONFIG.d_model, d_kv=TEXT_CONFIG.d_kv,
        num_heads=TEXT_CONFIG.heads, d_ff=TEXT_CONFIG.d_ff, num_layers=TEXT_CONFIG.layers,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    state = T5EncoderModel(config).state_dict()
    assert len(state) == 22
    for key, tensor in state.items():
        module = key.removesuffix(".weight")
        spelled = [p + module for p in T5_DOTTED]
        spelled += [p + module.replace(".", "_") for p in T5_UNDERSCORED]
        for name in spelled:
            target = resolve(name, TABLE)
            assert target is not None and target.text_encoder
            assert target.key == key.replace("encoder.embed_tokens", "shared")
            assert TABLE.shape(target) == tuple(tensor.shape)


def test_chroma1_reads_t5_xxl():
    """The real model's table has all its modules, and T5-XXL's 24 x 7 matrices."""
    table = name_table(ChromaConfig())
    modules = {t.module for t in table.targets.values() if t.text_encoder}
    assert sum("SelfAttention" in m or "DenseReluDense" in m for m in modules) == 24 * 7 + 1
    target = resolve("lora_te3_encoder_block_23_layer_1_DenseReluDense_wo", table)
    assert target is not None and table.shape(target) == (4096, T5_XXL.d_ff)
    target = resolve("lora_unet_single_blocks_37_linear1", table)
    assert target is not None and table.shape(target) == (21504, 3072)


def test_a_table_is_made_once_and_cannot_be_written_to():
    table = name_table(CONFIG, TEXT_CONFIG)
    assert table is name_table(CONFIG, TEXT_CONFIG)
    for names in (table.targets, table.foreign, table.shapes):
        with pytest.raises(TypeError):
            names["img_in"] = None


def test_row_slices_have_their_own_shapes():
    for name, shape in (("to_k", (32, 32)), ("to_qkv", (96, 32))):
        target = resolve(f"transformer.single_transformer_blocks.0.attn.{name}", TABLE)
        assert target is not None and TABLE.shape(target) == shape


def test_underscored_names_are_unambiguous():
    """No two different modules become one name when their dots are lost."""
    for table in (TABLE, name_table(ChromaConfig())):
        meanings = defaultdict(set)
        for name, target in table.targets.items():
            meanings[name.replace(".", "_")].add(target)
        for name, reason in table.foreign.items():
            meanings[name.replace(".", "_")].add(reason)
        assert max(map(len, meanings.values())) == 1


@pytest.mark.parametrize(
    "name",
    [
        "double_blocks.2.img_attn.qkv", "double_blocks.0.img_attn.qkvx", "single_blocks.3.linear1",
        "transformer_blocks.0.attn.to_x", "lora_unet_double_blocks_0_img_attn", "",
        "diffusion_model.", "lora_unet_", "encoder.block.2.layer.0.SelfAttention.q",
        "xdouble_blocks.0.img_attn.qkv",
    ],
)  # fmt: skip
def test_nothing_is_guessed(name):
    assert resolve(name, TABLE) is None


def test_flux_only_names():
    """What a Flux transformer has more than Chroma, by diffusers' own names."""
    flux = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=8,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    foreign, own = defaultdict(int), 0
    for name, module in flux.named_modules():
        if isinstance(module, torch.nn.Linear):
            for spelled in (f"transformer.{name}", f"lora_transformer_{name.replace('.', '_')}"):
                reason = why_foreign(spelled, TABLE)
                assert (reason is None) == (resolve(spelled, TABLE) is not None), spelled
            own += reason is None
            foreign[reason] += 1
    assert own == 2 * 12 + 3 * 5 + 3
    assert foreign.pop(None) == own
    # Two per double block, one per single block, and the last; two layers of each embedding.
    assert foreign == {"Flux modulation": 8, "time_in": 2, "vector_in": 2, "guidance_in": 2}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lora_unet_double_blocks_1_img_mod_lin", "Flux modulation"),
        ("diffusion_model.single_blocks.2.modulation.lin", "Flux modulation"),
        ("lora_unet_final_layer_adaLN_modulation_1", "Flux modulation"),
        ("lora_unet_time_in_in_layer", "time_in"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", CLIP),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", CLIP),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc2", CLIP),
        ("bundle_emb.word.t5", "embeddings of new words"),
    ],
)
def test_why_foreign(name, reason):
    assert resolve(name, TABLE) is None
    assert why_foreign(name, TABLE) == reason


@st.composite
def spelled_names(draw):
    """(a tensor's name in some spelling, its target, what it is)."""
    dotted = sorted(name for name in TABLE.targets if "." in name or name in ("img_in", "txt_in"))
    name = draw(st.sampled_from(dotted))
    target = TABLE.targets[name]
    if draw(st.booleans()):
        prefix = draw(st.sampled_from(T5_DOTTED if target.text_encoder else DOTTED))
    else:
        prefix = draw(st.sampled_from(T5_UNDERSCORED if target.text_encoder else UNDERSCORED))
        name = name.replace(".", "_")
    ends, number = draw(st.sampled_from(PAIRS)), draw(st.sampled_from((0, 1)))
    return prefix + name + ends[number], prefix, target, ("down", "up")[number]


@settings(deadline=None)
@given(spelled_names())
def test_any_prefix_name_and_spelling(spelled):
    """Round trip: the parts that a name is put together from are found in it again."""
    name, prefix, target, part = spelled
    split = split_suffix(name)
    assert split is not None
    assert split[1] == part
    assert resolve(split[0], TABLE) == target
    assert prefix_of(split[0]) == prefix


@settings(deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_split_without_error(text):
    """A suffix is only ever taken off; prefixes come off the front, one by one."""
    split = split_suffix(text)
    if split is not None:
        assert text.startswith(split[0]) and len(split[0]) < len(text)
    assert all(text.endswith(body) for body in bodies(text))
