"""Nodes that choose a sampler, alone or with everything that belongs to it."""

from comfy.samplers import KSAMPLER
from comfy_api.latest import io

from ..chroma.presets import BASE, PRESETS
from ..samplers import OWN_ETA, SAMPLERS, choose, own_or
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
                    default=BASE.sampler,
                    tooltip="flow_pec: this pack's own, the most exact at one model call a step. "
                    "Names with ancestral, sde, and res_2m, res_2s, sa_solver add noise in every "
                    "step. heun, res_2s, dpmpp_sde, dpmpp_2s call the model twice a step.",
                ),
                io.Float.Input(
                    "eta",
                    default=OWN_ETA,
                    min=OWN_ETA,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    tooltip="How much noise each step adds anew: 0 none, 1 in full, -1 the "
                    "sampler's usual value. Only for samplers that can.",
                ),
                io.Float.Input(
                    "s_noise",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    optional=True,
                    tooltip="Factor on the noise that steps add. Only for samplers that add any.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="SAMPLER", tooltip=SAMPLER_TIP)],
        )

    @classmethod
    def validate_inputs(cls, sampler_name) -> bool | str:
        return one_of(sampler_name=(sampler_name, SAMPLERS))

    @classmethod
    def execute(
        cls, sampler_name: str, eta: float = OWN_ETA, s_noise: float = 1.0
    ) -> io.NodeOutput:
        sampler = choose(SAMPLERS, sampler_name, own_or(eta), s_noise)
        return io.NodeOutput(KSAMPLER(sampler))


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
