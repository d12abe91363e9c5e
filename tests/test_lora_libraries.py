"""Files that the formats' own libraries write change the weights as the libraries themselves do."""

import copy
import dataclasses

import pytest
import torch
from chroma_nodes.chroma.checkpoint.diffusers import transformer_from_diffusers
from chroma_nodes.chroma.lora.adapters import changed
from chroma_nodes.chroma.lora.read import read_lora
from chroma_nodes.chroma.transformer import ChromaTransformer
from diffusers import ChromaTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.training_utils import _collate_lora_metadata
from lora_producers import CONFIG, T5, TEXT_CONFIG
from safetensors.torch import save_file
from transformers import T5Config as HFConfig
from transformers import T5EncoderModel

peft = pytest.importorskip("peft")
# Diffusers gives every Chroma an MLP of four times its width.
MLP = dataclasses.replace(CONFIG, mlp_hidden=4 * CONFIG.hidden)
BLOCKS = ["DoubleBlock", "SingleBlock", "ChromaTransformerBlock", "ChromaSingleTransformerBlock"]
SIZES = {"linear_dim": 4, "linear_alpha": 2}
TARGETS = ["attn.to_q", "attn.to_v", "attn.add_k_proj", "attn.to_out.0", "ff.net.0.proj",
           "ff_context.net.2", "proj_mlp", "proj_out", "x_embedder"]  # fmt: skip


@pytest.fixture(scope="module")
def diffusers_model():
    torch.manual_seed(0)
    return ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16, approximator_hidden_dim=40, approximator_layers=2,
    )  # fmt: skip


def randomise(module):
    """Values for what is trained: many factors start as zeros."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.2 * noise)


def check(lora, before, after):
    """Every parameter: changed as `after` has it where the file says so, else the same."""
    assert not lora.unknown and not lora.skipped
    assert lora.transformer and set(lora.transformer) <= set(before)
    for key, weight in before.items():
        placements = [(p.adapter, 1.0, p.rows) for p in lora.transformer.get(key, [])]
        ours = changed(weight.detach().float(), placements)
        error = (ours - after[key]).norm() / after[key].norm().clamp(min=1e-12)
        assert error < 1e-5, f"{key}: {error:.1e}"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha_pattern": {"proj_out": 6, "transformer_blocks.1.attn.to_q": 5}},
        {"use_rslora": True, "rank_pattern": {"to_q": 3}},
        {"use_dora": True},
        {"lora_bias": True},
    ],
    ids=["plain", "alpha pattern", "rsLoRA, rank pattern", "DoRA", "bias"],
)
def test_diffusers_and_peft(options, diffusers_model, tmp_path):
    """Through diffusers' own writer, which puts alpha into the header."""
    model = copy.deepcopy(diffusers_model)
    before = transformer_from_diffusers({n: t.clone() for n, t in model.state_dict().items()})
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS, **options))
    randomise(model)
    FluxLoraLoaderMixin.save_lora_weights(
        tmp_path, transformer_lora_layers=peft.get_peft_model_state_dict(model),
        **_collate_lora_metadata({"transformer": model}),
    )  # fmt: skip
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 2 * 6 + 3 * 4 + 2
    for layer in layers:
        layer.merge()
    merged = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors", MLP)
    check(lora, before, transformer_from_diffusers(merged))


OPTIONS = (
    {"algo": "lora"}, {"algo": "loha"}, {"algo": "lokr"}, {"algo": "lokr", "factor": 4},
    {"algo": "lokr", "full_matrix": True}, {"algo": "glora"}, {"algo": "ia3"}, {"algo": "full"},
    {"algo": "diag-oft"}, {"algo": "diag-oft", "rescaled": True}, {"algo": "lora", "dora_wd": True},
    {"algo": "loha", "dora_wd": True, "wd_on_out": False}, {"algo": "lora", "rs_lora": True},
)  # fmt: skip
CASES = [(layout, options) for layout in ("own", "diffusers") for options in OPTIONS]
# BOFT cannot divide the 96 rows of a fused matrix.
CASES.append(("diffusers", {"algo": "boft", "linear_dim": 8}))


@pytest.mark.parametrize(
    ("layout", "options"), CASES,
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)  # fmt: skip
def test_lycoris(layout, options, diffusers_model, tmp_path):
    """Against the outputs of the layers with LyCORIS' modules around them, as they are trained."""
    lycoris = pytest.importorskip("lycoris")
    torch.manual_seed(0)
    if layout == "own":
        model, config, rename = ChromaTransformer(CONFIG), CONFIG, dict
    else:
        model, config = copy.deepcopy(diffusers_model), MLP
        rename = transformer_from_diffusers
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    lycoris.LycorisNetwork.apply_preset({"target_module": BLOCKS, "target_name": []})
    network = lycoris.create_lycoris(model, 1.0, **{**SIZES, **options})
    network.apply_to()
    randomise(network)
    save_file({n: t.contiguous() for n, t in network.state_dict().items()}, tmp_path / "x.sft")
    after = dict(before)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            after[f"{name}.weight"], after[f"{name}.bias"] = affine(module)
    check(read_lora(tmp_path / "x.sft", config), rename(before), rename(after))


def affine(module):
    """The weight and the bias that a layer has in effect, whatever stands around it."""
    with torch.no_grad():
        inputs = torch.cat((torch.zeros(1, module.in_features), torch.eye(module.in_features)))
        out = module(inputs)
    return (out[1:] - out[0]).T, out[0]


def test_peft_on_the_text_encoder(tmp_path):
    """PEFT's own folder, with alpha in the file beside it."""
    torch.manual_seed(0)
    model = T5EncoderModel(HFConfig(
        vocab_size=TEXT_CONFIG.vocab_size, d_model=TEXT_CONFIG.d_model, d_kv=TEXT_CONFIG.d_kv,
        num_heads=TEXT_CONFIG.heads, d_ff=TEXT_CONFIG.d_ff, num_layers=TEXT_CONFIG.layers,
        feed_forward_proj="gated-gelu",
    ))  # fmt: skip
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "wi_0", "wo"])
    tuned = peft.get_peft_model(model, settings)
    randomise(tuned)
    tuned.save_pretrained(tmp_path)
    merged = tuned.merge_and_unload().state_dict()
    lora = read_lora(tmp_path / "adapter_model.safetensors", CONFIG, TEXT_CONFIG)
    assert not lora.unknown and not lora.transformer
    assert {f"{name}.weight" for name in T5} < set(lora.text_encoder)
    assert len(lora.text_encoder) == 2 * 3
    for key, placed in lora.text_encoder.items():
        ours = changed(before[key], [(p.adapter, 1.0, p.rows) for p in placed])
        assert not torch.equal(ours, before[key])
        torch.testing.assert_close(ours, merged[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [peft.LoHaConfig(r=4, alpha=6), peft.LoKrConfig(r=2, alpha=5)])
def test_peft_with_other_kinds(settings, tmp_path):
    """Their alpha, in the file beside it, has a name of its own."""
    torch.manual_seed(0)
    model = ChromaTransformer(CONFIG)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    tuned = peft.get_peft_model(model, dataclasses.replace(settings, target_modules=["linear1"]))
    randomise(tuned)
    tuned.save_pretrained(tmp_path)
    lora = read_lora(tmp_path / "adapter_model.safetensors", CONFIG)
    assert len(lora.transformer) == CONFIG.single_depth
    check(lora, before, tuned.merge_and_unload().state_dict())
