"""A picture of a sigma curve: what a schedule does, at a glance."""

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..chroma.errors import SamplingError

LEFT, TOP, RIGHT, BOTTOM = 56, 48, 84, 44  # margins around the axes, in pixels
BACKGROUND, GRID, AXES, TEXT = (255, 255, 255), (224, 224, 224), (96, 96, 96), (32, 32, 32)
LINE, DOT = (120, 170, 230), (20, 80, 180)
FONT_SIZE = 14
MIN_WIDTH, MIN_HEIGHT = 320, 200
# Lines and dots are drawn this many times larger and averaged down, which smooths their edges.
OVERSAMPLING = 2


class Axes(NamedTuple):
    """A picture of width x height pixels: steps to the right, sigma from 0 to `top` upward."""

    width: int
    height: int
    steps: int
    top: float

    def at(self, step: float, sigma: float) -> tuple[float, float]:
        """The place of a sigma in pixels from the upper left corner."""
        x = LEFT + step / self.steps * (self.width - LEFT - RIGHT)
        return x, self.height - BOTTOM - sigma / self.top * (self.height - TOP - BOTTOM)

    def step_ticks(self) -> range:
        """Steps that get a grid line: every 1st, 2nd, 5th, 10th ..., at most 10 intervals."""
        decade = 10 ** max(0, math.floor(math.log10(self.steps / 10)))
        every = next(k * decade for k in (1, 2, 5, 10) if self.steps <= 10 * k * decade)
        return range(0, self.steps + 1, every)

    def sigma_ticks(self) -> list[float]:
        return [self.top * quarter / 4 for quarter in range(5)]


def _lines(axes: Axes, values: list[float]) -> Image.Image:
    """Everything but the words."""
    n = OVERSAMPLING
    picture = Image.new("RGB", (n * axes.width, n * axes.height), BACKGROUND)
    draw = ImageDraw.Draw(picture)

    def line(colour: tuple[int, int, int], thick: int, *places: tuple[float, float]) -> None:
        scaled = [(n * x, n * y) for x, y in (axes.at(*place) for place in places)]
        draw.line(scaled, colour, n * thick, joint="curve")

    for step in axes.step_ticks():
        line(GRID, 1, (step, 0), (step, axes.top))
    for sigma in axes.sigma_ticks():
        line(GRID, 1, (0, sigma), (axes.steps, sigma))
    line(AXES, 1, (0, axes.top), (0, 0), (axes.steps, 0))
    line(LINE, 2, *enumerate(values))
    radius = 4 if len(values) <= 60 else 2
    for x, y in (axes.at(*place) for place in enumerate(values)):
        draw.ellipse([n * v for v in (x - radius, y - radius, x + radius, y + radius)], DOT)
    return picture.reduce(n)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(FONT_SIZE)
    except (TypeError, ImportError):  # Pillow before 10.1, or without FreeType: one fixed size
        return ImageFont.load_default()


def _legend(values: list[float], label: str) -> str:
    steps = max(len(values) - 1, 0)
    count = f"{steps} step{'' if steps == 1 else 's'}"
    last = f"last from {values[-2]:.4g}" if steps else ""
    return ", ".join(part for part in (label, count, last) if part)


def _words(picture: Image.Image, axes: Axes, values: list[float], label: str) -> None:
    """Write the axes' numbers, the legend, and the highest and lowest sigma onto the picture."""
    draw, font = ImageDraw.Draw(picture), _font()

    def text(x: float, y: float, words: str, align: float) -> None:
        """Words centred on height y; align 0 begins them at x, 1 ends them there."""
        left, upper, right, lower = font.getbbox(words)
        draw.text((x - align * (right - left), y - (upper + lower) / 2), words, TEXT, font)

    for step in axes.step_ticks():
        text(axes.at(step, 0)[0], axes.height - BOTTOM + 14, str(step), 0.5)
    for sigma in axes.sigma_ticks():
        text(LEFT - 10, axes.at(0, sigma)[1], f"{sigma:.3g}", 1)
    text(axes.at(axes.steps / 2, 0)[0], axes.height - 12, "step", 0.5)
    text(12, TOP / 3, "sigma", 0)
    text(axes.width - 12, TOP / 3, _legend(values, label), 1)
    if values:
        extremes = {max(values): "max", min(values): "min"}  # one label where they are equal
        for value, name in extremes.items():
            x, y = axes.at(values.index(value), value)
            text(x + 8, y - 10, f"{name} {value:.4g}", 0)


def draw_sigmas(sigmas: Tensor, label: str = "", *, width: int = 768, height: int = 480) -> Tensor:
    """Sigmas (any number of them) over their steps as a picture (height, width, 3), fp32 in [0, 1].

    A dot for every sigma, the highest and the lowest with their values; the legend gives `label`,
    the number of steps and the level that the last one starts from. The axis ends at 1, or at the
    highest sigma above it. Raises SamplingError for values that are not sigmas and for a size below
    320 x 200.
    """
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        raise SamplingError(
            f"size {width} x {height} is too small; expected {MIN_WIDTH} x {MIN_HEIGHT} at least"
        )
    if sigmas.ndim != 1 or not bool((sigmas.isfinite() & (sigmas >= 0)).all()):
        raise SamplingError(
            f"sigmas of shape {tuple(sigmas.shape)} cannot be drawn; expected one row of finite "
            "numbers, none below 0"
        )
    values = sigmas.tolist()
    axes = Axes(width, height, steps=max(len(values) - 1, 1), top=max([1.0, *values]))
    picture = _lines(axes, values)
    _words(picture, axes, values, label)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
