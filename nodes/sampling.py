"""Nodes that choose a sampler, alone or with everything that belongs to it."""

from comfy.samplers import KSAMPLER
from comfy_api.latest import io

from ..chroma.presets import PRESETS
from ..samplers import SAMPLERS
from .host import one_of
from .host_sampling import schedule, set_constant_shift

CATEGORY = "Chroma"
SAMPLER_TIP = "For SamplerCustomAdvanced."


class ChromaSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaSampler",
            display_name="Chroma Sampler",
            category=CATEGORY,
            description="Choose how the sampler walks from noise to picture. The same samplers "
            "are in KSampler's list as chroma_...",
            inputs=[
                io.Combo.Input(
                    "sampler_name",
                    options=list(SAMPLERS),
                    default="res_multistep",
                    tooltip="euler: one model call a step, robust. res_multistep: one call, more "
                    "exact. heun: two calls. flash: two calls, for few-step models.",
                )
            ],
            outputs=[io.Sampler.Output(display_name="SAMPLER", tooltip=SAMPLER_TIP)],
        )

    @classmethod
    def validate_inputs(cls, sampler_name) -> bool | str:
        return one_of(sampler_name=(sampler_name, SAMPLERS))

    @classmethod
    def execute(cls, sampler_name: str) -> io.NodeOutput:
        return io.NodeOutput(KSAMPLER(SAMPLERS[sampler_name]))


class ChromaPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaPreset",
            display_name="Chroma Preset",
            category=CATEGORY,
            description="Shift, sampler, sigmas and guidance scale that belong together, as "
            "Chroma's author recommends.",
            inputs=[
                io.Model.Input("model", tooltip="A Chroma MODEL; it stays as it is."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=next(iter(PRESETS)),
                    tooltip="; ".join(
                        f"{name}: {p.sampler}, {p.steps} steps, cfg {p.cfg:g}"
                        for name, p in PRESETS.items()
                    )
                    + ".",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the preset's shift."),
                io.Sampler.Output(display_name="SAMPLER", tooltip=SAMPLER_TIP),
                io.Sigmas.Output(
                    display_name="SIGMAS", tooltip="The preset's noise levels, from 1 to 0."
                ),
                io.Float.Output(
                    display_name="cfg", tooltip="The preset's guidance scale, for CFGGuider's cfg."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, preset) -> bool | str:
        return one_of(preset=(preset, PRESETS))

    @classmethod
    def execute(cls, model, preset: str) -> io.NodeOutput:
        p = PRESETS[preset]
        model = set_constant_shift(model, p.shift)
        options = {"alpha": p.alpha, "beta": p.beta} if p.scheduler == "beta" else {}
        sigmas = schedule(model, p.scheduler, p.steps, 1.0, False, **options)
        return io.NodeOutput(model, KSAMPLER(SAMPLERS[p.sampler]), sigmas, p.cfg)
