"""Matrices that wait in the processor's memory, copied to the GPU while it still computes.

A model larger than the GPU's memory sends the same matrices in the same order in every forward
pass. Memory for a copy belongs to the stream of the computations, where what was freed is used
again in order; the stream of the copies waits for that, so that no lead of the host takes more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch

from .layers import StoredWeight
from .tensor import QuantTensor

# Bytes on their way at one time: the two matrices of a single block of Chroma1 in 8 bits.
BUDGET = 128 * 2**20

Key = ref[StoredWeight]


@dataclass
class Copy:
    """A matrix on its way: `source` must stay until `sent` is complete, which `event` tells."""

    source: QuantTensor
    sent: QuantTensor
    event: Any


class Lane:
    """A stream of copies to one GPU, beside the stream of its computations."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def send(self, weight: QuantTensor) -> QuantTensor:
        """A copy that is complete for whatever is queued next."""
        return weight.to(self._device)

    def reserve(self, weight: QuantTensor) -> Copy | None:
        """Memory that is free after the computations queued so far; None where there is none."""
        try:
            data = torch.empty_like(weight.data, device=self._device)
            scale = weight.scale
            scale = None if scale is None else torch.empty_like(scale, device=self._device)
        except torch.cuda.OutOfMemoryError:
            return None
        event = torch.cuda.current_stream(self._device).record_event()
        return Copy(weight, replace(weight, data=data, scale=scale), event)

    def start(self, copy: Copy) -> None:
        """Queue a copy into reserved memory."""
        # Only pinned memory is copied without the host. ComfyUI pins what it keeps off the GPU,
        # within its user's limits; we pin no matrix: it may be pages of a mapped file, of which
        # pinning makes private copies for good. The scales, which ComfyUI leaves, are small.
        source, sent = copy.source, copy.sent
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(copy.event)
            if source.scale is not None and sent.scale is not None:
                scale = source.scale.pin_memory() if source.data.is_pinned() else source.scale
                sent.scale.copy_(scale, non_blocking=True)
            sent.data.copy_(source.data, non_blocking=True)
            copy.event = self._stream.record_event()

    def wait(self, copy: Copy) -> QuantTensor:
        """Let the computations queued from now on wait for a started copy."""
        torch.cuda.current_stream(self._device).wait_event(copy.event)
        return copy.sent

    def drain(self) -> None:
        """Return when all started copies are complete."""
        self._stream.synchronize()


def cuda_lane(device: torch.device) -> Lane | None:
    """A lane to a GPU that torch.cuda knows; None for other devices."""
    return Lane(device) if device.type == "cuda" else None


MakeLane = Callable[[torch.device], Lane | None]


class Prefetch:
    """Copies the matrices of one model ahead of the layers that ask for them.

    One thread, device and stream of computations at a time. `budget` bounds the bytes on their
    way, beside the matrix in use. Nothing is copied for the next forward pass and held till then.
    """

    def __init__(self, lane: MakeLane = cuda_lane, budget: int = BUDGET) -> None:
        self._make_lane, self._budget = lane, budget
        self._device: torch.device | None = None
        self._lane: Lane | None = None
        self._order: list[Key] = []
        self._last = -1  # the place in the order of the layer that asked last
        self._pending: dict[Key, tuple[Copy, Any]] = {}

    @contextmanager
    def fetch(self, layer: StoredWeight, device: torch.device) -> Iterator[QuantTensor]:
        """The layer's matrix on `device`, for computations that are queued within the block.

        The next copies start at its end, when the device has work: from memory that is not pinned
        they hold up the host.
        """
        stored = layer.stored
        lane = self._lane_to(device) if stored.data.device.type == "cpu" else None
        if lane is None:
            yield stored.to(device)
            return
        self._last = self._find(ref(layer))
        weight = self._take(layer, lane)
        ahead = self._reserve(lane)
        yield lane.send(stored) if weight is None else weight
        for following, copy, state in ahead:
            lane.start(copy)
            self._pending[following] = copy, state

    def clear(self) -> None:
        """Before matrices are moved or freed: end all copies and give their memory back."""
        if self._lane is not None:
            self._lane.drain()
        self._pending.clear()
        self._last = -1

    def _lane_to(self, device: torch.device) -> Lane | None:
        if device != self._device:
            self.clear()
            self._device, self._lane = device, self._make_lane(device)
        return self._lane

    def _find(self, key: Key) -> int:
        """A layer's place in the order, which is learned or mended where it says otherwise."""
        following = self._last + 1
        if self._order[following : following + 1] == [key]:
            return following
        if key not in self._order:
            self._order.insert(following, key)
            return following
        place = self._order.index(key)
        # A forward pass that skips layers is in order, and so is one that begins after the end.
        if place > self._last or following == len(self._order):
            return place
        self._order = [key]
        return 0

    def _take(self, layer: StoredWeight, lane: Lane) -> QuantTensor | None:
        """The matrix that was copied ahead, unless it has changed since; skipped ones go."""
        while self._pending:
            first = next(iter(self._pending))
            copy, state = self._pending.pop(first)
            sent = lane.wait(copy)  # a skipped one too, or its memory would be free too early
            if first == ref(layer):
                return sent if state == _state(layer) else None
        return None

    def _reserve(self, lane: Lane) -> list[tuple[Key, Copy, Any]]:
        """Memory for the next matrices in the order, as many as the budget has room for."""
        room = self._budget - sum(copy.source.nbytes for copy, _ in self._pending.values())
        copies = []
        for key in self._order[self._last + 1 :]:
            layer = key()
            if layer is None or key in self._pending or layer.weight.device.type != "cpu":
                continue
            weight = layer.stored
            room -= weight.nbytes
            if room < 0 or (copy := lane.reserve(weight)) is None:
                break
            copies.append((key, copy, _state(layer)))
        return copies


def _state(layer: StoredWeight) -> Any:
    """What differs once a layer's bytes are elsewhere or were written to, while a copy has them."""
    parts = [part for part in (layer.weight, layer.weight_scale) if part is not None]
    return [(p.device, p.data_ptr(), None if p.is_inference() else p._version) for p in parts]
