"""Adapters beside a weight that stays as it is: the same as the changed weight, in few products."""

import pytest
import torch
import torch.nn.functional as F
from chroma_nodes.chroma.lora import adapters as kinds
from chroma_nodes.chroma.lora.adapters import changed
from chroma_nodes.chroma.lora.affine import PADDED_RANK, Affine, compose
from lora_adapters import MAKERS, SHAPE, K, N, base, dora, loha, lokr, low_rank, random
from torch.utils._python_dispatch import TorchDispatchMode

PARTS = ((0, 16), (16, 32), (32, 48))


class Products(TorchDispatchMode):
    """Names of the matrix products that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "mm" in name or name == "linear":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def agrees(placements, dtype=torch.float32, tolerance=2e-6) -> Affine:
    """Check against the changed weight, in fp64 products; returns what was checked."""
    weight, bias, x = base(), random(N, seed=71), random(2, 7, K, seed=72)
    affine = compose(placements, SHAPE, lambda: weight).to(None, dtype)
    product = Products()
    with product:
        y = affine.apply(x.to(dtype), lambda x: F.linear(x, weight.to(dtype)), bias.to(dtype))
    exact = F.linear(x.double(), changed(weight, placements).double(), bias.double())
    assert y.dtype == dtype and y.shape == (2, 7, N)
    assert (y.double() - exact).norm() <= tolerance * exact.norm()
    return affine


@pytest.mark.parametrize("strength", [1.0, -0.6, 0.3])
@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_equals_its_changed_weight(kind, strength):
    agrees([(MAKERS[kind](N), strength, None)])


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_on_some_rows(kind):
    agrees([(MAKERS[kind](16), 0.7, PARTS[1])])


@pytest.mark.parametrize("first", MAKERS)
def test_every_stack_of_two_kinds_in_order(first):
    for second in MAKERS:
        agrees([(MAKERS[first](N), 0.8, None), (MAKERS[second](N), 0.5, None)])
        agrees([(MAKERS[first](16), 0.8, PARTS[1]), (MAKERS[second](N), 0.5, None)])
        agrees([(MAKERS[first](N), 0.8, None), (MAKERS[second](16), 0.5, PARTS[2])])
        agrees([(MAKERS[first](16), 0.8, PARTS[0]), (MAKERS[second](16), 0.5, PARTS[0])])
        agrees([(MAKERS[first](16), 0.8, PARTS[0]), (MAKERS[second](16), 0.5, PARTS[2])])


def test_overlapping_rows_and_a_long_stack():
    wide = [(dora(True, n=32), 0.9, (8, 40)), (low_rank(n=16), 1.1, PARTS[1])]
    agrees([*wide, (lokr(n=32), 0.4, (0, 32)), (dora(True, n=24), 0.7, (20, 44))])
    agrees([(make(N), 0.3, None) for make in MAKERS.values()], tolerance=1e-5)


def test_low_rank_adapters_become_one_pair():
    placements = [(low_rank(4, seed=i), 0.2 * i, None) for i in (1, 2, 3)]
    placements += [(loha(2, seed=8), 0.5, None)]
    affine = agrees(placements)
    weight, x = base(), random(5, K, seed=3)
    y = F.linear(x, weight)
    with Products() as products:
        affine.apply(x, lambda _: y)
    assert affine.additive and not affine.dense
    assert products.names == ["mm", "addmm_"]  # 12 + 4 columns at once


@pytest.mark.parametrize("r", [4, PADDED_RANK])
def test_parts_of_a_fused_weight_share_the_product_down(r):
    placements = [(low_rank(r, seed=i, n=16), 1.0, rows) for i, rows in enumerate(PARTS)]
    affine = agrees(placements)
    weight, x = base(), random(5, K, seed=3)
    y = F.linear(x, weight)
    with Products() as products:
        affine.apply(x, lambda _: y)
    ups = 1 if 3 * r <= PADDED_RANK else 3
    assert products.names == ["mm"] + ups * ["addmm_"]
    assert affine.nbytes == 4 * (3 * r * K + (3 * r * N if ups == 1 else 3 * r * 16))


def test_lokr_needs_no_matrix_of_the_weights_size():
    affine = agrees([(lokr(), 1.0, None), (dora(True, lokr(seed=5)), 0.5, None)])
    assert not affine.dense and affine.nbytes < 4 * N * K


def test_the_weight_is_decoded_once_and_only_if_needed():
    def forbidden():
        raise AssertionError("decoded")

    plain = ("lora", "loha", "lokr", "oft", "boft", "oftv2", "diff", "set", "ia3 of rows")
    compose([(MAKERS[kind](N), 1.0, None) for kind in plain], SHAPE, forbidden)
    calls = []
    parts = [(dora(True, n=16), 1.0, rows) for rows in PARTS]
    compose(parts, SHAPE, lambda: calls.append(1) or base())
    assert calls == [1]


def test_strength_zero_is_nothing():
    affine = compose([(make(N), 0.0, None) for make in MAKERS.values()], SHAPE, base)
    assert affine.additive and affine.low_rank is None and not affine.others


def test_the_weights_own_product_may_contain_the_bias_where_it_stays_as_it_is():
    weight, bias, x = base(), random(N, seed=1), random(5, K, seed=3)
    affine = compose([(low_rank(), 1.0, None)], SHAPE, base)
    y = affine.apply(x, lambda x: F.linear(x, weight, bias))
    apart = affine.apply(x, lambda x: F.linear(x, weight), bias)
    assert affine.additive
    torch.testing.assert_close(y, apart)
    assert not compose([(dora(True), 1.0, None)], SHAPE, base).additive


def test_the_input_stays_as_it_is():
    for make in MAKERS.values():
        x = random(5, K, seed=3)
        compose([(make(N), 0.8, None)], SHAPE, base).apply(x, lambda x: F.linear(x, base()))
        assert torch.equal(x, random(5, K, seed=3))


@pytest.mark.parametrize("kind", MAKERS)
def test_bfloat16_is_as_exact_as_bfloat16_can_be(kind):
    agrees([(MAKERS[kind](N), 1.0, None)], torch.bfloat16, tolerance=8e-3)


def test_gains_near_one_survive_bfloat16():
    """1.003 is 1.0 in bfloat16: as a factor, it would change nothing."""
    weight, x = base(), random(500, K, seed=3).bfloat16()
    gains = weight.norm(dim=1) * 1.003
    nothing = kinds.LowRank(torch.zeros(1, K), torch.zeros(N, 1))
    affine = compose([(kinds.DoRA(nothing, gains, True), 1.0, None)], SHAPE, lambda: weight)
    plain = F.linear(x, weight.bfloat16())
    y = affine.to(None, torch.bfloat16).apply(x, lambda _: plain.clone()).float()
    assert (y * plain.float()).sum() / plain.float().square().sum() == pytest.approx(
        1.003, abs=2e-4
    )


def test_small_factors_survive_float16():
    """alpha / rank in the up factor alone would leave its values below 6e-5, with few bits."""
    adapter = kinds.LowRank(random(64, K, seed=1), random(N, 64, seed=2, scale=2e-5), alpha=0.5)
    affine = compose([(adapter, 0.5, None)], SHAPE, base).to(None, torch.float16)
    x = random(20, K, seed=3)
    y = affine.apply(x.half(), lambda x: x.new_zeros(20, N)).double()
    exact = F.linear(x.double(), 0.5 * 0.5 / 64 * (adapter.up.double() @ adapter.down.double()))
    # The result itself is of the size of fp16's subnormal numbers, 6e-8 apart.
    assert (y - exact).abs().max() < 3e-3 * exact.abs().max() + 6e-8
