"""Which model files ComfyUI knows, what its menus offer, and in which precision to load them."""

from pathlib import Path

import comfy.model_patcher
import folder_paths
import torch

from ..chroma.devices import cpu_has_bf16
from ..chroma.errors import CheckpointError
from ..chroma.quant.products import EIGHT_BIT
from ..chroma.tiny import files as small

SMALL_CATEGORY = "chroma_small"
AUTO = "auto"
DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
DTYPE_CHOICES = [AUTO, *DTYPES]
MODEL_DTYPE_CHOICES = [*DTYPE_CHOICES, *EIGHT_BIT]


def register_small_model() -> None:
    """Make the small model's folder a category of its own among ComfyUI's model folders.

    Of its own, because its files bear general names that a user's files may bear as well.
    """
    folder_paths.add_model_folder_path(SMALL_CATEGORY, str(small.FOLDER))


def choices(category: str) -> list[str]:
    """What a menu of model files offers: the small model that ships, then the user's files."""
    files = [*folder_paths.get_filename_list(category), *gguf_files(category)]
    return [small.LABEL, *sorted(files, key=str.lower)]


def gguf_files(category: str) -> list[str]:
    """The GGUF files in the folders of a category; ComfyUI's own lists leave them out."""
    found: set[str] = set()
    for folder in folder_paths.get_folder_paths(category):
        names, _ = folder_paths.recursive_search(folder, excluded_dir_names=[".git"])
        found.update(folder_paths.filter_files_extensions(names, [".gguf"]))
    return list(found.difference(folder_paths.get_filename_list(category)))


def locate(category: str, name: str, small_file: Path) -> Path:
    """The file behind a menu entry. Raises CheckpointError if it is gone."""
    if name == small.LABEL:
        return small_file
    path = folder_paths.get_full_path(category, name)
    if path is None:
        raise CheckpointError(
            f"{name} is not in ComfyUI's {category} folder; refresh the page and choose again"
        )
    return Path(path)


def weight_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The dtype a menu entry stands for; None, of auto and 8 bits, leaves the choice to ComfyUI.

    ComfyUI computes in fp32 on every CPU; bf16 is several times faster where the CPU has it.
    """
    if choice in DTYPES:
        return DTYPES[choice]
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else None


def compute_natively(patcher: comfy.model_patcher.ModelPatcher, dtype: torch.dtype | None) -> None:
    """Let a CPU with bf16 instructions compute in the bf16 that the weights are in."""
    if dtype is torch.bfloat16 and patcher.load_device.type == "cpu" and cpu_has_bf16():
        patcher.set_model_compute_dtype(dtype)
