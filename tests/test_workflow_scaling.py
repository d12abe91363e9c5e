"""The node that enlarges pictures, against Pillow and values worked out by hand."""

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import ImageError
from chroma_nodes.chroma.workflow import Context, nodes_scaling
from PIL import Image

METHODS = nodes_scaling.METHODS
(NODE,) = nodes_scaling.NODES


def scale(image, method, by, tmp_path):
    context = Context(torch.device("cpu"), tmp_path, tmp_path, tmp_path, {})
    (out,) = NODE.run(context, image=image, upscale_method=method, scale_by=by)
    return out


@pytest.fixture
def image():
    return torch.rand(2, 10, 15, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("by", "size"), [(1.5, (15, 22)), (0.3, (3, 4)), (8.0, (80, 120))])
def test_sides_are_rounded_to_whole_pixels(image, method, by, size, tmp_path):
    """22.5 gives 22: halves go to the even number, as in Python and so in ComfyUI."""
    out = scale(image, method, by, tmp_path)
    assert out.shape == (2, *size, 3) and out.dtype == torch.float32


def test_lanczos_is_pillows_on_eight_bits(image, tmp_path):
    ours = scale(image, "lanczos", 2.0, tmp_path)
    for row, out in zip(image, ours, strict=True):
        picture = Image.fromarray((row.numpy() * 255).astype(np.uint8))
        expected = np.asarray(picture.resize((30, 20), Image.Resampling.LANCZOS)) / 255
        assert np.abs(out.numpy() - expected).max() < 1e-6


def test_the_other_methods_by_hand(image, tmp_path):
    whole = image.numpy()
    doubled = scale(image, "nearest-exact", 2.0, tmp_path).numpy()
    assert (doubled == whole.repeat(2, 1).repeat(2, 2)).all()
    halved = scale(image[:, :, :14], "area", 0.5, tmp_path).numpy()
    assert np.allclose(halved, whole[:, :, :14].reshape(2, 5, 2, 7, 2, 3).mean((2, 4)), atol=1e-6)
    # Straight lines stay straight away from the border; pixel i has its middle at i + 1/2.
    ramp = torch.arange(16.0).expand(1, 16, 16)[..., None].repeat(1, 1, 1, 3) / 16
    wanted = ((np.arange(32) + 0.5) / 2 - 0.5) / 16
    out = scale(ramp, "bilinear", 2.0, tmp_path).numpy()
    assert np.allclose(out[0, 10, 4:-4, 0], wanted[4:-4], atol=1e-6)


def test_bicubic_is_keys_convolution(image, tmp_path):
    """R. G. Keys, Cubic convolution interpolation, IEEE TASSP 29 (1981), with a = -3/4."""

    def weight(x, a=-0.75):
        x = np.abs(x)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        return np.where(x <= 1, near, np.where(x < 2, far, 0))

    def matrix(size):
        places = (np.arange(2 * size) + 0.5) / 2 - 0.5
        out = np.zeros((2 * size, size))
        for i, place in enumerate(places):
            for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
                out[i, min(max(j, 0), size - 1)] += weight(place - j)
        return out

    expected = np.einsum("yh,xw,bhwc->byxc", matrix(10), matrix(15), image.numpy())
    assert np.abs(scale(image, "bicubic", 2.0, tmp_path).numpy() - expected).max() < 1e-5


def test_nothing_left_is_an_error(image, tmp_path):
    with pytest.raises(ImageError, match=r"15 x 10 pixels times 0\.01 leave nothing; use a larger"):
        scale(image, "area", 0.01, tmp_path)
