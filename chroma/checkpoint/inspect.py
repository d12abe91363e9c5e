"""What a model file is, from its header alone."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import CheckpointError, LoraError
from ..lora.read import read_lora
from ..lora.report import report, trigger_words
from ..quant.ggml_types import GGML_TYPES
from .container import Checkpoint, open_checkpoint
from .identify import Kind, identify
from .read import configure
from .reader import BITS, TensorInfo
from .stored import layer_settings, marked, scale_names
from .write_gguf import stored_bytes

# What loads a kind of file, and the folder of ComfyUI in which it is looked for.
_LOADERS = {
    Kind.CHROMA: ("Load Chroma Model", "models/diffusion_models"),
    Kind.CHROMA_DIFFUSERS: ("Load Chroma Model", "models/diffusion_models"),
    Kind.T5: ("Load Chroma Text Encoder", "models/text_encoders"),
    Kind.AUTOENCODER: ("Load Chroma VAE", "models/vae"),
    Kind.AUTOENCODER_DIFFUSERS: ("Load Chroma VAE", "models/vae"),
    Kind.LORA: ("Load Chroma LoRA", "models/loras"),
}
_T5_AND_VAE = "a T5-XXL text encoder and the autoencoder of Flux (ae.safetensors)"
_ELSEWHERE = "workflows and nodes of its own model; it does not fit Chroma"
# What a kind of file needs beside it; what is not here belongs to another model.
_NEEDS = {
    Kind.CHROMA: _T5_AND_VAE,
    Kind.CHROMA_DIFFUSERS: _T5_AND_VAE,
    Kind.RADIANCE: "a T5-XXL text encoder and no autoencoder, as it paints pixels; load it with "
    "ComfyUI's Load Diffusion Model",
    Kind.T5: "a Chroma transformer",
    Kind.AUTOENCODER: "a Chroma transformer and a T5-XXL text encoder",
    Kind.AUTOENCODER_DIFFUSERS: "a Chroma transformer and a T5-XXL text encoder",
    Kind.LORA: "the model that it was trained for",
    Kind.UNKNOWN: "another program; nothing here knows it",
}
_FP8 = ("F8_E4M3", "F8_E5M2", "I8")


@dataclass(frozen=True)
class FormatShare:
    """The tensors of one storage format: how many, of how many numbers and bytes."""

    format: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect_file` found. `sizes` are widths and depths by name, where they are known.

    needs: what is to be used with the file. lora: lines on what a LoRA changes in Chroma1, or why
    nothing.
    """

    file: str
    kind: str
    bytes: int
    parameters: int
    formats: tuple[FormatShare, ...]
    layers: dict[str, str]
    sizes: dict[str, int]
    metadata: dict[str, str]
    loader: str | None
    folder: str | None
    needs: str
    lora: tuple[str, ...]


def inspect_file(path: Path) -> Inspection:
    """Everything a header says. Raises CheckpointError for a file that cannot be read."""
    checkpoint = open_checkpoint(path)
    tensors, kind = checkpoint.tensors, identify(checkpoint.tensors)
    layers = _layer_formats(checkpoint)
    shares = {}
    for name, form in layers.items():
        numbers = math.prod(tensors[name].shape)
        old = shares.get(form, FormatShare(form, 0, 0, 0))
        shares[form] = FormatShare(
            form, old.tensors + 1, old.parameters + numbers, old.bytes + size_of(tensors[name])
        )
    formats = tuple(sorted(shares.values(), key=lambda share: -share.bytes))
    loader, folder = _LOADERS.get(kind, (None, None))
    return Inspection(
        path.name,
        kind.value,
        sum(size_of(info) for info in tensors.values()),
        sum(share.parameters for share in formats),
        formats,
        layers,
        _sizes(checkpoint, kind),
        {key: text for key, text in checkpoint.metadata.items() if len(text) <= 200},
        loader,
        folder,
        _NEEDS.get(kind, _ELSEWHERE),
        _lora_lines(checkpoint) if kind is Kind.LORA else (),
    )


def _lora_lines(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the file changes and says of itself, or the reason why it does not fit Chroma1."""
    try:
        found = report(read_lora(checkpoint.path))
    except LoraError as error:
        words = trigger_words(checkpoint.metadata)
        told = [str(error), *([f"trigger words: {', '.join(words)}"] if words else [])]
    else:
        told = found.lines()
    return tuple(" ".join(line.split()) for line in told)


def _layer_formats(checkpoint: Checkpoint) -> dict[str, str]:
    """{name in the file: storage format} of all tensors that are weights."""
    tensors, settings = checkpoint.tensors, layer_settings(checkpoint.metadata)
    side, formats = scale_names(tensors), {}
    for name, info in tensors.items():
        if marked(name) is not None or name in side:
            continue
        layer = name.removesuffix(".weight")
        scaled = any(f"{layer}{suffix}" in tensors for suffix in (".weight_scale", ".scale_weight"))
        stated = settings.get(layer, {}).get("format")
        form = stated if stated and info.dtype in _FP8 else info.dtype
        formats[name] = f"{form}, scaled" if scaled and info.dtype in _FP8 else form
    return formats


def size_of(info: TensorInfo) -> int:
    """Bytes of a tensor's data."""
    if info.dtype in GGML_TYPES:
        return stored_bytes(info)
    return math.prod(info.shape) * BITS[info.dtype] // 8


def _sizes(checkpoint: Checkpoint, kind: Kind) -> dict[str, int]:
    try:
        config = configure(checkpoint, kind)
    except CheckpointError:
        return {}
    return {} if config is None else dict(asdict(config))


def describe(found: Inspection) -> list[str]:
    """An inspection as lines for people."""
    lines = [
        f"{found.file}: {found.kind}",
        f"  {found.parameters:,} parameters in {found.bytes / 1e9:.3f} GB",
    ]
    if found.sizes:
        lines.append("  " + ", ".join(f"{name} {value}" for name, value in found.sizes.items()))
    for share in found.formats:
        lines.append(
            f"  {share.format}: {share.tensors} tensors, {share.parameters:,} parameters, "
            f"{share.bytes / 1e9:.3f} GB"
        )
    loaded = f"{found.loader}, from {found.folder}" if found.loader else "nothing here"
    lines += [f"  {line}" for line in found.lora]
    return [*lines, f"  loaded by: {loaded}", f"  needs: {found.needs}"]
