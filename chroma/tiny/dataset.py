"""Captioned emoji on coloured backgrounds: the pictures that the small Chroma learned.

Artwork: Noto Color Emoji (Google, SIL OFL 1.1, Debian package fonts-noto-color-emoji) is the style
"flat"; Fluent 3D emoji (Microsoft, MIT, npm package @lobehub/fluent-emoji-3d) is the style "3d".
Names and keywords: Unicode's, through npm package emojibase-data (MIT).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import SIZE

STYLES = ("flat", "3d")
COLOURS = {
    "red": (214, 40, 40),
    "blue": (36, 92, 214),
    "green": (44, 160, 64),
    "yellow": (250, 214, 40),
    "orange": (245, 130, 32),
    "purple": (130, 60, 180),
    "white": (245, 245, 245),
    "black": (18, 18, 18),
}
# Longest side of the emoji in pixels of a 128-pixel picture.
SIZES = {"large": 108, "medium": 72, "small": 44}
# Where the free space goes: 0 left or top, 1 right or bottom.
POSITIONS = {
    "center": (0.5, 0.5),
    "top left": (0.0, 0.0),
    "top": (0.5, 0.0),
    "top right": (1.0, 0.0),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
    "bottom left": (0.0, 1.0),
    "bottom": (0.5, 1.0),
    "bottom right": (1.0, 1.0),
}
MARGIN = 4
# Share of the pictures that are large and centred, where the emoji is all there is to learn.
CENTRED = 0.75
SUBGROUPS = (
    "animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine",
    "animal-bug", "plant-flower", "plant-other", "food-fruit", "food-vegetable", "food-prepared",
    "food-asian", "food-sweet", "drink", "dishware", "transport-water", "transport-air",
    "musical-instrument", "event", "game", "arts-crafts", "tool", "science",
)  # fmt: skip
# The bitmap strike that NotoColorEmoji.ttf holds; FreeType refuses every other size.
NOTO_STRIKE = 109


@dataclass(frozen=True)
class Concept:
    """One emoji: its code points as emojibase spells them, its name, its keywords."""

    hexcode: str
    name: str
    tags: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(chr(int(code, 16)) for code in self.hexcode.split("-"))


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True)
class Scene:
    """Everything a caption says: one picture of the data set."""

    concept: Concept
    style: str
    colour: str
    size: str = "large"
    position: str = "center"

    def caption(self) -> str:
        """The full caption; "large" and "center" are what goes without saying."""
        what, colour = with_article(self.concept.name), with_article(self.colour)
        text = f"a {self.style} emoji of {what} on {colour} background"
        if self.size != "large":
            text += f", {self.size}, {self.position}"
        return text


@dataclass(frozen=True)
class Sources:
    """Where the artwork and the names lie."""

    noto_font: Path
    fluent_assets: Path
    emojibase_data: Path

    @classmethod
    def below(cls, folder: Path, font: Path) -> "Sources":
        """The unpacked npm packages below one folder (`sources.py` puts them there)."""
        return cls(
            font,
            folder / "fluent-emoji-3d" / "package" / "assets",
            folder / "emojibase-data" / "package",
        )


def load_concepts(sources: Sources) -> list[Concept]:
    """Every emoji of the chosen subgroups that both artists drew, in Unicode's order."""
    entries = json.loads((sources.emojibase_data / "en" / "data.json").read_text("utf-8"))
    groups = json.loads((sources.emojibase_data / "meta" / "groups.json").read_text("utf-8"))
    font = ImageFont.truetype(str(sources.noto_font), NOTO_STRIKE)
    missing = _glyph(font, "\U0010ffff")
    concepts = []
    for entry in sorted(entries, key=lambda e: e.get("order", 0)):
        subgroup = groups["subgroups"].get(str(entry.get("subgroup")))
        if subgroup not in SUBGROUPS or "-200D" in entry["hexcode"]:
            continue
        concept = Concept(entry["hexcode"], entry["label"].lower(), tuple(entry.get("tags", ())))
        drawn = _glyph(font, concept.text) != missing
        if drawn and _fluent_file(sources, concept) is not None:
            concepts.append(concept)
    return concepts


def _glyph(font: ImageFont.FreeTypeFont, text: str) -> bytes:
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).text((8, 8), text, font=font, embedded_color=True)
    return image.tobytes()


def _fluent_file(sources: Sources, concept: Concept) -> Path | None:
    stem = concept.hexcode.lower()
    for name in (stem, f"{stem}-fe0f", stem.removesuffix("-fe0f")):
        if (path := sources.fluent_assets / f"{name}.webp").exists():
            return path
    return None


def cutout(sources: Sources, concept: Concept, style: str) -> Image.Image:
    """The emoji alone, cropped to what is drawn, RGBA."""
    if style == "flat":
        font = ImageFont.truetype(str(sources.noto_font), NOTO_STRIKE)
        image = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
        ImageDraw.Draw(image).text((8, 8), concept.text, font=font, embedded_color=True)
    else:
        path = _fluent_file(sources, concept)
        if path is None:
            raise FileNotFoundError(f"no 3d artwork for {concept.name} ({concept.hexcode})")
        image = Image.open(path).convert("RGBA")
    visible = np.asarray(image.getchannel("A")) > 8
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    return image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


def render(
    art: Image.Image, colour: str, size: str = "large", position: str = "center"
) -> np.ndarray:
    """One picture (SIZE, SIZE, 3), uint8: the cutout scaled, placed, on its background."""
    side = SIZES[size]
    scale = side / max(art.size)
    wide, high = (max(1, round(edge * scale)) for edge in art.size)
    art = art.resize((wide, high), Image.Resampling.LANCZOS)
    free_x, free_y = POSITIONS[position]
    # The square box of the stated size is what is placed; the drawing sits in its middle.
    x = MARGIN + free_x * (SIZE - 2 * MARGIN - side) + (side - wide) / 2
    y = MARGIN + free_y * (SIZE - 2 * MARGIN - side) + (side - high) / 2
    picture = Image.new("RGB", (SIZE, SIZE), COLOURS[colour])
    picture.paste(art, (round(x), round(y)), art)
    return np.asarray(picture)


def held_out(concepts: Sequence[Concept], seed: int = 0) -> set[tuple[str, str, str]]:
    """One (hexcode, style, colour) per emoji and style, which training never shows."""
    random = Random(seed)
    return {
        (concept.hexcode, style, random.choice(list(COLOURS)))
        for concept in concepts
        for style in STYLES
    }


def training_scenes(concepts: Sequence[Concept], per_pair: int, seed: int = 0) -> Iterator[Scene]:
    """`per_pair` pictures of each emoji and style: most large and centred, the rest anywhere."""
    random = Random(seed + 1)
    hidden = held_out(concepts, seed)
    for concept in concepts:
        for style in STYLES:
            colours = [c for c in COLOURS if (concept.hexcode, style, c) not in hidden]
            for index in range(per_pair):
                colour = colours[index % len(colours)]
                if random.random() < CENTRED:
                    yield Scene(concept, style, colour)
                else:
                    size = random.choice(("medium", "small"))
                    yield Scene(concept, style, colour, size, random.choice(list(POSITIONS)))
