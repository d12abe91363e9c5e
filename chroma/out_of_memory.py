"""What to tell, and what to let go of, when memory runs out."""

import gc
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import OutOfMemoryError

# What torch's allocators and math libraries say, where they have no error type of their own.
_SAID = re.compile(
    r"not enough memory|out of memory|can't allocate memory|cannot allocate memory|ALLOC_FAILED",
    re.IGNORECASE,
)
_ASKED = re.compile(r"tried to allocate ([\d.]+ ?(?:bytes|[KMGT]i?B))", re.IGNORECASE)
REMEDY = (
    "try a smaller format of the model (Q8_0, or fp8: chroma-nodes quantize), fewer pixels, fewer "
    "pictures at a time, or VAE Decode (Tiled)"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, the computer's or an accelerator's, ran out.

    torch's own types of it are RuntimeErrors that say so in their text.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None


def describe(error: BaseException) -> str:
    """One line: how much was asked for, if that is known, and what to try."""
    asked = _ASKED.search(str(error))
    return f"out of memory{f' (asked for {asked[1]} more)' if asked else ''}; {REMEDY}"


@contextmanager
def telling_out_of_memory() -> Iterator[None]:
    """Where memory runs out inside, free what was in use and raise our OutOfMemoryError instead."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        told = OutOfMemoryError(describe(error))
        # The frames that failed hold the tensors that filled the memory.
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
    else:
        return
    free_caches()
    raise told from None


def free_caches() -> None:
    """Give unused memory back to the system and to other programs on the accelerator."""
    gc.collect()
    for kind in ("cuda", "xpu", "mps"):
        backend = getattr(torch, kind, None)
        available = getattr(backend, "is_available", None)
        if available is not None and available():
            backend.empty_cache()  # pyright: ignore[reportOptionalMemberAccess]
