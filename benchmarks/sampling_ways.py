"""The samplers and schedules that `sampling.py` compares: this pack's, and ComfyUI's own."""

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from chroma_nodes.samplers import SAMPLERS
from chroma_nodes.schedulers import get_sigmas
from torch import Tensor

# (model, x, sigmas) -> x
Sample = Callable[[Any, Tensor, Tensor], Tensor]

# Schedules by what their column is called: name, options, shift.
SCHEDULES: dict[str, tuple[str, dict[str, Any], float]] = {
    "beta .6": ("beta", {}, 1.0),
    "beta .4": ("beta", {"alpha": 0.4, "beta": 0.4}, 1.0),
    "beta .6, shift 3.16": ("beta", {}, 3.158),
    "simple": ("simple", {}, 1.0),
    "sigmoid_offset": ("sigmoid_offset", {}, 1.0),
    "sigmoid_offset, not anchored": ("sigmoid_offset", {"anchored": False}, 1.0),
    "bong_tangent": ("bong_tangent", {}, 1.0),
    "linear_quadratic": ("linear_quadratic", {}, 1.0),
    "kl_optimal": ("kl_optimal", {}, 1.0),
    "power_odds 2, 4": ("power_odds", {"p": 2.0, "a": 4.0}, 1.0),
    "power_odds 1.5, 2": ("power_odds", {"p": 1.5, "a": 2.0}, 1.0),
    "power_odds 2, 16": ("power_odds", {"p": 2.0, "a": 16.0}, 1.0),
    "power_odds 1.5, 4": ("power_odds", {"p": 1.5, "a": 4.0}, 1.0),
    "power_odds 2, 2": ("power_odds", {"p": 2.0, "a": 2.0}, 1.0),
    "power_odds 2, 8": ("power_odds", {"p": 2.0, "a": 8.0}, 1.0),
    "power_odds 2.5, 4": ("power_odds", {"p": 2.5, "a": 4.0}, 1.0),
    "optimal_steps": ("optimal_steps", {}, 1.0),
}
# ComfyUI's samplers that have a deterministic form, and how to get it.
COMFYUI: dict[str, dict[str, Any]] = {
    "euler": {}, "heun": {}, "dpm_2": {}, "lms": {}, "ipndm": {}, "deis": {}, "dpmpp_2m": {},
    "dpmpp_2m_sde": {"eta": 0.0}, "dpmpp_sde": {"eta": 0.0}, "dpmpp_2s_ancestral": {"eta": 0.0},
    "res_multistep": {}, "gradient_estimation": {}, "sa_solver": {"tau_func": lambda sigma: 0.0},
}  # fmt: skip
# Without their noise these are other samplers of the list.
SAME = {"euler_ancestral", "res_multistep_ancestral", "res_2m", "res_2s", "dpmpp_2m_sde",
        "euler_ancestral_cfg_pp", "euler_cfg_pp"}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One sampler without noise of its own; `calls(n)` are its evaluations in n steps."""

    name: str
    sample: Sample

    def calls(self, steps: int) -> int:
        """Counted on a model that always returns the same picture."""
        count = 0

        def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            nonlocal count
            count += 1
            return torch.zeros_like(x)

        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        self.sample(model, torch.ones(1, 1, 1, 1, dtype=torch.float64), sigmas)
        return count

    def steps(self, calls: int) -> int:
        """The most steps that need no more evaluations than `calls`."""
        return max((n for n in range(2, calls + 1) if self.calls(n) <= calls), default=0)


def ours() -> list[Way]:
    """Every sampler of this pack, with eta 0 where it has one."""
    found = []
    for name, function in SAMPLERS.items():
        if name in SAME:
            continue
        options = {"eta": 0.0} if "eta" in inspect.signature(function).parameters else {}
        found.append(Way(name, partial(function, disable=True, **options)))
    return found


def comfyui() -> list[Way]:
    """ComfyUI's own functions, from the checkout that COMFYUI_PATH names; none without it."""
    path = os.environ.get("COMFYUI_PATH")
    if path is None:
        return []
    sys.path.insert(0, path)
    argv, sys.argv = sys.argv, ["comfyui", "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.k_diffusion.sampling as theirs
        import comfy.model_sampling as model_sampling
    finally:
        sys.argv = argv
    kind = type("Flow", (model_sampling.ModelSamplingDiscreteFlow, model_sampling.CONST), {})
    flow = kind()
    flow.set_parameters(shift=1.0, multiplier=1.0)

    def adapt(function: Callable, options: dict[str, Any]) -> Sample:
        def sample(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
            return function(_Model(model, flow), x, sigmas, extra_args={}, disable=True, **options)

        return sample

    return [
        Way(f"ComfyUI {name}", adapt(getattr(theirs, f"sample_{name}"), options))
        for name, options in COMFYUI.items()
        if hasattr(theirs, f"sample_{name}")
    ]


class _Model:
    """A model as ComfyUI's samplers find it: with a patcher that knows it is a flow."""

    def __init__(self, model: Any, flow: Any) -> None:
        self.model = model
        self.inner_model = self
        self.model_patcher = self
        self.model_sampling = flow
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def get_model_object(self, _: str) -> Any:
        return self.model_sampling

    def __call__(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        return self.model(x, sigma)


def sigmas(schedule: str, steps: int) -> Tensor:
    """(steps + 1,) fp64."""
    name, options, shift = SCHEDULES[schedule]
    return get_sigmas(name, steps, shift=shift, **options).double()
