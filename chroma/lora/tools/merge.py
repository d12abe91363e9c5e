"""LoRAs into a checkpoint: one tensor after another, in the base's own format or in bf16."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint.atomic import replacing
from ...checkpoint.container import GGUFCheckpoint, SafetensorsCheckpoint
from ...checkpoint.gguf import t5_name
from ...checkpoint.identify import Kind
from ...checkpoint.reader import SUFFIXES, TensorInfo, read_tensors
from ...checkpoint.write_safetensors import TensorWriter, write_safetensors
from ...config import ChromaConfig
from ...errors import ChromaError, LoraError
from ...quant.tensor import CHUNK
from ...text.t5 import T5Config
from ..adapters import Placement, changed
from ..file import LoraFile
from ..read import read_lora
from .base import EMBEDDING, SECOND_NAME, Base, open_base, whole_in_fp32
from .encode import check_encodable, encode_as, share_kept
from .headers import carried, title
from .save import HASHES

# (bytes done, of how many, what was just done)
Progress = Callable[[int, int, str], None]
BASE, BF16 = TARGETS = ("base", "bf16")
_SCALES = (".weight_scale", ".scale_weight")
_QUANTISATION = "_quantization_metadata"
# Below this part of the LoRAs' change, rounding has cost what can be seen.
_ENOUGH = 0.9


@dataclass(frozen=True)
class Merged:
    """What became of a base: how many parameters changed, and how much of the change is stored.

    kept: <stored change, wanted change> / |wanted change|^2 over all parameters; 1 is all of it.
    """

    path: Path
    parameters: int
    kept: float
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        lines = [str(self.path), f"{self.parameters} parameters changed", *self.notes]
        if self.kept < _ENOUGH:
            lines.append(
                f"rounding to the base's format kept {self.kept:.0%} of the change; merge into "
                "bf16 (to: bf16), or load the LoRAs beside the base instead"
            )
        return lines


def merge_into_checkpoint(
    base: Path,
    loras: Sequence[tuple[Path, float]],
    out: Path,
    to: str = BASE,
    progress: Progress | None = None,
    *,
    device: torch.device | str = "cpu",
    config: ChromaConfig | None = None,
) -> Merged:
    """Write `out`, the base with the LoRAs (file, strength) in it, one after the other.

    to: "base" keeps every tensor's format, and the bytes of what no LoRA changes; "bf16" makes a
    plain file of the model alone. The sums are in fp32 and are rounded once. config: the sizes of
    the transformer, where the base is a text encoder. Raises a ChromaError and writes nothing for
    what cannot be read, fitted or written.
    """
    if to not in TARGETS:
        raise LoraError(f"the target '{to}' is unknown; expected one of {', '.join(TARGETS)}")
    opened = open_base(base)
    _check_out(opened, out, to)
    files = [(_read(path, opened, config), strength) for path, strength in loras]
    placements = _placements(opened, files)
    job = _Merge(opened, placements, progress, torch.device(device))
    if to == BF16:
        job.check_room(out, 2 * sum(_count(opened.shape(key)) for key in opened.parts))
        job.to_bf16(out, _metadata(opened, files, out, keep_layout=False))
    else:
        job.check_formats()
        job.check_room(out, sum(_bytes(path) for path in _files(opened)))
        if isinstance(opened.checkpoint, GGUFCheckpoint):
            job.to_gguf(out)
        else:
            job.to_safetensors(out, _metadata(opened, files, out, keep_layout=True))
    return Merged(out, len(placements), share_kept(job.kept), tuple(_notes(files)))


class _Merge:
    """One run: what is to change, and how much of it has arrived."""

    def __init__(
        self,
        base: Base,
        placements: Mapping[str, list[Placement]],
        progress: Progress | None,
        device: torch.device,
    ) -> None:
        self.base, self.placements, self.device = base, placements, device
        self.kept: dict[str, tuple[float, float]] = {}
        self._progress, self._done, self._total = progress, 0, 0

    def check_room(self, out: Path, needed: int) -> None:
        free = shutil.disk_usage(out.parent).free
        if free < needed:
            raise LoraError(
                f"{out.name} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left; "
                "make room or choose another disk"
            )

    def check_formats(self) -> None:
        tensors = self.base.checkpoint.tensors
        for key in self.placements:
            for name in self.base.parts[key]:
                check_encodable(name, tensors[name])

    def to_bf16(self, out: Path, metadata: Mapping[str, str]) -> None:
        infos = {key: TensorInfo("BF16", self.base.shape(key)) for key in self.base.parts}
        self._total = len(infos)
        with write_safetensors(out, infos, metadata) as writer:
            for key in self.base.parts:
                parts = self.base.read(key).values()
                before = whole_in_fp32(parts, self.device)
                after = self._after(key, before)
                stored = after.to(torch.bfloat16)
                self._count(key, before, after, stored.float())
                writer.write(key, stored)
                self._advance(1, key)

    def to_safetensors(self, out: Path, metadata: Mapping[str, str]) -> None:
        checkpoint = self.base.checkpoint
        assert isinstance(checkpoint, SafetensorsCheckpoint)
        made: set[str] = set()
        self._total = len(checkpoint.tensors)
        with write_safetensors(out, checkpoint.tensors, metadata) as writer:
            for key in self.placements:
                for name, tensor in self._changed_parts(key):
                    writer.write(name, tensor)
                    made.add(name)
                    self._advance(1, key)
            for part in checkpoint.parts:
                for name in part.tensors:
                    if name not in made:
                        self._copy(writer, name, read_tensors(part, {name: name})[name])

    def _copy(self, writer: TensorWriter, name: str, tensor: Tensor) -> None:
        writer.write(name, tensor)
        self._advance(1, name)

    def to_gguf(self, out: Path) -> None:
        """A copy of the file, with the changed tensors written over: the header stays true."""
        checkpoint = self.base.checkpoint
        assert isinstance(checkpoint, GGUFCheckpoint)
        kind = self.base.kind
        here = {(t5_name(n) or n) if kind is Kind.T5 else n: n for n in checkpoint.header.tensors}
        names = (here[name] for key in self.placements for name in self.base.parts[key])
        changing = sum(checkpoint.header.tensors[name].nbytes for name in names)
        self._total = _bytes(checkpoint.path) + changing
        with replacing(out) as file:
            with checkpoint.path.open("rb") as source:
                while chunk := source.read(1 << 24):
                    file.write(chunk)
                    self._advance(len(chunk), checkpoint.path.name)
            for key in self.placements:
                for name, tensor in self._changed_parts(key):
                    place = checkpoint.header.tensors[here[name]]
                    data = tensor.contiguous().reshape(-1).view(torch.uint8)
                    assert data.numel() == place.nbytes
                    file.seek(place.offset)
                    file.write(data.numpy().data)
                    self._advance(place.nbytes, key)

    def _changed_parts(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """(name in the file, what is written there) of a parameter's parts and their scales."""
        parts = self.base.read(key)
        before = whole_in_fp32(parts.values(), self.device)
        after = self._after(key, before)
        values = []
        heights = [weight.shape[0] for weight in parts.values()]
        for name, rows in zip(parts, after.split(heights), strict=True):
            scale_name, scale = self._scale(name)
            try:
                stored = encode_as(name, rows, self.base.checkpoint.tensors[name], scale)
            except ChromaError as error:
                raise LoraError(f"{self.base.path.name}: {error}") from None
            values.append(stored.values)
            yield name, stored.data.cpu()
            if scale_name is not None and stored.scale is not None:
                yield scale_name, stored.scale.cpu()
        held = values[0] if len(values) == 1 else torch.cat(values)
        self._count(key, before, after, held)

    def _scale(self, name: str) -> tuple[str | None, Tensor | None]:
        """A stored scale as it is in the file."""
        checkpoint = self.base.checkpoint
        for side in self.base.sides[name]:
            if side.endswith(_SCALES) and isinstance(checkpoint, SafetensorsCheckpoint):
                part = next(part for part in checkpoint.parts if side in part.tensors)
                return side, read_tensors(part, {side: side})[side].to(self.device)
        return None, None

    def _after(self, key: str, before: Tensor) -> Tensor:
        try:
            return changed(before, self.placements.get(key, []))
        except LoraError as error:
            raise LoraError(f"{key}: {error}") from None

    def _count(self, key: str, before: Tensor, after: Tensor, stored: Tensor) -> None:
        if key not in self.placements:
            return
        product = power = 0.0
        chunks = (tensor.split(CHUNK) for tensor in (before, after, stored))
        for old, new, held in zip(*chunks, strict=True):
            wanted = new - old
            product += float(((held - old) * wanted).sum(dtype=torch.float64))
            power += float(wanted.square().sum(dtype=torch.float64))
        self.kept[key] = product, power

    def _advance(self, size: int, name: str) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total, name)


def _read(path: Path, base: Base, config: ChromaConfig | None) -> LoraFile:
    if isinstance(base.config, T5Config):
        return read_lora(path, config, base.config)
    return read_lora(path, base.config)


def _placements(base: Base, files: Sequence[tuple[LoraFile, float]]) -> dict[str, list[Placement]]:
    """{parameter key: what changes it}. Raises LoraError for a file that changes nothing here."""
    found: dict[str, list[Placement]] = {}
    for file, strength in files:
        parts = file.text_encoder if base.kind is Kind.T5 else file.transformer
        if not parts:
            other = "text encoder" if base.kind is not Kind.T5 else "transformer"
            raise LoraError(
                f"{file.path.name} changes nothing in {base.path.name}: it is for the {other} only"
            )
        for key, placed in parts.items():
            # Many files hold the embedding under a second name as well, or only there.
            keys = [k for k in (key, SECOND_NAME if key == EMBEDDING else key) if k in base.parts]
            if not keys:
                raise LoraError(f"{file.path.name} changes {key}, which {base.path.name} lacks")
            for one in dict.fromkeys(keys):
                found.setdefault(one, []).extend((p.adapter, strength, p.rows) for p in placed)
    return found


def _notes(files: Sequence[tuple[LoraFile, float]]) -> Iterator[str]:
    for file, _ in files:
        for reason, count in file.skipped.items():
            yield f"{file.path.name}: {count} tensors left out ({reason}), Chroma has none such"
        if file.unknown:
            yield f"{file.path.name}: {len(file.unknown)} tensors left out that nothing here knows"


def _metadata(
    base: Base, files: Sequence[tuple[LoraFile, float]], out: Path, *, keep_layout: bool
) -> dict[str, str]:
    """The base's metadata, what it is made of, and no hash that is no longer true."""
    dropped = (*HASHES, *(() if keep_layout else (_QUANTISATION,)))
    stated = base.checkpoint.metadata
    if isinstance(base.checkpoint, GGUFCheckpoint):
        stated = {}
    kept = {key: text for key, text in carried(stated).items() if key not in dropped}
    titles = [title(stated, base.path)]
    titles += [f"{title(file.metadata, file.path)}:{strength:g}" for file, strength in files]
    return kept | {"modelspec.title": out.stem, "modelspec.merged_from": ", ".join(titles)}


def _check_out(base: Base, out: Path, to: str) -> None:
    gguf = isinstance(base.checkpoint, GGUFCheckpoint) and to == BASE
    suffixes = (".gguf",) if gguf else SUFFIXES
    if out.suffix.lower() not in suffixes:
        raise LoraError(f"--out {out.name}: expected a name ending in {' or '.join(suffixes)}")
    if not out.parent.is_dir():
        raise LoraError(f"the folder {out.parent} does not exist; make it first")
    for source in _files(base):
        if out.exists() and out.samefile(source):
            raise LoraError(f"{out.name} is the base itself; give another name for the output")


def _files(base: Base) -> list[Path]:
    if isinstance(base.checkpoint, SafetensorsCheckpoint):
        return [part.path for part in base.checkpoint.parts]
    return [base.checkpoint.path]


def _bytes(path: Path) -> int:
    return path.stat().st_size


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
