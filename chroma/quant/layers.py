"""Layers whose matrix stays in the format it is stored in."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .beside import Layer
from .floats import INT8
from .matmul_int8 import PackedWeight, prepack
from .products import product
from .scratch import Scratch
from .tensor import QuantTensor

MakeLinear = Callable[[QuantTensor, Tensor | None, Scratch], nn.Module]
MakeEmbedding = Callable[[QuantTensor, torch.dtype], nn.Module]


class StoredWeight(nn.Module):
    """One stored matrix as a module: its bytes are a parameter that no cast to a float changes."""

    weight_scale: Tensor | None

    def __init__(self, weight: QuantTensor) -> None:
        super().__init__()
        self._described = replace(weight, data=torch.empty(0), scale=None)
        self.weight = nn.Parameter(weight.data, requires_grad=False)
        # No parameter: what merges or lists a model's parameters must not take it for a weight.
        self.register_buffer("weight_scale", weight.scale, persistent=False)

    @property
    def stored(self) -> QuantTensor:
        """The matrix, where its parameters are now."""
        return self._held()

    def _held(self) -> QuantTensor:
        return replace(self._described, data=self.weight.data, scale=self.weight_scale)


class QuantLinear(Layer, StoredWeight):
    """y = x W^T + b in x's dtype: with W's exact values, or in 8 bits where W is marked so.

    `scratch` lends the memory in which W is decoded; the layers of one model share it. `affine`
    holds adapters that are computed in x's dtype beside the stored matrix.
    """

    packed: PackedWeight | None = None

    def __init__(self, weight: QuantTensor, bias: Tensor | None, scratch: Scratch) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scratch = scratch

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), where x is: a matrix kept elsewhere is sent there in its bytes."""
        weight = self._held().to(x.device)

        def own_product(x: Tensor, bias: Tensor | None) -> Tensor:
            return product(x, weight, bias, self.scratch, self.packed)

        return self.adapted(x, own_product, None if self.bias is None else self.bias.to(x))

    @property
    def stored(self) -> QuantTensor:
        """The matrix, where its parameters are now."""
        weight = self._held()
        return weight if self.packed is None else replace(weight, data=self.packed.unpacked())

    def pack(self) -> None:
        """Hold a matrix for int8 products in this CPU's own layout, instead of its bytes."""
        weight = self.stored
        if weight.eight_bit and weight.format is INT8:
            self.packed = prepack(weight.data)
            self.weight = nn.Parameter(weight.data.new_empty(0), requires_grad=False)


class QuantEmbedding(StoredWeight):
    """Rows of a stored table; only those that are asked for are decoded."""

    def __init__(self, weight: QuantTensor, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype

    def forward(self, tokens: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """(...) int64 -> (..., K) in `out_dtype`, else in the dtype given at the start."""
        rows = self.stored.rows(tokens.flatten().to(self.weight.device))
        return rows.to(tokens.device, out_dtype or self.dtype).unflatten(0, tokens.shape)


def pack(model: nn.Module) -> None:
    """Prepare a model that stays on its CPU for int8 products, layer by layer."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.pack()


def place(
    model: nn.Module,
    state: Mapping[str, Tensor | QuantTensor],
    dtype: torch.dtype,
    linear: MakeLinear = QuantLinear,
    embedding: MakeEmbedding = QuantEmbedding,
) -> None:
    """Give a model without weights the ones of a complete state dict, plain ones in `dtype`.

    `linear` and `embedding` make the layers of stored matrices; they share one scratch memory.
    """
    scratch = Scratch()
    floats = {n: w.to(dtype) for n, w in state.items() if isinstance(w, Tensor)}
    for name, weight in state.items():
        if not isinstance(weight, QuantTensor):
            continue
        module = name.removesuffix(".weight")
        if isinstance(model.get_submodule(module), nn.Embedding):
            layer = embedding(weight, dtype)
        else:
            layer = linear(weight, floats.pop(f"{module}.bias", None), scratch)
        parent, _, leaf = module.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    model.load_state_dict(floats, strict=False, assign=True)
