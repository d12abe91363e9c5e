"""Calibration data in files: `<layer>` -> H (K, K), or inputs (n, K), of the layers of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..quant.gram import Gram
from .keys import strip_prefix
from .reader import read_header, read_tensors


@dataclass(frozen=True)
class Calibration:
    """Where the calibration data of each layer is: in memory, or in a file and read when needed."""

    tensors: Mapping[str, Tensor]
    path: Path | None
    names: Mapping[str, str]

    @classmethod
    def of(cls, source: "Path | Mapping[str, Tensor] | None") -> "Calibration":
        """From a safetensors file, from tensors by layer, or none. Raises CheckpointError."""
        if isinstance(source, Path):
            names = {_layer(name): name for name in read_header(source).tensors}
            return cls({}, source, names)
        tensors = {_layer(name): tensor for name, tensor in (source or {}).items()}
        return cls(tensors, None, {})

    def layers(self) -> set[str]:
        """The layers there is data of."""
        return {*self.tensors, *self.names}

    def gram(self, layer: str, columns: int) -> Gram | None:
        """The data of a layer with so many inputs, or None. Raises ChromaError if it is unfit."""
        data = self.tensors.get(layer)
        if self.path is not None and layer in self.names:
            data = read_tensors(read_header(self.path), {self.names[layer]: layer})[layer]
        return None if data is None else Gram.of(data, columns)


def save_calibration(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write H or inputs by layer to a safetensors file that `Calibration.of` reads."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _layer(name: str) -> str:
    return strip_prefix(name).removesuffix(".weight")
