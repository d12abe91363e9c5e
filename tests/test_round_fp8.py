"""fp8 and int8 rounding against torch's casts and a search over all codes."""

import pytest
import torch
from chroma_nodes.chroma.errors import ChromaError
from chroma_nodes.chroma.quant.round_fp8 import fp8_scale, quantise_fp8, to_e4m3
from chroma_nodes.chroma.quant.round_int8 import quantise_int8


def test_every_value_goes_to_the_nearest_code():
    """By search over the table of the 127 magnitudes, in fp64."""
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    middles = (table[1:] + table[:-1]) / 2
    around = [middles, middles * (1 + 1e-6), middles * (1 - 1e-6), table]
    values = torch.cat([*around, torch.tensor([449.0, 463.0, 470.0, 1e6]).double()])
    values = torch.cat([values, -values]).float()
    distance = (values.double().abs()[:, None] - table).abs()
    # Of two codes as near, the even one: the order in which argmin looks at them decides.
    order = torch.cat([torch.arange(0, 127, 2), torch.arange(1, 127, 2)])
    expected = order[distance[:, order].argmin(1)].to(torch.uint8)
    expected |= values.signbit().to(torch.uint8) << 7
    assert torch.equal(to_e4m3(values), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrix_equals_torchs_cast(dtype):
    weight = (0.02 * torch.randn(300, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    codes, scale = quantise_fp8(weight)
    assert scale.shape == () and scale.dtype == torch.float32
    assert scale == weight.float().abs().max() / 448
    expected = (weight.float() / scale).to(torch.float8_e4m3fn)
    assert torch.equal(codes, expected.view(torch.uint8))
    assert int((codes & 0x7F).max()) == 0x7E


@pytest.mark.parametrize("quantise", [quantise_fp8, quantise_int8])
def test_zeros_and_the_tiniest_numbers(quantise):
    codes, scale = quantise(torch.zeros(3, 4))
    assert not codes.any() and (scale == 1).all()
    codes, scale = quantise(torch.full((2, 4), 1e-44))
    assert torch.isfinite(scale).all() and (scale > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(bad):
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    weight[2, 1] = bad
    for quantise in (quantise_fp8, quantise_int8, fp8_scale):
        with pytest.raises(ChromaError, match="NaN or infinity"):
            quantise(weight)


def test_int8_has_a_scale_for_each_row():
    weight = torch.randn(300, 40, generator=torch.Generator().manual_seed(1))
    weight *= torch.logspace(-3, 3, 300)[:, None]
    codes, scale = quantise_int8(weight.bfloat16())
    exact = weight.bfloat16().double()
    assert scale.shape == (300, 1) and codes.dtype == torch.int8
    assert torch.allclose(scale.double(), exact.abs().amax(1, keepdim=True) / 127, rtol=1e-6)
    assert ((codes.double() * scale - exact).abs() <= scale.double() * 0.5001).all()
