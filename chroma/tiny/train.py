"""Train the small text encoder and transformer together, by flow matching on latents.

The recipe is Chroma's own (lodestone-rock/flow): target noise minus image, time density
2 - 7.7 (t - 1/2)^2, minibatch optimal transport between images and noise,
some captions empty.
"""

import copy
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ChromaConfig
from ..latents import pack, text_mask, unpack
from ..text.t5 import T5Config, T5Encoder
from ..transformer import ChromaTransformer
from .captions import vary
from .dataset import SIZE, Scene

log = logging.getLogger("chroma")

# Every batch has this many text tokens, so that the model is compiled once. Longer captions lose
# their last keywords.
MAX_TEXT = 24


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, beside the data."""

    steps: int
    batch: int = 64
    rate: float = 1.5e-3
    warmup: int = 200
    weight_decay: float = 0.01
    ema: float = 0.998
    # Until this share of the steps, `late_share` of the times lie in the last `late_span` before
    # pure noise, where the caption alone decides; the plain density has a tenth of them there.
    late_until: float = 0.75
    late_share: float = 0.5
    late_span: float = 0.3
    seed: int = 0


def t5_config(vocabulary: int) -> T5Config:
    return T5Config(vocab_size=vocabulary, d_model=192, heads=4, d_kv=48, d_ff=448, layers=2)


TRANSFORMER = ChromaConfig(
    context_dim=192,
    hidden=256,
    heads=4,
    mlp_hidden=768,
    double_depth=2,
    single_depth=4,
    approximator_hidden=192,
    approximator_depth=3,
)


class TextToVelocity(nn.Module):
    """Text encoder and transformer as one module, so that gradients reach both."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text_encoder = T5Encoder(t5_config(vocabulary))
        self.transformer = ChromaTransformer(TRANSFORMER)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.text_encoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        # T5 does not scale its scores, so the queries start small enough to do it for it.
        for name, weight in self.text_encoder.named_parameters():
            if name.endswith("SelfAttention.q.weight"):
                weight.data /= self.text_encoder.config.d_kv**0.5
        nn.init.normal_(self.text_encoder.shared.weight, std=1.0)

    def forward(self, latent: Tensor, t: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Velocity at latent (B, 16, h, w), time t (B,); tokens (B, T), `lengths` real ones.

        The transformer's own forward, without its branches on values, which break compilation.
        """
        model, size = self.transformer, latent.shape[-2:]
        context = self.text_encoder(tokens, lengths)
        image = pack(latent)
        mask = text_mask(lengths + 1, context.shape[1], image.shape[1], torch.bfloat16)
        table = model.modulation_table(t, None, latent.dtype)
        return unpack(model.run(image, context, table, size, mask), *size)


class TimeDensity:
    """Draws t with density proportional to 2 - 7.7 (t - 1/2)^2 by inverting its sum."""

    def __init__(self, points: int = 1000) -> None:
        self.grid = torch.linspace(0, 1, points)
        density = -7.7 * (self.grid - 0.5) ** 2 + 2
        self.cumulative = torch.cumsum(density / density.sum(), 0)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(count, generator=generator)
        index = torch.searchsorted(self.cumulative, u).clamp(max=len(self.grid) - 1)
        # Spread the draw over its cell: 1000 distinct times would be all the model ever sees.
        jitter = (torch.rand(count, generator=generator) - 0.5) / (len(self.grid) - 1)
        return (self.grid[index] + jitter).clamp(0, 1)


def draw_times(
    density: TimeDensity, step: int, recipe: Recipe, generator: torch.Generator
) -> Tensor:
    """The times (B,) of one batch."""
    t = density.draw(recipe.batch, generator)
    if step >= recipe.late_until * recipe.steps:
        return t
    late = torch.rand(recipe.batch, generator=generator) < recipe.late_share
    return torch.where(late, 1 - recipe.late_span * (1 - t), t)


def pair_noise(latent: Tensor, noise: Tensor) -> Tensor:
    """Reorder the noise for the least total cosine distance to the latents (minibatch OT)."""
    cost = -F.normalize(latent.flatten(1), dim=1) @ F.normalize(noise.flatten(1), dim=1).T
    _, order = linear_sum_assignment(cost.double().numpy())
    return noise[torch.from_numpy(order)]


def pad_tokens(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token lists without end tokens to (B, MAX_TEXT), one pad at least, and lengths (B,)."""
    rows = [[*row[: MAX_TEXT - 2], 1] for row in ids]
    tokens = torch.zeros(len(rows), MAX_TEXT, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, torch.tensor([len(row) for row in rows])


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to 2 %."""
    if step < recipe.warmup:
        return recipe.rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_optimisers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for everything else.

    Muon's step is scaled to AdamW's, so that one learning rate serves both.
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and (
            ".block" in name or "_blocks." in name or ".layers." in name
        )
        (matrices if inner and "relative" not in name else rest).append(parameter)
    decay = recipe.weight_decay
    return [
        torch.optim.Muon(
            matrices, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=decay),
    ]


def update_ema(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Exponential average of the weights, faster at the start to forget the random ones."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for mean, value in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)


def train(
    latents: Tensor,
    scenes: Sequence[Scene],
    tokenizer: Tokenizer,
    recipe: Recipe,
    state_file: Path,
    start: TextToVelocity | None = None,
) -> TextToVelocity:
    """Train and return the averaged weights; resumes from `state_file` where it exists.

    latents: (N, 16, SIZE/8, SIZE/8) of the scenes' pictures. `start` holds the weights to begin
    with, instead of random ones.
    """
    torch.manual_seed(recipe.seed)
    model = start or TextToVelocity(tokenizer.get_vocab_size())
    average = copy.deepcopy(model).requires_grad_(False)
    optimisers = make_optimisers(model, recipe)
    first = 0
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        first = saved["step"]
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
    compiled = torch.compile(model)
    density, running, started = TimeDensity(), 0.0, time.monotonic()
    for step in range(first, recipe.steps):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        random = Random(recipe.seed * 1_000_003 + step)
        index = torch.randint(len(latents), (recipe.batch,), generator=generator)
        latent = latents[index].float()
        noise = pair_noise(latent, torch.randn(latent.shape, generator=generator))
        t = draw_times(density, step, recipe, generator)
        captions = [vary(scenes[i], random) for i in index.tolist()]
        tokens, lengths = pad_tokens([e.ids for e in tokenizer.encode_batch(captions)])
        noisy = torch.lerp(latent, noise, t[:, None, None, None])
        for group in (g for optimiser in optimisers for g in optimiser.param_groups):
            group["lr"] = learning_rate(step, recipe)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = compiled(noisy, t, tokens, lengths)
        loss = F.mse_loss(velocity.float(), noise - latent)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        update_ema(average, model, step, recipe.ema)
        running += loss.item()
        if (step + 1) % 100 == 0:
            spent = time.monotonic() - started
            log.info("step %d: loss %.4f, %.0f s", step + 1, running / 100, spent)
            running = 0.0
        if (step + 1) % 500 == 0 or step + 1 == recipe.steps:
            state = {
                "step": step + 1, "model": model.state_dict(), "average": average.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in optimisers],
            }  # fmt: skip
            torch.save(state, state_file.with_suffix(".part"))
            state_file.with_suffix(".part").replace(state_file)
    return average.eval()


def load(folder: Path, vocabulary: int) -> TextToVelocity:
    """Read back what `save` wrote, in fp32, to train on."""
    model = TextToVelocity(vocabulary)
    for name, part in (("transformer", model.transformer), ("text_encoder", model.text_encoder)):
        state = load_file(folder / f"{name}.safetensors")
        part.load_state_dict({k: v.float() for k, v in state.items()})
    return model


def save(model: TextToVelocity, folder: Path) -> None:
    """Write transformer.safetensors and text_encoder.safetensors in bf16."""
    for name, part, architecture in (
        ("transformer", model.transformer, "chroma"),
        ("text_encoder", model.text_encoder, "t5-v1.1-encoder"),
    ):
        state = {k: v.to(torch.bfloat16).contiguous() for k, v in part.state_dict().items()}
        metadata = {
            "modelspec.architecture": architecture,
            "modelspec.resolution": f"{SIZE}x{SIZE}",
        }
        save_file(state, folder / f"{name}.safetensors", metadata=metadata)
