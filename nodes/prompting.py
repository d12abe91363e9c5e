"""Nodes that write, check and join prompts."""

from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from ..chroma.errors import PromptError
from ..chroma.noise import MAX_SEED
from ..chroma.prompt.check import check_prompts
from ..chroma.prompt.long import concatenate, join_parts, split_prompt
from ..chroma.prompt.tags import AESTHETIC, PHOTOGRAPH, QUALITY, SEPARATORS, tagged
from ..chroma.prompt.tokens import Length, measure
from ..chroma.prompt.wildcard_files import FOLDER, WildcardFolders
from ..chroma.prompt.wildcards import expand_lines
from ..chroma.text.encoder import TextEmbedding
from . import categories
from .conditioning import (
    CLIP_TIP,
    WEIGHTS_TIP,
    conditioning_output,
    pad_rule_input,
)
from .host_report import Notes
from .host_text import LENGTHS, PAD_RULE, ROWS, adopt_clip

NONE, NO_SCORE = "none", -1
QUALITIES = [NONE, *QUALITY]
MAX_COUNT, MAX_REPEATS = 256, 50

Conditioning = list[list[Any]]


def wildcard_folders() -> WildcardFolders:
    """models/wildcards, behind the `wildcards` folders of extra_model_paths.yaml."""
    listed = folder_paths.folder_names_and_paths.get(FOLDER, ([],))[0]
    return WildcardFolders((*map(Path, listed), Path(folder_paths.models_dir) / FOLDER))


def _output(tooltip: str) -> io.String.Output:
    return io.String.Output(display_name="text", tooltip=tooltip)


class ChromaWildcards(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaWildcards",
            display_name="Chroma Wildcards",
            category=categories.PROMPT,
            description="Make the choices in a prompt by a seed: {red|2::blue} picks an option, "
            "__colour__ a line of models/wildcards/colour.txt.",
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    tooltip="{a|b} picks a or b, {3::a|b} a three times as often. __name__ picks a "
                    r"line of models/wildcards/name.txt. Both may nest. \{ and \_ are plain.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="The same seed makes the same choices, on every machine.",
                ),
                io.Int.Input(
                    "count",
                    default=1,
                    min=1,
                    max=MAX_COUNT,
                    tooltip="Number of prompts, one a line, with seeds one apart: for a batch, "
                    "with prompt_per_line of Chroma Text Encode.",
                ),
            ],
            outputs=[_output("The prompt with all choices made; also shown in the node.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        return wildcard_folders().fingerprint()

    @classmethod
    def execute(cls, text: str, seed: int, count: int) -> io.NodeOutput:
        made = expand_lines(text, seed, count, wildcard_folders().read_lines)
        shown = Notes([made]).tell(cls.hidden and cls.hidden.unique_id)
        return io.NodeOutput(made, ui=shown)


class ChromaPromptTags(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaPromptTags",
            display_name="Chroma Prompt Tags",
            category=categories.PROMPT,
            description="Put tags behind the sentences of a prompt as Chroma's captions had them: "
            "quality, aesthetic score, tags of your own, and a repeated sentence.",
            inputs=[
                io.String.Input(
                    "text", multiline=True, tooltip="The prompt, in plain sentences. May be empty."
                ),
                io.Combo.Input(
                    "quality",
                    options=QUALITIES,
                    default=NONE,
                    tooltip="A quality tag, which may or may not have an effect.",
                ),
                io.Int.Input(
                    "aesthetic",
                    default=NO_SCORE,
                    min=NO_SCORE,
                    max=AESTHETIC[-1],
                    tooltip="Aesthetic score from 0 to 10; 11 stands for chosen pictures of other "
                    "models and may let parts of the prompt bleed. -1: no such tag.",
                ),
                io.String.Input(
                    "tags",
                    default="",
                    multiline=True,
                    tooltip="More tags, between commas, periods or one a line.",
                ),
                io.Combo.Input(
                    "separator",
                    options=list(SEPARATORS),
                    default="period",
                    tooltip="period for realistic pictures; comma pulls toward cartoon and anime.",
                ),
                io.String.Input(
                    "phrase",
                    default=PHOTOGRAPH,
                    tooltip="The sentence to repeat at the end. The one given makes pictures more "
                    "like photographs, since many captions of photographs ended in it.",
                ),
                io.Int.Input(
                    "repeats",
                    default=0,
                    min=0,
                    max=MAX_REPEATS,
                    tooltip="How often to repeat it; about 10 for photographs, 0 for not at all.",
                ),
            ],
            outputs=[_output("The prompt with its tags.")],
        )

    @classmethod
    def execute(cls, text, quality, aesthetic, tags, separator, phrase, repeats) -> io.NodeOutput:
        made = tagged(
            text,
            quality=None if quality == NONE else quality,
            aesthetic=None if aesthetic == NO_SCORE else aesthetic,
            tags=tags,
            separator=separator,
            phrase=phrase,
            repeats=repeats,
        )
        return io.NodeOutput(made)


class ChromaPromptCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaPromptCheck",
            display_name="Chroma Prompt Check",
            category=categories.PROMPT,
            description="Tell what in a prompt goes against the advice for Chroma: too long, a "
            "short negative prompt, tags between commas.",
            inputs=[
                io.Clip.Input("clip", tooltip=CLIP_TIP),
                io.String.Input("positive", multiline=True, tooltip="One prompt."),
                io.String.Input(
                    "negative",
                    default="",
                    multiline=True,
                    tooltip="The negative prompt: none, or 70 tokens and more.",
                ),
                io.Boolean.Input(
                    "flash", default=False, tooltip="On: for a Flash model, or with a Flash LoRA."
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="What is shown in the node."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip, positive: str, negative: str, flash: bool) -> io.NodeOutput:
        tokenizer = adopt_clip(clip).cond_stage_model.tokenizer

        def count(prompt: str) -> Length:
            return measure(tokenizer, prompt)

        notes = Notes([f"prompt: {count(positive)}; negative: {count(negative)}"])
        for line in check_prompts(positive, negative, count, flash=flash):
            notes.add(line, is_warning=True)
        shown = notes.tell(cls.hidden and cls.hidden.unique_id)
        return io.NodeOutput("\n".join(notes.lines), ui=shown)


class ChromaLongTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaLongTextEncode",
            display_name="Chroma Long Text Encode",
            category=categories.PROMPT,
            description="Encode a prompt of more than 512 tokens: in parts, cut between sentences, "
            "which are then joined. Nothing is cut off.",
            inputs=[
                io.Clip.Input("clip", tooltip=CLIP_TIP),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip=f"One prompt of any length. {WEIGHTS_TIP}",
                ),
                pad_rule_input(),
            ],
            outputs=[conditioning_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, text: str, pad_rule: str) -> io.NodeOutput:
        clip = adopt_clip(clip)
        rows = split_prompt(clip.cond_stage_model.tokenizer, text)
        pairs = [list(zip(*row, strict=True)) for row in rows]
        encoded = clip.encode_from_tokens_scheduled({ROWS: pairs, PAD_RULE: pad_rule})
        joined = [
            _condition(join_parts(_embedding(hidden, extra), rows), extra)
            for hidden, extra in encoded
        ]
        notes = Notes([f"parts of {', '.join(str(len(ids)) for ids, _ in rows)} tokens"])
        return io.NodeOutput(joined, ui=notes.tell(cls.hidden and cls.hidden.unique_id))


class ChromaTextConcat(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaTextConcat",
            display_name="Chroma Text Concat",
            category=categories.PROMPT,
            description="Join two encoded prompts into one that the model reads together, each "
            "picture of a batch with its own.",
            inputs=[
                io.Conditioning.Input("first", tooltip="Its areas and other settings are kept."),
                io.Conditioning.Input(
                    "second", tooltip="Goes behind it: one encoded prompt, or one for each picture."
                ),
            ],
            outputs=[conditioning_output()],
        )

    @classmethod
    def execute(cls, first: Conditioning, second: Conditioning) -> io.NodeOutput:
        if len(second) != 1:
            raise PromptError(
                f"the second conditioning holds {len(second)} prompts, expected one; "
                "connect a text encode node directly"
            )
        behind = _embedding(*second[0])
        return io.NodeOutput(
            [
                _condition(concatenate(_embedding(hidden, extra), behind), extra)
                for hidden, extra in first
            ]
        )


def _embedding(hidden: Any, extra: dict[str, Any]) -> TextEmbedding:
    full = torch.full(hidden.shape[:1], hidden.shape[1])
    return TextEmbedding(hidden, extra.get(LENGTHS, full))


def _condition(embedding: TextEmbedding, extra: dict[str, Any]) -> list[Any]:
    """An entry of CONDITIONING; it tells the lengths where they differ."""
    others = {key: value for key, value in extra.items() if key != LENGTHS}
    lengths = embedding.lengths
    differ = bool((lengths != embedding.hidden.shape[1]).any())
    return [embedding.hidden, {**others, LENGTHS: lengths} if differ else others]
