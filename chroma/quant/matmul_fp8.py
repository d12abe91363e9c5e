"""Products in 8-bit floats on devices that multiply them: e4m3 weights times e4m3 tokens.

Shapes: M tokens, N output features, K input features. Format: Micikevicius et al. 2022
(arXiv:2209.05433). The products are summed in fp32.
"""

import functools

import torch
from torch import Tensor

_LARGEST = 448.0
_MULTIPLE = 16


def has_fp8_matmul(device: torch.device) -> bool:
    """Whether the device has fp8 tensor cores that torch can use: NVIDIA from compute 8.9 on."""
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(torch, "_scaled_mm"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9) and _runs(device, by_row=False)


def has_row_scales(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` takes one scale per row: some builds for compute 9.0, and CPUs."""
    if device.type == "cpu":
        return True
    return torch.cuda.get_device_capability(device) >= (9, 0) and _runs(device, by_row=True)


@functools.cache
def _runs(device: torch.device, by_row: bool) -> bool:
    """Whether this build of torch has the kernel for this device, by trying."""
    x = torch.zeros(_MULTIPLE, _MULTIPLE, dtype=torch.float8_e4m3fn, device=device)
    one = torch.ones((_MULTIPLE, 1) if by_row else (), device=device)
    try:
        _scaled_mm(x, x.t(), one, one.t() if by_row else one, torch.bfloat16)
    except RuntimeError:
        return False
    return True


def takes_fp8(shape: tuple[int, int]) -> bool:
    """Whether a weight (N, K) has the multiples of 16 that fp8 tensor cores need."""
    return shape[0] % _MULTIPLE == 0 and shape[1] % _MULTIPLE == 0


def quantise_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale rounded to e4m3 and limited to its range, in new memory; scale fp32 () or (M, 1).

    Limited first: the cast makes NaN of everything beyond 464.
    """
    values = x.to(torch.float32, copy=True).div_(scale)
    return values.clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: float | None = None,
) -> Tensor:
    """x (..., K) times e4m3 bytes uint8 (N, K) with scale fp32 () or (N, 1), -> (..., N).

    x is quantised with `input_scale` where it is given, else with its own absmax / 448: per token
    where the device takes that, over all of x elsewhere. Not differentiable: x must not need a
    gradient. Raises ValueError if N or K is not a multiple of 16.
    """
    if not takes_fp8((weight.shape[0], weight.shape[1])):
        raise ValueError(f"fp8 products need multiples of 16, not a weight {tuple(weight.shape)}")
    y = _product(x.reshape(-1, x.shape[-1]), weight, scale, input_scale).to(x.dtype)
    y = y if bias is None else y.add_(bias.to(y.dtype))
    return y.view(*x.shape[:-1], len(weight))


def _product(x: Tensor, weight: Tensor, scale: Tensor, input_scale: float | None) -> Tensor:
    """(M, K) by (N, K) -> (M, N): in bf16 by rows of scales, else in x's dtype or fp32."""
    rows, features = len(x), len(weight)
    if not rows:
        return x.new_empty(0, features)
    one_scale = scale.numel() == 1
    by_row = has_row_scales(x.device) and not (one_scale and input_scale is not None)
    x_scale = _input_scale(x, input_scale, by_row)
    values, columns = quantise_e4m3(x, x_scale), weight.view(torch.float8_e4m3fn).t()
    if by_row:
        x_scale = x_scale.expand(rows, 1).contiguous()
        return _scaled_mm(values, columns, x_scale, scale.expand(features, 1).t(), torch.bfloat16)
    if one_scale:
        return _scaled_mm(values, columns, x_scale, scale.reshape(()), x.dtype)
    # Some rows' scales may overflow fp16 or lose what bf16 rounds: they are applied in fp32.
    y = _scaled_mm(values, columns, x_scale, torch.ones_like(x_scale), torch.float32)
    return y.mul_(scale.flatten())


def _scaled_mm(
    x: Tensor, columns: Tensor, x_scale: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x, columns, scale_a=x_scale, scale_b=scale.contiguous(), out_dtype=dtype
    )


def _input_scale(x: Tensor, given: float | None, by_row: bool) -> Tensor:
    """fp32 () or (M, 1)."""
    if given is not None:
        return torch.full((), given, dtype=torch.float32, device=x.device)
    largest = x.abs().amax(-1, keepdim=True) if by_row else x.abs().amax()
    scale = largest.float() / _LARGEST
    return torch.where(scale > 0, scale, 1.0)
