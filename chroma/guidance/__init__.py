"""Guidance: the transformer as samplers see it, and how its two predictions become one.

`plan` says what is wanted, `rules` holds the formulas, `run` applies them over one sampling run,
`denoiser` and `inpaint` wrap the transformer.
"""

from .denoiser import DenoiseFunction, Denoiser, repeat_rows
from .inpaint import InpaintDenoiser
from .plan import CURVES, Guidance, check_cfg
from .run import GuidanceRun

__all__ = [
    "CURVES",
    "DenoiseFunction",
    "Denoiser",
    "Guidance",
    "GuidanceRun",
    "InpaintDenoiser",
    "check_cfg",
    "repeat_rows",
]
