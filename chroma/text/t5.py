"""The encoder half of T5 v1.1, the text encoder Chroma reads.

Raffel et al. 2020 (arXiv:1910.10683) with the v1.1 changes: gated GELU, no biases. Key names are
those of Hugging Face. Shapes: B batch, L tokens, N real tokens (the end token included) of a row,
H heads, D width of a head, C model width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointError

# Chroma was trained on prompts padded to this many tokens.
MAX_TOKENS = 512

# In fp16 the last product of the feed-forward can exceed 65504; a power of two scales exactly.
_FP16_SCALE = 1 / 64


class PadRule(Enum):
    """How the padding behind the real tokens takes part in T5; named after who does it.

    REFERENCE   Chroma's trainer: real tokens do not see the padding; every pad token gets the
                plain mean of the values of all 512 tokens, whatever their positions.
    HF          transformers, diffusers: nobody sees the padding; pads attend the real tokens.
    COMFY_PAD1  ComfyUI with min_padding 1: one pad token, like any other token.
    COMFY_NOPAD ComfyUI without T5TokenizerOptions: no padding at all.
    UNMASKED512 512 tokens, the padding like any other token.
    """

    REFERENCE = "reference"
    HF = "hf"
    COMFY_PAD1 = "comfy_pad1"
    COMFY_NOPAD = "comfy_nopad"
    UNMASKED512 = "unmasked512"


@dataclass(frozen=True)
class T5Config:
    """Sizes of one T5 v1.1 encoder."""

    vocab_size: int
    d_model: int
    heads: int
    d_kv: int
    d_ff: int
    layers: int
    buckets: int = 32
    max_distance: int = 128

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "T5Config":
        """Read the sizes from the shapes of a Hugging Face state dict.

        Raises CheckpointError if a key that decides the sizes is missing or the sizes clash.
        """
        block = "encoder.block.0.layer"
        try:
            vocab_size, d_model = state["shared.weight"].shape
            bias = state[f"{block}.0.SelfAttention.relative_attention_bias.weight"]
            inner = state[f"{block}.0.SelfAttention.q.weight"].shape[0]
            d_ff = state[f"{block}.1.DenseReluDense.wi_0.weight"].shape[0]
        except KeyError as missing:
            raise CheckpointError(
                f"not a T5 v1.1 encoder: the tensor {missing} is missing; "
                "choose t5xxl_fp16.safetensors or another T5 v1.1 or Flan-T5 file"
            ) from None
        buckets, heads = bias.shape
        if inner % heads:
            raise CheckpointError(
                f"damaged T5 encoder: {block}.0.SelfAttention.q.weight has {inner} rows, "
                f"expected a multiple of its {heads} heads; download the file again"
            )
        layers = 0
        while f"encoder.block.{layers}.layer.0.SelfAttention.q.weight" in state:
            layers += 1
        return cls(vocab_size, d_model, heads, inner // heads, d_ff, layers, buckets)


def position_buckets(length: int, buckets: int, max_distance: int, device: Any = None) -> Tensor:
    """Bucket of every (query, key) pair, (L, L) int64: half of them for each direction.

    Near distances have a bucket each, far ones share logarithmically wider buckets up to
    `max_distance` (Raffel et al. 2020, section 2.1).
    """
    index = torch.arange(length, device=device)
    offset = index[None, :] - index[:, None]
    half = buckets // 2
    exact = half // 2
    distance = offset.abs()
    # Same fp32 operations in the same order as the original: the bounds fall on exact powers.
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(offset > 0, half, 0) + torch.where(distance < exact, distance, far)


def attention_bias(position_bias: Tensor, lengths: Tensor, rule: PadRule) -> tuple[Tensor, Tensor]:
    """Additive bias (B, H, L, L) or (1, H, L, L), and which queries look at the keys, (B, L).

    `position_bias` is (H, L, L) and `lengths` holds N of each row. A query that does not look has
    its scores q.k taken as 0, so its bias alone decides. Under REFERENCE that bias is the
    logarithm of how often each key occurs among the 512: 1 for the real tokens, 512 - N for the
    one pad token that stands for all of them (they are identical), so that the softmax yields
    (sum of the real values + (512 - N) * pad value) / 512.
    """
    index = torch.arange(position_bias.shape[-1], device=lengths.device)
    count = lengths[:, None]
    real = index < count  # (B, L)
    looking = torch.ones_like(real)
    if rule is PadRule.UNMASKED512:
        return position_bias[None], looking
    seen = index <= count if rule is PadRule.COMFY_PAD1 else real
    bias = position_bias[None].masked_fill(~seen[:, None, None, :], -math.inf)
    if rule is not PadRule.REFERENCE:
        return bias, looking
    pads = torch.log((MAX_TOKENS - count).clamp(min=1).to(bias.dtype))  # (B, 1)
    weight = torch.where(index == count, pads, -math.inf).masked_fill(real, 0.0)
    return torch.where(real[:, None, :, None], bias, weight[:, None, None, :]), real


class _RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) under the name `weight`, in fp32."""

    def __init__(self, dim: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.to(x.device).float(), 1e-6)


class _SelfAttention(nn.Module):
    def __init__(self, config: T5Config, first: bool, ops: Any, **kw: Any) -> None:
        super().__init__()
        inner = config.heads * config.d_kv
        self.heads = config.heads
        self.q = ops.Linear(config.d_model, inner, bias=False, **kw)
        self.k = ops.Linear(config.d_model, inner, bias=False, **kw)
        self.v = ops.Linear(config.d_model, inner, bias=False, **kw)
        self.o = ops.Linear(inner, config.d_model, bias=False, **kw)
        if first:
            self.relative_attention_bias = ops.Embedding(config.buckets, config.heads, **kw)

    def forward(self, x: Tensor, bias: Tensor, looking: Tensor) -> Tensor:
        q, k, v = (  # (B, H, L, D); fp32, since the scores are large: T5 does not scale them
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).float()
            for layer in (self.q, self.k, self.v)
        )
        q = q * looking[:, None, :, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2).to(x.dtype))


class _GatedGelu(nn.Module):
    def __init__(self, config: T5Config, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.wi_0 = ops.Linear(config.d_model, config.d_ff, bias=False, **kw)
        self.wi_1 = ops.Linear(config.d_model, config.d_ff, bias=False, **kw)
        self.wo = ops.Linear(config.d_ff, config.d_model, bias=False, **kw)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) in the dtype of the weights -> (B, L, C) fp32."""
        scale = _FP16_SCALE if x.dtype == torch.float16 else 1.0
        gated = F.gelu(self.wi_0(x), approximate="tanh").float() * self.wi_1(x).float()
        return self.wo((gated * scale).to(x.dtype)).float() / scale


class _AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, first: bool, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.SelfAttention = _SelfAttention(config, first, ops, **kw)
        self.layer_norm = _RMSNorm(config.d_model, **kw)

    def forward(self, x: Tensor, dtype: torch.dtype, bias: Tensor, looking: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x).to(dtype), bias, looking)


class _FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.DenseReluDense = _GatedGelu(config, ops, **kw)
        self.layer_norm = _RMSNorm(config.d_model, **kw)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x).to(dtype))


class _Block(nn.Module):
    def __init__(self, config: T5Config, first: bool, ops: Any, **kw: Any) -> None:
        super().__init__()
        attention = _AttentionLayer(config, first, ops, **kw)
        self.layer = nn.ModuleList([attention, _FeedForwardLayer(config, ops, **kw)])

    def forward(self, x: Tensor, dtype: torch.dtype, bias: Tensor, looking: Tensor) -> Tensor:
        """The residual stream x (B, L, C) stays fp32; the products run in `dtype`."""
        attention, feed_forward = self.layer
        return feed_forward(attention(x, dtype, bias, looking), dtype)


class _Stack(nn.Module):
    def __init__(self, config: T5Config, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            [_Block(config, n == 0, ops, **kw) for n in range(config.layers)]
        )
        self.final_layer_norm = _RMSNorm(config.d_model, **kw)


class T5Encoder(nn.Module):
    """Tokens to hidden states; `operations` offers Linear and Embedding."""

    def __init__(
        self,
        config: T5Config,
        operations: Any = nn,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.shared = operations.Embedding(
            config.vocab_size, config.d_model, device=device, dtype=dtype
        )
        self.encoder = _Stack(config, operations, device=device, dtype=dtype)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        pad_rule: PadRule = PadRule.REFERENCE,
    ) -> Tensor:
        """Encode (B, L) int64 tokens to (B, L, C) fp32.

        `lengths` (B,) int64 holds N of each row, the end token included; pad ids follow. Without
        it every token is real. Row i holds exact results up to position N_i (the first pad token);
        under REFERENCE and HF, results behind that are of no use.
        """
        if lengths is None:
            lengths = torch.full(tokens.shape[:1], tokens.shape[1], device=tokens.device)
        x = self.shared(tokens)
        position_bias = self._position_bias(tokens.shape[1], tokens.device)
        bias, looking = attention_bias(position_bias, lengths, pad_rule)
        dtype, x = x.dtype, x.float()
        for block in self.encoder.block:
            x = block(x, dtype, bias, looking)
        return self.encoder.final_layer_norm(x)

    def _position_bias(self, length: int, device: torch.device) -> Tensor:
        """The learned bias of every (query, key) pair, (H, L, L) fp32; all blocks share it."""
        table = self.get_submodule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias")
        buckets = position_buckets(length, self.config.buckets, self.config.max_distance, device)
        return table(buckets).float().permute(2, 0, 1)
