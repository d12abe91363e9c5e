"""Layers whose matrix stays in the format it is stored in."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .matmul_exact import Scratch, linear
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
        return replace(self._described, data=self.weight.data, scale=self.weight_scale)


class QuantLinear(StoredWeight):
    """y = x W^T + b in x's dtype, with W's exact values.

    `scratch` lends the memory in which W is decoded; the layers of one model share it.
    """

    def __init__(self, weight: QuantTensor, bias: Tensor | None, scratch: Scratch) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scratch = scratch

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), where x is: a matrix kept elsewhere is sent there in its bytes."""
        bias = None if self.bias is None else self.bias.to(x)
        return linear(x, self.stored.to(x.device), bias, self.scratch)


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
