"""How a layer multiplies by its matrix: exactly, or in 8 bits where that was asked for.

Shapes: N output features, K input features.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .floats import E4M3, INT8
from .kernels import available
from .matmul_exact import linear
from .matmul_fp8 import linear_fp8, takes_fp8
from .matmul_int8 import PackedWeight, linear_int8, takes_int8
from .round_fp8 import quantise_fp8
from .round_int8 import quantise_int8
from .scratch import Scratch
from .tensor import QuantTensor

EXACT = "exact"
EIGHT_BIT = ("int8", "fp8")

# What is outside the blocks stays exact: the approximator steers every layer, and the first and
# last layers see the picture itself; together they are 4 % of the weights.
_IN_BLOCKS = re.compile(r"(double|single)_blocks\.\d+\..+\.weight")
log = logging.getLogger("chroma")

Matrix = Tensor | QuantTensor


def in_8_bits(
    state: Mapping[str, Matrix], products: str, device: torch.device, free: int
) -> dict[str, Matrix]:
    """The state dict with the blocks' matrices ready for products in "int8" or "fp8".

    Matrices of that format keep their bytes, others are rounded to it. Those that their file's
    maker wants multiplied in full precision are left alone. A device without such products, or
    with fewer than the needed bytes `free`, gets the state dict as it is, with a warning.
    """
    found = available(device)
    if not {"int8": found.int8, "fp8": found.fp8_matmul}[products]:
        reason = found.reasons["int8" if products == "int8" else "fp8_matmul"]
        log.warning("Products in %s are not possible here: %s. They stay exact.", products, reason)
        return dict(state)
    chosen = [n for n, w in state.items() if _IN_BLOCKS.fullmatch(n) and w.ndim == 2]
    needed = sum(state[name].numel() for name in chosen)
    if needed > free:
        log.warning(
            "Products in %s need %.1f GB and %.1f GB are free. They stay exact.",
            products, needed / 1e9, free / 1e9,
        )  # fmt: skip
        return dict(state)
    return {**state, **{name: _in_8_bits(state[name], products) for name in chosen}}


def _in_8_bits(weight: Matrix, products: str) -> Matrix:
    takes, target = (takes_int8, INT8) if products == "int8" else (takes_fp8, E4M3)
    shape = (weight.shape[0], weight.shape[1])
    if not takes(shape):
        return weight
    if isinstance(weight, QuantTensor):
        if weight.full_precision:
            return weight
        if weight.format is target:
            scale = torch.ones(()) if weight.scale is None else weight.scale
            return replace(weight, scale=scale, eight_bit=True)
        weight = weight.dequantise(torch.float32)
    data, scale = (quantise_int8 if products == "int8" else quantise_fp8)(weight)
    return QuantTensor(target, data, scale, shape, eight_bit=True)


def product(
    x: Tensor,
    weight: QuantTensor,
    bias: Tensor | None,
    scratch: Scratch,
    packed: PackedWeight | None = None,
) -> Tensor:
    """x (..., K) to (..., N) as the weight is marked; exact where x needs a gradient.

    `packed` is the weight in the layout of this CPU's int8 products, if it is held in that.
    """
    scale = weight.scale
    wanted = x.requires_grad or (bias is not None and bias.requires_grad)
    if not weight.eight_bit or scale is None or (wanted and torch.is_grad_enabled()):
        weight = weight if packed is None else replace(weight, data=packed.unpacked())
        return linear(x, weight, bias, scratch)
    if weight.format.name == INT8.name:  # torch.compile makes other objects of formats
        return linear_int8(x, packed or weight.data, scale, bias, scratch)
    return linear_fp8(x, weight.data, scale, bias, weight.input_scale)
