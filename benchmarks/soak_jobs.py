"""What the soak benchmark queues: files, good jobs with their seeds, bad requests, and their order.

All of it follows from one seed. Every round of jobs ends with the same reference job.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from chroma_nodes.chroma.caching import CacheSettings
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.guidance import Guidance
from chroma_nodes.chroma.nag import NAGSettings
from chroma_nodes.chroma.pipeline import Settings
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.chroma.workflow.single import Extras, text_to_image
from chroma_nodes.samplers import SAMPLERS
from chroma_nodes.schedulers import SCHEDULERS
from lora_files import write_lora
from safetensors.torch import load_file
from torch import Tensor

Graph = dict[str, Any]

ROUND = 10
# Steps of a run that is interrupted: more than it can make before the interrupt arrives.
LONG = 400
BOTH = ["a 3d emoji of a cat", "a flat emoji of a red apple on a blue background"]
NEGATIVE = "blurry, low quality"


class Kind(Enum):
    """How a job is meant to end."""

    PICTURE = "picture"
    INTERRUPTED = "interrupted"
    CANCELLED = "cancelled while queued"
    REFUSED = "refused when posted"
    FAILING = "stopped by an error"


@dataclass(frozen=True)
class Job:
    """A graph and its ending: `message` is part of the error, `interrupt_at` a step."""

    kind: Kind
    name: str
    graph: Graph
    message: str = ""
    interrupt_at: int = 0


@dataclass(frozen=True)
class Format:
    """A model file of the menu, as which dtype it is loaded, and a text encoder with it."""

    model: str
    dtype: str = "auto"
    text_encoder: str = small.LABEL


FORMATS = {
    "bf16": Format(small.LABEL, "bf16"),
    "fp32": Format(small.LABEL, "fp32"),
    "Q8_0": Format("q8_0.gguf", text_encoder="t5-q8_0.gguf"),
    "fp8": Format("fp8.safetensors"),
    "int8": Format("int8.safetensors"),
    "products in int8": Format(small.LABEL, "int8"),
    "Q8_0 expanded": Format("q8_0.gguf", "bf16"),
}
# A copy, so that what ComfyUI keeps of other jobs' models is not there after a reference job.
REFERENCE = Format("reference.safetensors", "bf16")
# {name: (how, files with their strengths)}
LORAS = {
    "no LoRA": ("auto", {}),
    "LoRA": ("auto", {"0": 0.8}),
    "two LoRAs": ("auto", {"0": 0.5, "1": -0.4}),
    "LoRA merged": ("patch", {"1": 0.6}),
    "LoRA beside": ("bypass", {"2": 1.0}),
}
SIZES = ((64, 64), (128, 128), (64, 128), (96, 64))
PICTURE = {"image": "example.png"}
MASK = {"mask": "example-with-hole.png", "mask_channel": "alpha"}
WORKFLOWS = {
    "text to image": Extras(),
    "batch of prompts": Extras(count=2, batch=2),
    "image to image": Extras(**PICTURE),
    "inpaint": Extras(**PICTURE, **MASK),
    "guidance": Extras(Guidance(4.0, "linear", 2.0, zero_star=True, apg_eta=0.5)),
    "NAG": Extras(nag=NAGSettings()),
    "block cache": Extras(cache=CacheSettings(0.2)),
    "core nodes": Extras(),
}


def make_files(models: Path) -> None:
    """Quantised forms of the small model, LoRAs, and damaged files, in ComfyUI's model folders."""
    folders = {name: models / name for name in ("diffusion_models", "text_encoders", "loras")}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    transformers = folders["diffusion_models"]
    for target, name in (
        ("q8_0", "q8_0.gguf"), ("fp8", "fp8.safetensors"), ("int8", "int8.safetensors"),
    ):  # fmt: skip
        quantise_file(small.TRANSFORMER, target, transformers / name)
    quantise_file(small.TEXT_ENCODER, "q8_0", folders["text_encoders"] / "t5-q8_0.gguf")
    (folders["text_encoders"] / "tokenizer.json").write_bytes(small.TOKENIZER.read_bytes())
    (transformers / REFERENCE.model).write_bytes(small.TRANSFORMER.read_bytes())
    weights = {k: w for k, w in load_file(small.TRANSFORMER).items() if _in_blocks(k, w)}
    for seed in range(3):
        write_lora(folders["loras"] / f"{seed}.safetensors", weights, rank=4, seed=seed)
    wide = {key: weight.repeat(1, 2) for key, weight in weights.items()}
    write_lora(folders["loras"] / "too-wide.safetensors", wide)
    (folders["loras"] / "broken.safetensors").write_bytes(b"\x10" * 40)
    (transformers / "broken.safetensors").write_bytes(b"\x10" * 40)
    whole = (transformers / "q8_0.gguf").read_bytes()
    (transformers / "cut-off.gguf").write_bytes(whole[: len(whole) // 2])
    (transformers / "vae.safetensors").write_bytes(small.VAE.read_bytes())


def _in_blocks(key: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and "_blocks." in key


def node_of(graph: Graph, kind: str) -> tuple[str, dict[str, Any]]:
    """Id and inputs of the first node of a class."""
    return next((k, n["inputs"]) for k, n in graph.items() if n["class_type"] == kind)


def with_loras(graph: Graph, how: str, files: dict[str, float], **inputs: Any) -> Graph:
    """The graph with LoRA nodes right behind its model loader."""
    loader, _ = node_of(graph, "ChromaLoadModel")
    users = [node["inputs"] for node in graph.values() if node["inputs"].get("model")]
    last = [loader, 0]
    for name, strength in files.items():
        node_id = f"lora{name}"
        graph[node_id] = {
            "class_type": "ChromaLoadLora",
            "inputs": {
                "model": last, "lora_name": f"{name}.safetensors", "strength": strength,
                "text_encoder_strength": 1.0, "how": how, "blocks": "", **inputs,
            },
        }  # fmt: skip
        last = [node_id, 0]
    for user in users:
        if user["model"] == [loader, 0]:
            user["model"] = last
    return graph


def through_core(graph: Graph, settings: Settings) -> Graph:
    """The same run through ComfyUI's KSampler and its text nodes instead of ours."""
    _, guider = node_of(graph, "CFGGuider")
    sampler_id, sampler = node_of(graph, "SamplerCustomAdvanced")
    texts = [guider[side][0] for side in ("positive", "negative")]
    for node_id in texts:
        own = graph[node_id]["inputs"]
        graph[node_id] = {
            "class_type": "CLIPTextEncode", "inputs": {"clip": own["clip"], "text": own["text"]},
        }  # fmt: skip
    graph[sampler_id] = {
        "class_type": "KSampler",
        "inputs": {
            "model": guider["model"], "positive": guider["positive"],
            "negative": guider["negative"], "latent_image": sampler["latent_image"],
            "seed": settings.seed, "steps": settings.steps, "cfg": settings.cfg,
            "sampler_name": "chroma_flash", "scheduler": "sigmoid_offset", "denoise": 1.0,
        },
    }  # fmt: skip
    return graph


def deck(rng: Random, cards: Sequence[Any]) -> Iterator[Any]:
    """All of them in random order, again and again."""
    while True:
        yield from rng.sample(cards, len(cards))


@dataclass
class Maker:
    """Jobs from one seed; everything there is to choose from is used equally often."""

    seed: int
    rng: Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)
        self.workflows = deck(self.rng, list(WORKFLOWS))
        self.formats = deck(self.rng, list(FORMATS))
        self.loras = deck(self.rng, list(LORAS))
        self.sizes = deck(self.rng, SIZES)
        self.samplers = deck(self.rng, list(SAMPLERS))
        self.schedulers = deck(self.rng, list(SCHEDULERS))

    def picture(self) -> Job:
        """A good job."""
        workflow, form, lora = next(self.workflows), next(self.formats), next(self.loras)
        width, height = next(self.sizes)
        extras = WORKFLOWS[workflow]
        settings = Settings(
            width=width, height=height, steps=self.rng.randint(2, 4),
            seed=self.rng.randrange(2**64), cfg=1.0 if workflow == "NAG" else 4.0,
            sampler=next(self.samplers), scheduler=next(self.schedulers),
            denoise=0.7 if extras.image else 1.0,
        )  # fmt: skip
        graph = _graph(settings, extras, FORMATS[form])
        if workflow == "core nodes":
            graph = through_core(graph, settings)
        how, files = LORAS[lora]
        graph = with_loras(graph, how, files)
        parts = [workflow, form, lora, f"{settings.steps} steps"]
        if workflow != "core nodes":
            parts += [settings.sampler, settings.scheduler]
        if extras.image is None:
            parts.append(f"{width} x {height}")
        parts.append(f"seed {settings.seed}")
        return Job(Kind.PICTURE, ", ".join(parts), graph)

    def interrupted(self) -> Job:
        """A run that is far too long and is stopped in one of its first steps."""
        form, lora = next(self.formats), next(self.loras)
        settings = Settings(
            width=128, height=128, steps=LONG, seed=self.rng.randrange(2**64), sampler="euler"
        )
        graph = with_loras(_graph(settings, Extras(), FORMATS[form]), *LORAS[lora])
        at = self.rng.randint(1, 5)
        return Job(Kind.INTERRUPTED, f"{form}, {lora}, at step {at}", graph, interrupt_at=at)


def _graph(settings: Settings, extras: Extras, form: Format) -> Graph:
    prompts = BOTH if extras.batch > 1 else BOTH[:1]
    extras = replace(extras, count=1)
    names = {"model": form.model, "text_encoder": form.text_encoder}
    return text_to_image(prompts, NEGATIVE, settings, names, form.dtype, extras)


def plain(form: Format = FORMATS["bf16"]) -> Graph:
    """The smallest good graph, of which bad ones are made."""
    settings = Settings(width=64, height=64, steps=2, seed=1, sampler="euler")
    return _graph(settings, Extras(), form)


def reference() -> Job:
    return Job(Kind.PICTURE, "reference", plain(REFERENCE))


def _changed(kind: str, **inputs: Any) -> Graph:
    graph = plain()
    node_of(graph, kind)[1].update(inputs)
    return graph


def refused() -> list[Job]:
    """Requests that the server answers with an error, and a part of that answer."""
    unknown, headless, unlinked = plain(), plain(), plain()
    unknown["x"] = {"class_type": "ChromaNoSuchNode", "inputs": {}}
    del headless[next(k for k, n in headless.items() if n["class_type"] == "SaveImage")]
    del node_of(unlinked, "SamplerCustomAdvanced")[1]["sampler"]
    vae = [node_of(plain(), "ChromaLoadVAE")[0], 0]
    cases = {
        "unknown node": (unknown, "ChromaNoSuchNode"),
        "no output": (headless, "no outputs"),
        "missing input": (unlinked, "sampler"),
        "file outside": (
            _changed("ChromaLoadModel", model_name="../../x.safetensors"), " not in "
        ),
        "number out of range": (_changed("ChromaBetaScheduler", steps=0), "smaller than min"),
        "no number": (_changed("ChromaBetaScheduler", steps="many"), "steps"),
        "wrong link": (_changed("CFGGuider", model=vae), "MODEL"),
        "unknown sampler": (
            _changed("ChromaSampler", sampler_name="eulr"), " not in "
        ),
    }  # fmt: skip
    return [Job(Kind.REFUSED, name, *case) for name, case in cases.items()]


def failing() -> list[Job]:
    """Requests that end in an error of ours while they run, and a part of its message."""
    files = {
        "damaged model": ("broken.safetensors", "broken.safetensors is damaged"),
        "file cut off": ("cut-off.gguf", "cut-off.gguf"),
        "a VAE for a model": ("vae.safetensors", "vae.safetensors"),
    }
    cases = {
        name: (_changed("ChromaLoadModel", model_name=file), message)
        for name, (file, message) in files.items()
    } | {
        "damaged LoRA": (with_loras(plain(), "auto", {"broken": 1.0}), "broken.safetensors"),
        "LoRA of another width": (
            with_loras(plain(), "auto", {"too-wide": 1.0}), "too-wide.safetensors"
        ),
        "block that is not there": (
            with_loras(plain(), "auto", {"0": 1.0}, blocks="double 18: 0.5"), "18"
        ),
        "schedule too long": (_changed("ChromaBetaScheduler", denoise=1e-5), "denoise"),
    }  # fmt: skip
    return [Job(Kind.FAILING, name, *case) for name, case in cases.items()]


def rounds(count: int, seed: int) -> Iterator[list[Job]]:
    """`count` jobs in rounds of up to ROUND, each with the reference job at its end.

    A whole round has six other pictures, an interrupted run with a cancelled one behind it, and a
    bad request. Pictures come from a pool that is small enough for each to come several times.
    """
    maker = Maker(seed)
    pool = [maker.picture() for _ in range(max(6, count // 12))]
    pictures = deck(maker.rng, pool)
    bad = _in_turns(deck(maker.rng, refused()), deck(maker.rng, failing()))
    for start in range(0, count, ROUND):
        units = [[next(pictures)] for _ in range(ROUND - 4)]
        units += [[next(bad)], [maker.interrupted(), _cancelled()]]
        maker.rng.shuffle(units)
        jobs = [job for unit in units for job in unit]
        jobs = [*jobs[: min(ROUND, count - start) - 1], reference()]
        yield [_named(job, start + i) for i, job in enumerate(jobs)]


def _in_turns(*decks: Iterator[Job]) -> Iterator[Job]:
    for turn in cycle(decks):
        yield next(turn)


def _cancelled() -> Job:
    return Job(Kind.CANCELLED, "behind an interrupted run", plain())


def _named(job: Job, number: int) -> Job:
    """The job with files of its own, without which ComfyUI would not save a picture again."""
    graph = json.loads(json.dumps(job.graph))
    for node in graph.values():
        if node["class_type"] == "SaveImage":
            node["inputs"]["filename_prefix"] = f"soak-{number}"
    return replace(job, graph=graph)
