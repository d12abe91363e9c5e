"""Changed weights equal to those of the libraries that train the adapters, and to ComfyUI's.

PEFT and LyCORIS where they are installed; ComfyUI needs COMFYUI_PATH and its environment.
"""

import pytest
import torch
from chroma_nodes.chroma.lora import adapters as kinds
from comfy_inprocess import import_comfyui
from lora_adapters import SHAPE, K, N, base, generator, random
from torch import nn

STRENGTHS = [1.0, 0.6, -0.4]


def linear(n: int = N) -> nn.Linear:
    layer = nn.Linear(K, n)
    with torch.no_grad():
        layer.weight.copy_(base(shape=(n, K)))
    return layer.requires_grad_(False)


def randomise(module: nn.Module, scale: float) -> None:
    """Random values for every trainable parameter, but random gains for magnitudes near theirs."""
    g = generator(3)
    for name, value in module.named_parameters():
        noise = torch.randn(value.shape, generator=g)
        if "dora_scale" in name or "magnitude" in name or "rescale" in name:
            value.data *= 1 + 0.2 * noise
        elif value.requires_grad:
            value.data = scale * noise


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor, weight: torch.Tensor) -> None:
    """The changes equal to 1e-5 of their size."""
    theirs = theirs.detach()
    assert (theirs - weight).norm() > 0.02 * weight.norm()
    assert (ours - theirs).norm() <= 1e-5 * (theirs - weight).norm()


def adapter_of(state: dict, **options) -> kinds.Adapter:
    """The adapter of a file's tensors by LyCORIS' suffixes, as the reader puts them together."""
    if "alpha" in state and "alpha" not in options:
        options["alpha"] = float(state["alpha"])
    if "lora_up.weight" in state:
        adapter = kinds.LowRank(state["lora_down.weight"], state["lora_up.weight"], **options)
    elif "hada_w1_a" in state:
        factors = (state[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        adapter = kinds.LoHa(*factors, **options)
    elif "a1.weight" in state:
        factors = (state[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
        adapter = kinds.GLoRA(*factors, **options)
    elif "oft_blocks" in state:
        blocks = state["oft_blocks"]
        kind = kinds.OFT if blocks.ndim == 3 else kinds.BOFT
        adapter = kind(blocks, state.get("rescale"), options["alpha"])
    else:
        whole = {i: state.get(f"lokr_w{i}") for i in (1, 2)}
        pairs = {i: (state.get(f"lokr_w{i}_a"), state.get(f"lokr_w{i}_b")) for i in (1, 2)}
        adapter = kinds.LoKr(
            *(pairs[i] if whole[i] is None else whole[i] for i in (1, 2)), **options
        )
    magnitude = state.get("dora_scale")
    if magnitude is not None:
        adapter = kinds.DoRA(adapter, magnitude, per_row=magnitude.shape[0] != 1)
    adapter.fit(SHAPE)
    return adapter


def lycoris(name: str, scale: float = 0.3, **options):
    """(the module, random and wrapped around a layer; its file's tensors)."""
    modules = pytest.importorskip("lycoris.modules")
    layer = linear()
    torch.manual_seed(0)
    module = getattr(modules, name)("layer", layer, 1.0, **options)
    randomise(module, scale)
    state = module.custom_state_dict() if hasattr(module, "custom_state_dict") else None
    state = module.state_dict() if state is None else state
    return module, {name: value.detach() for name, value in state.items()}


def effective(module: nn.Module, strength: float) -> torch.Tensor:
    """The weight that a wrapped layer multiplies by: what is trained.

    LyCORIS 4.1's get_merged_weight scales LoHa and LoKr by alpha / rank twice.
    """
    module.multiplier = strength
    nothing = module(torch.zeros(1, K))
    return (module(torch.eye(K)) - nothing).T


LYCORIS = {
    "lora": ("LoConModule", dict(lora_dim=4, alpha=2)),
    # LyCORIS saves alpha times the root of the rank: nothing remains to be done.
    "rslora": ("LoConModule", dict(lora_dim=4, alpha=2, rs_lora=True)),
    "loha": ("LohaModule", dict(lora_dim=3, alpha=2)),
    "lokr, whole": ("LokrModule", dict(lora_dim=100000, alpha=1, factor=4)),
    "lokr, w2 in factors": ("LokrModule", dict(lora_dim=2, alpha=3, factor=4)),
    "lokr, both in factors": ("LokrModule", dict(lora_dim=2, alpha=9, factor=8,
                                                 decompose_both=True)),
    "glora": ("GLoRAModule", dict(lora_dim=3, alpha=2)),
    "oft": ("DiagOFTModule", dict(lora_dim=8)),
    "boft": ("ButterflyOFTModule", dict(lora_dim=6)),
}  # fmt: skip


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris(name, strength):
    kind, options = LYCORIS[name]
    module, state = lycoris(kind, **options)
    ours = adapter_of(state).change(base(), strength)
    assert_equal(ours, effective(module, strength), base())


@pytest.mark.parametrize("kind", ["LoConModule", "LohaModule", "LokrModule"])
@pytest.mark.parametrize("on_out", [True, False])
def test_lycoris_dora(kind, on_out):
    """At strength 1: at others, LyCORIS interpolates from the merged weight, not from W."""
    options = dict(lora_dim=3, alpha=2, weight_decompose=True, wd_on_out=on_out, factor=4)
    module, state = lycoris(kind, **options)
    adapter = adapter_of(state)
    assert adapter.per_row == on_out
    assert_equal(adapter.change(base(), 1.0), effective(module, 1.0), base())


@pytest.mark.parametrize("kind, size", [("DiagOFTModule", 8), ("ButterflyOFTModule", 6)])
def test_lycoris_orthogonal_with_rescaling_and_a_constraint(kind, size):
    options = dict(lora_dim=size, rescaled=True, constraint=0.05)
    module, state = lycoris(kind, **options)
    adapter = adapter_of(state)
    assert_equal(adapter.change(base(), 1.0), effective(module, 1.0), base())
    free = type(adapter)(adapter.blocks, adapter.rescale)
    assert (free.change(base(), 1.0) - adapter.change(base(), 1.0)).norm() > 0.1 * base().norm()


def test_lycoris_full_and_norm():
    modules = pytest.importorskip("lycoris.modules")
    full = modules.FullModule("layer", layer := linear())
    before, bias = layer.weight.clone(), layer.bias.clone()
    randomise(full, 0.1)
    diff, diff_b = full.get_diff_weight(1.0)
    merged, merged_b = full.get_merged_weight(1.0)
    assert_equal(kinds.Diff(diff.detach()).change(before, 1.0), merged, before)
    assert_equal(kinds.Diff(diff_b.detach()).change(bias, 1.0), merged_b, bias)
    norm = modules.NormModule("norm", layer := nn.LayerNorm(K))
    randomise(norm, 0.3)
    changes = (kinds.Diff(norm.w_norm.detach()), kinds.Diff(norm.b_norm.detach()))
    for change, own, merged in zip(
        changes, (layer.weight, layer.bias), norm.get_merged_weight(0.6), strict=True
    ):
        change.fit((K,))
        torch.testing.assert_close(change.change(own.detach(), 0.6), merged.detach())


@pytest.mark.parametrize("on_input", [True, False])
def test_lycoris_ia3(on_input):
    module, state = lycoris("IA3Module", train_on_input=on_input)
    adapter = kinds.IA3(state["weight"], bool(state["on_input"]))
    adapter.fit(SHAPE)
    assert_equal(adapter.change(base(), 0.6), effective(module, 0.6), base())


def peft_layer(config, scale: float = 0.3) -> tuple[dict, torch.Tensor]:
    """(the file's tensors of one layer, its merged weight)."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(linear()), config(peft))
    randomise(model, scale)
    prefix = "base_model.model.0."
    state = peft.get_peft_model_state_dict(model)
    tensors = {k.removeprefix(prefix): v.detach().clone() for k, v in state.items()}
    return tensors, model.merge_and_unload()[0].weight


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("decomposed", [False, True])
def test_peft_lora(stabilised, decomposed):
    options = dict(use_rslora=stabilised, use_dora=decomposed, init_lora_weights=False)
    state, merged = peft_layer(
        lambda peft: peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **options)
    )
    down, up = state["lora_A.weight"], state["lora_B.weight"]
    adapter = kinds.LowRank(down, up, None, 6.0, rank_stabilised=stabilised)
    if decomposed:
        adapter = kinds.DoRA(adapter, state["lora_magnitude_vector"], per_row=True)
    adapter.fit(SHAPE)
    assert_equal(adapter.change(base(), 1.0), merged, base())


def test_peft_loha():
    state, merged = peft_layer(lambda peft: peft.LoHaConfig(r=3, alpha=2, target_modules=["0"]))
    assert_equal(adapter_of(state, alpha=2.0).change(base(), 1.0), merged, base())


@pytest.mark.parametrize("both", [True, False])
def test_peft_lokr(both):
    state, merged = peft_layer(
        lambda peft: peft.LoKrConfig(
            r=2, alpha=3, decompose_factor=8, decompose_both=both, target_modules=["0"]
        )
    )
    assert_equal(adapter_of(state, alpha=3.0).change(base(), 1.0), merged, base())


@pytest.mark.parametrize("neumann", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_peft_oft(neumann, shared):
    state, merged = peft_layer(
        lambda peft: peft.OFTConfig(
            oft_block_size=8,
            block_share=shared,
            use_cayley_neumann=neumann,
            target_modules=["0"],
        ),
        scale=0.1,
    )
    adapter = kinds.OFTv2(state["oft_R.weight"], neumann)
    adapter.fit(SHAPE)
    assert_equal(adapter.change(base(), 1.0), merged, base())


def comfy_change(tensors: dict, strength: float, rows=None, weight=None) -> torch.Tensor:
    """The weight as ComfyUI patches it with a file's tensors, by their suffixes."""
    import_comfyui()
    import comfy.lora

    patch = comfy.lora.load_lora({f"m.{k}": v for k, v in tensors.items()}, {"m": "m.weight"})
    offset = None if rows is None else (0, rows[0], rows[1] - rows[0])
    patches = [(strength, patch["m.weight"], 1.0, offset, None)]
    weight = base() if weight is None else weight
    return comfy.lora.calculate_weight(patches, weight.clone(), "m.weight")


def lora_tensors(n: int = N, seed: int = 1) -> dict:
    return {
        "lora_down.weight": random(4, K, seed=seed, scale=0.3),
        "lora_up.weight": random(n, 4, seed=seed + 1, scale=0.3),
        "alpha": torch.tensor(2.0),
    }


def factors(scale: float = 0.4, **shapes) -> dict:
    made = {k: random(*shape, seed=i, scale=scale) for i, (k, shape) in enumerate(shapes.items())}
    return {**made, "alpha": torch.tensor(3.0)}


COMFY = {
    "lora": lora_tensors(),
    "loha": factors(hada_w1_a=(N, 3), hada_w1_b=(3, K), hada_w2_a=(N, 3), hada_w2_b=(3, K)),
    "lokr, whole": factors(lokr_w1=(6, 4), lokr_w2=(8, 8)),
    "lokr, w2 in factors": factors(lokr_w1=(6, 4), lokr_w2_a=(8, 2), lokr_w2_b=(2, 8)),
    "lokr, w1 in factors": factors(lokr_w1_a=(6, 2), lokr_w1_b=(2, 4), lokr_w2=(8, 8)),
    "glora": factors(**{"a1.weight": (K, 3), "a2.weight": (3, K),
                        "b1.weight": (N, 3), "b2.weight": (3, K)}),
    "glora, older": factors(**{"a1.weight": (3, K), "a2.weight": (K, 3),
                               "b1.weight": (3, K), "b2.weight": (N, 3)}),
    "dora of columns": {**lora_tensors(), "dora_scale": 0.5 + random(1, K, seed=7).abs()},
    "dora of columns of a loha": {
        **factors(hada_w1_a=(N, 3), hada_w1_b=(3, K), hada_w2_a=(N, 3), hada_w2_b=(3, K)),
        "dora_scale": 0.5 + random(1, K, seed=7).abs(),
    },
}  # fmt: skip


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", COMFY)
def test_comfyui(name, strength):
    theirs = comfy_change(COMFY[name], strength)
    assert_equal(adapter_of(COMFY[name]).change(base(), strength), theirs, base())


@pytest.mark.parametrize(
    "shape, rescaled", [((6, 8), False), ((3, 12, 4), False), ((3, 12, 4), True)]
)
def test_comfyui_orthogonal(shape, rescaled):
    """At strength 1: at others, ComfyUI applies the strength twice. It does not rescale OFT."""
    blocks = random(*shape, shape[-1], seed=2, scale=0.3)
    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}
    if rescaled:
        tensors["rescale"] = 1 + random(N, 1, seed=3, scale=0.2)
    ours = adapter_of(tensors).change(base(), 1.0)
    assert_equal(ours, comfy_change(tensors, 1.0), base())


@pytest.mark.parametrize("strength", STRENGTHS)
def test_comfyui_split_rows(strength):
    ours = theirs = base()
    for i, rows in enumerate(((0, 16), (16, 32), (32, 48))):
        tensors = {**lora_tensors(16, seed=5 * i), "dora_scale": 0.5 + random(1, K, seed=i).abs()}
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        adapter = kinds.DoRA(kinds.LowRank(down, up, None, 2.0), tensors["dora_scale"], False)
        ours = kinds.changed(ours, [(adapter, strength, rows)])
        theirs = comfy_change(tensors, strength, rows, theirs)
    assert_equal(ours, theirs, base())


def test_comfyui_diff_and_set():
    diff = random(N, K, seed=1, scale=0.2)
    theirs = comfy_change({"diff": diff}, 0.6)
    assert_equal(kinds.Diff(diff).change(base(), 0.6), theirs, base())
    theirs = comfy_change({"set_weight": diff}, 1.0)
    assert_equal(kinds.SetWeight(diff).change(base(), 1.0), theirs, base())
    norm, own = random(K, seed=2), random(K, seed=3)
    theirs = comfy_change({"w_norm": norm}, 0.6, weight=own)
    assert_equal(kinds.Diff(norm).change(own, 0.6), theirs, own)
