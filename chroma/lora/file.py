"""What a LoRA file holds, under the model's own parameter names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapters import Adapter


@dataclass(frozen=True)
class Placed:
    """One adapter, and which rows (first, end) of the parameter it changes; None for all."""

    adapter: Adapter
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class LoraFile:
    """One file's adapters by parameter key ("double_blocks.0.img_attn.qkv.weight").

    transformer, text_encoder: {parameter key: adapters of it or of its rows, in the file's order}.
    skipped: {what the model does not have, such as "Flux modulation": tensors left out}.
    unknown: tensor names that nothing here understands, sorted. metadata: the file's own, as text.
    prefix: what stands before most modules' names, such as "lora_unet_".
    """

    path: Path
    transformer: Mapping[str, list[Placed]] = field(default_factory=dict)
    text_encoder: Mapping[str, list[Placed]] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    metadata: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""

    def adapters(self) -> Iterator[Adapter]:
        """Every adapter in the file, the transformer's first."""
        for part in (self.transformer, self.text_encoder):
            for placed in part.values():
                yield from (one.adapter for one in placed)
