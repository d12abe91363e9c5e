"""Our samplers, schedules and shifts in the form ComfyUI takes them."""

import math
from functools import partial
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.samplers
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..chroma.errors import SamplingError
from ..chroma.noise import make_noise
from ..chroma.presets import Preset
from ..samplers import SAMPLERS
from ..samplers.noise import RowSeeds
from ..schedulers import SCHEDULERS, get_sigmas

PREFIX = "chroma_"


def check_flow(model_sampling: object) -> None:
    """Raises SamplingError unless a MODEL with this sampling predicts the velocity of a flow."""
    if not isinstance(model_sampling, comfy.model_sampling.CONST):
        raise SamplingError("this MODEL is not a flow model; expected Chroma")


def model_shift(model_sampling: object) -> float:
    """The shift a of a flow MODEL's sampling, which takes time 1/2 to sigma a / (a + 1).

    One formula for ComfyUI's two ways to state it: a itself (AuraFlow, SD3) and ln a (Flux).
    Raises SamplingError for other models.
    """
    check_flow(model_sampling)
    middle = model_sampling.percent_to_sigma(0.5)
    return middle / (1 - middle)


def schedule(
    model: ModelPatcher, name: str, steps: int, denoise: float, compat: bool, **options: float
) -> Tensor:
    """The named schedule at the MODEL's shift, (steps + 1,), or fewer where `compat` rounds."""
    sampling = model.get_model_object("model_sampling")
    form = {"compat_table": sampling.sigmas.cpu()} if compat else {"shift": model_shift(sampling)}
    return get_sigmas(name, steps, denoise=denoise, **form, **options)


def set_constant_shift(model: ModelPatcher, shift: float) -> ModelPatcher:
    """A clone that samples at `shift`, with the numbers of ComfyUI's ModelSamplingAuraFlow.

    Raises SamplingError unless the MODEL is a flow model.
    """
    flow = comfy.model_sampling.ModelSamplingDiscreteFlow
    # Multiplier 1: the transformer takes sigma itself and multiplies by 1000 on its own.
    return _set_sampling(model, flow, shift=shift, multiplier=1.0)


def set_flux_shift(model: ModelPatcher, shift: float) -> ModelPatcher:
    """A clone that samples at `shift`, with the numbers of ComfyUI's ModelSamplingFlux.

    Raises SamplingError unless the MODEL is a flow model.
    """
    return _set_sampling(model, comfy.model_sampling.ModelSamplingFlux, shift=math.log(shift))


def _set_sampling(model: ModelPatcher, base: type, **parameters: float) -> ModelPatcher:
    check_flow(model.get_model_object("model_sampling"))
    kind = type("ChromaSampling", (base, comfy.model_sampling.CONST), {})
    sampling = kind(model.model.model_config)
    sampling.set_parameters(**parameters)
    clone = model.clone()
    clone.add_object_patch("model_sampling", sampling)
    return clone


def apply_preset(
    model: ModelPatcher, preset: Preset
) -> tuple[ModelPatcher, comfy.samplers.KSAMPLER, Tensor]:
    """A clone at the preset's shift, its sampler, and its sigmas."""
    model = set_constant_shift(model, preset.shift)
    sigmas = schedule(model, preset.scheduler, preset.steps, 1.0, False, **preset.schedule_options)
    return model, comfy.samplers.KSAMPLER(SAMPLERS[preset.sampler]), sigmas


class BatchNoise:
    """A NOISE in which row i of a batch has the noise of the seed plus i.

    ComfyUI hands `seed` on to the sampler, after `generate_noise`.
    """

    def __init__(self, seed: int) -> None:
        self._first = seed
        self.seed = RowSeeds.counting(seed)

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """Noise like the latent's samples (B, C, h, w), in their dtype, on the CPU.

        A part of a batch (LatentFromBatch) has the seeds that it has in the whole.
        """
        samples = latent["samples"]
        if (rows := latent.get("batch_index")) is not None:
            self.seed = RowSeeds.of([self._first + i for i in rows])
        else:
            self.seed = RowSeeds.counting(self._first)
        return make_noise(samples.shape, self.seed).to(samples.dtype)


def exact(name: str, model_sampling: object, steps: int) -> Tensor:
    """KSampler's scheduler `chroma_<name>`: the exact schedule at the MODEL's shift."""
    return get_sigmas(name, steps, shift=model_shift(model_sampling))


def sigmoid_offset(model_sampling: object, steps: int) -> Tensor:
    """KSampler's scheduler `sigmoid_offset`, with the numbers known under that name."""
    return get_sigmas("sigmoid_offset", steps, compat_table=model_sampling.sigmas.cpu())


def register() -> None:
    """Put our samplers and schedulers into KSampler's lists, where another pack has not."""
    for name, function in SAMPLERS.items():
        name = PREFIX + name
        setattr(comfy.k_diffusion.sampling, f"sample_{name}", function)
        # Two lists in ComfyUI: the second is a copy of the first with more behind it.
        for names in (comfy.samplers.KSAMPLER_NAMES, comfy.samplers.SAMPLER_NAMES):
            if name not in names:
                names.append(name)
    handlers = {PREFIX + name: partial(exact, name) for name in SCHEDULERS}
    for name, handler in {**handlers, "sigmoid_offset": sigmoid_offset}.items():
        if name not in comfy.samplers.SCHEDULER_HANDLERS:
            comfy.samplers.SCHEDULER_HANDLERS[name] = comfy.samplers.SchedulerHandler(handler)
        if name not in comfy.samplers.SCHEDULER_NAMES:
            comfy.samplers.SCHEDULER_NAMES.append(name)
