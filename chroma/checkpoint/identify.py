"""Tell what a file holds by the names and shapes of its tensors."""

from collections.abc import Mapping
from enum import Enum

from .keys import strip_prefix
from .reader import TensorInfo


class Kind(Enum):
    """The kinds of file people confuse; the value is the name shown to them."""

    CHROMA = "a Chroma transformer"
    CHROMA_DIFFUSERS = "a Chroma transformer in diffusers' layout"
    RADIANCE = "a Chroma1-Radiance transformer"
    FLUX = "a Flux transformer"
    FLUX_DIFFUSERS = "a Flux transformer in diffusers' layout"
    FLUX2 = "a Flux.2 transformer"
    QWEN_IMAGE = "a Qwen-Image transformer"
    WAN = "a Wan video transformer"
    HUNYUAN_VIDEO = "a Hunyuan Video transformer"
    LUMINA = "a Lumina or Z-Image transformer"
    HIDREAM = "a HiDream transformer"
    SD3 = "a Stable Diffusion 3 transformer"
    SDXL = "a Stable Diffusion XL checkpoint"
    SD = "a Stable Diffusion 1 or 2 checkpoint"
    T5 = "a T5 text encoder"
    UMT5 = "a UMT5 text encoder"
    LANGUAGE_MODEL = "a language model used as a text encoder"
    CLIP = "a CLIP text encoder"
    AUTOENCODER = "a Flux autoencoder"
    AUTOENCODER_DIFFUSERS = "a Flux autoencoder in diffusers' layout"
    AUTOENCODER_OTHER = "an autoencoder of another model"
    LORA = "a LoRA"
    UNKNOWN = "of a kind that is not known here"


_LORA_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lokr_", ".hada_")
_FLUX_LATENT_CHANNELS = 16
# Parts of names that only these models have, all of them together.
_OTHERS = {
    Kind.FLUX2: ("double_stream_modulation_img",),
    Kind.HUNYUAN_VIDEO: ("individual_token_refiner.",),
    Kind.HIDREAM: ("double_stream_blocks.", "single_stream_blocks."),
    Kind.LUMINA: ("noise_refiner.", "context_refiner."),
    Kind.QWEN_IMAGE: ("transformer_blocks.", "img_mlp.net.", "txt_mlp.net."),
    Kind.WAN: ("blocks.0.self_attn.", "blocks.0.cross_attn.", "blocks.0.ffn."),
    Kind.LANGUAGE_MODEL: ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp."),
}


def identify(tensors: Mapping[str, TensorInfo]) -> Kind:
    """The kind of a file, from its header alone. Prefixes of any depth are looked through.

    Of a checkpoint with several models in it, the kind of its transformer.
    """
    text = "\n".join(tensors)

    def has(*parts: str) -> bool:
        return all(part in text for part in parts)

    if any(mark in text for mark in _LORA_MARKS):
        return Kind.LORA
    if has("distilled_guidance_layer", "double_blocks."):
        return Kind.RADIANCE if has("nerf_blocks.") else Kind.CHROMA
    if (other := next((k for k, parts in _OTHERS.items() if has(*parts)), None)) is not None:
        return other
    if has("double_blocks.", "img_attn.qkv"):
        return Kind.FLUX
    if has("single_transformer_blocks."):
        return Kind.CHROMA_DIFFUSERS if has("distilled_guidance_layer") else Kind.FLUX_DIFFUSERS
    if has("joint_blocks."):
        return Kind.SD3
    if has("input_blocks.", "output_blocks."):
        return Kind.SDXL if has("conditioner.") or has("label_emb.") else Kind.SD
    if has("block.1.layer.0.SelfAttention.relative_attention_bias"):
        return Kind.UMT5
    if has("SelfAttention.relative_attention_bias"):
        return Kind.T5
    if has("text_model.encoder.layers"):
        return Kind.CLIP
    if has("decoder.up.", "encoder.down."):
        return Kind.AUTOENCODER if _has_flux_latents(tensors) else Kind.AUTOENCODER_OTHER
    if has("decoder.up_blocks.", "encoder.down_blocks."):
        return Kind.AUTOENCODER_DIFFUSERS if _has_flux_latents(tensors) else Kind.AUTOENCODER_OTHER
    return Kind.UNKNOWN


def _has_flux_latents(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the decoder takes 16 channels of a picture (autoencoders of video have 5 axes)."""
    for name, info in tensors.items():
        if strip_prefix(name) == "decoder.conv_in.weight":
            return len(info.shape) == 4 and info.shape[1] == _FLUX_LATENT_CHANNELS
    return True
