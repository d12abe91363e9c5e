"""Train the small autoencoder: Flux' layout, 32 channels wide, on the emoji pictures."""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ..autoencoder import LATENT_SCALE, LATENT_SHIFT, Autoencoder, AutoencoderConfig
from .dataset import SIZE

log = logging.getLogger("chroma")

CONFIG = AutoencoderConfig(channels=32, multipliers=(1, 2, 2, 2), res_blocks=1)
BATCH = 16
EDGE_WEIGHT = 0.5
# Deviation of the noise that training adds to the raw latent, so that the decoder forgives the
# small errors of a generated one. Fixed: a learned one collapses at this scale.
NOISE = 0.05


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences, which an L1 loss on values alone leaves blurred."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(output: Tensor, target: Tensor, edge_weight: float) -> Tensor:
    """Mean absolute and squared error of the values, mean absolute error of their differences."""
    loss = F.l1_loss(output, target) + F.mse_loss(output, target)
    for ours, theirs in zip(edges(output), edges(target), strict=True):
        loss = loss + edge_weight * F.l1_loss(ours, theirs)
    return loss


def batch(pictures: np.ndarray, generator: np.random.Generator, count: int, side: int) -> Tensor:
    """Random square crops of random pictures: (count, 3, side, side) in [-1, 1]."""
    crops = []
    for index in generator.integers(len(pictures), size=count):
        y, x = generator.integers(SIZE - side + 1, size=2)
        crops.append(pictures[index, y : y + side, x : x + side])
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def standardise(model: Autoencoder, pictures: np.ndarray, generator: np.random.Generator) -> None:
    """Fold one shift and one scale per channel into the layers beside the latent, in place.

    Afterwards every channel of the raw latent has Flux' own mean and deviation over the data, so
    that LATENT_SHIFT and LATENT_SCALE give the transformer latents of unit variance.
    """
    raw = torch.cat(
        [model.moments(batch(pictures, generator, 32, SIZE))[0] for _ in range(16)]
    ).float()
    mean, std = raw.mean((0, 2, 3)), raw.std((0, 2, 3))
    gain = 1 / (LATENT_SCALE * std)  # new = (old - mean) * gain + LATENT_SHIFT
    out, channels = model.encoder.conv_out, model.config.latent_channels
    out.weight[:channels] *= gain[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean) * gain + LATENT_SHIFT
    out.bias[channels:] += 2 * gain.log()
    first = model.decoder.conv_in
    first.bias += torch.einsum("oikl,i->o", first.weight, mean - LATENT_SHIFT / gain)
    first.weight /= gain[:, None, None]


def train(
    pictures: np.ndarray, steps: int, *, seed: int = 0, rate: float = 5e-4, side: int = 64
) -> Autoencoder:
    """Train for `steps` batches of BATCH crops; the last quarter trains the decoder alone.

    The latents are standardised before that last part: the decoder then learns away what the
    folded shift does at the borders, where convolutions see zero padding.
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    model = Autoencoder(CONFIG).to(memory_format=torch.channels_last)  # pyright: ignore
    with torch.no_grad():
        model.encoder.conv_out.weight[CONFIG.latent_channels :] = 0
        model.encoder.conv_out.bias[CONFIG.latent_channels :] = 2 * math.log(NOISE)
    fold_at = steps * 3 // 4
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    started = time.monotonic()
    for step in range(steps):
        if step == fold_at:
            standardise(model, pictures, generator)
            model.encoder.requires_grad_(False)
            optimiser = torch.optim.AdamW(model.decoder.parameters(), lr=rate, betas=(0.9, 0.99))
        warm = min(1.0, (step + 1) / 100)
        for group in optimiser.param_groups:
            group["lr"] = rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        target = batch(pictures, generator, BATCH, side)
        with torch.autocast("cpu", torch.bfloat16):
            mean, log_variance = model.moments(target)
            noise = torch.randn_like(mean) * (0.5 * log_variance.detach()).exp()
            output = model.decoder(mean + noise)
        # Differences come in slowly: from the start they reward a flat picture.
        loss = reconstruction_loss(output.float(), target, EDGE_WEIGHT * min(1.0, 2 * step / steps))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 200 == 0:
            psnr = 10 * math.log10(4 / F.mse_loss(output.float(), target).item())
            std, spent = mean.float().std().item(), time.monotonic() - started
            log.info(
                "autoencoder step %d: loss %.4f, psnr %.2f dB, latent std %.2f, %.0f s",
                step, loss.item(), psnr, std, spent,
            )  # fmt: skip
    return model.eval()


def save(model: Autoencoder, path: Path) -> None:
    """Write the weights in bf16."""
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, path, metadata={"modelspec.architecture": "flux-ae", "format": "pt"})


def load(path: Path) -> Autoencoder:
    """Read back what `save` wrote, in fp32."""
    state = {k: v.float() for k, v in load_file(path).items()}
    model = Autoencoder(AutoencoderConfig.from_state_dict(state))
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def encode_all(model: Autoencoder, pictures: Sequence[np.ndarray] | np.ndarray) -> Tensor:
    """Latents (N, 16, SIZE/8, SIZE/8) of all pictures, bf16."""
    parts = []
    for start in range(0, len(pictures), 64):
        pixels = torch.from_numpy(np.stack(list(pictures[start : start + 64])))
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(model.encode(pixels).to(torch.bfloat16).contiguous())
    return torch.cat(parts)
