"""Inputs that nodes making files of LoRA files share, and the checks of what is entered there."""

from collections.abc import Mapping

from comfy_api.latest import io

from ..chroma.errors import LoraError
from ..chroma.lora.rows import NONE, ROWS
from ..chroma.lora.tools.rules import RankRule
from .lora import LoraStack, lora_names


def lora_input() -> io.Combo.Input:
    """The file to make another one of."""
    return io.Combo.Input("lora_name", options=lora_names(), tooltip="A file from models/loras.")


def rank_input(default: int, tooltip: str) -> io.Int.Input:
    """The largest rank; 0 sets none."""
    return io.Int.Input("rank", default=default, min=0, max=4096, tooltip=tooltip)


def prefix_input(placeholder: str, folder: str = "models/loras") -> io.String.Input:
    """The new file's name; `placeholder` says what it is without one."""
    return io.String.Input(
        "filename_prefix",
        default="",
        placeholder=placeholder,
        tooltip=f"Name of the new file in {folder}, without an ending. Empty: {placeholder}. If "
        "the name is taken, a number is added; nothing is ever overwritten.",
    )


def model_input() -> io.Model.Input:
    """What tells the sizes of the transformer."""
    return io.Model.Input(
        "model", optional=True, tooltip="The Chroma it is for, if that is not of the usual size."
    )


def stack_inputs() -> list[io.Input]:
    """A LORA_STACK, and rows of files with one strength each."""
    names = [NONE, *lora_names()]
    inputs: list[io.Input] = [
        LoraStack.Input(
            "lora_stack",
            optional=True,
            tooltip="LoRAs that come first: a LORA_STACK of this or another pack.",
        )
    ]
    for i in range(1, ROWS + 1):
        inputs += [
            io.Combo.Input(
                f"lora_{i}", options=names, default=NONE, tooltip="From models/loras, or none."
            ),
            io.Float.Input(
                f"strength_{i}",
                default=1.0,
                min=-100.0,
                max=100.0,
                step=0.01,
                tooltip="Of all that the file changes. 1 is as it was trained, 0 off.",
            ),
        ]
    return inputs


def name_output() -> io.String.Output:
    """The new file's name."""
    return io.String.Output(
        display_name="file_name",
        tooltip="The new file's name in the loaders' menus, once the page is refreshed.",
    )


def all_true(*checks: bool | str) -> bool | str:
    """True, or the first complaint."""
    return next((check for check in checks if check is not True), True)


def check_rule(rank: int | None, other: str, limits: Mapping[str, float | None]) -> bool | str:
    """True for a rule with a meaning, or one that is not known yet."""
    if None in (rank, *limits.values()):
        return True
    try:
        bounded = RankRule(rank or None, **limits).bounded
    except LoraError as error:
        return str(error)
    return bounded or f"rank is 0 without a limit by {other}; expected one of them"
