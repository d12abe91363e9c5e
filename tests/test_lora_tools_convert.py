"""`lora convert`: the same change in every spelling, also in the eyes of diffusers and PEFT."""

import hashlib
import json
import struct

import pytest
import torch
from chroma_nodes.chroma.config import ChromaConfig
from chroma_nodes.chroma.errors import LoraError
from chroma_nodes.chroma.lora.adapters import changed
from chroma_nodes.chroma.lora.names import name_table
from chroma_nodes.chroma.lora.read import read_lora
from chroma_nodes.chroma.lora.tools.convert import convert_lora
from chroma_nodes.chroma.lora.tools.spell import STYLES
from lora_producers import CONFIG, FUSED, PRODUCERS, SPLIT, TEXT_CONFIG, numbers
from oracles import SMALL, diffusers_state, diffusers_transformer, random_transformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHAPES = name_table(CONFIG, TEXT_CONFIG).shapes
PREFIXES = {
    "kohya": ("lora_unet_", "lora_te3_", "lycoris_"),
    "diffusers": ("transformer.", "text_encoder."),
    "comfyui": ("diffusion_model.", "text_encoders.t5xxl.transformer.", "transformer."),
}


def save(path, state, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    return path


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def weights(path, strength=0.7):
    """{parameter: its new value} of a model whose weights depend on their shapes alone."""
    lora, out = read_lora(path, CONFIG, TEXT_CONFIG), {}
    for part in (lora.transformer, lora.text_encoder):
        for key, placed in part.items():
            placements = [(one.adapter, strength, one.rows) for one in placed]
            out[key] = changed(numbers(*SHAPES[key]), placements)
    return out


def assert_same(found, wanted, error=2e-7):
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert (found[key] - tensor).norm() <= error * tensor.norm(), key


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", PRODUCERS)
def test_every_producers_file_means_the_same_in_every_spelling_and_back(name, style, tmp_path):
    producer = PRODUCERS[name]
    source = save(tmp_path / "a.safetensors", producer.state, producer.metadata or None)
    there, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    convert_lora(source, style, there, CONFIG)
    assert all(key.startswith(PREFIXES[style]) for key in load_file(there))
    assert_same(weights(there), weights(source))
    convert_lora(there, "comfyui" if style == "diffusers" else "diffusers", back, CONFIG)
    assert_same(weights(back), weights(source))


def test_kohyas_names_are_diffusers_after_diffusers_own_conversion(tmp_path):
    """Fused matrices of Chroma1's size, one of them block by block (sparse), as diffusers splits
    them; every module's product of factors is theirs."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    g = torch.Generator().manual_seed(0)
    shapes = {
        "double_blocks_3_img_attn_qkv": (9216, 3072), "double_blocks_3_txt_attn_proj": (3072, 3072),
        "double_blocks_3_txt_mlp_2": (3072, 12288), "single_blocks_7_linear1": (21504, 3072),
        "single_blocks_7_linear2": (3072, 15360), "double_blocks_4_txt_attn_qkv": (9216, 3072),
    }  # fmt: skip
    state = {}
    for name, (n, k) in shapes.items():
        rank = 3
        state[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, k, generator=g)
        state[f"lora_unet_{name}.lora_up.weight"] = torch.randn(n, rank, generator=g)
        state[f"lora_unet_{name}.alpha"] = torch.tensor(1.5)
    sparse = state["lora_unet_double_blocks_4_txt_attn_qkv.lora_up.weight"]
    for i in range(3):
        sparse[i * 3072 : (i + 1) * 3072, [j for j in range(3) if j != i]] = 0
    source, out = save(tmp_path / "a.safetensors", state), tmp_path / "b.safetensors"
    convert_lora(source, "diffusers", out)
    ours = load_file(out)
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(state))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if not name.endswith("lora_A.weight"):
            continue
        up = name.replace("lora_A", "lora_B")
        assert ours[name].shape == theirs[name].shape
        probe = torch.randn(ours[name].shape[1], 2, generator=g)
        wanted = theirs[up] @ (theirs[name] @ probe)
        assert (ours[up] @ (ours[name] @ probe) - wanted).norm() <= 1e-6 * wanted.norm()


def for_small_model(split, dora):
    """A LoRA of each layer of a block, of its own rank and alpha, as sd-scripts or OneTrainer
    write it."""
    model, state = random_transformer().state_dict(), {}
    for key, tensor in (diffusers_state(model, SMALL.hidden) if split else model).items():
        shape = tensor.shape
        block = "transformer_blocks.1." if split else "blocks.1."
        if block not in key or not key.endswith(".weight") or len(shape) != 2:
            continue
        module = ("lora_transformer_" if split else "lora_unet_") + key[:-7].replace(".", "_")
        rank = 2 + len(state) % 3
        state |= {
            f"{module}.lora_down.weight": numbers(rank, shape[1]),
            f"{module}.lora_up.weight": numbers(shape[0], rank),
            f"{module}.alpha": torch.tensor(float(len(state) % 4 + 1)),
        }  # fmt: skip
        if dora:
            state[f"{module}.dora_scale"] = numbers(shape[0], 1).abs() + 1
    return state


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_peft_applies_a_converted_file_as_it_was_meant(split, dora, tmp_path):
    """diffusers' transformer loads the file by its metadata, with ranks that differ by module."""
    source = save(tmp_path / "a.safetensors", for_small_model(split, dora))
    out = tmp_path / "b.safetensors"
    convert_lora(source, "diffusers", out, SMALL)
    model = random_transformer()
    other = diffusers_transformer(model)
    settings = json.loads(header(out)["lora_adapter_metadata"])
    other.load_lora_adapter(load_file(out), prefix="transformer", metadata=settings)
    other.fuse_lora()
    fused = {key.replace(".base_layer", ""): t for key, t in other.state_dict().items()}
    state, touched = dict(model.state_dict()), 0
    for key, placed in read_lora(source, SMALL).transformer.items():
        state[key] = changed(state[key], [(p.adapter, 1.0, p.rows) for p in placed])
        touched += 1
    assert touched == 10
    for key, wanted in diffusers_state(state, SMALL.hidden).items():
        assert torch.allclose(fused[key], wanted, rtol=1e-5, atol=1e-5), key


def test_factors_stay_bit_for_bit_where_scales_agree(tmp_path):
    """q, k and v are put together from the very numbers of the file, alpha growing with the rank;
    what was one down in the fused file is one again on the way back."""
    source = save(tmp_path / "a.safetensors", PRODUCERS["OneTrainer legacy"].state)
    convert_lora(source, "kohya", tmp_path / "b.safetensors", CONFIG)
    old, new = load_file(source), load_file(tmp_path / "b.safetensors")
    module = "lora_unet_double_blocks_1_img_attn_qkv"
    downs = [old[f"lora_transformer_transformer_blocks_1_attn_to_{x}.lora_down.weight"]
             for x in "qkv"]  # fmt: skip
    if torch.equal(downs[0], downs[1]):
        downs = downs[:1]
    assert torch.equal(new[f"{module}.lora_down.weight"], torch.cat(downs))
    rank = len(new[f"{module}.lora_down.weight"])
    assert float(new[f"{module}.alpha"]) == pytest.approx(rank / 4)
    fused = save(tmp_path / "c.safetensors", PRODUCERS["sd-scripts"].state)
    convert_lora(fused, "diffusers", tmp_path / "d.safetensors", CONFIG)
    convert_lora(tmp_path / "d.safetensors", "kohya", tmp_path / "e.safetensors", CONFIG)
    there, back = load_file(fused), load_file(tmp_path / "e.safetensors")
    assert {k: t.shape for k, t in back.items()} == {k: t.shape for k, t in there.items()}


def test_different_downs_and_scales_become_blocks(tmp_path):
    """Independent q, k, v of different ranks and alphas: W' is theirs, row slice by row slice."""
    state, wanted = {}, numbers(*SHAPES["double_blocks.0.img_attn.qkv.weight"]).double()
    g = torch.Generator().manual_seed(1)
    for i, (letter, rank, alpha) in enumerate((("q", 2, 1.0), ("k", 3, 5.0), ("v", 4, 4.0))):
        module = f"lora_transformer_transformer_blocks_0_attn_to_{letter}"
        down, up = torch.randn(rank, 32, generator=g), torch.randn(32, rank, generator=g)
        state |= {f"{module}.lora_down.weight": down.half(), f"{module}.lora_up.weight": up.half(),
                  f"{module}.alpha": torch.tensor(alpha)}  # fmt: skip
        product = up.half().double() @ down.half().double()
        wanted[32 * i : 32 * (i + 1)] += 0.7 * alpha / rank * product
    out = tmp_path / "b.safetensors"
    written = convert_lora(save(tmp_path / "a.safetensors", state), "comfyui", out, CONFIG)
    (found,) = weights(out).values()
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    tensors = load_file(out)
    assert tensors["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"].shape == (9, 32)
    assert any("fp32" in note for note in written.notes)


def test_what_no_form_can_say_stays_and_is_said(tmp_path):
    columns = save(tmp_path / "a.safetensors", PRODUCERS["OneTrainer legacy DoRA"].state)
    written = convert_lora(columns, "kohya", tmp_path / "b.safetensors", CONFIG)
    assert any("stay split" in note for note in written.notes)
    assert any(name.startswith("lycoris_transformer_blocks_1_attn_to_q")
               for name in load_file(tmp_path / "b.safetensors"))  # fmt: skip
    module = "diffusion_model.double_blocks.0.img_attn.qkv"
    kronecker = {f"{module}.lokr_w1": numbers(2, 4), f"{module}.lokr_w2": numbers(48, 8)}
    source = save(tmp_path / "c.safetensors", kronecker)
    written = convert_lora(source, "diffusers", tmp_path / "d.safetensors", CONFIG)
    assert any("stay fused" in note for note in written.notes)
    assert any("lokr" in note for note in written.notes)
    assert_same(weights(tmp_path / "d.safetensors"), weights(source))


def test_a_fused_lora_of_q_and_v_alone_has_no_k(tmp_path):
    """What only holds zeros is not written; an untrained LoRA, all of zeros, keeps its rank."""
    module = "diffusion_model.double_blocks.0.img_attn.qkv"
    down, up = numbers(4, 32), numbers(96, 4)
    up[32:64] = 0
    state = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    source = save(tmp_path / "a.safetensors", state)
    convert_lora(source, "diffusers", tmp_path / "b.safetensors", CONFIG)
    assert not any("to_k" in name for name in load_file(tmp_path / "b.safetensors"))
    assert_same(weights(tmp_path / "b.safetensors"), weights(source))
    save(source, state | {f"{module}.lora_B.weight": torch.zeros(96, 4)})
    convert_lora(source, "diffusers", tmp_path / "b.safetensors", CONFIG)
    tensors = load_file(tmp_path / "b.safetensors")
    assert len(tensors) == 6 and all(min(tensor.shape) == 4 for tensor in tensors.values())


def test_metadata_is_kept_and_made_true(tmp_path):
    stated = {
        "ss_network_dim": "999", "ss_tag_frequency": '{"a": {"cat": 3}}', "sshs_model_hash": "old",
        "sshs_legacy_hash": "old", "modelspec.title": "Cats", "modelspec.hash_sha256": "0xold",
        "lora_adapter_metadata": '{"transformer.lora_alpha": 8, "transformer.use_rslora": true}',
    }  # fmt: skip
    source = save(tmp_path / "a.safetensors", PRODUCERS["flow, converted"].state, stated)
    out = tmp_path / "b.safetensors"
    convert_lora(source, "kohya", out, CONFIG)
    assert_same(weights(out), weights(source))
    found, data = header(out), out.read_bytes()
    digest = hashlib.sha256(data[8 + struct.unpack("<Q", data[:8])[0] :]).hexdigest()
    assert found["sshs_model_hash"] == digest and found["modelspec.hash_sha256"] == f"0x{digest}"
    assert "sshs_legacy_hash" not in found and "lora_adapter_metadata" not in found
    assert found["ss_network_dim"] == "4" and found["ss_network_alpha"] == "16.0"
    assert found["ss_tag_frequency"] == stated["ss_tag_frequency"]
    assert found["modelspec.title"] == "Cats" and found["modelspec.architecture"] == "chroma/lora"
    assert found["ss_network_module"] == "networks.lora_flux"


def test_files_the_reference_library_writes_are_ordered_as_ours(tmp_path):
    """So that the hash is that of a file saved again by safetensors."""
    source = save(tmp_path / "a.safetensors", PRODUCERS["ComfyUI LoraSave"].state)
    out = tmp_path / "b.safetensors"
    convert_lora(source, "kohya", out, CONFIG)
    again = save(tmp_path / "c.safetensors", load_file(out))
    data = again.read_bytes()
    digest = hashlib.sha256(data[8 + struct.unpack("<Q", data[:8])[0] :]).hexdigest()
    assert header(out)["sshs_model_hash"] == digest


def test_tensors_of_flux_that_chroma_has_not_are_named(tmp_path):
    state = dict(PRODUCERS["sd-scripts"].state)
    for end, shape in (("lora_down.weight", (4, 32)), ("lora_up.weight", (192, 4))):
        state[f"lora_unet_double_blocks_1_img_mod_lin.{end}"] = numbers(*shape)
    source = save(tmp_path / "a.safetensors", state)
    written = convert_lora(source, "comfyui", tmp_path / "b.safetensors", CONFIG)
    assert any("2 tensors (Flux modulation)" in note for note in written.notes)


def test_names_cover_every_module_of_chroma1(tmp_path):
    """The fixtures have two blocks; the last ones of the true model have names, too."""
    state = {}
    for name in ("lora_unet_double_blocks_18_img_attn_qkv", "lora_unet_single_blocks_37_linear1"):
        n = 9216 if "qkv" in name else 21504
        state[f"{name}.lora_down.weight"] = torch.ones(1, 3072, dtype=torch.bfloat16)
        state[f"{name}.lora_up.weight"] = torch.ones(n, 1, dtype=torch.bfloat16)
    out = tmp_path / "b.safetensors"
    convert_lora(save(tmp_path / "a.safetensors", state), "diffusers", out, ChromaConfig())
    assert {name.rpartition(".lora_")[0] for name in load_file(out)} == {
        *(f"transformer.transformer_blocks.18.attn.to_{x}" for x in "qkv"),
        *(f"transformer.single_transformer_blocks.37.attn.to_{x}" for x in "qkv"),
        "transformer.single_transformer_blocks.37.proj_mlp",
    }


@pytest.mark.parametrize("case", ["style", "ending", "folder", "itself"])
def test_nothing_is_written_after_an_error(case, tmp_path):
    source = save(tmp_path / "a.safetensors", PRODUCERS["flow"].state)
    before = source.read_bytes()
    style, out = {
        "style": ("a1111", tmp_path / "b.safetensors"), "ending": ("kohya", tmp_path / "b.pt"),
        "folder": ("kohya", tmp_path / "no" / "b.safetensors"), "itself": ("kohya", source),
    }[case]  # fmt: skip
    with pytest.raises(LoraError) as error:
        convert_lora(source, style, out, CONFIG)
    assert "\n" not in str(error.value)
    assert source.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [
        "a.safetensors"
    ]


def test_fixtures_cover_what_is_split():
    """Every fused module of the fixtures is one that diffusers splits or has in one piece."""
    assert {f"{module}" for _, module, _ in SPLIT.values()} == set(FUSED)
