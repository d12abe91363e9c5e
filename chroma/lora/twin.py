"""A second model on the first one's weights."""

import copy
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def twin(model: Model) -> Model:
    """Modules of its own on the same parameters: what is replaced in one stays in the other."""
    return _twin(model, {})


def _twin(module: Model, made: dict[nn.Module, nn.Module]) -> Model:
    if module in made:  # under a second name
        return made[module]  # pyright: ignore[reportReturnType]
    other = made[module] = copy.copy(module)
    other._parameters = dict(module._parameters)
    other._buffers = dict(module._buffers)
    other._modules = {
        name: None if child is None else _twin(child, made)
        for name, child in module._modules.items()
    }
    return other
