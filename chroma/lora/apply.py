"""LoRAs on a model in memory, and off it again.

*patch* merges into plain weights: in fp32, rounded once. *bypass* computes adapters beside a
weight that stays as it is, which costs quantised matrices nothing of their accuracy. *auto*
patches what is plain and bypasses what is quantised.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import free_memory
from ..errors import LoraError
from ..quant.layers import QuantLinear, StoredWeight
from ..text.t5 import T5Encoder
from ..transformer import ChromaTransformer
from .adapters.base import Placement, changed
from .affine import Affine, compose
from .bypass import BypassLinear
from .file import LoraFile, Placed
from .strengths import Strengths
from .twin import Model, twin

AUTO, PATCH, BYPASS = WAYS = ("auto", "patch", "bypass")
_KEY = "_loras"


@dataclass(frozen=True)
class Lora:
    """One file, how strong it is, and how it is to be applied."""

    file: LoraFile
    strengths: Strengths = field(default_factory=Strengths)
    how: str = AUTO

    def __post_init__(self) -> None:
        if self.how not in WAYS:
            raise LoraError(f"how '{self.how}' is unknown; expected one of {', '.join(WAYS)}")


@dataclass(frozen=True)
class _Applied:
    """What a model's LoRAs are, and what they took the place of."""

    loras: tuple[Lora, ...]
    modules: dict[str, nn.Module] = field(default_factory=dict)
    # In the computer's memory: an accelerator's own has no room for a weight and its original.
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    """All that is to happen to one parameter."""

    key: str
    placements: list[Placement]
    ways: set[str]

    @property
    def module(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.key.rpartition(".")[2]


def apply_lora(
    model: nn.Module, files: Sequence[tuple[LoraFile, Strengths]], how: str = AUTO
) -> None:
    """Give a transformer or a T5 encoder exactly these LoRAs; those it had are gone.

    Raises LoraError, with the model as it was, for a file that does not fit it, or where quantised
    matrices would have to be expanded and memory has no room for that.
    """
    set_loras(model, [Lora(file, strengths, how) for file, strengths in files])


def set_loras(model: nn.Module, loras: Sequence[Lora]) -> None:
    """As `apply_lora`, with a way of its own for each. Where they differ at a matrix, all patch."""
    jobs = _jobs(model, loras)
    dtype = _compute_dtype(model)
    plans = [(job, _affine(model, job, dtype)) for job in jobs]
    _check_room(model, [job for job, affine in plans if affine is None], dtype)
    saved = remove_lora(model)
    applied = _Applied(tuple(loras))
    setattr(model, _KEY, applied)
    try:
        for job, affine in plans:
            if affine is None:
                _patch(model, job, applied, saved, dtype)
            else:
                _bypass(model, job, applied, affine)
    except BaseException:
        remove_lora(model)
        raise


def remove_lora(model: nn.Module) -> dict[str, nn.Parameter]:
    """Take every LoRA off: each weight is the original again, to the last bit.

    Returns the originals of the patched ones, by key, in the computer's memory.
    """
    applied = _applied(model)
    for name, module in applied.modules.items():
        device = next(model.get_submodule(name).parameters()).device
        _put(model, name, module.to(device))
    for name in applied.beside:
        _quantised(model, name).affine = None
    for key, original in applied.parameters.items():
        name, _, leaf = key.rpartition(".")
        module = model.get_submodule(name)
        setattr(module, leaf, _moved(original, module.get_parameter(leaf).device))
    setattr(model, _KEY, _Applied(()))
    return applied.parameters


def loras_of(model: nn.Module) -> tuple[Lora, ...]:
    """The LoRAs that a model has, in the order in which they were applied."""
    return _applied(model).loras


def with_loras(model: Model, loras: Sequence[Lora]) -> Model:
    """A second model on the same weights with these LoRAs behind those of the first one.

    The first stays as it is. Only patched weights need memory of their own. Raises LoraError as
    `apply_lora` does.
    """
    other, applied = twin(model), _applied(model)
    originals = {name: twin(module) for name, module in applied.modules.items()}
    setattr(other, _KEY, replace(applied, modules=originals))
    set_loras(other, [*applied.loras, *loras])
    return other


def _applied(model: nn.Module) -> _Applied:
    return getattr(model, _KEY, None) or _Applied(())


def _jobs(model: nn.Module, loras: Sequence[Lora]) -> list[_Job]:
    """Every parameter that changes. Raises LoraError for a file that does not fit the model."""
    jobs: dict[str, _Job] = {}
    for lora in loras:
        is_text = isinstance(model, T5Encoder)
        part = lora.file.text_encoder if is_text else lora.file.transformer
        if isinstance(model, ChromaTransformer):
            lora.strengths.check(model.config.double_depth, model.config.single_depth)
        for key, all_placed in part.items():
            shape = _shape(model, key, lora.file)
            strength = lora.strengths.text_encoder if is_text else lora.strengths.of(key)
            for placed in all_placed:
                _check(placed, shape, key, lora.file)
                if strength != 0:
                    job = jobs.setdefault(key, _Job(key, [], set()))
                    job.placements.append((placed.adapter, strength, placed.rows))
                    job.ways.add(lora.how)
    return list(jobs.values())


def _shape(model: nn.Module, key: str, file: LoraFile) -> tuple[int, ...]:
    name, _, leaf = key.rpartition(".")
    try:
        module = _original(model, name)
        held = module.stored if isinstance(module, StoredWeight) and leaf == "weight" else None
        return held.shape if held is not None else tuple(module.get_parameter(leaf).shape)
    except AttributeError:
        raise LoraError(
            f"{file.path.name} changes {key}, which this model does not have; "
            "choose a LoRA made for it"
        ) from None


def _check(placed: Placed, shape: tuple[int, ...], key: str, file: LoraFile) -> None:
    if placed.rows is not None:
        first, end = placed.rows
        if not 0 <= first < end <= shape[0]:
            raise LoraError(
                f"{file.path.name}: it changes rows {first} to {end - 1} of {key}, which has "
                f"{shape[0]}; choose a LoRA made for this model"
            )
        shape = (end - first, *shape[1:])
    try:
        placed.adapter.fit(shape)
    except LoraError as error:
        raise LoraError(f"{file.path.name}: {key}: {error}") from None


def _affine(model: nn.Module, job: _Job, dtype: torch.dtype) -> Affine | None:
    """What runs beside a matrix, or None where it is patched instead."""
    module = _original(model, job.module)
    if job.leaf != "weight" or not _bypassed(module, job.ways):
        return None
    layer: Any = module
    shape, device = (layer.out_features, layer.in_features), layer.weight.device

    def weight() -> Tensor:
        return _values(model, job.key)

    affine = compose(job.placements, shape, weight, device).to(device, dtype)
    # A whole matrix beside a weight takes its memory, and twice its time.
    return None if affine.dense and job.ways != {BYPASS} else affine


def _bypassed(module: nn.Module, ways: set[str]) -> bool:
    if isinstance(module, QuantLinear):
        return PATCH not in ways
    return isinstance(module, nn.Linear) and ways == {BYPASS}


def _check_room(model: nn.Module, jobs: list[_Job], dtype: torch.dtype) -> None:
    """Raises LoraError where quantised matrices are to be expanded and memory has no room."""
    stored = [m for job in jobs if isinstance(m := _original(model, job.module), StoredWeight)]
    if not stored:
        return
    needed = sum(module.stored.numel() for module in stored) * dtype.itemsize
    free = free_memory(next(model.parameters()).device)
    if needed > free:
        raise LoraError(
            f"expanding {len(stored)} quantised matrices needs {needed / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free; choose the way '{BYPASS}'"
        )


def _patch(
    model: nn.Module,
    job: _Job,
    applied: _Applied,
    saved: dict[str, nn.Parameter],
    dtype: torch.dtype,
) -> None:
    module = model.get_submodule(job.module)
    merged = changed(_values(model, job.key), job.placements)
    if isinstance(module, StoredWeight) and job.leaf == "weight":
        applied.modules[job.module] = module
        _put(model, job.module, _expanded(module, merged.to(dtype)))
        return
    original = module.get_parameter(job.leaf)
    if job.key not in saved:
        saved[job.key] = _moved(original, torch.device("cpu"))
    applied.parameters[job.key] = saved[job.key]
    setattr(module, job.leaf, _parameter(merged.to(original.dtype)))


def _bypass(model: nn.Module, job: _Job, applied: _Applied, affine: Affine) -> None:
    module = model.get_submodule(job.module)
    if isinstance(module, QuantLinear):
        applied.beside.append(job.module)
        module.affine = affine
    elif isinstance(module, nn.Linear):
        applied.modules[job.module] = module
        _put(model, job.module, BypassLinear(module, affine))


def _expanded(module: StoredWeight, weight: Tensor) -> nn.Module:
    """A plain layer with this weight in the place of a quantised one."""
    rows, columns = module.stored.shape
    with torch.device("meta"):
        if isinstance(module, QuantLinear):
            layer = nn.Linear(columns, rows, bias=module.bias is not None)
            layer.register_parameter("bias", module.bias)
        else:
            layer = nn.Embedding(rows, columns)
    layer.weight = _parameter(weight)
    return layer


def _values(model: nn.Module, key: str) -> Tensor:
    """A parameter's values without LoRAs, in new memory where it is used, fp32."""
    name, _, leaf = key.rpartition(".")
    module = _original(model, name)
    if isinstance(module, StoredWeight) and leaf == "weight":
        return module.stored.dequantise(torch.float32)
    used = module.get_parameter(leaf)
    original = _applied(model).parameters.get(key, used)
    return original.detach().to(used.device, torch.float32, copy=True)


def _original(model: nn.Module, name: str) -> nn.Module:
    """A module as it is without LoRAs."""
    originals = _applied(model).modules
    return originals[name] if name in originals else model.get_submodule(name)


def _quantised(model: nn.Module, name: str) -> QuantLinear:
    module = model.get_submodule(name)
    assert isinstance(module, QuantLinear)
    return module


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _moved(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """The same parameter where it is on that device already."""
    return parameter if parameter.device == device else _parameter(parameter.detach().to(device))


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the plain weights, which is that of the products."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
