"""The node that lets a MODEL skip passes in which little changes."""

from comfy_api.latest import io

from ..chroma.caching import CacheSettings
from . import categories
from .host_caching import patch_cache
from .host_model import apply_transformer


class ChromaBlockCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaBlockCache",
            display_name="Chroma Block Cache",
            category=categories.GUIDANCE,
            description="Saves up to half of the time: where the first block changes little from "
            "step to step, the others are not run and what they added the last time is added "
            "again. The console tells how many passes were skipped.",
            inputs=[
                io.Model.Input("model", tooltip="A Chroma MODEL from any loader; it stays as is."),
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much the first block may change before all are run again. 0 is "
                    "off; more is faster and further from the picture without.",
                ),
                io.Float.Input(
                    "sigma_start",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Nothing is skipped above this noise level. 1 is pure noise; lower it "
                    "to keep the composition.",
                ),
                io.Float.Input(
                    "sigma_end",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Nothing is skipped below this noise level; raise it to keep fine "
                    "details.",
                ),
                io.Int.Input(
                    "max_skips",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="Most steps in a row that may be skipped. 0: no limit.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="For KSampler or any guider.")],
        )

    @classmethod
    def execute(cls, model, threshold, sigma_start, sigma_end, max_skips) -> io.NodeOutput:
        settings = CacheSettings(threshold, sigma_start, sigma_end, max_skips)
        if threshold:
            model = apply_transformer(model)
        return io.NodeOutput(patch_cache(model, settings))
