"""LoRA files on ComfyUI's MODEL and CLIP: as its own patches, or beside the weights."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..chroma.config import ChromaConfig
from ..chroma.errors import LoraError
from ..chroma.lora.adapters.base import Placement
from ..chroma.lora.file import LoraFile, Placed
from ..chroma.lora.read import read_lora
from ..chroma.lora.strengths import Strengths
from .host_adapter import HostAdapter, MergedAdapter, check_beside, placements
from .host_beside import add_beside
from .host_quant import HostLinear, QuantPatcher
from .host_transformer import adopt

AUTO, PATCH, BYPASS = HOW = ("auto", "patch", "bypass")
FILES_KEY = "chroma_lora_files"
FILES_KEPT = 8
MODEL_PREFIX = "diffusion_model."
FIRST_QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
PLAIN = (torch.float32, torch.float16, torch.bfloat16)
SHOWN = 5
# What may become of an adapter.
MERGED, BESIDE, OFF = "merged", "beside the weights", "off at strength 0"


@dataclass
class Applied:
    """What became of adapters: {what: how many}, and keys that this model does not have."""

    counts: Counter[str] = field(default_factory=Counter)
    absent: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{count} {what}" for what, count in self.counts.items()]
        if self.absent:
            more = ", ..." if len(self.absent) > SHOWN else ""
            names = ", ".join(self.absent[:SHOWN])
            parts.append(f"{len(self.absent)} not in this model ({names}{more})")
        return ", ".join(parts) or "nothing"


class LoraFiles:
    """The files that a MODEL's nodes read last, so that a new strength does not read them again.

    It hangs on the MODEL: all clones share it, and it goes with the last of them.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[Any, ...], LoraFile] = OrderedDict()

    def read(self, path: Path, config: ChromaConfig) -> LoraFile:
        """The file as it is on disk now. Raises LoraError."""
        try:
            status = path.stat()
        except OSError as error:
            raise LoraError(f"{path.name} cannot be read ({error.strerror})") from None
        key = (path, status.st_mtime_ns, status.st_size, config)
        if key not in self._files:
            self._files[key] = read_lora(path, config)
        self._files.move_to_end(key)
        while len(self._files) > FILES_KEPT:
            self._files.popitem(last=False)
        return self._files[key]


def config_of(model: ModelPatcher) -> ChromaConfig:
    """The sizes of a MODEL from any loader. Raises CheckpointError if it is not Chroma."""
    return adopt(model.get_model_object("diffusion_model")).config


def read_for(model: ModelPatcher, path: Path) -> LoraFile:
    """A LoRA file for this MODEL, from disk or from the last time. Raises LoraError."""
    files = model.get_attachment(FILES_KEY)
    if files is None:
        files = LoraFiles()
        model.set_attachments(FILES_KEY, files)
    return files.read(path, config_of(model))


def apply_to_model(
    model: ModelPatcher, file: LoraFile, strengths: Strengths, how: str
) -> tuple[ModelPatcher, Applied]:
    """A clone with the file's transformer part on it; the original stays as it is.

    auto: merged into plain weights, beside quantised ones where that can be. patch: merged into
    the values of all. bypass: beside all matrices; raises LoraError where that cannot be. What is
    no matrix (biases, norms) is always merged.
    """
    config = config_of(model)
    clone, applied = model.clone(), Applied()
    keys, patches = set(clone.model.state_dict()), _Patches(clone, how, applied)
    hooked: dict[str, list[Placement]] = {}
    with _naming(file):
        strengths.check(config.double_depth, config.single_depth)
        for name, one in _each(file.transformer):
            key = _own_key(f"{MODEL_PREFIX}{name}", keys)
            strength = strengths.of(name)
            if key is None:
                applied.absent.append(name)
            elif strength and _is_for_hook(clone, key, one, how):
                hooked.setdefault(key, []).append((one.adapter, strength, one.rows))
                applied.counts[BESIDE] += 1
            else:
                patches.add(key, one, strength)
        patches.hand_over()
    if hooked:
        add_beside(clone, hooked)
    return clone, applied


def apply_to_clip(
    clip: comfy.sd.CLIP, file: LoraFile, strength: float, how: str
) -> tuple[comfy.sd.CLIP, Applied]:
    """A clone with the file's text encoder part on it; the original stays as it is.

    Its plain weights are merged into, whatever `how` says. Raises LoraError as `apply_to_model`.
    """
    clone, applied = clip.clone(), Applied()
    patcher = clone.patcher
    keys = set(patcher.model.state_dict())
    prefix = next((k.removesuffix(FIRST_QUERY) for k in keys if k.endswith(FIRST_QUERY)), None)
    if prefix is None:
        raise LoraError(
            f"this CLIP holds {type(patcher.model).__name__}, which has no T5 encoder; "
            "use ChromaLoadTextEncoder, or CLIPLoader with type chroma"
        )
    patches = _Patches(patcher, how, applied)
    with _naming(file):
        for name, one in _each(file.text_encoder):
            if prefix + name in keys:
                patches.add(prefix + name, one, strength)
            else:
                applied.absent.append(name)
        patches.hand_over()
    return clone, applied


@contextmanager
def _naming(file: LoraFile) -> Iterator[None]:
    """Say in errors which file they are about."""
    try:
        yield
    except LoraError as error:
        raise LoraError(f"{file.path.name}: {error}") from None


def _each(part: Mapping[str, Iterable[Placed]]) -> Iterator[tuple[str, Placed]]:
    return ((name, one) for name, placed in part.items() for one in placed)


def _own_key(key: str, keys: set[str]) -> str | None:
    """The parameter under this model's name; ComfyUI's later norms call their scale weight."""
    renamed = f"{key.removesuffix('.scale')}.weight" if key.endswith(".scale") else key
    return next((name for name in (key, renamed) if name in keys), None)


def _layer(patcher: ModelPatcher, key: str) -> nn.Module:
    return patcher.model.get_submodule(key.rpartition(".")[0])


def _shape(layer: nn.Module) -> tuple[int, int] | None:
    """(N, K) of a linear layer, packed or not; None for others."""
    sizes = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    return None if None in sizes else sizes


def _is_for_hook(patcher: ModelPatcher, key: str, one: Placed, how: str) -> bool:
    """Whether an adapter runs beside a weight that is not one of our quantised ones."""
    layer, placed = _layer(patcher, key), (one.adapter, 1.0, one.rows)
    shape = _shape(layer)
    if shape is None or isinstance(layer, HostLinear) or not key.endswith(".weight"):
        return False
    if how == PATCH or (how == AUTO and _is_plain(layer.weight)):
        return False
    return _can_run_beside([placed], shape, key, how, known=False)


def _is_plain(weight: Tensor | None) -> bool:
    """Whether ComfyUI merges into a weight without loss: no quantised one of its or of a pack's."""
    plain_type = weight is None or type(weight) in (Tensor, nn.Parameter)
    return plain_type and (weight is None or weight.dtype in PLAIN)


def _can_run_beside(
    placed: list[Placement], shape: tuple[int, int], key: str, how: str, known: bool
) -> bool:
    try:
        check_beside(placed, shape, known)
    except LoraError as error:
        if how == BYPASS:
            raise LoraError(f"{key}: {error}; set how to auto or patch") from None
        return False
    return True


def _as_patch(patcher: ModelPatcher, key: str, one: Placed, how: str) -> HostAdapter:
    """An adapter as ComfyUI takes it, which may run beside one of our quantised weights or not."""
    layer = _layer(patcher, key)
    _check_fit(layer, key, one)
    ours = isinstance(layer, HostLinear) and isinstance(patcher, QuantPatcher)
    if not ours or how == PATCH or not key.endswith(".weight"):
        return MergedAdapter.of(one.adapter)
    placed: Placement = (one.adapter, 1.0, one.rows)
    beside = _can_run_beside([placed], _shape(layer), key, how, known=True)
    return (HostAdapter if beside else MergedAdapter).of(one.adapter)


class _Patches:
    """Patches for ComfyUI, in as few calls as can be: each of them lists the whole model."""

    def __init__(self, patcher: ModelPatcher, how: str, applied: Applied) -> None:
        self._patcher, self._how, self._applied = patcher, how, applied
        # One dict per strength, and one more for each further adapter of the same rows.
        self._calls: dict[tuple[int, float], dict[Any, HostAdapter]] = {}

    def add(self, key: str, one: Placed, strength: float) -> None:
        """Raises LoraError where an adapter does not fit, or cannot be applied as it should."""
        if strength == 0:
            self._applied.counts[OFF] += 1
            return
        patch = _as_patch(self._patcher, key, one, self._how)
        self._applied.counts[BESIDE if patch.may_bypass else MERGED] += 1
        rows = one.rows
        target = key if rows is None else (key, (0, rows[0], rows[1] - rows[0]))
        turn = 0
        while target in (call := self._calls.setdefault((turn, strength), {})):
            turn += 1
        call[target] = patch

    def hand_over(self) -> None:
        """Give them all to ComfyUI. Raises LoraError if a stack cannot be applied as it should."""
        for (_, strength), call in self._calls.items():
            self._patcher.add_patches(call, strength)
        if self._how == BYPASS:
            self._check_stacks()

    def _check_stacks(self) -> None:
        targets = {target: patch for call in self._calls.values() for target, patch in call.items()}
        for target, patch in targets.items():
            if patch.may_bypass:
                key = target if isinstance(target, str) else target[0]
                stack = placements(self._patcher.patches[key])
                _can_run_beside(stack, _shape(_layer(self._patcher, key)), key, BYPASS, known=True)


def _check_fit(layer: nn.Module, key: str, one: Placed) -> None:
    """Raises LoraError where an adapter is of another size than the layer, as of another T5."""
    shape = _shape(layer) if key.endswith(".weight") else None
    if shape is None:
        return
    rows = shape[0] if one.rows is None else one.rows[1] - one.rows[0]
    try:
        one.adapter.fit((rows, shape[1]))
    except LoraError as error:
        raise LoraError(f"{key}: {error}; choose a LoRA made for this model") from None
