"""Make a quantised file of a model: one tensor after another, never the whole model in memory."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, ChromaError
from ..quant.floats import E4M3
from ..quant.floats import INT8 as INT8_FORMAT
from ..quant.ggml_types import GGML_TYPES
from ..quant.gguf_encode import encode
from ..quant.gguf_formats import GGUF_FORMATS
from ..quant.learned import Rounded, quantise_fp8_learned
from ..quant.round_fp8 import quantise_fp8
from ..quant.round_int8 import quantise_int8
from ..quant.tensor import CHUNK, QuantTensor
from .calibration import Calibration
from .layout import (
    MARKER,
    MARKER_INFO,
    gguf_metadata,
    gguf_name,
    has_settings,
    safetensors_metadata,
    settings_text,
    stored_infos,
)
from .reader import BITS, SUFFIXES, TensorInfo
from .recipe import FP8_LEARNED, INT8, Recipe, plan
from .source import DTYPES, Source, open_source
from .work_folder import WorkFolder, work_key
from .write_gguf import stored_bytes, write_gguf
from .write_safetensors import TensorWriter, write_safetensors

# (bytes of the source done, of how many, the tensor that was just done)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LayerReport:
    """What became of one tensor.

    weight_error: rms of the error over rms of the tensor. With calibration data, output_error is
    learned rounding's rms error of the layer's output over that of rounding to nearest.
    """

    name: str
    format: str
    bytes: int
    weight_error: float
    output_error: float | None = None


@dataclass(frozen=True)
class Report:
    """What became of a file; bytes are those of the tensors, without the header."""

    layers: tuple[LayerReport, ...]
    source_bytes: int
    bytes: int

    def summary(self) -> str:
        """Sizes, their ratio and the largest error, in one line."""
        worst = max(self.layers, key=lambda layer: layer.weight_error)
        return (
            f"{self.source_bytes / 1e9:.3f} GB -> {self.bytes / 1e9:.3f} GB "
            f"({self.bytes / self.source_bytes:.2f} x); largest relative error "
            f"{worst.weight_error:.2%} in {worst.name} ({worst.format})"
        )


class _Stored(NamedTuple):
    """The tensors by name that are written for one, and the values they stand for, row by row."""

    tensors: dict[str, Tensor]
    values: Callable[[slice], Tensor]
    output_error: float | None = None


def quantise_file(
    source: Path,
    target: str,
    out: Path,
    keep: tuple[str, ...] = (),
    calibration: Path | Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
    *,
    device: torch.device | str = "cpu",
    resumable: bool = True,
) -> Report:
    """Write `out`, the model of `source` (transformer or T5; bf16, fp16 or fp32) as `target`.

    target: one of `recipe.TARGETS`. keep: parts of names of tensors that keep their precision.
    calibration: H or inputs of layers, for fp8-learned, which is worked out on `device`; a layer
    without is rounded to nearest at the best of a few scales. An error, Ctrl-C or an exception of
    `progress`, which is called after each tensor, leaves nothing behind but, for fp8-learned and if
    `resumable`, `<out>.work` with the finished layers, from which the next call goes on. Raises a
    ChromaError for whatever cannot be read, made or written.
    """
    recipe = Recipe(target, keep)
    _check_out(source, out, recipe)
    opened = open_source(source)
    formats = plan(opened.tensors, opened.kind, recipe)
    data = Calibration.of(calibration)
    _check_calibration(data, formats, recipe)
    total = sum(_size(info) for info in opened.tensors.values())
    work = WorkFolder(out.with_name(out.name + ".work")) if resumable else None
    reports: list[LayerReport] = []
    done = 0
    with _writer(opened, formats, recipe, out, resumable) as writer:
        for name, form in formats.items():
            weight = opened.read(name)
            try:
                stored = _store(name, weight, form, recipe, data, work, device)
            except CheckpointError:
                raise
            except ChromaError as error:
                raise CheckpointError(f"{source.name}: {name}: {error}") from None
            for part, tensor in stored.tensors.items():
                writer.write(part, tensor)
            size = sum(tensor.nbytes for tensor in stored.tensors.values())
            error = _relative_error(weight, stored.values)
            reports.append(LayerReport(name, form, size, error, stored.output_error))
            done += weight.nbytes
            if progress is not None:
                progress(done, total, name)
    if work is not None:
        work.remove()
    return Report(tuple(reports), total, sum(report.bytes for report in reports))


def _check_out(source: Path, out: Path, recipe: Recipe) -> None:
    suffixes = (".gguf",) if recipe.is_gguf else SUFFIXES
    if out.suffix.lower() not in suffixes:
        raise CheckpointError(
            f"{out.name} is no name for {recipe.target}; expected it to end in "
            f"{' or '.join(suffixes)}"
        )
    if out.exists() and source.exists() and out.samefile(source):
        raise CheckpointError(f"{out.name} is the source itself; give another name for the output")


def _check_calibration(data: Calibration, formats: Mapping[str, str], recipe: Recipe) -> None:
    layers = data.layers()
    if not layers:
        return
    if recipe.target != FP8_LEARNED:
        raise CheckpointError(
            f"{recipe.target} needs no calibration data; expected it with {FP8_LEARNED} only"
        )
    if not any(f"{layer}.weight" in formats for layer in layers):
        raise CheckpointError(
            f"the calibration data is of other layers ({min(layers)}) than the model's "
            f"({next(iter(formats))}); collect it from this model"
        )


def _size(info: TensorInfo) -> int:
    return math.prod(info.shape) * BITS[info.dtype] // 8


@contextmanager
def _writer(
    source: Source, formats: Mapping[str, str], recipe: Recipe, out: Path, resumable: bool
) -> Iterator[TensorWriter]:
    infos: dict[str, TensorInfo] = {}
    for name, form in formats.items():
        infos |= stored_infos(name, source.tensors[name], form, recipe)
    if recipe.is_gguf:
        _check_room(out, sum(map(stored_bytes, infos.values())))
        with write_gguf(out, infos, gguf_metadata(source.config, recipe)) as writer:
            yield writer
        return
    marked = not has_settings(recipe)
    if marked:
        infos[MARKER] = MARKER_INFO
    size = sum(map(_size, infos.values()))
    # Finished layers lie on the disk a second time until the end.
    _check_room(out, 2 * size if resumable and recipe.target == FP8_LEARNED else size)
    metadata = safetensors_metadata(formats, recipe, source.checkpoint.metadata)
    with write_safetensors(out, infos, metadata) as writer:
        if marked:
            writer.write(MARKER, torch.zeros(MARKER_INFO.shape, dtype=torch.uint8))
        yield writer


def _check_room(out: Path, needed: int) -> None:
    if not out.parent.is_dir():
        raise CheckpointError(f"the folder {out.parent} does not exist; make it first")
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise CheckpointError(
            f"{out.name} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left; "
            "make room or choose another disk"
        )


def _store(
    name: str,
    weight: Tensor,
    form: str,
    recipe: Recipe,
    data: Calibration,
    work: WorkFolder | None,
    device: torch.device | str,
) -> _Stored:
    if recipe.is_gguf:
        return _as_gguf(gguf_name(name), weight, form)
    if form in DTYPES:
        return _Stored({name: weight}, lambda part: weight[part].float())
    layer = name.removesuffix(".weight")
    output_error = None
    if form == INT8:
        codes, scale = quantise_int8(weight)
    elif form == FP8_LEARNED:
        rounded, calibrated = _learn(layer, weight, data, work, device)
        codes, scale = rounded.codes, rounded.scale
        if calibrated and rounded.nearest_error:
            output_error = math.sqrt(rounded.output_error / rounded.nearest_error)
    else:
        codes, scale = quantise_fp8(weight)
    matrix = QuantTensor(INT8_FORMAT if form == INT8 else E4M3, codes, scale, _shape(weight))
    if not has_settings(recipe):
        tensors = {name: codes, f"{layer}.scale_weight": scale}
    else:
        tensors = {
            name: codes, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": settings_text(form)
        }  # fmt: skip
    return _Stored(tensors, matrix.rows, output_error)


def _learn(
    layer: str,
    weight: Tensor,
    data: Calibration,
    work: WorkFolder | None,
    device: torch.device | str,
) -> tuple[Rounded, bool]:
    """The rounded layer, from the work folder if it is there; and whether it was calibrated."""
    gram = data.gram(layer, weight.shape[1])
    if work is None:
        return quantise_fp8_learned(weight, gram, device=device), gram is not None
    key = work_key(weight, gram)
    rounded = work.load(layer, key)
    if rounded is None:
        rounded = quantise_fp8_learned(weight, gram, device=device)
        work.save(layer, key, rounded)
    return rounded, gram is not None


def _as_gguf(name: str, weight: Tensor, form: str) -> _Stored:
    if form in DTYPES:
        cast = weight.to(DTYPES[form])
        if not bool(torch.isfinite(torch.stack(cast.aminmax())).all()):
            raise ChromaError(
                f"a value is too large for {form}; keep this tensor as it is, or choose bf16"
            )
        return _Stored({name: cast}, lambda part: cast[part].float())
    rows, columns = _shape(weight)
    _, block, block_bytes = GGML_TYPES[form]
    row_bytes = columns // block * block_bytes
    data = torch.empty((rows, row_bytes), dtype=torch.uint8)
    for start in range(0, rows, CHUNK):
        part = slice(start, start + CHUNK)
        data[part] = encode(form, weight[part].float())
    matrix = QuantTensor(GGUF_FORMATS[form], data, None, (rows, columns))
    return _Stored({name: data}, matrix.rows)


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _relative_error(weight: Tensor, values: Callable[[slice], Tensor]) -> float:
    """Root of the summed squared errors over that of the squared values; 0 for zeros."""
    error = power = 0.0
    for start in range(0, weight.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        exact = weight[part].float()
        power += float(exact.square().sum(dtype=torch.float64))
        error += float((values(part) - exact).square_().sum(dtype=torch.float64))
    return math.sqrt(error / power) if power else 0.0
