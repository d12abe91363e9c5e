"""Several adapters beside one weight that stays as it is stored, as few products as possible.

y = left (W right x) + sum of terms x: exact for every kind of adapter, in fp32; rounded once to the
dtype of compute. Shapes: x (..., K), y (..., N), W (N, K).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters.base import Placement, Weight, changed
from .adapters.held import Held
from .adapters.steps import (
    Dense,
    Pair,
    Rows,
    Scale,
    Step,
    Term,
    Transform,
    Within,
    pad_rows,
)

# Up to so many columns, one product with zeros for the other rows costs less than several.
PADDED_RANK = 64

Product = Callable[[Tensor], Tensor]
Placed = tuple[Term, Rows | None]


@dataclass(frozen=True, eq=False)
class Up(Held):
    """One product into some rows of y: matrix (n, r), of the columns from `start` of down x."""

    matrix: Tensor
    start: int
    rows: Rows | None

    def add_to(self, y: Tensor, hidden: Tensor) -> None:
        """y (T, N) += matrix hidden, hidden (T, r of all)."""
        part = hidden[:, self.start : self.start + self.matrix.shape[1]]
        _part(y, self.rows).addmm_(part, self.matrix.T)


@dataclass(frozen=True, eq=False)
class LowRankSum(Held):
    """All low-rank terms: one product down (r, K), then one for each distinct part of y."""

    down: Tensor
    ups: tuple[Up, ...]

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """y (T, N) += up down x, x (T, K)."""
        hidden = F.linear(x, self.down)
        for up in self.ups:
            up.add_to(y, hidden)


@dataclass(frozen=True, eq=False)
class Other(Held):
    """A term of full rank at some rows of y."""

    term: Term
    rows: Rows | None

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """y (T, N) += D x, x (T, K)."""
        part = _part(y, self.rows)
        if isinstance(self.term, Dense):
            part.addmm_(x, self.term.values.T)
        else:
            part.add_(self.term.product(x))


@dataclass(frozen=True, eq=False)
class Affine(Held):
    """What stacked adapters make of a weight's product; `left`, `right` act in their order."""

    left: tuple[Transform, ...] = ()
    right: tuple[Transform, ...] = ()
    low_rank: LowRankSum | None = None
    others: tuple[Other, ...] = ()

    @property
    def additive(self) -> bool:
        """Whether W's own product stays as it is, so that it may contain the bias."""
        return not (self.left or self.right)

    @property
    def dense(self) -> bool:
        """Whether a term is a whole matrix: as much memory and time as a second weight."""
        return any(isinstance(other.term, Dense) for other in self.others)

    def apply(self, x: Tensor, product: Product, bias: Tensor | None = None) -> Tensor:
        """(..., K) -> (..., N) in x's dtype, which is that of the factors, as is the device.

        `product(x)` is W x in a tensor of its own, which this writes to: without the bias, unless
        `additive`. `bias` (N,) is added last.
        """
        inner = x
        for transform in self.right:
            inner = transform(inner)
        y = product(inner)
        for transform in self.left:
            y = transform(y)
        shape, y, x = y.shape, y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        if self.low_rank is not None:
            self.low_rank.add_to(y, x)
        for other in self.others:
            other.add_to(y, x)
        if bias is not None:
            y += bias
        return y.view(shape)


def compose(
    placements: Sequence[Placement],
    shape: Sequence[int],
    weight: Weight,
    device: torch.device | str | None = None,
) -> Affine:
    """The closed form, fp32, of adapters applied in their order to a weight of this shape.

    `weight()` is W's values, fp32; it is called once at most, and only where a kind needs them
    (DoRA, GLoRA). The adapters are moved to `device` first, where one is given, else they must be
    where `weight()` is.
    """
    moved = [(a if device is None else a.to(device), s, rows) for a, s, rows in placements if s]
    current = _Current(weight, device)
    left: tuple[Transform, ...] = ()
    right: tuple[Transform, ...] = ()
    terms: list[Placed] = []
    for placement in moved:
        step = _step(placement, current)
        rows = placement[2]
        for transform in step.left:
            terms = [_after(term, transform, rows, shape[0]) for term in terms]
            left = _appended(left, _whole(transform, rows, shape[0]))
        for transform in reversed(step.right):
            terms = [(term.before(transform), part) for term, part in terms]
            right = (transform, *right)
        terms += [(term, rows) for term in step.terms]
        current.done.append(placement)
    pairs = [(term, rows) for term, rows in terms if isinstance(term, Pair)]
    others = tuple(Other(term, rows) for term, rows in terms if not isinstance(term, Pair))
    return Affine(left, right, _low_rank(pairs, shape[0]), others)


class _Current:
    """The weight after the adapters done so far; decoded once, and only if somebody asks."""

    def __init__(self, weight: Weight, device: torch.device | str | None) -> None:
        self._weight, self._device = weight, device
        self._value: Tensor | None = None
        self.done: list[Placement] = []

    def __call__(self) -> Tensor:
        if self._value is None:
            self._value = self._weight().to(self._device, torch.float32)
        self._value, self.done = changed(self._value, self.done), []
        return self._value


def _step(placement: Placement, current: _Current) -> Step:
    adapter, strength, rows = placement
    if rows is None:
        return adapter.step(current, strength)
    part = slice(*rows)
    step = adapter.step(lambda: current()[part], strength)
    # The rows of W share one input: a change of it for some of them is a matrix.
    return adapter.dense_step(lambda: current()[part], strength) if step.right else step


def _whole(transform: Transform, rows: Rows | None, size: int) -> Transform:
    """A transform of some rows as one of all `size` of them."""
    if rows is None:
        return transform
    if isinstance(transform, Scale):
        return Scale(pad_rows(transform.excess[:, None], rows, size).flatten())
    return Within(transform, rows)


def _appended(transforms: tuple[Transform, ...], transform: Transform) -> tuple[Transform, ...]:
    """One more at the end; neighbouring scales become one."""
    last = transforms[-1] if transforms else None
    if isinstance(last, Scale) and isinstance(transform, Scale):
        product = last.excess + transform.excess + last.excess * transform.excess
        return (*transforms[:-1], Scale(product))
    return (*transforms, transform)


def _after(placed: Placed, transform: Transform, rows: Rows | None, size: int) -> Placed:
    """A term, then a transform of some rows of y."""
    term, part = placed
    if part == rows:
        return term.after(transform), part
    if part is not None and rows is not None and (part[1] <= rows[0] or rows[1] <= part[0]):
        return placed
    whole = term if part is None else term.padded(part, size)
    return whole.after(_whole(transform, rows, size)), None


def _low_rank(pairs: list[tuple[Pair, Rows | None]], size: int) -> LowRankSum | None:
    """All pairs behind one product with their downs, those of the same rows next to each other."""
    if not pairs:
        return None
    if (
        sum(pair.down.shape[0] for pair, _ in pairs) <= PADDED_RANK
        and len({r for _, r in pairs}) > 1
    ):
        pairs = [(p if r is None else p.padded(r, size), None) for p, r in pairs]
    groups: dict[Rows | None, list[Pair]] = {}
    for pair, rows in pairs:
        groups.setdefault(rows, []).append(_balanced(pair))
    ups, downs, start = [], [], 0
    for rows, group in groups.items():
        up = torch.cat([pair.up for pair in group], dim=1)
        ups.append(Up(up, start, rows))
        downs += [pair.down for pair in group]
        start += up.shape[1]
    return LowRankSum(torch.cat(downs), tuple(ups))


def _balanced(pair: Pair) -> Pair:
    """The same product with factors of like size: by a power of two, so that no bit changes.

    With strength, alpha and rank all in `up`, its values would fall below fp16's normal numbers.
    """
    ratio = torch.log2(pair.up.abs().amax() / pair.down.abs().amax())
    power = torch.exp2(torch.round(ratio / 2).nan_to_num(0.0, 0.0, 0.0))
    return Pair(pair.down * power, pair.up / power)


def _part(y: Tensor, rows: Rows | None) -> Tensor:
    return y if rows is None else y[:, rows[0] : rows[1]]
