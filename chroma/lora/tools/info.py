"""What a LoRA file is: what it changes, how much of it there is, what it says of itself."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...config import ChromaConfig
from ..adapters import LowRank
from ..file import LoraFile
from ..read import read_lora
from ..report import Report, report
from .spell import style_of


@dataclass(frozen=True)
class Info:
    """A file in numbers. scales: what LoRAs are multiplied by (alpha / rank), ascending."""

    report: Report
    style: str
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    scales: tuple[float, ...]
    metadata: Mapping[str, str]

    def lines(self) -> list[str]:
        """For people."""
        found = self.report
        dtypes = ", ".join(f"{count} tensors in {name}" for name, count in self.dtypes.items())
        size = f"{self.parameters / 1e6:.2f} million parameters, {self.bytes / 1e6:.1f} MB"
        lines = [found.line(), f"  {size}: {dtypes}", f"  spelled as for {self.style}"]
        if self.scales:
            low, high = self.scales[0], self.scales[-1]
            lines.append(f"  alpha / rank {low:g}" + (f" to {high:g}" if high != low else ""))
        if found.base_model:
            lines.append(f"  trained on {found.base_model}")
        if found.trigger_words:
            lines.append(f"  trigger words: {', '.join(found.trigger_words)}")
        return lines


def lora_info(path: Path, config: ChromaConfig | None = None) -> Info:
    """Read and describe a file for a model of these sizes (Chroma1's). Raises LoraError."""
    return describe(read_lora(path, config))


def describe(file: LoraFile) -> Info:
    """Describe a file that was read."""
    tensors = [tensor for adapter in file.adapters() for tensor in adapter.tensors()]
    low_rank = [adapter for adapter in file.adapters() if isinstance(adapter, LowRank)]
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    return Info(
        report=report(file),
        style=style_of(file),
        parameters=sum(tensor.numel() for tensor in tensors),
        bytes=file.path.stat().st_size,
        dtypes=dict(dtypes.most_common()),
        scales=tuple(sorted({adapter.scale for adapter in low_rank})),
        metadata=dict(file.metadata),
    )
