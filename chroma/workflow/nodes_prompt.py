"""The nodes that write, check and join prompts, without ComfyUI."""

import logging

from ..noise import MAX_SEED
from ..prompt.check import check_prompts
from ..prompt.long import concatenate, encode_long
from ..prompt.tags import AESTHETIC, PHOTOGRAPH, QUALITY, SEPARATORS, tagged
from ..prompt.tokens import Length, measure
from ..prompt.wildcard_files import FOLDER, WildcardFolders
from ..prompt.wildcards import expand_lines
from ..text.encoder import PadRule, TextEmbedding, TextEncoder
from .schema import Input, NodeType
from .values import Context

NONE, NO_SCORE = "none", -1
MAX_COUNT, MAX_REPEATS = 256, 50
log = logging.getLogger("chroma")


def wildcards(context: Context, text: str, seed: int, count: int):
    folders = WildcardFolders((context.models / FOLDER,))
    made = expand_lines(text, seed, count, folders.read_lines)
    log.info("%s", made)
    return (made,)


def prompt_tags(_: Context, text, quality, aesthetic, tags, separator, phrase, repeats):
    made = tagged(
        text,
        quality=None if quality == NONE else quality,
        aesthetic=None if aesthetic == NO_SCORE else aesthetic,
        tags=tags,
        separator=separator,
        phrase=phrase,
        repeats=repeats,
    )
    return (made,)


def prompt_check(_: Context, clip: TextEncoder, positive: str, negative: str, flash: bool):
    def count(prompt: str) -> Length:
        return measure(clip.tokenizer, prompt)

    lines = check_prompts(positive, negative, count, flash=flash)
    for line in lines:
        log.warning("%s", line)
    return ("\n".join((f"prompt: {count(positive)}; negative: {count(negative)}", *lines)),)


def encode_long_text(_: Context, clip: TextEncoder, text: str, pad_rule: str):
    return (encode_long(clip, text, PadRule(pad_rule)),)


def text_concat(_: Context, first: TextEmbedding, second: TextEmbedding):
    return (concatenate(first, second),)


TEXT = Input("text", "STRING")
WRITTEN = (("text", "STRING"),)
CONDITIONING = (("CONDITIONING", "CONDITIONING"),)

NODES = (
    NodeType(
        "ChromaWildcards",
        (
            TEXT, Input("seed", "INT", 0, 0, MAX_SEED, is_seed=True),
            Input("count", "INT", 1, 1, MAX_COUNT),
        ),
        WRITTEN,
        wildcards,
    ),
    NodeType(
        "ChromaPromptTags",
        (
            TEXT, Input("quality", "COMBO", NONE, choices=(NONE, *QUALITY)),
            Input("aesthetic", "INT", NO_SCORE, NO_SCORE, AESTHETIC[-1]),
            Input("tags", "STRING", ""),
            Input("separator", "COMBO", "period", choices=tuple(SEPARATORS)),
            Input("phrase", "STRING", PHOTOGRAPH),
            Input("repeats", "INT", 0, 0, MAX_REPEATS),
        ),
        WRITTEN,
        prompt_tags,
    ),
    NodeType(
        "ChromaPromptCheck",
        (
            Input("clip", "CLIP"), Input("positive", "STRING"), Input("negative", "STRING", ""),
            Input("flash", "BOOLEAN", False),
        ),
        (("report", "STRING"),),
        prompt_check,
        is_output=True,
    ),
    NodeType(
        "ChromaLongTextEncode",
        (
            Input("clip", "CLIP"), TEXT,
            Input("pad_rule", "COMBO", "reference", choices=tuple(r.value for r in PadRule)),
        ),
        CONDITIONING,
        encode_long_text,
    ),
    NodeType(
        "ChromaTextConcat",
        (Input("first", "CONDITIONING"), Input("second", "CONDITIONING")),
        CONDITIONING,
        text_concat,
    ),
)  # fmt: skip
