"""Memory that runs out in our nodes and models: told with what to try.

ComfyUI knows an accelerator's own error type: its VAE then decodes in tiles, and its executor
unloads all models and says so. These errors pass, with our advice behind their text. It does not
know those of the computer's memory, which become one line of ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import comfy.model_management as management
from comfy_api.latest import io

from ..chroma.out_of_memory import REMEDY, telling_out_of_memory


def handled_by_comfyui(error: BaseException) -> bool:
    """Whether ComfyUI takes an error for memory that ran out, and acts on it."""
    known = getattr(management, "is_oom", None)
    if known is not None:
        return known(error)
    # Where a torch has no such type, ComfyUI stores Exception there, which says nothing.
    kind = management.OOM_EXCEPTION
    return kind is not Exception and isinstance(error, kind)


@contextmanager
def advising() -> Iterator[None]:
    """Where memory runs out inside, tell what to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if handled_by_comfyui(error):
            if REMEDY not in str(error):
                error.args = (f"{error}; {REMEDY}",)
            raise
        with telling_out_of_memory():
            raise


def advise_in_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A wrapper of one sampling run, whichever node runs it."""
    with advising():
        return executor(*args, **kwargs)


def tells_out_of_memory(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, whose `execute` tells what to try where memory runs out."""
    run = node.execute.__func__  # pyright: ignore[reportFunctionMemberAccess]

    @wraps(run)
    def execute(cls, *args, **kwargs) -> io.NodeOutput:
        with advising():
            return run(cls, *args, **kwargs)

    node.execute = classmethod(execute)
    return node
