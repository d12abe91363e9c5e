"""Learned rounding: fp8 codes chosen by what they do to the layer's output.

Each weight goes to one of the two codes around it. Columns are rounded one after another, each
making good what the ones before it did to the output (GPTQ, Frantar et al. 2022, arXiv:2210.17323,
in the form of Chen et al. 2025, arXiv:2507.18553: Babai's nearest plane with the Cholesky factor
of H), and then revisited one at a time while all others stand (coordinate descent).

K columns are dealt with in groups, N rows in chunks. Inside, matrices are transposed (columns
first), so that one column of many rows lies together in memory. Values are in units of the scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ChromaError
from .floats import decode_e4m3
from .gram import Gram
from .round_fp8 import quantise_fp8, to_e4m3

# Columns whose H is held at once, columns that are worked on together, and the largest fp32 matrix
# that is made of some of the rows: 16 MB.
_GROUP = 4096
_BLOCK = 64
_CHUNK_SIZE = 1 << 22
_SWEEPS = 3
# Added to H's diagonal, in means of it: the inputs of other pictures vary differently. Of 0.01 to
# 0.3, this gives the lowest error on inputs that were not calibrated on, and disturbs the weights
# little (by mean square 1.3 to 1.4 times what rounding to nearest does).
_DAMPING = 0.1
# A float format repeats itself at twice the scale, so the scales to try lie within one octave.
_SCALES = 8
_PROBE_ROWS = 256


@dataclass(frozen=True)
class Rounded:
    """Codes uint8 (N, K), scale fp32 (), and the squared output error on the calibration inputs.

    `nearest_error` is that of rounding to nearest at absmax / 448.
    """

    codes: Tensor
    scale: Tensor
    output_error: float
    nearest_error: float


def quantise_fp8_learned(
    weight: Tensor, gram: Gram | None, *, device: torch.device | str = "cpu"
) -> Rounded:
    """Codes whose output error on the calibration inputs is low, and never above nearest's.

    weight: float matrix (N, K). Without a gram, H is the identity: the best rounding is then to
    nearest, and only the scale is chosen. Raises ChromaError for NaN or infinity in the weight.
    """
    weight = weight.to(device)
    gram = None if gram is None else gram.to(device)
    nearest, base = quantise_fp8(weight)
    nearest_error = output_error(weight, nearest, base, gram)
    scale = _best_scale(weight, base, gram)
    codes = quantise_fp8(weight, scale)[0] if gram is None else _round(weight, scale, gram)
    error = output_error(weight, codes, scale, gram)
    if error > nearest_error:
        codes, scale, error = nearest, base, nearest_error
    return Rounded(codes.cpu(), scale.cpu(), error, nearest_error)


def output_error(weight: Tensor, codes: Tensor, scale: Tensor, gram: Gram | None) -> float:
    """tr(E H E^T), E the error of the codes; H is the identity without a gram."""
    total = 0.0
    for part in _chunks(*weight.shape):
        error = weight[part].float() - decode_e4m3(codes[part], scale)
        rows = error.square().sum(1) if gram is None else gram.output_error(error)
        total += float(rows.double().sum())
    return total


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows, so that a matrix of one and so many columns is small."""
    step = max(1, _CHUNK_SIZE // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _best_scale(weight: Tensor, base: Tensor, gram: Gram | None) -> Tensor:
    """Of some scales, the one at which a sample of the rows loses least by rounding to nearest.

    They are numbers that bf16 holds exactly: some programs multiply by the scale in bf16.
    """
    step = max(1, weight.shape[0] // _PROBE_ROWS)
    sample = weight[::step]
    best, least = base, float("inf")
    for k in range(_SCALES):
        scale = _up_to_bf16(base * 2 ** (k / _SCALES))
        error = output_error(sample, quantise_fp8(sample, scale)[0], scale, gram)
        if error < least:
            best, least = scale, error
    return best


def _up_to_bf16(value: Tensor) -> Tensor:
    """The next positive fp32 number that bf16 holds: upwards, so that no weight is cut off."""
    return ((value.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _round(weight: Tensor, scale: Tensor, gram: Gram) -> Tensor:
    """Group by group, the columns with the largest inputs first: later ones make good for them."""
    columns = weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    power = gram.diagonal()
    damping = power.mean().clamp(min=torch.finfo(torch.float32).tiny) * _DAMPING
    order = power.argsort(descending=True, stable=True)
    groups = order.tensor_split(-(-columns // _GROUP))
    for number, group in enumerate(groups):
        # The nearest plane method starts at the end.
        group = group.flip(0)
        hessian = gram.block(group, group)
        hessian.diagonal().add_(damping)
        factor = _factorise(hessian)
        outside = _outside(weight, codes, scale, gram, groups[:number], group)
        for part in _chunks(weight.shape[0], len(group)):
            target = (weight[part][:, group].float() / scale).T.contiguous()
            pull = None if outside is None else outside[part].T.contiguous()
            low, high = _neighbours(target)
            values = _nearest_plane(target, low, high, factor, pull)
            for _ in range(_SWEEPS):
                _descend(values, target, low, high, hessian, pull)
            codes[part, group] = to_e4m3(values.T.contiguous())
    return codes


def _outside(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    gram: Gram,
    done: tuple[Tensor, ...] | list[Tensor],
    group: Tensor,
) -> Tensor | None:
    """What the errors of the groups done so far ask of this one: E_done H_done,group, (N, G)."""
    if not done:
        return None
    total = torch.zeros(weight.shape[0], len(group), device=weight.device)
    for other in done:
        block = gram.block(other, group)
        for part in _chunks(weight.shape[0], len(other)):
            values = decode_e4m3(codes[part][:, other], None)
            total[part].addmm_(weight[part][:, other].float() / scale - values, block)
    return total


def _factorise(hessian: Tensor) -> Tensor:
    """L with L L^T = H. Raises ChromaError for calibration data that no inputs can have."""
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        raise ChromaError(
            "calibration data is not X^T X of any inputs; expected a positive semi-definite matrix "
            "or the inputs themselves, so collect it again in fp32"
        )
    return factor


def _neighbours(target: Tensor) -> tuple[Tensor, Tensor]:
    """The e4m3 values just below and above, both equal to the target where it is one itself."""
    code = to_e4m3(target)
    nearest = decode_e4m3(code, None)
    # Codes count magnitudes upwards; the sign bit stays. 0 rounded down to from -x is -0.
    away = target.abs() > nearest.abs()
    magnitude = (code & 0x7F).to(torch.int16)
    stepped = (magnitude + torch.where(away, 1, -1)).clamp_(0, 0x7E).to(torch.uint8)
    other = decode_e4m3(stepped | (code & 0x80), None)
    other = torch.where(target == nearest, nearest, other)
    return torch.minimum(nearest, other), torch.maximum(nearest, other)


def _nearest_plane(
    target: Tensor, low: Tensor, high: Tensor, factor: Tensor, pull: Tensor | None
) -> Tensor:
    """Rounded values (G, R) of the target (G, R), from the last column to the first.

    With E = target - values, the output error is |E^T L + pull^T L^-T|^2 but for a constant: column
    j of it depends on the errors from j on alone, so each is rounded to what the later ones leave.
    """
    count = target.shape[0]
    values, error = torch.empty_like(target), torch.empty_like(target)
    start = None if pull is None else torch.linalg.solve_triangular(factor, pull, upper=False)
    for end in range(count, 0, -_BLOCK):
        begin = max(0, end - _BLOCK)
        left = factor[end:, begin:end].T @ error[end:]
        if start is not None:
            left += start[begin:end]
        for j in range(end - 1, begin - 1, -1):
            wanted = target[j] + left[j - begin] / factor[j, j]
            values[j] = torch.where(wanted * 2 > low[j] + high[j], high[j], low[j])
            torch.sub(target[j], values[j], out=error[j])
            left[: j - begin].addr_(factor[j, begin:j], error[j])
    return values


def _descend(
    values: Tensor,
    target: Tensor,
    low: Tensor,
    high: Tensor,
    hessian: Tensor,
    pull: Tensor | None,
) -> None:
    """One sweep: each column (R,) of `values` moves to the better neighbour, the others fixed."""
    count = values.shape[0]
    error = target - values
    for begin in range(0, count, _BLOCK):
        end = min(begin + _BLOCK, count)
        # Half the gradient of the output error with respect to E, kept up to date in the block.
        slope = hessian[begin:end] @ error
        if pull is not None:
            slope += pull[begin:end]
        for j in range(begin, end):
            wanted = values[j] + slope[j - begin] / hessian[j, j]
            chosen = torch.where(wanted * 2 > low[j] + high[j], high[j], low[j])
            change = values[j] - chosen
            values[j] = chosen
            error[j] += change
            slope[j - begin + 1 :].addr_(hessian[j + 1 : end, j], change)
