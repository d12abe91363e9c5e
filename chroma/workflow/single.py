"""The graph of a text-to-image run, as a user of ComfyUI would build it from our nodes."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...samplers import SAMPLERS, choose
from ...samplers.options import OPTIONS as SAMPLER_OPTIONS
from ...schedulers import SCHEDULERS
from ...schedulers.options import OPTIONS as SCHEDULE_OPTIONS
from ..caching import CacheSettings
from ..errors import ImageError, PromptError, SamplingError
from ..guidance import Guidance
from ..nag import NAGSettings
from ..noise import MAX_SEED
from ..pipeline import Settings, latent_size
from ..quant.products import EIGHT_BIT
from ..tiny import files as small
from .nodes_chroma import SCHEDULER_NODES
from .nodes_sampling import SAMPLER_NODES

# A link: the id of a node and the number of its output.
Output = list[Any]
# Each has nodes of its own in the graph, which lies whole in every picture.
MAX_PICTURES = 10_000


@dataclass(frozen=True)
class Extras:
    """What a run may have beyond Settings; each default leaves it out.

    `guidance` stands in place of the settings' cfg. `image` and `mask` name pictures in the input
    folder. Picture i has the seed plus i; `batch` of them are made at a time.
    """

    guidance: Guidance | None = None
    nag: NAGSettings | None = None
    cache: CacheSettings | None = None
    sampler_options: Mapping[str, float] = field(default_factory=dict)
    shift_mode: str = "constant"
    base_shift: float = 0.5
    max_shift: float = 1.15
    compat: bool = False
    image: str | None = None
    mask: str | None = None
    mask_channel: str = "red"
    count: int = 1
    batch: int = 1
    filename_prefix: str = "Chroma"


def text_to_image(
    prompts: Sequence[str],
    negative: str,
    settings: Settings,
    names: Mapping[str, str] | None = None,
    weight_dtype: str = "auto",
    extras: Extras | None = None,
) -> dict[str, Any]:
    """An API-format workflow that makes `extras.count` pictures of every prompt.

    Several prompts must be of one line each, since a text node holds all that run together.
    `names` maps "model", "text_encoder" and "vae" to file names; the small model's stand in.
    Raises ImageError, PromptError or SamplingError for settings that cannot be used.
    """
    extras = extras or Extras()
    _check(prompts, settings, extras)
    graph = _Graph(settings, extras)
    names = names or {}
    model = graph.add(
        "ChromaLoadModel", "Model", model_name=names.get("model", small.LABEL),
        weight_dtype=weight_dtype,
    )  # fmt: skip
    clip = graph.add(
        "ChromaLoadTextEncoder", "Text encoder",
        text_encoder_name=names.get("text_encoder", small.LABEL),
        weight_dtype="auto" if weight_dtype in EIGHT_BIT else weight_dtype,
    )  # fmt: skip
    vae = graph.add("ChromaLoadVAE", "VAE", vae_name=names.get("vae", small.LABEL))
    model = graph.add(
        "ChromaModelShift", "Shift", model=model, mode=extras.shift_mode, shift=settings.shift,
        base_shift=extras.base_shift, max_shift=extras.max_shift, width=settings.width,
        height=settings.height,
    )  # fmt: skip
    jobs = _jobs(prompts, settings.seed, extras)
    texts = [graph.encode("Prompt", clip, job.prompts) for job in jobs]
    against = graph.encode("Negative prompt", clip, [negative])
    model = graph.patched(model, against)
    latents = [graph.latent(vae, len(job.prompts)) for job in jobs]
    noises = [graph.noise(job.seed, len(job.prompts)) for job in jobs]
    sampler, sigmas = graph.sampler(), graph.sigmas(model)
    for text, noise, latent in zip(texts, noises, latents, strict=True):
        sampled = graph.add(
            "SamplerCustomAdvanced", "Sample", noise=noise,
            guider=graph.guider(model, text, against), sampler=sampler, sigmas=sigmas,
            latent_image=latent,
        )  # fmt: skip
        decoded = graph.add("VAEDecode", "Decode", samples=sampled, vae=vae)
        graph.add("SaveImage", "Save", images=decoded, filename_prefix=extras.filename_prefix)
    return graph.nodes


@dataclass(frozen=True)
class _Job:
    """Pictures made at a time: the prompt of each, and the first one's seed."""

    prompts: list[str]
    seed: int


def _jobs(prompts: Sequence[str], seed: int, extras: Extras) -> list[_Job]:
    rows = [prompt for prompt in prompts for _ in range(extras.count)]
    starts = range(0, len(rows), extras.batch)
    return [
        # A single seed is checked where it is used.
        _Job(rows[i : i + extras.batch], seed if i == 0 else (seed + i) % (MAX_SEED + 1))
        for i in starts
    ]


def _check(prompts: Sequence[str], settings: Settings, extras: Extras) -> None:
    if not prompts:
        raise PromptError("there is no prompt; give at least one")
    for name in ("count", "batch"):
        if getattr(extras, name) < 1:
            raise SamplingError(f"{name} {getattr(extras, name)} is not usable; expected 1 or more")
    if len(prompts) * extras.count > MAX_PICTURES:
        raise SamplingError(
            f"{len(prompts) * extras.count} pictures are too many for one run; expected at most "
            f"{MAX_PICTURES}, so run it several times with other seeds"
        )
    if extras.image is None:
        latent_size(settings.width, settings.height)
        for given, name in (
            (extras.mask is not None, "a mask"),
            (settings.denoise != 1, "denoise"),
        ):
            if given:
                raise ImageError(f"{name} needs a picture to start from; give --image as well")
    choose(SAMPLERS, settings.sampler, **extras.sampler_options)
    if settings.scheduler not in SCHEDULERS:
        raise SamplingError(
            f"unknown scheduler '{settings.scheduler}'; expected one of {', '.join(SCHEDULERS)}"
        )
    known = [option.name for option in SCHEDULE_OPTIONS.get(settings.scheduler, ())]
    for option in settings.schedule_options:
        if option not in known:
            raise SamplingError(
                f"the scheduler {settings.scheduler} has no option {option}; expected "
                + (" or ".join(known) or "none")
            )


class _Graph:
    """Nodes by their numbers; what is asked for twice is made once."""

    def __init__(self, settings: Settings, extras: Extras) -> None:
        self.settings, self.extras = settings, extras
        self.nodes: dict[str, dict[str, Any]] = {}
        self._made: dict[str, str] = {}
        self._titles = Counter[str]()

    def add(self, kind: str, title: str, **inputs: Any) -> Output:
        """The first output of such a node."""
        key = json.dumps([kind, title, inputs])
        if key not in self._made:
            self._made[key] = number = str(len(self.nodes) + 1)
            self._titles[title] += 1
            if self._titles[title] > 1:
                title += f" #{self._titles[title]}"
            self.nodes[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
        return [self._made[key], 0]

    def encode(self, title: str, clip: Output, prompts: Sequence[str]) -> Output:
        alike = len(set(prompts)) == 1
        return self.add(
            "ChromaTextEncode", title, clip=clip,
            text=prompts[0] if alike else "\n".join(prompts),
            pad_rule="reference", prompt_per_line=not alike,
        )  # fmt: skip

    def patched(self, model: Output, negative: Output) -> Output:
        """The model with a negative prompt in its attention and with a cache, where wanted."""
        nag, cache = self.extras.nag, self.extras.cache
        if nag is not None:
            model = self.add("ChromaNAG", "NAG", model=model, negative=negative, **asdict(nag))
        if cache is not None:
            model = self.add("ChromaBlockCache", "Cache", model=model, **asdict(cache))
        return model

    def latent(self, vae: Output, rows: int) -> Output:
        """An empty latent, or the picture to start from, for so many pictures."""
        settings, extras = self.settings, self.extras
        if extras.image is None:
            return self.add(
                "EmptySD3LatentImage", "Size",
                width=settings.width, height=settings.height, batch_size=rows,
            )  # fmt: skip
        image = self.add("LoadImage", "Picture", image=extras.image)
        latent = self.add("VAEEncode", "Encode", pixels=image, vae=vae)
        if rows > 1:
            latent = self.add("RepeatLatentBatch", "Repeat", samples=latent, amount=rows)
        if extras.mask is not None:
            mask = self.add("LoadImageMask", "Mask", image=extras.mask, channel=extras.mask_channel)
            latent = self.add("SetLatentNoiseMask", "Masked", samples=latent, mask=mask)
        return latent

    def noise(self, seed: int, rows: int) -> Output:
        kind = "RandomNoise" if rows == 1 else "ChromaBatchNoise"
        return self.add(kind, "Seed", noise_seed=seed)

    def sampler(self) -> Output:
        name, options = self.settings.sampler, dict(self.extras.sampler_options)
        if options.keys() <= {"eta", "s_noise"}:
            return self.add("ChromaSampler", "Sampler", sampler_name=name, **options)
        if name == "res_2s_ode":
            name, options["eta"] = "res_2s", 0.0
        options = {option.name: option.default for option in SAMPLER_OPTIONS[name]} | options
        return self.add(SAMPLER_NODES[name], "Sampler", **options)

    def sigmas(self, model: Output) -> Output:
        settings, name = self.settings, self.settings.scheduler
        own = {option.name: option.default for option in SCHEDULE_OPTIONS.get(name, ())}
        chosen = own | settings.schedule_options if own else {"scheduler_name": name}
        return self.add(
            SCHEDULER_NODES.get(name, "ChromaScheduler"), "Sigmas", model=model,
            steps=settings.steps, denoise=settings.denoise, **chosen, compat=self.extras.compat,
        )  # fmt: skip

    def guider(self, model: Output, positive: Output, negative: Output) -> Output:
        """Core's guider where the scale is all there is."""
        plan, cfg = self.extras.guidance, self.settings.cfg
        prompts = {"model": model, "positive": positive, "negative": negative}
        if plan is None or plan == Guidance(plan.cfg):
            return self.add("CFGGuider", "Guidance", **prompts, cfg=plan.cfg if plan else cfg)
        return self.add("ChromaGuider", "Guidance", **prompts, **asdict(plan))
