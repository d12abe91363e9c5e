"""Text to image in two nodes: one that loads everything, and one that makes the picture of it."""

import logging

from ..noise import MAX_SEED
from ..pipeline import latent_size
from ..presets import PRESETS, own_size
from ..text.encoder import PadRule
from ..tiny import files as small
from .nodes_chroma import MODEL, MODEL_DTYPE, encode_text, load_clip, load_model, load_vae
from .nodes_core import cfg_guider, empty_latent, sample, vae_decode
from .nodes_sampling import apply_preset, batch_noise
from .schema import Input, NodeType
from .values import Context, Model

log = logging.getLogger("chroma")


def load(context: Context, model_name, text_encoder_name, vae_name, weight_dtype):
    return (
        *load_model(context, model_name, weight_dtype),
        *load_clip(context, text_encoder_name, "auto"),
        *load_vae(context, vae_name),
    )


def text_to_image(
    context: Context, model: Model, clip, vae, prompt, negative_prompt, seed, width, height,
    batch_size, preset, steps, cfg,
):  # fmt: skip
    p, side = PRESETS[preset].changed(steps, cfg), own_size(model.transformer.config)
    width, height = width or side, height or side
    latent_size(width, height)
    log.info("%d x %d, %s", width, height, p)
    if side == small.SIZE:
        log.info("%s", small.DRAWS)
    model, sampler, sigmas = apply_preset(model, p)
    positive, negative = (
        encode_text(context, clip, text, PadRule.REFERENCE.value, False)[0]
        for text in (prompt, negative_prompt)
    )
    guider = cfg_guider(model, positive, negative, p.cfg)
    (latent,) = empty_latent(context, width, height, batch_size)
    (noise,) = batch_noise(context, seed)
    sampled, _ = sample(context, noise, guider, sampler, sigmas, latent)
    return vae_decode(context, sampled, vae)


def _file(name: str, folder: str) -> Input:
    return Input(name, "COMBO", small.LABEL, folder=folder)


def _side(name: str) -> Input:
    return Input(name, "INT", 0, 0, 16384)


NODES = (
    NodeType(
        "ChromaLoad",
        (
            _file("model_name", "diffusion_models"), _file("text_encoder_name", "text_encoders"),
            _file("vae_name", "vae"), MODEL_DTYPE,
        ),
        (("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE")),
        load,
    ),
    NodeType(
        "ChromaTextToImage",
        (
            MODEL, Input("clip", "CLIP"), Input("vae", "VAE"), Input("prompt", "STRING"),
            Input("negative_prompt", "STRING"), Input("seed", "INT", 0, 0, MAX_SEED, is_seed=True),
            _side("width"), _side("height"), Input("batch_size", "INT", 1, 1, 64),
            Input("preset", "COMBO", next(iter(PRESETS)), choices=tuple(PRESETS)),
            Input("steps", "INT", 0, 0, 10_000), Input("cfg", "FLOAT", 0.0, 0.0, 100.0),
        ),
        (("IMAGE", "IMAGE"),),
        text_to_image,
    ),
)  # fmt: skip
