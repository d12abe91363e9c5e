"""From files and a prompt to a picture, without ComfyUI."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..samplers import SAMPLERS
from ..schedulers import get_sigmas
from .autoencoder import SPATIAL_FACTOR, Autoencoder
from .checkpoint import load_autoencoder, load_text_encoder, load_transformer
from .checkpoint.container import is_gguf
from .config import LATENT_CHANNELS, PATCH
from .devices import best_device, best_dtype
from .errors import CheckpointError, ImageError, SamplingError
from .guidance import Denoiser
from .noise import make_noise
from .presets import BASE
from .quant.products import EXACT
from .sampling import StepCallback, sample_latent
from .text.encoder import TextEncoder
from .text.find_tokenizer import find_tokenizer
from .text.tokenizer import Tokenizer
from .tiny import files as small
from .transformer import ChromaTransformer

MAX_SIDE = 16384


@dataclass(frozen=True)
class Pipeline:
    """The three models of one text-to-image run, and the device they compute on."""

    transformer: ChromaTransformer
    text_encoder: TextEncoder
    autoencoder: Autoencoder
    device: torch.device

    @classmethod
    def load(
        cls,
        model: Path | None = None,
        text_encoder: Path | None = None,
        tokenizer: Path | None = None,
        vae: Path | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        expand: bool = False,
        products: str = EXACT,
    ) -> "Pipeline":
        """Read the files; the small model that ships stands in where none is given.

        `device` and `dtype` (of transformer and text encoder) are chosen by what the machine has.
        Quantised files stay quantised in memory unless `expand` asks for `dtype`. `products` in
        "int8" or "fp8" let the transformer's blocks multiply in 8 bits where the device can.
        Raises CheckpointError for a file that does not fit.
        """
        if text_encoder is not None and tokenizer is None and not is_gguf(text_encoder):
            raise CheckpointError(
                f"{text_encoder.name} needs its tokenizer; give the tokenizer.json of T5 as well"
            )
        device = device or best_device()
        dtype = dtype or best_dtype(device)
        kw: Any = {"dtype": dtype, "device": device, "expand": expand}
        encoder = load_text_encoder(text_encoder or small.TEXT_ENCODER, **kw)
        pipeline = cls(
            load_transformer(model or small.TRANSFORMER, products=products, **kw),
            TextEncoder(_tokenizer(tokenizer, text_encoder), encoder),
            load_autoencoder(vae or small.VAE, dtype=torch.float32, device=device),
            device,
        )
        check_widths(pipeline.transformer, encoder.config.d_model)
        return pipeline


@dataclass(frozen=True)
class Settings:
    """One picture's settings; the defaults are the model author's."""

    width: int = 1024
    height: int = 1024
    steps: int = BASE.steps
    cfg: float = BASE.cfg
    seed: int = 0
    sampler: str = BASE.sampler
    scheduler: str = BASE.scheduler
    shift: float = BASE.shift
    denoise: float = 1.0
    schedule_options: dict[str, Any] = field(default_factory=dict)


def _tokenizer(tokenizer: Path | None, text_encoder: Path | None) -> Tokenizer:
    if text_encoder is None:
        return Tokenizer.from_file(tokenizer or small.TOKENIZER)
    return find_tokenizer(tokenizer, text_encoder)


def check_widths(transformer: ChromaTransformer, theirs: int) -> None:
    """Raises CheckpointError unless the transformer reads text vectors `theirs` wide."""
    ours = transformer.config.context_dim
    if ours != theirs:
        raise CheckpointError(
            f"the text encoder makes vectors of {theirs}, the transformer reads {ours}; "
            "choose files that belong together (Chroma1 with T5-XXL, or both of the small model)"
        )


def latent_size(width: int, height: int) -> tuple[int, int]:
    """Latent (height, width) of a picture in pixels. Raises ImageError unless both are in 16s."""
    step = SPATIAL_FACTOR * PATCH
    for name, side in (("width", width), ("height", height)):
        if side % step or not step <= side <= MAX_SIDE:
            near = min(max(step, round(side / step) * step), MAX_SIDE)
            raise ImageError(
                f"{name} {side} is not usable; expected a multiple of {step} from {step} to "
                f"{MAX_SIDE}, for instance {near}"
            )
    return height // SPATIAL_FACTOR, width // SPATIAL_FACTOR


def find_sampler(name: str) -> Any:
    """The sampler function. Raises SamplingError naming the ones there are."""
    if name not in SAMPLERS:
        raise SamplingError(f"unknown sampler '{name}'; expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


@torch.no_grad()
def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    negative: str = "",
    settings: Settings | None = None,
    *,
    callback: StepCallback | None = None,
    disable_progress: bool = False,
) -> Tensor:
    """Render one picture per prompt: (B, height, width, 3) fp32 in [0, 1].

    Raises a ChromaError for settings that cannot be used, before anything is computed.
    """
    settings = settings or Settings()
    h, w = latent_size(settings.width, settings.height)
    sampler = find_sampler(settings.sampler)
    sigmas = get_sigmas(
        settings.scheduler, settings.steps, shift=settings.shift, denoise=settings.denoise,
        **settings.schedule_options,
    )  # fmt: skip
    noise = make_noise((len(prompts), LATENT_CHANNELS, h, w), settings.seed).to(pipeline.device)
    cond = pipeline.text_encoder.encode(prompts)
    # CFG++ samplers look at the negative prompt at every scale.
    alone = settings.cfg == 1 and not settings.sampler.endswith("cfg_pp")
    uncond = None if alone else pipeline.text_encoder.encode([negative])
    denoiser = Denoiser(pipeline.transformer, cond, uncond, settings.cfg)
    latent = sample_latent(
        denoiser, sampler, sigmas.to(pipeline.device), noise, torch.zeros_like(noise),
        seed=settings.seed,
        callback=callback, disable_progress=disable_progress,
    )  # fmt: skip
    return decode(pipeline.autoencoder, latent)


@torch.no_grad()
def decode(autoencoder: Autoencoder, latent: Tensor) -> Tensor:
    """Latent (B, 16, h, w) -> pictures (B, 8h, 8w, 3) fp32 on the CPU, clamped to [0, 1]."""
    weight = next(autoencoder.parameters())
    return to_picture(autoencoder.decode(latent.to(weight)))


def to_picture(pixels: Tensor) -> Tensor:
    """(B, 3, H, W), about [-1, 1] -> (B, H, W, 3) fp32 on the CPU, clamped to [0, 1]."""
    return ((pixels.float() + 1) / 2).clamp(0, 1).movedim(1, -1).cpu()
