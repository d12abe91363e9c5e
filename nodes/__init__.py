"""The ComfyUI side: the only code that knows ComfyUI. Imported when ComfyUI asks for the nodes."""

from comfy_api.latest import ComfyExtension, io

from . import (
    caching,
    conditioning,
    guiding,
    host,
    host_sampling,
    inspecting,
    loading,
    lora,
    lora_tools,
    nag,
    prompting,
    quantizing,
    sampling,
    scheduling,
    simple,
)
from .host_memory import tells_out_of_memory
from .menus import checks_menus
from .search import found_by_aliases

NODES: list[type[io.ComfyNode]] = [
    simple.ChromaLoad,
    simple.ChromaTextToImage,
    loading.ChromaLoadModel,
    loading.ChromaApplyTransformer,
    loading.ChromaLoadTextEncoder,
    loading.ChromaLoadVAE,
    lora.ChromaLoadLora,
    lora.ChromaLoraStack,
    lora.ChromaFlashLora,
    lora.ChromaLoraInfo,
    lora_tools.ChromaConvertLora,
    lora_tools.ChromaMergeLoras,
    lora_tools.ChromaResizeLora,
    lora_tools.ChromaExtractLora,
    lora_tools.ChromaMergeLoraIntoCheckpoint,
    conditioning.ChromaTextEncode,
    prompting.ChromaLongTextEncode,
    prompting.ChromaTextConcat,
    prompting.ChromaWildcards,
    prompting.ChromaPromptTags,
    prompting.ChromaPromptCheck,
    scheduling.ChromaScheduler,
    scheduling.ChromaBetaScheduler,
    scheduling.ChromaSigmoidOffsetScheduler,
    scheduling.ChromaPowerOddsScheduler,
    scheduling.ChromaBongTangentScheduler,
    scheduling.ChromaLinearQuadraticScheduler,
    scheduling.ChromaSigmaCurve,
    scheduling.ChromaModelShift,
    sampling.ChromaSampler,
    sampling.ChromaFlowPECSampler,
    sampling.ChromaFlashSampler,
    sampling.ChromaSASolverSampler,
    sampling.ChromaDEISSampler,
    sampling.ChromaGradientEstimationSampler,
    sampling.ChromaRES2SSampler,
    sampling.ChromaDPMppSDESampler,
    sampling.ChromaBatchNoise,
    sampling.ChromaPreset,
    guiding.ChromaGuider,
    guiding.ChromaGuidance,
    nag.ChromaNAG,
    caching.ChromaBlockCache,
    quantizing.ChromaQuantize,
    inspecting.ChromaInspect,
]


class ChromaExtension(ComfyExtension):
    """What ComfyUI loads: it registers samplers, schedulers and the small model, once."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        host.register_small_model()
        host_sampling.register()
        return [found_by_aliases(checks_menus(tells_out_of_memory(node))) for node in NODES]
