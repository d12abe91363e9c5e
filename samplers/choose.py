"""A sampler by its name, with its options set and checked before anything is computed."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..chroma.errors import SamplingError

Sampler = Callable[..., Tensor]


# What stands for a sampler's own eta where a number is needed.
OWN_ETA = -1.0


def own_or(eta: float) -> float | None:
    """eta, or None where it is OWN_ETA."""
    return None if eta == OWN_ETA else eta


def takes(sampler: Sampler, option: str) -> bool:
    """Whether a sampler has an option of this name."""
    return option in inspect.signature(sampler).parameters


def choose(
    samplers: Mapping[str, Sampler],
    name: str,
    eta: float | None = None,
    s_noise: float = 1.0,
    **options: Any,
) -> Sampler:
    """The named sampler with its options; eta None leaves the sampler's own.

    eta: share of noise that each step adds anew, 0 for none; s_noise scales that noise. Raises
    SamplingError for an unknown name, and for an option that the sampler does not have or cannot
    use.
    """
    if name not in samplers:
        raise SamplingError(f"unknown sampler '{name}'; expected one of {', '.join(samplers)}")
    sampler = samplers[name]
    if eta:
        options["eta"] = eta
    elif eta is not None and takes(sampler, "eta"):
        options["eta"] = 0.0
    if s_noise != 1:
        options["s_noise"] = s_noise
    for option, value in options.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise SamplingError(f"{option} of the sampler {name} is {value!r}; expected a number")
        if not takes(sampler, option):
            able = [other for other, function in samplers.items() if takes(function, option)]
            raise SamplingError(
                f"the sampler {name} has no {option}, so {value!r} cannot be used; leave it alone, "
                f"or choose one of {', '.join(able) or 'the others'}"
            )
    if not options:
        return sampler
    chosen = partial(sampler, **options)
    # A run of no steps: every sampler looks at its options first.
    chosen(None, torch.zeros(1, 1), torch.zeros(1), disable=True)
    return chosen
