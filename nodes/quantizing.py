"""The node that makes smaller files of transformers and text encoders."""

import os
from pathlib import Path, PureWindowsPath

import folder_paths
from comfy_api.latest import io

from ..chroma.checkpoint.new_file import new_file, relative_name
from ..chroma.checkpoint.quantise import quantise_file
from ..chroma.checkpoint.recipe import TARGETS
from ..chroma.errors import CheckpointError
from ..chroma.tiny import files as small
from . import categories
from .host import choices, locate
from .host_report import Notes, progress_bar

# {category: the small model's file in it}; both are offered in one menu, as <category>/<file>.
SMALL_FILES = {"diffusion_models": small.TRANSFORMER, "text_encoders": small.TEXT_ENCODER}
NONE = "none"


def model_choices() -> list[str]:
    """A menu of transformers and text encoders, as <category>/<file>."""
    return [f"{category}/{name}" for category in SMALL_FILES for name in choices(category)]


def _calibrations() -> list[str]:
    files = Path(folder_paths.get_input_directory()).glob("*.safetensors")
    return [NONE, *sorted((file.name for file in files), key=str.lower)]


class ChromaQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaQuantize",
            display_name="Quantize Chroma Model",
            category=categories.TOOLS,
            description="Make a smaller file of a Chroma transformer or a T5 text encoder, beside "
            "the files that the loaders list. The original stays as it is.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_choices(),
                    default=model_choices()[0],
                    tooltip="A Chroma transformer from models/diffusion_models or a T5 text "
                    "encoder from models/text_encoders, in bf16, fp16 or fp32.",
                ),
                io.Combo.Input(
                    "target_format",
                    options=list(TARGETS),
                    default=TARGETS[0],
                    tooltip="q8_0 is closest to the original at about half the size of bf16; q6_k "
                    "to q4_0 are smaller and less exact. fp8mixed and int8 are for ComfyUI's own "
                    "loaders, too.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="",
                    placeholder="as the model, with the format",
                    tooltip="Name of the new file in the folder the model is listed from; the "
                    "format gives the ending. Empty: the model's name and the format. If the name "
                    "is taken, a number is added; nothing is ever overwritten.",
                ),
                io.String.Input(
                    "keep",
                    default="",
                    multiline=True,
                    placeholder="tensors to keep, one pattern per line",
                    tooltip="Parts of names of tensors that keep their precision, one per line; "
                    "* stands for any text. The approximator and the first and last layers always "
                    "do.",
                ),
                io.Combo.Input(
                    "calibration",
                    options=_calibrations(),
                    default=NONE,
                    tooltip="For fp8-learned: a safetensors file of layers' inputs from ComfyUI's "
                    "input folder. none: rounding to nearest at the best of a few scales.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="file_name",
                    tooltip="The new file's name in the loader's menu, once the page is refreshed.",
                )
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None) -> bool | str:
        return check_name(filename_prefix)

    @classmethod
    def execute(
        cls, model_name: str, target_format: str, filename_prefix: str, keep: str, calibration: str
    ) -> io.NodeOutput:
        category, name, source = find_model(model_name)
        folder = writable_folder(category)
        out = new_file(
            folder, filename_prefix.strip() or own_name(name, target_format), target_format
        )
        patterns = tuple(line.strip() for line in keep.splitlines() if line.strip())
        report = quantise_file(
            source, target_format, out, patterns, _calibration(calibration), progress_bar(),
            resumable=False,
        )  # fmt: skip
        file_name = str(out.relative_to(folder))
        notes = Notes([f"{file_name} ({target_format})", report.summary()])
        return io.NodeOutput(file_name, ui=notes.tell(cls.hidden and cls.hidden.unique_id))


def find_model(choice: str) -> tuple[str, str, Path]:
    """Category, name in it and file of a menu's entry. Raises CheckpointError if it is gone."""
    category, _, name = choice.partition("/")
    return category, name, locate(category, name, SMALL_FILES[category])


def check_name(prefix: str | None) -> bool | str:
    """True for a new file's name, an empty one, or one that is not known yet; else what is wrong.

    For nodes' validate_inputs.
    """
    if prefix and prefix.strip():
        try:
            relative_name(prefix)
        except CheckpointError as error:
            return str(error)
    return True


def own_name(name: str, ending: str) -> str:
    """What a file made of the menu's `name` is called unless the user says otherwise."""
    # Menus part folders as the system does, and this takes both ways.
    stem = "chroma-small" if name == small.LABEL else PureWindowsPath(name).stem
    return f"{stem}-{ending}"


def writable_folder(category: str) -> Path:
    """The folder of a category that files go to. Raises CheckpointError if there is none.

    ComfyUI lists models/unet before models/diffusion_models; the one of today's name is preferred.
    """
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(category)]
    folders.sort(key=lambda folder: folder.name != category)
    for folder in folders:
        if os.access(folder, os.W_OK):
            return folder
    try:
        folders[0].mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"none of ComfyUI's folders for {category} can be written to ({folders[0]}: "
            f"{error.strerror}); make one or allow writing to it"
        ) from None
    return folders[0]


def _calibration(name: str) -> Path | None:
    """The file behind a menu entry. Raises CheckpointError if it is gone."""
    if name == NONE:
        return None
    if name not in _calibrations():
        raise CheckpointError(
            f"{name} is not in ComfyUI's input folder; refresh the page and choose again"
        )
    return Path(folder_paths.get_input_directory()) / name
