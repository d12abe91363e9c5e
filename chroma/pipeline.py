"""From files and a prompt to a picture, without ComfyUI."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..samplers import SAMPLERS, choose
from ..samplers.noise import RowSeeds
from ..schedulers import get_sigmas
from .autoencoder import SPATIAL_FACTOR, Autoencoder
from .caching import BlockCache, CacheSettings
from .checkpoint import load_autoencoder, load_text_encoder, load_transformer
from .checkpoint.container import is_gguf
from .config import LATENT_CHANNELS, PATCH
from .devices import best_device, best_dtype
from .errors import CheckpointError, ImageError, SamplingError
from .guidance import Denoiser, Guidance
from .nag import NAG, NAGSettings
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
    """One picture's settings; the defaults are the preset Base / HD."""

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


@torch.no_grad()
def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    negative: str = "",
    settings: Settings | None = None,
    *,
    guidance: Guidance | None = None,
    nag: NAGSettings | None = None,
    cache: CacheSettings | None = None,
    sampler_options: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    callback: StepCallback | None = None,
    disable_progress: bool = False,
) -> Tensor:
    """Render one picture per prompt, or per seed: (B, height, width, 3) fp32 in [0, 1].

    `guidance` stands in place of settings.cfg. With `seeds` each picture is the one that its seed
    gives alone, up to rounding; the prompts are repeated over them. Without, settings.seed draws
    the noise of the whole batch. `image` (1 or B, height, width, 3) in [0, 1] is what
    settings.denoise changes, where `mask` (1 or B, H, W) is 1 if there is one. Raises a ChromaError
    for settings that cannot be used, before anything is computed.
    """
    settings = settings or Settings()
    h, w = latent_size(settings.width, settings.height)
    sampler = choose(SAMPLERS, settings.sampler, **(sampler_options or {}))
    sigmas = get_sigmas(
        settings.scheduler, settings.steps, shift=settings.shift, denoise=settings.denoise,
        **settings.schedule_options,
    )  # fmt: skip
    plan = guidance or Guidance(settings.cfg)
    seed = settings.seed if seeds is None else RowSeeds.of(seeds)
    count = len(prompts) if seeds is None else len(seeds)
    _check_counts(count, len(prompts), image, mask)
    noise = make_noise((count, LATENT_CHANNELS, h, w), seed).to(pipeline.device)
    latent = torch.zeros_like(noise) if image is None else _encode(pipeline, image, noise)
    cond = pipeline.text_encoder.encode(prompts)
    # CFG++ samplers look at the negative prompt at every scale.
    needs_uncond = plan.uses_uncond or settings.sampler.endswith("cfg_pp")
    uncond = pipeline.text_encoder.encode([negative]) if needs_uncond or nag else None
    denoiser = Denoiser(
        pipeline.transformer, cond, uncond, plan,
        None if nag is None or uncond is None
        else NAG(nag, uncond.hidden, tuple(uncond.lengths.tolist())),
        None if cache is None else BlockCache(cache),
    )  # fmt: skip
    latent = sample_latent(
        denoiser, sampler, sigmas.to(pipeline.device), noise, latent, seed=seed,
        mask=None if mask is None else mask.to(pipeline.device),
        callback=callback, disable_progress=disable_progress,
    )  # fmt: skip
    return decode(pipeline.autoencoder, latent)


def _check_counts(count: int, prompts: int, image: Tensor | None, mask: Tensor | None) -> None:
    if not prompts or count % prompts:
        raise SamplingError(
            f"{prompts} prompts do not fit {count} seeds; expected one prompt, or one for each seed"
        )
    for name, given in (("images", image), ("masks", mask)):
        if given is not None and len(given) not in (1, count):
            raise ImageError(
                f"{len(given)} {name} do not fit {count} pictures; expected one, or one for each"
            )
    if mask is not None and image is None:
        raise ImageError("a mask needs an image, of which it keeps the rest; give one")


def _encode(pipeline: Pipeline, image: Tensor, noise: Tensor) -> Tensor:
    """Pictures (1 or B, H, W, 3) as latents like the noise. Raises ImageError for another size."""
    height, width = (side * SPATIAL_FACTOR for side in noise.shape[-2:])
    if image.shape[1:] != (height, width, 3):
        raise ImageError(
            f"the image is of shape {tuple(image.shape)}; expected (1, {height}, {width}, 3), the "
            "settings' height and width"
        )
    weight = next(pipeline.autoencoder.parameters())
    latent = pipeline.autoencoder.encode(image.movedim(-1, 1).to(weight) * 2 - 1)
    return latent.to(noise).expand_as(noise)


@torch.no_grad()
def decode(autoencoder: Autoencoder, latent: Tensor) -> Tensor:
    """Latent (B, 16, h, w) -> pictures (B, 8h, 8w, 3) fp32 on the CPU, clamped to [0, 1]."""
    weight = next(autoencoder.parameters())
    return to_picture(autoencoder.decode(latent.to(weight)))


def to_picture(pixels: Tensor) -> Tensor:
    """(B, 3, H, W), about [-1, 1] -> (B, H, W, 3) fp32 on the CPU, clamped to [0, 1]."""
    return ((pixels.float() + 1) / 2).clamp(0, 1).movedim(1, -1).cpu()
