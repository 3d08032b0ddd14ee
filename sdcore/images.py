"""Pictures as tensors: files and sample photos in, files out."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

# Photos inside the wheels of scikit-image and scikit-learn, which install without downloads.
PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
# Those that every Pillow writes.
WRITABLE = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")


class ImageError(ValueError):
    """An image can't be found, read or written; the message is one line for the user."""


def find(name: str) -> Path:
    """The file of the photo or, if no photo is called that, of the path ``name``.

    Raises:
        ImageError: there is no such file, or the package that brings the photo is missing.
    """
    if name not in PHOTOS:
        path = Path(name)
        if not path.is_file():
            kind = "a directory" if path.is_dir() else "neither a file nor a sample photo"
            raise ImageError(f"{name!r} is {kind} (the photos: {', '.join(PHOTOS)})")
        return path
    package, file = PHOTOS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImageError(
            f"the photo {name!r} comes with {DISTRIBUTIONS[package]}, which is not installed: "
            "pip install 'sdcore[cli]', or name a file"
        )
    path = Path(spec.submodule_search_locations[0], file)
    if not path.is_file():
        raise ImageError(f"this {DISTRIBUTIONS[package]} lacks the photo {name!r}: name a file")
    return path


def read(path: Path) -> Tensor:
    """An image file as RGB, [H, W, 3], float32 in [0, 1].

    Turned as its EXIF orientation says, laid on white where it is transparent, gray repeated for
    each channel. 16-bit gray keeps its 16 bits. Of several frames, the first.

    Raises:
        ImageError: it can't be read.
    """
    with opened(path, str(path)) as image:
        levels = gray_levels(image)
        if levels is None:
            pixels = np.asarray(_on_white(image)).astype(np.float32) / 255
        else:
            gray = levels.astype(np.float32) / 65535
            pixels = np.repeat(gray[..., None], 3, axis=-1)
    return torch.from_numpy(pixels)


@contextlib.contextmanager
def opened(source: Path | Image.Image, name: str) -> Iterator[Image.Image]:
    """Pillow's image of a file, or a given one, turned as its EXIF orientation says.

    Raises:
        ImageError: it can't be read. What Pillow and NumPy raise within the block becomes one too:
            Pillow decodes, and finds a file damaged, when the pixels are asked for. ``name`` is
            what the message calls the image.
        ModuleNotFoundError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "reading images takes Pillow, which is not installed: pip install pillow", name="PIL"
        ) from None

    try:
        if isinstance(source, Image.Image):
            yield ImageOps.exif_transpose(source)
        else:
            with Image.open(source) as file:
                yield ImageOps.exif_transpose(file)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name} is not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"can't read {name}: {_one_line(error)}") from error


def gray_levels(image: Image.Image) -> np.ndarray | None:
    """The levels of a gray image of 16 bits, uint16 [H, W]; None where it is of another kind.

    Raises:
        ValueError: it is gray of a kind whose white isn't known: of more bits, or floating-point.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return None
    levels = np.asarray(image)
    # Pillow gives some 16-bit files as 32-bit integers ("I"). Wider ranges, and floating point
    # ("F"), have no white that is known.
    if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
        raise ValueError("gray levels of more than 16 bits or in floating point")
    return levels.astype(np.uint16)


def fit(image: Tensor, size: int) -> Tensor:
    """The image reduced so that its longer side has at most ``size`` pixels.

    In floating point: pixels that lie between two 8-bit levels stay there, and smooth areas have
    more colors than they had before.
    """
    height, width = image.shape[:2]
    scale = size / max(height, width)
    if scale >= 1:
        return image
    shape = [max(1, round(height * scale)), max(1, round(width * scale))]
    planes = image.permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(planes, shape, mode="bicubic", antialias=True)
    return small[0].permute(1, 2, 0).clamp(0, 1).contiguous()


def quantize(image: Tensor) -> Tensor:
    """The image as 8 bits per channel show it, in [0, 1] still."""
    return (image * 255).round() / 255


def check_writable(path: Path) -> None:
    """Raise ``ImageError`` where ``write`` would; leaves no trace."""
    if path.suffix.lower() not in WRITABLE:
        raise ImageError(f"{path} must end in one of {', '.join(WRITABLE)}")
    check_creatable(path)


def check_creatable(path: Path) -> None:
    """Raise ``ImageError`` where a file can't be created or replaced; leaves no trace."""
    new = not path.exists()
    try:
        # Permissions, read-only disks and missing folders: only trying tells.
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise ImageError(f"can't write {path}: {error.strerror or error}") from error


def write(image: Tensor, path: Path) -> None:
    """Write [H, W, 3] in [0, 1] as 8 bits per channel, in the format that the suffix names.

    Raises:
        ImageError: it can't be written.
    """
    from PIL import Image

    pixels = (image * 255).round().to("cpu", torch.uint8).numpy()
    try:
        Image.fromarray(pixels).save(path, quality=95)
    except OSError as error:
        raise ImageError(f"can't write {path}: {_one_line(error)}") from error


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
