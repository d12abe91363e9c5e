"""Functions of tensors compiled into one pass over memory, where a compiler is at hand."""

import importlib.util
import logging
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
log = logging.getLogger("chroma")

# Writes into its last arguments.
Function = Callable[..., None]


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` has what it needs: triton for CUDA, a C++ compiler for a CPU.

    For CPUs under Linux alone: elsewhere a compiler may be there by name and ask to be installed.
    """
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return False
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    if device.type != "cpu" or platform.system() != "Linux":
        return False
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    return any(shutil.which(name) for name in compilers if name)


class Fused:
    """Runs functions in their compiled forms, once these were seen to give the same bits.

    A compiled form is made at a function's first call for a device, dtypes and widths, which takes
    seconds; the plain form stays where that fails, later too, or where the results differ.
    """

    def __init__(self) -> None:
        self._forms: dict[Hashable, Function | None] = {}

    def run(
        self,
        plain: Callable[[], Any],
        function: Function,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
    ) -> None:
        """Write `outputs`: by `function(*inputs, *outputs)`, compiled, or else by `plain()`.

        The first axis of every tensor may have any length.
        """
        if torch.compiler.is_compiling():  # a compiler is at work on the caller already
            function(*inputs, *outputs)
            return
        tensors = (*inputs, *outputs)
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        key = (function, outputs[0].device, modes, *map(_kind, tensors))
        if key not in self._forms:
            plain()
            self._forms[key] = _compile(function, inputs, outputs)
            return
        form = self._forms[key]
        if form is None or not _runs(form, function.__name__, tensors):
            self._forms[key] = None
            plain()


def _kind(tensor: Tensor | None) -> Hashable:
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape[1:], tensor.is_inference()


def _runs(form: Function, name: str, tensors: Sequence[Tensor | None]) -> bool:
    """Call a compiled form; False where its compiler, which may have to work again, fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's remarks on mixed precision
            form(*tensors)
    except Exception as error:  # a compiler's can be of any kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.info("%s runs without a compiler: %s", name, reason)
        return False
    return True


def _compile(
    function: Function, inputs: Sequence[Tensor | None], expected: Sequence[Tensor]
) -> Function | None:
    """The compiled function if it gives what is expected of these inputs, bit for bit."""
    if not can_compile(expected[0].device):
        return None
    log.debug("Compiling %s for %s.", function.__name__, expected[0].device)
    form = torch.compile(function, fullgraph=True)
    try:
        with torch.inference_mode(expected[0].is_inference()):  # or it would be compiled once more
            found = [torch.empty_like(tensor) for tensor in expected]
    except torch.OutOfMemoryError:
        return None
    for tensor in (*inputs, *found):
        if tensor is not None and tensor.ndim:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    if not _runs(form, function.__name__, (*inputs, *found)):
        return None
    if not all(map(_same_bits, found, expected)):
        log.info("%s runs without a compiler: its results differ", function.__name__)
        return None
    return form


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(_INTEGER[a.element_size()]), b.view(_INTEGER[b.element_size()]))
