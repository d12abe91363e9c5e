"""Ranks, truncation, `lora resize` and LoRAs into one LoRA: against numpy's SVD and plain sums."""

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import LoraError
from chroma_nodes.chroma.lora.read import read_lora
from chroma_nodes.chroma.lora.tools.concatenate import concatenate_loras
from chroma_nodes.chroma.lora.tools.resize import resize_lora
from chroma_nodes.chroma.lora.tools.rules import RankRule
from chroma_nodes.chroma.lora.tools.svd import quantile, truncate_matrix, truncate_product
from lora_producers import CONFIG, PRODUCERS, TEXT_CONFIG, numbers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

MODULE = "diffusion_model.single_blocks.0.linear1"


def save(path, state, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    return path


def deltas(path):
    """{parameter: its whole change} of additive adapters, fp64, by adding up rows."""
    lora, out = read_lora(path, CONFIG, TEXT_CONFIG), {}
    for part in (lora.transformer, lora.text_encoder):
        for key, placed in part.items():
            for one in placed:
                delta = one.adapter.delta(torch.device("cpu")).double()
                start, end = one.rows or (0, len(delta))
                height = {"qkv": 96, "linear1": 160}.get(key.split(".")[-2], len(delta))
                whole = out.setdefault(key, torch.zeros(height, *delta.shape[1:]).double())
                whole[start:end] += delta
    return out


def with_spectrum(n, k, values, seed=0):
    """A matrix (n, k) with these singular values."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((n, len(values))))
    v, _ = np.linalg.qr(rng.standard_normal((k, len(values))))
    return torch.from_numpy((u * np.asarray(values)) @ v.T).float()


@pytest.mark.parametrize("shape", [(600, 400), (300, 900)])
@pytest.mark.parametrize("decay", ["power", "flat", "steps"])
def test_truncation_comes_within_a_thousandth_of_the_least_error(shape, decay):
    """Eckart-Young: no matrix of that rank is nearer than numpy's truncated SVD."""
    side = min(shape)
    values = {
        "power": 1 / np.arange(1, side + 1) ** 0.7, "flat": np.linspace(1, 0.9, side),
        "steps": np.repeat([8.0, 1.0, 0.01], side // 3),
    }[decay]  # fmt: skip
    matrix = with_spectrum(*shape, values)
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    for rank in (1, 16, 40, side // 2):  # by iteration, and beyond a sixth of the side by Gram
        (factors, error) = truncate_matrix(matrix, RankRule(rank))
        least = np.sqrt((exact[rank:] ** 2).sum())
        found = float((matrix.double() - factors.up.double() @ factors.down.double()).norm())
        assert factors.rank == rank
        assert least * (1 - 1e-5) <= found <= 1.001 * least + 1e-5
        assert error == pytest.approx(found / float(matrix.norm()), rel=1e-2, abs=1e-4)


def test_energy_and_degenerate_matrices():
    matrix = with_spectrum(80, 50, 0.8 ** np.arange(50))
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    for energy in (0.5, 0.9, 0.999):
        rank = truncate_matrix(matrix, RankRule(energy=energy)).factors.rank
        shares = np.cumsum(exact) / exact.sum()
        assert shares[rank - 1] >= energy - 1e-6 and (rank == 1 or shares[rank - 2] < energy)
    nothing = truncate_matrix(torch.zeros(8, 5), RankRule(3))
    assert not nothing.factors.up.any() and nothing.error == 0
    one = torch.outer(torch.arange(8.0), torch.ones(5))
    (factors, error) = truncate_matrix(one, RankRule(4))
    assert torch.allclose(factors.up @ factors.down, one, atol=1e-4) and error < 1e-3


def test_a_product_is_decomposed_without_being_multiplied_out():
    up, down = numbers(70, 12), numbers(12, 45)
    wanted_u, values, wanted_v = np.linalg.svd((up.double() @ down.double()).numpy())
    (factors, error) = truncate_product(up, down, RankRule(5))
    wanted = wanted_u[:, :5] * values[:5] @ wanted_v[:5]
    assert np.allclose(factors.up.double() @ factors.down.double(), wanted, atol=1e-6)
    assert error == pytest.approx(np.sqrt((values[5:] ** 2).sum() / (values**2).sum()), rel=1e-5)
    balance = factors.up.norm(dim=0) / factors.down.norm(dim=1)
    assert torch.allclose(balance, torch.ones(5), atol=1e-4)


def test_measures_choose_the_least_rank_that_meets_them():
    values = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])
    assert RankRule(sv_ratio=4).choose(values) == 2  # values above 8 / 4
    assert RankRule(sv_ratio=4.1).choose(values) == 3
    assert RankRule(sv_cumulative=12 / 16).choose(values) == 2
    assert RankRule(sv_cumulative=0.76).choose(values) == 3
    squares = np.cumsum(np.array([64, 16, 4, 1, 1]))
    assert RankRule(sv_fro=np.sqrt(80 / 86) - 1e-6).choose(values) == 2
    assert RankRule(energy=squares[2] / 86 - 1e-6).choose(values) == 3
    assert RankRule(sv_fro=1.0).choose(values) == 5
    assert RankRule(rank=2, sv_fro=1.0).choose(values) == 2
    assert RankRule(sv_ratio=2).choose(torch.zeros(4)) == 1
    assert RankRule(rank=9).choose(values) == 5


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"sv_ratio": 0.5}, {"sv_fro": 0}, {"energy": 1.1},
              {"sv_cumulative": float("nan")}, {"sv_fro": 0.9, "sv_ratio": 2}],
)  # fmt: skip
def test_rules_without_a_meaning_are_errors(wrong):
    with pytest.raises(LoraError):
        RankRule(**wrong)


def test_quantiles_of_any_size():
    values = torch.randn(17_000_001, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError):
        torch.quantile(values, 0.99)
    assert quantile(values, 0.99) == pytest.approx(np.quantile(values.numpy(), 0.99), abs=1e-6)
    few = numbers(3, 7)
    for share in (0.0, 0.3, 0.5, 1.0):
        assert quantile(few, share) == pytest.approx(float(torch.quantile(few, share)), abs=1e-7)


@pytest.mark.parametrize("name", ["sd-scripts", "ai-toolkit lokr", "OneTrainer LoHa", "diffusers"])
def test_resized_files_are_numpys_truncation(name, tmp_path):
    source = save(tmp_path / "a.safetensors", PRODUCERS[name].state, PRODUCERS[name].metadata)
    out = tmp_path / "b.safetensors"
    written = resize_lora(source, out, RankRule(2), style="comfyui", config=CONFIG)
    found = deltas(out)
    for key, wanted in deltas(source).items():
        u, s, vh = np.linalg.svd(wanted.numpy(), full_matrices=False)
        best = torch.from_numpy(u[:, :2] * s[:2] @ vh[:2])
        assert (found[key] - best).norm() <= 2e-3 * wanted.norm(), key
        error = np.sqrt((s[2:] ** 2).sum())
        assert (found[key] - wanted).norm() <= 1.001 * error + 1e-5 * wanted.norm(), key
    assert all(min(t.shape) == 2 for t in load_file(out).values() if t.ndim == 2)
    assert any("rank 2" in note for note in written.notes)
    with safe_open(out, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "2"


def test_resizing_to_no_less_changes_nothing_and_style_and_dtype_stay(tmp_path):
    source = save(tmp_path / "a.safetensors", PRODUCERS["ComfyUI LoraSave"].state)
    out = tmp_path / "b.safetensors"
    resize_lora(source, out, RankRule(64), config=CONFIG)
    old, new = load_file(source), load_file(out)
    down, up = "double_blocks.1.img_mlp.0.lora_A.weight", "double_blocks.1.img_mlp.0.lora_B.weight"
    for name, theirs in ((down, "lora_down"), (up, "lora_up")):
        there = f"diffusion_model.{name.replace('lora_A', theirs).replace('lora_B', theirs)}"
        assert torch.equal(new[f"diffusion_model.{name}"], old[there])
    resize_lora(source, out, RankRule(2), dtype=torch.bfloat16, config=CONFIG)
    kinds = {t.dtype for name, t in load_file(out).items() if not name.endswith(".alpha")}
    assert kinds == {torch.bfloat16}


def test_a_doras_magnitudes_survive(tmp_path):
    source = save(tmp_path / "a.safetensors", PRODUCERS["ai-toolkit dora"].state)
    out = tmp_path / "b.safetensors"
    resize_lora(source, out, RankRule(2), config=CONFIG)
    name = "diffusion_model.double_blocks.1.img_mlp.0"
    stored = load_file(out)
    magnitude = load_file(source)[f"{name}.magnitude"]
    assert torch.equal(stored[f"{name}.dora_scale"].flatten(), magnitude)
    assert len(stored[f"{name}.lora_A.weight"]) == 2


def two_files(tmp_path):
    a = save(tmp_path / "a.safetensors", PRODUCERS["OneTrainer legacy"].state,
             {"ss_seed": "5", "ss_steps": "7", "modelspec.trigger_phrase": "a cat"})  # fmt: skip
    other = {name: t.half() if t.ndim else t for name, t in PRODUCERS["sd-scripts"].state.items()}
    b = save(tmp_path / "b.safetensors", other,
             {"ss_seed": "5", "ss_steps": "8", "modelspec.trigger_phrase": "a dog"})  # fmt: skip
    return a, b


@pytest.mark.parametrize("style", ["kohya", "diffusers", "comfyui"])
def test_one_lora_is_the_sum_of_several(style, tmp_path):
    """Split and fused, fp32 and fp16, each ratio once, a negative one among them."""
    a, b = two_files(tmp_path)
    out = tmp_path / "c.safetensors"
    concatenate_loras([(a, 0.5), (b, -1.3), (a, 2.0)], out, style=style, config=CONFIG)
    first, second, found = deltas(a), deltas(b), deltas(out)
    assert found.keys() == first.keys() | second.keys()
    for key in found:
        wanted = 2.5 * first[key] - 1.3 * second[key]
        assert (found[key] - wanted).norm() <= 1e-6 * wanted.norm(), key
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_seed"] == "5" and "ss_steps" not in metadata
    assert metadata["modelspec.trigger_phrase"] == "a cat, a dog"
    assert metadata["modelspec.merged_from"] == "a:0.5, b:-1.3, a:2"


def test_a_sum_resized_is_the_best_of_its_rank(tmp_path):
    a, b = two_files(tmp_path)
    out = tmp_path / "c.safetensors"
    concatenate_loras([(a, 1.0), (b, 0.5)], out, RankRule(3), style="kohya", config=CONFIG)
    first, second, found = deltas(a), deltas(b), deltas(out)
    for key in found:
        wanted = first[key] + 0.5 * second[key]
        values = np.linalg.svd(wanted.numpy(), compute_uv=False)
        least = np.sqrt((values[3:] ** 2).sum())
        assert (found[key] - wanted).norm() <= least + 1e-5 * wanted.norm(), key


def test_kinds_without_an_exact_sum(tmp_path):
    """LoKr and LoRA need a rank; a DoRA depends on the weight and has no sum at all."""
    shape = (160, 32)
    a = save(tmp_path / "a.safetensors",
             {f"{MODULE}.lokr_w1": numbers(40, 4), f"{MODULE}.lokr_w2": numbers(4, 8)})  # fmt: skip
    b = save(tmp_path / "b.safetensors", {f"{MODULE}.lora_A.weight": numbers(4, 32),
                                          f"{MODULE}.lora_B.weight": numbers(160, 4)})  # fmt: skip
    out = tmp_path / "c.safetensors"
    with pytest.raises(LoraError, match="rank"):
        concatenate_loras([(a, 1.0), (b, 1.0)], out, config=CONFIG)
    assert not out.exists()
    concatenate_loras([(a, 1.0), (b, 2.0)], out, RankRule(32), config=CONFIG)
    (found,) = deltas(out).values()
    wanted = sum(ratio * next(iter(deltas(path).values())) for path, ratio in ((a, 1), (b, 2)))
    assert found.shape == shape and (found - wanted).norm() <= 1e-5 * wanted.norm()
    concatenate_loras([(a, 3.0)], out, config=CONFIG)
    (found,), (wanted,) = deltas(out).values(), deltas(a).values()
    assert torch.allclose(found, 3 * wanted)
    dora = save(
        tmp_path / "d.safetensors", load_file(b) | {f"{MODULE}.dora_scale": numbers(160, 1)}
    )
    for sources in ([(dora, 1.0), (b, 1.0)], [(dora, 0.5)]):
        with pytest.raises(LoraError, match="checkpoint"):
            concatenate_loras(sources, out, RankRule(8), config=CONFIG)
