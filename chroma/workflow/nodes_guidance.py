"""This pack's guidance nodes without ComfyUI: the same ids, inputs, defaults and results."""

from dataclasses import replace
from typing import Any

from ..errors import SamplingError
from ..guidance import CURVES, Guidance
from ..pipeline import check_widths
from ..text.encoder import TextEmbedding
from .schema import Input, NodeType
from .values import Context, Guider, Model

MODEL = Input("model", "MODEL")
RULES = (
    Input("rescale", "FLOAT", 0.0, 0.0, 1.0),
    Input("zero_star", "BOOLEAN", False),
    Input("zero_init", "INT", 0, 0, 100),
    Input("apg_eta", "FLOAT", 1.0, 0.0, 1.0),
    Input("apg_norm", "FLOAT", 0.0, 0.0, 10_000.0),
    Input("apg_momentum", "FLOAT", 0.0, -0.99, 0.99),
)


def guider(
    _: Context, model: Model, positive: TextEmbedding, negative: TextEmbedding, **options: Any
):
    if model.guidance is not None:
        raise SamplingError(
            "this MODEL comes from Chroma Guidance already; "
            "remove that node and set its options on Chroma Guider"
        )
    for text in (positive, negative):
        check_widths(model.transformer, text.hidden.shape[-1])
    return (Guider(model, positive, negative, Guidance(**options)),)


def guidance(_: Context, model: Model, **rules: Any):
    return (replace(model, guidance=Guidance(1.0, **rules)),)


NODES = (
    NodeType(
        "ChromaGuider",
        (
            MODEL, Input("positive", "CONDITIONING"), Input("negative", "CONDITIONING"),
            Input("cfg", "FLOAT", 4.0, 0.0, 100.0),
            Input("curve", "COMBO", "constant", choices=tuple(CURVES)),
            Input("cfg_end", "FLOAT", 1.0, 0.0, 100.0),
            Input("interval_start", "FLOAT", 1.0, 0.0, 1.0),
            Input("interval_end", "FLOAT", 0.0, 0.0, 1.0), *RULES,
        ),
        (("GUIDER", "GUIDER"),),
        guider,
    ),
    NodeType("ChromaGuidance", (MODEL, *RULES), (("MODEL", "MODEL"),), guidance),
)  # fmt: skip
