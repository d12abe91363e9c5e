"""ComfyUI's frontend in a Chromium: what the browser tests and docs/node_pictures.py share."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comfy_queue import Server

CHECKOUT = os.environ.get("COMFYUI_PATH")
# CHROMIUM names another one than PATH's.
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MILLISECONDS = 120_000
TEMPLATES = re.compile("^Tem\u00ad?plates$")  # the sidebar's button, with or without a hyphen
BLANK = "Comfy.NewBlankWorkflow"
NODES = "window.app.graph._nodes"
READY = "() => window.app?.graph && window.app.extensionManager?.command?.commands?.length"


def make_server(base: Path, **settings: Any) -> Server:
    """A server of CHECKOUT, not started yet, whose user has these settings of the frontend."""
    server = Server(Path(CHECKOUT or ""), base)
    file = base / "user" / "default" / "comfy.settings.json"
    file.parent.mkdir()
    # The gallery opens by itself for a new user.
    file.write_text(json.dumps({"Comfy.TutorialCompleted": True, **settings}))
    return server


@contextmanager
def open_browser() -> Iterator[Any]:
    """playwright's browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as runner:
        # Containers have no user namespaces for the sandbox and little shared memory.
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


def open_page(browser: Any, port: int, width: int = 1600, height: int = 1000) -> Any:
    """The frontend's page once it can be used."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(MILLISECONDS)
    page.goto(f"http://127.0.0.1:{port}")
    page.wait_for_function(READY)
    page.get_by_text(TEMPLATES).first.wait_for()
    return page


def execute(page: Any, command: str) -> None:
    """Run a command of the frontend by its name."""
    page.evaluate("name => window.app.extensionManager.command.execute(name)", command)


def clear(page: Any) -> None:
    """An empty graph, in a tab of its own."""
    execute(page, BLANK)
    page.wait_for_function(f"() => {NODES}.length === 0")
