"""A file on disk to a ready module."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..autoencoder import Autoencoder
from ..devices import free_memory
from ..quant.layers import QuantLinear, pack, place
from ..quant.products import EXACT, in_8_bits
from ..quant.tensor import QuantTensor
from ..text.t5 import T5Encoder
from ..transformer import ChromaTransformer
from .check import check_state
from .read import expanded, misshapen, read_autoencoder, read_text_encoder, read_transformer
from .stored import State

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")


def load_transformer(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    operations: Any = nn,
    expand: bool = False,
    products: str = EXACT,
) -> ChromaTransformer:
    """A transformer ready to run, in the file's own dtype unless one is given.

    Quantised matrices stay as they are stored unless `expand` asks for them in that dtype.
    With `products` "int8" or "fp8" the blocks multiply in 8 bits if the device can; on a CPU the
    model then stays there.
    """
    config, state = read_transformer(path)
    model = _build(path, ChromaTransformer, config, operations)
    return fill(model, state, path, dtype, device, expand, products)


def load_text_encoder(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    operations: Any = nn,
    expand: bool = False,
) -> T5Encoder:
    """A T5 encoder ready to run, in the file's own dtype unless one is given.

    Quantised matrices stay as they are stored unless `expand` asks for them in that dtype.
    """
    config, state = read_text_encoder(path)
    model = _build(path, T5Encoder, config, operations)
    return fill(model, state, path, dtype, device, expand)


def load_autoencoder(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    operations: Any = nn,
) -> Autoencoder:
    """An autoencoder ready to run, in the file's own dtype unless one is given."""
    config, state = read_autoencoder(path)
    model = _build(path, Autoencoder, config, operations)
    return fill(model, dict(state), path, dtype, device, expand=False)


def _build(
    path: Path, model: Callable[[Config, Any], Model], config: Config, operations: Any
) -> Model:
    """The model without memory for its weights, which come out of the file."""
    try:
        with torch.device("meta"):
            return model(config, operations)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise misshapen(path, error) from None


def fill(
    model: Model,
    state: State,
    path: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    expand: bool,
    products: str = EXACT,
) -> Model:
    """Give a model on the meta device its weights, without a second copy where none is needed.

    A file of several dtypes is loaded in that of most of its weights, unless one is given; what is
    stored in fewer bits stays so, unless it is to be expanded and memory allows that.
    """
    check_state(model, state, path)
    dtype = dtype or main_dtype(state)
    if expand:
        state = expanded(state, dtype, free_memory(device), path)
    device = torch.device(device)
    if products != EXACT:
        state = in_8_bits(state, products, device, free_memory(device))
    place(model, state, dtype, QuantLinear)
    del state  # packing makes a second copy, of one matrix after another
    model = model.to(device=device).eval().requires_grad_(False)
    if device.type == "cpu":
        pack(model)
    return model


def main_dtype(state: State) -> torch.dtype:
    """The float that most of the plain weights are in; bf16 where the matrices are quantised."""
    sizes: Counter[torch.dtype] = Counter()
    for weight in state.values():
        if isinstance(weight, QuantTensor):
            return torch.bfloat16
        sizes[weight.dtype] += weight.numel()
    return sizes.most_common(1)[0][0]
