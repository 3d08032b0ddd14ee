"""What a picture of the world of :mod:`sdcore.embedded.world` shows.

Things are found by arithmetic: what stands out from a smooth background, in connected parts. What
each is, a small network tells, trained on renders by :mod:`sdcore.embedded.train_reader`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdcore.embedded import world

WEIGHTS = Path(__file__).with_name("reader.safetensors")
CROP = 32  # pixels of a thing that the network sees
SMALLEST = 60  # pixels, of 128 x 128: the smallest thing of the world has 140
# A pixel stands out that is this far from the background: in sRGB, and in standard deviations of
# what the background varies by.
LEAST_DISTANCE, LEAST_DEVIATIONS = 0.10, 6.5
NONE = "none"  # the shape of what is none of the world's
HEADS = {
    "shape": (*world.SHAPES, NONE),
    "color": tuple(world.COLORS),
    "texture": world.TEXTURES,
    "style": world.STYLES,
}


@dataclass(frozen=True)
class Seen:
    """A thing. Lengths and places as in the world; what it is, each with a probability."""

    shape: str
    color: str
    texture: str
    style: str
    x: float
    y: float
    radius: float  # of a circle about its box
    certainty: dict[str, float]  # of shape, color, texture and style


@dataclass(frozen=True)
class Reading:
    things: tuple[Seen, ...]  # by size, the largest first

    @property
    def style(self) -> str | None:
        """That of most of what is seen; None if there is nothing."""
        if not self.things:
            return None
        sure = {style: 0.0 for style in world.STYLES}
        for thing in self.things:
            sure[thing.style] += thing.certainty["style"]
        return max(sure, key=sure.__getitem__)


@dataclass(frozen=True)
class Verdict:
    """What of a scene a picture shows. With another number of things, nothing of it is."""

    count: bool
    colors: bool
    shapes: bool
    layout: bool  # places, as far as the caption tells: who is where of whom
    style: bool

    @property
    def all_right(self) -> bool:
        return self.count and self.colors and self.shapes and self.layout


class Classifier(nn.Module):
    """Crops [N, 4, CROP, CROP], RGB and mask, to logits of each of HEADS."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 24, 48, 64, 96)
        layers = []
        for before, after in pairwise(widths):
            stride = 1 if before == 4 else 2
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(2 * widths[-1], len(kinds)) for name, kinds in HEADS.items()}
        )

    def forward(self, crops: Tensor) -> dict[str, Tensor]:
        found = self.body(crops - 0.5)
        pooled = torch.cat([found.mean((2, 3)), found.amax((2, 3))], 1)
        return {name: head(pooled) for name, head in self.heads.items()}


@functools.cache
def classifier() -> Classifier:
    """The trained network.

    Raises:
        ValueError: its file is damaged, or another's.
        OSError: there is no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network = Classifier()
    try:
        weights = {name: value.float() for name, value in load_file(WEIGHTS).items()}
        network.load_state_dict(weights)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{WEIGHTS} is not the reader's network: {error}") from error
    return network.eval().requires_grad_(False)


def read(images: Tensor) -> list[Reading]:
    """What pictures [B, 3, H, W] in [0, 1] show.

    Raises:
        TypeError: not floating point.
        ValueError: of another shape.
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, in [0, 1]; got {images.dtype}")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [B, 3, H, W]; got {list(images.shape)}")
    if len(images) == 0:
        return []
    images = images.detach().float()
    size = (world.SIZE, world.SIZE)
    if images.shape[2:] != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    found = [(b, part) for b, parts in enumerate(parts_of(images)) for part in parts]
    readings: list[list[Seen]] = [[] for _ in images]
    if found:
        crops = torch.stack([crop(images[b], part) for b, part in found])
        network = classifier().to(images.device)
        probabilities = {name: logits.softmax(-1).cpu() for name, logits in network(crops).items()}
        for number, (b, part) in enumerate(found):
            readings[b].append(_seen(part, {k: v[number] for k, v in probabilities.items()}))
    return [Reading(tuple(sorted(one, key=lambda s: -s.radius))) for one in readings]


def _seen(part: Part, probabilities: dict[str, Tensor]) -> Seen:
    best = {name: p.max(0) for name, p in probabilities.items()}
    named = {name: HEADS[name][int(found.indices)] for name, found in best.items()}
    certainty = {name: float(found.values) for name, found in best.items()}
    return Seen(**named, x=part.x, y=part.y, radius=part.radius, certainty=certainty)


def judge(reading: Reading, scene: world.Scene) -> Verdict:
    """What of ``scene`` was seen. Things are matched so that the most is right."""
    style = reading.style == scene.style
    if len(reading.things) != len(scene.things):
        return Verdict(False, False, False, False, style)
    verdicts = []
    for order in permutations(reading.things):
        pairs = list(zip(order, scene.things, strict=True))
        colors = [seen.color == thing.color for seen, thing in pairs]
        shapes = [seen.shape == thing.shape for seen, thing in pairs]
        layout = _is_laid_out(order, scene.layout)
        right = sum(colors) + sum(shapes) + layout
        verdicts.append((right, Verdict(True, all(colors), all(shapes), layout, style)))
    return max(verdicts, key=lambda one: one[0])[1]


def _is_laid_out(things: Sequence[Seen], layout: str) -> bool:
    places = [(thing.x, thing.y) for thing in things]
    if layout == "single":
        return True
    if layout in world.RELATIONS:
        return world.relation_of(*places) == layout
    along = [place[world.ROWS.index(layout)] for place in places]
    return along == sorted(along)


# ---------------------------------------------------------------------------------------------
# Where things are


@dataclass(frozen=True)
class Part:
    """A connected part of a picture that stands out."""

    mask: Tensor  # [H, W], bool
    x: float  # of the middle of its box
    y: float
    radius: float


def parts_of(images: Tensor) -> list[list[Part]]:
    """Of each picture [B, 3, H, W], the parts that stand out, but for specks."""
    labels = components(foreground(images))
    return [_parts(one) for one in labels]


def _parts(labels: Tensor) -> list[Part]:
    size = labels.shape[-1]
    found = []
    numbers, counts = labels[labels > 0].unique(return_counts=True)
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        if count < SMALLEST * (size / 128) ** 2:
            continue
        mask = labels == number
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        left, right = int(columns[0]), int(columns[-1]) + 1
        radius = max(bottom - top, right - left) / 2
        found.append(
            Part(mask, (left + right) / 2 / size, (top + bottom) / 2 / size, radius / size)
        )
    return found


def foreground(images: Tensor) -> Tensor:
    """Pixels that are not of the background, [B, H, W]: a quadratic function of the place, fitted
    to those pixels that it fits."""
    size = images.shape[-2:]
    coarse = F.avg_pool2d(images, 4)
    pixels = coarse.flatten(2).mT  # [B, pixels, 3]
    basis = _quadratic(*coarse.shape[-2:], images.device)
    weights = _border(*coarse.shape[-2:], images.device)[None].expand(len(images), -1)
    plane = basis[:, :3]
    gap = pixels - plane @ _fit(plane, pixels, weights)
    for _ in range(8):
        fitted = _fit(basis, pixels, _weights(gap))
        gap = pixels - basis @ fitted
    gap = images.flatten(2).mT - _quadratic(*size, images.device) @ fitted
    distance = gap.norm(dim=-1)
    weights = _weights(gap)
    share = weights / weights.sum(1, keepdim=True)
    spread = (share[..., None] * gap).mT @ gap
    spread = spread + 0.025**2 * torch.eye(3, device=images.device)
    deviations = (gap @ torch.linalg.inv(spread) * gap).sum(-1).sqrt()
    found = (distance > LEAST_DISTANCE) & (deviations > LEAST_DEVIATIONS)
    return _closed(found.unflatten(1, size))


def _weights(gap: Tensor) -> Tensor:
    """Little for what is far from the fit."""
    return (1 + (gap.norm(dim=-1) / 0.1) ** 2) ** -2


def _quadratic(height: int, width: int, device: torch.device) -> Tensor:
    """1, x, y, x², xy, y² of each pixel [pixels, 6]; x and y from -1 to 1."""
    y, x = torch.meshgrid(
        (2 * torch.arange(height, device=device) + 1) / height - 1,
        (2 * torch.arange(width, device=device) + 1) / width - 1,
        indexing="ij",
    )
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], -1).flatten(0, 1)


def _border(height: int, width: int, device: torch.device) -> Tensor:
    """One for the outermost pixels, else zero, [pixels]."""
    out = torch.ones(height, width, device=device)
    out[1:-1, 1:-1] = 0
    return out.flatten()


def _fit(basis: Tensor, pixels: Tensor, weights: Tensor) -> Tensor:
    """Coefficients [B, k, 3] of weighted least squares."""
    weighted = weights[..., None] * basis
    normal = weighted.mT @ basis
    normal = normal + 1e-4 * torch.eye(basis.shape[1], device=basis.device)
    return torch.linalg.solve(normal, weighted.mT @ pixels)


def _closed(found: Tensor) -> Tensor:
    """Gaps of up to two pixels filled."""
    grown = F.max_pool2d(found.float(), 3, 1, 1)
    return -F.max_pool2d(-grown, 3, 1, 1) > 0


def components(found: Tensor) -> Tensor:
    """Numbers of the connected parts of [B, H, W], 0 outside."""
    count = found[0].numel()
    numbers = torch.arange(1, count + 1, device=found.device, dtype=torch.float32)
    labels = numbers.view(found.shape[1:]) * found
    while True:
        before = labels
        for _ in range(16):
            labels = F.max_pool2d(labels, 3, 1, 1) * found
        if torch.equal(labels, before):
            return labels.int()


def crop(image: Tensor, part: Part) -> Tensor:
    """A thing and a little around it: [4, CROP, CROP], RGB and mask."""
    scale = 1.15 * part.radius
    steps = torch.linspace(-1, 1, CROP, device=image.device) * scale
    x, y = 2 * (part.x + steps) - 1, 2 * (part.y + steps) - 1
    grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), -1)
    layers = torch.cat([image, part.mask[None].float()])
    return F.grid_sample(layers[None], grid[None], padding_mode="border", align_corners=False)[0]
