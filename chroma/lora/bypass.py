"""A plain layer with adapters beside its weight."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..quant.beside import Layer
from .affine import Affine


class BypassLinear(Layer, nn.Linear):
    """A linear layer on the parameters of another one, which stay as they are."""

    def __init__(self, layer: nn.Linear, affine: Affine) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.weight, self.bias = layer.weight, layer.bias
        self.affine = affine

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""

        def product(x: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, self.weight, bias)

        return self.adapted(input, product, self.bias)
