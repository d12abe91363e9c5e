"""Foreign spellings of tensor names, repaired once, here."""

from collections.abc import Iterable

# Longest first: the first one that fits is taken off.
PREFIXES = (
    "model.diffusion_model.",
    "text_encoders.t5xxl.transformer.",
    "first_stage_model.",
    "t5xxl.transformer.",
    "diffusion_model.",
    "text_encoder_2.",
    "text_encoder.",
    "transformer.",
    "_orig_mod.",
    "vae.",
)

TRANSFORMER_PARTS = (
    "img_in.", "txt_in.", "distilled_guidance_layer.", "double_blocks.", "single_blocks.",
    "final_layer.",
)  # fmt: skip
DIFFUSERS_TRANSFORMER_PARTS = (
    "x_embedder.", "context_embedder.", "distilled_guidance_layer.", "transformer_blocks.",
    "single_transformer_blocks.", "proj_out.",
)  # fmt: skip
T5_PARTS = ("shared.", "encoder.block.", "encoder.final_layer_norm.", "encoder.embed_tokens.")
# Not "encoder." alone, which T5 has too.
AUTOENCODER_PARTS = (
    "encoder.conv_in.", "encoder.down.", "encoder.mid.", "encoder.norm_out.", "encoder.conv_out.",
    "decoder.",
)  # fmt: skip
DIFFUSERS_AUTOENCODER_PARTS = (
    "encoder.conv_in.", "encoder.down_blocks.", "encoder.mid_block.", "encoder.conv_norm_out.",
    "encoder.conv_out.", "decoder.",
)  # fmt: skip


def strip_prefix(name: str) -> str:
    """The name without the wrappers that other programs put around it, however many."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, stripped = name[len(prefix) :], True
                break
    return name


def belonging(names: Iterable[str], parts: tuple[str, ...]) -> dict[str, str]:
    """{name in the file: canonical name} of the tensors whose canonical names begin so."""
    return {name: short for name in names if (short := strip_prefix(name)).startswith(parts)}
