"""Nodes that make sigmas, and the one that sets a MODEL's shift."""

from comfy_api.latest import io

from ..schedulers.shift import flux_mu
from .host import one_of
from .host_sampling import schedule, set_constant_shift, set_flux_shift

CATEGORY = "Chroma"
MODEL_TIP = "The MODEL to sample with: its shift decides the sigmas."
CONSTANT, RESOLUTION = "constant", "resolution"


def _common(steps: int) -> tuple[list[io.Input], list[io.Input]]:
    """The inputs before and behind a schedule's own ones."""
    before = [
        io.Model.Input("model", tooltip=MODEL_TIP),
        io.Int.Input(
            "steps",
            default=steps,
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


class ChromaBetaScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        before, behind = _common(26)
        return io.Schema(
            node_id="ChromaBetaScheduler",
            display_name="Chroma Beta Scheduler",
            category=CATEGORY,
            description="Sigmas at the quantiles of a beta law: shorter steps at both ends.",
            inputs=[
                *before,
                io.Float.Input(
                    "alpha",
                    default=0.6,
                    min=0.01,
                    max=50.0,
                    step=0.01,
                    tooltip="Shape at the clean end: smaller puts more steps at low sigma. "
                    "0.6 is usual, 0.4 an alternative.",
                ),
                io.Float.Input(
                    "beta",
                    default=0.6,
                    min=0.01,
                    max=50.0,
                    step=0.01,
                    tooltip="Shape at the noisy end: smaller puts more steps at high sigma. "
                    "0.6 is usual, 0.4 an alternative.",
                ),
                *behind,
            ],
            outputs=[_sigmas_output()],
        )

    @classmethod
    def execute(cls, model, steps, alpha, beta, denoise, compat) -> io.NodeOutput:
        return io.NodeOutput(
            schedule(model, "beta", steps, denoise, compat, alpha=alpha, beta=beta)
        )


class ChromaSigmoidOffsetScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        before, behind = _common(26)
        return io.Schema(
            node_id="ChromaSigmoidOffsetScheduler",
            display_name="Chroma Sigmoid Offset Scheduler",
            category=CATEGORY,
            description="Sigmas along a logistic curve, made by Chroma's users for Chroma.",
            inputs=[
                *before,
                io.Float.Input(
                    "square_k",
                    default=1.0,
                    min=0.01,
                    max=10.0,
                    step=0.01,
                    tooltip="Steepness: larger puts more steps at both ends, fewer in between.",
                ),
                io.Float.Input(
                    "base_c",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Offset: below 0.5 more steps at high sigma (composition), above it "
                    "more at low sigma (detail).",
                ),
                *behind,
            ],
            outputs=[_sigmas_output()],
        )

    @classmethod
    def execute(cls, model, steps, square_k, base_c, denoise, compat) -> io.NodeOutput:
        return io.NodeOutput(
            schedule(
                model, "sigmoid_offset", steps, denoise, compat, square_k=square_k, base_c=base_c
            )
        )


class ChromaModelShift(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaModelShift",
            display_name="Chroma Model Shift",
            category=CATEGORY,
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
    def validate_inputs(cls, mode) -> bool | str:
        return one_of(mode=(mode, [CONSTANT, RESOLUTION]))

    @classmethod
    def execute(cls, model, mode, shift, base_shift, max_shift, width, height) -> io.NodeOutput:
        if mode == CONSTANT:
            return io.NodeOutput(set_constant_shift(model, shift))
        return io.NodeOutput(set_flux_shift(model, flux_mu(width, height, base_shift, max_shift)))


def _side(name: str) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=1024,
        min=16,
        max=16384,
        step=8,
        tooltip=f"resolution only. The picture's {name} in pixels.",
    )
