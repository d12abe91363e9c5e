"""Schedules: numbers in, sigmas out, falling to 0. Each in two forms: exact, and as ComfyUI has it.

exact:  x_sigmas(steps, *, shift, ...) -> (steps + 1,) fp32 from 1 to 0
compat: x_sigmas_compat(steps, table, ...) -> at most steps + 1 entries of the table, then 0
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..chroma.errors import SamplingError
from .beta import beta57_sigmas, beta57_sigmas_compat, beta_sigmas, beta_sigmas_compat
from .bong_tangent import bong_tangent_sigmas, bong_tangent_sigmas_compat
from .kl_optimal import kl_optimal_sigmas, kl_optimal_sigmas_compat
from .linear_quadratic import linear_quadratic_sigmas, linear_quadratic_sigmas_compat
from .normal import normal_sigmas, normal_sigmas_compat
from .optimal_steps import optimal_steps_sigmas, optimal_steps_sigmas_compat
from .power_odds import power_odds_sigmas, power_odds_sigmas_compat
from .rounding import MAX_STEPS, check_steps
from .sigmoid_offset import sigmoid_offset_sigmas, sigmoid_offset_sigmas_compat
from .simple import simple_sigmas, simple_sigmas_compat

SCHEDULERS: dict[str, Callable[..., Tensor]] = {
    "beta": beta_sigmas,
    "beta57": beta57_sigmas,
    "sigmoid_offset": sigmoid_offset_sigmas,
    "simple": simple_sigmas,
    "normal": normal_sigmas,
    "bong_tangent": bong_tangent_sigmas,
    "power_odds": power_odds_sigmas,
    "optimal_steps": optimal_steps_sigmas,
    "linear_quadratic": linear_quadratic_sigmas,
    "kl_optimal": kl_optimal_sigmas,
}
SCHEDULERS_COMPAT: dict[str, Callable[..., Tensor]] = {
    "beta": beta_sigmas_compat,
    "beta57": beta57_sigmas_compat,
    "sigmoid_offset": sigmoid_offset_sigmas_compat,
    "simple": simple_sigmas_compat,
    "normal": normal_sigmas_compat,
    "bong_tangent": bong_tangent_sigmas_compat,
    "power_odds": power_odds_sigmas_compat,
    "optimal_steps": optimal_steps_sigmas_compat,
    "linear_quadratic": linear_quadratic_sigmas_compat,
    "kl_optimal": kl_optimal_sigmas_compat,
}


def get_sigmas(
    name: str,
    steps: int,
    *,
    shift: float = 1.0,
    denoise: float = 1.0,
    compat_table: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The named schedule, fp32; with `compat_table` in ComfyUI's rounded form.

    denoise below 1 keeps the last `steps` steps of a schedule of steps / denoise, as ComfyUI does;
    0 or less gives no sigmas at all. Raises SamplingError for an unknown name or unusable values.
    """
    if name not in SCHEDULERS:
        raise SamplingError(f"unknown scheduler '{name}'; expected one of {', '.join(SCHEDULERS)}")
    if not (math.isfinite(denoise) and denoise <= 1):
        raise SamplingError(f"denoise {denoise} is not usable; expected a number from 0 to 1")
    check_steps(steps)
    schedule = SCHEDULERS[name] if compat_table is None else SCHEDULERS_COMPAT[name]
    known = inspect.signature(schedule).parameters
    if unknown := [option for option in options if option not in known]:
        raise SamplingError(f"the scheduler {name} has no option '{unknown[0]}'")
    if denoise <= 0:
        return torch.zeros(0)
    if steps / denoise >= MAX_STEPS + 1:
        raise SamplingError(
            f"denoise {denoise} at {steps} steps needs a schedule of {steps / denoise:.0f} steps; "
            f"expected at most {MAX_STEPS}, so raise denoise or lower steps"
        )
    total = int(steps / denoise)
    if compat_table is None:
        sigmas = schedule(total, shift=shift, **options)
    else:
        sigmas = schedule(total, compat_table, **options)
    return sigmas[-(steps + 1) :]
