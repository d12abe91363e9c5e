"""Write a LoRA file: all at once or not at all, with the hashes that others look it up by."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint.reader import BITS, SUFFIXES, TensorInfo
from ...checkpoint.write_safetensors import write_safetensors
from ...errors import LoraError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
# Both are the SHA-256 of the tensors' bytes: sd-scripts' and Civitai's, and sai-modelspec's.
_SD_SCRIPTS, _MODELSPEC = "sshs_model_hash", "modelspec.hash_sha256"
# sd-scripts' older hash is of bytes at a place that depends on the header; it is left out.
_LEGACY = "sshs_legacy_hash"
HASHES = (_SD_SCRIPTS, _MODELSPEC, _LEGACY)


def save_lora(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors with this metadata and their hashes.

    Raises LoraError for no tensors, CheckpointError where the disk does not take the file.
    """
    if not tensors:
        raise LoraError(f"nothing is left to be written to {path.name}")
    infos = {name: TensorInfo(_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    digest = _digest(tensors, infos)
    kept = {key: text for key, text in metadata.items() if key not in HASHES}
    with write_safetensors(
        path, infos, kept | {_SD_SCRIPTS: digest, _MODELSPEC: f"0x{digest}"}
    ) as w:
        for name, tensor in tensors.items():
            w.write(name, tensor)


def check_out(out: Path, sources: Sequence[Path]) -> None:
    """Raise LoraError unless `out` can be the name of a new safetensors file beside the sources."""
    if out.suffix.lower() not in SUFFIXES:
        raise LoraError(f"--out {out.name}: expected a name ending in {' or '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise LoraError(f"the folder {out.parent} does not exist; make it first")
    for source in sources:
        if out.exists() and source.exists() and out.samefile(source):
            raise LoraError(f"{out.name} is a source itself; give another name for the output")


def _digest(tensors: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> str:
    """SHA-256 of the file behind its header: the widest elements first, then by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors, key=lambda name: (-BITS[infos[name].dtype], name)):
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()
