"""The nodes of ComfyUI's core that our workflows use, with the results ComfyUI gives."""

import logging
import re
import time
from pathlib import Path

import torch
from torch import Tensor

from ...samplers import SAMPLERS
from ...schedulers import SCHEDULERS, SCHEDULERS_COMPAT, get_sigmas
from ..autoencoder import LATENT_SCALE, LATENT_SHIFT, SPATIAL_FACTOR, Autoencoder
from ..caching import BlockCache
from ..config import LATENT_CHANNELS
from ..errors import ImageError, SamplingError
from ..guidance import Denoiser
from ..image import load_image, save_png
from ..noise import MAX_SEED, make_noise
from ..pipeline import check_widths, to_picture
from ..sampling import sample_latent
from ..text.encoder import TextEmbedding, TextEncoder
from ..tiled import decode_tiled
from .schema import Input, NodeType
from .values import Context, Guider, Latent, Model, Noise

CHROMA_PREFIX = "chroma_"
# Under ComfyUI's own names, what ComfyUI has with the same results.
SAMPLER_NAMES = ("euler", "heun", "res_multistep", *(CHROMA_PREFIX + name for name in SAMPLERS))
SCHEDULER_NAMES = (*SCHEDULERS_COMPAT, *(CHROMA_PREFIX + name for name in SCHEDULERS))
log = logging.getLogger("chroma")


def _sampler(name: str):
    return SAMPLERS[name.removeprefix(CHROMA_PREFIX)]


def _sigmas(model: Model, scheduler: str, steps: int, denoise: float) -> Tensor:
    if scheduler.startswith(CHROMA_PREFIX):
        name = scheduler.removeprefix(CHROMA_PREFIX)
        return get_sigmas(name, steps, shift=model.shift, denoise=denoise)
    return get_sigmas(scheduler, steps, denoise=denoise, compat_table=model.table)


def empty_latent(_: Context, width: int, height: int, batch_size: int):
    size = height // SPATIAL_FACTOR, width // SPATIAL_FACTOR
    return ({"samples": torch.zeros(batch_size, LATENT_CHANNELS, *size)},)


def _to_model_space(raw: Tensor) -> Tensor:
    # ComfyUI leaves an empty latent alone: zero stands for "nothing yet", not for a grey picture.
    return (raw - LATENT_SHIFT) * LATENT_SCALE if bool(raw.any()) else raw


def _from_model_space(latent: Tensor) -> Tensor:
    return latent.cpu() / LATENT_SCALE + LATENT_SHIFT


def sample(context: Context, noise: Noise, guider: Guider, sampler, sigmas: Tensor, latent: Latent):
    """Run one sampler; (LATENT of the last sigma, LATENT of the last denoised picture)."""
    if len(sigmas) == 0:
        return latent, latent
    device = context.device
    start = _to_model_space(latent["samples"]).to(device)
    shape = start.shape
    drawn = torch.zeros(shape) if noise.seed is None else make_noise(shape, noise.seed)
    model = guider.model
    cache = None if model.cache is None else BlockCache(model.cache)
    denoiser = Denoiser(
        model.transformer, guider.positive, guider.negative, guider.plan, model.nag, cache
    )
    last: dict[str, Tensor] = {}

    def on_step(state) -> None:
        last["denoised"] = state["denoised"]

    began = time.perf_counter()
    mask = latent.get("noise_mask")
    result = sample_latent(
        denoiser, sampler, sigmas.to(device), drawn.to(device), start, seed=noise.seed,
        mask=None if mask is None else mask.to(device),
        callback=on_step, disable_progress=not context.progress,
    )  # fmt: skip
    context.passes += denoiser.passes * len(start)
    if cache is not None:
        log.info("%s", cache)
        context.skipped += cache.skipped
    context.seconds += time.perf_counter() - began
    context.steps += len(sigmas) - 1
    outputs = [result, last.get("denoised", result)]
    return tuple({**latent, "samples": _from_model_space(out)} for out in outputs)


def sample_advanced(context: Context, noise, guider, sampler, sigmas, latent_image):
    return sample(context, noise, guider, sampler, sigmas, latent_image)


def cfg_guider(
    model: Model, positive: TextEmbedding, negative: TextEmbedding | None, cfg: float
) -> Guider:
    for text in (positive, negative):
        if text is not None:
            check_widths(model.transformer, text.hidden.shape[-1])
    return Guider(model, positive, negative, cfg)


def ksampler(
    context: Context, model, seed, steps, cfg, sampler_name, scheduler, positive, negative,
    latent_image, denoise,
):  # fmt: skip
    sigmas = _sigmas(model, scheduler, steps, denoise)
    guider = cfg_guider(model, positive, negative, cfg)
    result = sample(context, Noise(seed), guider, _sampler(sampler_name), sigmas, latent_image)
    return result[:1]


@torch.no_grad()
def vae_decode(context: Context, samples: Latent, vae: Autoencoder):
    raw = samples["samples"].to(context.device)
    return (to_picture(vae.decoder(raw)),)


def vae_decode_tiled(
    context: Context, samples: Latent, vae: Autoencoder, tile_size, overlap, **_: int
):
    latent = (samples["samples"].to(context.device) - LATENT_SHIFT) * LATENT_SCALE
    overlap = min(overlap, tile_size // 4)
    tiles = tile_size // SPATIAL_FACTOR, overlap // SPATIAL_FACTOR
    return (to_picture(decode_tiled(vae, latent, *tiles)),)


@torch.no_grad()
def vae_encode(context: Context, pixels: Tensor, vae: Autoencoder):
    for axis in (1, 2):
        size = pixels.shape[axis] // SPATIAL_FACTOR * SPATIAL_FACTOR
        if size == 0:
            raise ImageError(
                f"a picture side of {pixels.shape[axis]} pixels is too small; "
                f"expected at least {SPATIAL_FACTOR}"
            )
        pixels = pixels.narrow(axis, (pixels.shape[axis] - size) // 2, size)
    mean, _ = vae.moments(pixels[..., :3].movedim(-1, 1).to(context.device) * 2 - 1)
    return ({"samples": mean.float().cpu()},)


def repeat_latent(_: Context, samples: Latent, amount: int):
    out = {**samples, "samples": samples["samples"].repeat(amount, 1, 1, 1)}
    if "noise_mask" in samples and len(samples["noise_mask"]) > 1:
        out["noise_mask"] = samples["noise_mask"].repeat(amount, 1, 1, 1)
    return (out,)


def set_mask(_: Context, samples: Latent, mask: Tensor):
    return ({**samples, "noise_mask": mask.reshape(-1, 1, *mask.shape[-2:])},)


def load_picture(context: Context, image: str):
    return load_image(context.locate("input", image))


def load_mask(context: Context, image: str, channel: str):
    picture, mask = load_image(context.locate("input", image))
    return (mask if channel == "alpha" else picture[..., ("red", "green", "blue").index(channel)],)


def save_image(context: Context, images: Tensor, filename_prefix: str):
    """Write every picture of the batch as PREFIX_00001_.png, counting on from what is there."""
    _, height, width, _ = images.shape
    now = time.localtime()
    for token, text in {
        "%width%": str(width), "%height%": str(height), "%year%": str(now.tm_year),
        "%month%": f"{now.tm_mon:02}", "%day%": f"{now.tm_mday:02}",
        "%hour%": f"{now.tm_hour:02}", "%minute%": f"{now.tm_min:02}",
        "%second%": f"{now.tm_sec:02}",
    }.items():  # fmt: skip
        filename_prefix = filename_prefix.replace(token, text)
    stem = context.outputs / filename_prefix
    if not stem.parent.resolve().is_relative_to(context.outputs.resolve()):
        raise ImageError(
            f"{filename_prefix} leads out of {context.outputs} by a link in it; expected a name "
            "that stays inside"
        )
    for image in images:
        path = context.out_file or _next_file(stem)
        save_png(path, image, prompt=context.prompt, workflow=context.workflow)
        context.saved.append(path)
    return ()


def preview_image(context: Context, images: Tensor):
    """Without an interface to show them, previews are saved as well."""
    return save_image(context, images, "preview")


def _next_file(stem: Path) -> Path:
    pattern = re.compile(re.escape(stem.name) + r"_(\d+)_\.png")
    there = stem.parent.iterdir() if stem.parent.is_dir() else ()
    used = [int(match[1]) for file in there if (match := pattern.fullmatch(file.name))]
    return stem.with_name(f"{stem.name}_{max(used, default=0) + 1:05}_.png")


def clip_text_encode(_: Context, text: str, clip: TextEncoder):
    return (clip.encode([text]),)


def flux_sampling(_: Context, model: Model, max_shift, base_shift, width, height):
    return (model.with_flux_shift(width, height, base_shift, max_shift),)


def basic_scheduler(_: Context, model: Model, scheduler, steps, denoise):
    return (_sigmas(model, scheduler, steps, denoise),)


def beta_sampling(_: Context, model: Model, steps, alpha, beta):
    return (get_sigmas("beta", steps, compat_table=model.table, alpha=alpha, beta=beta),)


def split_sigmas(_: Context, sigmas: Tensor, step: int):
    if step >= len(sigmas):
        raise SamplingError(f"cannot split {len(sigmas) - 1} steps at step {step}; use fewer")
    return sigmas[: step + 1], sigmas[step:]


MODEL, LATENT_IN = Input("model", "MODEL"), Input("latent_image", "LATENT")
CFG = Input("cfg", "FLOAT", 8.0, 0.0, 100.0)
POSITIVE, NEGATIVE = Input("positive", "CONDITIONING"), Input("negative", "CONDITIONING")
STEPS, DENOISE = Input("steps", "INT", 20, 1, 10_000), Input("denoise", "FLOAT", 1.0, 0.0, 1.0)
PREFIX = Input("filename_prefix", "STRING", "ComfyUI", folder="output")
PICTURE = Input("image", "COMBO", folder="input", is_upload=True)


def _size(side: int) -> tuple[Input, Input]:
    return Input("width", "INT", side, 16, 16384), Input("height", "INT", side, 16, 16384)


def _latent_size(side: int) -> tuple[Input, ...]:
    return *_size(side), Input("batch_size", "INT", 1, 1, 4096)


def _seed(name: str) -> Input:
    return Input(name, "INT", 0, 0, MAX_SEED, is_seed=True)


def _one(kind: str) -> tuple[tuple[str, str], ...]:
    return ((kind, kind),)


NODES = (
    NodeType("EmptySD3LatentImage", _latent_size(1024), _one("LATENT"), empty_latent),
    NodeType("EmptyLatentImage", _latent_size(512), _one("LATENT"), empty_latent),
    NodeType(
        "RandomNoise", (_seed("noise_seed"),), _one("NOISE"),
        lambda _, noise_seed: (Noise(noise_seed),),
    ),
    NodeType("DisableNoise", (), _one("NOISE"), lambda _: (Noise(None),)),
    NodeType(
        "KSamplerSelect", (Input("sampler_name", "COMBO", choices=SAMPLER_NAMES),),
        _one("SAMPLER"), lambda _, sampler_name: (_sampler(sampler_name),),
    ),
    NodeType(
        "BasicScheduler",
        (MODEL, Input("scheduler", "COMBO", choices=SCHEDULER_NAMES), STEPS, DENOISE),
        _one("SIGMAS"), basic_scheduler,
    ),
    NodeType(
        "BetaSamplingScheduler",
        (
            MODEL, STEPS, Input("alpha", "FLOAT", 0.6, 0.0, 50.0),
            Input("beta", "FLOAT", 0.6, 0.0, 50.0),
        ),
        _one("SIGMAS"), beta_sampling,
    ),
    NodeType(
        "SplitSigmas", (Input("sigmas", "SIGMAS"), Input("step", "INT", 0, 0, 10_000)),
        (("high_sigmas", "SIGMAS"), ("low_sigmas", "SIGMAS")), split_sigmas,
    ),
    NodeType(
        "BasicGuider", (MODEL, Input("conditioning", "CONDITIONING")), _one("GUIDER"),
        lambda _, model, conditioning: (cfg_guider(model, conditioning, None, 1.0),),
    ),
    NodeType(
        "CFGGuider", (MODEL, POSITIVE, NEGATIVE, CFG), _one("GUIDER"),
        lambda _, **inputs: (cfg_guider(**inputs),),
    ),
    NodeType(
        "SamplerCustomAdvanced",
        (
            Input("noise", "NOISE"), Input("guider", "GUIDER"), Input("sampler", "SAMPLER"),
            Input("sigmas", "SIGMAS"), LATENT_IN,
        ),
        (("output", "LATENT"), ("denoised_output", "LATENT")), sample_advanced,
    ),
    NodeType(
        "KSampler",
        (
            MODEL, _seed("seed"), STEPS, CFG,
            Input("sampler_name", "COMBO", choices=SAMPLER_NAMES),
            Input("scheduler", "COMBO", choices=SCHEDULER_NAMES), POSITIVE, NEGATIVE, LATENT_IN,
            DENOISE,
        ),
        _one("LATENT"), ksampler,
    ),
    NodeType(
        "ModelSamplingAuraFlow", (MODEL, Input("shift", "FLOAT", 1.73, 0.01, 100.0)),
        _one("MODEL"), lambda _, model, shift: (model.with_constant_shift(shift),),
    ),
    NodeType(
        "ModelSamplingFlux",
        (
            MODEL, Input("max_shift", "FLOAT", 1.15, 0.0, 100.0),
            Input("base_shift", "FLOAT", 0.5, 0.0, 100.0), *_size(1024),
        ),
        _one("MODEL"), flux_sampling,
    ),
    NodeType(
        "CLIPTextEncode", (Input("text", "STRING"), Input("clip", "CLIP")),
        _one("CONDITIONING"), clip_text_encode,
    ),
    NodeType(
        "VAEDecode", (Input("samples", "LATENT"), Input("vae", "VAE")), _one("IMAGE"), vae_decode
    ),
    NodeType(
        "VAEDecodeTiled",
        (
            Input("samples", "LATENT"), Input("vae", "VAE"),
            Input("tile_size", "INT", 512, 64, 4096), Input("overlap", "INT", 64, 0, 4096),
            Input("temporal_size", "INT", 64, 8, 4096),
            Input("temporal_overlap", "INT", 8, 4, 4096),
        ),
        _one("IMAGE"), vae_decode_tiled,
    ),
    NodeType(
        "VAEEncode", (Input("pixels", "IMAGE"), Input("vae", "VAE")), _one("LATENT"), vae_encode
    ),
    NodeType(
        "SetLatentNoiseMask", (Input("samples", "LATENT"), Input("mask", "MASK")),
        _one("LATENT"), set_mask,
    ),
    NodeType(
        "RepeatLatentBatch", (Input("samples", "LATENT"), Input("amount", "INT", 1, 1, 64)),
        _one("LATENT"), repeat_latent,
    ),
    NodeType(
        "LoadImage", (PICTURE,), (("IMAGE", "IMAGE"), ("MASK", "MASK")), load_picture
    ),
    NodeType(
        "LoadImageMask",
        (PICTURE, Input("channel", "COMBO", "alpha", choices=("alpha", "red", "green", "blue"))),
        _one("MASK"), load_mask,
    ),
    NodeType(
        "SaveImage", (Input("images", "IMAGE"), PREFIX), (), save_image, is_output=True
    ),
    NodeType("PreviewImage", (Input("images", "IMAGE"),), (), preview_image, is_output=True),
)  # fmt: skip
