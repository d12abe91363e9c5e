"""Matrices copied ahead: always the layer's own bytes, in bounded memory, while work is queued.

`FakeLane` is a device whose copies are read when they start and arrive when they are waited for.
"""

import gc
import weakref

import pytest
import torch
from chroma_nodes.chroma.quant.floats import E4M3, INT8
from chroma_nodes.chroma.quant.layers import StoredWeight
from chroma_nodes.chroma.quant.matmul_exact import linear
from chroma_nodes.chroma.quant.prefetch import Copy, Prefetch, cuda_lane
from chroma_nodes.chroma.quant.tensor import QuantTensor
from hypothesis import given, settings
from hypothesis import strategies as st

GPU, OTHER_GPU = torch.device("cuda", 0), torch.device("cuda", 1)
ROWS, COLUMNS = 4, 8
BYTES = ROWS * COLUMNS + 4 * ROWS  # with the scales
GARBAGE = 85


class FakeLane:
    def __init__(self, budget: int) -> None:
        self.budget, self.full = budget, False
        self.log: list[tuple[str, int]] = []
        self.reserved: list[Copy] = []
        self.on_the_way: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(self, what: str, weight: QuantTensor) -> None:
        self.log.append((what, weight.data.data_ptr()))

    def send(self, weight: QuantTensor) -> QuantTensor:
        self.note("send", weight)
        return copied(weight)

    def reserve(self, weight: QuantTensor) -> Copy | None:
        if self.full:
            return None
        self.note("reserve", weight)
        sent = copied(weight)
        sent.data.fill_(GARBAGE)
        sent.scale.fill_(GARBAGE)
        copy = Copy(weight, sent, None)
        self.reserved.append(copy)
        return copy

    def start(self, copy: Copy) -> None:
        self.note("start", copy.source)
        self.reserved = [other for other in self.reserved if other is not copy]
        self.on_the_way[id(copy)] = (copy, copied(copy.source))
        assert sum(c.source.nbytes for c, _ in self.on_the_way.values()) <= self.budget

    def wait(self, copy: Copy) -> QuantTensor:
        _, source = self.on_the_way.pop(id(copy))  # a KeyError where it was not started
        self.note("wait", copy.source)
        copy.sent.data.copy_(source.data)
        copy.sent.scale.copy_(source.scale)
        return copy.sent

    def drain(self) -> None:
        self.on_the_way.clear()

    def take_log(self) -> list[str]:
        taken = [what for what, _ in self.log]
        self.log.clear()
        return taken


def copied(weight: QuantTensor) -> QuantTensor:
    return QuantTensor(weight.format, weight.data.clone(), weight.scale.clone(), weight.shape)


def values(rows: int = ROWS) -> QuantTensor:
    data = torch.randint(-127, 128, (rows, COLUMNS), dtype=torch.int8)
    return QuantTensor(INT8, data, torch.rand(rows, 1), (rows, COLUMNS))


def fakes(count: int, budget: int = 2 * BYTES) -> tuple[FakeLane, Prefetch, list[StoredWeight]]:
    torch.manual_seed(0)
    lane = FakeLane(budget)
    return lane, Prefetch(lambda _: lane, budget), [StoredWeight(values()) for _ in range(count)]


def ask(prefetch: Prefetch, layers: list[StoredWeight], device: torch.device = GPU) -> None:
    """One forward pass, whose matrices are compared with the layers'."""
    for layer in layers:
        with prefetch.fetch(layer, device) as weight:
            assert torch.equal(weight.data, layer.weight)
            assert torch.equal(weight.scale, layer.weight_scale)


def direct(lane: FakeLane) -> int:
    return lane.take_log().count("send")


def test_the_order_is_learned_in_one_pass() -> None:
    lane, prefetch, layers = fakes(6)
    ask(prefetch, layers)
    assert lane.take_log() == ["send"] * 6
    for _ in range(3):
        ask(prefetch, layers)
        assert not lane.on_the_way and not lane.reserved, "memory is held between two passes"
        log = lane.take_log()
        assert log.count("send") == 1 and log.count("start") == log.count("wait") == 5


def test_copies_start_after_work_is_queued_into_memory_from_before_it() -> None:
    lane, prefetch, layers = fakes(3)
    ask(prefetch, layers)
    lane.take_log()
    with prefetch.fetch(layers[0], GPU):
        assert lane.take_log() == ["reserve", "reserve", "send"]
    assert lane.log == [("start", layer.weight.data_ptr()) for layer in layers[1:]]
    lane.take_log()
    with prefetch.fetch(layers[1], GPU):
        assert lane.take_log() == ["wait"]


def test_a_failed_computation_starts_no_copies() -> None:
    lane, prefetch, layers = fakes(3)
    ask(prefetch, layers)
    with pytest.raises(RuntimeError), prefetch.fetch(layers[0], GPU):
        raise RuntimeError("out of memory")
    assert not lane.on_the_way
    ask(prefetch, layers)


def test_matrices_above_the_budget_are_not_copied_ahead() -> None:
    lane, prefetch, layers = fakes(4)
    layers[2] = StoredWeight(values(3 * ROWS))
    for _ in range(2):
        lane.take_log()
        ask(prefetch, layers)
    assert direct(lane) == 2


def test_a_device_without_room_gets_its_matrices_when_they_are_needed() -> None:
    lane, prefetch, layers = fakes(4)
    ask(prefetch, layers)
    lane.full = True
    lane.take_log()
    ask(prefetch, layers)
    assert lane.take_log() == ["send"] * 4


def rewrite(layer: StoredWeight) -> None:
    with torch.no_grad():
        layer.weight.add_(1)


def rescale(layer: StoredWeight) -> None:
    layer.weight_scale.mul_(2)


def replace_data(layer: StoredWeight) -> None:
    layer.weight.data = layer.weight.data + 1


def replace_parameter(layer: StoredWeight) -> None:
    layer.weight = torch.nn.Parameter(layer.weight.data + 1, requires_grad=False)


@pytest.mark.parametrize("change", [rewrite, rescale, replace_data, replace_parameter])
def test_changed_weights_are_never_stale(change) -> None:
    lane, prefetch, layers = fakes(4)
    ask(prefetch, layers)
    ask(prefetch, layers[:1])
    assert len(lane.on_the_way) == 2
    change(layers[1])
    lane.take_log()
    ask(prefetch, layers[1:])
    assert direct(lane) == 1


def test_layers_that_only_some_passes_use() -> None:
    """As Chroma's approximator, which runs once for the two passes of a step."""
    lane, prefetch, layers = fakes(7)
    ask(prefetch, layers)
    lane.take_log()
    for _ in range(2):
        ask(prefetch, layers[3:])
        assert direct(lane) == 1
        ask(prefetch, layers)
        assert direct(lane) == 1
    ask(prefetch, layers[:4] + layers[5:])  # a layer is skipped
    assert direct(lane) == 1
    assert not lane.on_the_way


def test_layers_that_are_new_to_the_order() -> None:
    lane, prefetch, layers = fakes(6)
    ask(prefetch, layers[1:3] + layers[4:])
    prefetch.clear()
    ask(prefetch, layers)
    lane.take_log()
    ask(prefetch, layers)
    assert direct(lane) == 1
    assert not lane.on_the_way


def test_another_order_is_learned() -> None:
    lane, prefetch, layers = fakes(6, 6 * BYTES)
    ask(prefetch, layers)
    other = [layers[i] for i in (0, 3, 1, 5, 4, 2)]
    for _ in range(4):
        lane.take_log()
        ask(prefetch, other)
    assert direct(lane) <= 1


def test_layers_that_came_to_the_device_are_not_copied() -> None:
    lane, prefetch, layers = fakes(3)
    ask(prefetch, layers)
    layers[1].to("meta")  # a device that is not the CPU
    lane.take_log()
    ask(prefetch, [layers[0], layers[2]])
    assert lane.take_log() == ["reserve", "send", "start", "wait"]


def test_clear_leaves_nothing_and_keeps_the_order() -> None:
    lane, prefetch, layers = fakes(4)
    ask(prefetch, layers)
    ask(prefetch, layers[:2])  # interrupted
    (copy, _), *_ = lane.on_the_way.values()
    held = weakref.ref(copy.sent.data)
    prefetch.clear()
    del copy
    gc.collect()
    assert held() is None and not lane.on_the_way
    lane.take_log()
    ask(prefetch, layers)
    assert direct(lane) == 1


def test_another_device_starts_afresh() -> None:
    lane, prefetch, layers = fakes(4)
    ask(prefetch, layers)
    ask(prefetch, layers[:2])
    assert lane.on_the_way
    with prefetch.fetch(layers[2], OTHER_GPU):
        assert lane.take_log()[-1] == "send"
    ask(prefetch, layers, OTHER_GPU)


def test_layers_are_not_kept_alive() -> None:
    _, prefetch, layers = fakes(3)
    ask(prefetch, layers)
    gone = weakref.ref(layers.pop(1))
    gc.collect()
    assert gone() is None
    ask(prefetch, layers)


def test_without_a_gpu_nothing_is_copied() -> None:
    cpu = torch.device("cpu")
    assert cuda_lane(cpu) is None
    _, _, layers = fakes(2)
    prefetch = Prefetch()
    for _ in range(2):
        for layer in layers:
            with prefetch.fetch(layer, cpu) as weight:
                assert weight.data.data_ptr() == layer.weight.data_ptr()


ACTIONS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 4)),
    st.tuples(st.just("pass"), st.permutations(range(5))),
    st.tuples(st.sampled_from([rewrite, rescale, replace_data, replace_parameter]),
              st.integers(0, 4)),
    st.tuples(st.just("clear"), st.none()),
    st.tuples(st.just("full"), st.booleans()),
    st.tuples(st.just("device"), st.sampled_from([GPU, OTHER_GPU])),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, max_size=40), st.integers(0, 4))
def test_any_course_of_events_gives_the_bytes_of_now(actions, matrices) -> None:
    lane, prefetch, layers = fakes(5, matrices * BYTES)
    device = GPU
    for action, value in actions:
        if action == "ask":
            ask(prefetch, [layers[value]], device)
        elif action == "pass":
            ask(prefetch, layers, device)
            ask(prefetch, [layers[i] for i in value], device)
        elif action == "clear":
            prefetch.clear()
        elif action == "full":
            lane.full = value
        elif action == "device":
            device = value
        else:
            action(layers[value])
    prefetch.clear()
    assert not lane.on_the_way


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("kind", [INT8, E4M3])
def test_streamed_products_equal_resident_ones_on_a_gpu(kind, pinned) -> None:
    torch.manual_seed(0)
    size, count, device = 1024, 12, torch.device("cuda", 0)
    layers, resident = [], []
    for _ in range(count):
        data = torch.randint(0, 120, (size, size), dtype=kind.dtype)
        scale = torch.rand(size, 1) / size if kind is INT8 else torch.tensor(1e-3)
        if pinned:
            data = data.pin_memory()
        layers.append(StoredWeight(QuantTensor(kind, data, scale, (size, size))))
        resident.append(layers[-1].stored.to(device))
    x = torch.randn(4096, size, device=device, dtype=torch.bfloat16)
    prefetch = Prefetch(budget=3 * size * size)
    expected = x
    for weight in resident:
        expected = linear(expected, weight, None).sin()
    torch.cuda.synchronize()
    for _ in range(10):
        y = x
        for layer in layers:
            with prefetch.fetch(layer, device) as weight:
                y = linear(y, weight, None)
            y = y.sin()
        assert torch.equal(y, expected)
    del weight, y
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    prefetch.clear()
    assert torch.cuda.memory_allocated() == before, "copies were left over"
