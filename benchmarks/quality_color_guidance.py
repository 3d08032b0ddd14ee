"""What color guidance does to pictures: how near their colors come to a reference's, and whether
they still show what the prompt says.

``python -m benchmarks.quality_color_guidance [--device cuda] [--count 200] [--csv FILE]
[--figure FILE] [--pictures FOLDER [--pictures-only]] [--ways PART …] [--steps N] [--points N]``
``python -m benchmarks.quality_color_guidance --metrics-of FOLDER [--csv FILE] [--figure FILE]``
``python -m benchmarks.quality_color_guidance --metrics-of FOLDER --sheets FOLDER``
``python -m benchmarks.quality_color_guidance --tune [--device cuda] [--count 24] [--ways PART …]``

Pairs of a prompt and a reference, with the embedded v2, 20 steps of its DDIM and guidance of 4. All
ways start from the same latents.

Prompts, in equal parts drawn by a seed: of one thing, of one thing without its color, of two things
and how they lie, all kept from the models' training. Two things without colors are left out: the
model was trained on captions that name colors, and does not tell such things apart.

References: three of four pairs have a crop of one of ten photographs that come inside the packages
of scikit-image and scikit-learn, in turn; a square of 40 to 100 % of the shorter side, at a place
of its own, averaged down to the size of the pictures. Every fourth pair has a palette, a few colors
and their shares; when all of them have had their turn, they come again with their shares shuffled.
What a picture is compared with are the pixels of the crop, or as many pixels in the palette's
colors. Ways that take images are given those, and ColorGuidance the crop or the palette.

Ways:
  unguided
  published: SW-Guidance as its authors' code has it: plain gradient descent, sorted bootstraps of
    the pixels' projections, the UNet and the decoder differentiated. Pictures are descended
    together, by the sum of their losses, each with rotations and bootstraps of its own: the
    gradients are those of each picture alone.
  quality, fast: sdcore.ColorGuidance with that preset; these with STUDIED times their default
    learning rate, and "published" with as much of the published one for the size, 140 · 32² / 64²
    for these latents
  mean-covariance transfer: the unguided picture, its colors moved by the linear map between
    Gaussians (Monge's)
  histogram matching: the unguided picture, channel by channel
  the reference itself: other pixels of it, in the place of a picture's: what is left of W1 and W2
    where nothing is wrong but that both are samples

Figures, of pictures of 8 bits, in RGB from 0 to 1, means over pairs with intervals of 95 % (of the
bootstrap), and ratios of these means to unguided (of the bootstrap over pairs of both):
  W2, W1: Wasserstein distances between 3000 pixels of both, by POT's ``emd2``; W2 is the root of
    its cost on squared distances, W1 its cost on distances
  sliced W1: over all pixels, the mean of 512 directions
  shapes and places: captions of which the reader sees the right number of things with the right
    shapes, and if there are two, one beside the other as told; colors aside (Wilson's interval)
  colors too: the same with colors, of those captions alone whose colors the reference has: for
    each of them, 5 % of its pixels are within 0.3 of what that color is in the world
  by eye: shapes and places as someone saw them, of LABELED pairs, who had neither the prompts nor
    which way had made a picture: ``--sheets FOLDER`` writes the pictures, shuffled and numbered, to
    be labeled, and ``--labels FILE`` has what was seen. The reader looks for things on smooth
    backgrounds, and misses them on those that guidance makes.

``--tune`` tries factors of that rate on other pairs.

W1 and W2 of 200 pairs take some 6000 s of CPU time, in one process for each core. So a GPU need
not wait for them: ``--pictures FOLDER --pictures-only`` there, ``--metrics-of FOLDER`` elsewhere.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import math
import multiprocessing
import random
import re
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import sdcore
from benchmarks import measure
from benchmarks.baselines import sw_guidance
from benchmarks.bench_region_attention import wilson
from benchmarks.reader_agreement import save_sheets
from sdcore import embedded, figures
from sdcore.embedded import evaluate, reader, world
from sdcore.methods.color_guidance import ALPHA_RATE, frozen, published_rate
from sdcore.ops import random_rotations, sliced_wasserstein

SEED, TUNING_SEED = evaluate.SEED + 11, evaluate.SEED + 12
BATCH = 50
SIDE = world.SIZE
POINTS, TUNING_POINTS = 3000, 1000  # pixels of which W1 and W2 are taken
DIRECTIONS = 512
SHOWN = 8
METRICS = ("W2", "W1", "sliced W1")
ITSELF = "the reference itself"

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field",
               "immunohistochemistry", "stereo_motorcycle")  # fmt: skip
CROPS = 0.4, 1.0  # of the shorter side

# Colors, and twentieths of the whole.
PALETTES: dict[str, dict[str, int]] = {
    "sunset": {"#2b1b3d": 6, "#7a2e5d": 4, "#d1495b": 4, "#f79256": 4, "#fbd87f": 2},
    "lagoon": {"#03254c": 4, "#0b6e8f": 6, "#23b5af": 6, "#c8f0e8": 3, "#f6ae2d": 1},
    "forest": {"#16241b": 6, "#2f4b36": 6, "#6a8d4f": 5, "#c9c287": 2, "#8c4a2f": 1},
    "desert": {"#f1ddbf": 7, "#d9a566": 6, "#b5653a": 4, "#6b3a2a": 2, "#3f6c7a": 1},
    "candy": {"#fff0f6": 6, "#ff9ec7": 6, "#ff5d8f": 3, "#8fd3fe": 3, "#ffe66d": 2},
    "espresso": {"#efe6dc": 4, "#c8ad90": 5, "#7c5a43": 6, "#3a261c": 5},
    "neon": {"#0a0a1a": 10, "#ff2e88": 4, "#19f0e3": 4, "#f4f019": 2},
    "glacier": {"#f4f9fc": 8, "#bcdcec": 6, "#6c9fbd": 4, "#24485f": 2},
    "autumn": {"#40211a": 4, "#a63d1f": 6, "#e07a2f": 5, "#edb458": 4, "#5c6b2b": 1},
    "lavender": {"#f3eefa": 5, "#c5b3e6": 7, "#8467b7": 5, "#463366": 2, "#9bc08f": 1},
    "mondrian": {"#f2efe6": 11, "#d4221f": 3, "#1c4fa1": 3, "#f5d21b": 2, "#111111": 1},
    "moss and rust": {"#e4dfcf": 3, "#7d8a56": 7, "#3e4a2c": 5, "#a4512c": 5},
    "midnight": {"#050b1e": 8, "#102a56": 7, "#2f5d9b": 3, "#e8c872": 2},
    "peach": {"#fff3e6": 7, "#ffd3b0": 6, "#ff9f80": 5, "#c8553d": 2},
    "terrazzo": {"#ece7df": 12, "#c97b63": 3, "#7a9e9f": 3, "#2f3e46": 2},
    "tropics": {"#064635": 5, "#1f9e5a": 6, "#f2c14e": 4, "#f25f5c": 3, "#fff6e0": 2},
    "concrete": {"#e3e3e1": 5, "#b0b0ad": 7, "#767674": 5, "#2c2c2b": 3},
    "wine": {"#2a0a14": 6, "#6b1530": 7, "#a8324e": 4, "#e6c3b3": 3},
    "citrus": {"#fdfbe4": 5, "#f7e04b": 6, "#f5a623": 5, "#7cb342": 3, "#2e5d1e": 1},
    "blueprint": {"#0d3b82": 14, "#3c6fbd": 3, "#dce8fa": 3},
    "clay and sea": {"#ead7c3": 5, "#c0735a": 5, "#27606b": 6, "#0e2a33": 4},
    "orchid": {"#1d1026": 4, "#5b2a86": 6, "#b05fcf": 5, "#f1c5ee": 3, "#f6f2c0": 2},
    "newsprint": {"#f5f1e6": 15, "#1b1b1b": 4, "#c1121f": 1},
    "mint chocolate": {"#d9f5e5": 7, "#8fd6b3": 6, "#4a2f27": 5, "#1f1410": 2},
}

# A reference has a caption's color where so many of its pixels are nearer to it than the world's
# things are to what is behind them.
LEAST_SHARE, NEAR = 0.05, world.CONTRAST

INNER_STEPS = 8  # of the published method for SDXL
GUIDED = 28 / 30  # of its steps
# Of each way's learning rate for the size: what --tune tries, and what the study has.
FACTORS = (1 / 2, 1, 3 / 2, 2, 4, 8)
STUDIED = 3 / 2

Reference = np.ndarray | sdcore.Palette
Scores = dict[str, dict[str, np.ndarray]]  # of each way, of each metric: of each pair


# ---------------------------------------------------------------------------------------------
# Pairs


@dataclass(frozen=True)
class Asked:
    scene: world.Scene
    prompt: str
    names_colors: bool


@dataclass(frozen=True)
class Pairs:
    asked: list[Asked]
    references: list[Reference]
    pixels: np.ndarray  # of the references: [N, side, side, 3], uint8
    latents: Tensor

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, part: slice) -> Pairs:
        return Pairs(self.asked[part], self.references[part], self.pixels[part], self.latents[part])


def pairs(count: int, seed: int, pipe: Any) -> Pairs:
    references = list(_references(count, seed))
    pixels = np.stack([one if isinstance(one, np.ndarray) else _painted(one) for one in references])
    side = SIDE // pipe.vae_scale_factor
    latents = [
        torch.randn(
            pipe.unet.config.in_channels, side, side,
            generator=torch.Generator().manual_seed(1000 * seed + number),
        )
        for number in range(count)
    ]  # fmt: skip
    return Pairs(asked(count, seed), references, pixels, torch.stack(latents).to(pipe.device))


def asked(count: int, seed: int) -> list[Asked]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        things, names_colors = rng.choice(((1, True), (1, False), (2, True)))
        scene = world.scene(rng, things=things, held_out=True)
        prompt = world.caption(scene, rng) if names_colors else _colorless(scene)
        found.append(Asked(scene, prompt, names_colors))
    return found


def _colorless(scene: world.Scene) -> str:
    text = world.caption(scene)
    for thing in scene.things:
        text = text.replace(f"{thing.color} ", "")
    return re.sub(r"\ban (?![aeiou])", "a ", text)


def _references(count: int, seed: int) -> list[Reference]:
    rng = random.Random(seed)
    photographs, palettes = _photographs(), list(PALETTES.values())
    found: list[Reference] = []
    for number in range(count):
        fourth = number // 4
        if number % 4 < 3:
            found.append(_crop(photographs[(number - fourth) % len(photographs)], rng))
            continue
        colors, shares = map(list, zip(*palettes[fourth % len(palettes)].items(), strict=True))
        if fourth >= len(palettes):
            rng.shuffle(shares)
        found.append(sdcore.Palette.from_colors(colors, shares))
    return found


def _photographs() -> list[np.ndarray]:
    try:
        from skimage import data
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{error.name} is not installed, and the photographs are in it: "
            "pip install scikit-image scikit-learn"
        ) from error
    # Of a stereo pair, the left one comes first.
    loaded = [getattr(data, name)() for name in PHOTOGRAPHS]
    loaded = [one[0] if isinstance(one, tuple) else one for one in loaded]
    return loaded + load_sample_images().images


def _crop(photograph: np.ndarray, rng: random.Random) -> np.ndarray:
    height, width = photograph.shape[:2]
    side = rng.uniform(*CROPS) * min(height, width)
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    # By area: other filters make colors that are in no pixel's neighborhood.
    crop = Image.fromarray(photograph).resize(
        (SIDE, SIDE), Image.Resampling.BOX, (left, top, left + side, top + side)
    )
    return np.asarray(crop)


def _painted(palette: sdcore.Palette) -> np.ndarray:
    """Stripes of its colors, in each as many pixels as its share, to one."""
    edges = (palette.weights.cumsum(0) * SIDE * SIDE).round().int().numpy()
    colors = (255 * palette.colors).round().byte().numpy()
    pixels = np.repeat(colors, np.diff(edges, prepend=0), axis=0)
    return np.ascontiguousarray(pixels.reshape(SIDE, SIDE, 3).transpose(1, 0, 2))


# ---------------------------------------------------------------------------------------------
# Ways


def _drawn(pipe: Any, some: Pairs, steps: int) -> Tensor:
    """Pictures [N, 3, side, side] in [0, 1], by the pipeline and what it is patched with."""
    return pipe(
        [one.prompt for one in some.asked],
        num_inference_steps=steps,
        guidance_scale=evaluate.GUIDANCE,
        height=SIDE,
        width=SIDE,
        latents=some.latents,
        output_type="pt",
    ).images


def _unguided(pipe: Any, some: Pairs, steps: int, factor: float | None) -> Tensor:
    return _drawn(pipe, some, steps)


def _guided(preset: str, pipe: Any, some: Pairs, steps: int, factor: float | None) -> Tensor:
    rate = _rate(preset, factor, pipe, some.latents)
    method = sdcore.ColorGuidance(some.references, preset=preset, learning_rate=rate, seed=SEED)
    with sdcore.patch(pipe, method):
        return _drawn(pipe, some, steps)


def _rate(way: str, factor: float | None, pipe: Any, latents: Tensor) -> float:
    rate = published_rate(pipe.unet, latents.shape[2:]) * (STUDIED if factor is None else factor)
    return rate if way == "published" else ALPHA_RATE * rate


def _published(pipe: Any, some: Pairs, steps: int, factor: float | None) -> Tensor:
    texts = sw_guidance.encoded(pipe, [one.prompt for one in some.asked], None, SIDE, SIDE)
    colors = torch.from_numpy(some.pixels).to(pipe.device).flatten(1, 2) / 255
    rate = _rate("published", factor, pipe, some.latents)
    generator = torch.Generator(pipe.device).manual_seed(SEED)
    pipe.scheduler.set_timesteps(steps, device=pipe.device)
    x = some.latents
    # The gradients of weights are of no use, and take memory that a batch needs.
    with frozen(pipe.unet), frozen(pipe.vae):
        for number, t in enumerate(pipe.scheduler.timesteps):
            if number < round(GUIDED * steps):
                x = x + _control(pipe, x, t, texts.context[len(some) :], colors, rate, generator)
            x = sw_guidance.step(pipe, x, t, texts, evaluate.GUIDANCE)
        with torch.no_grad():
            return sw_guidance.decoded(pipe, x)


def _control(
    pipe: Any,
    x: Tensor,
    t: Tensor,
    text: Tensor,
    colors: Tensor,
    rate: float,
    generator: torch.Generator,
) -> Tensor:
    """``sw_guidance.guided_step`` for as many pictures as there are samples."""
    u = torch.zeros_like(x)
    for _ in range(INNER_STEPS):
        u.requires_grad_()
        moved = x + u
        said = pipe.unet(moved, t, text).sample
        clean = pipe.scheduler.step(said, t, moved).pred_original_sample
        image = pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample
        pixels = (image / 2 + 0.5).clamp(0, 1).flatten(2).mT
        losses = published_losses(pixels, colors, *_random(len(x), colors.shape[1], generator))
        (grad,) = torch.autograd.grad(losses.sum(), u)
        u = (u - rate * grad).detach()
    return u


def _random(pictures: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of each picture axes of rotations [B, L, 3], and for each of them a bootstrap of its pixels
    [B, L, count]."""
    device, rotations = generator.device, sw_guidance.ROTATIONS
    axes = random_rotations(pictures * rotations, 3, device=device, generator=generator)
    shape = (pictures, 3 * rotations, count)
    chosen = torch.randint(count, shape, device=device, generator=generator)
    return axes.reshape(pictures, 3 * rotations, 3), chosen


def published_losses(pixels: Tensor, colors: Tensor, axes: Tensor, chosen: Tensor) -> Tensor:
    """``sw_guidance.published_loss`` of each picture: pixels and colors [B, n, 3]."""
    ours, theirs = (
        (axes @ points.mT).gather(-1, chosen).sort().values for points in (pixels, colors)
    )
    return 3 * (ours - theirs).abs().mean((1, 2))


GENERATED: dict[str, Callable[[Any, Pairs, int, float | None], Tensor]] = {
    "unguided": _unguided,
    "published": _published,
    "quality": functools.partial(_guided, "quality"),
    "fast": functools.partial(_guided, "fast"),
}
TUNED = [way for way in GENERATED if way != "unguided"]


def _moved_as_gaussian(picture: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Colors [n, 3] by the linear map that moves a Gaussian with their mean and covariance to that
    of others."""
    # A picture of one color has no covariance; the least that 8 bits tell apart is its spread.
    least = np.eye(3) / 255**2
    covariance, wanted = (np.cov(one.T) + least for one in (picture, colors))
    root = _power(covariance, 0.5)
    back = _power(covariance, -0.5)
    linear = back @ _power(root @ wanted @ root, 0.5) @ back
    return ((picture - picture.mean(0)) @ linear + colors.mean(0)).clip(0, 1)


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """Of a symmetric positive one."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def _with_histograms(picture: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Colors [n, 3], each channel with the values of others of the same rank; equal ones with the
    same value."""
    out = np.empty_like(picture)
    for channel in range(3):
        _, inverse, counts = np.unique(picture[:, channel], return_inverse=True, return_counts=True)
        middle = (counts.cumsum() - (counts + 1) / 2) / len(picture)
        wanted = np.sort(colors[:, channel])
        out[:, channel] = wanted[(middle * len(wanted)).astype(int)][inverse]
    return out


AFTERWARDS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mean-covariance transfer": _moved_as_gaussian,
    "histogram matching": _with_histograms,
}


def generated(
    way: str, pipe: Any, given: Pairs, steps: int, factor: float | None = None
) -> np.ndarray:
    """Pictures [N, side, side, 3] in [0, 1]."""
    start = time.perf_counter()
    found = [
        GENERATED[way](pipe, given[first : first + BATCH], steps, factor).float().cpu()
        for first in range(0, len(given), BATCH)
    ]
    print(f"{way}: {len(given)} pictures in {time.perf_counter() - start:.1f} s", flush=True)
    return torch.cat(found).permute(0, 2, 3, 1).numpy()


def changed(way: str, unguided: np.ndarray, given: Pairs) -> np.ndarray:
    """The same of a way that changes pictures afterwards."""
    return np.stack(
        [
            AFTERWARDS[way](picture.reshape(-1, 3), colors.reshape(-1, 3) / 255.0).reshape(
                picture.shape
            )
            for picture, colors in zip(unguided, given.pixels, strict=True)
        ]
    )


def _bytes(pictures: np.ndarray) -> np.ndarray:
    return (255 * pictures).round().astype(np.uint8)


# ---------------------------------------------------------------------------------------------
# Distances


def distances(
    pictures: dict[str, np.ndarray], pixels: np.ndarray, points: int, device: str
) -> Scores:
    """Of pictures and references [N, side, side, 3] of 8 bits."""
    sets = {way: some.reshape(len(some), -1, 3) for way, some in pictures.items()}
    colors = pixels.reshape(len(pixels), -1, 3)
    samples: list[tuple[np.ndarray, np.ndarray]] = []
    for number, ours in enumerate(colors):
        rng = np.random.default_rng((SEED, number))
        here, there = (rng.permutation(len(ours)) for _ in range(2))
        first, second = ours[there[:points]], ours[there[points : 2 * points]]
        samples += [(some[number][here[:points]], first) for some in sets.values()]
        samples.append((second, first))
    # Not forked: a process that has used a GPU, or has threads, must not be.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        found = np.array(list(pool.map(transport, samples, chunksize=4)))
    found = found.reshape(len(colors), -1, 2)
    scores = {
        way: {"W2": found[:, at, 0], "W1": found[:, at, 1]}
        for at, way in enumerate((*sets, ITSELF))
    }
    for way, some in sets.items():
        scores[way]["sliced W1"] = _sliced(some, colors, device)
    return scores


def transport(samples: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """W2 and W1 of two sets of colors [n, 3] of 8 bits, with RGB from 0 to 1."""
    import ot

    # Equal colors are one with their weight: the same problem, smaller.
    (x, a), (y, b) = (np.unique(one, axis=0, return_counts=True) for one in samples)
    a, b = a / a.sum(), b / b.sum()
    # By channels, in one thread: a matrix product would start as many as there are cores, in each
    # process of as many.
    squares = sum((x[:, None, channel] / 255 - y[:, channel] / 255) ** 2 for channel in range(3))
    costs = []
    for cost in (squares, np.sqrt(squares)):
        value, log = ot.emd2(a, b, cost, numItermax=10_000_000, log=True)
        if log["warning"] is not None:
            raise RuntimeError(f"POT's emd2: {log['warning']}")
        costs.append(float(value))
    return math.sqrt(costs[0]), costs[1]


def _sliced(pictures: np.ndarray, colors: np.ndarray, device: str) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(DIRECTIONS, 3, generator=generator)
    directions = torch.nn.functional.normalize(directions).to(device)
    found = []
    for pair in zip(pictures, colors, strict=True):
        x, y = (torch.from_numpy(one).to(device) / 255 for one in pair)
        found.append(sliced_wasserstein(x, y, directions=directions, method="exact"))
    return torch.stack(found).cpu().numpy()


# ---------------------------------------------------------------------------------------------
# Captions


def captions(
    pictures: np.ndarray, given: Sequence[Asked], pixels: np.ndarray
) -> tuple[list[bool], list[bool]]:
    """Whether shapes and places are right, of all; and colors too, of those captions whose colors
    the reference has."""
    readings = reader.read(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
    shapes = [_shapes_right(*pair) for pair in zip(readings, given, strict=True)]
    colors = [
        reader.judge(reading, one.scene).all_right
        for reading, one, reference in zip(readings, given, pixels, strict=True)
        if one.names_colors and all(_has(reference, thing.color) for thing in one.scene.things)
    ]
    return shapes, colors


def _shapes_right(reading: reader.Reading, one: Asked) -> bool:
    """By the reader's judgment on things that are all of one color."""
    seen, things = (
        tuple(dataclasses.replace(thing, color="") for thing in some)
        for some in (reading.things, one.scene.things)
    )
    return reader.judge(
        dataclasses.replace(reading, things=seen), dataclasses.replace(one.scene, things=things)
    ).all_right


def _has(reference: np.ndarray, color: str) -> bool:
    gap = np.linalg.norm(reference.reshape(-1, 3) / 255 - world.COLORS[color], axis=1)
    return bool((gap < NEAR).mean() >= LEAST_SHARE)


LABELED = 60  # pairs, the first
SEEN = ("unguided", "published", "quality", "fast")
SHEET, SCALE = (4, 6), 1.75  # rows and columns, and pixels for one


def shuffled() -> list[tuple[str, int]]:
    """Way and pair of each picture that is labeled, in order of their numbers."""
    order = [(way, pair) for way in SEEN for pair in range(LABELED)]
    random.Random(SEED).shuffle(order)
    return order


def _numbered(pictures: dict[str, np.ndarray]) -> list[Tensor]:
    found = [pictures[way][pair] for way, pair in shuffled()]
    return [torch.from_numpy(one).permute(2, 0, 1) / 255 for one in found]


def by_eye(labels: Path, given: Sequence[Asked]) -> dict[str, list[bool]]:
    """Of each way, whether shapes and places are right, of the pairs that are labeled. A line of
    the labels tells a picture's number and what is seen: "circle top left; star right"."""
    with labels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    order = shuffled()
    if [int(row["picture"]) for row in rows] != list(range(1, len(order) + 1)):
        raise SystemExit(f"{labels} must have a line for each of {len(order)} pictures, in order")
    right: dict[str, list[bool]] = {way: [] for way in SEEN}
    for row, (way, pair) in zip(rows, order, strict=True):
        right[way].append(_shapes_right(_labeled(row["by eye"]), given[pair]))
    return right


def _labeled(text: str) -> reader.Reading:
    things = []
    for one in filter(None, map(str.strip, text.split(";"))):
        shape, cell = one.split(" ", 1)
        if shape not in (*world.SHAPES, reader.NONE) or cell not in world.CELLS:
            raise SystemExit(f"not a shape and a place: {one!r}")
        row, column = divmod(world.CELLS.index(cell), 3)
        things.append(
            reader.Seen(
                shape, "", "", "plain", (column + 0.5) / 3, (row + 0.5) / 3, 0.1, {"style": 1.0}
            )
        )
    return reader.Reading(tuple(things))


# ---------------------------------------------------------------------------------------------
# Reports


def table(
    scores: Scores,
    pictures: dict[str, np.ndarray],
    given: Sequence[Asked],
    pixels: np.ndarray,
    seen: dict[str, list[bool]] | None = None,
) -> list[dict[str, Any]]:
    """``seen``: what :func:`by_eye` returned."""
    lines = []
    for way, metrics in scores.items():
        line: dict[str, Any] = {"way": way, "pairs": len(given)}
        for metric in METRICS:
            line |= _mean(metric, metrics.get(metric), scores["unguided"][metric])
        judged = captions(pictures[way], given, pixels) if way in pictures else ([], [])
        for name, right in zip(("shapes and places", "colors too"), judged, strict=True):
            line |= _share(name, right)
        if seen is not None:
            line |= _share("by eye", seen.get(way, []))
        lines.append(line)
    return lines


def _mean(metric: str, values: np.ndarray | None, unguided: np.ndarray) -> dict[str, str]:
    names = metric, f"{metric}, 95 %", f"{metric} / unguided", f"{metric} / unguided, 95 %"
    if values is None:
        return dict.fromkeys(names, "")
    drawn = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    ours, plain = values[drawn].mean(1), unguided[drawn].mean(1)
    cells = [f"{values.mean():.4f}", _between(ours), f"{values.mean() / unguided.mean():.3f}"]
    return dict(zip(names, (*cells, _between(ours / plain, 3)), strict=True))


def _between(values: np.ndarray, digits: int = 4) -> str:
    low, high = np.quantile(values, (0.025, 0.975))
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _share(name: str, right: list[bool]) -> dict[str, Any]:
    line: dict[str, Any] = {f"{name}, captions": len(right), name: "", f"{name}, 95 %": ""}
    if right:
        low, high = wilson(sum(right), len(right))
        line |= {name: f"{np.mean(right):.3f}", f"{name}, 95 %": f"{low:.3f} to {high:.3f}"}
    return line


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    """With intervals beside their values."""
    head = [name for name in lines[0] if not name.endswith(", 95 %")]
    cells = [
        [f"{line[name]} ({between})" if (between := line.get(f"{name}, 95 %")) else str(line[name])
         for name in head]
        for line in lines
    ]  # fmt: skip
    measure.print_lines(head, cells)


def draw(
    scores: Scores, pictures: dict[str, np.ndarray], given: Sequence[Asked], pixels: np.ndarray
) -> Any:
    """The first pairs, from left to right; from top to bottom the reference and the ways, each
    picture above its sliced W1."""
    from matplotlib.figure import Figure

    rows = {"reference": pixels} | {
        way: pictures[way] for way in (*GENERATED, *AFTERWARDS) if way in pictures
    }
    count = min(SHOWN, len(given))
    figure = Figure(
        figsize=(0.5 + 1.5 * count, 0.9 + 1.67 * len(rows)),
        dpi=110,
        facecolor="white",
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    panels = figure.subplots(len(rows), count, squeeze=False)
    for line, (way, shown) in zip(panels, rows.items(), strict=True):
        for number, axes in enumerate(line):
            axes.imshow(shown[number])
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if way in scores:
                distance = f"{scores[way]['sliced W1'][number]:.3f}"
                axes.set_xlabel(distance, color=figures.FAINT, fontsize=8, labelpad=2)
        line[0].set_ylabel(way.replace(" ", "\n"), color=figures.INK, fontsize=10)
    for axes, one in zip(panels[0], given, strict=False):
        axes.set_title(textwrap.fill(one.prompt, 22), color=figures.INK, fontsize=8)
    figure.supxlabel(
        "below each picture: its sliced W1 to the reference", color=figures.INK, fontsize=9
    )
    return figure


# ---------------------------------------------------------------------------------------------
# What is asked for


def _pipeline(device: str) -> Any:
    pipe = embedded.load("v2", device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def study(given: argparse.Namespace) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Pictures of each way, and references' pixels; all of 8 bits."""
    pipe = _pipeline(given.device)
    made = pairs(given.count, SEED, pipe)
    _save(given.pictures, "references", made.pixels)
    unguided = generated("unguided", pipe, made, given.steps)
    found = {}
    for way in _chosen((*GENERATED, *AFTERWARDS), given.ways, always="unguided"):
        if way == "unguided":
            pictures = unguided
        elif way in AFTERWARDS:
            pictures = changed(way, unguided, made)
        else:
            pictures = generated(way, pipe, made, given.steps)
        found[way] = _bytes(pictures)
        _save(given.pictures, way, found[way])
    return found, made.pixels


def _chosen(ways: Sequence[str], parts: Sequence[str], always: str = "") -> list[str]:
    """Ways that have one of these parts in their names; all of them if there are none."""
    return [way for way in ways if way == always or not parts or any(part in way for part in parts)]


def _save(folder: Path | None, name: str, pictures: np.ndarray) -> None:
    """At once: a run that is cut short leaves what it had made."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / f"{name}.npz", pictures=pictures)


def _load(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What ``study`` returned."""
    found = {}
    for way in ("references", *GENERATED, *AFTERWARDS):
        path = folder / f"{way}.npz"
        if path.exists():
            found[way] = np.load(path)["pictures"]
    if not {"references", "unguided"} <= found.keys():
        raise SystemExit(f"{folder} has no references.npz and unguided.npz, as --pictures writes")
    return found, found.pop("references")


def tune(given: argparse.Namespace) -> list[dict[str, Any]]:
    pipe = _pipeline(given.device)
    made = pairs(given.count, TUNING_SEED, pipe)
    pictures = {"unguided": _bytes(generated("unguided", pipe, made, given.steps))}
    rates = {"unguided": 0.0}
    for way in _chosen(TUNED, given.ways):
        for factor in FACTORS:
            name = f"{way} × {factor:g}"
            rates[name] = _rate(way, factor, pipe, made.latents)
            pictures[name] = _bytes(generated(way, pipe, made, given.steps, factor))
    scores = distances(pictures, made.pixels, given.points, given.device)
    lines = table(scores, pictures, made.asked, made.pixels)
    return [
        {"way": line["way"], "learning rate": f"{rates[line['way']]:.4g}"} | line
        for line in lines
        if line["way"] in rates
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, help="pairs: 200, or 24 to tune")
    parser.add_argument("--steps", type=int, default=evaluate.STEPS)
    parser.add_argument("--points", type=int, help=f"for W1, W2: {POINTS}; to tune {TUNING_POINTS}")
    parser.add_argument("--ways", nargs="+", default=[], metavar="PART", help="of their names")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--figure", type=Path, help="draw examples there")
    parser.add_argument("--pictures", type=Path, help="save all pictures in this folder")
    parser.add_argument("--pictures-only", action="store_true", help="leave it at that")
    parser.add_argument("--metrics-of", type=Path, help="of the pictures in this folder")
    parser.add_argument("--sheets", type=Path, help="write pictures there, to be labeled")
    parser.add_argument("--labels", type=Path, help="what was seen on them")
    parser.add_argument("--tune", action="store_true")
    given = parser.parse_args()
    if given.pictures_only and (not given.pictures or given.tune or given.metrics_of):
        parser.error("--pictures-only goes with --pictures, and without --tune and --metrics-of")
    given.count = given.count or (24 if given.tune else 200)
    given.points = given.points or (TUNING_POINTS if given.tune else POINTS)
    if given.tune:
        lines = tune(given)
    else:
        pictures, pixels = _load(given.metrics_of) if given.metrics_of else study(given)
        if given.pictures_only:
            return
        of = asked(len(pixels), SEED)
        if given.sheets:
            save_sheets(_numbered(pictures), given.sheets, SHEET, SCALE)
            return
        seen = by_eye(given.labels, of) if given.labels else None
        scores = distances(pictures, pixels, given.points, given.device)
        lines = table(scores, pictures, of, pixels, seen)
        if given.figure:
            given.figure.parent.mkdir(parents=True, exist_ok=True)
            draw(scores, pictures, of, pixels).savefig(given.figure)
    print_table(lines)
    if given.csv:
        measure.save_csv(lines, given.csv)


if __name__ == "__main__":
    main()
