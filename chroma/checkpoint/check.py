"""Whether a state dict is what a model needs: names, shapes, dtypes, finite values."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..quant.finite import all_finite
from .stored import State

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_state(model: nn.Module, state: State, path: Path) -> None:
    """Raises CheckpointError unless names, shapes and values are what the model needs."""
    wanted = model.state_dict()
    for what, names, remedy in (
        ("lacks", [n for n in wanted if n not in state], "download it again"),
        ("has unknown", [n for n in state if n not in wanted], "it is of another version"),
    ):
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise CheckpointError(f"{path.name} {what} {len(names)} tensors ({shown}); {remedy}")
    for name, weight in state.items():
        if tuple(weight.shape) != tuple(wanted[name].shape):
            raise CheckpointError(
                f"{path.name}: {name} has shape {tuple(weight.shape)}, expected "
                f"{tuple(wanted[name].shape)}; the file is damaged or of another version"
            )
        if isinstance(weight, Tensor) and weight.dtype not in FLOATS:
            raise CheckpointError(
                f"{path.name}: {name} is {weight.dtype}, expected bf16, fp16 or fp32; "
                "download the file again"
            )
        if not all_finite(weight):
            raise CheckpointError(
                f"{path.name}: {name} holds NaN or infinity; the file is damaged, download it again"
            )
