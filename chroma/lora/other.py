"""Tell whose LoRA a file is when it is not Chroma's."""

import re
from collections.abc import Iterable
from itertools import islice

from ..config import ChromaConfig

# The first whose pattern is found decides; beside numbers, "." is also the "_" of kohya's names.
_MODELS = tuple((re.compile(pattern), model) for pattern, model in (
    (r"(double|single)_stream_blocks\.", "HiDream"),
    (r"joint_transformer_blocks\.", "AuraFlow"),
    (r"joint_blocks\.", "Stable Diffusion 3"),
    (r"(img|txt)_mlp[._]fc1|individual_token_refiner", "Hunyuan Video"),
    (r"(img|txt)_mlp[._]net\.|(img|txt)_mod\.1", "Qwen-Image"),
    (r"to_qkv_mlp_proj|(double|single)_stream_modulation", "Flux.2"),
    (r"(noise|context)_refiner\.|layers\.\d+\.(attention|feed_forward)", "Z-Image or Lumina"),
    (r"nerf_blocks\.", "Chroma1-Radiance"),
    (r"(input_blocks\.\d+\.1|middle_block\.1|attentions\.\d+)\.transformer_blocks\.[1-9]",
     "Stable Diffusion XL"),
    (r"(input|output)_blocks\.|middle_block\.|(down|up)_blocks\.|mid_block[._]",
     "Stable Diffusion"),
    (r"transformer_blocks\.\d+\.attn[12]\.", "PixArt or LTX-Video"),
    (r"blocks\.\d+\.(self_attn|cross_attn|ffn|attn[12])[._]", "Wan"),
))  # fmt: skip
# Enough to tell; a header may list a million.
_LOOKED_AT = 10_000
_BLOCK = re.compile(
    r"(?:^|[._])(single_transformer_blocks|transformer_blocks|double_blocks|single_blocks)[._](\d+)"
)
# The separators in kohya's names that stand beside a number.
_BESIDE_NUMBER = re.compile(r"_(?=\d)|(?<=\d)_")


def recognise(names: Iterable[str], double_depth: int, single_depth: int) -> str | None:
    """Which other model the names that Chroma does not have belong to, or None.

    A block beyond Chroma's last tells a model whose names are otherwise the same.
    """
    spelled = list(islice(names, _LOOKED_AT))
    dotted = [_BESIDE_NUMBER.sub(".", name) for name in spelled]
    for pattern, model in _MODELS:
        if any(pattern.search(name) for name in dotted):
            return model
    last: dict[str, int] = {}
    for match in filter(None, map(_BLOCK.search, spelled)):
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    for kind, number in last.items():
        if number >= (single_depth if kind.startswith("single") else double_depth):
            if all(n < _depth_of_chroma1(other) for other, n in last.items()):
                return f"a larger Chroma than this one ({kind} {number}), such as Chroma1-HD"
            such = ", such as Qwen-Image" if kind == "transformer_blocks" else ""
            return f"a model of more blocks{such} ({kind} {number})"
    return None


def _depth_of_chroma1(kind: str) -> int:
    config = ChromaConfig()
    return config.single_depth if kind.startswith("single") else config.double_depth
