"""What we write in GGUF's formats, read by the gguf package."""

import gguf
import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import ChromaError
from chroma_nodes.chroma.quant.gguf_encode import ENCODABLE, encode
from chroma_nodes.chroma.quant.gguf_formats import GGUF_FORMATS

# Relative error of each simple format for normally distributed weights.
SIMPLE = {"Q8_0": 0.0054, "Q5_1": 0.038, "Q5_0": 0.043, "Q4_1": 0.078, "Q4_0": 0.086}
K_FORMATS = {"Q4_K": 4, "Q5_K": 5, "Q6_K": 6}


def gaussian(rows=40, columns=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.02


def read(name, data):
    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), kind).copy())


def error(name, values):
    return float((read(name, encode(name, values)) - values).norm() / values.norm())


def awkward():
    """Heavy tails, zeros, constants, both signs, values between two steps, very small and large."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(300, 96, generator=generator).pow(3)
    values[0] = 0
    values[1], values[2] = 0.5, -0.5
    values[3] = torch.arange(96) / 2 - 24
    values[4:40] = torch.randint(-254, 255, (36, 96), generator=generator) / 2
    values[40:50] *= 1e-9
    values[50:60] *= 1e-30
    values[60:70] *= 65504 / values[60:70].abs().max()
    values[70:80] = values[70:80].abs()
    values[80:90] = -values[80:90].abs()
    return values


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize("values", [gaussian(300, 96), awkward()], ids=["gaussian", "awkward"])
def test_simple_formats_are_llama_cpps_bytes(name, values):
    theirs = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(encode(name, values).numpy(), theirs)


@pytest.mark.parametrize("name", SIMPLE)
def test_errors_are_the_formats_own(name):
    assert error(name, gaussian(200)) == pytest.approx(SIMPLE[name], rel=0.02)


def min_max(values, bits):
    """Plain rounding between the extremes of every 32 columns, with scales in full precision."""
    groups = values.unflatten(1, (-1, 32))
    low = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - low) / (2**bits - 1)
    return (((groups - low) / step).round() * step + low).flatten(1)


@pytest.mark.parametrize("name", K_FORMATS)
def test_k_formats_beat_plain_rounding_by_extremes(name):
    values = gaussian()
    plain = float((min_max(values, K_FORMATS[name]) - values).norm() / values.norm())
    assert error(name, values) < plain


def test_more_bits_are_closer():
    values = gaussian()
    errors = [error(name, values) for name in ("Q8_0", "Q6_K", "Q5_K", "Q4_K")]
    assert errors == sorted(errors)
    assert errors[0] < 0.006 and errors[1] < 0.02 and errors[3] < 0.08


@pytest.mark.parametrize("name", K_FORMATS)
def test_k_formats_beat_the_simple_one_of_as_many_bits(name):
    simple = {"Q4_K": "Q4_1", "Q5_K": "Q5_1", "Q6_K": "Q5_1"}[name]
    heavy_tails = 1e4 * gaussian().pow(3)
    assert error(name, heavy_tails) < error(simple, heavy_tails)


@pytest.mark.parametrize("name", ENCODABLE)
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_zeros_constants_and_offsets_survive(name, shift):
    values = gaussian() + shift
    values[0] = 0
    values[1], values[2] = 0.5, -0.5
    back = read(name, encode(name, values))
    assert torch.equal(back[0], torch.zeros(512))
    assert (back[1:3] - values[1:3]).abs().max() < 0.002
    assert (back - values).abs().max() <= 0.08 * values.abs().max()


@pytest.mark.parametrize("name", K_FORMATS)
@pytest.mark.parametrize("size", [0.1, 0.01, 0.002, 0.001])
def test_small_weights_are_as_close(name, size):
    """Their scales are among fp16's subnormal numbers, a few steps from zero."""
    values = gaussian()
    assert error(name, size * values) < 1.15 * error(name, values)


def test_rows_do_not_depend_on_each_other():
    values = gaussian(260)
    whole = encode("Q5_K", values)
    assert torch.equal(whole[255:258], encode("Q5_K", values[255:258]))


@pytest.mark.parametrize("name", ENCODABLE)
def test_our_decoder_reads_what_the_package_reads(name):
    data = encode(name, gaussian())
    assert torch.equal(GGUF_FORMATS[name].decode(data, None), read(name, data))


def test_what_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match="IQ4_XS cannot be written"):
        encode("IQ4_XS", gaussian())
    with pytest.raises(ValueError, match="do not fill blocks of 256"):
        encode("Q6_K", gaussian(columns=96))
    for number in (torch.inf, -torch.inf, torch.nan, 1e6, -1e6):
        values = gaussian()
        values[3, 5] = number
        with pytest.raises(ChromaError, match="not all finite and within 65504"):
            encode("Q8_0", values)
