"""What we write in GGUF's formats, read by the gguf package."""

import gguf
import numpy as np
import pytest
import torch
from chroma_nodes.chroma.quant.gguf_encode import ENCODABLE, encode
from chroma_nodes.chroma.quant.gguf_formats import GGUF_FORMATS

K_FORMATS = {"Q4_K": 4, "Q5_K": 5, "Q6_K": 6}


def gaussian(rows=40, columns=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.02


def read(name, data):
    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), kind).copy())


def error(name, values):
    return float((read(name, encode(name, values)) - values).norm() / values.norm())


@pytest.mark.parametrize("name", [n for n in ENCODABLE if n not in K_FORMATS])
def test_simple_formats_are_llama_cpps_bytes(name):
    values = gaussian(300, 96)
    theirs = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(encode(name, values).numpy(), theirs)


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


@pytest.mark.parametrize("name", ENCODABLE)
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_zeros_constants_and_offsets_survive(name, shift):
    values = gaussian() + shift
    values[0] = 0
    values[1] = 0.5
    back = read(name, encode(name, values))
    assert torch.equal(back[0], torch.zeros(512))
    assert (back - values).abs().max() <= 0.08 * values.abs().max()


@pytest.mark.parametrize("name", ENCODABLE)
def test_our_decoder_reads_what_the_package_reads(name):
    data = encode(name, gaussian())
    assert torch.equal(GGUF_FORMATS[name].decode(data, None), read(name, data))


def test_what_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match="IQ4_XS cannot be written"):
        encode("IQ4_XS", gaussian())
    with pytest.raises(ValueError, match="do not fill blocks of 256"):
        encode("Q6_K", gaussian(columns=96))
    with pytest.raises(ValueError, match="not all finite"):
        encode("Q8_0", gaussian() * torch.inf)
