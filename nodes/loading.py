"""Nodes that load models, and the one that puts our transformer into a loaded MODEL."""

from comfy_api.latest import io

from ..chroma.tiny import files as small
from . import categories
from .host import AUTO, DTYPE_CHOICES, MODEL_DTYPE_CHOICES, choices, locate
from .host_model import apply_transformer, load_model
from .host_text import load_clip
from .host_vae import load_vae

DTYPE_TIP = (
    "Precision of the weights in memory. auto: what suits your hardware, and quantised files stay "
    "as they are. Anything else expands quantised files, if memory allows. bf16 and fp16 take half "
    "the memory of fp32."
)
MODEL_DTYPE_TIP = (
    f"{DTYPE_TIP} int8 and fp8 multiply the blocks in 8 bits, where your hardware can: in less "
    "memory, faster on CPUs, but not quite the same picture."
)


def _dtype_input(choices: list[str], tooltip: str) -> io.Combo.Input:
    return io.Combo.Input("weight_dtype", options=choices, default=AUTO, tooltip=tooltip)


class ChromaLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaLoadModel",
            display_name="Load Chroma Model",
            category=categories.MAIN,
            description="Load a Chroma transformer, or the small one that comes with these nodes.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=choices("diffusion_models"),
                    default=small.LABEL,
                    tooltip="A Chroma file from models/diffusion_models. The small Chroma needs "
                    "no download and paints pictures of 128 x 128 pixels.",
                ),
                _dtype_input(MODEL_DTYPE_CHOICES, MODEL_DTYPE_TIP),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="For LoRA, shift and sampler nodes of any pack."
                )
            ],
        )

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        path = locate("diffusion_models", model_name, small.TRANSFORMER)
        return io.NodeOutput(load_model(path, weight_dtype))


class ChromaApplyTransformer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaApplyTransformer",
            display_name="Apply Chroma Transformer",
            category=categories.MAIN,
            description="Run a Chroma that any other loader has loaded through this pack's "
            "transformer. Its weights are shared, not copied.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Chroma MODEL, for instance from Load Diffusion Model or a GGUF "
                    "loader.",
                )
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The same model with this pack's transformer; the input stays as "
                    "it is.",
                )
            ],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(apply_transformer(model))


class ChromaLoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaLoadTextEncoder",
            display_name="Load Chroma Text Encoder",
            category=categories.MAIN,
            description="Load the T5 text encoder that turns prompts into what Chroma reads, with "
            "the padding Chroma was trained with.",
            inputs=[
                io.Combo.Input(
                    "text_encoder_name",
                    options=choices("text_encoders"),
                    default=small.LABEL,
                    tooltip="A T5-XXL file from models/text_encoders; for the small Chroma, the "
                    "small Chroma's own.",
                ),
                _dtype_input(DTYPE_CHOICES, DTYPE_TIP),
            ],
            outputs=[
                io.Clip.Output(
                    display_name="CLIP",
                    tooltip="For Chroma Text Encode, or ComfyUI's own CLIP Text Encode.",
                )
            ],
        )

    @classmethod
    def execute(cls, text_encoder_name: str, weight_dtype: str) -> io.NodeOutput:
        path = locate("text_encoders", text_encoder_name, small.TEXT_ENCODER)
        return io.NodeOutput(load_clip(path, weight_dtype))


class ChromaLoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaLoadVAE",
            display_name="Load Chroma VAE",
            category=categories.MAIN,
            description="Load the Flux autoencoder that turns latents into pictures and back.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=choices("vae"),
                    default=small.LABEL,
                    tooltip="ae.safetensors of Flux from models/vae; for the small Chroma, the "
                    "small Chroma's own.",
                ),
            ],
            outputs=[
                io.Vae.Output(
                    display_name="VAE", tooltip="For VAE Decode, VAE Encode and their tiled forms."
                )
            ],
        )

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_vae(locate("vae", vae_name, small.VAE)))
