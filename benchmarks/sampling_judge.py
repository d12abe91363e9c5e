"""What a sampler's pictures of 200 held-out prompts are worth: obedience, and likeness as a set."""

from pathlib import Path

import numpy as np
import torch
from chroma_nodes.chroma.caching import BlockCache, CacheSettings
from chroma_nodes.chroma.guidance import Denoiser
from chroma_nodes.chroma.guidance.plan import Guidance
from chroma_nodes.chroma.pipeline import Pipeline, decode
from chroma_nodes.chroma.tiny.dataset import STYLES, Sources, cutout, load_concepts
from chroma_nodes.samplers.flow_pec import sample_flow_pec
from sampling_ways import Sample, sigmas
from small_model import BATCH, held_out_scenes, judge, template
from torch import Tensor

# 0.0005 from the end of 400 steps of Heun's method (sampling.py).
CONVERGED_STEPS = 52


class Judge:
    """Draws every prompt with given sigmas and compares the pictures."""

    def __init__(self, work: Path, font: Path, count: int, cfg: float = 4.0) -> None:
        sources = Sources.below(work, font)
        concepts = load_concepts(sources)
        self.keys = [(concept.hexcode, style) for concept in concepts for style in STYLES]
        self.templates = np.stack(
            [template(cutout(sources, c, s)) for c in concepts for s in STYLES]
        )
        self.scenes = held_out_scenes(concepts, count, seed=7)
        self.pipeline = Pipeline.load(dtype=torch.float32)
        self.cfg = cfg
        levels = sigmas("beta .6", CONVERGED_STEPS).float()
        self.converged = self.latents(_converging, levels)[0]
        # Other seeds: the distance of two sets of converged pictures is what chance alone makes.
        self.others = self.latents(_converging, levels, seed=100)[0]

    def latents(
        self,
        sample: Sample,
        levels: Tensor,
        seed: int = 1,
        guidance: Guidance | None = None,
        cache: CacheSettings | None = None,
    ) -> tuple[Tensor, float]:
        """(count, 16, 16, 16), and the whole passes per picture."""
        encoder, found, passes = self.pipeline.text_encoder, [], 0.0
        uncond = encoder.encode([""])
        for start in range(0, len(self.scenes), BATCH):
            captions = [scene.caption() for scene in self.scenes[start : start + BATCH]]
            kept = None if cache is None else BlockCache(cache)
            model = Denoiser(
                self.pipeline.transformer, encoder.encode(captions), uncond,
                guidance or self.cfg, cache=kept,
            )  # fmt: skip
            generator = torch.Generator().manual_seed(seed + start)
            noise = torch.randn(len(captions), 16, 16, 16, generator=generator)
            found.append(sample(model, levels[0] * noise, levels))
            passes += model.passes * len(captions) - (kept.skipped if kept else 0)
        return torch.cat(found), passes / len(self.scenes)

    def figures(
        self,
        sample: Sample,
        levels: Tensor,
        guidance: Guidance | None = None,
        cache: CacheSettings | None = None,
    ) -> dict[str, float]:
        """What the pictures are worth, and their whole passes.

        Shares obeyed; the median relative error against the same seeds' converged pictures; the
        kernel distance to converged pictures of other seeds.
        """
        latents, passes = self.latents(sample, levels, guidance=guidance, cache=cache)
        images = decode(self.pipeline.autoencoder, latents).numpy().astype(np.float64)
        verdicts = np.array(
            [
                judge(image, scene, self.keys, self.templates)
                for image, scene in zip(images, self.scenes, strict=True)
            ]
        )
        obeyed = dict(zip(("background", "emoji", "style"), verdicts.mean(0), strict=True))
        away = (latents - self.converged).flatten(1).norm(dim=1)
        error = away / self.converged.flatten(1).norm(dim=1)
        return {
            "passes": passes,
            **{name: float(share) for name, share in obeyed.items()},
            "error": float(error.median()),
            "distance": kernel_distance(features(latents), features(self.others)),
        }


def _converging(model, x: Tensor, levels: Tensor) -> Tensor:
    return sample_flow_pec(model, x, levels, disable=True)


def features(latents: Tensor) -> Tensor:
    """Means of 4 x 4 parts of every channel, (N, 256) fp64, with a unit mean square."""
    pooled = torch.nn.functional.adaptive_avg_pool2d(latents.double(), 4).flatten(1)
    return pooled / pooled.square().mean().sqrt()


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy, cubic kernel (Binkowski et al. 2018), times 1000.

    0 on average for two samples of one distribution; it can come out below. Row i of both is of
    one prompt, and such pairs are left out: they are alike by more than the distribution.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.t() / x.shape[1] + 1) ** 3

    def without_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    within = without_diagonal(kernel(a, a)) + without_diagonal(kernel(b, b))
    return float(1000 * (within - 2 * without_diagonal(kernel(a, b))))
