"""Where to compute and in which precision, when the user does not say."""

import platform
from functools import cache
from pathlib import Path

import psutil
import torch

from .errors import ChromaError


def best_device() -> torch.device:
    """The accelerator torch finds, else the CPU."""
    accelerator = getattr(torch, "accelerator", None)  # torch >= 2.6
    if accelerator is not None and accelerator.is_available():
        return torch.device(accelerator.current_accelerator())
    for kind in ("cuda", "xpu", "mps"):
        backend = getattr(torch, kind, None) or getattr(torch.backends, kind, None)
        if backend is not None and backend.is_available():
            return torch.device(kind)
    return torch.device("cpu")


def parse_device(name: str | None) -> torch.device:
    """The device that `--device` names; without a name the best one.

    Raises ChromaError for a device that cannot compute here.
    """
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ChromaError(
            f"--device {name} cannot be used ({str(error).splitlines()[0]}); expected cpu or an "
            "accelerator of this machine"
        ) from None
    return device


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices natively (x86 AVX512-BF16 or AMX, Arm BF16)."""
    if platform.system() != "Linux":
        return False
    flags = Path("/proc/cpuinfo").read_text("ascii", "ignore").split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def free_memory(device: torch.device | str) -> int:
    """Bytes that can be allocated on a device now; a CUDA device's own, else the computer's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device computes in it, else fp32 on CPUs and fp16 on old accelerators."""
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bf16() else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return torch.bfloat16
