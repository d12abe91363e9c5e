"""Picture files, read back with Pillow."""

import json
import struct
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from chroma_nodes.chroma import image
from chroma_nodes.chroma.errors import ImageError
from PIL import Image

CORRUPT = [
    b"",
    b"not a picture",
    b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
    b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 1) + b"IHDR\0" + struct.pack(">I", crc32(b"IHDR\0")),
]


def test_bytes_are_rounded_down_and_clipped():
    pixels = torch.tensor([[0.999, 1.5, -1.0], [0.5, 1.0, 0.0]])
    assert image.to_uint8(pixels).tolist() == [[254, 255, 0], [127, 255, 0]]


def test_png_holds_pixels_and_graphs(tmp_path):
    pixels = torch.rand(5, 7, 3)
    image.save_png(tmp_path / "a" / "x.png", pixels, prompt={"1": "ä"}, workflow={"nodes": []})
    with Image.open(tmp_path / "a" / "x.png") as file:
        assert np.array_equal(np.asarray(file), (255 * pixels).floor().numpy())
        assert json.loads(file.text["prompt"]) == {"1": "ä"}
        assert json.loads(file.text["workflow"]) == {"nodes": []}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.png"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"old")

    def stop(*args, **kw):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        image.save_png(path, torch.zeros(4, 4, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    assert path.read_bytes() == b"old"


def test_a_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(ImageError, match="choose another folder"):
        image.save_png(tmp_path / "f" / "x.png", torch.zeros(4, 4, 3))


def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"old")

    def full(self, file, *args, **kw):
        assert Path(file.name).parent == tmp_path
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ImageError, match=r"cannot write .*x\.png \(No space left"):
        image.save_png(path, torch.zeros(4, 4, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    assert path.read_bytes() == b"old"


def test_a_target_that_is_a_folder_is_one_line(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(ImageError, match="cannot write"):
        image.save_png(tmp_path / "x.png", torch.zeros(4, 4, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_alpha_becomes_the_mask(tmp_path):
    rgba = np.zeros((4, 6, 4), dtype=np.uint8)
    rgba[..., 0], rgba[..., 3] = 255, 255
    rgba[1, 2, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "x.png")
    picture, mask = image.load_image(tmp_path / "x.png")
    assert picture.shape == (1, 4, 6, 3) and mask.shape == (1, 4, 6)
    assert mask.sum() == 1 and mask[0, 1, 2] == 1
    assert torch.equal(picture[0, 0, 0], torch.tensor([1.0, 0.0, 0.0]))


def test_transparency_of_palettes_counts_and_of_single_colours_does_not(tmp_path):
    for mode, masked in (("P", 24), ("RGB", 0)):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, (6, 4)).save(path, transparency=0 if mode == "P" else (0, 0, 0))
        mask = image.load_image(path)[1]
        assert mask.shape == ((1, 4, 6) if masked else (1, 64, 64)) and mask.sum() == masked


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    Image.fromarray(np.array([[0, 25500, 65535]], dtype=np.uint16)).save(tmp_path / "x.png")
    picture, _ = image.load_image(tmp_path / "x.png")
    assert (255 * picture[0, 0, :, 0]).tolist() == [0, 100, 255]


def test_a_picture_beyond_pillows_limit_is_one_line(tmp_path, monkeypatch):
    Image.new("RGB", (30, 30)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"x\.png is too large .*; make it smaller"):
        image.load_image(tmp_path / "x.png")


def test_without_alpha_the_mask_is_empty_and_exif_turns_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "x.jpg", exif=exif)
    picture, mask = image.load_image(tmp_path / "x.jpg")
    assert picture.shape == (1, 6, 4, 3)
    assert mask.shape == (1, 64, 64) and not mask.any()


@pytest.mark.parametrize("content", CORRUPT)
def test_unreadable_pictures_are_one_line(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"x\.png cannot be read") as error:
        image.load_image(tmp_path / "x.png")
    assert "\n" not in str(error.value)
    with pytest.raises(ImageError, match="does not exist"):
        image.load_image(tmp_path / "y.png")
