"""Memory that runs out inside a node: told in one line where ComfyUI does not handle it itself.

ComfyUI knows an accelerator's own error type: its VAE then decodes in tiles, and its executor
unloads all models and says so. These errors pass. It does not know those of the computer's memory.
"""

from functools import wraps

import comfy.model_management as management
from comfy_api.latest import io

from ..chroma.out_of_memory import is_out_of_memory, telling_out_of_memory


def handled_by_comfyui(error: BaseException) -> bool:
    """Whether ComfyUI takes an error for memory that ran out, and acts on it."""
    known = getattr(management, "is_oom", None)
    if known is not None:
        return known(error)
    # Where a torch has no such type, ComfyUI stores Exception there, which says nothing.
    kind = management.OOM_EXCEPTION
    return kind is not Exception and isinstance(error, kind)


def tells_out_of_memory(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, whose `execute` raises our OutOfMemoryError for what ComfyUI would not handle."""
    run = node.execute.__func__  # pyright: ignore[reportFunctionMemberAccess]

    @wraps(run)
    def execute(cls, *args, **kwargs) -> io.NodeOutput:
        try:
            return run(cls, *args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if handled_by_comfyui(error) or not is_out_of_memory(error):
                raise
            with telling_out_of_memory():
                raise

    node.execute = classmethod(execute)
    return node
