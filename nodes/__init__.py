"""The ComfyUI side: the only code that knows ComfyUI. Imported when ComfyUI asks for the nodes."""

from comfy_api.latest import ComfyExtension, io

from . import conditioning, host, host_sampling, loading, quantizing, sampling, scheduling

NODES: list[type[io.ComfyNode]] = [
    loading.ChromaLoadModel,
    loading.ChromaApplyTransformer,
    loading.ChromaLoadTextEncoder,
    loading.ChromaLoadVAE,
    conditioning.ChromaTextEncode,
    scheduling.ChromaBetaScheduler,
    scheduling.ChromaSigmoidOffsetScheduler,
    scheduling.ChromaModelShift,
    sampling.ChromaSampler,
    sampling.ChromaPreset,
    quantizing.ChromaQuantize,
]


class ChromaExtension(ComfyExtension):
    """What ComfyUI loads: it registers samplers, schedulers and the small model, once."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        host.register_small_model()
        host_sampling.register()
        return NODES
