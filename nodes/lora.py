"""Nodes that put LoRAs on a MODEL and a CLIP, and tell what is in a file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..chroma.errors import LoraError
from ..chroma.lora.read import read_lora
from ..chroma.lora.report import report
from ..chroma.lora.rows import NONE, ROWS, Row, chosen_rows, stack_of, stacked_rows
from ..chroma.lora.strengths import parse_blocks
from ..chroma.presets import FLASH
from . import categories
from .host_lora import AUTO, HOW, apply_to_clip, apply_to_model, config_of, read_for
from .host_report import Notes
from .host_sampling import apply_preset

LoraStack = io.Custom("LORA_STACK")
BLOCKS_EXAMPLE = "double 0-9: 0.5, single: 1"
HOW_TIP = (
    "auto: merged into plain weights, and beside quantised ones, which stay as they are: exact and "
    "nearly as fast as without. patch: merged into the values of all. bypass: beside all weights."
)


def lora_names() -> list[str]:
    """What menus of LoRAs offer."""
    return sorted(folder_paths.get_filename_list("loras"), key=str.lower)


def locate(name: str) -> Path:
    """The file behind a menu entry or a name in a stack. Raises LoraError if it is gone."""
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise LoraError(
            f"{name} is not in ComfyUI's loras folder; refresh the page and choose again"
        )
    return Path(path)


def apply_rows(model: Any, clip: Any, rows: Iterable[Row], how: str) -> tuple[Any, Any, Notes]:
    """MODEL and CLIP with all LoRAs, in their order, and a line on each. Raises LoraError."""
    notes = Notes()
    for row in rows:
        file = read_for(model, locate(row.name))
        model, applied = apply_to_model(model, file, row.strengths, how)
        line = f"{report(file).line()}; strength {row.strength:g}: {applied}"
        left_out = bool(file.skipped or file.unknown or applied.absent)
        if file.text_encoder and clip is None:
            line += "; text encoder not applied, as no CLIP is connected"
            left_out = True
        elif file.text_encoder:
            clip, applied = apply_to_clip(clip, file, row.text_encoder, how)
            line += f"; text encoder strength {row.text_encoder:g}: {applied}"
            left_out |= bool(applied.absent)
        notes.add(line, left_out)
    if not notes.lines:
        notes.add("no LoRA chosen")
    return model, clip, notes


def _name_input(name: str, options: list[str], tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(name, options=options, tooltip=tooltip)


def _strength_input(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=1.0, min=-100.0, max=100.0, step=0.01, tooltip=tooltip)


def _how_input() -> io.Combo.Input:
    return io.Combo.Input("how", options=list(HOW), default=AUTO, tooltip=HOW_TIP)


def _model_input() -> io.Model.Input:
    return io.Model.Input("model", tooltip="A Chroma MODEL from any loader; it stays as it is.")


def _clip_input() -> io.Clip.Input:
    return io.Clip.Input(
        "clip", optional=True, tooltip="For LoRAs that change the text encoder, too."
    )


def _model_output() -> io.Model.Output:
    return io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA.")


def _clip_output() -> io.Clip.Output:
    return io.Clip.Output(display_name="CLIP", tooltip="The text encoder with the LoRA, if any.")


def _node_id(cls: type[io.ComfyNode]) -> str | None:
    return cls.hidden and cls.hidden.unique_id


def _blocks_are_text(blocks: str | None) -> bool | str:
    try:
        parse_blocks(blocks or "")
    except LoraError as error:
        return str(error)
    return True


class ChromaLoadLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaLoadLora",
            display_name="Load Chroma LoRA",
            category=categories.LORA,
            description="Put a LoRA of any trainer on a Chroma model, also one made for Flux.1 as "
            "far as it fits. The node tells what was applied and what was not.",
            inputs=[
                _model_input(),
                _clip_input(),
                _name_input("lora_name", lora_names(), "A file from models/loras."),
                _strength_input("strength", "On the model. 1 is as it was trained, 0 off."),
                _strength_input("text_encoder_strength", "On the text encoder, if it has a part."),
                _how_input(),
                io.String.Input(
                    "blocks",
                    default="",
                    placeholder=BLOCKS_EXAMPLE,
                    tooltip="Factors on the strength for kinds of blocks (double, single, other) "
                    f"or numbers of them: {BLOCKS_EXAMPLE}. Empty: 1 everywhere.",
                ),
            ],
            outputs=[_model_output(), _clip_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, blocks=None) -> bool | str:
        return _blocks_are_text(blocks)

    @classmethod
    def execute(
        cls, model, lora_name, strength, text_encoder_strength, how, blocks, clip=None
    ) -> io.NodeOutput:
        row = Row(lora_name, strength, text_encoder_strength, blocks)
        model, clip, notes = apply_rows(model, clip, [row], how)
        return io.NodeOutput(model, clip, ui=notes.tell(_node_id(cls)))


class ChromaLoraStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = [NONE, *lora_names()]
        return io.Schema(
            node_id="ChromaLoraStack",
            display_name="Chroma LoRA Stack",
            category=categories.LORA,
            description="Put several LoRAs on a Chroma model, one after the other, behind those of "
            "a stack from another node.",
            inputs=[
                _model_input(),
                _clip_input(),
                LoraStack.Input(
                    "lora_stack",
                    optional=True,
                    tooltip="LoRAs that come first: a LORA_STACK of this or another pack.",
                ),
                *(each for i in range(1, ROWS + 1) for each in _row_inputs(i, names)),
                _how_input(),
            ],
            outputs=[
                _model_output(),
                _clip_output(),
                LoraStack.Output(
                    display_name="LORA_STACK", tooltip="All these LoRAs, for another stack node."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, how, clip=None, lora_stack=None, **rows) -> io.NodeOutput:
        stack = [*stacked_rows(lora_stack), *chosen_rows(rows)]
        model, clip, notes = apply_rows(model, clip, stack, how)
        return io.NodeOutput(model, clip, stack_of(stack), ui=notes.tell(_node_id(cls)))


def _row_inputs(i: int, names: list[str]) -> list[io.Input]:
    return [
        io.Combo.Input(
            f"lora_{i}", options=names, default=NONE, tooltip="A file from models/loras, or none."
        ),
        _strength_input(f"strength_{i}", "On the model. 1 is as it was trained, 0 off."),
        _strength_input(f"text_encoder_strength_{i}", "On the text encoder, if it has a part."),
    ]


class ChromaLoraInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaLoraInfo",
            display_name="Chroma LoRA Info",
            category=categories.LORA,
            description="Tell what is in a LoRA file: how much of it fits Chroma, ranks, trainer, "
            "trigger words.",
            inputs=[
                _name_input("lora_name", lora_names(), "A file from models/loras."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The Chroma it is for, if that is not of the usual size.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="What is shown in the node."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lora_name, model=None) -> io.NodeOutput:
        config = None if model is None else config_of(model)
        notes = Notes(report(read_lora(locate(lora_name), config)).lines())
        return io.NodeOutput("\n".join(notes.lines), ui=notes.tell(_node_id(cls)))


class ChromaFlashLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaFlashLora",
            display_name="Chroma Flash LoRA",
            category=categories.LORA,
            description="Make a Chroma that paints in few steps without guidance of one that does "
            "not, by a flash LoRA, with the sampler, sigmas and cfg that belong to it.",
            inputs=[
                _model_input(),
                _name_input(
                    "lora_name",
                    lora_names(),
                    "A flash LoRA from models/loras, such as chroma-flash-heun_r64.",
                ),
                _strength_input("strength", "1 is as it was made."),
                io.Int.Input(
                    "steps",
                    default=FLASH.steps,
                    min=1,
                    max=10_000,
                    tooltip="Length of the way from noise to picture.",
                ),
                _how_input(),
            ],
            outputs=[
                _model_output(),
                io.Sampler.Output(display_name="SAMPLER", tooltip="For SamplerCustomAdvanced."),
                io.Sigmas.Output(display_name="SIGMAS", tooltip="Noise levels from 1 to 0."),
                io.Float.Output(display_name="cfg", tooltip="1: guidance is in the LoRA."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, lora_name, strength, steps, how) -> io.NodeOutput:
        model, _, notes = apply_rows(model, None, [Row(lora_name, strength)], how)
        preset = FLASH.changed(steps, cfg=0.0)
        notes.add(str(preset))
        return io.NodeOutput(*apply_preset(model, preset), preset.cfg, ui=notes.tell(_node_id(cls)))
