"""Every help page shows its node in a graph; the pictures are those of docs/node_pictures.py."""

import re
from pathlib import Path

import pytest
from PIL import Image

DOCS = Path(__file__).resolve().parent.parent / "nodes" / "web" / "docs"
PAGES = sorted(DOCS.glob("*.md"))
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]*)\)")
MOST_BYTES, WIDEST = 60_000, 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_one_picture_below_its_first_paragraph(page):
    title, _, shown, *rest = page.read_text("utf-8").split("\n\n")
    name = f"images/{page.stem}.webp"
    assert shown == f"![{title.removeprefix('# ')} wired]({name})"
    assert not PICTURE.search("\n\n".join(rest))
    assert (DOCS / name).stat().st_size < MOST_BYTES
    with Image.open(DOCS / name) as picture:
        picture.load()
        assert picture.format == "WEBP" and picture.width <= WIDEST
        assert max(high - low for low, high in picture.getextrema()) > 100  # not blank


def test_no_picture_is_left_over():
    assert PAGES
    assert {path.name for path in (DOCS / "images").iterdir()} == {f"{p.stem}.webp" for p in PAGES}
