"""LoRA files written from the formula, and what they are to do to a state dict."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "diffusion_model."
TEXT_PREFIX = "text_encoders.t5xxl.transformer."


def write_lora(
    path: Path,
    weights: Mapping[str, Tensor],
    prefix: str = PREFIX,
    *,
    rank: int = 4,
    size: float = 0.3,
    seed: int = 0,
    alpha: float | None = None,
) -> dict[str, Tensor]:
    """A LoRA of these matrices {key: weight}, each change `size` times as large as its weight.

    Returns {key: the change, (N, K) fp32}.
    """
    g = torch.Generator().manual_seed(seed)
    file, changes = {}, {}
    for key, weight in weights.items():
        module = prefix + key.removesuffix(".weight")
        down = torch.randn(rank, weight.shape[1], generator=g)
        up = torch.randn(weight.shape[0], rank, generator=g)
        up *= size * weight.float().norm() / (up @ down).norm()
        file[f"{module}.lora_A.weight"], file[f"{module}.lora_B.weight"] = down, up
        changes[key] = up @ down
        if alpha is not None:
            file[f"{module}.alpha"] = torch.tensor(alpha)
            changes[key] *= alpha / rank
    save_file(file, path)
    return changes


def merged(
    state: Mapping[str, Tensor], changes: Sequence[tuple[Mapping[str, Tensor], float]]
) -> dict[str, Tensor]:
    """fp32 values of a state dict plus strength times every change."""
    out = {key: tensor.float().clone() for key, tensor in state.items()}
    for change, strength in changes:
        for key, values in change.items():
            out[key] += strength * values
    return out


def linears(model: torch.nn.Module) -> dict[str, Tensor]:
    """{key: weight} of every linear layer without quantisation."""
    return {
        f"{name}.weight": module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
