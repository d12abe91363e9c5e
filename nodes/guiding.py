"""Nodes for guidance: everything in one GUIDER, or the rules alone on a MODEL."""

from comfy_api.latest import io

from ..chroma.guidance.plan import CURVES, Guidance
from . import categories
from .host_guider import ChromaCFGGuider, patch_guidance


def _number(name: str, default: float, low: float, high: float, tip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=low, max=high, step=0.01, tooltip=tip)


def _rules() -> list[io.Input]:
    """The inputs that both nodes have, each without effect at its default."""
    return [
        _number(
            "rescale", 0.0, 0.0, 1.0,
            "Brings the contrast of the guided prediction back to that of the prompt's own, "
            "against burnt pictures at high cfg. 0 nothing, 1 all the way; 0.7 is usual.",
        ),
        io.Boolean.Input(
            "zero_star", default=False,
            tooltip="CFG-Zero*: scales the negative prediction to lie nearest to the prompt's.",
        ),
        io.Int.Input(
            "zero_init", default=0, min=0, max=100,
            tooltip="Number of first steps that leave the noise as it is (CFG-Zero* advises 4 "
            "percent of the steps, so 1). 0 for none.",
        ),
        _number(
            "apg_eta", 1.0, 0.0, 1.0,
            "Adaptive projected guidance: share that stays of guidance along the prediction, which "
            "oversaturates. 1 is plain guidance, 0 none of it.",
        ),
        _number(
            "apg_norm", 0.0, 0.0, 10_000.0,
            "Adaptive projected guidance: longest guidance allowed, as the norm over the whole "
            "latent, which grows with the picture's side. 0 for no limit.",
        ),
        _number(
            "apg_momentum", 0.0, -0.99, 0.99,
            "Adaptive projected guidance: share of the last step's guidance that is added. "
            "Usually negative, such as -0.5. 0 for none.",
        ),
    ]  # fmt: skip


class ChromaGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaGuider",
            display_name="Chroma Guider",
            category=categories.GUIDANCE,
            description="Classifier-free guidance that can change over the run, be left out where "
            "it does not matter (one model pass instead of two), and be refined.",
            inputs=[
                io.Model.Input("model", tooltip="A Chroma MODEL; it stays as it is."),
                io.Conditioning.Input("positive", tooltip="What the picture shall show."),
                io.Conditioning.Input("negative", tooltip="What it shall not; may be empty."),
                _number(
                    "cfg", 4.0, 0.0, 100.0,
                    "Guidance scale. 4 suits Chroma1-HD; 1 is without guidance and twice as fast.",
                ),
                io.Combo.Input(
                    "curve", options=list(CURVES), default="constant",
                    tooltip="constant: cfg everywhere. linear, cosine: from cfg at sigma 1 to "
                    "cfg_end at sigma 0.",
                ),
                _number(
                    "cfg_end", 1.0, 0.0, 100.0,
                    "linear and cosine only. Guidance scale at the end of the run.",
                ),
                _number(
                    "interval_start", 1.0, 0.0, 1.0,
                    "Sigma from which there is guidance. Above it each step is one pass.",
                ),
                _number(
                    "interval_end", 0.0, 0.0, 1.0,
                    "Sigma down to which there is guidance. Below it each step is one pass.",
                ),
                *_rules(),
            ],
            outputs=[io.Guider.Output(display_name="GUIDER", tooltip="For SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, **options) -> io.NodeOutput:
        guider = ChromaCFGGuider(model, Guidance(**options))
        guider.set_conds(positive, negative)
        return io.NodeOutput(guider)


class ChromaGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaGuidance",
            display_name="Chroma Guidance",
            category=categories.GUIDANCE,
            description="Refined guidance for KSampler, which keeps its own cfg. To leave passes "
            "out or change the scale over the run, use Chroma Guider.",
            inputs=[
                io.Model.Input("model", tooltip="A Chroma MODEL; it stays as it is."),
                *_rules(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The same model with these rules.")
            ],
        )

    @classmethod
    def execute(cls, model, **rules) -> io.NodeOutput:
        return io.NodeOutput(patch_guidance(model, Guidance(1.0, **rules)))
