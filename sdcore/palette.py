"""Palettes: the colors of an image, or of a brand, as weighted points."""

from __future__ import annotations

import heapq
import io
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# How many colors __repr__ names.
NAMED = 3
# LittleCMS's cmsFLAGS_NOOPTIMIZE; older Pillows have no name for it.
NO_OPTIMIZATION = 0x0100


class Palette:
    """Colors and how much there is of each: a weighted set of distinct points.

    Made once, from an image (:meth:`from_image`), from a list of colors (:meth:`from_colors`) or
    from tensors, and then given to :func:`sdcore.ops.sliced_wasserstein` in the place of a tensor
    of points.

    Args:
        colors: [k, 3], floating-point, on any device, any strides. Values must be finite in
            float32, to which they are rounded, and have no range: points of another color space,
            or of latents, are as good. Rows that are equal become one (−0 equals 0).
        weights: [k], real, non-negative, finite and not all zero, in any unit; None means equal
            weights. Equal rows add theirs; rows of weight zero are dropped.

    Rows come out in lexicographic order, so that two palettes of one content hold equal colors
    whatever order they came in. Both tensors are plain data: no gradient flows to the arguments,
    and nothing that is done to the arguments later shows in the palette.

    The work is done on the CPU; a tensor on a GPU is waited for. The palette lives on the device
    of ``colors``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: another shape, or values that the above rules out; the message names the
            argument.
    """

    def __init__(self, colors: Tensor, weights: Tensor | None = None) -> None:
        points = _checked_points(colors)
        if weights is not None:
            weights = _checked_weights("weights", weights, points.shape[:1])
        self._hold(*_merge(points, weights), colors.device)

    @classmethod
    def from_image(
        cls,
        image: str | os.PathLike[str] | Image.Image | np.ndarray | Tensor,
        mask: str | os.PathLike[str] | Image.Image | np.ndarray | Tensor | None = None,
        max_colors: int | None = None,
        device: torch.device | str | None = None,
    ) -> Palette:
        """The colors of an image, each weighted by the number of pixels that show it.

        Args:
            image: one of

                - a file that Pillow reads, or an image of Pillow's. Turned as its EXIF orientation
                  says. An embedded ICC profile is applied (to sRGB, perceptual intent); without
                  one, values are taken as sRGB, and CMYK is converted by formula. Alpha, also
                  that of indexed images, is weight: a transparent pixel counts for nothing, a half
                  transparent one for half a pixel. Gray is repeated for each channel, and keeps
                  16 bits where it has them. Of several frames, the current one, which in a file
                  is the first.
                - a NumPy array, [H, W], [H, W, 3] or [H, W, 4], the fourth channel being alpha:
                  uint8 or uint16, of which 255 and 65535 mean 1, or floating-point in [0, 1].
                - a tensor of these dtypes, on any device, in these shapes or in PyTorch's order,
                  [3, H, W] or [4, H, W]. Where both ends could be the channels, the last is.

            mask: [H, W], how much each pixel counts, as an array or tensor of any real dtype
                (bool included), non-negative and finite; or a file or image of Pillow's, read as
                gray, times its alpha. H and W are those of the image as it shows, after turning.
                Only ratios matter: 0 and 255, 0 and 1, False and True all say the same. It
                multiplies the alpha of the image.
            max_colors: at least 1: the most colors to keep, by weighted median cut. Starting with
                all colors in one box, the box with the most weighted variance along one channel
                is split there, at its weighted mean, until there are ``max_colors`` boxes; each
                becomes the weighted mean of its colors. None keeps all.
            device: where the palette goes; None: to that of a tensor ``image``, else to the CPU.

        What ``max_colors`` does to the palette: the weighted mean over all stays (to float32).
        A color goes to a place within the bounding box of those it is merged with. The mean of
        the squared distance that colors move, by weight, is D = V − V', the weighted variance of
        all colors less that of the palette, summed over channels. So no color of weight w moves
        further than sqrt(D / w), and D bounds the squared Wasserstein-2 distance between the two.
        D never rises with ``max_colors``.

        Colors are equal when they are exactly so. Floating-point images, and resized ones most of
        all, may have as many colors as pixels.

        Cost: O(n log n) for n pixels; ``max_colors`` adds O(k log ``max_colors``) for the k
        distinct colors, more where they spread very unevenly, and some 0.2 ms per color kept.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: another shape, such as that of a batch; floating-point values outside of
                [0, 1] or NaN; a mask of another size or that leaves nothing; an image that is
                transparent throughout; ``max_colors`` below 1. The message names the argument.
            sdcore.images.ImageError: a ValueError: a file that can't be read, or an ICC profile
                that is damaged or is not for such pixels.
            ModuleNotFoundError: ``image`` or ``mask`` is a file, and Pillow is not installed.
        """
        _check_max_colors(max_colors)
        target = _checked_device(device)
        if target is None:
            target = image.device if isinstance(image, Tensor) else torch.device("cpu")
        pixels, alpha = _pixels(image)
        if alpha is not None and not alpha.any():
            raise ValueError("image must have a visible pixel; its alpha is zero everywhere")
        weights = alpha
        if mask is not None:
            weights = _mask_weights(mask, pixels.shape[:2])
            if alpha is not None:
                weights = weights * alpha
                if not weights.any():
                    raise ValueError(
                        "mask must leave a visible pixel; it is zero wherever image is not "
                        "transparent"
                    )
        if weights is not None:
            weights = weights.reshape(-1)
        colors, weights = _merge(pixels.reshape(-1, 3), weights)
        if max_colors is not None and len(colors) > max_colors:
            colors, weights = _merge(*_box_means(colors, weights, max_colors))
        return cls._of(colors, weights, target)

    @classmethod
    def from_colors(
        cls,
        colors: Iterable[str | Sequence[float]],
        weights: Sequence[float] | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Palette:
        """A palette of listed colors, such as a brand's.

        Args:
            colors: any number of them, each

                - ``"#rrggbb"`` or ``"#rgb"``, in either case, with or without the ``#``;
                - a CSS name such as ``"tomato"``, where Pillow is installed;
                - red, green and blue as three ints, 0 to 255, or as three floats, 0 to 1. The
                  kind of number decides: ``(1, 0, 0)`` is nearly black, ``(1.0, 0.0, 0.0)`` red.

            weights: one per color, as the constructor takes them; a sequence of numbers will do.
            device: where the palette goes; None: to the CPU.

        Raises:
            TypeError: an argument of the wrong type, such as one string in place of a list.
            ValueError: no colors, a string that is no color, numbers out of range, ints and floats
                in one color, or weights that don't fit. The message names the argument.
        """
        target = _checked_device(device)
        if isinstance(colors, str):
            raise TypeError(f"colors must be a list of colors; got a string: pass [{colors!r}]")
        if not isinstance(colors, Iterable):
            raise TypeError(f"colors must be a list of colors; got {type(colors).__name__}")
        triples = [_parsed(f"colors[{i}]", color) for i, color in enumerate(colors)]
        if not triples:
            raise ValueError("colors must hold at least one color; got none")
        if weights is not None:
            weights = _listed_weights(weights, len(triples))
        points = torch.tensor(triples, dtype=torch.float32, device="cpu")
        return cls._of(*_merge(points, weights), target or torch.device("cpu"))

    @property
    def colors(self) -> Tensor:
        """[k, 3], float32: distinct rows in lexicographic order. Not to be written to."""
        return self._colors

    @property
    def weights(self) -> Tensor:
        """[k], float64: positive, with sum one. Not to be written to."""
        return self._weights

    @property
    def has_equal_weights(self) -> bool:
        """Whether there is as much of each color. Known without a look at the device."""
        return self._equal

    @property
    def device(self) -> torch.device:
        return self._colors.device

    def to(self, device: torch.device | str) -> Palette:
        """This palette on ``device``: itself if it is there, else a copy."""
        colors = self._colors.to(_checked_device(device, optional=False))
        if colors is self._colors:
            return self
        return self._of(colors, self._weights, colors.device, self._equal)

    def reduced(self, max_colors: int) -> Palette:
        """At most so many colors, in the way that ``max_colors`` of :meth:`from_image` has it.

        Raises:
            TypeError, ValueError: ``max_colors`` is no int of 1 or more.
        """
        _check_max_colors(max_colors)
        if len(self) <= max_colors:
            return self
        means = _box_means(self._colors.cpu(), self._weights.cpu(), max_colors)
        return self._of(*_merge(*means), self.device)

    def kept(
        self, directions: Tensor, setting: Hashable, make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What ``make()`` returned the last time, if it was for these directions, not changed
        since, and an equal setting; else what it returns now.

        Ops keep here what they compute of a palette alone. Only the latest is kept, and not what
        was made while a CUDA graph was captured: that has no value before the graph's replay.
        """
        try:
            version = directions._version
        except RuntimeError:  # of tensors made in inference mode nobody knows the changes
            return make()
        key = version, setting
        if self._kept is None or self._kept[0] is not directions or self._kept[1] != key:
            made = make()
            if not _is_capturing(made[0]):
                self._kept = directions, key, made, _marked(made[0])
            return made
        *_, made, ready = self._kept
        if ready is not None and not _is_capturing(made[0]):
            # Another stream than that which made it may be using it: it waits, and so does the
            # allocator. Capturing begins with a wait for all streams.
            stream = torch.cuda.current_stream(made[0].device)
            stream.wait_event(ready)
            for tensor in made:
                tensor.record_stream(stream)
        return made

    def __len__(self) -> int:
        return len(self._colors)

    def __repr__(self) -> str:
        order = self._weights.argsort(descending=True, stable=True)[:NAMED]
        heaviest = zip(self._colors[order].tolist(), self._weights[order].tolist(), strict=True)
        names = [f"{_name(color)} {100 * weight:.3g}%" for color, weight in heaviest]
        if len(self) > NAMED:
            names.append("...")
        noun = "color" if len(self) == 1 else "colors"
        return f"Palette({len(self)} {noun}: {', '.join(names)}; device={str(self.device)!r})"

    @classmethod
    def _of(
        cls, colors: Tensor, weights: Tensor, device: torch.device, equal: bool | None = None
    ) -> Palette:
        """From colors that are distinct and in order, and weights that sum to one."""
        palette = cls.__new__(cls)
        palette._hold(colors, weights, device, equal)
        return palette

    def _hold(
        self, colors: Tensor, weights: Tensor, device: torch.device, equal: bool | None = None
    ) -> None:
        """``equal``: whether weights are; None: they are on the CPU, and are looked at."""
        self._equal = bool((weights == weights[0]).all()) if equal is None else equal
        self._colors = _ordinary(colors.to(device))
        self._weights = _ordinary(weights.to(device))
        self._kept: tuple[Tensor, Hashable, tuple[Tensor, ...], torch.cuda.Event | None] | None = (
            None
        )


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _marked(tensor: Tensor) -> torch.cuda.Event | None:
    """An event that comes when the tensor has its values."""
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return event


def _ordinary(tensor: Tensor) -> Tensor:
    # Autograd refuses to save tensors made in inference mode, where a palette may well be made.
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


# Distinct colors.


def _merge(points: Tensor, mass: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distinct rows, float32 in lexicographic order, and the share of mass of each, float64.

    points: [n, 3], uint8 and uint16 (255 and 65535 are 1), or float32. mass: [n], at most 1, not
    all zero; or None. All on the CPU, where sums have one order.
    """
    if mass is not None:
        points, mass = points[mass > 0], mass[mass > 0]
    distinct = _distinct_floats if points.is_floating_point() else _distinct_levels
    colors, inverse, counts = distinct(points)
    if mass is None:
        weights = counts.double()
    else:
        weights = torch.bincount(inverse, mass, minlength=len(counts))
    weights = weights / weights.sum()
    # Next to large weights, the tiniest underflow.
    return colors[weights > 0], weights[weights > 0]


# torch.unique(dim=0) compares rows one by one: 1.6 s for a million of them, on one core of a Zen 4.
# Sorting integers that pack whole rows takes 0.04 s for three channels of 8 or 16 bits, and 0.1 s
# for three floats, which need two rounds.


def _distinct_levels(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct rows of [n, 3], uint8 or uint16; which of them each row is; the count of each."""
    bits = 8 * levels.element_size()
    white = (1 << bits) - 1
    red, green, blue = levels.long().unbind(-1)
    packed = (red << 2 * bits) | (green << bits) | blue
    packed, inverse, counts = torch.unique(packed, return_inverse=True, return_counts=True)
    rows = torch.stack([packed >> 2 * bits, (packed >> bits) & white, packed & white], -1)
    return rows.float() / white, inverse, counts


def _distinct_floats(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of [n, 3], float32 and finite."""
    half, low = 1 << 31, (1 << 32) - 1
    first, second, third = _flip_negative((points + 0.0).view(torch.int32)).long().unbind(-1)
    pairs, inverse = torch.unique((first << 32) | (second + half), return_inverse=True)
    rows, inverse, counts = torch.unique(
        (inverse << 32) | (third + half), return_inverse=True, return_counts=True
    )
    pairs = pairs[rows >> 32]
    codes = torch.stack([pairs >> 32, (pairs & low) - half, (rows & low) - half], -1)
    return _flip_negative(codes.int()).view(torch.float32), inverse, counts


def _flip_negative(code: Tensor) -> Tensor:
    """The bits of floats as integers of the same order, and back."""
    return code ^ ((code >> 31) & 0x7FFFFFFF)


# Fewer colors.


def _box_means(colors: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Weighted median cut into at most ``count`` boxes: their weighted means, and weights."""
    serial = itertools.count()

    def box(points: Tensor, mass: Tensor) -> tuple[float, int, int, Tensor, Tensor]:
        # Relative to one of the points: where all agree, the spread is zero without rounding.
        offset = points - points[0]
        mean = (mass @ offset) / mass.sum()
        spread, axis = (mass @ (offset - mean) ** 2).max(0)
        # The heap gives the least first; of equal ones the oldest.
        return -spread.item(), next(serial), int(axis), points, mass

    boxes = [box(colors.double(), weights)]
    while len(boxes) < count and boxes[0][0] < 0:
        *_, axis, points, mass = heapq.heappop(boxes)
        values = points[:, axis]
        low, high = values.aminmax()
        # Rounding may put the mean at an end or beyond; neither side may be empty.
        mean = ((mass @ values) / mass.sum()).clamp(min=low)
        left = (values <= mean) & (values < high)
        for side in (left, ~left):
            heapq.heappush(boxes, box(points[side], mass[side]))

    masses = torch.stack([mass.sum() for *_, mass in boxes])
    means = torch.stack([mass @ points / mass.sum() for *_, points, mass in boxes])
    return means.float(), masses


# What images hold.


def _pixels(image: object) -> tuple[Tensor, Tensor | None]:
    """Channels [H, W, 3], uint8, uint16 or float32 in [0, 1]; alpha [H, W], float64, or None."""
    if isinstance(image, Tensor):
        return _tensor_pixels(image.detach().cpu(), planar=True)
    if _is_array(image):
        return _tensor_pixels(_array_tensor("image", image), planar=False)
    if _is_picture(image):
        name = _name_of("image", image)
        with _opened(image, name) as picture:
            return _picture_pixels(picture, name)
    raise TypeError(
        "image must be a path, an image of Pillow's, an array or a tensor; "
        f"got {type(image).__name__}"
    )


def _tensor_pixels(image: Tensor, planar: bool) -> tuple[Tensor, Tensor | None]:
    if not image.is_floating_point() and image.dtype not in (torch.uint8, torch.uint16):
        raise TypeError(f"image must be uint8, uint16 or floating-point; got {image.dtype}")
    shape = tuple(image.shape)
    if image.dim() > 3:
        raise ValueError(
            f"image must be one image, without a batch dimension: pass image[0]; got shape {shape}"
        )
    if image.dim() == 2:
        image = image[..., None]
    elif image.dim() == 3 and shape[-1] not in (3, 4) and planar and shape[0] in (3, 4):
        image = image.permute(1, 2, 0)
    elif image.dim() != 3 or shape[-1] not in (3, 4):
        allowed = "[H, W], [H, W, 3] or [H, W, 4]"
        if planar:
            allowed = "[H, W], [H, W, 3], [H, W, 4], [3, H, W] or [4, H, W]"
        raise ValueError(f"image must be {allowed}, without a batch dimension; got shape {shape}")
    if image.numel() == 0:
        raise ValueError(f"image must have at least one pixel; got shape {shape}")
    if image.is_floating_point():
        # Rounded first: what float64 arithmetic leaves just above 1 is 1.
        image = image.float()
        low, high = (bound.item() for bound in image.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"image must lie in [0, 1]; got values from {low} to {high}")
    channels = image[..., :3].expand(-1, -1, 3)
    return channels, _unit(image[..., 3]) if image.shape[-1] == 4 else None


def _picture_pixels(image: Image.Image, name: str) -> tuple[Tensor, Tensor | None]:
    import numpy as np

    from sdcore import images

    alpha = None
    levels = images.gray_levels(image)
    if levels is None:
        opaque = image
        if _is_transparent(image):
            layers = image.convert("RGBA")
            alpha = _unit(torch.from_numpy(np.array(layers.getchannel("A"))))
            opaque = layers.convert("RGB")
        if image.mode in ("1", "L", "LA"):
            levels = np.array(opaque.convert("L"))
    elif "transparency" in image.info:
        alpha = torch.from_numpy(levels != image.info["transparency"]).double()

    profile = image.info.get("icc_profile")
    if levels is not None and profile:
        return _gray_to_srgb(levels, profile, image.mode, name), alpha
    if levels is not None:
        return torch.from_numpy(levels)[..., None].expand(-1, -1, 3), alpha
    if profile:
        opaque = _to_srgb(opaque, profile, image.mode, name)
    return torch.from_numpy(np.array(opaque.convert("RGB"))), alpha


def _is_transparent(image: Image.Image) -> bool:
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return True
    return image.mode == "P" and image.palette.mode.endswith("A")


def _gray_to_srgb(levels: np.ndarray, profile: bytes, mode: str, name: str) -> Tensor:
    """Gray of 8 or 16 bits, [H, W], as its ICC profile says: [H, W, 3], float32 in [0, 1]."""
    import numpy as np
    from PIL import Image

    # A table, because what speeds LittleCMS up misses the darks of a linear gray profile by 10
    # levels of 255. Without it, conversion is right to half a level, and slow. And because
    # Pillow's 16-bit gray reaches LittleCMS in recent versions only: between the 256 levels of the
    # table, 16 bits interpolate.
    ramp = np.arange(256, dtype=np.uint8)
    table = _to_srgb(Image.fromarray(ramp[None]), profile, mode, name, NO_OPTIMIZATION)
    position = levels / (np.iinfo(levels.dtype).max / 255)
    channels = [np.interp(position, ramp, channel) for channel in np.asarray(table)[0].T]
    return torch.from_numpy(np.stack(channels, -1)).float() / 255


def _to_srgb(image: Image.Image, data: bytes, mode: str, name: str, flags: int = 0) -> Image.Image:
    """An image without alpha as its ICC profile says. mode: what messages say that it had."""
    from PIL import ImageCms

    from sdcore.images import ImageError

    remedy = "remove it from the file, or from a Pillow image with del image.info['icc_profile']"
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = profile.profile.xcolor_space.strip()
        if space == "RGB" and image.mode not in ("CMYK", "LAB"):
            image = image.convert("RGB")
        if image.mode != {"GRAY": "L"}.get(space, space.upper()):
            raise ImageError(
                f"{name} has pixels of mode {mode} and an ICC profile for {space}: {remedy}"
            )
        return ImageCms.profileToProfile(
            image,
            profile,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.PERCEPTUAL,
            outputMode="RGB",
            flags=flags,
        )
    except (OSError, ImageCms.PyCMSError) as error:
        raise ImageError(f"the ICC profile of {name} can't be used ({error}): {remedy}") from error


def _mask_weights(mask: object, shape: torch.Size) -> Tensor:
    if _is_picture(mask):
        with _opened(mask, _name_of("mask", mask)) as picture:
            mask = _picture_mask(picture)
    elif _is_array(mask):
        mask = _array_tensor("mask", mask)
    elif not isinstance(mask, Tensor):
        raise TypeError(
            "mask must be an array, a tensor, an image of Pillow's or a path; "
            f"got {type(mask).__name__}"
        )
    return _checked_weights("mask", mask, shape)


def _picture_mask(image: Image.Image) -> Tensor:
    import numpy as np

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _array_tensor("mask", np.asarray(image))
    if not _is_transparent(image):
        return torch.from_numpy(np.array(image.convert("L")))
    layers = image.convert("RGBA")
    gray, alpha = np.array(layers.convert("L")), np.array(layers.getchannel("A"))
    return torch.from_numpy(gray).double() * torch.from_numpy(alpha)


def _is_picture(value: object) -> bool:
    # Whoever has an image of Pillow's has imported Pillow; others may do without it.
    pillow = sys.modules.get("PIL.Image")
    return isinstance(value, (str, os.PathLike)) or (
        pillow is not None and isinstance(value, pillow.Image)
    )


def _name_of(argument: str, picture: object) -> str:
    """What messages call an image: a path by itself."""
    return os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else argument


def _opened(picture: object, name: str) -> AbstractContextManager[Image.Image]:
    from sdcore import images

    path = isinstance(picture, (str, os.PathLike))
    return images.opened(Path(picture) if path else picture, name)


def _is_array(value: object) -> bool:
    import numpy as np

    return isinstance(value, np.ndarray)


def _array_tensor(name: str, array: np.ndarray) -> Tensor:
    # A copy, since PyTorch takes neither negative strides nor another byte order.
    native = array.astype(array.dtype.newbyteorder("="), order="C")
    try:
        return torch.from_numpy(native)
    except TypeError:
        raise TypeError(f"{name} must be of a dtype that PyTorch has; got {array.dtype}") from None


def _unit(alpha: Tensor) -> Tensor:
    """Alpha of any dtype as float64 in [0, 1]."""
    white = 1 if alpha.is_floating_point() else (1 << 8 * alpha.element_size()) - 1
    return alpha.double() / white


# What colors are called.


def _parsed(name: str, color: object) -> list[float]:
    """Red, green and blue in [0, 1]."""
    if isinstance(color, str):
        return [level / 255 for level in _named_levels(name, color)]
    if hasattr(color, "tolist"):  # a row of an array or tensor
        color = color.tolist()
    if not isinstance(color, Sequence) or isinstance(color, bytes):
        raise TypeError(
            f"{name} must be a string or red, green and blue; got {type(color).__name__}"
        )
    for channel in color:
        if isinstance(channel, bool) or not isinstance(channel, Real):
            raise TypeError(
                f"{name} must be a string or red, green and blue as numbers; got {color!r}"
            )
    if len(color) != 3:
        raise ValueError(f"{name} must have three channels, red, green and blue; got {color!r}")
    whole = [isinstance(channel, Integral) for channel in color]
    if any(whole) and not all(whole):
        raise ValueError(
            f"{name} must be three ints, 0 to 255, or three floats, 0 to 1; got a mix: {color!r}"
        )
    white = 255 if all(whole) else 1
    if not all(0 <= channel <= white for channel in color):
        kind = "ints must be 0 to 255" if white == 255 else "floats must be 0 to 1"
        raise ValueError(f"{name}: {kind}; got {color!r}")
    return [float(channel) / white for channel in color]


def _named_levels(name: str, text: str) -> tuple[int, ...]:
    digits = text.removeprefix("#")
    if re.fullmatch(r"[0-9a-fA-F]{3}|[0-9a-fA-F]{6}", digits):
        if len(digits) == 3:
            digits = "".join(2 * digit for digit in digits)
        return tuple(bytes.fromhex(digits))
    allowed = "'#rrggbb', '#rgb' or a CSS name"
    try:
        from PIL import ImageColor
    except ModuleNotFoundError:
        allowed = "'#rrggbb' or '#rgb' (CSS names take Pillow, which is not installed)"
    else:
        if text.lower() in ImageColor.colormap:
            return ImageColor.getrgb(text)
    raise ValueError(f"{name} must be {allowed}; got {text!r}")


def _name(color: list[float]) -> str:
    if all(0 <= channel <= 1 for channel in color):
        return "#" + bytes(round(255 * channel) for channel in color).hex()
    return f"({', '.join(f'{channel:.3g}' for channel in color)})"


# What arguments must be.


def _checked_points(colors: Tensor) -> Tensor:
    """[k, 3], float32, on the CPU."""
    if not isinstance(colors, Tensor):
        raise TypeError(
            f"colors must be a tensor; got {type(colors).__name__} "
            "(Palette.from_colors takes a list of colors, Palette.from_image an image)"
        )
    if not colors.is_floating_point():
        raise TypeError(f"colors must be floating-point; got {colors.dtype}")
    if colors.dim() != 2 or colors.shape[1] != 3 or len(colors) == 0:
        raise ValueError(f"colors must be [k, 3] with k at least 1; got {tuple(colors.shape)}")
    points = colors.detach().float().cpu()
    if not points.isfinite().all():
        raise ValueError("colors must be finite in float32; got NaN or infinite values")
    return points


def _checked_weights(name: str, weights: Tensor, shape: torch.Size) -> Tensor:
    """Float64, on the CPU, with a maximum of one."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(weights).__name__}")
    if weights.is_complex():
        raise TypeError(f"{name} must be real; got {weights.dtype}")
    if weights.shape != shape:
        expected = f"of shape {tuple(shape)}"
        if name == "mask":
            expected = f"[H, W] of the image as it shows, {tuple(shape)}"
        raise ValueError(f"{name} must be {expected}; got shape {tuple(weights.shape)}")
    weights = weights.detach().cpu().double()
    low, high = (bound.item() for bound in weights.aminmax())
    if not (low >= 0 and high < math.inf):
        raise ValueError(f"{name} must be non-negative and finite; got values from {low} to {high}")
    if high == 0:
        raise ValueError(f"{name} must not be zero everywhere; got shape {tuple(shape)}")
    return weights / high


def _listed_weights(weights: Sequence[float] | Tensor, count: int) -> Tensor:
    if not isinstance(weights, Tensor):
        try:
            values = [float(weight) for weight in weights]
        except (TypeError, ValueError):
            raise TypeError(
                f"weights must be a sequence of numbers, one per color; got {weights!r}"
            ) from None
        weights = torch.tensor(values, dtype=torch.float64, device="cpu")
    return _checked_weights("weights", weights, torch.Size([count]))


def _check_max_colors(max_colors: int | None) -> None:
    if max_colors is None:
        return
    if isinstance(max_colors, bool) or not isinstance(max_colors, int):
        raise TypeError(f"max_colors must be an int or None; got {type(max_colors).__name__}")
    if max_colors < 1:
        raise ValueError(f"max_colors must be at least 1; got {max_colors}")


def _checked_device(
    device: torch.device | str | None, optional: bool = True
) -> torch.device | None:
    if device is None and optional:
        return None
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a torch.device or a string; got {type(device).__name__}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must name a device of PyTorch's; got {device!r}") from error
