"""Nodes that choose a sampler, alone or with everything that belongs to it, and its noise."""

from comfy.samplers import KSAMPLER
from comfy_api.latest import io

from ..chroma.noise import MAX_SEED
from ..chroma.option import Option
from ..chroma.presets import BASE, PRESETS
from ..samplers import OWN_ETA, SAMPLERS, choose, own_or
from ..samplers.options import OPTIONS
from . import categories
from .host_report import Notes
from .host_sampling import BatchNoise, apply_preset

SAMPLER_TIP = "For SamplerCustomAdvanced."


class ChromaSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaSampler",
            display_name="Chroma Sampler",
            category=categories.SAMPLERS,
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
    def execute(
        cls, sampler_name: str, eta: float = OWN_ETA, s_noise: float = 1.0
    ) -> io.NodeOutput:
        sampler = choose(SAMPLERS, sampler_name, own_or(eta), s_noise)
        return io.NodeOutput(KSAMPLER(sampler))


def _number(option: Option) -> io.Input:
    kw = {"default": option.default, "min": option.low, "max": option.high}
    if option.is_whole:
        return io.Int.Input(option.name, tooltip=option.advice, **kw)
    return io.Float.Input(option.name, tooltip=option.advice, step=0.01, **kw)


class _Sampler(io.ComfyNode):
    """A node of one sampler with its options."""

    SAMPLER: tuple[str, str, str]  # name, title, description

    @classmethod
    def define_schema(cls) -> io.Schema:
        name, title, description = cls.SAMPLER
        return io.Schema(
            node_id=cls.__name__,
            display_name=title,
            category=categories.SAMPLERS,
            description=description,
            inputs=[_number(option) for option in OPTIONS[name]],
            outputs=[io.Sampler.Output(display_name="SAMPLER", tooltip=SAMPLER_TIP)],
        )

    @classmethod
    def execute(cls, **options) -> io.NodeOutput:
        return io.NodeOutput(KSAMPLER(choose(SAMPLERS, cls.SAMPLER[0], **options)))


class ChromaFlowPECSampler(_Sampler):
    SAMPLER = (
        "flow_pec",
        "Chroma FlowPEC Sampler",
        "This pack's own sampler: predicts and corrects each step, at one model call a step.",
    )


class ChromaFlashSampler(_Sampler):
    SAMPLER = (
        "flash",
        "Chroma Flash Sampler",
        "For models of few steps, such as Chroma1-Flash: flow_pec, or two model calls a step.",
    )


class ChromaSASolverSampler(_Sampler):
    SAMPLER = (
        "sa_solver",
        "Chroma SA-Solver Sampler",
        "Multistep sampler that can add noise in every step (Xue et al. 2023).",
    )


class ChromaDEISSampler(_Sampler):
    SAMPLER = (
        "deis",
        "Chroma DEIS Sampler",
        "Multistep sampler through the last directions (Zhang & Chen 2022).",
    )


class ChromaGradientEstimationSampler(_Sampler):
    SAMPLER = (
        "gradient_estimation",
        "Chroma Gradient Estimation Sampler",
        "euler that looks ahead along the change of direction (Permenter & Yuan 2024).",
    )


class ChromaRES2SSampler(_Sampler):
    SAMPLER = (
        "res_2s",
        "Chroma RES 2S Sampler",
        "Exponential sampler of two model calls a step; with eta 0 it is res_2s_ode.",
    )


class ChromaDPMppSDESampler(_Sampler):
    SAMPLER = (
        "dpmpp_sde",
        "Chroma DPM++ SDE Sampler",
        "Sampler of two model calls a step that adds noise in every step.",
    )


class ChromaBatchNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaBatchNoise",
            display_name="Chroma Batch Noise",
            category=categories.SAMPLERS,
            description="Noise for a batch in which every picture has its own seed: the first has "
            "this one, the second one more, and so on. Each is the picture of its seed alone.",
            inputs=[
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Seed of the first picture.",
                ),
            ],
            outputs=[io.Noise.Output(display_name="NOISE", tooltip=SAMPLER_TIP)],
        )

    @classmethod
    def execute(cls, noise_seed: int) -> io.NodeOutput:
        return io.NodeOutput(BatchNoise(noise_seed))


class ChromaPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaPreset",
            display_name="Chroma Preset",
            category=categories.MAIN,
            description="Shift, sampler, sigmas and guidance scale that belong together: Chroma's "
            "author's, with this pack's most exact sampler.",
            inputs=[
                io.Model.Input("model", tooltip="A Chroma MODEL; it stays as it is."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=next(iter(PRESETS)),
                    tooltip=". ".join(f"{name}: {p}" for name, p in PRESETS.items()) + ".",
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
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, preset: str) -> io.NodeOutput:
        p = PRESETS[preset]
        shown = Notes([str(p)]).tell(cls.hidden and cls.hidden.unique_id)
        return io.NodeOutput(*apply_preset(model, p), p.cfg, ui=shown)
