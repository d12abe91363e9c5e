"""Nodes that make sigmas, and the one that sets a MODEL's shift."""

from comfy_api.latest import io

from ..schedulers import SCHEDULERS
from ..schedulers.curve import draw_sigmas
from ..schedulers.options import OPTIONS
from ..schedulers.shift import flux_shift
from . import categories
from .host_sampling import schedule, set_constant_shift, set_flux_shift

MODEL_TIP = "The MODEL to sample with: its shift decides the sigmas."
CONSTANT, RESOLUTION = "constant", "resolution"


def _common() -> tuple[list[io.Input], list[io.Input]]:
    """The inputs before and behind a schedule's own ones."""
    before = [
        io.Model.Input("model", tooltip=MODEL_TIP),
        io.Int.Input(
            "steps",
            default=26,
            min=1,
            max=10_000,
            tooltip="Number of steps. 26 suit Chroma1-HD, 8 Chroma1-Flash.",
        ),
    ]
    behind = [
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Share of the schedule that is run: 1 from pure noise, 0.5 to change an "
            "existing picture by half, 0 nothing.",
        ),
        io.Boolean.Input(
            "compat",
            default=False,
            tooltip="Off: exact values, always one more than steps, from 1 to 0. On: ComfyUI's "
            "numbers, rounded to the entries of the MODEL's table, for old seeds.",
        ),
    ]
    return before, behind


def _sigmas_output() -> io.Sigmas.Output:
    return io.Sigmas.Output(
        display_name="SIGMAS", tooltip="Noise levels from 1 to 0, for SamplerCustomAdvanced."
    )


def _schema(node_id: str, title: str, description: str, own: list[io.Input]) -> io.Schema:
    before, behind = _common()
    return io.Schema(
        node_id=node_id,
        display_name=title,
        category=categories.SCHEDULERS,
        description=description,
        inputs=[*before, *own, *behind],
        outputs=[_sigmas_output()],
    )


class ChromaScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        name = io.Combo.Input(
            "scheduler_name",
            options=list(SCHEDULERS),
            default="beta",
            tooltip="beta: the model author's. power_odds, bong_tangent: many steps at high noise, "
            "for large pictures. beta57, kl_optimal: more at low noise.",
        )
        description = "Sigmas of any of this pack's schedules, at its usual settings."
        return _schema("ChromaScheduler", "Chroma Scheduler", description, [name])

    @classmethod
    def execute(cls, model, steps, scheduler_name, denoise, compat) -> io.NodeOutput:
        return io.NodeOutput(schedule(model, scheduler_name, steps, denoise, compat))


class _Schedule(io.ComfyNode):
    """A node of one schedule with its options."""

    SCHEDULE: tuple[str, str, str]  # name, title, description

    @classmethod
    def define_schema(cls) -> io.Schema:
        name, title, description = cls.SCHEDULE
        own = [
            io.Float.Input(
                option.name,
                default=option.default,
                min=option.low,
                max=option.high,
                step=0.001 if option.default < 0.1 else 0.01,
                tooltip=option.advice,
            )
            for option in OPTIONS[name]
        ]
        return _schema(cls.__name__, title, description, own)

    @classmethod
    def execute(cls, model, steps, denoise, compat, **options) -> io.NodeOutput:
        return io.NodeOutput(schedule(model, cls.SCHEDULE[0], steps, denoise, compat, **options))


class ChromaBetaScheduler(_Schedule):
    SCHEDULE = (
        "beta",
        "Chroma Beta Scheduler",
        "Sigmas at the quantiles of a beta law: shorter steps at both ends.",
    )


class ChromaSigmoidOffsetScheduler(_Schedule):
    SCHEDULE = (
        "sigmoid_offset",
        "Chroma Sigmoid Offset Scheduler",
        "Sigmas along a logistic curve, made by Chroma's users for Chroma.",
    )


class ChromaPowerOddsScheduler(_Schedule):
    SCHEDULE = (
        "power_odds",
        "Chroma Power Odds Scheduler",
        "Sigmas whose steps change length smoothly, which suits multistep samplers.",
    )


class ChromaBongTangentScheduler(_Schedule):
    SCHEDULE = (
        "bong_tangent",
        "Chroma Bong Tangent Scheduler",
        "Sigmas of RES4LYF's bong_tangent: many at high and low noise, a quick pass between.",
    )


class ChromaLinearQuadraticScheduler(_Schedule):
    SCHEDULE = (
        "linear_quadratic",
        "Chroma Linear Quadratic Scheduler",
        "Sigmas that fall slowly in a straight line first, then faster and faster.",
    )


class ChromaSigmaCurve(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaSigmaCurve",
            display_name="Chroma Sigma Curve",
            category=categories.SCHEDULERS,
            description="A picture of SIGMAS: how fast the noise falls, step by step.",
            inputs=[
                io.Sigmas.Input("sigmas", tooltip="From any scheduler."),
                io.String.Input("label", default="", tooltip="Text to show above the curve."),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The curve, 768 x 480 pixels.")],
        )

    @classmethod
    def execute(cls, sigmas, label: str) -> io.NodeOutput:
        return io.NodeOutput(draw_sigmas(sigmas, label)[None])


class ChromaModelShift(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaModelShift",
            display_name="Chroma Model Shift",
            category=categories.SCHEDULERS,
            description="Set how a MODEL spends its steps: a larger shift spends more of them at "
            "high noise. Without this node ComfyUI samples Chroma at e^1.15 = 3.16.",
            inputs=[
                io.Model.Input("model", tooltip="A Chroma MODEL; it stays as it is."),
                io.Combo.Input(
                    "mode",
                    options=[CONSTANT, RESOLUTION],
                    default=CONSTANT,
                    tooltip="constant: the value of shift, as Chroma's author recommends. "
                    "resolution: grows with the picture, as in Flux.",
                ),
                io.Float.Input(
                    "shift",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    tooltip="constant only. 1 leaves the steps where the scheduler puts them.",
                ),
                io.Float.Input(
                    "base_shift",
                    default=0.5,
                    min=0.0,
                    max=4.0,
                    step=0.01,
                    tooltip="resolution only. Logarithm of the shift at 256 x 256 pixels.",
                ),
                io.Float.Input(
                    "max_shift",
                    default=1.15,
                    min=0.0,
                    max=4.0,
                    step=0.01,
                    tooltip="resolution only. Logarithm of the shift at 1024 x 1024 pixels.",
                ),
                _side("width"),
                _side("height"),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The same model with this shift.")
            ],
        )

    @classmethod
    def execute(cls, model, mode, shift, base_shift, max_shift, width, height) -> io.NodeOutput:
        if mode == CONSTANT:
            return io.NodeOutput(set_constant_shift(model, shift))
        shift = flux_shift(width, height, base_shift, max_shift)
        return io.NodeOutput(set_flux_shift(model, shift))


def _side(name: str) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=1024,
        min=16,
        max=16384,
        step=8,
        tooltip=f"resolution only. The picture's {name} in pixels.",
    )
