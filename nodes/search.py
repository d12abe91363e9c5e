"""Other words under which ComfyUI's node search finds the nodes: what users call them elsewhere."""

from functools import wraps

from comfy_api.latest import io

ALIASES: dict[str, tuple[str, ...]] = {
    "ChromaLoad": ("checkpoint loader", "gguf", "unet", "model loader", "pipeline"),
    "ChromaTextToImage": ("txt2img", "t2i", "generate image", "ksampler"),
    "ChromaLoadModel": ("unet loader", "gguf", "diffusion model", "fp8", "int8"),
    "ChromaApplyTransformer": ("replace model", "convert model"),
    "ChromaLoadTextEncoder": ("clip loader", "t5", "t5xxl", "gguf"),
    "ChromaLoadVAE": ("vae loader", "autoencoder", "ae.safetensors"),
    "ChromaLoadLora": ("lora loader", "lycoris", "loha", "lokr", "dora"),
    "ChromaLoraStack": ("multi lora", "lora stacker", "several loras"),
    "ChromaFlashLora": ("turbo", "lightning", "few steps", "distilled"),
    "ChromaLoraInfo": ("lora metadata", "trigger words"),
    "ChromaConvertLora": ("lora format", "kohya", "diffusers"),
    "ChromaMergeLoras": ("combine loras", "concatenate loras"),
    "ChromaResizeLora": ("lora rank", "shrink lora", "svd"),
    "ChromaExtractLora": ("lora from model", "difference", "svd"),
    "ChromaMergeLoraIntoCheckpoint": ("bake lora", "save model", "fuse lora"),
    "ChromaTextEncode": ("prompt", "clip text encode", "conditioning"),
    "ChromaLongTextEncode": ("long prompt", "more than 512 tokens"),
    "ChromaTextConcat": ("conditioning concat", "join prompts"),
    "ChromaWildcards": ("random prompt", "dynamic prompts"),
    "ChromaPromptTags": ("aesthetic", "quality tags", "masterpiece"),
    "ChromaPromptCheck": ("token count", "prompt length"),
    "ChromaScheduler": ("basic scheduler", "sigmas"),
    "ChromaBetaScheduler": ("sigmas", "alpha beta"),
    "ChromaSigmoidOffsetScheduler": ("sigmas",),
    "ChromaPowerOddsScheduler": ("sigmas",),
    "ChromaBongTangentScheduler": ("sigmas", "res4lyf"),
    "ChromaLinearQuadraticScheduler": ("sigmas", "mochi"),
    "ChromaSigmaCurve": ("plot sigmas", "show sigmas"),
    "ChromaModelShift": ("model sampling", "flux shift", "aura flow"),
    "ChromaSampler": ("ksampler select", "solver"),
    "ChromaFlowPECSampler": ("ksampler select", "multistep", "predictor corrector"),
    "ChromaFlashSampler": ("ksampler select", "few steps", "heun"),
    "ChromaSASolverSampler": ("ksampler select", "stochastic adams"),
    "ChromaDEISSampler": ("ksampler select", "multistep"),
    "ChromaGradientEstimationSampler": ("ksampler select", "ge_gamma"),
    "ChromaRES2SSampler": ("ksampler select", "exponential", "res4lyf"),
    "ChromaDPMppSDESampler": ("ksampler select", "k-diffusion", "stochastic"),
    "ChromaBatchNoise": ("random noise", "seed"),
    "ChromaPreset": ("recommended settings", "defaults", "steps and cfg"),
    "ChromaGuider": ("cfg guider", "cfg schedule", "rescale cfg", "apg", "cfg zero star"),
    "ChromaGuidance": ("apg", "rescale cfg", "cfg zero star"),
    "ChromaNAG": ("normalized attention guidance", "negative prompt without cfg"),
    "ChromaBlockCache": ("teacache", "first block cache", "wavespeed", "speed"),
    "ChromaQuantize": ("gguf", "fp8", "int8", "shrink model", "save model"),
    "ChromaInspect": ("metadata", "file info", "what is this file"),
}


def found_by_aliases(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, with its aliases in its schema where this ComfyUI has a place for them."""
    define = node.define_schema.__func__  # pyright: ignore[reportFunctionMemberAccess]

    @wraps(define)
    def define_schema(cls) -> io.Schema:
        schema = define(cls)
        if hasattr(schema, "search_aliases"):
            schema.search_aliases = list(ALIASES[schema.node_id])
        return schema

    node.define_schema = classmethod(define_schema)
    return node
