"""Read a LoRA file of any trainer: what each tensor is for, checked, under the model's names."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..checkpoint.identify import Kind, identify
from ..checkpoint.reader import SUFFIXES, Header, read_header, read_tensors
from ..config import ChromaConfig
from ..errors import CheckpointError, LoraError
from ..quant.finite import all_finite
from ..text.t5 import T5Config
from .build import Change, build
from .file import LoraFile, Placed
from .metadata import read_settings
from .names import Table, Target, bias_of, name_table, resolve, why_foreign
from .other import recognise
from .spelling import prefix_of, split_suffix

_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
# A zip file, and Python's pickle protocols 2 to 5: what torch.save writes.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PAGE_STARTS = (b"<!do", b"<htm", b"vers")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Single numbers and flags, which can be stored in any type.
_NUMBERS = ("alpha", "on_input", "scaled_oft")
_INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
_SHOWN = 5


@dataclass
class _Group:
    """The tensors of one module as the file spells it: {what it is: name in the file}."""

    target: Target
    parts: dict[str, str] = field(default_factory=dict)


@dataclass
class _Sorted:
    """Every name in a file, by what can be done with it."""

    groups: dict[str, _Group] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)


def read_lora(
    path: Path, config: ChromaConfig | None = None, text_config: T5Config | None = None
) -> LoraFile:
    """The adapters in a file for a transformer of these sizes (by default Chroma1's).

    Tensors are memory-mapped, in the file's own dtype, finite, and fit the model. Raises LoraError
    for what is not a LoRA of Chroma or Flux.1, is damaged, or cannot be used.
    """
    path = Path(path)
    config = config or ChromaConfig()
    header = _open(path)
    table = name_table(config, text_config)
    found = _sort(path, list(header.tensors), table)
    _check_model(header, found, config)
    settings = read_settings(path, header.metadata)
    tensors = _read(header, found.groups.values())
    parts: tuple[dict[str, list[Placed]], ...] = ({}, {})
    for spelled, group in found.groups.items():
        here = {part: tensors[name] for part, name in group.parts.items()}
        try:
            changes, left = build(here, settings[group.target.text_encoder], spelled)
            for change in changes:
                _place(parts[group.target.text_encoder], group.target, change, table)
        except LoraError as error:
            raise LoraError(f"{path.name}: {spelled}: {error}") from None
        found.unknown += [group.parts[part] for part in left]
    if not any(parts):
        raise LoraError(f"{path.name}: no tensor in it changes the model; {_named(found.unknown)}")
    return LoraFile(
        path=path, transformer=parts[0], text_encoder=parts[1], skipped=dict(found.skipped),
        unknown=sorted(found.unknown), metadata=header.metadata, prefix=_prefix(found.groups),
    )  # fmt: skip


def _open(path: Path) -> Header:
    """The checked header. Nothing is ever unpickled."""
    if path.suffix.lower() in _PICKLES:
        raise LoraError(
            f"{path.name} is a pickle file, which can run code when opened; expected .safetensors, "
            "so convert it on a machine without secrets: safetensors.torch.save_file("
            "torch.load(FILE, weights_only=True), NEW_FILE)"
        )
    try:
        if path.suffix.lower() in SUFFIXES and path.is_file():
            _check_start(path)
        return read_header(path)
    except (CheckpointError, OSError) as error:
        raise LoraError(str(error)) from None


def _check_start(path: Path) -> None:
    """Raises LoraError for other kinds of file that are often found under the name."""
    with path.open("rb") as file:
        start = file.read(9)
    # The ninth byte of a safetensors file is the "{" of its JSON.
    if start[8:] == b"{":
        return
    if start.startswith(_PICKLE_STARTS):
        raise LoraError(
            f"{path.name} is a pickle under a wrong name, and can run code when opened; expected "
            "safetensors, so download that version"
        )
    if start[:4].lower() in _PAGE_STARTS:
        raise LoraError(
            f"{path.name} is a web page or a pointer, not the file itself; download it again"
        )


def _sort(path: Path, names: list[str], table: Table) -> _Sorted:
    found, all_names = _Sorted(), set(names)
    for name in names:
        spelled = split_suffix(name) or _ia3_factor(name, all_names)
        target = None if spelled is None else resolve(spelled[0], table)
        if spelled is None or target is None:
            reason = why_foreign(name if spelled is None else spelled[0], table)
            if reason is None:
                found.unknown.append(name)
            else:
                found.skipped[reason] += 1
            continue
        module, part = spelled
        parts = found.groups.setdefault(module, _Group(target)).parts
        if part in parts:
            raise LoraError(
                f"{path.name}: {module} has two tensors for one purpose ({parts[part]}, {name}), "
                "so the file holds several LoRAs; expected one, so save them apart"
            )
        parts[part] = name
    return found


def _ia3_factor(name: str, names: set[str]) -> tuple[str, str] | None:
    """IA3's factors are called like a whole weight; what stands beside them tells."""
    module = name.removesuffix(".weight")
    return (module, "factor") if f"{module}.on_input" in names and module != name else None


def _check_model(header: Header, found: _Sorted, config: ChromaConfig) -> None:
    """Raises LoraError if the file is no LoRA, or one that was made for another model."""
    name = header.path.name
    for group in found.groups.values():
        down = header.tensors.get(group.parts.get("down", ""))
        if group.target.module == "img_in" and down is not None and len(down.shape) == 2:
            width = down.shape[1]
            if width != config.in_channels and width % config.in_channels == 0:
                raise LoraError(
                    f"{name} is a control LoRA of Flux.1 (its img_in takes {width} channels, this "
                    f"model's {config.in_channels}); Chroma has no input for its control picture"
                )
    kind = identify(header.tensors)
    # Adapters of a kind that is not known carry the names of a model, but none of its weights.
    whole = any(tensor.endswith(".weight") for tensor in header.tensors)
    if not found.groups and whole and kind not in (Kind.UNKNOWN, Kind.LORA):
        raise LoraError(f"{name} is {kind.value}, not a LoRA; choose it where models are loaded")
    other = recognise(found.unknown, config.double_depth, config.single_depth)
    if other is not None:
        raise LoraError(f"{name} is a LoRA of {other}; expected one of Chroma or Flux.1")
    if found.groups:
        return
    if found.skipped:
        reasons = ", ".join(found.skipped)
        raise LoraError(f"{name} changes only what Chroma does not have ({reasons})")
    raise LoraError(
        f"{name} matches nothing in Chroma; expected a LoRA of Chroma or Flux.1. "
        f"{_named(found.unknown)}"
    )


def _named(unknown: list[str]) -> str:
    if not unknown:
        return "It holds no tensors"
    return f"It holds {len(unknown)} tensors such as {', '.join(sorted(unknown)[:_SHOWN])}"


def _read(header: Header, groups: Iterable[_Group]) -> dict[str, Tensor]:
    wanted: dict[str, str] = {}
    for group in groups:
        for part, name in group.parts.items():
            info = header.tensors[name]
            if info.dtype not in _FLOATS and (part not in _NUMBERS or info.dtype not in _INTEGERS):
                raise LoraError(
                    f"{header.path.name}: {name} is {info.dtype}, expected floating-point numbers"
                )
            if 0 in info.shape:
                raise LoraError(f"{header.path.name}: {name} is empty, of shape {info.shape}")
            wanted[name] = name
    try:
        return read_tensors(header, wanted)
    except CheckpointError as error:
        raise LoraError(str(error)) from None


def _place(parts: dict[str, list[Placed]], target: Target, change: Change, table: Table) -> None:
    """Check an adapter against the rows it is for, and file it there."""
    target = bias_of(target) if change.bias else target
    shape = table.shape(target)
    if shape is not None:
        try:
            change.adapter.fit(shape)
        except LoraError as error:
            raise LoraError(
                f"{error}; it is damaged, or was trained on a model of other sizes"
            ) from None
    elif not target.text_encoder or change.bias:
        raise LoraError(f"it changes {target.key}, which the model does not have")
    for tensor in change.adapter.tensors():
        if not all_finite(tensor.float() if tensor.itemsize == 1 else tensor):
            raise LoraError(
                "a tensor holds NaN or infinity; the file is damaged, download it again"
            )
    there = parts.setdefault(target.key, [])
    if any(p.rows == target.rows and p.adapter.kind == change.adapter.kind for p in there):
        raise LoraError(
            f"a second {change.adapter.kind} of {target.key} is in the file under another name; "
            "expected one, so save them apart"
        )
    there.append(Placed(change.adapter, target.rows))


def _prefix(groups: Mapping[str, _Group]) -> str:
    """The commonest of what stands before the modules' names."""
    counts = Counter(prefix_of(spelled) for spelled in groups)
    return counts.most_common(1)[0][0]
