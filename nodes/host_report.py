"""What a node tells about its work: in the log, in the node on the page, and on its bar."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_management
import comfy.utils
from comfy_api.latest import ui

log = logging.getLogger("chroma")


@dataclass
class Notes:
    """Lines about a node's work; a warning where something was left out."""

    lines: list[str] = field(default_factory=list)
    is_warning: bool = False

    def add(self, line: str, is_warning: bool = False) -> None:
        self.lines.append(line)
        self.is_warning |= is_warning

    def tell(self, node_id: str | None) -> ui.PreviewText:
        """Log them and write them into the node, where there is a page; returns the node's ui."""
        text = "\n".join(self.lines)
        log.log(logging.WARNING if self.is_warning else logging.INFO, "%s", text)
        if node_id:
            from server import PromptServer

            PromptServer.instance.send_progress_text(text, node_id)
        return ui.PreviewText(text)


def progress_bar() -> Callable[[int, int, str], None]:
    """(done, of how many, what) onto the running node's bar; raises there if it is cancelled."""
    bar = comfy.utils.ProgressBar(1)

    def progress(done: int, total: int, _: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return progress
