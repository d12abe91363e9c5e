"""Pure tensor functions of the transformer.

Shapes: B batch, L tokens, H heads, D head dimension, C width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (q, k, v each (B, H, L, D), additive mask or None) -> (B, L, H*D)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, (B, H, L, D) -> (B, L, H*D)."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def sinusoid(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines then sines of 1000 t, (N,) -> (N, dim), fp32 (BFL flux, `timestep_embedding`).

    Always fp32: at bf16's spacing near 1 the fastest channel would be wrong by up to 3.9 rad.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = 1000.0 * t[:, None].float() * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_table(ids: Tensor, axes: tuple[int, ...], theta: float) -> Tensor:
    """Rotation matrices of every token, (L, n) fp32 positions -> (L, D/2, 2, 2) fp32.

    Su et al. 2021 (RoFormer), one slice of the head's channels per position axis, as in Flux.
    """
    tables = []
    for axis, dim in enumerate(axes):
        scale = torch.arange(0, dim, 2, dtype=torch.float32, device=ids.device) / dim
        angle = ids[:, axis, None].float() * theta**-scale  # (L, dim/2)
        cos, sin = angle.cos(), angle.sin()
        tables.append(torch.stack([cos, -sin, sin, cos], dim=-1))
    return torch.cat(tables, dim=1).unflatten(-1, (2, 2))


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved channel pairs in fp32, (B, H, L, D) -> the same shape and dtype."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))  # (B, H, L, D/2, 1, 2)
    turned = table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]
    return turned.flatten(-2).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine step (Peebles & Xie 2023): x (B, L, C) by (B or 1, 1, C)."""
    return torch.addcmul(shift, x, 1 + scale)


def keep_finite(x: Tensor) -> Tensor:
    """Replace the overflow that fp16's range makes possible; other dtypes pass unchanged."""
    return x.nan_to_num(nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) with BFL's parameter name, eps 1e-6."""

    def __init__(self, dim: int, *, device=None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale.to(x), 1e-6)
