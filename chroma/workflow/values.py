"""What travels along the links of a workflow, and what the whole run shares."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...schedulers.shift import discrete_table, flux_shift, flux_table
from ..caching import CacheSettings
from ..errors import WorkflowError
from ..guidance import Guidance
from ..nag import NAG
from ..text.encoder import TextEmbedding
from ..tiny import files as small
from ..transformer import ChromaTransformer

# ComfyUI samples Chroma at Flux' mu of 1024 x 1024 pixels unless a node says otherwise.
DEFAULT_MU = 1.15
# The small model's file in each models subfolder.
SMALL_FILES = {
    "diffusion_models": small.TRANSFORMER,
    "text_encoders": small.TEXT_ENCODER,
    "vae": small.VAE,
}


@dataclass(frozen=True)
class Model:
    """MODEL: the transformer, its shift, and ComfyUI's table of the sigmas at that shift."""

    transformer: ChromaTransformer
    shift: float = math.exp(DEFAULT_MU)
    table: Tensor = field(default_factory=lambda: flux_table(DEFAULT_MU))
    # What Chroma Guidance put on it; the scale is the sampler's own.
    guidance: Guidance | None = None
    nag: NAG | None = None
    cache: CacheSettings | None = None

    def with_constant_shift(self, shift: float) -> "Model":
        return replace(self, shift=shift, table=discrete_table(shift))

    def with_flux_shift(
        self, width: int, height: int, base_shift: float, max_shift: float
    ) -> "Model":
        """Shifted for a picture in pixels, as Flux. Raises SamplingError where that is too far."""
        shift = flux_shift(width, height, base_shift, max_shift)
        return replace(self, shift=shift, table=flux_table(math.log(shift)))


@dataclass(frozen=True)
class Noise:
    """NOISE: the seed, or one for each row (RowSeeds), or None for no noise at all."""

    seed: int | None


@dataclass(frozen=True)
class Guider:
    """GUIDER: a model with its prompts and its guidance, or no more than the scale of it."""

    model: Model
    positive: TextEmbedding
    negative: TextEmbedding | None
    cfg: float | Guidance

    @property
    def plan(self) -> Guidance:
        """The guidance to sample with."""
        if isinstance(self.cfg, Guidance):
            return self.cfg
        return replace(self.model.guidance or Guidance(1.0), cfg=self.cfg)


# LATENT: {"samples": the autoencoder's raw latent (B, 16, h, w), "noise_mask": mask or absent}
Latent = dict[str, Tensor]


@dataclass
class Context:
    """Folders, device and results of one run."""

    device: torch.device
    models: Path
    inputs: Path
    outputs: Path
    prompt: dict[str, Any]
    workflow: dict[str, Any] | None = None
    # Files outside the models folder, by the (subfolder, name) that the workflow uses for them.
    files: dict[tuple[str, str], Path] = field(default_factory=dict)
    # Where SaveImage puts the picture instead of a numbered file in `outputs`.
    out_file: Path | None = None
    progress: bool = True
    saved: list[Path] = field(default_factory=list)
    # Of all sampling runs together.
    steps: int = 0
    passes: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def locate(self, folder: str, name: str) -> Path:
        """The file a widget names: "input" for pictures, else a models subfolder.

        Raises WorkflowError where there is none.
        """
        if name == small.LABEL and folder in SMALL_FILES:
            return SMALL_FILES[folder]
        if (folder, name) in self.files:
            path, remedy = self.files[folder, name], "check the name"
        elif folder == "input":
            path, remedy = self.inputs / name, "put it there, or name another folder with --input"
        else:
            path = self.models / folder / name
            remedy = f"put it there, name another folder with --models, or use '{small.LABEL}'"
        if not path.is_file() and not ((folder, name) in self.files and path.is_dir()):
            raise WorkflowError(f"the file {name} is not in {path.parent}; {remedy}")
        return path
