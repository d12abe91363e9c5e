"""Adapters by parameter to the tensors of a LoRA file in one style, and what was done to them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...errors import LoraError
from ..adapters import Adapter, DoRA, LowRank, OFTv2
from ..file import Placed
from .cut import cut
from .headers import EXACT_ROTATION, network, peft_settings, peft_text
from .join import Block, join
from .parts import parts_of
from .spell import DIFFUSERS, Names, Rows

Adapters = Mapping[str, Sequence[Placed]]


@dataclass
class Packed:
    """The tensors of a file, what its metadata is to say of them, and notes for the user."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Packer:
    names: Names
    style: str
    # By name and by which of the module's parameters it changes.
    modules: dict[tuple[str, str], Adapter] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    # Bytes of the widest number among the tensors that a parameter's adapters were read from.
    widths: dict[tuple[str, str], int] = field(default_factory=dict)
    width: int = 0

    def add(self, key: str, placed: Sequence[Placed], *, text_encoder: bool) -> None:
        """Name what changes one parameter; split or joined as the style has it."""
        self.width = max(t.dtype.itemsize for one in placed for t in one.adapter.tensors())
        whole = self.names.whole(key, self.style, text_encoder=text_encoder)
        places: list[tuple[Rows | None, str]] = [(None, whole)]
        if not text_encoder:
            places = self.names.split(key, self.style)
        if len(places) == 1:
            self._put_joined(key, placed, whole, places)
        elif self.style == DIFFUSERS:
            self._put_split(key, placed, whole, places)
        else:
            self._put_joined(key, placed, whole, places)

    def _put_joined(
        self, key: str, placed: Sequence[Placed], whole: str, places: list[tuple[Rows | None, str]]
    ) -> None:
        by_kind: dict[str, list[Placed]] = {}
        for one in placed:
            by_kind.setdefault(one.adapter.kind, []).append(one)
        for kind, members in by_kind.items():
            if len(members) == 1 and members[0].rows is None:
                self._put(whole, key, members[0].adapter)
                continue
            shape = self.names.shape(key)
            blocks = [Block(one.adapter, one.rows or (0, shape[0])) for one in members]
            adapter = join(blocks, shape)
            if adapter is not None:
                self._put(whole, key, adapter)
                self.counts["joined"] += 1
                continue
            names = {rows: name for rows, name in places if rows is not None}
            for one in members:
                if one.rows not in names:
                    raise LoraError(
                        f"{key}: a {kind} of rows {one.rows} has no name of its own in the "
                        f"{self.style} style; make a LoRA of it with resize, or keep the file"
                    )
                self._put(names[one.rows], key, one.adapter, one.rows[1] - one.rows[0])
            self.counts[f"split {kind}"] += 1

    def _put_split(
        self, key: str, placed: Sequence[Placed], whole: str, places: list[tuple[Rows | None, str]]
    ) -> None:
        height = self.names.shape(key)[0]
        for one in placed:
            start, end = one.rows or (0, height)
            inside = [
                (rows, name) for rows, name in places
                if rows is not None and start <= rows[0] and rows[1] <= end
            ]  # fmt: skip
            whole_parts = sum(rows[1] - rows[0] for rows, _ in inside) == end - start
            cuts = [cut(one.adapter, (r[0] - start, r[1] - start), end - start) for r, _ in inside]
            found = [adapter for adapter in cuts if adapter is not None]
            if not whole_parts or len(found) < len(cuts):
                if one.rows is not None:
                    raise LoraError(
                        f"{key}: a {one.adapter.kind} of rows {one.rows} cannot be split into "
                        "diffusers' modules; make a LoRA of it with resize, or keep the file"
                    )
                self._put(whole, key, one.adapter)
                self.counts[f"fused {one.adapter.kind}"] += 1
                continue
            self._put_parts(key, one, list(zip(inside, found, strict=True)))

    def _put_parts(
        self, key: str, one: Placed, parts: list[tuple[tuple[Rows, str], Adapter]]
    ) -> None:
        if len(parts) > 1:
            self.counts["split"] += 1
        empty = [isinstance(adapter, LowRank) and adapter.rank == 0 for _, adapter in parts]
        for ((rows, name), adapter), nothing in zip(parts, empty, strict=True):
            if not nothing:
                self._put(name, key, adapter, rows[1] - rows[0])
            elif all(empty) and isinstance(one.adapter, LowRank):
                # A LoRA that was not trained yet: it stays a LoRA of its rank.
                start = one.rows[0] if one.rows else 0
                up = one.adapter.up[rows[0] - start : rows[1] - start]
                self._put(name, key, replace(one.adapter, up=up), rows[1] - rows[0])

    def _put(self, name: str, key: str, adapter: Adapter, height: int | None = None) -> None:
        """Take an adapter of a module, or of rows of one that have a name, `height` of them."""
        place = name, key.rpartition(".")[2]
        taken = self.modules.get(place)
        if taken is not None:
            shape = self.names.shape(key)
            shape = (height or shape[0], *shape[1:])
            blocks = [Block(one, (0, shape[0])) for one in (taken, adapter)]
            both = join(blocks, shape) if taken.kind == adapter.kind else None
            if both is None:
                raise LoraError(
                    f"{name} would have to be a {taken.kind} and a {adapter.kind} at once; make "
                    "a LoRA of each with resize, or merge them into a checkpoint"
                )
            adapter = both
        self.modules[place] = adapter
        self.widths[place] = self.width


def pack(
    transformer: Adapters,
    text_encoder: Adapters,
    names: Names,
    style: str,
    dtype: torch.dtype | None = None,
) -> Packed:
    """The tensors of both models' adapters in a style; `dtype` None keeps what is exact.

    Raises LoraError for an adapter that the style has no room for.
    """
    packer = _Packer(names, style)
    for key, placed in transformer.items():
        packer.add(key, placed, text_encoder=False)
    for key, placed in text_encoder.items():
        packer.add(key, placed, text_encoder=True)
    tensors: dict[str, Tensor] = {}
    raised = 0
    for (module, parameter), adapter in packer.modules.items():
        width = packer.widths[module, parameter]
        if dtype is not None:
            adapter = adapter.to(None, dtype)
        parts = parts_of(adapter, style, parameter)
        if dtype is None:
            raised += any(t.dtype.itemsize > width for t in parts.values() if t.ndim)
        else:
            parts = {end: t.to(dtype) if t.ndim else t for end, t in parts.items()}
        tensors |= {module + end: tensor for end, tensor in parts.items()}
    _check_finite(tensors)
    return Packed(tensors, _settings(packer, style), _notes(packer, style, raised))


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise LoraError(f"{name} is too large for {tensor.dtype}; choose another dtype")


def _settings(packer: _Packer, style: str) -> dict[str, str]:
    adapters = {name: one for (name, parameter), one in packer.modules.items()
                if parameter == "weight"}  # fmt: skip
    plain = {name: one.inner if isinstance(one, DoRA) else one for name, one in adapters.items()}
    low_rank = {name: one for name, one in plain.items() if isinstance(one, LowRank)}
    only = len(low_rank) == len(adapters) and not any(
        isinstance(one, DoRA) for one in adapters.values()
    )
    ranked = [one for one in plain.values() if one.rank is not None]
    settings = network(
        [one.rank or 0 for one in ranked],
        [getattr(one, "scale", 1.0) * (one.rank or 0) for one in ranked],
        only_low_rank=only,
    ) if ranked else {}  # fmt: skip
    entries: dict[str, object] = {}
    if style == DIFFUSERS and low_rank:
        dora = any(isinstance(adapters[name], DoRA) for name in low_rank)
        entries = peft_settings({name: one.rank for name, one in low_rank.items()}, dora=dora)
        settings["ss_network_alpha"] = settings["ss_network_dim"]
    if any(isinstance(one, OFTv2) and not one.neumann for one in plain.values()):
        entries |= EXACT_ROTATION
    settings |= peft_text(entries)
    return settings


def _notes(packer: _Packer, style: str, raised: int) -> list[str]:
    notes = []
    for what, count in packer.counts.items():
        verb, _, kind = what.partition(" ")
        if kind and verb == "split":
            notes.append(f"{count} {kind} modules stay split as diffusers has them: no {kind} of "
                         "the fused matrix does the same")  # fmt: skip
        elif kind:
            notes.append(f"{count} {kind} modules stay fused under their original names, which "
                         "diffusers does not read: no split does the same")  # fmt: skip
        elif verb == "joined":
            notes.append(f"{count} modules were joined from parts of theirs, exactly")
        else:
            notes.append(f"{count} modules were split into parts of theirs, exactly")
    if raised:
        notes.append(f"{raised} modules are stored in fp32: their scale does not fit the file's "
                     "dtype exactly")  # fmt: skip
    if style == DIFFUSERS:
        notes += _unread(packer)
    return notes


def _unread(packer: _Packer) -> list[str]:
    """What diffusers' own loader of Chroma's LoRAs leaves out or refuses."""
    adapters = packer.modules.values()
    kinds = {one.kind for one in adapters} - {"lora", "dora"}
    kinds |= {f"dora of a {one.inner.kind}" for one in adapters
              if isinstance(one, DoRA) and not isinstance(one.inner, LowRank)}  # fmt: skip
    if any(isinstance(one, DoRA) and not one.per_row for one in adapters):
        kinds.add("dora by columns")
    return [f"diffusers itself does not read: {', '.join(sorted(kinds))}"] if kinds else []
