"""The node that gives a MODEL a negative prompt inside its attention."""

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..chroma.errors import PromptError
from ..chroma.nag import MAX_SCALE, MAX_TAU, NAG, NAGSettings
from . import categories
from .host_model import apply_transformer
from .host_nag import NAG_KEY
from .host_text import LENGTHS

DEFAULT = NAGSettings()


class ChromaNAG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaNAG",
            display_name="Chroma NAG",
            category=categories.GUIDANCE,
            description="A negative prompt that works at cfg 1, as Flash wants it, and costs far "
            "less than cfg: Normalized Attention Guidance (Chen et al. 2025).",
            inputs=[
                io.Model.Input("model", tooltip="A Chroma MODEL from any loader; it stays as is."),
                io.Conditioning.Input(
                    "negative", tooltip="What the picture should not show, as a prompt."
                ),
                io.Float.Input(
                    "scale",
                    default=DEFAULT.scale,
                    min=0.0,
                    max=MAX_SCALE,
                    step=0.1,
                    tooltip="How far away from the negative prompt. 1 is off, 5 usual; below 1 "
                    "draws the picture towards it.",
                ),
                io.Float.Input(
                    "tau",
                    default=DEFAULT.tau,
                    min=1.0,
                    max=MAX_TAU,
                    step=0.1,
                    tooltip="How many times longer guidance may make a token. Lower it against "
                    "glaring colours and artefacts.",
                ),
                io.Float.Input(
                    "alpha",
                    default=DEFAULT.alpha,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the guided attention in the result. 0 is off; raise it if "
                    "the negative prompt does too little.",
                ),
                io.Float.Input(
                    "sigma_end",
                    default=DEFAULT.sigma_end,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Off below this noise level, which saves its time there. 0: never off.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="For KSampler or a guider, with cfg 1."
                )
            ],
        )

    @classmethod
    def execute(cls, model, negative, scale, tau, alpha, sigma_end) -> io.NodeOutput:
        settings = NAGSettings(scale, tau, alpha, sigma_end)
        return io.NodeOutput(with_nag(model, negative, settings))


def with_nag(model: ModelPatcher, negative: list[list[Any]], settings: NAGSettings) -> ModelPatcher:
    """A clone whose runs keep away from the negative prompt.

    Raises CheckpointError if the MODEL is not Chroma, PromptError if there is not one negative.
    """
    model = apply_transformer(model)
    if len(negative) != 1:
        raise PromptError(
            f"NAG's negative holds {len(negative)} prompts, expected one; "
            "connect a text encode node directly"
        )
    hidden, extra = negative[0]
    lengths = extra.get(LENGTHS, [hidden.shape[1]] * len(hidden))
    options = model.model_options["transformer_options"]
    options[NAG_KEY] = NAG(settings, hidden, tuple(int(length) for length in lengths))
    return model
