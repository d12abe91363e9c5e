"""The LoRA nodes of this pack and of ComfyUI's core, without ComfyUI."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..lora.apply import AUTO, WAYS, Lora, with_loras
from ..lora.file import LoraFile
from ..lora.read import read_lora
from ..lora.report import report
from ..lora.rows import NONE, ROWS, Row, chosen_rows, stack_of, stacked_rows
from ..presets import FLASH
from ..text.encoder import TextEncoder
from .graph import check_name
from .nodes_sampling import apply_preset
from .schema import Input, NodeType
from .values import Context, Model

FOLDER = "loras"
log = logging.getLogger("chroma")


def apply_rows(
    context: Context, model: Model, clip: TextEncoder | None, rows: Iterable[Row], how: str = AUTO
) -> tuple[Model, TextEncoder | None]:
    """MODEL and CLIP with all the LoRAs; what goes in stays as it is. Raises LoraError."""
    loras = [
        Lora(
            read_lora(
                context.locate(FOLDER, row.name), model.transformer.config,
                None if clip is None else clip.model.config,
            ),
            row.strengths, how,
        )
        for row in rows
    ]  # fmt: skip
    if loras:
        model = replace(model, transformer=with_loras(model.transformer, loras))
    if clip is not None and any(lora.file.text_encoder for lora in loras):
        clip = replace(clip, model=with_loras(clip.model, loras))
    for lora in loras:
        _tell(lora.file, has_clip=clip is not None)
    return model, clip


def _tell(file: LoraFile, has_clip: bool) -> None:
    """A line in the log, as a warning where a part of the file is left out."""
    found = report(file)
    ignored = bool(file.text_encoder) and not has_clip
    level = logging.WARNING if ignored or found.skipped or found.unknown else logging.INFO
    addition = "; text encoder not applied, as no CLIP is connected" if ignored else ""
    log.log(level, "%s%s", found.line(), addition)


def load_lora(
    context: Context, model, clip, lora_name, strength, text_encoder_strength, how, blocks
):
    row = Row(lora_name, strength, text_encoder_strength, blocks)
    return apply_rows(context, model, clip, [row], how)


def lora_stack(context: Context, model, clip, lora_stack, how, **rows: Any):
    for i in range(1, ROWS + 1):
        check_name(f"lora_{i}", rows[f"lora_{i}"])
    stack = [*stacked_rows(lora_stack), *chosen_rows(rows)]
    return *apply_rows(context, model, clip, stack, how), stack_of(stack)


def lora_info(context: Context, lora_name: str, model: Model | None):
    config = None if model is None else model.transformer.config
    lines = report(read_lora(context.locate(FOLDER, lora_name), config)).lines()
    log.info("%s", "; ".join(lines))
    return ("\n".join(lines),)


def flash_lora(context: Context, model: Model, lora_name, strength, steps, how):
    model, _ = apply_rows(context, model, None, [Row(lora_name, strength)], how)
    preset = FLASH.changed(steps, cfg=0.0)
    log.info("%s", preset)
    return *apply_preset(model, preset), preset.cfg


def core_loader(context: Context, model, clip, lora_name, strength_model, strength_clip):
    if strength_model == 0 and strength_clip == 0:
        return model, clip
    return apply_rows(context, model, clip, [Row(lora_name, strength_model, strength_clip)])


def core_loader_model_only(context: Context, model, lora_name, strength_model):
    return core_loader(context, model, None, lora_name, strength_model, 0.0)[:1]


def _strength(name: str) -> Input:
    return Input(name, "FLOAT", 1.0, -100.0, 100.0)


MODEL, CLIP = Input("model", "MODEL"), Input("clip", "CLIP")
OPTIONAL_CLIP, OPTIONAL_MODEL = Input("clip", "CLIP", None), Input("model", "MODEL", None)
NAME = Input("lora_name", "COMBO", folder=FOLDER)
HOW = Input("how", "COMBO", AUTO, choices=WAYS)
BOTH = (("MODEL", "MODEL"), ("CLIP", "CLIP"))
STACKED = tuple(
    spec
    for i in range(1, ROWS + 1)
    for spec in (
        Input(f"lora_{i}", "COMBO", NONE),
        _strength(f"strength_{i}"), _strength(f"text_encoder_strength_{i}"),
    )
)  # fmt: skip

NODES = (
    NodeType(
        "ChromaLoadLora",
        (
            MODEL, OPTIONAL_CLIP, NAME, _strength("strength"), _strength("text_encoder_strength"),
            HOW, Input("blocks", "STRING", ""),
        ),
        BOTH,
        load_lora,
    ),
    NodeType(
        "ChromaLoraStack",
        (MODEL, OPTIONAL_CLIP, Input("lora_stack", "LORA_STACK", None), *STACKED, HOW),
        (*BOTH, ("LORA_STACK", "LORA_STACK")),
        lora_stack,
    ),
    NodeType(
        "ChromaLoraInfo", (NAME, OPTIONAL_MODEL), (("report", "STRING"),), lora_info,
        is_output=True,
    ),
    NodeType(
        "ChromaFlashLora",
        (MODEL, NAME, _strength("strength"), Input("steps", "INT", FLASH.steps, 1, 10_000), HOW),
        (("MODEL", "MODEL"), ("SAMPLER", "SAMPLER"), ("SIGMAS", "SIGMAS"), ("cfg", "FLOAT")),
        flash_lora,
    ),
    NodeType(
        "LoraLoader",
        (MODEL, CLIP, NAME, _strength("strength_model"), _strength("strength_clip")),
        BOTH,
        core_loader,
    ),
    NodeType(
        "LoraLoaderModelOnly",
        (MODEL, NAME, _strength("strength_model")),
        (("MODEL", "MODEL"),),
        core_loader_model_only,
    ),
)  # fmt: skip
