from __future__ import annotations

import copy
import itertools
import pickle
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from sdcore.images import ImageError, find, read
from sdcore.ops import sliced_wasserstein
from sdcore.palette import Palette

RED, GREEN, BLUE = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]


def counted(points: Tensor, mass: Tensor | None = None) -> dict[tuple[float, ...], float]:
    """Rows, as tuples, with the sum of the mass of each, as a share."""
    total: Counter[tuple[float, ...]] = Counter()
    shares = [1.0] * len(points) if mass is None else mass.tolist()
    for row, share in zip(points.float().tolist(), shares, strict=True):
        if share:
            total[tuple(row)] += share
    whole = sum(total.values())
    return {row: share / whole for row, share in total.items()}


def content(palette: Palette) -> dict[tuple[float, ...], float]:
    """The palette as a dictionary, after checking all that holds for every palette."""
    colors, weights = palette.colors, palette.weights
    assert colors.dtype == torch.float32 and colors.shape == (len(palette), 3)
    assert weights.dtype == torch.float64 and weights.shape == (len(palette),)
    assert colors.is_contiguous() and not colors.requires_grad and not weights.requires_grad
    assert (weights > 0).all() and abs(weights.sum().item() - 1) < 1e-12
    rows = [tuple(row) for row in colors.tolist()]
    assert rows == sorted(set(rows))
    return dict(zip(rows, weights.tolist(), strict=True))


def assert_holds(palette: Palette, expected: dict[tuple[float, ...], float], atol: float) -> None:
    found = content(palette)
    assert len(found) == len(expected)
    for (row, share), (want, portion) in zip(found.items(), sorted(expected.items()), strict=True):
        assert row == pytest.approx(want, abs=atol)
        assert share == pytest.approx(portion, rel=1e-9)


def same(a: Palette, b: Palette) -> bool:
    return torch.equal(a.colors, b.colors) and torch.equal(a.weights, b.weights)


def saved(folder: Path, image: Image.Image, name: str = "a.png", **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


# The constructor.


def test_duplicates_merge_and_zeros_vanish() -> None:
    colors = torch.tensor([BLUE, RED, BLUE, GREEN, RED])
    palette = Palette(colors, torch.tensor([1, 2, 4, 0, 3]))
    assert palette.colors.tolist() == [BLUE, RED]
    torch.testing.assert_close(palette.weights, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert_holds(Palette(colors), counted(colors), 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_any_range(dtype: torch.dtype) -> None:
    grid = torch.tensor([-2.5, -0.0, 0.0, 0.125, 3.0], dtype=dtype)
    colors = grid[torch.randint(0, 5, (400, 3))]
    weights = torch.rand(400, dtype=torch.float64)
    palette = Palette(colors, weights)
    assert len(palette) <= 4**3
    expected = counted(colors + 0.0, weights)
    assert content(palette) == pytest.approx(expected)


def test_floats_are_equal_only_exactly() -> None:
    one = torch.tensor(1.0)
    neighbors = torch.stack([one, one.nextafter(one * 2), one.nextafter(one * 0)])
    colors = torch.cartesian_prod(neighbors, neighbors, neighbors)
    assert len(Palette(colors)) == 27
    tiny = torch.tensor([1e-45, -1e-45, 0.0, -0.0, 3e38, -3e38])
    palette = Palette(torch.cartesian_prod(tiny, tiny, tiny))
    assert len(palette) == 125 == len(content(palette))
    assert not (palette.colors == 0).logical_and(palette.colors.signbit()).any()
    # Float64 values that float32 doesn't tell apart are one color.
    assert len(Palette(torch.tensor([[1, 0, 0], [1 + 1e-12, 0, 0]], dtype=torch.float64))) == 1


def test_order_does_not_depend_on_the_order_of_points() -> None:
    colors = torch.randint(-20, 20, (1000, 3)) / 8
    weights = torch.randint(1, 9, (1000,))
    shuffle = torch.randperm(1000)
    one, two = Palette(colors, weights), Palette(colors[shuffle], weights[shuffle])
    assert torch.equal(one.colors, two.colors)
    torch.testing.assert_close(one.weights, two.weights, atol=0, rtol=1e-13)
    assert same(one, Palette(colors.T.contiguous().T, weights))
    again = Palette(one.colors, one.weights)
    assert torch.equal(again.colors, one.colors)
    torch.testing.assert_close(again.weights, one.weights, atol=0, rtol=1e-13)


@pytest.mark.parametrize("unit", [1e-320, 1e-30, 1.0, 1e30, 1e308])
def test_weights_have_any_unit(unit: float) -> None:
    weights = torch.tensor([unit, unit, 0.5 * unit], dtype=torch.float64)
    palette = Palette(torch.tensor([BLUE, GREEN, RED]), weights)
    assert list(content(palette).values()) == pytest.approx([0.4, 0.4, 0.2], rel=1e-3)


def test_weights_that_underflow_are_dropped() -> None:
    colors = torch.tensor([BLUE, GREEN, RED])
    weights = torch.tensor([1e-320, 1e300, 1e-20], dtype=torch.float64)
    assert list(content(Palette(colors, weights))) == [(0, 1, 0), (1, 0, 0)]
    weights = torch.tensor([1, 5e-324, 1], dtype=torch.float64)
    assert content(Palette(colors, weights)) == {(0, 0, 1): 0.5, (1, 0, 0): 0.5}


def test_arguments_stay_apart() -> None:
    colors = torch.rand(5, 3, requires_grad=True)
    weights = torch.rand(5, requires_grad=True)
    palette = Palette(colors, weights)
    before = content(palette)
    with torch.no_grad():
        colors.fill_(7)
        weights.fill_(7)
    assert content(palette) == before


@pytest.mark.parametrize(
    ("colors", "weights", "error", "message"),
    [
        (["red"], None, TypeError, r"colors must be a tensor; got list \(Palette.from_colors"),
        (torch.ones(2, 3).long(), None, TypeError, "colors must be floating-point; got torch.int"),
        (torch.ones(2, 3).cfloat(), None, TypeError, "colors must be floating-point; got torch.c"),
        (torch.ones(3), None, ValueError, r"colors must be \[k, 3\].*got \(3,\)"),
        (torch.ones(2, 4), None, ValueError, r"colors must be \[k, 3\].*got \(2, 4\)"),
        (torch.ones(1, 2, 3), None, ValueError, r"colors must be \[k, 3\].*got \(1, 2, 3\)"),
        (torch.ones(0, 3), None, ValueError, r"k at least 1; got \(0, 3\)"),
        (torch.tensor([[0, 0, torch.nan]]), None, ValueError, "colors must be finite"),
        (torch.tensor([[0, 0, 1e39]]).double() * 10, None, ValueError, "finite in float32"),
        (torch.ones(2, 3), [1, 1], TypeError, "weights must be a tensor; got list"),
        (torch.ones(2, 3), torch.ones(2).cfloat(), TypeError, "weights must be real; got"),
        (torch.ones(2, 3), torch.ones(3), ValueError, r"weights must be .*\(2,\); got .*\(3,\)"),
        (torch.ones(2, 3), torch.ones(2, 1), ValueError, r"weights.*\(2,\); got .*\(2, 1\)"),
        (torch.ones(2, 3), torch.tensor([1, -1]), ValueError, "weights.*from -1.0 to 1.0"),
        (torch.ones(2, 3), torch.tensor([1, torch.nan]), ValueError, "weights.*non-negative.*nan"),
        (torch.ones(2, 3), torch.tensor([1, torch.inf]), ValueError, "weights.*finite.*inf"),
        (torch.ones(2, 3), torch.zeros(2), ValueError, "weights must not be zero everywhere"),
    ],
)
def test_bad_constructor_arguments(
    colors: object, weights: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Palette(colors, weights)


# Arrays and tensors.


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", ["array", "tensor", "planar"])
@pytest.mark.parametrize("channels", [None, 3, 4])
def test_integers_become_shares_of_white(bits: int, kind: str, channels: int | None) -> None:
    white = 2**bits - 1
    shape = (7, 9) if channels is None else (7, 9, channels)
    levels = np.random.default_rng(0).choice([0, 1, white // 2, white - 1, white], shape)
    image = levels.astype(f"uint{bits}")
    if kind != "array":
        image = torch.from_numpy(image)
        if kind == "planar" and channels:
            image = image.permute(2, 0, 1)
    points = torch.from_numpy(levels / white)
    mass = points[..., 3].reshape(-1) if channels == 4 else None
    points = points[..., None].expand(-1, -1, 3) if channels is None else points[..., :3]
    assert content(Palette.from_image(image)) == pytest.approx(counted(points.reshape(-1, 3), mass))


def test_every_level_is_the_float_that_images_hold() -> None:
    for dtype, white in ((torch.uint8, 255), (torch.uint16, 65535)):
        levels = torch.arange(white + 1)[:, None].to(dtype)
        as_floats = Palette.from_image(levels.float() / white)
        assert same(Palette.from_image(levels), as_floats)
        assert len(as_floats) == white + 1
    assert same(
        Palette.from_image(torch.arange(256, dtype=torch.uint8)[:, None]),
        Palette.from_colors([(level, level, level) for level in range(256)]),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [None, 3, 4])
def test_floating_point_images(dtype: torch.dtype, channels: int | None) -> None:
    shape = (5, 6) if channels is None else (5, 6, channels)
    image = (torch.randint(0, 5, shape) / 4).to(dtype)
    mass = image[..., 3].reshape(-1) if channels == 4 else None
    points = image[..., None].expand(-1, -1, 3) if channels is None else image[..., :3]
    expected = counted(points.reshape(-1, 3), mass)
    assert content(Palette.from_image(image.requires_grad_())) == pytest.approx(expected)
    if channels:
        assert content(Palette.from_image(image.permute(2, 0, 1))) == pytest.approx(expected)
    if dtype != torch.bfloat16:
        array = image.detach().numpy()
        assert content(Palette.from_image(array)) == pytest.approx(expected)


def test_the_last_dimension_holds_the_channels_where_two_could() -> None:
    image = torch.zeros(3, 5, 3)
    image[0] = 1  # a white row; channel-first it would be red throughout
    assert content(Palette.from_image(image)) == pytest.approx({(0, 0, 0): 2 / 3, (1, 1, 1): 1 / 3})
    assert list(content(Palette.from_image(image[:, :2, :2]))) == [(1, 0, 0)]
    assert list(content(Palette.from_image(torch.zeros(4, 5, 3)))) == [(0, 0, 0)]


def test_arrays_of_any_layout() -> None:
    image = np.random.default_rng(0).integers(0, 9, (6, 7, 3)).astype(np.uint16)
    expected = Palette.from_image(image)
    frozen = image.copy()
    frozen.setflags(write=False)
    for other in (image[::-1, ::-1], np.asfortranarray(image), image.astype(">u2"), frozen):
        assert same(Palette.from_image(other), expected)
    assert len(Palette.from_image(image[..., ::-1])) == len(expected)


def test_float64_rounding_above_white_is_white() -> None:
    assert list(content(Palette.from_image(np.full((2, 2), 1 + 1e-12)))) == [(1, 1, 1)]


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([[0.5]], TypeError, "image must be a path.*got list"),
        (None, TypeError, "image must be a path.*got NoneType"),
        (torch.zeros(2, 2).long(), TypeError, r"image must be uint8, uint16 or.*torch\.int64"),
        (torch.zeros(2, 2).bool(), TypeError, r"image must be uint8, uint16 or.*torch\.bool"),
        (np.zeros((2, 2), np.int16), TypeError, r"image must be uint8, uint16 or.*torch\.int16"),
        (np.array([["a"]]), TypeError, "image must be of a dtype that PyTorch has; got <U1"),
        (torch.zeros(1, 3, 5, 5), ValueError, r"image must be one image.*batch.*\(1, 3, 5, 5\)"),
        (np.zeros((2, 5, 5, 3)), ValueError, r"pass image\[0\]; got shape \(2, 5, 5, 3\)"),
        (torch.zeros(2, 5, 5), ValueError, r"\[4, H, W\], without a batch.*\(2, 5, 5\)"),
        (np.zeros((3, 5, 5)), ValueError, r"or \[H, W, 4\], without a batch.*\(3, 5, 5\)"),
        (torch.zeros(5, 5, 1), ValueError, r"image must be \[H, W\].*\(5, 5, 1\)"),
        (torch.zeros(5), ValueError, r"image must be \[H, W\].*\(5,\)"),
        (torch.zeros(0, 5, 3), ValueError, r"image must have at least one pixel.*\(0, 5, 3\)"),
        (torch.full((2, 2), 1.01), ValueError, r"image must lie in \[0, 1\].*to 1\.00"),
        (torch.full((2, 2), -0.5), ValueError, r"image must lie in \[0, 1\].*from -0\.5"),
        (torch.full((2, 2), torch.nan), ValueError, r"image must lie in \[0, 1\].*nan"),
        (torch.full((2, 2, 4), 255.0), ValueError, r"image must lie in \[0, 1\].*255"),
        (torch.zeros(2, 2, 4), ValueError, "image must have a visible pixel; its alpha"),
    ],
)
def test_bad_images(image: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Palette.from_image(image)


# Files and Pillow's images.


def test_a_file_is_its_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 4, (8, 9, 3)).astype(np.uint8)
    path = saved(tmp_path, Image.fromarray(pixels))
    for image in (path, str(path), Image.open(path), Image.fromarray(pixels)):
        assert same(Palette.from_image(image), Palette.from_image(pixels))


@pytest.mark.parametrize("name", ["cat", "flower"])
def test_a_photo_agrees_with_the_reader_of_images(name: str) -> None:
    path = find(name)
    assert same(Palette.from_image(path), Palette.from_image(read(path)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("source", ["file", "pillow"])
def test_mask_lies_on_the_image_as_it_shows(orientation: int, source: str, tmp_path: Path) -> None:
    # What each orientation stores of an image that shows as ``upright``, by the EXIF standard:
    # which edges of the upright image the first stored row and column are.
    stored_from: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,  # top, left
        2: lambda a: a[:, ::-1],  # top, right
        3: lambda a: a[::-1, ::-1],  # bottom, right
        4: lambda a: a[::-1],  # bottom, left
        5: lambda a: a.swapaxes(0, 1),  # left, top
        6: lambda a: a[:, ::-1].swapaxes(0, 1),  # right, top
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        8: lambda a: a[::-1].swapaxes(0, 1),  # left, bottom
    }
    upright = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(stored_from[orientation](upright))
    image = saved(tmp_path, Image.fromarray(stored), exif=exif)
    if source == "pillow":
        image = Image.open(image)
    for row, column in itertools.product(range(2), range(4)):
        mask = torch.zeros(2, 4, dtype=torch.bool)
        mask[row, column] = True
        palette = Palette.from_image(image, mask=mask)
        assert (palette.colors * 255).round().tolist() == [upright[row, column].tolist()]
    with pytest.raises(ValueError, match=r"\[H, W\] of the image as it shows, \(2, 4\); got .*\(4"):
        Palette.from_image(image, mask=torch.ones(4, 2))


def test_alpha_is_weight(tmp_path: Path) -> None:
    pixels = np.array([[[255, 0, 0, 255], [0, 255, 0, 51], [0, 0, 255, 0]]], np.uint8)
    expected = {(1, 0, 0): 5 / 6, (0, 1, 0): 1 / 6}
    image = Image.fromarray(pixels)
    for given in (pixels, image, saved(tmp_path, image)):
        assert content(Palette.from_image(given)) == pytest.approx(expected)
    gray = Image.fromarray(np.array([[[255, 255], [51, 51], [9, 0]]], np.uint8), "LA")
    expected = {(1, 1, 1): 5 / 6, (51 / 255,) * 3: 1 / 6}
    assert_holds(Palette.from_image(saved(tmp_path, gray)), expected, 1e-7)


def indexed(transparency: int | bytes | None) -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2, 2]], np.uint8))
    image = image.convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 2])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("transparency", "expected"),
    [
        (None, {(1, 0, 0): 1 / 4, (0, 1, 0): 1 / 4, (0, 0, 1): 1 / 2}),
        (0, {(0, 1, 0): 1 / 3, (0, 0, 1): 2 / 3}),
        (bytes([255, 255, 0]), {(1, 0, 0): 1 / 2, (0, 1, 0): 1 / 2}),
        (bytes([255, 51]), {(1, 0, 0): 5 / 16, (0, 1, 0): 1 / 16, (0, 0, 1): 5 / 8}),
    ],
)
def test_transparency_of_indexed_images(
    transparency: int | bytes | None, expected: dict[tuple[float, ...], float], tmp_path: Path
) -> None:
    image = indexed(transparency)
    assert content(Palette.from_image(image)) == pytest.approx(expected)
    assert content(Palette.from_image(saved(tmp_path, image))) == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_transparent_color(mode: str, tmp_path: Path) -> None:
    image = Image.new(mode, (4, 1), "black")
    image.putpixel((0, 0), (255, 255, 255) if mode == "RGB" else 255)
    path = saved(tmp_path, image, transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert content(Palette.from_image(path)) == {(1, 1, 1): 1}
    assert len(Palette.from_image(image)) == 2


def test_palettes_with_alpha() -> None:
    image = Image.new("P", (2, 1), 1)
    image.putpalette([255, 0, 0, 255, 0, 0, 255, 0], "RGBA")
    image.putpixel((0, 0), 0)
    assert content(Palette.from_image(image)) == {(1, 0, 0): 1}
    image = Image.new("RGBa", (2, 1), (128, 0, 0, 128))
    assert content(Palette.from_image(image)) == {(1, 0, 0): 1}


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (3, 2), "white").convert("LA" if mode == "PA" else mode).convert(mode)
    assert_holds(Palette.from_image(image), {(1, 1, 1): 1}, 1e-6)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_gray_keeps_its_bits(name: str, tmp_path: Path) -> None:
    levels = np.array([[0, 1, 256], [32768, 65534, 65535]], np.uint16)
    path = saved(tmp_path, Image.fromarray(levels), name)
    expected = {(level / 65535,) * 3: 1 / 6 for level in levels.ravel().tolist()}
    for image in (path, Image.fromarray(levels), Image.fromarray(levels.astype(np.int32))):
        assert_holds(Palette.from_image(image), expected, 1e-7)


def test_16_bit_gray_with_a_transparent_level() -> None:
    image = Image.fromarray(np.array([[256, 257, 257]], np.uint16))
    image.info["transparency"] = 257  # as it comes from a file; not every Pillow writes it
    assert_holds(Palette.from_image(image), {(256 / 65535,) * 3: 1}, 1e-7)


def test_gray_without_a_known_white_is_refused() -> None:
    with pytest.raises(ImageError, match="can't read image: gray levels of more than 16 bits"):
        Palette.from_image(Image.fromarray(np.ones((2, 2), np.float32)))
    with pytest.raises(ImageError, match="can't read image: gray levels of more than 16 bits"):
        Palette.from_image(Image.fromarray(np.full((2, 2), 70000, np.int32)))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"can't read .*none\.png: .*No such file"):
        Palette.from_image(tmp_path / "none.png")
    path = tmp_path / "a.png"
    path.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"a\.png is not an image that Pillow can read"):
        Palette.from_image(str(path))
    with pytest.raises(ImageError, match=r"a\.png is not an image that Pillow can read"):
        Palette.from_image(torch.zeros(2, 2), mask=path)
    whole = saved(tmp_path, Image.effect_noise((64, 64), 50)).read_bytes()
    path.write_bytes(whole[:500])
    for image, name in ((path, r"a\.png"), (Image.open(path), "image")):
        with pytest.raises(ImageError, match=f"can't read .*{name}: ") as caught:
            Palette.from_image(image)
        assert "\n" not in str(caught.value)


def test_a_file_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ModuleNotFoundError, match=r"Pillow, which is not installed: pip install"):
        Palette.from_image("a.png")
    assert len(Palette.from_image(np.zeros((2, 2), np.uint8))) == 1
    assert list(content(Palette.from_colors(["#f00"]))) == [(1, 0, 0)]
    with pytest.raises(ValueError, match=r"or '#rgb' \(CSS names take Pillow.*got 'tomato'"):
        Palette.from_colors(["tomato"])


# ICC profiles.


WHITE = (0.9642, 1.0, 0.8249)  # D50, the white of profiles
# The primaries of sRGB and of Adobe RGB (1998), adapted to D50: columns are red, green, blue.
SRGB = np.array(
    [
        [0.4360747, 0.3850649, 0.1430804],
        [0.2225045, 0.7168786, 0.0606169],
        [0.0139322, 0.0971045, 0.7141733],
    ]
)
ADOBE = np.array(
    [
        [0.6097559, 0.2052401, 0.1492240],
        [0.3111242, 0.6256560, 0.0632197],
        [0.0194811, 0.0608902, 0.7448387],
    ]
)


def icc(
    space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ "
) -> bytes:
    """An ICC profile, version 2.4."""
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">2I", start + len(body), len(data))
        body += data
    header = struct.pack(">I4xI", start + len(body), 0x02400000) + kind + space + pcs
    header += bytes(12) + b"acsp" + bytes(28) + fixed(WHITE)
    return header.ljust(128, b"\0") + table + body


def fixed(numbers: tuple[float, ...]) -> bytes:
    return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))


def xyz(numbers: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(numbers)


def gamma(exponent: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


def rgb_profile(primaries: np.ndarray, exponent: float) -> bytes:
    tags = {b"wtpt": xyz(WHITE)}
    for name, column in zip((b"r", b"g", b"b"), primaries.T, strict=True):
        tags |= {name + b"XYZ": xyz(tuple(column)), name + b"TRC": gamma(exponent)}
    return icc(b"RGB ", tags)


def gray_profile(exponent: float) -> bytes:
    return icc(b"GRAY", {b"wtpt": xyz(WHITE), b"kTRC": gamma(exponent)})


def cmyk_profile() -> bytes:
    """Of inks of which black alone shows."""
    nodes = b"".join(
        bytes([0 if k else 255, 128, 128]) for *_, k in itertools.product((0, 1), repeat=4)
    )
    identity = fixed((1, 0, 0, 0, 1, 0, 0, 0, 1))
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + 4 * ramp + nodes + 3 * ramp
    return icc(b"CMYK", {b"wtpt": xyz(WHITE), b"A2B0": lut}, b"prtr", b"Lab ")


def srgb_encoded(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def with_profile(image: Image.Image, profile: bytes) -> Image.Image:
    image.info["icc_profile"] = profile
    return image


@pytest.mark.parametrize("source", ["file", "pillow"])
def test_wide_gamut_is_converted(source: str, tmp_path: Path) -> None:
    levels = [(128, 128, 128), (140, 120, 90), (100, 120, 160), (255, 255, 255)]
    image = Image.new("RGB", (4, 1))
    image.putdata(levels)
    profile = rgb_profile(ADOBE, 2.19921875)
    linear = (np.array(levels) / 255) ** 2.19921875 @ (np.linalg.inv(SRGB) @ ADOBE).T
    expected = {tuple(row): 1 / 4 for row in srgb_encoded(linear).clip(0, 1).tolist()}
    if source == "file":
        given = saved(tmp_path, image, icc_profile=profile)
    else:
        given = with_profile(image.copy(), profile)
    assert_holds(Palette.from_image(given), expected, 1.01 / 255)
    # That it is far from the values as they stand shows that the profile was used.
    plain = list(content(Palette.from_image(image)))
    assert np.abs(np.array(plain) - np.array(sorted(expected))).max() > 5 / 255


def test_primaries_that_trade_places() -> None:
    image = Image.new("RGB", (2, 1), (255, 0, 0))
    image.putpixel((0, 0), (0, 200, 0))
    swapped = rgb_profile(SRGB[:, ::-1], 2.2)
    blue, green = content(Palette.from_image(with_profile(image, swapped)))
    assert blue == pytest.approx((0, 0, 1), abs=0.02)
    assert green == pytest.approx((0, 200 / 255, 0), abs=0.02)


def test_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path, image, icc_profile=profile)
    assert Image.open(path).info["icc_profile"]
    assert same(Palette.from_image(path), Palette.from_image(image))


# A linear profile makes 128 of 255 look like 188, and 64 like 137.
@pytest.mark.parametrize(
    ("image", "profile", "expected"),
    [
        (Image.new("L", (1, 1), 128), gray_profile(1), (188, 188, 188)),
        (Image.new("L", (1, 1), 128), rgb_profile(SRGB, 1), (188, 188, 188)),
        (Image.new("1", (1, 1), 1), gray_profile(1), (255, 255, 255)),
        (Image.new("LA", (1, 1), (128, 9)), gray_profile(1), (188, 188, 188)),
        (Image.new("I;16", (1, 1), 128 * 257), gray_profile(1), (188, 188, 188)),
        (Image.new("I;16", (1, 1), 128 * 257), rgb_profile(SRGB, 1), (188, 188, 188)),
        (Image.new("I", (1, 1), 128 * 257), gray_profile(1), (188, 188, 188)),
        (Image.new("RGBA", (1, 1), (128, 64, 0, 9)), rgb_profile(SRGB, 1), (188, 137, 0)),
        (indexed(None).crop((1, 0, 2, 1)), rgb_profile(SRGB, 1), (0, 255, 0)),
        (Image.new("CMYK", (1, 1), (255, 99, 0, 0)), cmyk_profile(), (255, 255, 255)),
        (Image.new("CMYK", (1, 1), (0, 0, 0, 255)), cmyk_profile(), (0, 0, 0)),
    ],
)
def test_profiles_of_other_modes(
    image: Image.Image, profile: bytes, expected: tuple[int, ...]
) -> None:
    palette = Palette.from_image(with_profile(image.copy(), profile))
    assert_holds(palette, {tuple(level / 255 for level in expected): 1}, 1.01 / 255)


@pytest.mark.parametrize(
    ("white", "levels"),
    [(255, range(256)), (65535, range(0, 65536, 97)), (65535, range(0, 1024, 9))],
)
@pytest.mark.parametrize("exponent", [1.0, 1.8, 2.2])
def test_gray_profiles_are_right_in_the_darks_too(
    white: int, levels: range, exponent: float
) -> None:
    shares = np.array(levels) / white
    image = Image.fromarray(np.array([levels], np.uint8 if white == 255 else np.uint16))
    gray = Palette.from_image(with_profile(image, gray_profile(exponent)))
    # The profile holds its exponent in 256ths.
    expected = srgb_encoded(shares ** (round(exponent * 256) / 256))
    counts = (gray.weights * len(levels)).round().long()
    found = gray.colors[:, 0].repeat_interleave(counts)
    assert torch.equal(gray.colors[:, 0], gray.colors[:, 2])
    assert np.abs(found.numpy() - expected).max() < 0.8 / 255
    if levels.stop == 65536:
        assert len(gray) > 2 * 256  # more than 8 bits could hold


def test_profile_leaves_alpha_alone(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (128, 128, 128, 51))
    image.putpixel((0, 0), (0, 0, 0, 255))
    path = saved(tmp_path, image, icc_profile=rgb_profile(SRGB, 1))
    expected = {(0, 0, 0): 5 / 6, (188 / 255,) * 3: 1 / 6}
    assert_holds(Palette.from_image(path), expected, 1e-6)


@pytest.mark.parametrize(
    ("mode", "profile", "message"),
    [
        ("RGB", b"junk", "ICC profile of {} can't be used"),
        ("RGB", rgb_profile(SRGB, 1)[:200], "ICC profile of {} can't be used"),
        ("RGB", icc(b"RGB ", {}), "ICC profile of {} can't be used"),
        ("L", icc(b"GRAY", {b"wtpt": xyz(WHITE)}), "ICC profile of {} can't be used"),
        ("RGB", gray_profile(1), "{} has pixels of mode RGB and an ICC profile for GRAY"),
        ("RGBA", gray_profile(1), "{} has pixels of mode RGBA and an ICC profile for GRAY"),
        ("RGB", cmyk_profile(), "{} has pixels of mode RGB and an ICC profile for CMYK"),
        ("CMYK", rgb_profile(SRGB, 1), "{} has pixels of mode CMYK and an ICC profile for RGB"),
    ],
)
def test_profiles_that_cannot_be_used(
    mode: str, profile: bytes, message: str, tmp_path: Path
) -> None:
    image = Image.new(mode, (2, 2))
    path = saved(tmp_path, image, "a.tif", icc_profile=profile)
    for given, name in ((path, re.escape(str(path))), (with_profile(image, profile), "image")):
        with pytest.raises(ImageError, match=message.format(name) + ".*: remove it"):
            Palette.from_image(given)


# Masks.


@pytest.mark.parametrize(
    "kind",
    [
        "bool",
        "uint8",
        "int64",
        "float16",
        "float64",
        "array",
        "1",
        "L",
        "RGB",
        "LA",
        "I;16",
        "F",
        "file",
    ],
)
def test_masks_of_every_kind(kind: str, tmp_path: Path) -> None:
    image = torch.randint(0, 3, (4, 5, 3), dtype=torch.uint8)
    keep = torch.rand(4, 5) < 0.4
    white = keep.numpy().astype(np.uint8) * 255
    mask: object
    if kind == "array":
        mask = keep.numpy()
    elif kind == "file":
        mask = saved(tmp_path, Image.fromarray(white))
    elif kind == "I;16":
        mask = Image.fromarray(white.astype(np.uint16))
    elif kind in ("1", "L", "RGB", "LA", "F"):
        mask = Image.fromarray(white).convert(kind)
    else:
        mask = keep.to(getattr(torch, kind))
    assert same(Palette.from_image(image, mask), Palette.from_image(image[keep][None]))


def test_mask_weighs() -> None:
    image = torch.tensor([[RED, GREEN, BLUE]])
    expected = {(1, 0, 0): 5 / 6, (0, 1, 0): 1 / 6}
    levels = np.array([[255, 51, 0]], np.uint8)
    transparent = np.stack([np.full_like(levels, 255), levels], -1)
    for mask in (
        levels,
        torch.tensor([[10.0, 2.0, 0.0]], requires_grad=True),
        Image.fromarray(levels),
        Image.fromarray(transparent, "LA"),
    ):
        assert content(Palette.from_image(image, mask=mask)) == pytest.approx(expected)


def test_mask_multiplies_alpha() -> None:
    image = torch.tensor([[[*RED, 0.5], [*GREEN, 1.0], [*BLUE, 0.0], [*BLUE, 1.0]]])
    mask = torch.tensor([[255, 51, 255, 0]], dtype=torch.uint8)
    expected = {(1, 0, 0): 5 / 7, (0, 1, 0): 2 / 7}
    assert content(Palette.from_image(image, mask)) == pytest.approx(expected)


def test_mask_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # what is stored as the top left shows at the top right
    stored = np.zeros((2, 4), np.uint8)
    stored[0, 0] = 255
    mask = saved(tmp_path, Image.fromarray(stored), exif=exif)
    image = torch.zeros(4, 2, 3)
    image[0, 1] = torch.tensor(GREEN)
    assert content(Palette.from_image(image, mask)) == {(0, 1, 0): 1}


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(5, 4), ValueError, r"mask must be \[H, W\].*\(4, 5\); got shape \(5, 4\)"),
        (Image.new("L", (4, 5)), ValueError, r"mask must be.*\(4, 5\); got shape \(5, 4\)"),
        (torch.ones(1, 4, 5), ValueError, r"mask must be.*\(4, 5\); got shape \(1, 4, 5\)"),
        (torch.zeros(4, 5), ValueError, r"mask must not be zero everywhere; got shape \(4, 5\)"),
        (Image.new("L", (5, 4)), ValueError, "mask must not be zero everywhere"),
        (torch.full((4, 5), -1), ValueError, "mask must be non-negative and finite.*-1.0"),
        (torch.full((4, 5), torch.nan), ValueError, "mask must be non-negative and finite.*nan"),
        (torch.ones(4, 5).cfloat(), TypeError, "mask must be real; got torch.complex64"),
        (np.full((4, 5), "a"), TypeError, "mask must be of a dtype that PyTorch has"),
        ([[1]], TypeError, "mask must be an array.*got list"),
    ],
)
def test_bad_masks(mask: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Palette.from_image(torch.zeros(4, 5, 3), mask=mask)


def test_mask_that_leaves_what_is_transparent() -> None:
    image = torch.tensor([[[*RED, 0.0], [*GREEN, 1.0]]])
    with pytest.raises(ValueError, match="mask must leave a visible pixel; it is zero wherever"):
        Palette.from_image(image, mask=torch.tensor([[True, False]]))


# max_colors.


def variance(palette: Palette) -> float:
    colors, weights = palette.colors.double(), palette.weights
    return (weights @ (colors - weights @ colors) ** 2).sum().item()


@pytest.mark.parametrize("name", ["coffee", "noise", "skewed", "gray"])
def test_fewer_colors_keep_the_mean_and_move_no_further_than_promised(name: str) -> None:
    image = {
        "coffee": lambda: read(find("coffee"))[::6, ::6],
        "noise": lambda: torch.rand(60, 60, 3),
        "skewed": lambda: torch.rand(60, 60, 3) ** 20,
        "gray": lambda: torch.rand(60, 60),
    }[name]()
    mask = torch.rand(image.shape[:2]) ** 4
    whole = Palette.from_image(image, mask)
    mean = whole.weights @ whole.colors.double()
    moved = []
    for count in (1, 2, 3, 7, 64, 500):
        palette = Palette.from_image(image, mask, max_colors=count)
        content(palette)
        assert len(palette) == count
        torch.testing.assert_close(
            palette.weights @ palette.colors.double(), mean, atol=1e-6, rtol=0
        )
        assert (palette.colors >= whole.colors.amin(0)).all()
        assert (palette.colors <= whole.colors.amax(0)).all()
        # The mean squared distance, and what it promises to each color: the nearest color left is
        # at most as far as the one that it moved to.
        moved.append(variance(whole) - variance(palette))
        nearest = torch.cdist(whole.colors.double(), palette.colors.double()).amin(1)
        assert (nearest <= (moved[-1] / whole.weights).sqrt() + 1e-6).all()
        assert whole.weights @ nearest**2 <= moved[-1] + 1e-7
        # Of the squared Wasserstein-2 distance, the sliced one in three dimensions is a third at
        # most along orthogonal directions.
        sliced = sliced_wasserstein(
            whole.colors,
            palette.colors,
            p=2,
            directions=torch.eye(3),
            weights_x=whole.weights,
            weights_y=palette.weights,
            reduction="sum",
        )
        assert sliced <= moved[-1] + 1e-6
    assert moved == sorted(moved, reverse=True)
    assert moved[0] == pytest.approx(variance(whole), rel=1e-6)
    assert moved[-1] < 0.02 * moved[0]


def test_uniform_noise_is_cut_nearly_as_well_as_a_grid() -> None:
    image = torch.rand(200, 200, 3)
    lost = variance(Palette.from_image(image)) - variance(Palette.from_image(image, max_colors=512))
    # A grid of 8 x 8 x 8 cells has 3 channels of variance (1/8)²/12.
    assert 3 / 64 / 12 * 0.9 < lost < 3 / 64 / 12 * 1.3


def test_clusters_are_found() -> None:
    centers = torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.2, 0.3], [0.1, 0.8, 0.9]])
    members = torch.tensor([0] * 600 + [1] * 250 + [2] * 150)
    points = centers[members] + 0.02 * torch.randn(1000, 3)
    palette = Palette.from_image(points[None], max_colors=3)
    expected = {
        tuple(points[members == i].mean(0).tolist()): (members == i).sum().item() / 1000
        for i in range(3)
    }
    assert_holds(palette, expected, 1e-6)


def test_weights_decide_where_boxes_are_cut() -> None:
    # Of four grays, the cut falls below the mean, which the weights move.
    image = torch.tensor([[0.0, 0.2, 0.6, 1.0]])
    assert_holds(Palette.from_image(image, max_colors=2), {(0.1,) * 3: 0.5, (0.8,) * 3: 0.5}, 1e-6)
    heavy = torch.tensor([[1, 1, 1, 97]])
    assert_holds(
        Palette.from_image(image, heavy, max_colors=2),
        {(0.8 / 3,) * 3: 0.03, (1.0,) * 3: 0.97},
        1e-6,
    )


def test_enough_colors_are_left_as_they_are() -> None:
    image = torch.randint(0, 3, (30, 30, 3), dtype=torch.uint8)
    whole = Palette.from_image(image)
    assert len(whole) == 27
    for count in (27, 28, 10**9):
        assert same(Palette.from_image(image, max_colors=count), whole)
    assert len(Palette.from_image(image, max_colors=26)) == 26


def test_reduced_is_what_an_image_gives_with_fewer() -> None:
    image = torch.randint(0, 9, (30, 30, 3), dtype=torch.uint8)
    whole = Palette.from_image(image)
    for count in (1, 7, 300):
        assert same(whole.reduced(count), Palette.from_image(image, max_colors=count))
    assert whole.reduced(len(whole)) is whole
    with pytest.raises(ValueError, match="max_colors"):
        whole.reduced(0)


def test_fewer_colors_are_the_same_each_time() -> None:
    image = torch.rand(50, 50, 3)
    image[:25] = image[25:]  # ties
    one, two = (Palette.from_image(image, max_colors=33) for _ in range(2))
    assert same(one, two)
    shuffled = image.reshape(-1, 3)[torch.randperm(2500)].reshape(50, 50, 3)
    assert same(one, Palette.from_image(shuffled, max_colors=33))


def test_the_box_with_more_weight_is_cut_first() -> None:
    # Both pairs are apart after one cut. The light one is the wider, the heavy one spreads more.
    image = torch.tensor([[0.0, 0.12, 0.8, 0.96]])
    mask = torch.tensor([[45, 45, 5, 5]])
    expected = {(0.0,) * 3: 0.45, (0.12,) * 3: 0.45, (0.88,) * 3: 0.1}
    assert_holds(Palette.from_image(image, mask, max_colors=3), expected, 1e-6)


def test_cutting_survives_extremes() -> None:
    close = 0.3 + torch.arange(3) * 2.0**-24
    image = torch.cartesian_prod(close, close, torch.tensor([0.0, 1e-45, 1e-30]))[None]
    mask = torch.logspace(0, -300, image.shape[1], dtype=torch.float64)[None]
    for weights in (None, mask, mask.flip(1)):
        for count in range(1, image.shape[1]):
            palette = Palette.from_image(image, weights, max_colors=count)
            assert 1 <= len(palette) <= count
            content(palette)


def test_cutting_survives_means_that_round_beyond_the_least() -> None:
    for v in torch.rand(200).tolist():
        image = torch.tensor([[[v, 0, 0], [v, 1e-20, 0], [v + 2**-23, 0, 0]]])
        mask = torch.rand(1, 3, dtype=torch.float64) * torch.tensor([1, 1, 1e-18]).double()
        assert len(Palette.from_image(image.clamp(max=1), mask, max_colors=2)) == 2


def test_cutting_is_not_led_astray_by_rounding() -> None:
    # The mean of equal reds may differ from them, by more than the blues do from one another.
    for v in torch.rand(50).tolist():
        image = torch.tensor([[[v, v, 0], [v, v, 1e-30], [v, v, 3e-30], [1, 1, 1]]])
        assert len(Palette.from_image(image, torch.rand(1, 4), max_colors=3)) == 3


def test_cutting_stops_where_no_spread_can_be_told() -> None:
    image = torch.tensor([[[0, 0, 0], [0, 0, 1e-45], [0, 0, 3e-45], [1, 1, 1]]])
    mask = torch.tensor([[1e-300, 1e-300, 1e-300, 1]], dtype=torch.float64)
    assert len(Palette.from_image(image, mask)) == 4
    assert len(Palette.from_image(image, mask, max_colors=3)) == 2


@pytest.mark.parametrize(
    ("max_colors", "error", "message"),
    [
        (0, ValueError, "max_colors must be at least 1; got 0"),
        (-3, ValueError, "max_colors must be at least 1; got -3"),
        (2.0, TypeError, "max_colors must be an int or None; got float"),
        (True, TypeError, "max_colors must be an int or None; got bool"),
        ("8", TypeError, "max_colors must be an int or None; got str"),
    ],
)
def test_bad_max_colors(max_colors: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Palette.from_image(torch.zeros(2, 2), max_colors=max_colors)


# Lists of colors.


@pytest.mark.parametrize(
    ("color", "expected"),
    [
        ("#ff8000", (255, 128, 0)),
        ("FF8000", (255, 128, 0)),
        ("#Ff80aB", (255, 128, 171)),
        ("#f80", (255, 136, 0)),
        ("f8A", (255, 136, 170)),
        ("tomato", (255, 99, 71)),
        ("Tomato", (255, 99, 71)),
        ((255, 128, 0), (255, 128, 0)),
        ([1, 0, 0], (1, 0, 0)),
        ((1.0, 0.5, 0.0), (255, 127.5, 0)),
        (np.array([255, 128, 0], np.uint8), (255, 128, 0)),
        (tuple(np.array([1, 0.5, 0], np.float32)), (255, 127.5, 0)),
        (torch.tensor([1, 0.5, 0]), (255, 127.5, 0)),
    ],
)
def test_what_colors_may_be_called(color: object, expected: tuple[float, ...]) -> None:
    expected = {tuple(level / 255 for level in expected): 1}
    assert_holds(Palette.from_colors([color]), expected, 1e-7)


def test_listed_colors_and_weights() -> None:
    colors = ["#00f", (255, 0, 0), (0.0, 1.0, 0.0), "0000FF"]
    expected = {(0, 0, 1): 0.5, (1, 0, 0): 0.3, (0, 1, 0): 0.2}
    for weights in ([1, 3, 2, 4], (0.1, 0.3, 0.2, 0.4), torch.tensor([1, 3, 2, 4])):
        assert content(Palette.from_colors(colors, weights)) == pytest.approx(expected)
    assert content(Palette.from_colors(iter(colors))) == pytest.approx(
        {(0, 0, 1): 0.5, (1, 0, 0): 0.25, (0, 1, 0): 0.25}
    )
    assert len(Palette.from_colors(["red", "lime", "blue"], [1, 0, 1])) == 2


def test_rows_of_arrays_are_colors() -> None:
    rows = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
    expected = Palette.from_colors(["#f00", "#00f"])
    for colors in (rows, torch.from_numpy(rows), rows / 255, torch.from_numpy(rows / 255)):
        assert same(Palette.from_colors(colors), expected)


@pytest.mark.parametrize(
    ("colors", "error", "message"),
    [
        ("#ff0000", TypeError, r"colors must be a list.*got a string: pass \['#ff0000'\]"),
        (7, TypeError, "colors must be a list of colors; got int"),
        ([], ValueError, "colors must hold at least one color"),
        (["#fff", "#12345"], ValueError, r"colors\[1\] must be '#rrggbb'.*got '#12345'"),
        (["#ggg"], ValueError, r"colors\[0\] must be .*got '#ggg'"),
        (["##fff"], ValueError, "got '##fff'"),
        (["#ff0000ff"], ValueError, "got '#ff0000ff'"),
        ([" #fff"], ValueError, "got ' #fff'"),
        ([""], ValueError, "got ''"),
        (["rgb(1, 2, 3)"], ValueError, r"a CSS name; got 'rgb\(1, 2, 3\)'"),
        (["no color"], ValueError, "a CSS name; got 'no color'"),
        ((255, 0, 0), TypeError, r"colors\[0\] must be a string or red, green and blue; got int"),
        ([None], TypeError, r"colors\[0\] must be .*got NoneType"),
        ([b"fff"], TypeError, r"colors\[0\] must be .*got bytes"),
        ([("#fff", "#000", "#888")], TypeError, r"colors\[0\].*as numbers; got \('#fff'"),
        ([(True, False, True)], TypeError, r"as numbers; got \(True"),
        ([(1, 2)], ValueError, r"colors\[0\] must have three channels.*got \(1, 2\)"),
        ([(1, 2, 3, 4)], ValueError, r"three channels.*got \(1, 2, 3, 4\)"),
        ([(1, 0.5, 0)], ValueError, r"colors\[0\].*or three floats.*got a mix: \(1, 0.5, 0\)"),
        ([(256, 0, 0)], ValueError, r"colors\[0\]: ints must be 0 to 255; got \(256, 0, 0\)"),
        ([(-1, 0, 0)], ValueError, "ints must be 0 to 255"),
        ([(255.0, 0.0, 0.0)], ValueError, r"floats must be 0 to 1; got \(255\.0"),
        ([(float("nan"), 0.0, 0.0)], ValueError, r"floats must be 0 to 1; got \(nan"),
    ],
)
def test_what_is_no_color(colors: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Palette.from_colors(colors)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1], ValueError, r"weights must be of shape \(2,\); got shape \(1,\)"),
        ([1, -1], ValueError, "weights must be non-negative"),
        ([0, 0], ValueError, "weights must not be zero everywhere"),
        (["a", "b"], TypeError, r"weights must be a sequence of numbers.*got \['a'"),
        (5, TypeError, "weights must be a sequence of numbers.*got 5"),
    ],
)
def test_bad_listed_weights(weights: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Palette.from_colors(["#000", "#fff"], weights)


# The object.


def test_repr() -> None:
    palette = Palette.from_colors(["#102030", "#abc", "red", "#fff"], [3, 2, 1, 2])
    assert repr(palette) == (
        "Palette(4 colors: #102030 37.5%, #aabbcc 25%, #ffffff 25%, ...; device='cpu')"
    )
    assert repr(Palette.from_colors(["#102030"])) == "Palette(1 color: #102030 100%; device='cpu')"
    latents = Palette(torch.tensor([[-1.25, 0, 3]]))
    assert repr(latents) == "Palette(1 color: (-1.25, 0, 3) 100%; device='cpu')"
    assert "\n" not in repr(Palette(torch.rand(10000, 3)))


def test_to_the_same_device_is_itself() -> None:
    palette = Palette.from_colors(["red", "blue"])
    assert palette.to("cpu") is palette and palette.to(torch.device("cpu")) is palette
    assert palette.device == torch.device("cpu")
    elsewhere = palette.to("meta")
    assert elsewhere is not palette and elsewhere.device == elsewhere.weights.device
    assert elsewhere.device.type == "meta" and len(elsewhere) == 2
    assert elsewhere.colors.dtype == torch.float32 and elsewhere.weights.dtype == torch.float64


@pytest.mark.parametrize(
    ("device", "error"), [("gpu", ValueError), ("cuda:x", ValueError), (0.5, TypeError)]
)
def test_bad_device(device: object, error: type[Exception]) -> None:
    palette = Palette.from_colors(["red"])
    makers: list[Callable[[], object]] = [
        lambda: palette.to(device),
        lambda: Palette.from_colors(["red"], device=device),
        lambda: Palette.from_image(torch.zeros(2, 2), device=device),
    ]
    for make in makers:
        with pytest.raises(error, match="device must"):
            make()
    with pytest.raises(TypeError, match=r"device must.*NoneType"):
        palette.to(None)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    image = torch.rand(20, 30, 3)
    here = Palette.from_image(image, mask=torch.ones(20, 30).cuda())
    there = Palette.from_image(image.cuda())
    assert there.device.type == "cuda" and there.weights.device == there.device
    assert same(there.to("cpu"), here)
    assert here.to("cuda").device == there.device and there.to("cuda") is there
    assert Palette.from_image(image.cuda(), device="cpu").device.type == "cpu"
    assert Palette.from_image(image, device="cuda").device == there.device
    assert Palette.from_colors(["red"], device="cuda").weights.is_cuda
    assert Palette(image[0].cuda(), torch.ones(30)).colors.is_cuda


def test_copies_and_pickles() -> None:
    palette = Palette.from_colors(["red", "blue"], [1, 2])
    for other in (copy.deepcopy(palette), pickle.loads(pickle.dumps(palette))):
        assert same(other, palette) and repr(other) == repr(palette)


def test_read_only() -> None:
    palette = Palette.from_colors(["red"])
    with pytest.raises(AttributeError):
        palette.colors = torch.zeros(1, 3)
    with pytest.raises(AttributeError):
        palette.weights = torch.ones(1)


def test_surroundings_do_not_matter(tmp_path: Path) -> None:
    rgba = np.random.default_rng(0).integers(0, 3, (6, 7, 4)).astype(np.uint8)
    image = saved(tmp_path, Image.fromarray(rgba), "image.png")
    mask = saved(tmp_path, Image.fromarray(rgba[..., 3]), "mask.png")
    deep = Image.fromarray(rgba[..., 0].astype(np.uint16))

    def made() -> list[Palette]:
        return [
            Palette.from_image(image, mask, max_colors=5),
            Palette.from_image(deep),
            Palette.from_colors(["red", (0, 7, 9), (0.1, 0.2, 0.3)], [1, 2, 3]),
        ]

    expected = made()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            found = made()
    finally:
        torch.set_default_dtype(before)
    assert all(map(same, found, expected))
    # Autograd refuses to save tensors of inference mode for a backward pass.
    x = torch.rand(2, 3, requires_grad=True)
    (x @ found[0].colors.T).sum().backward()
    assert x.grad is not None


def test_importing_needs_no_pillow() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import sdcore.palette; "
        "print(sorted({'PIL', 'sdcore.images', 'diffusers'} & (set(sys.modules) - before)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.strip() == "[]"


def test_keeps_the_latest_only() -> None:
    palette, made = Palette.from_colors(["#000", "#fff"]), []

    def make() -> tuple[torch.Tensor]:
        made.append(None)
        return (torch.tensor(len(made)),)

    def kept(directions: torch.Tensor, setting: int) -> float:
        return palette.kept(directions, setting, make)[0].item()

    first, second = torch.rand(3, 3), torch.rand(3, 3)
    assert [kept(first, 1) for _ in range(3)] == [1, 1, 1]
    assert kept(first, 2) == 2
    assert kept(first, 1) == 3
    assert kept(second, 1) == 4
    assert kept(first, 1) == 5
    first.mul_(2)
    assert [kept(first, 1) for _ in range(2)] == [6, 6]
    with torch.inference_mode():
        unknown = torch.rand(3, 3)
    assert [kept(unknown, 1) for _ in range(2)] == [7, 8]
