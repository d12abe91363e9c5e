"""LoRAs on models in memory against merging by the formula, peft, and the bytes before."""

import copy
import gc
import weakref

import pytest
import torch
from chroma_nodes.chroma.checkpoint import load_text_encoder, load_transformer
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.errors import LoraError
from chroma_nodes.chroma.lora import apply as apply_module
from chroma_nodes.chroma.lora.adapters import LowRank
from chroma_nodes.chroma.lora.adapters.full import Diff
from chroma_nodes.chroma.lora.affine import compose
from chroma_nodes.chroma.lora.apply import (
    Lora,
    apply_lora,
    loras_of,
    remove_lora,
    set_loras,
    with_loras,
)
from chroma_nodes.chroma.lora.bypass import BypassLinear
from chroma_nodes.chroma.lora.file import LoraFile, Placed
from chroma_nodes.chroma.lora.read import read_lora
from chroma_nodes.chroma.lora.strengths import BlockStrength, Strengths, parse_blocks
from chroma_nodes.chroma.quant.fused import can_compile
from chroma_nodes.chroma.quant.layers import QuantLinear, StoredWeight
from chroma_nodes.chroma.quant.matmul_int8 import has_int8
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.chroma.transformer import ChromaTransformer
from lora_files import TEXT_PREFIX, linears, merged, write_lora
from oracles import (
    SMALL,
    diffusers_transformer,
    diffusers_velocity,
    random_transformer,
)
from safetensors.torch import save_file

CPU = torch.device("cpu")
BLOCKS = "blocks."
FORMATS = ("q8_0", "fp8", "int8")


def inputs(config, batch=2):
    g = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, 16, 6, 8, generator=g)
    return latent, torch.full((batch,), 0.7), torch.randn(batch, 5, config.context_dim, generator=g)


def velocity(model, dtype=torch.float32):
    latent, sigma, context = inputs(model.config)
    with torch.no_grad():
        return model(latent.to(dtype), sigma, context.to(dtype)).float()


def bytes_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def near(found, expected, tolerance=1e-5):
    return float((found - expected).norm() / expected.norm()) <= tolerance


def reference(config, state):
    model = ChromaTransformer(config)
    model.load_state_dict(state)
    return velocity(model.eval())


@pytest.fixture
def model():
    return random_transformer().requires_grad_(False)


@pytest.fixture
def lora(model, tmp_path):
    """Makes a file: (its LoraFile, the changes it stands for)."""

    def make(seed=0, only="", **kw):
        path = tmp_path / f"lora{seed}.safetensors"
        weights = {k: w for k, w in linears(model).items() if only in k}
        changes = write_lora(path, weights, seed=seed, **kw)
        return read_lora(path, model.config), changes

    return make


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """{format: file} of a random model as wide as blocks of 32 want it, and its LoRA."""
    folder = tmp_path_factory.mktemp("quantised")
    plain = random_transformer().requires_grad_(False)
    state = {k: v.bfloat16().contiguous() for k, v in plain.state_dict().items()}
    save_file(state, folder / "plain.safetensors")
    files = {}
    for target in FORMATS:
        suffix = "gguf" if target == "q8_0" else "safetensors"
        files[target] = folder / f"{target}.{suffix}"
        quantise_file(folder / "plain.safetensors", target, files[target])
    changes = write_lora(folder / "lora.safetensors", linears(plain), alpha=2.0)
    return files, read_lora(folder / "lora.safetensors", SMALL), changes


def values_of(model):
    """What a quantised model stands for, fp32."""
    state = {n: t.float() for n, t in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, StoredWeight):
            state[f"{name}.weight"] = module.stored.dequantise(torch.float32)
    return state


def test_patched_weights_are_the_formula_rounded_once(lora, tmp_path):
    model = random_transformer(dtype=torch.bfloat16).requires_grad_(False)
    before = bytes_of(model)
    (one, first), (two, second) = lora(1), lora(2, alpha=2.0)
    apply_lora(model, [(one, Strengths(0.5)), (two, Strengths(-1.25))])
    expected = merged(before, [(first, 0.5), (second, -1.25)])
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        # One unit in the last place of bf16 where fp32 sums fall on the other side of a half.
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-8, atol=1e-6)
    rounded = [n for n in expected if torch.equal(model.get_parameter(n), expected[n].bfloat16())]
    assert len(rounded) > 0.5 * len(expected)


@pytest.mark.parametrize("how", ["auto", "patch", "bypass"])
def test_velocity_equals_the_merged_models(model, lora, how):
    file, changes = lora()
    expected = reference(model.config, merged(model.state_dict(), [(changes, 0.8)]))
    plain = velocity(model)
    apply_lora(model, [(file, Strengths(0.8))], how)
    assert near(velocity(model), expected)
    assert not near(expected, plain, 0.01)


@pytest.mark.parametrize("how", ["patch", "bypass"])
def test_removing_restores_every_bit(model, lora, how):
    before, plain = bytes_of(model), velocity(model)
    modules = dict(model.named_modules())
    apply_lora(model, [(lora(1)[0], Strengths(0.7)), (lora(2)[0], Strengths(-3.0))], how)
    assert not torch.equal(velocity(model), plain)
    remove_lora(model)
    assert same(bytes_of(model), before) and loras_of(model) == ()
    assert torch.equal(velocity(model), plain)
    assert dict(model.named_modules()) == modules


def test_strengths_change_without_drift(model, lora):
    file, changes = lora()
    before = bytes_of(model)
    for strength in (1.0, 0.3, -2.0, 1.7, 0.25):
        apply_lora(model, [(file, Strengths(strength))])
        expected = merged(before, [(changes, strength)])
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    apply_lora(model, [])
    assert same(bytes_of(model), before)


def test_strength_0_touches_nothing(model, lora):
    before = dict(model.named_parameters())
    apply_lora(model, [(lora()[0], Strengths(0.0))])
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in before.items())


def test_only_touched_weights_get_new_memory(model, lora):
    before = dict(model.named_parameters())
    file, changes = lora(only="double_blocks.1.")
    apply_lora(model, [(file, Strengths())])
    now = dict(model.named_parameters())
    assert {name for name in now if now[name] is not before[name]} == set(changes)


def test_blocks_have_strengths_of_their_own(model, lora):
    file, changes = lora()
    blocks = parse_blocks("double 1: 0.5, single 0-1: 0, other: 2")
    before = bytes_of(model)
    apply_lora(model, [(file, Strengths(0.8, blocks=blocks))])
    found = model.state_dict()
    for key, change in changes.items():
        factor = 2.0
        if key.startswith("double_blocks."):
            factor = 0.5 if key.startswith("double_blocks.1.") else 1.0
        elif key.startswith("single_blocks."):
            factor = 1.0 if key.startswith("single_blocks.2.") else 0.0
        expected = before[key] + 0.8 * factor * change
        torch.testing.assert_close(found[key], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("double 0-9: 0.5, single: 1", (BlockStrength("double", 0.5, 0, 9),
                                        BlockStrength("single", 1.0))),
        ("Double 3 5-7 : -1\nother: .5;", (BlockStrength("double", -1.0, 3, 3),
                                           BlockStrength("double", -1.0, 5, 7),
                                           BlockStrength("other", 0.5))),
    ],
)  # fmt: skip
def test_block_strengths_as_text(text, expected):
    assert parse_blocks(text) == expected


@pytest.mark.parametrize(
    "text", ["double", "double: x", "double: nan", "double 0-: 1", "triple 1: 1", "9-3: 1",
             "double 9-3: 1", "other 3: 1", "double 1: 1 single 1: 1", "double 1,2: 1"],
)  # fmt: skip
def test_unusable_block_strengths_are_named(text):
    with pytest.raises(LoraError, match="block strengths: ") as error:
        parse_blocks(text)
    assert "\n" not in str(error.value)


def test_blocks_that_the_model_does_not_have(model, lora):
    before = bytes_of(model)
    with pytest.raises(LoraError, match="no double block 2; expected 0 to 1"):
        apply_lora(model, [(lora()[0], Strengths(blocks=parse_blocks("double 0-2: 1")))])
    assert same(bytes_of(model), before)


@pytest.mark.parametrize("target", FORMATS)
def test_quantised_bases_equal_their_values_merged(quantised, target):
    files, file, changes = quantised
    model = load_transformer(files[target], dtype=torch.float32)
    values, before = values_of(model), bytes_of(model)
    plain = velocity(model)
    expected = reference(SMALL, merged(values, [(changes, 0.9)]))
    apply_lora(model, [(file, Strengths(0.9))])
    beside = [m for m in model.modules() if isinstance(m, QuantLinear) and m.affine is not None]
    assert len(beside) == sum(isinstance(m, QuantLinear) for m in model.modules()) > 0
    assert near(velocity(model), expected)
    stored = {name for name, tensor in before.items() if not tensor.is_floating_point()}
    assert stored and all(torch.equal(model.state_dict()[name], before[name]) for name in stored)
    apply_lora(model, [(file, Strengths(0.9))], "patch")
    assert not any(isinstance(model.get_submodule(k.removesuffix(".weight")), QuantLinear)
                   for k in changes)  # fmt: skip
    assert near(velocity(model), expected)
    remove_lora(model)
    assert same(bytes_of(model), before)
    assert torch.equal(velocity(model), plain)


@pytest.mark.parametrize("target", FORMATS)
def test_bf16_bypass_is_as_near_to_the_truth_as_bf16_is(quantised, target):
    """The error of the bypass in bf16 is that of the same model with merged weights in bf16."""
    files, file, changes = quantised
    model = load_transformer(files[target], dtype=torch.bfloat16)
    values = merged(values_of(model), [(changes, 1.0)])
    expected = reference(SMALL, values)
    plain = ChromaTransformer(SMALL)
    plain.load_state_dict(values)
    usual = float((velocity(plain.bfloat16().eval(), torch.bfloat16) - expected).norm())
    apply_lora(model, [(file, Strengths())])
    assert float((velocity(model, torch.bfloat16) - expected).norm()) <= 1.25 * usual


@pytest.mark.skipif(not has_int8(CPU), reason="this CPU multiplies no int8 matrices fast")
def test_products_in_8_bits_take_adapters_too(quantised):
    files, file, changes = quantised
    model = load_transformer(files["int8"], dtype=torch.float32, products="int8")
    packed = [m for m in model.modules() if isinstance(m, QuantLinear) and m.packed is not None]
    assert packed
    plain, values = velocity(model), values_of(model)
    usual = float((plain - reference(SMALL, values)).norm())
    expected = reference(SMALL, merged(values, [(changes, 1.0)]))
    apply_lora(model, [(file, Strengths())])
    assert all(m.affine is not None for m in packed)
    assert float((velocity(model) - expected).norm()) <= 2 * usual
    remove_lora(model)
    assert torch.equal(velocity(model), plain)


def test_one_layer_is_its_product_plus_the_pair(quantised):
    """Several LoRAs of one layer are added to the product of the untouched bytes."""
    files, file, changes = quantised
    model = load_transformer(files["q8_0"], dtype=torch.float32)
    layer = model.double_blocks[0].img_attn.qkv
    key = "double_blocks.0.img_attn.qkv.weight"
    x = torch.randn(3, 7, layer.in_features)
    weight = layer.stored.dequantise(torch.float32)
    apply_lora(model, [(file, Strengths(0.5)), (file, Strengths(2.0))])
    expected = x @ (weight + 2.5 * changes[key]).T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", FORMATS)
def test_an_empty_composition_beside_a_quantised_layer_changes_nothing(quantised, target, dtype):
    files, file, _ = quantised
    layer = load_transformer(files[target], dtype=dtype).double_blocks[0].img_attn.qkv
    assert isinstance(layer, QuantLinear)
    placed = file.transformer["double_blocks.0.img_attn.qkv.weight"]
    x = torch.randn(3, 7, layer.in_features, dtype=dtype)
    before = layer(x)
    layer.affine = compose(
        [(one.adapter, 0.0, one.rows) for one in placed],
        (layer.out_features, layer.in_features),
        lambda: pytest.fail("the weight was decoded"),
    )
    assert not list(layer.affine.tensors())
    assert torch.equal(layer(x), before)


@pytest.mark.skipif(not can_compile(CPU), reason="torch.compile does not work here")
def test_compiled_layers_take_adapters(quantised):
    files, file, _ = quantised
    model = load_transformer(files["q8_0"], dtype=torch.float32)
    layer = model.double_blocks[0].img_mlp[0]
    x = torch.randn(3, layer.in_features)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for strength in (0.0, 1.0, -0.5):
            apply_lora(model, [(file, Strengths(strength))])
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


def test_biases_and_norms_change_with_quantised_weights(quantised, tmp_path):
    files, _, _ = quantised
    model = load_transformer(files["q8_0"], dtype=torch.float32)
    before, values = bytes_of(model), values_of(model)
    keys = "single_blocks.1.linear2.bias", "single_blocks.1.norm.query_norm.scale"
    changes = {key: torch.randn_like(values[key]) for key in keys}
    keyed = {key: [Placed(Diff(change))] for key, change in changes.items()}
    apply_lora(model, [(LoraFile(tmp_path / "diff.safetensors", keyed), Strengths(0.5))], "bypass")
    expected = reference(SMALL, merged(values, [(changes, 0.5)]))
    assert near(velocity(model), expected)
    remove_lora(model)
    assert same(bytes_of(model), before)


def test_rows_of_a_fused_weight(model, tmp_path):
    hidden = model.config.hidden
    key = "single_blocks.0.linear1.weight"
    down, up = torch.randn(3, hidden), torch.randn(hidden, 3)
    placed = Placed(LowRank(down, up), rows=(hidden, 2 * hidden))
    file = LoraFile(tmp_path / "rows.safetensors", {key: [placed]})
    expected = model.get_parameter(key).clone()
    expected[hidden : 2 * hidden] += 0.5 * up @ down
    whole = reference(model.config, {**model.state_dict(), key: expected})
    for how in ("patch", "bypass"):
        apply_lora(model, [(file, Strengths(0.5))], how)
        assert near(velocity(model), whole)


def test_a_whole_matrix_is_merged_and_not_run_beside(quantised, tmp_path):
    files, _, _ = quantised
    model = load_transformer(files["q8_0"], dtype=torch.float32)
    key = "single_blocks.0.linear2.weight"
    values = values_of(model)
    change = torch.randn(values[key].shape) * 0.1
    file = LoraFile(tmp_path / "diff.safetensors", {key: [Placed(Diff(change))]})
    expected = reference(SMALL, merged(values, [({key: change}, 1.0)]))
    for how, kind in (("auto", torch.nn.Linear), ("bypass", QuantLinear)):
        apply_lora(model, [(file, Strengths())], how)
        assert type(model.single_blocks[0].linear2) is kind
        assert near(velocity(model), expected)


def test_a_second_model_shares_what_is_not_changed(model, lora):
    before, plain = bytes_of(model), velocity(model)
    (one, first), (two, second) = lora(1), lora(2, only="single_blocks.1.")
    other = with_loras(model, [Lora(one, Strengths(0.5), "bypass")])
    third = with_loras(other, [Lora(two, Strengths(2.0))])
    expected = reference(model.config, merged(before, [(first, 0.5), (second, 2.0)]))
    assert near(velocity(third), expected)
    only_one = reference(model.config, merged(before, [(first, 0.5)]))
    assert near(velocity(other), only_one)
    assert same(bytes_of(model), before) and torch.equal(velocity(model), plain)
    assert [len(loras_of(m)) for m in (model, other, third)] == [0, 1, 2]
    shared = third.get_parameter("img_in.weight"), model.get_parameter("img_in.weight")
    assert shared[0] is shared[1]
    remove_lora(third)
    assert torch.equal(velocity(third), plain) and near(velocity(other), only_one)


def test_a_second_quantised_model(quantised):
    files, file, changes = quantised
    model = load_transformer(files["fp8"], dtype=torch.float32)
    plain = velocity(model)
    values = values_of(model)
    other = with_loras(model, [Lora(file, Strengths(1.0))])
    third = with_loras(other, [Lora(file, Strengths(0.5), "patch")])
    expected = reference(SMALL, merged(values, [(changes, 1.0)]))
    assert near(velocity(other), expected)
    assert near(velocity(third), reference(SMALL, merged(values, [(changes, 1.5)])))
    remove_lora(third)
    assert torch.equal(velocity(third), plain) and torch.equal(velocity(model), plain)
    assert near(velocity(other), expected)


def test_many_changes_leave_no_memory_behind(model, lora):
    files = [lora(seed)[0] for seed in range(3)]
    weak = []
    for i in range(12):
        apply_lora(model, [(files[i % 3], Strengths(0.1 * i))], ("patch", "bypass")[i % 2])
        weak.append(weakref.ref(model.double_blocks[0].img_attn.qkv.weight))
        weak.append(weakref.ref(model.double_blocks[0].img_attn.qkv))
    remove_lora(model)
    gc.collect()
    original = model.double_blocks[0].img_attn.qkv
    alive = {id(ref()) for ref in weak if ref() is not None}
    assert alive <= {id(original), id(original.weight)}


def test_copies_keep_their_loras(model, lora):
    file, _ = lora()
    plain = velocity(model)
    apply_lora(model, [(file, Strengths())])
    other = copy.deepcopy(model)
    remove_lora(model)
    assert torch.equal(velocity(model), plain) and not torch.equal(velocity(other), plain)
    remove_lora(other)
    assert torch.equal(velocity(other), plain)


def test_text_encoder_patched_and_bypassed(tmp_path):
    source = load_text_encoder(small.TEXT_ENCODER, dtype=torch.float32)
    changes = write_lora(tmp_path / "t5.safetensors", linears(source), TEXT_PREFIX)
    transformer = load_transformer(small.TRANSFORMER)
    file = read_lora(tmp_path / "t5.safetensors", transformer.config, source.config)
    assert set(file.text_encoder) == set(changes)
    quantise_file(small.TEXT_ENCODER, "q8_0", tmp_path / "t5.gguf")
    tokens = torch.randint(2, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    for path in (small.TEXT_ENCODER, tmp_path / "t5.gguf"):
        model = load_text_encoder(path, dtype=torch.float32)
        values, before = values_of(model), bytes_of(model)
        source.load_state_dict(merged(values, [(changes, 0.6)]))
        expected = source(tokens)
        apply_lora(model, [(file, Strengths(model=5.0, text_encoder=0.6))])
        assert near(model(tokens), expected)
        remove_lora(model)
        assert same(bytes_of(model), before)


def test_a_file_that_does_not_fit_changes_nothing(model, lora, tmp_path):
    fitting, _ = lora()
    before = bytes_of(model)
    apply_lora(model, [(fitting, Strengths())])
    applied = bytes_of(model)
    wide = LowRank(torch.randn(2, 64), torch.randn(48, 2))
    linear1, unknown = "single_blocks.0.linear1.weight", "double_blocks.7.img_attn.qkv.weight"
    for keyed, message in (
        ({linear1: [Placed(wide)]}, "bad.safetensors: single_blocks.0.linear1.weight: lora"),
        ({linear1: [Placed(wide, (850, 900))]}, "rows 850 to 899"),
        ({unknown: [Placed(wide)]}, f"changes {unknown}, which this model does not have"),
    ):
        bad = LoraFile(tmp_path / "bad.safetensors", keyed)
        for how in ("patch", "bypass"):
            with pytest.raises(LoraError, match=message) as error:
                apply_lora(model, [(fitting, Strengths(0.1)), (bad, Strengths())], how)
            assert "\n" not in str(error.value)
            assert same(bytes_of(model), applied) and len(loras_of(model)) == 1
    remove_lora(model)
    assert same(bytes_of(model), before)


def test_a_failure_on_the_way_leaves_the_original(model, lora, monkeypatch):
    before = bytes_of(model)
    calls = []

    def fail_late(*args):
        calls.append(args)
        if len(calls) == 5:
            raise MemoryError
        return changed(*args)

    changed = apply_module.changed
    monkeypatch.setattr(apply_module, "changed", fail_late)
    with pytest.raises(MemoryError):
        apply_lora(model, [(lora()[0], Strengths())])
    assert same(bytes_of(model), before) and loras_of(model) == ()


def test_expanding_needs_room(quantised, monkeypatch):
    files, file, _ = quantised
    model = load_transformer(files["q8_0"], dtype=torch.bfloat16)
    monkeypatch.setattr(apply_module, "free_memory", lambda device: 10**5)
    with pytest.raises(LoraError, match=r"0\.0 GB are free; choose the way 'bypass'"):
        apply_lora(model, [(file, Strengths())], "patch")


def test_unknown_way(lora):
    with pytest.raises(LoraError, match="'merge' is unknown; expected one of auto, patch, bypass"):
        Lora(lora()[0], how="merge")


def test_where_loras_of_a_matrix_disagree_all_are_merged(quantised):
    files, file, changes = quantised
    model = load_transformer(files["q8_0"], dtype=torch.float32)
    values = values_of(model)
    set_loras(model, [Lora(file, Strengths(0.5)), Lora(file, Strengths(0.25), "patch")])
    key = next(iter(changes)).removesuffix(".weight")
    expected = values[f"{key}.weight"] + 0.75 * changes[f"{key}.weight"]
    torch.testing.assert_close(model.get_submodule(key).weight, expected, rtol=1e-6, atol=1e-6)


def test_bypassed_plain_layers_keep_their_parameters(model, lora):
    weight = model.double_blocks[0].img_attn.qkv.weight
    apply_lora(model, [(lora()[0], Strengths())], "bypass")
    layer = model.double_blocks[0].img_attn.qkv
    assert type(layer) is BypassLinear and layer.weight is weight


@pytest.mark.parametrize("how", ["patch", "bypass"])
def test_equals_peft_on_diffusers(model, how, tmp_path):
    """The same file through diffusers' load_lora_adapter, split q, k, v and all."""
    peft = pytest.importorskip("peft")
    theirs = diffusers_transformer(model)
    names = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj",
             "ff.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"]  # fmt: skip
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=names, init_lora_weights=False)
    torch.manual_seed(0)
    trained = copy.deepcopy(theirs)
    trained.add_adapter(config)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    trained.save_lora_adapter(tmp_path)
    theirs.load_lora_adapter(str(tmp_path), prefix=None, weight_name=path.name)
    latent, sigma, context = inputs(model.config)
    lengths = torch.full((2,), context.shape[1])
    with torch.no_grad():
        plain = velocity(model)
        expected = diffusers_velocity(theirs, latent, sigma, context, lengths)
    assert not near(expected, plain, 0.01)
    apply_lora(model, [(read_lora(path, model.config), Strengths())], how)
    assert near(velocity(model), expected, 1e-4)
