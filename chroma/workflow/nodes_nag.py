"""The node for a negative prompt inside the attention, without ComfyUI."""

from dataclasses import replace

from ..nag import MAX_SCALE, MAX_TAU, NAG, NAGSettings
from ..text.encoder import TextEmbedding
from .schema import Input, NodeType
from .values import Context, Model

DEFAULT = NAGSettings()


def use_nag(_: Context, model: Model, negative: TextEmbedding, scale, tau, alpha, sigma_end):
    settings = NAGSettings(scale, tau, alpha, sigma_end)
    nag = NAG(settings, negative.hidden, tuple(negative.lengths.tolist()))
    return (replace(model, nag=nag),)


NODES = (
    NodeType(
        "ChromaNAG",
        (
            Input("model", "MODEL"),
            Input("negative", "CONDITIONING"),
            Input("scale", "FLOAT", DEFAULT.scale, 0.0, MAX_SCALE),
            Input("tau", "FLOAT", DEFAULT.tau, 1.0, MAX_TAU),
            Input("alpha", "FLOAT", DEFAULT.alpha, 0.0, 1.0),
            Input("sigma_end", "FLOAT", DEFAULT.sigma_end, 0.0, 1.0),
        ),
        (("MODEL", "MODEL"),),
        use_nag,
    ),
)
