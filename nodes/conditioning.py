"""The node that turns prompts into conditioning."""

from comfy_api.latest import io

from ..chroma.prompt.tokens import describe, measure
from ..chroma.text.encoder import PadRule
from . import categories
from .host_report import Notes
from .host_text import PAD_RULE, adopt_clip

PAD_RULES = [rule.value for rule in PadRule]
CLIP_TIP = "From Load Chroma Text Encoder, or CLIPLoader with type chroma."
WEIGHTS_TIP = "(word:1.2) weighs a word more, (word:0.8) less."
_PAD_RULE_TIP = (
    "How the padding behind the prompt takes part. reference: as in training. hf: diffusers. "
    "comfy_pad1, comfy_nopad: ComfyUI's encoder with and without one pad token. unmasked512: 512 "
    "tokens, all seen."
)


def pad_rule_input() -> io.Combo.Input:
    return io.Combo.Input(
        "pad_rule", options=PAD_RULES, default=PadRule.REFERENCE.value, tooltip=_PAD_RULE_TIP
    )


def conditioning_output() -> io.Conditioning.Output:
    return io.Conditioning.Output(
        display_name="CONDITIONING",
        tooltip="For the positive or negative input of a sampler or guider.",
    )


class ChromaTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaTextEncode",
            display_name="Chroma Text Encode",
            category=categories.PROMPT,
            description="Encode a prompt the way Chroma was trained: T5 does not see the padding, "
            "the transformer sees one token of it.",
            inputs=[
                io.Clip.Input("clip", tooltip=CLIP_TIP),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt, at most 512 tokens; the node shows how many it has and "
                    f"what is cut off. {WEIGHTS_TIP}",
                ),
                pad_rule_input(),
                io.Boolean.Input(
                    "prompt_per_line",
                    default=False,
                    tooltip="Off: one prompt. On: every line that is not empty is a prompt of its "
                    "own, the first for the first picture of the batch and so on.",
                ),
            ],
            outputs=[conditioning_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, text: str, pad_rule: str, prompt_per_line: bool) -> io.NodeOutput:
        clip = adopt_clip(clip)
        lines = [line for line in text.splitlines() if line.strip()] or [""]
        prompts = lines if prompt_per_line else [text]
        tokenizer = clip.cond_stage_model.tokenizer
        notes = Notes(describe([measure(tokenizer, prompt) for prompt in prompts]))
        shown = notes.tell(cls.hidden and cls.hidden.unique_id)
        tokens = clip.tokenize(prompts, **{PAD_RULE: pad_rule})
        return io.NodeOutput(clip.encode_from_tokens_scheduled(tokens), ui=shown)
