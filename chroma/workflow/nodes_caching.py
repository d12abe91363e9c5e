"""The node for first-block caching without ComfyUI."""

from dataclasses import replace

from ..caching import CacheSettings
from .schema import Input, NodeType
from .values import Context, Model


def use_cache(_: Context, model: Model, threshold, sigma_start, sigma_end, max_skips):
    return (replace(model, cache=CacheSettings(threshold, sigma_start, sigma_end, max_skips)),)


NODES = (
    NodeType(
        "ChromaBlockCache",
        (
            Input("model", "MODEL"),
            Input("threshold", "FLOAT", 0.1, 0.0, 10.0),
            Input("sigma_start", "FLOAT", 1.0, 0.0, 1.0),
            Input("sigma_end", "FLOAT", 0.0, 0.0, 1.0),
            Input("max_skips", "INT", 0, 0, 100),
        ),
        (("MODEL", "MODEL"),),
        use_cache,
    ),
)
