"""Nodes that make files of LoRA files: converted, merged, resized, extracted, put into a model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io

from ..chroma.checkpoint.container import GGUFCheckpoint
from ..chroma.checkpoint.identify import Kind
from ..chroma.checkpoint.new_file import new_file
from ..chroma.checkpoint.recipe import GGUF_TARGETS, SAFETENSORS_TARGETS
from ..chroma.config import ChromaConfig
from ..chroma.errors import LoraError
from ..chroma.lora.read import read_lora
from ..chroma.lora.rows import NONE, Row, chosen_rows, stacked_rows
from ..chroma.lora.tools.base import open_base
from ..chroma.lora.tools.concatenate import concatenate_loras
from ..chroma.lora.tools.convert import convert_lora
from ..chroma.lora.tools.extract import extract_lora
from ..chroma.lora.tools.merge import BASE, TARGETS, merge_into_checkpoint
from ..chroma.lora.tools.resize import resize_lora
from ..chroma.lora.tools.rules import RankRule
from ..chroma.lora.tools.spell import COMFYUI, STYLES
from ..chroma.tiny import files as small
from . import categories
from .host import choices
from .host import locate as locate_model
from .host_lora import config_of
from .host_report import Notes, progress_bar
from .lora import locate
from .lora_tools_inputs import (
    all_true,
    check_rule,
    lora_input,
    model_input,
    name_output,
    prefix_input,
    rank_input,
    stack_inputs,
)
from .menus import wrong_choice
from .quantizing import check_name, find_model, model_choices, own_name, writable_folder

LORAS, TRANSFORMERS = "loras", "diffusion_models"
MEASURES = (NONE, "sv_ratio", "sv_fro", "sv_cumulative")
# new_file takes the ending from a format: any of that container will do.
ANY_GGUF, ANY_SAFETENSORS = next(iter(GGUF_TARGETS)), next(iter(SAFETENSORS_TARGETS))
# Bytes on an accelerator for the largest matrix of a Chroma or T5-XXL and what is made of it.
NEEDED = 4 * 1024**3


@dataclass(frozen=True)
class NewFile:
    """A file to be made, and the folder of ComfyUI's that it lies below."""

    folder: Path
    path: Path

    @classmethod
    def of(cls, category: str, prefix: str, own: str, target: str = ANY_SAFETENSORS) -> "NewFile":
        """Called `prefix`, or else `own`; a taken name gets a number. Raises CheckpointError."""
        folder = writable_folder(category)
        return cls(folder, new_file(folder, prefix.strip() or own, target))

    def tell(self, node: type[io.ComfyNode], lines: Sequence[str]) -> io.NodeOutput:
        """The node's output: the name in the loaders' menus, with a tool's lines about the file."""
        name = str(self.path.relative_to(self.folder))
        # The first line is the whole path.
        notes = Notes([name, *lines[1:]])
        return io.NodeOutput(name, ui=notes.tell(node.hidden and node.hidden.unique_id))


class ChromaConvertLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaConvertLora",
            display_name="Convert Chroma LoRA",
            category=categories.TOOLS,
            description="Make a LoRA file in the spelling of another program, with the same "
            "result. The original stays as it is.",
            inputs=[
                lora_input(),
                io.Combo.Input(
                    "style",
                    options=list(STYLES),
                    default=COMFYUI,
                    tooltip="Whose names and parts: kohya (sd-scripts), diffusers or comfyui.",
                ),
                prefix_input("as the LoRA, with the style"),
                model_input(),
            ],
            outputs=[name_output()],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None) -> bool | str:
        return check_name(filename_prefix)

    @classmethod
    def execute(cls, lora_name, style, filename_prefix, model=None) -> io.NodeOutput:
        source = locate(lora_name)
        new = NewFile.of(LORAS, filename_prefix, own_name(lora_name, style))
        return new.tell(cls, convert_lora(source, style, new.path, _config(model)).lines())


class ChromaMergeLoras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaMergeLoras",
            display_name="Merge Chroma LoRAs",
            category=categories.TOOLS,
            description="Make one LoRA file that does what several do together, each at its "
            "strength. The originals stay as they are.",
            inputs=[
                *stack_inputs(),
                rank_input(0, "0: exact, the ranks of all LoRAs added up."),
                prefix_input("as the first LoRA, and merged"),
                model_input(),
            ],
            outputs=[name_output()],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None) -> bool | str:
        return check_name(filename_prefix)

    @classmethod
    def execute(cls, rank, filename_prefix, lora_stack=None, model=None, **rows) -> io.NodeOutput:
        chosen, config = _chosen(lora_stack, rows), _config(model)
        sources = _used((row, _ratio(row, config)) for row in chosen)
        new = NewFile.of(LORAS, filename_prefix, own_name(chosen[0].name, "merged"))
        written = concatenate_loras(
            sources, new.path, RankRule(rank or None), config=config, device=_device(),
            progress=progress_bar(),
        )  # fmt: skip
        return new.tell(cls, written.lines())


class ChromaResizeLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaResizeLora",
            display_name="Resize Chroma LoRA",
            category=categories.TOOLS,
            description="Make a LoRA file of a smaller rank that does nearly the same, by "
            "singular values. The original stays as it is.",
            inputs=[
                lora_input(),
                rank_input(32, "The largest of all modules; 0: as the measure has it."),
                io.Combo.Input(
                    "measure",
                    options=list(MEASURES),
                    default=NONE,
                    tooltip="How each module's rank is chosen, up to that of rank: by the ratio of "
                    "the largest to the smallest singular value, by the part of their norm (fro), "
                    "or by the part of their sum (cumulative). none: rank alone.",
                ),
                io.Float.Input(
                    "value",
                    default=0.9,
                    min=0.0,
                    max=1_000_000.0,
                    step=0.001,
                    tooltip="Of the measure: for sv_ratio 1 or more, such as 20; for the others up "
                    "to 1, such as 0.9.",
                ),
                prefix_input("as the LoRA, with its new size"),
                model_input(),
            ],
            outputs=[name_output()],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, rank=None, measure=None, value=None, filename_prefix=None
    ) -> bool | str:
        # ComfyUI leaves what it hands over to the node, the menu too.
        ruled = wrong_choice(cls, {"measure": measure}) or True
        if ruled is True and measure is not None:
            ruled = check_rule(rank, "measure", {} if measure == NONE else {measure: value})
        return all_true(ruled, check_name(filename_prefix))

    @classmethod
    def execute(cls, lora_name, rank, measure, value, filename_prefix, model=None) -> io.NodeOutput:
        source = locate(lora_name)
        limits = {} if measure == NONE else {measure: value}
        size = "-".join(
            ([f"r{rank}"] if rank else []) + [f"{name}{part:g}" for name, part in limits.items()]
        )
        new = NewFile.of(LORAS, filename_prefix, own_name(lora_name, size))
        written = resize_lora(
            source, new.path, RankRule(rank or None, **limits), config=_config(model),
            device=_device(), progress=progress_bar(),
        )  # fmt: skip
        return new.tell(cls, written.lines())


class ChromaExtractLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        models = choices(TRANSFORMERS)
        return io.Schema(
            node_id="ChromaExtractLora",
            display_name="Extract Chroma LoRA",
            category=categories.TOOLS,
            description="Make a LoRA file of the difference between two versions of a Chroma "
            "transformer. One tensor after another is read, so they need not fit into memory.",
            inputs=[
                io.Combo.Input(
                    "original", options=models, tooltip="What the LoRA will be applied to."
                ),
                io.Combo.Input(
                    "tuned", options=models, tooltip="What the original with the LoRA comes near."
                ),
                rank_input(64, "The largest of all modules; 0: as energy has it."),
                io.Float.Input(
                    "energy",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Part of each module's squared difference to keep, such as 0.9, by as "
                    "small a rank as it takes, up to that of rank. 0: rank alone.",
                ),
                prefix_input("as the tuned model, and lora"),
            ],
            outputs=[name_output()],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, rank=None, energy=None, filename_prefix=None) -> bool | str:
        limits = {} if energy == 0 else {"energy": energy}
        return all_true(check_rule(rank, "energy", limits), check_name(filename_prefix))

    @classmethod
    def execute(cls, original, tuned, rank, energy, filename_prefix) -> io.NodeOutput:
        first, second = (
            locate_model(TRANSFORMERS, name, small.TRANSFORMER) for name in (original, tuned)
        )
        new = NewFile.of(LORAS, filename_prefix, own_name(tuned, "lora"))
        written = extract_lora(
            first, second, new.path, RankRule(rank or None, energy=energy or None),
            device=_device(), progress=progress_bar(),
        )  # fmt: skip
        return new.tell(cls, written.lines())


class ChromaMergeLoraIntoCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaMergeLoraIntoCheckpoint",
            display_name="Merge LoRAs into Chroma Model",
            category=categories.TOOLS,
            description="Make a file of a Chroma transformer or a T5 text encoder with LoRAs in "
            "it, beside the files that the loaders list. The original stays as it is.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_choices(),
                    tooltip="A Chroma transformer from models/diffusion_models or a T5 text "
                    "encoder from models/text_encoders, in any format.",
                ),
                *stack_inputs(),
                io.Combo.Input(
                    "to",
                    options=list(TARGETS),
                    default=BASE,
                    tooltip="base: every tensor in its own format, which may round part of a weak "
                    "LoRA away; the node tells how much is kept. bf16: a plain file.",
                ),
                prefix_input("as the model, and merged", "the folder the model is listed from"),
            ],
            outputs=[name_output()],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None) -> bool | str:
        return check_name(filename_prefix)

    @classmethod
    def execute(cls, model_name, to, filename_prefix, lora_stack=None, **rows) -> io.NodeOutput:
        category, name, source = find_model(model_name)
        base, chosen = open_base(source), _chosen(lora_stack, rows)
        of_text = base.kind is Kind.T5
        loras = _used((row, row.text_encoder if of_text else row.strength) for row in chosen)
        gguf = to == BASE and isinstance(base.checkpoint, GGUFCheckpoint)
        new = NewFile.of(
            category, filename_prefix, own_name(name, "merged"),
            ANY_GGUF if gguf else ANY_SAFETENSORS,
        )  # fmt: skip
        made = merge_into_checkpoint(source, loras, new.path, to, progress_bar(), device=_device())
        return new.tell(cls, made.lines())


def _chosen(stack: Any, rows: Mapping[str, Any]) -> list[Row]:
    """A stack, then the rows of the node that name a file. Raises LoraError for none."""
    chosen = [*stacked_rows(stack), *chosen_rows(rows)]
    if not chosen:
        raise LoraError("no LoRA is chosen; choose one, or connect a LORA_STACK")
    return chosen


def _used(rows: Iterable[tuple[Row, float]]) -> list[tuple[Path, float]]:
    """Files and strengths without what is off. Raises LoraError where nothing is left."""
    used = [(locate(row.name), strength) for row, strength in rows if strength]
    if not used:
        raise LoraError("all LoRAs are at strength 0, which changes nothing; raise one of them")
    return used


def _ratio(row: Row, config: ChromaConfig | None) -> float:
    """The strength of all that a file changes. Raises LoraError where its parts have two."""
    if row.strength == row.text_encoder:
        return row.strength
    file = read_lora(locate(row.name), config)
    if file.transformer and file.text_encoder:
        raise LoraError(
            f"{row.name} changes the model at strength {row.strength:g} and the text encoder at "
            f"{row.text_encoder:g}; expected one strength for both, as one file is made of them"
        )
    return row.strength if file.transformer else row.text_encoder


def _config(model: Any) -> ChromaConfig | None:
    """The sizes of a MODEL; None, of Chroma1."""
    return None if model is None else config_of(model)


def _device() -> torch.device:
    """ComfyUI's CUDA device, with room made on it, else the CPU: others may lack fp64."""
    device = comfy.model_management.get_torch_device()
    if device.type != "cuda":
        return torch.device("cpu")
    comfy.model_management.free_memory(NEEDED, device)
    return device
