"""Which fast products this device has, and why not where it has none."""

from dataclasses import dataclass

import torch

from .matmul_fp8 import has_fp8_matmul
from .matmul_int8 import has_int8


@dataclass(frozen=True)
class Kernels:
    """What a device can do, and in `reasons`, by the same names, one line each on why not."""

    int8: bool
    fp8_matmul: bool
    reasons: dict[str, str]


def available(device: torch.device) -> Kernels:
    """The fast products of one device."""
    int8, fp8 = has_int8(device), has_fp8_matmul(device)
    reasons = {
        "int8": _int8_reason(device, int8),
        "fp8_matmul": _fp8_reason(device, fp8),
    }
    return Kernels(int8, fp8, reasons)


def _int8_reason(device: torch.device, there: bool) -> str:
    if device.type == "cpu":
        if there:
            return "oneDNN on a CPU with VNNI or AMX"
        return "needs Linux on x86 with VNNI or AMX, and a torch with oneDNN"
    if there:
        return "int8 tensor cores"
    return "needs an NVIDIA GPU of compute capability 7.5 or more and a torch built for it"


def _fp8_reason(device: torch.device, there: bool) -> str:
    if there:
        return "fp8 tensor cores"
    return "needs an NVIDIA GPU of compute capability 8.9 or more and a torch built for it"
