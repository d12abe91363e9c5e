"""Guidance inside ComfyUI: a GUIDER that can leave out the uncond pass, and a patch of a MODEL.

Both keep what they remember on one run alone. Latents are (B, C, h, w) or packed as (B, C, n); all
predictions are denoised latents unless ComfyUI's contract says x minus them.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider, cfg_function, sampling_function
from torch import Tensor

from ..chroma.errors import SamplingError
from ..chroma.guidance.plan import Guidance, is_one
from ..chroma.guidance.rules import classifier_free
from ..chroma.guidance.run import GuidanceRun
from .host_sampling import check_flow

logger = logging.getLogger("chroma")

CFG_FUNCTION = "sampler_cfg_function"
PRE_CFG_FUNCTIONS = "sampler_pre_cfg_function"
RUN = "chroma_guidance_run"
# What ComfyUI calls: a dict of predictions in, x - guided out.
CfgFunction = Callable[[dict[str, Any]], Tensor]


class ChromaCFGGuider(CFGGuider):
    """ComfyUI's CFGGuider under a Guidance; with nothing but a scale it gives the same numbers."""

    def __init__(self, model: ModelPatcher, plan: Guidance) -> None:
        super().__init__(_flow(model))
        if isinstance(self.model_options.get(CFG_FUNCTION), GuidancePatch):
            raise SamplingError(
                "this MODEL comes from Chroma Guidance already; "
                "remove that node and set its options on Chroma Guider"
            )
        self.plan = plan
        self.set_cfg(plan.cfg)

    def sample(self, *args, **kwargs) -> Tensor:
        """One run, as CFGGuider.sample; its forward passes go to the log."""
        self.run = GuidanceRun(self.plan)
        try:
            result = super().sample(*args, **kwargs)
            passes, most = self.run.passes, 2 * self.run.calls
            logger.info(
                "Chroma Guider: %d forward passes, %d fewer than with guidance everywhere",
                passes, most - passes,
            )  # fmt: skip
            return result
        finally:
            del self.run

    def predict_noise(self, x, timestep, model_options=None, seed=None) -> Tensor:
        """x, sigma (B,) -> guided. Other nodes' functions are called as ComfyUI calls them."""
        options = model_options or {}
        sigma = float(timestep[0])
        scale = self.plan.scale(sigma)
        if self.run.holds_still(sigma):
            self.run.count(0)
            return self._hold_still(x, timestep, scale, options)
        without_uncond = is_one(scale) and not options.get("disable_cfg1_optimization")
        self.run.count(1 if without_uncond else 2)
        if without_uncond:
            functions = [_cond_for_uncond, *options.get(PRE_CFG_FUNCTIONS, ())]
            options = {**options, PRE_CFG_FUNCTIONS: functions}
        elif self.plan.has_rules:
            options = {**options, CFG_FUNCTION: _cfg_function(self.run, options.get(CFG_FUNCTION))}
        return sampling_function(
            self.inner_model, x, timestep, self.conds.get("negative"), self.conds.get("positive"),
            scale, model_options=options, seed=seed,
        )  # fmt: skip

    def _hold_still(self, x: Tensor, timestep: Tensor, scale: float, options: dict) -> Tensor:
        # CFG++ samplers listen for the uncond prediction in a post-CFG function. What other
        # functions return is dropped: the velocity shall be zero.
        cond, uncond = (self.conds.get(name) for name in ("positive", "negative"))
        cfg_function(
            self.inner_model, x, x, scale, x, timestep, model_options=options, cond=cond,
            uncond=uncond,
        )  # fmt: skip
        return x


class GuidancePatch:
    """A sampler_cfg_function with a Guidance's rules; the scale stays the sampler's own.

    `theirs` is the function it took the place of, which still combines the two predictions.
    """

    def __init__(self, plan: Guidance, theirs: CfgFunction | None) -> None:
        self.plan, self.theirs = plan, theirs

    def start_run(self, executor, *args, **kwargs):
        """A wrapper around ComfyUI's outer_sample: what is remembered ends with the run."""
        executor.class_obj.model_options[RUN] = GuidanceRun(self.plan)
        return executor(*args, **kwargs)

    def __call__(self, args: dict[str, Any]) -> Tensor:
        run: GuidanceRun | None = args["model_options"].get(RUN)
        if run is None:
            raise SamplingError(
                "this sampler does not start its runs through ComfyUI's guiders; "
                "remove Chroma Guidance, or use KSampler or SamplerCustomAdvanced"
            )
        if run.holds_still(float(args["sigma"][0])):
            return torch.zeros_like(args["input"])
        return _cfg_function(run, self.theirs)(args)


def patch_guidance(model: ModelPatcher, plan: Guidance) -> ModelPatcher:
    """A clone whose samplers apply the plan's rules; a second patch replaces the first.

    Raises SamplingError unless the MODEL is a flow model.
    """
    clone = _flow(model).clone()
    theirs = clone.model_options.get(CFG_FUNCTION)
    if isinstance(theirs, GuidancePatch):
        theirs = theirs.theirs
    clone.model_options.pop(CFG_FUNCTION, None)
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, RUN)
    if plan.has_rules or plan.zero_init:
        patch = GuidancePatch(plan, theirs)
        clone.set_model_sampler_cfg_function(patch)
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, RUN, patch.start_run)
    elif theirs is not None:
        clone.set_model_sampler_cfg_function(theirs)
    return clone


def _flow(model: ModelPatcher) -> ModelPatcher:
    """The MODEL itself. Raises SamplingError unless it is a flow model."""
    check_flow(model.get_model_object("model_sampling"))
    return model


def _cfg_function(run: GuidanceRun, theirs: CfgFunction | None) -> CfgFunction:
    """The run's rules as a sampler_cfg_function, around another node's if there is one."""

    def function(args: dict[str, Any]) -> Tensor:
        x = args["input"]
        scale, cond, uncond = (args[k] for k in ("cond_scale", "cond_denoised", "uncond_denoised"))
        # At 1 no rule applies, and the uncond prediction may be zeros in place of a pass.
        if is_one(scale):
            return x - cond if theirs is None else theirs(args)

        def combine(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
            if theirs is None:
                return classifier_free(cond, uncond, scale)
            changed = {"uncond": x - uncond, "uncond_denoised": uncond}
            return x - theirs({**args, **changed})

        return x - run.guide(x, cond, uncond, scale, combine)

    return function


def _cond_for_uncond(args: dict[str, Any]) -> list[Tensor]:
    """A pre-CFG function: where uncond was not run, the cond prediction instead of zeros.

    So that other nodes' functions, which work on the difference of the two, see none.
    """
    cond, *others = args["conds_out"]
    return [cond, cond, *others[1:]]
