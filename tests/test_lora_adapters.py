"""The adapters' own rules: formulas where no library is a better oracle, bad tensors, movement."""

import dataclasses

import pytest
import torch
from chroma_nodes.chroma.errors import LoraError
from chroma_nodes.chroma.lora import adapters as kinds
from lora_adapters import (
    MAKERS,
    SHAPE,
    K,
    N,
    base,
    boft,
    dora,
    glora,
    loha,
    lokr,
    low_rank,
    oft,
    oftv2,
    random,
)


@pytest.mark.parametrize("kind", MAKERS)
def test_strength_zero_is_the_weight_and_the_weight_is_left_as_it_was(kind):
    adapter, weight = MAKERS[kind](N), base()
    assert torch.equal(adapter.change(weight, 0.0), weight)
    new = adapter.change(weight, 1.0)
    assert torch.equal(weight, base())
    assert new.shape == SHAPE and new.dtype == torch.float32
    assert (new - weight).norm() > 0.05 * weight.norm()


@pytest.mark.parametrize("kind", MAKERS)
def test_factors_of_16_bits_are_multiplied_in_32(kind):
    half = MAKERS[kind](N).to(None, torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in half.tensors())
    same_values = half.to("cpu", torch.float32)
    assert torch.equal(half.change(base(), 0.7), same_values.change(base(), 0.7))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_kind_fits_its_weight_and_no_other(kind):
    adapter = MAKERS[kind](N)
    adapter.fit(SHAPE)
    others = [(N, K, 1), (N,), (N + 4, K + 4)]
    if kind != "oftv2, one block for all":  # 8 columns serve 48 as well as 32
        others.append((K, N))
    for shape in others:
        with pytest.raises(LoraError) as error:
            adapter.fit(shape)
        assert "\n" not in str(error.value) and adapter.kind in str(error.value)


def test_factors_of_different_ranks_are_refused():
    lora, ha, kr, gl = low_rank(), loha(), lokr(whole=(False, True)), glora()
    cases = [
        dataclasses.replace(lora, up=lora.up[:, :3]),
        dataclasses.replace(ha, w2_a=ha.w2_a[:, :1]),
        dataclasses.replace(kr, w1=(kr.w1[0][:, :1], kr.w1[1])),
        dataclasses.replace(gl, b2=gl.b2[:2]),
    ]
    for adapter in cases:
        with pytest.raises(LoraError, match="rank"):
            adapter.fit(SHAPE)
    with pytest.raises(LoraError, match="rank 4 in down, but 3 in up"):
        cases[0].fit(SHAPE)


def test_tensors_that_are_no_matrices_are_refused():
    lora, blocks = low_rank(), oft().blocks
    cases = [
        dataclasses.replace(lora, down=torch.ones(K)),
        dataclasses.replace(lora, mid=torch.ones(3, 4)),
        kinds.DoRA(lora, torch.ones(N), per_row=False),
        kinds.OFT(blocks[0]),
        kinds.OFT(blocks, torch.ones(N - 1)),
        kinds.BOFT(blocks),
        kinds.BOFT(torch.zeros(5, 12, 4, 4)),  # 2^4 * 4 = 64 do not divide 48
        kinds.OFTv2(torch.zeros(4, 27)),
        kinds.OFTv2(torch.zeros(3, 28)),
    ]
    for adapter in cases:
        with pytest.raises(LoraError):
            adapter.fit(SHAPE)


def test_alpha_and_rank():
    lora = low_rank(4, alpha=2.0)
    product = lora.up @ lora.down
    change = lora.change(torch.zeros(SHAPE), 3.0)
    torch.testing.assert_close(change, 3.0 * 2.0 / 4 * product)
    stable = dataclasses.replace(lora, rank_stabilised=True)
    torch.testing.assert_close(stable.change(torch.zeros(SHAPE), 1.0), 2.0 / 2 * product)
    plain = dataclasses.replace(lora, alpha=None)
    torch.testing.assert_close(plain.change(torch.zeros(SHAPE), 1.0), product)
    assert (lora.rank, loha(2).rank, lokr().rank, glora(3).rank) == (4, 2, None, 3)
    assert lokr(whole=(True, False)).rank == dora(True).inner.rank - 2 == 2


def test_lokr_of_whole_factors_ignores_alpha():
    """ai-toolkit writes alpha 1e10 beside them."""
    junk = dataclasses.replace(lokr(), alpha=1e10)
    whole = torch.kron(junk.w1, junk.w2)
    torch.testing.assert_close(junk.change(torch.zeros(SHAPE), 1.0), whole)


def test_factors_stored_as_convolutions():
    lora = low_rank()
    conv = kinds.LowRank(lora.down[..., None, None], lora.up[..., None, None])
    conv.fit(SHAPE)
    assert torch.equal(conv.change(base(), 1.0), lora.change(base(), 1.0))


@pytest.mark.parametrize("per_row", [True, False])
def test_dora_sets_the_norms_of_the_changed_weight(per_row):
    adapter = dora(per_row)
    new, direction = adapter.change(base(), 1.0), adapter.inner.change(base(), 1.0)
    axis = 1 if per_row else 0
    torch.testing.assert_close(new.norm(dim=axis), adapter.magnitude)
    cosine = torch.cosine_similarity(new, direction, dim=axis)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    half = adapter.change(base(), 0.5)
    torch.testing.assert_close(half, (base() + new) / 2)


@pytest.mark.parametrize("per_row", [True, False])
def test_dora_of_q_k_and_v_takes_the_norms_of_each(per_row):
    parts = [(dora(per_row, seed=i, n=16), 0.7, (16 * i, 16 * i + 16)) for i in range(3)]
    fused = kinds.changed(base(), parts)
    apart = [a.change(base()[slice(*rows)], s) for a, s, rows in parts]
    assert torch.equal(fused, torch.cat(apart))


def test_rotations_keep_the_norms():
    weight = base()
    for adapter in (oft(), boft(), oftv2(neumann=False)):
        new = adapter.change(weight, 1.0)
        axis = 1 if isinstance(adapter, kinds.OFTv2) else 0
        torch.testing.assert_close(new.norm(dim=axis), weight.norm(dim=axis))


def test_oftv2_scaled_is_the_vectors_over_twice_the_root():
    vectors = random(4, 28, seed=3, scale=0.1)
    scaled = kinds.OFTv2(vectors, scaled=True).change(base(), 1.0)
    by_hand = kinds.OFTv2(vectors / (2 * 7**0.5)).change(base(), 1.0)
    torch.testing.assert_close(scaled, by_hand)


def test_differences_of_vectors():
    bias, diff = random(N, seed=1), random(N, seed=2)
    kinds.Diff(diff).fit((N,))
    torch.testing.assert_close(kinds.Diff(diff).change(bias, -0.5), bias - 0.5 * diff)
    torch.testing.assert_close(kinds.SetWeight(diff).change(bias, 1.0), diff)
    with pytest.raises(LoraError, match="expected"):
        kinds.Diff(diff).fit((K,))
