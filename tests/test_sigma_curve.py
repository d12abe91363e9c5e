"""The picture of a schedule."""

import math

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.schedulers.beta import beta57_sigmas
from chroma_nodes.schedulers.curve import DOT, LEFT, LINE, RIGHT, draw_sigmas
from chroma_nodes.schedulers.power_odds import power_odds_sigmas
from chroma_nodes.schedulers.simple import simple_sigmas
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageDraw, ImageFont
from scipy import ndimage


def pixels(picture: torch.Tensor, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture.numpy() * 255).round() == np.array(colour)


def dots(picture: torch.Tensor) -> np.ndarray:
    """Centres (row, column) of the dots, from left to right."""
    marks, count = ndimage.label(pixels(picture, DOT).all(-1))
    centres = np.array(ndimage.center_of_mass(marks, marks, range(1, count + 1)))
    return centres[centres[:, 1].argsort()]


@pytest.mark.parametrize("steps", [1, 2, 8, 26])
@pytest.mark.parametrize("schedule", [simple_sigmas, power_odds_sigmas, beta57_sigmas])
def test_the_picture_has_a_dot_for_every_sigma_at_its_height(schedule, steps):
    sigmas = schedule(steps)
    picture = draw_sigmas(sigmas, "a schedule", width=1600, height=900)
    assert picture.shape == (900, 1600, 3) and picture.dtype == torch.float32
    assert picture.min() >= 0 and picture.max() == 1
    rows, columns = dots(picture).T
    assert len(rows) == steps + 1
    expected = rows[-1] + (rows[0] - rows[-1]) * sigmas.numpy()
    np.testing.assert_allclose(rows, expected, atol=1)
    np.testing.assert_allclose(np.diff(columns), np.diff(columns).mean(), atol=1)


def test_the_line_joins_the_dots():
    picture = draw_sigmas(torch.tensor([1.0, 0.25, 0.0]))
    centres = dots(picture)
    rows, columns = np.nonzero(pixels(picture, LINE).all(-1))
    assert len(rows) > 300
    on_line = np.interp(columns, centres[:, 1], centres[:, 0])
    assert np.abs(rows - on_line).max() < 3


def test_the_axis_grows_only_above_one():
    low, one, high = (dots(draw_sigmas(torch.tensor(v))) for v in ([0.5, 0], [1.0, 0], [14.6, 7.3]))
    assert low[-1, 0] - low[0, 0] == pytest.approx((one[-1, 0] - one[0, 0]) / 2, abs=1)
    assert high[0, 0] == pytest.approx(one[0, 0], abs=1)
    assert high[1, 0] == pytest.approx(low[0, 0], abs=1)


@pytest.mark.parametrize(("steps", "ticks"), [(1, 2), (10, 11), (11, 6), (26, 6), (200, 11)])
def test_axes_at_zero_and_grid_lines_at_the_ticks(steps, ticks):
    picture = draw_sigmas(torch.full((steps + 1,), 0.625), width=800, height=400)
    dark = 1 - picture.mean(-1)

    def lines(strip: torch.Tensor) -> list[float]:
        """The darkness of every line across a strip of pixels."""
        marks, count = ndimage.label(strip.numpy() > 0.02)
        return ndimage.sum(strip.numpy(), marks, range(1, count + 1)).tolist()

    upright = lines(dark[120, LEFT - 6 : 800 - RIGHT + 6])
    assert len(upright) == ticks and upright[0] > 2 * max(upright[1:])
    level = lines(dark[40:365, 800 - RIGHT - 10])
    assert len(level) == 6 and level[-1] > 2 * max(level[0], level[1], *level[3:-1])


@pytest.mark.parametrize(
    ("sigmas", "label", "words"),
    [
        ([1.0, 0.6, 0.25, 0.0], "beta", {"beta, 3 steps, last from 0.25", "max 1", "min 0"}),
        ([0.75, 0.125], "", {"1 step, last from 0.75", "max 0.75", "min 0.125"}),
        ([], "beta", {"beta, 0 steps"}),
        ([0.5], "", {"0 steps", "min 0.5"}),
    ],
)
def test_the_legend_and_the_labels(sigmas, label, words, monkeypatch):
    written = set()
    draw = ImageDraw.ImageDraw.text

    def record(self, place, text, *rest):
        written.add(text)
        draw(self, place, text, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    picture = draw_sigmas(torch.tensor(sigmas), label)
    numbers = {"sigma", "step", "0", "0.25", "0.5", "0.75", "1", "2", "3"}
    assert written - numbers == words and picture.shape == (480, 768, 3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 20, width=32), max_size=300), st.integers(320, 600))
def test_any_sigmas_are_drawn_and_kept_as_they_are(values, width):
    sigmas = torch.tensor(values)
    before = sigmas.clone()
    assert draw_sigmas(sigmas, width=width, height=200).shape == (200, width, 3)
    assert torch.equal(sigmas, before)


@pytest.mark.parametrize("error", [TypeError, ImportError])
def test_the_picture_needs_no_new_pillow(error, monkeypatch):
    def only_one_size(size=None):
        if size is not None:
            raise error
        return ImageFont.load_default_imagefont()

    monkeypatch.setattr(ImageFont, "load_default", only_one_size)
    assert len(dots(draw_sigmas(simple_sigmas(8), "simple"))) == 9


@pytest.mark.parametrize(
    ("sigmas", "size", "says"),
    [
        (torch.tensor([1.0, math.nan]), {}, r"shape \(2,\) cannot be drawn"),
        (torch.tensor([1.0, -0.1]), {}, "none below 0"),
        (torch.ones(2, 3), {}, r"shape \(2, 3\) cannot be drawn; expected one row"),
        (torch.ones(2), {"width": 319}, "size 319 x 480 is too small; expected 320 x 200"),
        (torch.ones(2), {"height": 10}, "size 768 x 10 is too small"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(sigmas, size, says):
    with pytest.raises(SamplingError, match=says) as error:
        draw_sigmas(sigmas, **size)
    assert "\n" not in str(error.value)
