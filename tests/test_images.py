from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdcore import images


def saved(folder: Path, pixels: Image.Image, name: str = "a.png", **options: object) -> Path:
    pixels.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize("name", images.PHOTOS)
def test_photos_are_in_the_wheels(name: str) -> None:
    image = images.read(images.find(name))
    assert image.dtype == torch.float32 and image.dim() == 3 and image.shape[2] == 3
    assert min(image.shape[:2]) >= 300
    assert image.min() >= 0 and image.max() <= 1
    assert image.std() > 0.05


def test_colors_survive_writing_and_reading(tmp_path: Path) -> None:
    image = torch.arange(256 * 3).reshape(16, 16, 3).remainder(256) / 255
    images.write(image, tmp_path / "a.png")
    torch.testing.assert_close(images.read(tmp_path / "a.png"), image, atol=1e-7, rtol=0)


@pytest.mark.parametrize("suffix", images.WRITABLE)
def test_quantize_is_what_is_written(suffix: str, tmp_path: Path) -> None:
    # Smooth, since JPEG is lossy.
    image = torch.linspace(0, 1, 72)[:, None, None].expand(72, 72, 3)
    path = tmp_path / f"a{suffix}"
    images.write(image, path)
    lossy = 2.5 / 255 if suffix in (".jpg", ".jpeg") else 0
    torch.testing.assert_close(images.read(path), images.quantize(image), atol=lossy, rtol=0)
    assert (images.quantize(image) - image).abs().max() <= 0.5 / 255 + 1e-6


def test_exif_orientation_is_honored(tmp_path: Path) -> None:
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[0, 0] = 255  # Orientation 6: stored turned to the left, this corner shows top right.
    exif = Image.Exif()
    exif[0x0112] = 6
    image = images.read(saved(tmp_path, Image.fromarray(pixels), exif=exif))
    assert image.shape == (4, 2, 3)
    assert torch.equal(image.sum(-1).nonzero(), torch.tensor([[0, 1]]))


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    half_red = Image.new("RGBA", (2, 2), (255, 0, 0, 51))
    image = images.read(saved(tmp_path, half_red))
    torch.testing.assert_close(image[0, 0], torch.tensor([1, 0.8, 0.8]), atol=1e-6, rtol=0)

    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    image = images.read(saved(tmp_path, palette, transparency=1))
    assert torch.equal(image, torch.ones(2, 2, 3))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK"])
def test_other_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    name = "a.tif" if mode == "CMYK" else "a.png"
    image = images.read(saved(tmp_path, Image.new("RGB", (3, 2), "white").convert(mode), name))
    torch.testing.assert_close(image, torch.ones(2, 3, 3))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_gray_keeps_its_bits(name: str, tmp_path: Path) -> None:
    levels = np.array([[0, 1, 256], [32768, 65534, 65535]], np.uint16)
    image = images.read(saved(tmp_path, Image.fromarray(levels), name))
    expected = torch.from_numpy(levels.astype(np.float32) / 65535)[..., None].expand(-1, -1, 3)
    torch.testing.assert_close(image, expected, atol=1e-7, rtol=0)


def test_gray_without_a_known_white_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.ones((2, 2), np.float32)), "a.tif")
    with pytest.raises(images.ImageError, match=r"can't read .*a\.tif.*floating point"):
        images.read(path)


def test_fit_keeps_proportions_and_means() -> None:
    image = torch.rand(60, 120, 3)
    small = images.fit(image, 30)
    assert small.shape == (15, 30, 3)
    assert small.min() >= 0 and small.max() <= 1
    torch.testing.assert_close(small.mean((0, 1)), image.mean((0, 1)), atol=0.01, rtol=0)
    assert images.fit(image, 120) is image
    assert images.fit(torch.rand(2, 500, 3), 10).shape == (1, 10, 3)


def test_unknown_name_lists_the_photos(tmp_path: Path) -> None:
    with pytest.raises(images.ImageError, match=r"'sunset' is neither a file.*motorcycle"):
        images.find("sunset")
    with pytest.raises(images.ImageError, match="is a directory"):
        images.find(str(tmp_path))


def test_photo_of_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(images.ImageError, match=r"scikit-learn.*pip install 'sdcore\[cli\]'"):
        images.find("china")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no image", "not an image that Pillow can read"), (None, "can't read")],
)
def test_unreadable(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    if content is None:  # cut short
        content = saved(tmp_path, Image.effect_noise((64, 64), 50)).read_bytes()[:500]
    path.write_bytes(content)
    with pytest.raises(images.ImageError, match=message) as caught:
        images.read(path)
    assert "\n" not in str(caught.value)


def test_check_writable_leaves_no_trace(tmp_path: Path) -> None:
    images.check_writable(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b.png").write_bytes(b"precious")
    images.check_writable(tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == b"precious"
    for path in (tmp_path / "no" / "a.png", tmp_path, tmp_path / "a.txt", tmp_path / "a"):
        with pytest.raises(images.ImageError):
            images.check_writable(path)
    assert [file.name for file in tmp_path.iterdir()] == ["b.png"]
