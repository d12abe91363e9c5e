"""A LoRA file from one spelling to another, with the same result."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...config import ChromaConfig
from ...errors import LoraError
from ..file import LoraFile
from ..read import read_lora
from .headers import carried, specified
from .pack import Packed, pack
from .save import check_out, save_lora
from .spell import STYLES, Names


@dataclass(frozen=True)
class Written:
    """What a tool wrote: the file, how many tensors and bytes, and notes for the user."""

    path: Path
    tensors: int
    bytes: int
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        size = f"{self.tensors} tensors, {self.bytes / 1e6:.1f} MB"
        return [str(self.path), size, *self.notes]


def convert_lora(
    source: Path, style: str, out: Path, config: ChromaConfig | None = None
) -> Written:
    """Write `out`, the LoRA `source` in the spelling `style` ("kohya", "diffusers", "comfyui").

    config: the sizes of the model, by default Chroma1's. The result is the same wherever one form
    can say what the other says; notes tell where the form had to stay, and what was left out.
    Raises LoraError, CheckpointError where the disk does not take the file.
    """
    check_style(style)
    check_out(out, [source])
    file = read_lora(source, config)
    packed = pack(file.transformer, file.text_encoder, Names.of(config), style)
    return write(out, packed, carried(file.metadata), notes=left_out(file))


def write(
    out: Path,
    packed: Packed,
    metadata: Mapping[str, str],
    *,
    notes: list[str],
    merged: tuple[str, ...] = (),
) -> Written:
    """Save packed adapters under metadata brought up to date."""
    save_lora(out, packed.tensors, specified(metadata, out, merged) | packed.settings)
    size = sum(tensor.nbytes for tensor in packed.tensors.values())
    return Written(out, len(packed.tensors), size, tuple(packed.notes + notes))


def left_out(file: LoraFile) -> list[str]:
    """Lines about tensors that are not the model's and so are not written again."""
    notes = [
        f"left out: {count} tensors ({reason}), which Chroma does not have"
        for reason, count in file.skipped.items()
    ]
    if file.unknown:
        shown = ", ".join(file.unknown[:5])
        notes.append(f"left out: {len(file.unknown)} tensors that nothing here knows ({shown})")
    return notes


def check_style(style: str) -> None:
    """Raise LoraError unless it is one of the three."""
    if style not in STYLES:
        raise LoraError(f"the style '{style}' is unknown; expected one of {', '.join(STYLES)}")


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise LoraError unless LoRA files are usually stored in it; None keeps the sources'."""
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise LoraError(f"{dtype} is no dtype for a LoRA; expected fp32, fp16 or bf16")
