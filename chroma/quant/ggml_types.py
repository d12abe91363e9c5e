"""ggml's tensor types: number in a file, values in a block, bytes of a block (ggml's ggml.h).

A table of our own, so that GGUF files of the common types are read and written where the gguf
package is missing, as after installing the pack without its requirements.
"""

from typing import NamedTuple


class GGMLType(NamedTuple):
    """A type's number in the file; `block` values of a row take `block_bytes` bytes."""

    number: int
    block: int
    block_bytes: int


GGML_TYPES = {
    "F32": GGMLType(0, 1, 4), "F16": GGMLType(1, 1, 2), "BF16": GGMLType(30, 1, 2),
    "F64": GGMLType(28, 1, 8),
    "I8": GGMLType(24, 1, 1), "I16": GGMLType(25, 1, 2), "I32": GGMLType(26, 1, 4),
    "I64": GGMLType(27, 1, 8),
    "Q4_0": GGMLType(2, 32, 18), "Q4_1": GGMLType(3, 32, 20), "Q5_0": GGMLType(6, 32, 22),
    "Q5_1": GGMLType(7, 32, 24), "Q8_0": GGMLType(8, 32, 34), "Q8_1": GGMLType(9, 32, 40),
    "Q2_K": GGMLType(10, 256, 84), "Q3_K": GGMLType(11, 256, 110), "Q4_K": GGMLType(12, 256, 144),
    "Q5_K": GGMLType(13, 256, 176), "Q6_K": GGMLType(14, 256, 210), "Q8_K": GGMLType(15, 256, 292),
    "IQ2_XXS": GGMLType(16, 256, 66), "IQ2_XS": GGMLType(17, 256, 74),
    "IQ3_XXS": GGMLType(18, 256, 98), "IQ1_S": GGMLType(19, 256, 50),
    "IQ4_NL": GGMLType(20, 32, 18), "IQ3_S": GGMLType(21, 256, 110), "IQ2_S": GGMLType(22, 256, 82),
    "IQ4_XS": GGMLType(23, 256, 136), "IQ1_M": GGMLType(29, 256, 56),
    "TQ1_0": GGMLType(34, 256, 54), "TQ2_0": GGMLType(35, 256, 66),
    "MXFP4": GGMLType(39, 32, 17), "NVFP4": GGMLType(40, 64, 36), "Q1_0": GGMLType(41, 128, 18),
}  # fmt: skip
