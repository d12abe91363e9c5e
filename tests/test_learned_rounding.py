"""Learned rounding against exhaustive search, rounding to nearest and the published methods."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from chroma_nodes.chroma.errors import ChromaError
from chroma_nodes.chroma.quant import calibrate, learned
from chroma_nodes.chroma.quant.gram import Gram
from chroma_nodes.chroma.quant.learned import output_error, quantise_fp8_learned
from chroma_nodes.chroma.quant.round_fp8 import quantise_fp8
from torch import nn

_spec = importlib.util.spec_from_file_location(
    "learned_rounding", Path(__file__).parent.parent / "benchmarks" / "learned_rounding.py"
)
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)

ROWS, COLUMNS = 72, 160


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weight():
    return (0.02 * normal(ROWS, COLUMNS)).bfloat16()


@pytest.fixture(scope="module")
def inputs():
    """Calibration and held-out inputs of one distribution."""
    return [benchmark.correlated(1024, COLUMNS, 3, sample) for sample in (0, 1)]


def decoded(codes, scale):
    return codes.view(torch.float8_e4m3fn).double() * scale.double()


@pytest.mark.parametrize("group", [4096, 48])
@pytest.mark.parametrize("square", [False, True])
def test_better_than_nearest_and_the_published_methods(weight, inputs, monkeypatch, group, square):
    monkeypatch.setattr(learned, "_GROUP", group)
    known, other = inputs
    h = known.T.double() @ known.double() / len(known)
    gram = Gram.of(h.float() if square else known, COLUMNS)
    assert gram.is_inputs is not square
    result = benchmark.compare(weight, gram, Gram.of(other, COLUMNS))
    assert result["learned rounding"] < 0.6
    assert result["learned rounding"] < min(result[name] for name in benchmark.PUBLISHED) * 0.7


def test_reported_errors_are_those_of_the_outputs(weight, inputs):
    rounded = quantise_fp8_learned(weight, Gram.of(inputs[0], COLUMNS))
    x, w = inputs[0].double(), weight.double()
    for codes, scale, reported in (
        (rounded.codes, rounded.scale, rounded.output_error),
        (*quantise_fp8(weight), rounded.nearest_error),
    ):
        outputs = x @ (w - decoded(codes, scale)).T
        assert reported == pytest.approx(float(outputs.square().sum(1).mean()), rel=1e-3)


def test_each_weight_goes_to_a_neighbour_and_the_scale_is_exact_in_bf16(weight, inputs):
    rounded = quantise_fp8_learned(weight, Gram.of(inputs[0], COLUMNS))
    assert rounded.scale == rounded.scale.bfloat16().float()
    x = weight.double() / rounded.scale.double()
    table = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    table = table[table.isfinite()].unique()
    q = decoded(rounded.codes, torch.ones(()))
    below = table[(torch.searchsorted(table, x, right=True) - 1)]
    above = table[torch.searchsorted(table, x)]
    assert ((q == below) | (q == above)).all()
    assert (q == below).any() and (q == above).any() and (x != q).any()


def test_near_the_best_of_all_choices(monkeypatch):
    """Exhaustive search over the 2^9 choices of each row, at the scale that was chosen."""
    monkeypatch.setattr(learned, "_DAMPING", 0.0)
    columns = 9
    weight = 0.02 * normal(12, columns, seed=5)
    x = normal(400, columns, seed=6) @ normal(columns, columns, seed=7)
    rounded = quantise_fp8_learned(weight, Gram.of(x, columns))
    scaled = weight.double() / rounded.scale.double()
    table = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    table = table[table.isfinite()].unique()
    below = table[torch.searchsorted(table, scaled, right=True) - 1]
    above = table[torch.searchsorted(table, scaled)]
    picks = torch.tensor(list(itertools.product((0, 1), repeat=columns))).bool()
    best = 0.0
    for row in range(len(weight)):
        error = scaled[row] - torch.where(picks, above[row], below[row])
        best += float((error @ x.double().T).square().sum(1).min() / len(x))
    best *= float(rounded.scale) ** 2
    assert best * 0.999 <= rounded.output_error <= best * 1.5
    assert rounded.nearest_error > best * 2


def test_without_calibration_it_is_the_nearest_at_the_best_scale(weight):
    rounded = quantise_fp8_learned(weight, None)
    nearest = (weight.float() / rounded.scale).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(rounded.codes, nearest)
    assert rounded.output_error <= rounded.nearest_error
    exact = (weight.double() - decoded(*quantise_fp8(weight))).square().sum()
    assert rounded.nearest_error == pytest.approx(float(exact), rel=1e-5)


def test_never_worse_than_nearest_and_always_the_same():
    for seed in range(5):
        weight, x = 0.02 * normal(8, 16, seed=seed), normal(4, 16, seed=seed + 50)
        gram = Gram.of(x, 16)
        first, second = (quantise_fp8_learned(weight, gram) for _ in range(2))
        assert torch.equal(first.codes, second.codes) and first.scale == second.scale
        assert first.output_error <= first.nearest_error


def test_odd_data():
    zeros = quantise_fp8_learned(torch.zeros(4, 8), Gram.of(normal(6, 8), 8))
    assert not (zeros.codes & 0x7F).any() and zeros.output_error == 0
    unused = normal(64, 8)
    unused[:, 3] = 0
    weight = normal(4, 8, seed=1)
    rounded = quantise_fp8_learned(weight, Gram.of(unused, 8))
    assert rounded.output_error <= rounded.nearest_error
    assert torch.isfinite(decoded(rounded.codes, rounded.scale)).all()
    silent = quantise_fp8_learned(weight, Gram.of(torch.zeros(5, 8), 8))
    assert silent.output_error == 0
    with pytest.raises(ChromaError, match="expected H"):
        Gram.of(normal(6, 9), 8)
    with pytest.raises(ChromaError, match="NaN or infinity"):
        Gram.of(torch.full((3, 8), torch.nan), 8)
    with pytest.raises(ChromaError, match="positive semi-definite"):
        quantise_fp8_learned(weight, Gram.of(torch.ones(8, 8) - 3 * torch.eye(8), 8))
    with pytest.raises(ChromaError, match="NaN or infinity"):
        quantise_fp8_learned(weight / 0, None)


def test_collected_is_what_the_layers_were_fed():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = [normal(4, 7, 6, seed=1), normal(2, 6, seed=2)]

    def run():
        for batch in batches:
            model(batch)

    found = calibrate.collect(model, run, ["0", "2"])
    x = torch.cat([batch.reshape(-1, 6) for batch in batches])
    hidden = torch.relu(model[0](x)).detach()
    for name, inputs in (("0", x), ("2", hidden)):
        expected = inputs.double().T @ inputs.double() / len(inputs)
        assert torch.allclose(found[name].double(), expected, atol=1e-6)
    every = calibrate.sample(model, run, ["0"], rows=100)["0"]
    assert torch.equal(every.float().sort(0)[0], x.bfloat16().float().sort(0)[0])
    some = calibrate.sample(model, run, ["0"], rows=9)["0"]
    rows = {tuple(row) for row in x.bfloat16().tolist()}
    assert len(some) == 9 == len({tuple(row) for row in some.tolist()} & rows)
    assert not model[0]._forward_pre_hooks
    with pytest.raises(ChromaError, match="no layer nine"):
        calibrate.collect(model, run, ["nine"])
    with pytest.raises(ChromaError, match="never used"):
        calibrate.collect(model, lambda: None, ["0"])


def test_output_error_is_the_trace(weight):
    codes, scale = quantise_fp8(weight)
    h = normal(COLUMNS, COLUMNS, seed=8)
    h = h @ h.T
    error = weight.double() - decoded(codes, scale)
    expected = float((error @ h.double() * error).sum())
    assert output_error(weight, codes, scale, Gram.of(h, COLUMNS)) == pytest.approx(expected, 1e-3)
