"""The transformer's blocks, after black-forest-labs/flux (Apache-2.0) without modulation layers.

Shapes: B batch, L tokens, T text tokens, H heads, D head dimension, C width.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .approximator import Modulation
from .config import ChromaConfig
from .ops import Attention, RMSNorm, apply_rope, keep_finite, modulate


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm without weights, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def split_heads(qkv: Tensor, heads: int) -> Tensor:
    """(B, L, 3*C) -> (3, B, H, L, D)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


class QKNorm(nn.Module):
    """RMS norms of queries and keys over the head dimension."""

    def __init__(self, dim: int, **kw: Any) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim, **kw)
        self.key_norm = RMSNorm(dim, **kw)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class SelfAttention(nn.Module):
    """The projections of one stream; the attention itself spans both streams."""

    def __init__(self, config: ChromaConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.qkv = ops.Linear(config.hidden, 3 * config.hidden, **kw)
        self.norm = QKNorm(config.head_dim, **kw)
        self.proj = ops.Linear(config.hidden, config.hidden, **kw)


def _mlp(config: ChromaConfig, ops: Any, **kw: Any) -> nn.Sequential:
    return nn.Sequential(
        ops.Linear(config.hidden, config.mlp_hidden, **kw),
        nn.GELU(approximate="tanh"),
        ops.Linear(config.mlp_hidden, config.hidden, **kw),
    )


class DoubleBlock(nn.Module):
    """Text and image with their own weights, attending to each other."""

    def __init__(self, config: ChromaConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.img_attn = SelfAttention(config, ops, **kw)
        self.img_mlp = _mlp(config, ops, **kw)
        self.txt_attn = SelfAttention(config, ops, **kw)
        self.txt_mlp = _mlp(config, ops, **kw)


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side."""

    def __init__(self, config: ChromaConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.linear1 = ops.Linear(config.hidden, 3 * config.hidden + config.mlp_hidden, **kw)
        self.linear2 = ops.Linear(config.hidden + config.mlp_hidden, config.hidden, **kw)
        self.norm = QKNorm(config.head_dim, **kw)


class FinalLayer(nn.Module):
    def __init__(self, config: ChromaConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.linear = ops.Linear(config.hidden, config.in_channels, **kw)


def _project(attn: Any, x: Tensor, mod: Modulation, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = split_heads(attn.qkv(modulate(layer_norm(x), mod.shift, mod.scale)), heads)
    q, k = _qk_norm(attn.norm, q, k)
    return q, k, v


def _qk_norm(norm: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    # By the two children, because a host's own QKNorm may take other arguments.
    return norm.query_norm(q), norm.key_norm(k)


def run_double(
    block: Any,
    img: Tensor,
    txt: Tensor,
    mods: Iterable[tuple[Modulation, Modulation]],
    rope: Tensor,
    mask: Tensor | None,
    *,
    heads: int,
    attention: Attention,
) -> tuple[Tensor, Tensor]:
    """One double block on img (B, L, C) and txt (B, T, C); the same shapes come back.

    A function over any module with BFL's child names, so that it runs our own blocks and those
    of a model that ComfyUI loaded.
    """
    (img_attn, img_mlp), (txt_attn, txt_mlp) = mods
    img_qkv = _project(block.img_attn, img, img_attn, heads)
    txt_qkv = _project(block.txt_attn, txt, txt_attn, heads)
    q, k, v = (
        torch.cat([t, i], dim=2) for t, i in zip(txt_qkv, img_qkv, strict=True)
    )  # (B, H, T+L, D)
    out = attention(apply_rope(q, rope), apply_rope(k, rope), v, mask)  # (B, T+L, C)
    txt_out, img_out = out.split([txt.shape[1], img.shape[1]], dim=1)
    img = torch.addcmul(img, img_attn.gate, block.img_attn.proj(img_out))
    img = torch.addcmul(img, img_mlp.gate, _mlp_branch(block.img_mlp, img, img_mlp))
    txt = torch.addcmul(txt, txt_attn.gate, block.txt_attn.proj(txt_out))
    txt = torch.addcmul(txt, txt_mlp.gate, _mlp_branch(block.txt_mlp, txt, txt_mlp))
    return img, keep_finite(txt)


def _mlp_branch(mlp: Any, x: Tensor, mod: Modulation) -> Tensor:
    return mlp(modulate(layer_norm(x), mod.shift, mod.scale))


def run_single(
    block: Any,
    x: Tensor,
    mod: Modulation,
    rope: Tensor,
    mask: Tensor | None,
    *,
    heads: int,
    attention: Attention,
) -> Tensor:
    """One single block on x (B, T+L, C); the same shape comes back."""
    width = x.shape[-1]
    fused = block.linear1(modulate(layer_norm(x), mod.shift, mod.scale))
    qkv, mlp = fused.split([3 * width, fused.shape[-1] - 3 * width], dim=-1)
    q, k, v = split_heads(qkv, heads)
    q, k = _qk_norm(block.norm, q, k)
    out = attention(apply_rope(q, rope), apply_rope(k, rope), v, mask)
    both = torch.cat([out, F.gelu(mlp, approximate="tanh")], dim=-1)
    return keep_finite(torch.addcmul(x, mod.gate, block.linear2(both)))
