"""ComfyUI's real frontend in a real browser, used as a person uses it.

Screenshots of every step are kept in output/browser/<ComfyUI's version>. Needs a checkout of
ComfyUI (COMFYUI_PATH), playwright, and a Chromium (CHROMIUM names another one than PATH's).
"""

import base64
import json
import re
import shutil
from pathlib import Path

import pytest
from browser_page import (
    CHECKOUT,
    CHROMIUM,
    MILLISECONDS,
    NODES,
    TEMPLATES,
    clear,
    make_server,
    open_browser,
    open_page,
)
from chroma_nodes.chroma.workflow import run_workflow
from PIL import Image
from workflow_files import INPUTS, ROOT, UI, few_steps, load, on_small_model

if not CHECKOUT:
    pytest.skip("COMFYUI_PATH is not set: no real ComfyUI to test against", allow_module_level=True)
if not CHROMIUM:
    pytest.skip("there is no chromium on PATH: no browser to test with", allow_module_level=True)
pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: no browser to test with"
)

PACK = "ComfyUI-Chroma"
SMALL = "Chroma Nodes - Small model (no download)"
PROMPT = "a flat emoji of a frog on a white background"
NEAR = 0.8  # the zoom at which nodes show their text
HELP = ROOT / "nodes" / "web" / "docs" / "ChromaTextEncode.md"

# [x, y of the middle of a node's title on the page, zoom]
PLACE = f"""title => {{
    const canvas = window.app.canvas, {{scale, offset}} = canvas.ds;
    const node = {NODES}.find(n => n.title === title);
    const box = canvas.canvas.getBoundingClientRect();
    return [
        box.x + (node.pos[0] + node.size[0] / 2 + offset[0]) * scale,
        box.y + (node.pos[1] - 14 + offset[1]) * scale, scale,
    ];
}}"""
SHOWN = f"title => {NODES}.find(n => n.title === title)?.imgs?.[0]?.naturalWidth > 0"
GRAPH = f"""() => {NODES}.map(n => [
    n.type, n.title, (n.widgets ?? []).map(w => w.value).filter(v => typeof v !== 'object'),
])"""
# Whether the help shows a picture of that name.
HELP_PICTURE = """name => [...document.querySelectorAll('.node-help-content img')].some(
    picture => picture.src.endsWith(name) && picture.naturalWidth > 0 && picture.width > 0
)"""
# Whether the picture beside the name of a template is there, in its own width.
THUMBNAIL = """([name, width]) => {
    let card = name;
    while (!card.querySelector('img')) card = card.parentElement;
    return card.querySelector('img').naturalWidth === width;
}"""
FILE = """data => {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], 'picture.png', {type: 'image/png'}));
    return transfer;
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with make_server(tmp_path_factory.mktemp("comfy") / "base") as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with open_browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def folder(server):
    version = server.get("/system_stats")["system"]["comfyui_version"]
    path = ROOT / "output" / "browser" / version
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


class User:
    """What a person does on the page."""

    def __init__(self, page, folder: Path) -> None:
        self.page, self.folder = page, folder

    def screenshot(self, name: str) -> None:
        self.page.screenshot(path=self.folder / f"{name}.png")

    def open_gallery(self) -> None:
        self.page.get_by_text(TEMPLATES).first.click()
        self.page.get_by_text(PACK, exact=True).first.click()
        self.card(SMALL).wait_for()

    def card(self, name: str):
        """The name of a template in the gallery; the tabs behind it may have the same."""
        return self.page.get_by_role("dialog").get_by_text(name, exact=True).first

    def open_template(self, name: str) -> None:
        self.open_gallery()
        self.card(name).click()
        # A window may tell of models that are missing.
        self.wait(f"() => {NODES}.length === {len(load_ui(name)['nodes'])}")

    def approach(self, title: str) -> tuple[float, float]:
        """Turn the mouse wheel over a node until its text shows; where its title is then."""
        x, y, zoom = self.page.evaluate(PLACE, title)
        while zoom < NEAR:
            self.page.mouse.move(x, y)
            self.page.mouse.wheel(0, -120)
            self.wait(f"window.app.canvas.ds.scale > {zoom}")
            x, y, zoom = self.page.evaluate(PLACE, title)
        return x, y

    def type_prompt(self, old: str, new: str) -> None:
        areas = self.page.locator("textarea").filter(visible=True)
        (area,) = (a for a in areas.all() if a.input_value() == old)
        area.click()
        area.fill(new)

    def press_run(self) -> None:
        button = self.page.get_by_test_id("queue-button")
        inner = button.get_by_role("button")  # older frontends have it inside
        (inner.first if inner.count() else button).click()

    def drop(self, picture: Path) -> None:
        data = base64.b64encode(picture.read_bytes()).decode()
        transfer = self.page.evaluate_handle(FILE, data)
        self.page.dispatch_event("#graph-canvas", "drop", {"dataTransfer": transfer})

    def wait(self, condition: str, argument=None) -> None:
        self.page.wait_for_function(condition, arg=argument, timeout=MILLISECONDS)

    def graph(self):
        return sorted(self.page.evaluate(GRAPH), key=repr)


@pytest.fixture(scope="module")
def page(server, browser):
    return open_page(browser, server.port)


@pytest.fixture
def user(page, folder):
    """Before an empty canvas, whatever the test before left open."""
    page.keyboard.press("Escape")
    clear(page)
    return User(page, folder)


def load_ui(name):
    return load(next(path for path in UI if path.stem == name))


def plain(text):
    """Only the letters and digits, so that markup makes no difference."""
    return re.sub(r"[\W_]+", "", text)


def test_the_gallery_shows_every_template_with_its_thumbnail(user):
    user.open_gallery()
    for path in UI:
        card = user.card(path.stem)
        card.hover()  # scrolls to it
        with Image.open(path.with_suffix(".jpg")) as picture:
            user.wait(THUMBNAIL, [card.element_handle(), picture.size[0]])
    user.screenshot("gallery")


@pytest.mark.parametrize("name", [path.stem for path in UI])
def test_a_template_opens_with_a_click_and_runs_once_files_are_chosen(user, server, name):
    user.open_template(name)
    user.page.wait_for_timeout(1000)  # for the picture of it alone
    user.screenshot(name.removeprefix("Chroma Nodes - "))
    assert sorted(kind for kind, _, _ in user.graph()) == sorted(
        node["type"] for node in load_ui(name)["nodes"]
    )
    prompt = user.page.evaluate("() => window.app.graphToPrompt().then(made => made.output)")
    run = server.run(few_steps(on_small_model(prompt)))
    assert run.ending == "execution_success", run.data
    assert server.pictures(run)


def test_from_a_prompt_to_a_picture_and_back_from_the_picture(user, server):
    user.open_template(SMALL)
    (old,) = (w[0] for _, title, w in user.graph() if title == "Prompt")
    user.approach("Prompt")
    user.type_prompt(old, PROMPT)
    user.screenshot("prompt typed")
    before = set((server.base / "output").glob("*.png"))
    user.press_run()
    user.wait("() => /^\\[?\\d+%/.test(document.title)")
    user.wait(SHOWN, "Sample")
    user.screenshot("progress and preview")
    user.approach("Save")
    user.wait("() => !/%/.test(document.title)")
    drag_to_the_middle(user, "Save")
    user.wait(SHOWN, "Save")
    user.screenshot("picture")
    (saved,) = set((server.base / "output").glob("*.png")) - before
    with Image.open(saved) as picture:
        assert picture.size == (128, 128)
        assert PROMPT in picture.text["prompt"]

    clear(user.page)
    user.drop(saved)
    user.wait(f"() => {NODES}.length === {len(load_ui(SMALL)['nodes'])}")
    with Image.open(saved) as picture:
        saved_graph = json.loads(picture.text["workflow"])
    # Newer frontends save no list for a node without widgets.
    saved_values = {n.get("title"): n.get("widgets_values", []) for n in saved_graph["nodes"]}
    for _, title, widgets in user.graph():
        values_then = saved_values.get(title, [])
        assert widgets[: len(values_then)] == values_then
    assert any(widgets[:1] == [PROMPT] for _, _, widgets in user.graph())
    user.screenshot("graph back from the picture")


def drag_to_the_middle(user, title):
    """A node draws its picture only where it can be seen."""
    x, y, _ = user.page.evaluate(PLACE, title)
    user.page.evaluate(
        "([dx, dy]) => { const ds = window.app.canvas.ds;"
        " ds.offset[0] += dx / ds.scale; ds.offset[1] += dy / ds.scale;"
        " window.app.canvas.setDirty(true, true); }",
        [800 - x, 300 - y],
    )


def test_a_picture_made_without_comfyui_brings_its_graph(user, tmp_path):
    prompt = few_steps(on_small_model(load(ROOT / "workflows" / "api" / "chroma-small.json")))
    (saved,) = run_workflow(prompt, input_dir=INPUTS, output_dir=tmp_path)
    user.drop(saved)
    user.wait(f"() => {NODES}.some(n => n.type === 'ChromaTextEncode')")
    back = user.page.evaluate("() => window.app.graphToPrompt().then(made => made.output)")
    given, returned = values(prompt), values(back)
    assert len(given) == len(returned) and all(node in returned for node in given)


def values(prompt):
    """(kind, inputs that are no links) of every node of an API graph."""
    return [
        (node["class_type"], {k: v for k, v in node["inputs"].items() if not isinstance(v, list)})
        for node in prompt.values()
    ]


def test_the_help_of_a_node_opens(user):
    user.open_template(SMALL)
    user.page.mouse.click(*user.approach("Prompt"))
    user.page.get_by_test_id("info-button").click()
    title, text = HELP.read_text("utf-8").split("\n\n")[:2]
    user.page.get_by_text(title.removeprefix("# "), exact=True).first.wait_for()
    user.wait(
        "text => document.body.innerText.replace(/[\\W_]+/g, '').includes(text)",
        plain(text.split("\n")[0])[:60],
    )
    user.wait(HELP_PICTURE, f"/docs/images/{HELP.stem}.webp")
    user.screenshot("help")
