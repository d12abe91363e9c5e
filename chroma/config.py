"""What a Chroma transformer looks like, read from the shapes of its own tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .errors import CheckpointError

THETA = 10_000
PATCH = 2
LATENT_CHANNELS = 16


@dataclass(frozen=True)
class ChromaConfig:
    """Widths and depths of one model. The defaults are Chroma1's own (8.9B parameters)."""

    in_channels: int = 64
    context_dim: int = 4096
    hidden: int = 3072
    heads: int = 24
    mlp_hidden: int = 12288
    double_depth: int = 19
    single_depth: int = 38
    approximator_in: int = 64
    approximator_hidden: int = 5120
    approximator_depth: int = 5

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.head_dim % 8:
            raise CheckpointError(
                f"hidden width {self.hidden} with {self.heads} heads gives no head width that "
                "rotary positions fit; expected a multiple of 8"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """Channels of a head turned by (nothing, row, column): 16, 56, 56 of 128 in Chroma1."""
        still = self.head_dim // 8
        return still, (self.head_dim - still) // 2, (self.head_dim - still) // 2

    @property
    def modulations(self) -> int:
        """Vectors the approximator makes: shift, scale, gate per site, and two for the end."""
        return 3 * self.single_depth + 2 * 6 * self.double_depth + 2

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "ChromaConfig":
        """Read widths and depths from the shapes of a canonical (BFL-named) state dict.

        Raises CheckpointError naming the first tensor that is needed and missing.
        """
        try:
            hidden, in_channels = state["img_in.weight"].shape
            head_dim = state["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
            guide = state["distilled_guidance_layer.in_proj.weight"].shape
            return cls(
                in_channels=in_channels,
                context_dim=state["txt_in.weight"].shape[1],
                hidden=hidden,
                heads=hidden // head_dim,
                mlp_hidden=state["double_blocks.0.img_mlp.0.weight"].shape[0],
                double_depth=_depth(state, "double_blocks"),
                single_depth=_depth(state, "single_blocks"),
                approximator_in=guide[1],
                approximator_hidden=guide[0],
                approximator_depth=_depth(state, "distilled_guidance_layer.layers"),
            )
        except KeyError as missing:
            raise CheckpointError(
                f"not a complete Chroma transformer: the tensor {missing} is missing"
            ) from None


def _depth(state: Mapping[str, Tensor], group: str) -> int:
    """Blocks numbered from 0 without a gap: one stray high number must not decide the depth."""
    pattern = re.compile(re.escape(group) + r"\.(\d+)\.")
    numbers = {int(match[1]) for key in state if (match := pattern.match(key))}
    return next(i for i in range(len(numbers) + 1) if i not in numbers)
