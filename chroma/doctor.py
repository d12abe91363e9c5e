"""What this machine has and what the pack will use of it, in lines fit for a bug report.

Nothing private is told: no paths, no names of users or computers.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from .devices import best_device, best_dtype, cpu_has_bf16, free_memory
from .quant.kernels import available
from .quant.products import EIGHT_BIT

PACKAGES = (
    "chroma-nodes", "torch", "safetensors", "gguf", "numpy", "scipy", "tokenizers", "pillow",
    "triton", "comfy-kitchen", "sageattention", "xformers",
)  # fmt: skip
# Each version of ComfyUI writes its own into this file.
_COMFY_VERSION, _VERSION_LINE = (
    "comfyui_version.py",
    re.compile(r"__version__\s*=\s*['\"]([\w.+-]+)"),
)
_FLAGS = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "AVX512-BF16",
          "avx512_vnni": "VNNI", "amx_bf16": "AMX-BF16", "amx_int8": "AMX-INT8",
          "asimd": "NEON", "bf16": "Arm BF16", "i8mm": "Arm I8MM"}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """A place to compute: free and total bytes, and the dtype of `auto` with the reason."""

    name: str
    description: str
    free: int
    total: int
    dtype: str
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything `diagnose` found; `formats` tells of each storage format how it runs here."""

    python: str
    system: str
    packages: dict[str, str]
    devices: tuple[Device, ...]
    used: str
    attention: tuple[str, ...]
    formats: dict[str, str]
    comfyui: dict[str, str]


def diagnose() -> Diagnosis:
    """Look at versions, devices and ComfyUI; a moment's work, nothing is loaded or computed."""
    best = best_device()
    devices = [_device(torch.device("cpu"))]
    if best.type != "cpu":
        devices.insert(0, _device(best))
    return Diagnosis(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages=_packages(),
        devices=tuple(devices),
        used=best.type,
        attention=_attention(best),
        formats=_formats(best),
        comfyui=find_comfyui(),
    )


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    # The build of torch: what it computes with, which its wheel's version may not tell.
    found["torch"] = torch.__version__
    return found


def _device(device: torch.device) -> Device:
    dtype = best_dtype(device)
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        reason = "bf16 instructions" if cpu_has_bf16() else "no bf16 instructions were found"
        cores = f"{psutil.cpu_count(logical=False) or os.cpu_count()} cores"
        flags = ", ".join(_cpu_flags()) or "no known vector instructions"
        return Device("cpu", f"{cores}, threads: {torch.get_num_threads()}, {flags}",
                      memory.available, memory.total, name, reason)  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        reason = "computed natively" if dtype is torch.bfloat16 else "bf16 would be emulated"
        text = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        return Device(device.type, text, free, total, name, reason)
    free = free_memory(device)
    return Device(device.type, "shares the computer's memory or tells none of its own", free,
                  psutil.virtual_memory().total, name, "what the device computes in")  # fmt: skip


def _cpu_flags() -> list[str]:
    """The instructions that matter here; known on Linux only."""
    if sys.platform != "linux":
        return []
    there = set(Path("/proc/cpuinfo").read_text("ascii", "ignore").split())
    return [name for flag, name in _FLAGS.items() if flag in there]


def _attention(device: torch.device) -> tuple[str, ...]:
    """The kernels behind torch's attention that may run, the quickest first."""
    if device.type != "cuda":
        return ("torch's scaled_dot_product_attention",)
    enabled = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "cuDNN": getattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    return tuple(name for name, on in enabled.items() if on)


def _formats(device: torch.device) -> dict[str, str]:
    """{storage format: how it runs here}, the largest first."""
    native = str(best_dtype(device)).removeprefix("torch.")
    expanded = f"expanded to {native} layer by layer, for memory rather than speed"
    told = {
        "bf16": "fast: computed as it is" if native == "bfloat16" else f"computed in {native}",
        "fp16": "fast: computed as it is" if native == "float16" else f"computed in {native}",
        "fp8": expanded, "GGUF Q8_0": expanded,
        "GGUF Q6_K to Q4_0": f"{expanded}; the smallest files",
    }  # fmt: skip
    kernels = available(device)
    for kind in EIGHT_BIT:
        there, name = (
            (kernels.int8, "int8") if kind == "int8" else (kernels.fp8_matmul, "fp8_matmul")
        )
        verdict = "fast" if there else "not possible here"
        told[f"products in {kind} (weight_dtype {kind})"] = f"{verdict}: {kernels.reasons[name]}"
    return told


def find_comfyui() -> dict[str, str]:
    """{"found": "yes" or "no", "version": of the one found}; COMFYUI_PATH or a folder above us."""
    named = os.environ.get("COMFYUI_PATH")
    above = Path(__file__).absolute().parents
    for folder in (*((Path(named),) if named else ()), *above):
        try:
            text = (folder / _COMFY_VERSION).read_text("utf-8", "replace")
        except OSError:
            continue
        match = _VERSION_LINE.search(text)
        return {"found": "yes", "version": match[1] if match else "unknown"}
    return {"found": "no"}


def lines(found: Diagnosis) -> list[str]:
    """A diagnosis for people, one fact a line."""
    out = [f"Python {found.python} on {found.system}"]
    out += [f"{name} {version}" for name, version in found.packages.items()]
    version = found.comfyui.get("version")
    absent = "not found, which matters inside ComfyUI alone; COMFYUI_PATH names its folder"
    out.append(f"ComfyUI: {f'found, version {version}' if version else absent}")
    for device in found.devices:
        out.append(f"{device.name}: {device.description}")
        out.append(f"  {device.free / 1e9:.1f} of {device.total / 1e9:.1f} GB free")
        out.append(f"  auto is {device.dtype}: {device.reason}")
    out.append(f"computes on: {found.used}; attention: {', '.join(found.attention)}")
    out += [f"{name}: {how}" for name, how in found.formats.items()]
    return out
