"""ComfyUI's API-format workflows without ComfyUI, and back into the interface's format."""

from .graph import check, read_prompt
from .layout import to_interface
from .run import REGISTRY, apply_overrides, execute, run_workflow
from .values import Context

__all__ = [
    "REGISTRY",
    "Context",
    "apply_overrides",
    "check",
    "execute",
    "read_prompt",
    "run_workflow",
    "to_interface",
]
