"""This pack's samplers, presets and seeds as nodes without ComfyUI."""

import logging
from typing import Any

from ...samplers import OWN_ETA, SAMPLERS, choose, own_or
from ...samplers.noise import RowSeeds
from ...samplers.options import OPTIONS
from ..noise import MAX_SEED
from ..option import Option
from ..presets import BASE, PRESETS, Preset
from .nodes_chroma import MODEL, schedule
from .schema import Input, NodeType
from .values import Context, Model, Noise

# The node of each sampler that has options of its own.
SAMPLER_NODES = {
    "flow_pec": "ChromaFlowPECSampler",
    "flash": "ChromaFlashSampler",
    "sa_solver": "ChromaSASolverSampler",
    "deis": "ChromaDEISSampler",
    "gradient_estimation": "ChromaGradientEstimationSampler",
    "res_2s": "ChromaRES2SSampler",
    "dpmpp_sde": "ChromaDPMppSDESampler",
}

log = logging.getLogger("chroma")


def sampler(_: Context, sampler_name: str, eta: float, s_noise: float):
    return (choose(SAMPLERS, sampler_name, own_or(eta), s_noise),)


def _sampler(name: str) -> NodeType:
    """The node of one sampler with its options."""

    def run(_: Context, **options: Any):
        return (choose(SAMPLERS, name, **options),)

    inputs = tuple(_input(option) for option in OPTIONS[name])
    return NodeType(SAMPLER_NODES[name], inputs, (("SAMPLER", "SAMPLER"),), run)


def _input(option: Option) -> Input:
    kind = "INT" if option.is_whole else "FLOAT"
    return Input(option.name, kind, option.default, option.low, option.high)


def apply_preset(model: Model, preset: Preset):
    """The model at the preset's shift, its sampler, and its sigmas."""
    model = model.with_constant_shift(preset.shift)
    (sigmas,) = schedule(
        model, preset.scheduler, preset.steps, 1.0, False, **preset.schedule_options
    )
    return model, SAMPLERS[preset.sampler], sigmas


def preset(_: Context, model: Model, preset: str):
    log.info("%s", PRESETS[preset])
    return *apply_preset(model, PRESETS[preset]), PRESETS[preset].cfg


def batch_noise(_: Context, noise_seed: int):
    return (Noise(RowSeeds.counting(noise_seed)),)


NODES = (
    NodeType(
        "ChromaSampler",
        (
            Input("sampler_name", "COMBO", BASE.sampler, choices=tuple(SAMPLERS)),
            Input("eta", "FLOAT", OWN_ETA, OWN_ETA, 10.0),
            Input("s_noise", "FLOAT", 1.0, 0.0, 10.0),
        ),
        (("SAMPLER", "SAMPLER"),),
        sampler,
    ),
    *map(_sampler, SAMPLER_NODES),
    NodeType(
        "ChromaPreset",
        (MODEL, Input("preset", "COMBO", next(iter(PRESETS)), choices=tuple(PRESETS))),
        (("MODEL", "MODEL"), ("SAMPLER", "SAMPLER"), ("SIGMAS", "SIGMAS"), ("cfg", "FLOAT")),
        preset,
    ),
    NodeType(
        "ChromaBatchNoise",
        (Input("noise_seed", "INT", 0, 0, MAX_SEED, is_seed=True),),
        (("NOISE", "NOISE"),),
        batch_noise,
    ),
)
