"""The graph of one text-to-image run, as a user of ComfyUI would build it from our nodes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...samplers import SAMPLERS
from ...schedulers import SCHEDULERS
from ..errors import SamplingError
from ..pipeline import Settings, latent_size
from ..presets import BASE
from ..quant.products import EIGHT_BIT
from ..tiny import files as small

SCHEDULER_NODES: dict[str, tuple[str, dict[str, Any]]] = {
    "beta": ("ChromaBetaScheduler", {"alpha": BASE.alpha, "beta": BASE.beta, "compat": False}),
    "sigmoid_offset": (
        "ChromaSigmoidOffsetScheduler",
        {"square_k": 1.0, "base_c": 0.5, "compat": False},
    ),
    "simple": ("BasicScheduler", {"scheduler": "simple"}),
}


def text_to_image(
    prompt: str,
    negative: str,
    settings: Settings,
    files: Mapping[str, Path | None],
    weight_dtype: str = "auto",
) -> dict[str, Any]:
    """An API-format workflow.

    `files` maps "model", "text_encoder" and "vae" to files; None is the small model's.
    Raises ImageError or SamplingError for settings that cannot be used.
    """
    latent_size(settings.width, settings.height)
    _known("sampler", settings.sampler, list(SAMPLERS))
    _known("scheduler", settings.scheduler, list(SCHEDULERS))
    names = {k: small.LABEL if path is None else path.name for k, path in files.items()}

    def node(kind: str, title: str = "", **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}

    def encode(title: str, text: str) -> dict[str, Any]:
        return node(
            "ChromaTextEncode", title, clip=["2", 0], text=text,
            pad_rule="reference", prompt_per_line=False,
        )  # fmt: skip

    kind, options = SCHEDULER_NODES[settings.scheduler]
    scheduler = node(
        kind, "Sigmas", model=["4", 0], steps=settings.steps, denoise=settings.denoise, **options
    )
    return {
        "1": node(
            "ChromaLoadModel", "Model", model_name=names["model"], weight_dtype=weight_dtype
        ),
        "2": node(
            "ChromaLoadTextEncoder", "Text encoder",
            text_encoder_name=names["text_encoder"],
            weight_dtype="auto" if weight_dtype in EIGHT_BIT else weight_dtype,
        ),
        "3": node("ChromaLoadVAE", "VAE", vae_name=names["vae"]),
        "4": node(
            "ChromaModelShift", "Shift", model=["1", 0], mode="constant", shift=settings.shift,
            base_shift=0.5, max_shift=1.15, width=settings.width, height=settings.height,
        ),
        "5": encode("Prompt", prompt),
        "6": encode("Negative prompt", negative),
        "7": node(
            "EmptySD3LatentImage", "Size",
            width=settings.width, height=settings.height, batch_size=1,
        ),
        "8": node("RandomNoise", "Seed", noise_seed=settings.seed),
        "9": node("ChromaSampler", "Sampler", sampler_name=settings.sampler),
        "10": scheduler,
        "11": node(
            "CFGGuider", "Guidance",
            model=["4", 0], positive=["5", 0], negative=["6", 0], cfg=settings.cfg,
        ),
        "12": node(
            "SamplerCustomAdvanced", "Sample", noise=["8", 0], guider=["11", 0],
            sampler=["9", 0], sigmas=["10", 0], latent_image=["7", 0],
        ),
        "13": node("VAEDecode", "Decode", samples=["12", 0], vae=["3", 0]),
        "14": node("SaveImage", "Save", images=["13", 0], filename_prefix="Chroma"),
    }  # fmt: skip


def _known(what: str, name: str, names: list[str]) -> None:
    if name not in names:
        raise SamplingError(f"unknown {what} '{name}'; expected one of {', '.join(names)}")
