"""LoRAs inside ComfyUI: the same numbers as ComfyUI's own loader, and no trace behind them.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment.
"""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import os

import pytest
import torch
from chroma_nodes.chroma.errors import LoraError
from comfy_inprocess import import_comfyui
from safetensors.torch import save_file
from test_comfy_host import comfy_sample, conditioning, embedding, native_patcher
from test_comfy_quant import CONFIG, CPU, QKV, case, plain, run, state, write

import_comfyui()

import comfy.lora
import comfy.sd
from chroma_nodes.chroma.lora.strengths import Strengths, parse_blocks
from chroma_nodes.nodes import host_lora, host_model
from chroma_nodes.nodes.host_adapter import HostAdapter
from chroma_nodes.nodes.host_lora import apply_to_model, read_for

__all__ = ["state"]  # a fixture
LINEAR1 = "single_blocks.2.linear1"
NORM = "double_blocks.0.txt_attn.norm.query_norm.scale"
WIDTH, MLP = CONFIG.hidden, CONFIG.mlp_hidden
SIZES = {QKV: (3 * WIDTH, WIDTH), LINEAR1: (3 * WIDTH + MLP, WIDTH)}


def factors(rows, columns, rank=4, seed=7):
    g = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, columns, generator=g) / 8
    return torch.randn(rows, rank, generator=g), down


def kohya(seed=7, alpha=2.0):
    """sd-scripts' spelling on two modules: {tensor: values} and {module: change}."""
    file, changes = {}, {}
    for module, size in SIZES.items():
        up, down = factors(*size, seed=seed)
        name = f"lora_unet_{module.replace('.', '_')}"
        file |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        file[f"{name}.alpha"] = torch.tensor(alpha)
        changes[module] = alpha / 4 * up @ down
    return file, changes


def diffusers():
    """Split q, k, v and MLP of a single block, as rows of the fused matrix."""
    file, change = {}, torch.zeros(SIZES[LINEAR1])
    parts = {"attn.to_q": (0, WIDTH), "attn.to_v": (2 * WIDTH, WIDTH), "proj_mlp": (3 * WIDTH, MLP)}
    for i, (part, (first, rows)) in enumerate(parts.items()):
        up, down = factors(rows, WIDTH, seed=i)
        name = f"transformer.single_transformer_blocks.2.{part}"
        file |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
        change[first : first + rows] += up @ down
    return file, {LINEAR1: change}


def loha():
    """Of so high a rank that it has no small form beside a weight."""
    (w1_a, w1_b), (w2_a, w2_b) = (factors(*SIZES[QKV], rank=8, seed=i) for i in (1, 2))
    parts = {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b}
    name = f"lora_unet_{QKV.replace('.', '_')}"
    return {f"{name}.{k}": v for k, v in parts.items()}, {QKV: (w1_a @ w1_b) * (w2_a @ w2_b)}


def lokr():
    g = torch.Generator().manual_seed(3)
    w1, w2 = torch.randn(24, 8, generator=g) / 4, torch.randn(16, 16, generator=g) / 4
    name = f"diffusion_model.{QKV}"
    return {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}, {QKV: torch.kron(w1, w2)}


FILES = {"kohya": kohya, "diffusers": diffusers, "loha": loha, "lokr": lokr}
BESIDE = ("kohya", "diffusers", "lokr")


def saved(tmp_path, tensors, name="lora.safetensors"):
    path = tmp_path / name
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def build(tmp_path, state, name):
    """A MODEL in a format, and what its matrices stand for."""
    (tmp_path / "model").mkdir()
    if name in ("bf16", "fp32"):
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
        path = saved(tmp_path / "model", {k: v.to(dtype) for k, v in state.items()})
        return host_model.build_model(path, dtype), {k: v.to(dtype) for k, v in state.items()}
    path, meant = write(name, state, tmp_path / "model")
    return host_model.build_model(path, torch.float32), meant


def ours(model, path, strength=1.0, how="auto", blocks=""):
    strengths = Strengths(strength, blocks=parse_blocks(blocks))
    return apply_to_model(model, read_for(model, path), strengths, how)


def core(model, tensors, strength):
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0.0)[0]


def merged(meant, changes, strength):
    extra = {f"{module}.weight": strength * change for module, change in changes.items()}
    return {k: v.float() + extra[k] if k in extra else v for k, v in meant.items()}


@torch.no_grad()
def expected_of(weights):
    return plain({k: v.float() for k, v in weights.items()})(*case())


def run_fp32(patcher):
    return run(patcher).float()


def close(actual, wanted, tolerance=1e-4):
    assert (actual - wanted).abs().max() <= tolerance * wanted.std()


def bits(patcher):
    return {k: v.clone() for k, v in patcher.model.state_dict().items()}


def layer(patcher, module=QKV):
    return patcher.model.get_submodule(f"diffusion_model.{module}")


def loaded(patcher):
    """What layers run with while the patcher is loaded: (beside, patched at use)."""
    patcher.patch_model(device_to=CPU)
    try:
        layers = [layer(patcher, module) for module in SIZES]
        beside = [one for one in layers if one.affine is not None]
        return bool(beside), any(one.weight_function for one in layers)
    finally:
        patcher.unpatch_model(device_to=CPU)


@pytest.mark.parametrize("base", ["fp32", "Q8_0", "scaled_fp8"])
@pytest.mark.parametrize("kind", FILES)
def test_every_kind_on_every_base_is_what_its_formula_says(tmp_path, state, base, kind):
    model, meant = build(tmp_path, state, base)
    before = run(model)
    tensors, changes = FILES[kind]()
    patched, applied = ours(model, saved(tmp_path, tensors), 0.7)
    close(run(patched), expected_of(merged(meant, changes, 0.7)))
    assert (run(patched) - before).abs().max() > 0.01
    if base != "fp32":
        assert loaded(patched) == (kind in BESIDE, kind not in BESIDE)
        assert ("beside the weights" in str(applied)) == (kind in BESIDE)
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("base", ["bf16", "Q8_0", "scaled_fp8", "int8_tensorwise rows"])
def test_load_stack_change_strength_remove(tmp_path, state, base):
    model, _ = build(tmp_path, state, base)
    original, before = bits(model), run(model)
    first, second = (saved(tmp_path, kohya(seed)[0], f"{seed}.safetensors") for seed in (1, 2))
    one, _ = ours(model, first, 0.5)
    stacked, _ = ours(one, second, 0.5)
    stronger, _ = ours(model, first, 1.0)
    outputs = [run(patcher) for patcher in (one, stacked, stronger, one, model)]
    assert torch.equal(outputs[0], outputs[3]) and torch.equal(outputs[4], before)
    different = [outputs[0], outputs[1], outputs[2], before]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    after = bits(model)
    assert all(torch.equal(original[k].view(torch.uint8), after[k].view(torch.uint8))
               for k in original if original[k].ndim)  # fmt: skip


@pytest.mark.parametrize("base", ["bf16", "fp32", "Q8_0", "scaled_fp8"])
@pytest.mark.parametrize("kind", ["kohya", "diffusers", "loha"])
def test_it_equals_comfyuis_own_loader(tmp_path, state, base, kind):
    model, _ = build(tmp_path, state, base)
    tensors, _ = FILES[kind]()
    mine, _ = ours(model, saved(tmp_path, tensors), 0.7)
    # Both round to bf16 once; sums in another order may fall on the other side.
    close(run_fp32(mine), run_fp32(core(model, tensors, 0.7)), 2e-2 if base == "bf16" else 1e-4)


@pytest.mark.parametrize("base", ["fp32", "Q8_0"])
@pytest.mark.parametrize("ours_first", [True, False])
def test_it_composes_with_comfyuis_own_loader(tmp_path, state, base, ours_first):
    model, meant = build(tmp_path, state, base)
    (mine, change), (theirs, other) = kohya(1), kohya(2)
    path = saved(tmp_path, mine)
    if ours_first:
        both = core(ours(model, path, 0.5)[0], theirs, 0.8)
    else:
        both, _ = ours(core(model, theirs, 0.8), path, 0.5)
    close(run(both), expected_of(merged(merged(meant, change, 0.5), other, 0.8)))
    if base == "Q8_0":
        assert loaded(both) == (True, False)


def dora(weight):
    """DoRA over output rows behind nothing else: tensors and the new weight, by its paper."""
    up, down = factors(*SIZES[QKV])
    magnitude = torch.rand(len(weight), 1, generator=torch.Generator().manual_seed(5)) + 0.5
    name = f"lora_unet_{QKV.replace('.', '_')}"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    tensors[f"{name}.dora_scale"] = magnitude
    moved = weight + up @ down
    return tensors, magnitude * moved / moved.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("base", ["fp32", "Q8_0"])
def test_dora_is_normalised_by_the_merged_weight(tmp_path, state, base):
    model, meant = build(tmp_path, state, base)
    weight = meant[f"{QKV}.weight"]
    tensors, new = dora(weight)
    patched, _ = ours(model, saved(tmp_path, tensors), 0.6)
    between = {**meant, f"{QKV}.weight": torch.lerp(weight, new, 0.6)}
    close(run(patched), expected_of(between))
    if base == "Q8_0":
        assert loaded(patched) == (True, False)


def test_order_matters_where_it_does_and_is_kept(tmp_path, state):
    """A LoRA of ComfyUI's before our DoRA: the norm is that of the weight with both."""
    model, meant = build(tmp_path, state, "Q8_0")
    theirs, change = kohya(2)
    first = merged(meant, change, 1.0)
    tensors, new = dora(first[f"{QKV}.weight"])
    patched, _ = ours(core(model, theirs, 1.0), saved(tmp_path, tensors))
    close(run(patched), expected_of({**first, f"{QKV}.weight": new}))


def test_how_patch_adds_to_the_values_and_bypass_refuses_what_cannot(tmp_path, state):
    model, meant = build(tmp_path, state, "Q8_0")
    tensors, changes = kohya()
    path = saved(tmp_path, tensors)
    patched, applied = ours(model, path, 0.7, "patch")
    close(run(patched), expected_of(merged(meant, changes, 0.7)))
    assert loaded(patched) == (False, True) and str(applied) == "2 merged"
    heavy = saved(tmp_path, loha()[0], "loha.safetensors")
    before = dict(model.patches)
    with pytest.raises(LoraError, match="matrix as large as itself; set how to auto or patch"):
        ours(model, heavy, 1.0, "bypass")
    assert model.patches == before == {}
    both, _ = ours(ours(model, path, 0.7, "bypass")[0], heavy, 1.0)
    close(run(both), expected_of(merged(merged(meant, changes, 0.7), loha()[1], 1.0)))
    assert loaded(both) == (True, True)  # one matrix each


def test_what_wraps_weights_still_comes_last(tmp_path, state):
    model, meant = build(tmp_path, state, "Q8_0")
    tensors, changes = kohya()
    patched, _ = ours(model, saved(tmp_path, tensors))
    patched.add_weight_wrapper(f"diffusion_model.{QKV}.weight", lambda weight: 2 * weight)
    both = merged(meant, changes, 1.0)
    close(run(patched), expected_of({**both, f"{QKV}.weight": 2 * both[f"{QKV}.weight"]}))


def test_little_memory_changes_nothing_and_the_factors_go_along(tmp_path, state):
    model, _ = build(tmp_path, state, "Q8_0")
    patched, _ = ours(model, saved(tmp_path, kohya()[0]))
    expected = run(patched)
    patched.patch_model(device_to=CPU, lowvram_model_memory=1000)
    try:
        with torch.no_grad():
            streamed = patched.model.diffusion_model(*case())
        factors = list(layer(patched).affine.tensors())
        patched.partially_unload(CPU, 1e9)
        assert all(a is b for a, b in zip(layer(patched).affine.tensors(), factors, strict=True))
        with torch.no_grad():
            unloaded = patched.model.diffusion_model(*case())
        one = layer(patched)
        assert one(torch.empty(3, WIDTH, device="meta")).is_meta
        assert all(tensor.device == CPU for tensor in one.affine.tensors())
    finally:
        patched.unpatch_model(device_to=CPU)
    assert torch.equal(streamed, expected) and torch.equal(unloaded, expected)
    assert one.affine is None


@pytest.mark.parametrize("base", ["fp32", "Q8_0"])
def test_a_bias_and_a_norm_are_changed_on_any_base(tmp_path, state, base):
    model, meant = build(tmp_path, state, base)
    bias, scale = torch.linspace(-1, 1, 3 * WIDTH), torch.rand(CONFIG.head_dim)
    name = NORM.removesuffix(".scale")
    tensors = {f"diffusion_model.{QKV}.diff_b": bias, f"diffusion_model.{name}.diff": scale}
    patched, _ = ours(model, saved(tmp_path, tensors), 0.5)
    wanted = {**meant}
    wanted[f"{QKV}.bias"] = meant[f"{QKV}.bias"] + 0.5 * bias
    wanted[NORM] = meant[NORM] + 0.5 * scale
    before = run(model)
    close(run(patched), expected_of(wanted))
    patched.patch_model(device_to=CPU, lowvram_model_memory=1000)
    try:
        patched.load(CPU, lowvram_model_memory=2000)
        with torch.no_grad():
            close(patched.model.diffusion_model(*case()), expected_of(wanted))
    finally:
        patched.unpatch_model(device_to=CPU)
    assert torch.equal(run(model), before)


def test_norms_of_comfyuis_own_chroma_are_found(tmp_path):
    """They are called .scale or .weight, as the version has it."""
    model = native_patcher()
    scale = torch.rand(64)
    tensors = {f"diffusion_model.{NORM.removesuffix('.scale')}.diff": scale}
    patched, applied = ours(model, saved(tmp_path, tensors), 0.5)
    (key,) = patched.patches
    assert key.startswith(f"diffusion_model.{NORM.removesuffix('scale')}") and not applied.absent
    patched.patch_model(device_to=CPU)
    name = key.removeprefix("diffusion_model.")
    now = patched.model.diffusion_model.get_parameter(name).clone()
    patched.unpatch_model(device_to=CPU)
    was = patched.model.diffusion_model.get_parameter(name)
    torch.testing.assert_close(now, was + 0.5 * scale)


def test_strengths_of_blocks(tmp_path, state):
    model, meant = build(tmp_path, state, "Q8_0")
    tensors, changes = kohya()
    path = saved(tmp_path, tensors)
    patched, applied = ours(model, path, 0.8, blocks="double 0-1: 0.5, single: 0")
    close(run(patched), expected_of(merged(meant, {QKV: changes[QKV]}, 0.4)))
    assert str(applied) == "1 beside the weights, 1 off at strength 0"
    with pytest.raises(LoraError, match="no double block 9"):
        ours(model, path, blocks="double 9: 0.5")


def sample(model):
    noise = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(4))
    text = embedding()
    text.hidden.resize_(1, 7, CONFIG.context_dim).normal_(
        generator=torch.Generator().manual_seed(1)
    )
    return comfy_sample(model, noise, conditioning(text), conditioning(text), cfg=1.0)


@pytest.mark.parametrize("kind", ["kohya", "diffusers", "lokr"])
def test_bypass_beside_plain_weights_lasts_as_long_as_the_run(tmp_path, state, kind):
    model, _ = build(tmp_path, state, "fp32")
    original, before = bits(model), sample(model)
    path = saved(tmp_path, FILES[kind]()[0])
    beside, applied = ours(model, path, 0.3, "bypass")
    twice, _ = ours(beside, path, 0.4, "bypass")
    assert "merged" not in str(applied) and not beside.patches
    close(sample(beside), sample(ours(model, path, 0.3)[0]))
    close(sample(twice), sample(ours(model, path, 0.7)[0]))
    assert "forward" not in vars(layer(model)) and torch.equal(sample(model), before)
    assert all(torch.equal(original[k], v) for k, v in bits(model).items())


def test_what_was_compiled_without_adapters_beside_weights_runs_with_them(tmp_path, state):
    model, _ = build(tmp_path, state, "fp32")
    path = saved(tmp_path, kohya()[0])
    beside = [ours(model, path, strength, "bypass")[0] for strength in (0.3, 0.7)]
    inner = model.model.diffusion_model
    eager = [sample(one) for one in (model, *beside)]
    try:
        inner.compile(backend="eager")
        compiled = [sample(one) for one in (model, *beside, model)]
    finally:
        inner._compiled_call_impl = None
        torch._dynamo.reset()
    assert not any(torch.equal(eager[0], other) for other in eager[1:])
    for actual, wanted in zip(compiled, (*eager, eager[0]), strict=True):
        close(actual, wanted)


def test_who_wraps_a_layer_meanwhile_is_left_alone(tmp_path, state):
    """As ComfyUI's own bypass does, which may give the forward it found back much later."""
    model, _ = build(tmp_path, state, "fp32")
    plain_picture, (one,) = sample(model), [layer(model)]
    beside, _ = ours(model, saved(tmp_path, kohya()[0]), 0.3, "bypass")
    found = []

    def wrap(executor, *args, **kwargs):
        found.append(one.forward)
        one.forward = lambda x: found[0](x)
        return executor(*args, **kwargs)

    beside.add_wrapper_with_key("outer_sample", "a pack", wrap)
    assert not torch.equal(sample(beside), plain_picture)
    one.forward = found[0]
    assert torch.equal(sample(model), plain_picture)


def test_bypass_beside_plain_weights_refuses_what_depends_on_them(tmp_path, state):
    model, meant = build(tmp_path, state, "fp32")
    path = saved(tmp_path, dora(meant[f"{QKV}.weight"])[0])
    with pytest.raises(LoraError, match=r"depends on the weight.*set how to auto or patch"):
        ours(model, path, 1.0, "bypass")


def test_weights_that_others_quantised_stay_as_they_are(tmp_path, state):
    model, _ = build(tmp_path, state, "fp32")
    for module in SIZES:
        weight = layer(model, module).weight
        weight.data = weight.data.to(torch.float8_e4m3fn)
    _, applied = ours(model, saved(tmp_path, kohya()[0]))
    assert str(applied) == "2 beside the weights"


def test_a_new_strength_does_not_read_the_file_again(tmp_path, state, monkeypatch):
    model, _ = build(tmp_path, state, "Q8_0")
    path, reads = saved(tmp_path, kohya()[0]), []
    read = host_lora.read_lora
    monkeypatch.setattr(host_lora, "read_lora", lambda *a: reads.append(a) or read(*a))
    one, _ = ours(model, path, 0.5)
    ours(model, path, 0.6)
    ours(one, path, 0.7)
    assert len(reads) == 1
    saved(tmp_path, kohya(seed=9)[0])
    os.utime(path, ns=(1, 1))
    changed, _ = ours(model, path, 0.5)
    assert len(reads) == 2 and not torch.equal(run(changed), run(one))
    for i in range(host_lora.FILES_KEPT):
        ours(model, saved(tmp_path, kohya()[0], f"{i}.safetensors"))
    assert len(model.get_attachment(host_lora.FILES_KEY)._files) == host_lora.FILES_KEPT


def test_comfyui_may_make_a_patch_again_on_tensors_elsewhere(tmp_path, state):
    """As its dynamic memory does, with `type(patch)(patch.loaded_keys, weights)`."""
    model, meant = build(tmp_path, state, "fp32")
    patched, _ = ours(model, saved(tmp_path, dora(meant[f"{QKV}.weight"])[0]), 0.6)
    ((_, patch, *_),) = patched.patches[f"diffusion_model.{QKV}.weight"]
    copies = tuple(w.clone() if isinstance(w, torch.Tensor) else w for w in patch.weights)
    again = type(patch)(patch.loaded_keys, copies)
    for tensor in patch.weights[1:]:
        tensor.zero_()
    weight = meant[f"{QKV}.weight"]
    new = dora(weight)[1]
    out = again.calculate_weight(weight.clone(), "key", 0.6, 1.0, None, None)
    torch.testing.assert_close(out, torch.lerp(weight, new, 0.6))
    assert isinstance(again, HostAdapter)


@pytest.mark.parametrize("make", [
    lambda path: path.write_bytes(b"\x10" * 40),
    lambda path: save_file({f"diffusion_model.{QKV}.lora_A.weight": torch.ones(4, 7),
                            f"diffusion_model.{QKV}.lora_B.weight": torch.ones(384, 4)}, path),
    lambda path: path.with_name("gone").touch(),
])  # fmt: skip
def test_a_bad_file_is_one_error_and_changes_nothing(tmp_path, state, make):
    model, _ = build(tmp_path, state, "Q8_0")
    before = run(model)
    path = tmp_path / "bad.safetensors"
    make(path)
    with pytest.raises(LoraError) as caught:
        ours(model, path)
    assert "bad.safetensors" in str(caught.value) and "\n" not in str(caught.value)
    assert not model.patches and torch.equal(run(model), before)
