"""Finished layers of a long computation, kept until the file that they are for is whole."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quant.gram import Gram
from ..quant.learned import Rounded
from .reader import TensorInfo, read_header, read_tensors
from .write_safetensors import write_safetensors

# To be raised when the same weight and calibration would be rounded otherwise.
_METHOD = "1"


@dataclass(frozen=True)
class WorkFolder:
    """A folder with a file for each layer: what it became, and of which data."""

    path: Path

    def load(self, layer: str, key: str) -> Rounded | None:
        """The layer, if it was finished from the data that `key` stands for."""
        path = self._file(layer)
        if not path.is_file():
            return None
        try:
            header = read_header(path)
            found = read_tensors(header, {name: name for name in ("codes", "scale")})
            numbers = header.metadata
            if numbers["key"] != key:
                return None
            # A copy, so that the file can be removed while the layer is in use (Windows).
            return Rounded(
                found["codes"].clone(), found["scale"].clone(),
                float(numbers["output_error"]), float(numbers["nearest_error"]),
            )  # fmt: skip
        except (CheckpointError, KeyError, ValueError):
            return None

    def save(self, layer: str, key: str, rounded: Rounded) -> None:
        """Keep a finished layer. Raises CheckpointError where the disk does not take it."""
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the folder {self.path} for finished layers cannot be made ({error.strerror}); "
                "check the folder of the output"
            ) from None
        tensors = {
            "codes": TensorInfo("U8", tuple(rounded.codes.shape)),
            "scale": TensorInfo("F32", ()),
        }
        metadata = {
            "key": key,
            "output_error": repr(rounded.output_error),
            "nearest_error": repr(rounded.nearest_error),
        }
        with write_safetensors(self._file(layer), tensors, metadata) as writer:
            writer.write("codes", rounded.codes)
            writer.write("scale", rounded.scale)

    def remove(self) -> None:
        """Take away the layers and, unless somebody put more into it, the folder."""
        for pattern in ("*.layer.safetensors", "*.layer.safetensors.part"):
            for file in self.path.glob(pattern):
                file.unlink()
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _file(self, layer: str) -> Path:
        return self.path / f"{layer}.layer.safetensors"


def work_key(weight: Tensor, gram: Gram | None) -> str:
    """A digest of all that the rounding of a layer depends on."""
    digest = hashlib.sha256(_METHOD.encode())
    for tensor in (weight,) if gram is None else (weight, gram.data):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
