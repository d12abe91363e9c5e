"""Every GGUF format means, to the last bit, what the gguf package says."""

import warnings

import gguf
import numpy as np
import pytest
import torch
from chroma_nodes.chroma.quant.gguf_formats import GGUF_FORMATS
from chroma_nodes.chroma.quant.tensor import QuantTensor, concatenate

COLUMNS = 768


def random_rows(name, rows=300, seed=0):
    """Rows of random bytes, without those whose scales happen to be NaN or infinite."""
    fmt, kind = GGUF_FORMATS[name], gguf.GGMLQuantizationType[name]
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (40 * rows, fmt.row_bytes(COLUMNS)), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = gguf.quants.dequantize(data, kind)
    finite = np.isfinite(values).all(1)
    data, values = data[finite][:rows], values[finite][:rows]
    assert len(data) > 10
    shape = (len(data), COLUMNS)
    return QuantTensor(fmt, torch.from_numpy(data), None, shape), torch.from_numpy(values)


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_values_are_the_packages_bit_for_bit(name):
    stored, values = random_rows(name)
    assert torch.equal(stored.rows(slice(None)), values)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(stored.dequantise(dtype), values.to(dtype))


def test_single_rows_are_those_of_the_whole():
    stored, values = random_rows("Q5_K")
    index = torch.tensor([7, 0, 7])
    assert torch.equal(stored.rows(index), values[index])


def test_matrices_below_each_other():
    (first, top), (second, bottom) = random_rows("Q8_0"), random_rows("Q8_0", seed=1)
    whole = concatenate([first, second])
    assert torch.equal(whole.dequantise(torch.float32), torch.cat([top, bottom]))
    other, _ = random_rows("Q4_0")
    with pytest.raises(ValueError, match="differ in format or width"):
        concatenate([first, other])


def test_columns_fill_whole_blocks():
    with pytest.raises(ValueError, match="100 columns do not fill blocks of 32, which Q8_0 needs"):
        GGUF_FORMATS["Q8_0"].row_bytes(100)
