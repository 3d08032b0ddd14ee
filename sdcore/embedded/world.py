"""A world of a few shapes: scenes, captions of them, and pictures, all made here.

What a picture of it shows can be told exactly, by :mod:`sdcore.embedded.reader`. The embedded
models are trained on it.

A scene has one to three things. Lengths and places are fractions of the picture's side, x to the
right and y down. Everything random comes from a ``random.Random``, whose sequence is the same on
all platforms, and is in the scene: drawing draws no random numbers.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

SIZE = 128  # pixels of a side

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {
    "red": (0.84, 0.11, 0.13),
    "orange": (0.96, 0.51, 0.08),
    "yellow": (0.98, 0.87, 0.16),
    "green": (0.15, 0.62, 0.22),
    "cyan": (0.13, 0.76, 0.82),
    "blue": (0.12, 0.27, 0.82),
    "purple": (0.50, 0.19, 0.66),
    "pink": (0.98, 0.52, 0.74),
    "brown": (0.45, 0.26, 0.12),
    "black": (0.07, 0.07, 0.08),
}
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("plain", "gradient", "textured")
RELATIONS = ("left of", "right of", "above", "below")
ROWS = ("row", "column")  # three things, from left to right and from top to bottom
CELLS = tuple(
    " ".join(filter(None, (row, column))) or "center"
    for row in ("top", "", "bottom")
    for column in ("left", "", "right")
)
STYLES = ("plain", "ink")

# Where colors of textured backgrounds come from: mean, and Cholesky factor of the covariance (the
# lower triangle by rows), of the sRGB values of photographs that come with scikit-image and
# scikit-learn: astronaut, chelsea, china, coffee, flower, motorcycle, rocket.
PHOTOGRAPHS = (
    ((0.555, 0.415, 0.378), (0.322, 0.253, 0.163, 0.223, 0.196, 0.072)),
    ((0.579, 0.437, 0.340), (0.126, 0.119, 0.043, 0.117, 0.081, 0.038)),
    ((0.568, 0.570, 0.553), (0.308, 0.318, 0.083, 0.350, 0.113, 0.076)),
    ((0.622, 0.336, 0.202), (0.247, 0.202, 0.127, 0.145, 0.139, 0.054)),
    ((0.216, 0.289, 0.224), (0.349, 0.139, 0.112, 0.050, 0.108, 0.053)),
    ((0.504, 0.398, 0.365), (0.241, 0.191, 0.134, 0.182, 0.146, 0.051)),
    ((0.205, 0.240, 0.323), (0.143, 0.111, 0.043, 0.059, 0.096, 0.034)),
)
# Photographs vary more than a thing of one color can stand out from.
TEXTURE_STRENGTH = 0.3
WAVES = 12  # of a texture, for each of three components
# How far, in sRGB, the color of a thing is at least from that of what is behind it.
CONTRAST = 0.3
MARGIN = 0.03  # between things, and to the picture's edge
PAPER = (0.96, 0.95, 0.91)
INK = (0.09, 0.08, 0.10)
OUTLINE = 0.016  # width of lines of ink


@dataclass(frozen=True)
class Thing:
    shape: str
    color: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float  # radians, clockwise
    rgb: tuple[float, float, float]  # of this one: the color, jittered
    grain: tuple[float, float]  # angle and phase of stripes, dots or hatching


@dataclass(frozen=True)
class Background:
    kind: str
    # Of all of it; or at both ends of a gradient, which has this angle; or the mean.
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    angle: float
    mixing: tuple[float, ...] = ()  # of a texture: Cholesky factor of its colors' covariance
    waves: tuple[tuple[float, float, float, float], ...] = ()  # cycles by x and y, phase, strength


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    layout: str  # "single", one of RELATIONS, of the first thing to the second, or one of ROWS
    background: Background
    style: str = "plain"

    @property
    def cell(self) -> str:
        """Where in the picture the first thing is: one of CELLS."""
        return cell_of(self.things[0].x, self.things[0].y)


def cell_of(x: float, y: float) -> str:
    column, row = (min(2, int(place * 3)) for place in (x, y))
    return CELLS[3 * row + column]


# ---------------------------------------------------------------------------------------------
# Scenes


def scene(
    rng: random.Random, *, things: int | None = None, style: str = "plain", held_out: bool = False
) -> Scene:
    """A random scene, of ``things`` things (None: one, two or three) in ``style``.

    One in twenty combinations of kinds is never drawn unless ``held_out``, which draws only those.
    """
    count = rng.choices((1, 2, 3), (0.4, 0.45, 0.15))[0] if things is None else things
    if count not in (1, 2, 3):
        raise ValueError(f"things must be 1, 2 or 3; got {things}")
    if style not in STYLES:
        raise ValueError(f"style must be one of {STYLES}; got {style!r}")
    while True:
        layout = rng.choice({1: ("single",), 2: RELATIONS, 3: ROWS}[count])
        kinds = [_kind(rng) for _ in range(count)]
        distinct = len({(shape, color) for shape, color, _ in kinds}) == count
        if distinct and is_held_out(kinds, layout) == held_out:
            break
    placed = _places(rng, layout, count)
    made = tuple(
        Thing(
            *kind,
            *place,
            angle=rng.uniform(-0.2, 0.2),
            rgb=jittered(rng, COLORS[kind[1]]),
            grain=(rng.uniform(0, math.pi), rng.random()),
        )
        for kind, place in zip(kinds, placed, strict=True)
    )
    return Scene(made, layout, _background(rng, made), style)


def scenes(
    count: int,
    seed: int,
    *,
    things: int | None = None,
    style: str = "plain",
    held_out: bool = False,
) -> list[Scene]:
    """``count`` scenes; the same for the same arguments."""
    rng = random.Random(seed)
    return [scene(rng, things=things, style=style, held_out=held_out) for _ in range(count)]


def _kind(rng: random.Random) -> tuple[str, str, str]:
    texture = rng.choices(TEXTURES, (0.6, 0.2, 0.2))[0]
    return rng.choice(SHAPES), rng.choice(tuple(COLORS)), texture


def is_held_out(kinds: Sequence[tuple[str, str, str]], layout: str) -> bool:
    """Whether this combination of (shape, color, texture) and layout is kept from training."""
    if len(kinds) == 1:
        named = "/".join(kinds[0])
    else:  # whatever the texture
        named = "/".join(f"{shape} {color}" for shape, color, _ in kinds) + "/" + layout
    return hashlib.sha256(named.encode()).digest()[0] % 20 == 0


def _places(rng: random.Random, layout: str, count: int) -> list[tuple[float, float, float]]:
    """x, y and radius of each."""
    largest = {1: 0.30, 2: 0.20, 3: 0.135}[count]
    while True:
        radii = [rng.uniform(0.62 * largest, largest) for _ in range(count)]
        spots = [
            (rng.uniform(r + MARGIN, 1 - r - MARGIN), rng.uniform(r + MARGIN, 1 - r - MARGIN), r)
            for r in radii
        ]
        if layout in ROWS:
            spots.sort(key=lambda spot: spot[ROWS.index(layout)])
        if _is_laid_out(spots, layout):
            return spots


def _is_laid_out(spots: list[tuple[float, float, float]], layout: str) -> bool:
    """Whether the things are beside each other as ``layout`` says, and it can be seen."""
    for (x, y, r), (u, v, s) in pairwise(spots):
        along, across = u - x, v - y
        if layout in ("above", "below", "column"):
            along, across = across, along
        if layout in ("right of", "below"):
            along = -along
        if along < r + s + MARGIN or abs(across) > 0.6 * along:
            return False
    return True


def relation_of(first: tuple[float, float], second: tuple[float, float]) -> str:
    """Which of RELATIONS the first place has to the second."""
    right, down = first[0] - second[0], first[1] - second[1]
    if abs(right) >= abs(down):
        return "left of" if right < 0 else "right of"
    return "above" if down < 0 else "below"


def jittered(rng: random.Random, rgb: tuple[float, float, float]) -> tuple[float, float, float]:
    """A little lighter or darker, and of a little different hue."""
    brightness, turn = rng.uniform(0.88, 1.10), rng.uniform(-0.06, 0.06)
    # A rotation about the gray axis turns hue.
    c, s, mean = math.cos(turn), math.sin(turn) / math.sqrt(3), sum(rgb) / 3
    r, g, b = (value - mean for value in rgb)
    turned = (c * r + s * (b - g), c * g + s * (r - b), c * b + s * (g - r))
    return tuple(min(1.0, max(0.0, brightness * (mean + value))) for value in turned)


def _background(rng: random.Random, things: tuple[Thing, ...]) -> Background:
    """One that all things stand out from."""
    while True:
        kind = rng.choice(BACKGROUNDS)
        made = _textured(rng) if kind == "textured" else _smooth(rng, kind)
        if all(_stands_out(thing, made) for thing in things):
            return made


def _smooth(rng: random.Random, kind: str) -> Background:
    low = _muted(rng)
    high = _muted(rng) if kind == "gradient" else low
    return Background(kind, low, high, rng.uniform(0, 2 * math.pi))


def _muted(rng: random.Random) -> tuple[float, float, float]:
    """A pale color, a gray or a dark one, none of which is a color that things have."""
    value = rng.choices(
        (rng.uniform(0.80, 0.98), rng.uniform(0.40, 0.75), rng.uniform(0.16, 0.30)), (5, 3, 1)
    )[0]
    tint = [rng.uniform(-0.07, 0.07) for _ in range(3)]
    return tuple(min(1.0, max(0.0, value + t)) for t in tint)


def _textured(rng: random.Random) -> Background:
    mean, factor = rng.choice(PHOTOGRAPHS)
    shade = rng.uniform(0.8, 1.3)
    mean = tuple(min(0.95, shade * value) for value in mean)
    mixing = tuple(TEXTURE_STRENGTH * value for value in factor)
    waves = []
    for _ in range(3 * WAVES):
        cycles, turn = 1.2 * 10 ** rng.uniform(0, 1.1), rng.uniform(0, 2 * math.pi)
        # Amplitudes of photographs fall with frequency.
        strength = math.sqrt(2 / WAVES) * (3 / (cycles + 2))
        waves.append(
            (cycles * math.cos(turn), cycles * math.sin(turn), rng.uniform(0, 1), strength)
        )
    return Background("textured", mean, mean, 0.0, mixing, tuple(waves))


def _stands_out(thing: Thing, background: Background) -> bool:
    tones = [(thing.rgb, CONTRAST)]
    if thing.texture != "plain":
        tones.append((second_tone(thing.rgb), CONTRAST / 2))
    return all(
        _distance(tone, ground, background.mixing) >= least
        for tone, least in tones
        for ground in (background.low, background.high)
    )


def _distance(
    rgb: tuple[float, float, float], ground: tuple[float, float, float], mixing: tuple[float, ...]
) -> float:
    """From a color to another, less two standard deviations of a texture along the line between."""
    gap = [a - b for a, b in zip(rgb, ground, strict=True)]
    distance = math.hypot(*gap)
    if not mixing or distance == 0:
        return distance
    u = [value / distance for value in gap]
    a, b, c, d, e, f = mixing
    spread = math.hypot(u[0] * a + u[1] * b + u[2] * d, u[1] * c + u[2] * e, u[2] * f)
    return distance - 2 * spread


def second_tone(rgb: tuple[float, float, float]) -> tuple[float, float, float]:
    """Of stripes and dots: darker on light colors, lighter on dark ones."""
    r, g, b = rgb
    if 0.299 * r + 0.587 * g + 0.114 * b > 0.5:
        return 0.6 * r, 0.6 * g, 0.6 * b
    return (1 + r) / 2, (1 + g) / 2, (1 + b) / 2


# ---------------------------------------------------------------------------------------------
# Captions

_SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star", "five-pointed star"),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
}
_COLOR_WORDS = {
    "red": ("red", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue", "royal blue"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
    "brown": ("brown", "chestnut"),
    "black": ("black", "jet black"),
}
_TEXTURE_WORDS = {
    "plain": ("", "", "", "plain", "solid"),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_GROUND_WORDS = {
    "plain": ("on a plain background", "on a flat background"),
    "gradient": ("on a gradient background", "on a background that fades"),
    "textured": ("on a textured background", "on a mottled background"),
}
_OPENINGS = ("", "", "", "a picture of ", "an image of ", "an illustration of ")
_INK_PHRASES = ("an ink drawing of {}", "{}, drawn in ink", "{} in ink style", "ink sketch of {}")


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """A caption of the scene: in words drawn from ``rng``; None: the plainest."""
    choose = (lambda options: options[0]) if rng is None else rng.choice
    names = [_named(thing, choose, scene.style) for thing in scene.things]
    if scene.layout == "single":
        text = names[0]
        if rng is not None and rng.random() < 0.5:
            text += " " + choose(_cell_phrases(scene.cell))
    elif scene.layout in RELATIONS:
        text = _related(names, scene.layout, choose, rng)
    else:
        text = _listed(names, scene.layout, choose)
    if scene.style == "ink":
        return choose(_INK_PHRASES).format(text)
    if rng is not None:
        if rng.random() < 0.4:
            text += " " + choose(_GROUND_WORDS[scene.background.kind])
        text = choose(_OPENINGS) + text
    return text


def _named(thing: Thing, choose, style: str) -> str:
    texture = "" if style == "ink" else choose(_TEXTURE_WORDS[thing.texture])
    words = (texture, choose(_COLOR_WORDS[thing.color]), choose(_SHAPE_WORDS[thing.shape]))
    return with_article(" ".join(filter(None, words)))


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _cell_phrases(cell: str) -> tuple[str, ...]:
    if cell == "center":
        return ("in the center", "in the middle")
    if cell in ("left", "right"):
        return (f"on the {cell}",)
    if cell in ("top", "bottom"):
        return (f"at the {cell}",)
    return (f"in the {cell}", f"in the {cell} corner")


def _related(names: list[str], relation: str, choose, rng: random.Random | None) -> str:
    first, second = names
    if rng is not None and rng.random() < 0.3:  # told from the other side
        first, second, relation = second, first, _OPPOSITES[relation]
    return f"{first} {choose(_RELATION_WORDS[relation])} {second}"


def _listed(names: list[str], layout: str, choose) -> str:
    first, second, third = names
    row = ("from left to right", "in a row from left to right")
    column = ("from top to bottom", "in a column from top to bottom")
    return f"{first}, {second} and {third} {choose(row if layout == 'row' else column)}"


# ---------------------------------------------------------------------------------------------
# Pictures

Grid = tuple[Tensor, Tensor]  # x [1, size] and y [size, 1] of the pixels' centers


def render(scenes: Sequence[Scene], size: int = SIZE, device: str = "cpu") -> Tensor:
    """Pictures [B, 3, size, size], float32 in [0, 1], anti-aliased."""
    grid = pixel_grid(size, device)
    out = torch.empty(len(scenes), 3, size, size, device=device)
    plain = [i for i, one in enumerate(scenes) if one.style == "plain"]
    ink = [i for i, one in enumerate(scenes) if one.style == "ink"]
    if plain:
        out[plain] = _grounds([scenes[i].background for i in plain], grid)
    if ink:
        out[ink] = _tensor(PAPER, device)[:, None, None]
    for layer in range(max((len(one.things) for one in scenes), default=0)):
        for which, paint in ((plain, _paint), (ink, _draw)):
            here = [i for i in which if len(scenes[i].things) > layer]
            if here:
                things = [scenes[i].things[layer] for i in here]
                out[here] = paint(things, grid, out[here])
    return out


def outlines(scenes: Sequence[Scene], size: int = SIZE, device: str = "cpu") -> Tensor:
    """Outline drawings of the things [B, 1, size, size]: white lines on black, in [0, 1]."""
    grid = pixel_grid(size, device)
    out = torch.zeros(len(scenes), size, size, device=device)
    for layer in range(max((len(one.things) for one in scenes), default=0)):
        here = [i for i, one in enumerate(scenes) if len(one.things) > layer]
        distance = _distances([scenes[i].things[layer] for i in here], grid)
        line = _covered(distance.abs() - OUTLINE / 2, size)
        out[here] = torch.maximum(out[here], line)
    return out[:, None]


def masks(scenes: Sequence[Scene], size: int = SIZE, device: str = "cpu") -> list[Tensor]:
    """Of each scene, how much of each pixel each thing covers: [things, size, size] in [0, 1]."""
    grid = pixel_grid(size, device)
    return [_covered(_distances(one.things, grid), size) for one in scenes]


def pixel_grid(size: int, device: str) -> Grid:
    at = (torch.arange(size, device=device) + 0.5) / size
    return at[None, :], at[:, None]


def _tensor(values: object, device: str | torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _covered(distance: Tensor, size: int) -> Tensor:
    """From signed distances, how much of a pixel is inside."""
    return (0.5 - distance * size).clamp(0, 1)


def _grounds(grounds: Sequence[Background], grid: Grid) -> Tensor:
    """[B, 3, size, size]"""
    x, y = grid
    device = x.device
    low, high = (
        _tensor([getattr(one, end) for one in grounds], device)[..., None, None]
        for end in ("low", "high")
    )
    angle = _tensor([one.angle for one in grounds], device)[:, None, None]
    c, s = angle.cos(), angle.sin()
    along = 0.5 + ((x - 0.5) * c + (y - 0.5) * s) / (c.abs() + s.abs())
    out = low + along[:, None] * (high - low)
    rough = [i for i, one in enumerate(grounds) if one.waves]
    if rough:
        out[rough] += _waves([grounds[i] for i in rough], grid)
    return out.clamp(0, 1)


def _waves(grounds: Sequence[Background], grid: Grid) -> Tensor:
    """Sums of waves, mixed into colors. A wave is a sum of two products of functions of x and of y,
    and so all of them are one matrix product."""
    x, y = (2 * math.pi * at.flatten() for at in grid)
    waves = _tensor([one.waves for one in grounds], x.device).unflatten(1, (3, WAVES))
    fx, fy, phase, strength = (part[..., None] for part in waves.unbind(-1))
    by_x = fx * x
    by_y = fy * y + 2 * math.pi * phase
    rows = torch.cat([strength * by_y.cos(), -strength * by_y.sin()], -2)  # [B, 3, 2 waves, size]
    columns = torch.cat([by_x.cos(), by_x.sin()], -2)
    fields = rows.mT @ columns
    mixing = torch.zeros(len(grounds), 3, 3, device=x.device)
    low = torch.tril_indices(3, 3, device=x.device)
    mixing[:, low[0], low[1]] = _tensor([one.mixing for one in grounds], x.device)
    return torch.einsum("bij,bjhw->bihw", mixing, fields)


def _local(things: Sequence[Thing], grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates in each thing's own frame, in units of its radius, and the radius."""
    x, y = grid
    px, py, radius, angle = (
        _tensor([getattr(one, name) for one in things], x.device)[:, None, None]
        for name in ("x", "y", "radius", "angle")
    )
    dx, dy = (x - px) / radius, (y - py) / radius
    c, s = angle.cos(), angle.sin()
    return c * dx + s * dy, c * dy - s * dx, radius


def _distances(things: Sequence[Thing], grid: Grid) -> Tensor:
    """Signed distances to the things' edges [N, size, size], negative inside, as fractions of the
    picture's side."""
    u, v, radius = _local(things, grid)
    out = torch.empty_like(u)
    for shape, distance in _DISTANCES.items():
        here = [i for i, one in enumerate(things) if one.shape == shape]
        if here:
            out[here] = distance(u[here], v[here])
    return out * radius


# Each in units of the radius.


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 0.95


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.76).abs() - 0.22


def _box(u: Tensor, v: Tensor, width: float, height: float) -> Tensor:
    du, dv = u.abs() - width, v.abs() - height
    outside = torch.hypot(du.clamp(min=0), dv.clamp(min=0))
    return outside + torch.maximum(du, dv).clamp(max=0)


def _square(u: Tensor, v: Tensor) -> Tensor:
    return _box(u, v, 0.80, 0.80)


def _cross(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(_box(u, v, 0.95, 0.30), _box(u, v, 0.30, 0.95))


def _polygon(u: Tensor, v: Tensor, corners: Sequence[tuple[float, float]]) -> Tensor:
    """Signed distance: to the nearest edge; inside where a ray crosses edges an odd number of
    times."""
    square = torch.full_like(u, math.inf)
    inside = torch.zeros_like(u, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = u - ax, v - ay
        along = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        square = torch.minimum(square, (wx - along * ex) ** 2 + (wy - along * ey) ** 2)
        crosses = (ay > v) != (by > v)
        if ey != 0:
            inside ^= crosses & (wx < wy * (ex / ey))
    return torch.where(inside, -1.0, 1.0) * square.sqrt()


def _corners(count: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Of a regular figure that points up; every second one at ``inner``."""
    turns = [2 * math.pi * i / count for i in range(count)]
    return [
        (radius * math.sin(turn), -radius * math.cos(turn))
        for turn, radius in zip(
            turns, (1.0, inner) * (count // 2) + (1.0,) * (count % 2), strict=True
        )
    ]


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    # Lower by a part of its radius: so that its box is where the place is.
    return _polygon(u, v - 0.15, [(1.05 * x, 1.05 * y) for x, y in _corners(3)])


def _star(u: Tensor, v: Tensor) -> Tensor:
    return _polygon(u, v, _corners(10, inner=0.45))


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}


def _paint(things: Sequence[Thing], grid: Grid, ground: Tensor) -> Tensor:
    """The things on the pictures [N, 3, size, size]."""
    size = ground.shape[-1]
    covered = _covered(_distances(things, grid), size)[:, None]
    color, second = (
        _tensor(rgbs, ground.device)[..., None, None]
        for rgbs in ([one.rgb for one in things], [second_tone(one.rgb) for one in things])
    )
    color = color + _marks(things, grid, size)[:, None] * (second - color)
    return ground + covered * (color - ground)


def _marks(things: Sequence[Thing], grid: Grid, size: int) -> Tensor:
    """Where the stripes and dots are: [N, size, size] in [0, 1]."""
    out = torch.zeros(len(things), size, size, device=grid[0].device)
    for texture, marks in (("striped", _stripes), ("dotted", _dots)):
        here = [i for i, one in enumerate(things) if one.texture == texture]
        if here:
            out[here] = marks([things[i] for i in here], grid, size)
    return out


def _turned(things: Sequence[Thing], grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates across and along the grain, as fractions of the side, and its phase."""
    x, y = grid
    angle, phase = (
        _tensor([one.grain[part] for one in things], x.device)[:, None, None] for part in (0, 1)
    )
    c, s = angle.cos(), angle.sin()
    return c * x + s * y, c * y - s * x, phase


def _lines(across: Tensor, phase: Tensor, spacing: float, width: float) -> Tensor:
    """Signed distance to lines of this width."""
    return ((across / spacing + phase) % 1 - 0.5).abs() * spacing - width / 2


def _stripes(things: Sequence[Thing], grid: Grid, size: int) -> Tensor:
    across, _, phase = _turned(things, grid)
    return _covered(_lines(across, phase, 0.075, 0.033), size)


def _dots(things: Sequence[Thing], grid: Grid, size: int) -> Tensor:
    across, along, phase = _turned(things, grid)
    spacing = 0.07
    du, dv = (((at / spacing + phase) % 1 - 0.5) * spacing for at in (across, along))
    return _covered(torch.hypot(du, dv) - 0.021, size)


def _draw(things: Sequence[Thing], grid: Grid, paper: Tensor) -> Tensor:
    """The things in ink: hatched in their color, with a dark outline."""
    size = paper.shape[-1]
    distance = _distances(things, grid)
    across, _, phase = _turned(things, grid)
    hatched = _covered(distance, size) * _covered(_lines(across, phase, 0.04, 0.02), size)
    line = _covered(distance.abs() - OUTLINE / 2, size)
    color = _tensor([one.rgb for one in things], paper.device)[..., None, None]
    out = paper + hatched[:, None] * (color - paper)
    return out + line[:, None] * (_tensor(INK, paper.device)[:, None, None] - out)
