"""Every GGUF format means, to the last bit, what the gguf package says."""

import warnings

import gguf
import numpy as np
import pytest
import torch
from chroma_nodes.chroma.quant.ggml_types import GGML_TYPES
from chroma_nodes.chroma.quant.gguf_formats import GGUF_FORMATS
from chroma_nodes.chroma.quant.tensor import QuantTensor, concatenate

COLUMNS = 768


def package_values(data, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])


def random_rows(name, rows=300, seed=0):
    """Rows of random bytes, without blocks whose scales happen to be NaN or infinite."""
    fmt = GGUF_FORMATS[name]
    count = rows * COLUMNS // fmt.block
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (count + count // 4, fmt.block_bytes), dtype=np.uint8)
    finite = np.isfinite(package_values(blocks, name)).all(1)
    data = blocks[finite][:count].reshape(rows, fmt.row_bytes(COLUMNS))
    stored = QuantTensor(fmt, torch.from_numpy(data), None, (rows, COLUMNS))
    return stored, torch.from_numpy(package_values(data, name))


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_values_are_the_packages_bit_for_bit(name):
    stored, values = random_rows(name)
    assert torch.equal(stored.rows(slice(None)), values)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(stored.dequantise(dtype), values.to(dtype))


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_one_row_of_one_block(name):
    fmt = GGUF_FORMATS[name]
    data = np.random.default_rng(3).integers(0, 64, (1, fmt.block_bytes), dtype=np.uint8)
    assert torch.equal(
        fmt.decode(torch.from_numpy(data), None), torch.from_numpy(package_values(data, name))
    )


# Where each format keeps its fp16 numbers.
HALVES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("scale", [2.0**-24, -3 * 2.0**-24, -1.5, -65504.0, 0.0])
def test_subnormal_negative_and_extreme_scales(name, scale):
    fmt = GGUF_FORMATS[name]
    data = np.random.default_rng(4).integers(0, 256, (40, fmt.block_bytes), dtype=np.uint8)
    for start in HALVES[name]:
        data[:, start : start + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    rows = torch.from_numpy(data.reshape(2, -1))
    values = torch.from_numpy(package_values(data.reshape(2, -1), name))
    assert torch.equal(fmt.decode(rows, None), values)


def test_the_package_decodes_no_more_formats():
    """But for floats, and NVFP4, whose second scale is another tensor."""
    plain = {"F32", "F16", "BF16", "NVFP4"}
    for kind in gguf.GGMLQuantizationType:
        if kind.name in plain or kind.name in GGUF_FORMATS:
            continue
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        with pytest.raises(NotImplementedError):
            gguf.quants.dequantize(block, kind)


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


def test_the_table_of_types_is_the_packages():
    theirs = {kind.name: (int(kind), *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {name: tuple(GGML_TYPES[name]) for name in theirs} == theirs
