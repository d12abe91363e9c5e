"""The Flux autoencoder: 16 latent channels at 1/8 of the picture's width and height.

Architecture and key names follow black-forest-labs/flux (Apache-2.0), `modules/autoencoder.py`.
Shapes: B batch, C channels, H and W height and width of the tensor at hand.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import CheckpointError

# Latents are stored as (mean - SHIFT) * SCALE, which gives Flux' latents unit variance.
LATENT_SCALE = 0.3611
LATENT_SHIFT = 0.1159
SPATIAL_FACTOR = 8


@dataclass(frozen=True)
class AutoencoderConfig:
    """Widths of one autoencoder. The defaults are Flux' own."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    latent_channels: int = 16

    @property
    def groups(self) -> int:
        """Groups of every GroupNorm: 32 at Flux' width, four channels each in narrower ones."""
        return min(32, self.channels // 4)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "AutoencoderConfig":
        """Read the widths from the shapes of a canonical (Flux-named) state dict.

        Raises CheckpointError if a key that decides the widths is missing.
        """
        try:
            channels = state["encoder.conv_in.weight"].shape[0]
            latent = state["decoder.conv_in.weight"].shape[1]
            widths = []
            while (key := f"encoder.down.{len(widths)}.block.0.conv1.weight") in state:
                widths.append(state[key].shape[0])
        except KeyError as missing:
            raise CheckpointError(
                f"not a Flux autoencoder: the tensor {missing} is missing; "
                "choose ae.safetensors or another file in that layout"
            ) from None
        blocks = {m[1] for k in state if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", k))}
        return cls(channels, tuple(w // channels for w in widths), len(blocks), latent)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, beside a skip connection."""

    def __init__(self, c_in: int, c_out: int, groups: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.norm1 = ops.GroupNorm(groups, c_in, eps=1e-6, **kw)
        self.conv1 = ops.Conv2d(c_in, c_out, 3, padding=1, **kw)
        self.norm2 = ops.GroupNorm(groups, c_out, eps=1e-6, **kw)
        self.conv2 = ops.Conv2d(c_out, c_out, 3, padding=1, **kw)
        self.nin_shortcut = ops.Conv2d(c_in, c_out, 1, **kw) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int, groups: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.norm = ops.GroupNorm(groups, channels, eps=1e-6, **kw)
        self.q = ops.Conv2d(channels, channels, 1, **kw)
        self.k = ops.Conv2d(channels, channels, 1, **kw)
        self.v = ops.Conv2d(channels, channels, 1, **kw)
        self.proj_out = ops.Conv2d(channels, channels, 1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (  # (B, 1, H*W, C)
            layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)  # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Half the size; the odd padding on the right and below is the original's."""

    def __init__(self, channels: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, stride=2, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the size by repetition, then smooth."""

    def __init__(self, channels: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, padding=1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Two residual blocks around attention, at the latent's resolution."""

    def __init__(self, channels: int, groups: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups, ops, **kw)
        self.attn_1 = AttnBlock(channels, groups, ops, **kw)
        self.block_2 = ResnetBlock(channels, channels, groups, ops, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, and the way to the next one."""

    def __init__(
        self, c_in: int, c_out: int, blocks: int, groups: int, ops: Any, **kw: Any
    ) -> None:
        super().__init__()
        widths = [c_in] + [c_out] * (blocks - 1)
        self.block = nn.ModuleList([ResnetBlock(w, c_out, groups, ops, **kw) for w in widths])
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for resize in (self.downsample, self.upsample):
            x = x if resize is None else resize(x)
        return x


class Encoder(nn.Module):
    """Picture (B, 3, H, W) -> mean and log variance (B, 2 * latent_channels, H/8, W/8)."""

    def __init__(self, config: AutoencoderConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        c_in = config.channels
        self.conv_in = ops.Conv2d(3, c_in, 3, padding=1, **kw)
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            level = Level(c_in, width, config.res_blocks, config.groups, ops, **kw)
            if index < len(widths) - 1:
                level.downsample = Downsample(width, ops, **kw)
            self.down.append(level)
            c_in = width
        self.mid = Middle(c_in, config.groups, ops, **kw)
        self.norm_out = ops.GroupNorm(config.groups, c_in, eps=1e-6, **kw)
        self.conv_out = ops.Conv2d(c_in, 2 * config.latent_channels, 3, padding=1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latent (B, latent_channels, H/8, W/8) -> picture (B, 3, H, W)."""

    def __init__(self, config: AutoencoderConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        c_in = widths[-1]
        self.conv_in = ops.Conv2d(config.latent_channels, c_in, 3, padding=1, **kw)
        self.mid = Middle(c_in, config.groups, ops, **kw)
        levels = []
        for index in reversed(range(len(widths))):
            level = Level(c_in, widths[index], config.res_blocks + 1, config.groups, ops, **kw)
            if index > 0:
                level.upsample = Upsample(widths[index], ops, **kw)
            levels.append(level)
            c_in = widths[index]
        self.up = nn.ModuleList(reversed(levels))  # named by resolution: up.0 is the finest
        self.norm_out = ops.GroupNorm(config.groups, c_in, eps=1e-6, **kw)
        self.conv_out = ops.Conv2d(c_in, 3, 3, padding=1, **kw)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """Pictures in [-1, 1] <-> latents of unit scale, as the transformer uses them.

    `operations` is a namespace with Conv2d and GroupNorm (default torch.nn).
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        operations: Any = nn,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, operations, device=device, dtype=dtype)
        self.decoder = Decoder(config, operations, device=device, dtype=dtype)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the raw posterior, each (B, 16, H/8, W/8)."""
        mean, logvar = self.encoder(pixels).chunk(2, dim=1)
        return mean, logvar

    def encode(self, pixels: Tensor) -> Tensor:
        """Picture (B, 3, H, W) in [-1, 1] -> latent (B, 16, H/8, W/8): the posterior's mean.

        The mean, not a sample: Chroma was trained on means (lodestone-rock/flow).
        """
        return (self.moments(pixels)[0] - LATENT_SHIFT) * LATENT_SCALE

    def decode(self, latent: Tensor) -> Tensor:
        """Latent (B, 16, h, w) -> picture (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.decoder(latent / LATENT_SCALE + LATENT_SHIFT)
