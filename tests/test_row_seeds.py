"""Batches in which every row has its own seed: each row is what its seed gives alone."""

import copy

import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.chroma.noise import MAX_SEED, make_noise
from chroma_nodes.samplers import SAMPLERS, choose, takes
from chroma_nodes.samplers.noise import RowSeeds, noise_source

NOISY = [name for name, sampler in SAMPLERS.items() if takes(sampler, "eta")]
SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0])
SHAPE = (16, 4, 8)


def picture(x, sigma, uncond_callback=None, seed=None):
    """A model whose picture depends on x and sigma, for each row alone."""
    if uncond_callback is not None:
        uncond_callback(0.5 * x)
    return 0.3 * (2 * x).sin() + 0.1 * sigma.view(-1, 1, 1, 1)


def run(name, seeds, **options):
    """All rows together, or the one row of a plain seed."""
    rows = seeds.rows if isinstance(seeds, RowSeeds) else [seeds]
    x = make_noise((len(rows), *SHAPE), seeds)
    sampler = choose(SAMPLERS, name, **options)
    return sampler(picture, x, SIGMAS, extra_args={"seed": seeds}, disable=True)


@pytest.mark.parametrize("name", NOISY)
def test_every_row_is_the_run_of_its_own_seed(name):
    seeds = [7, 3, MAX_SEED, 7]
    together = run(name, RowSeeds.of(seeds), eta=1.0)
    alone = torch.cat([run(name, seed, eta=1.0) for seed in seeds])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert torch.equal(together[0], together[3])
    assert float((together[0] - together[1]).abs().mean()) > 0.05
    quiet = torch.cat([run(name, seed, eta=0.0) for seed in seeds])
    assert float((together - quiet).abs().mean()) > 1e-3


def test_noise_of_every_row_and_step_is_torchs_own():
    seeds, x = RowSeeds.of([5, 11]), torch.zeros(2, *SHAPE)
    for seed, row in zip((5, 11), make_noise(x.shape, seeds), strict=True):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(row, torch.randn(SHAPE, generator=generator))
    draw = noise_source(x, {"seed": seeds}, None)
    drawn = [draw(1.0, 0.5), draw(0.5, 0.2)]
    for i, seed in enumerate((5, 11)):
        generator = torch.Generator().manual_seed(seed + 1)
        for step in drawn:
            assert torch.equal(step[i], torch.randn(SHAPE, generator=generator))


def test_seeds_count_up_from_the_first_and_round_the_end():
    seeds = RowSeeds.counting(MAX_SEED - 1)
    assert seeds == MAX_SEED - 1 and seeds.take(4) == [MAX_SEED - 1, MAX_SEED, 0, 1]
    assert copy.deepcopy(seeds).take(2) == seeds.take(2)
    assert torch.equal(make_noise((3, 2), seeds)[2:], make_noise((1, 2), 0))


def test_seeds_that_do_not_fit_are_one_line():
    with pytest.raises(SamplingError, match="no seeds; expected one for each picture"):
        RowSeeds.of([])
    with pytest.raises(SamplingError, match="2 seeds do not fit a batch of 3 pictures"):
        make_noise((3, 4), RowSeeds.of([1, 2]))
    with pytest.raises(SamplingError, match="2 seeds do not fit a batch of 3 pictures"):
        noise_source(torch.zeros(3, 4), {"seed": RowSeeds.of([1, 2])}, None)
