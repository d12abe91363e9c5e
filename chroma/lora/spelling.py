"""How trainers spell a tensor's name: wrappers in front, what the tensor is at the end.

Between the two stands the module's name, which `names` looks up; nothing here guesses at it.
"""

import re
from collections.abc import Iterator

# The longest that fits is taken off, again and again.
PREFIXES = tuple(sorted((
    "diffusion_model.", "model.diffusion_model.", "transformer.", "unet.", "base_model.model.",
    "model.", "_orig_mod.", "lora_unet_", "lora_transformer_", "lycoris_",
    "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lycoris_te_", "lycoris_te1_",
    "lycoris_te2_", "lycoris_te3_", "text_encoder.", "text_encoder_2.", "text_encoders.",
    "t5xxl.transformer.", "clip_l.transformer.", "t5xxl.",
), key=len, reverse=True))  # fmt: skip

# What a tensor is, by the end of its name. An adapter's name may stand before ".weight" (PEFT).
_PARTS = {
    "down": ("lora_down", "lora_A", "lora.down", "lora.lora_A", "lora_linear_layer.down"),
    "up": ("lora_up", "lora_B", "lora.up", "lora.lora_B", "lora_linear_layer.up"),
    "mid": ("lora_mid",),
    "magnitude": ("magnitude", "dora_scale", "lora_magnitude_vector"),
    **{name: (name,) for name in (
        "oft_R", "oft_blocks", "rescale", "a1", "a2", "b1", "b2", "bm",
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        "on_input", "diff", "diff_b", "set_weight", "w_norm", "b_norm",
    )},
    "alpha": ("alpha", "lora_alpha"),
}  # fmt: skip
_SUFFIXES = {
    **{f".{word}{end}": part for part, words in _PARTS.items() for word in words
       for end in ("", ".weight")},
    # Diffusers before PEFT, and XLabs and USO, whose module names end in "_lora1".
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".down.weight": "down", ".up.weight": "up",
    ".lora_B.bias": "up_bias", ".lora_up.bias": "up_bias",
    ".oft_R.scaled_oft": "scaled_oft",
}  # fmt: skip
_LONGEST = max(map(len, _SUFFIXES))
_NAMED = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector|oft_R)\.[\w-]+(\.weight|\.bias)?$")


def split_suffix(name: str) -> tuple[str, str] | None:
    """(module as the file spells it, what the tensor is), or None for an unknown ending."""
    for length in range(min(_LONGEST, len(name) - 1), 0, -1):
        if (part := _SUFFIXES.get(name[-length:])) is not None:
            return name[:-length], part
    if (match := _NAMED.search(name)) is not None:
        part = _SUFFIXES.get(f".{match[1]}{match[2] or ''}")
        return (name[: match.start()], part) if part is not None else None
    return None


def bodies(name: str) -> Iterator[str]:
    """The name as it is, and after each prefix that can be taken off its front."""
    yield name
    while (prefix := next((p for p in PREFIXES if name.startswith(p)), None)) is not None:
        name = name[len(prefix) :]
        yield name


def prefix_of(name: str) -> str:
    """All the prefixes in front of a name."""
    *_, body = bodies(name)
    return name[: len(name) - len(body)]
