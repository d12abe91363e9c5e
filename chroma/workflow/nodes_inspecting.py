"""The node that tells what a model file is, without ComfyUI."""

import logging

from ..checkpoint.inspect import describe, inspect_file
from ..errors import WorkflowError
from ..tiny import files as small
from .graph import check_name
from .schema import Input, NodeType
from .values import Context

FOLDERS = ("diffusion_models", "text_encoders", "vae", "loras")
DEFAULT = f"diffusion_models/{small.LABEL}"
log = logging.getLogger("chroma")


def inspect(context: Context, file_name: str):
    """The report on a file named as <folder>/<file>."""
    check_name("file_name", file_name)
    folder, _, name = file_name.partition("/")
    if folder not in FOLDERS or not name:
        raise WorkflowError(
            f"{file_name!r} names no model file; expected {', '.join(FOLDERS)}, a slash and a name"
        )
    told = describe(inspect_file(context.locate(folder, name)))
    log.info("%s", "; ".join(line.strip() for line in told))
    return ("\n".join(told),)


NODES = (
    NodeType(
        "ChromaInspect",
        (Input("file_name", "COMBO", DEFAULT),),
        (("report", "STRING"),),
        inspect,
        is_output=True,
    ),
)
