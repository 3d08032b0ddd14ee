"""How far the reader of the embedded models agrees with labels that were given by eye.

``python -m benchmarks.reader_agreement [--labels FILE] [--update]`` compares, and writes the
reader's column anew; with ``--sheets FOLDER`` it writes the pictures, numbered, to be labeled.

All figures of the embedded models are what :mod:`sdcore.embedded.reader` reads, so that has to be
right about pictures that models made, and not only about renders. The labels' file has a line for
each of the pictures: its number, model and prompt; what was seen, "plain: red circle top left; blue
star right", by someone who had neither the prompts nor the reader's readings; and what it reads.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from sdcore import embedded
from sdcore.embedded import evaluate, reader, world

LABELS = Path(__file__).parent / "results" / "reader_labels.csv"
COUNTS = {"v1": 60, "v2": 50, "xl": 40, "v1-ink": 40, "v1-edge": 20}
SEED = evaluate.SEED + 100
FIELDS = ("picture", "model", "prompt", "by eye", "by the reader")
SHEET, SCALE, GAP = (3, 5), 2.5, 26
MARGIN = 0.05  # of the side, by which a place may lie outside of the cell that was named


@dataclass(frozen=True)
class Label:
    """A thing: what is told of it, and in which of the world's cells it is."""

    color: str
    shape: str
    cell: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape} {self.cell}"

    @classmethod
    def of(cls, text: str) -> Label:
        color, shape, cell = text.split(" ", 2)
        known = color in world.COLORS and shape in (*world.SHAPES, reader.NONE)
        if not known or cell not in world.CELLS:
            raise ValueError(f"not a color, a shape and a place: {text!r}")
        return cls(color, shape, cell)


def parsed(text: str) -> tuple[str, list[Label]]:
    """Style and things of "plain: red circle top left; blue star right"."""
    style, things = text.split(":", 1)
    if style not in world.STYLES:
        raise ValueError(f"not a style: {style!r}")
    return style, [Label.of(one.strip()) for one in things.split(";") if one.strip()]


def pictures() -> tuple[list[str], list[str], list[Tensor]]:
    """Models, prompts and pictures [3, side, side], in order of their numbers."""
    names: list[str] = []
    prompts: list[str] = []
    images: list[Tensor] = []
    for model, count in COUNTS.items():
        style = "ink" if model == "v1-ink" else "plain"
        scenes = world.scenes(count, SEED, style=style, held_out=True)
        rng = random.Random(SEED)
        captions = [world.caption(one, rng) for one in scenes]
        drawn = world.outlines(scenes) if model == "v1-edge" else None
        images += evaluate.generate(embedded.load(model), captions, SEED, drawn)
        names += [model] * count
        prompts += captions
    return names, prompts, images


def save_sheets(
    images: Sequence[Tensor],
    folder: Path,
    sheet_of: tuple[int, int] = SHEET,
    scale: float = SCALE,
) -> None:
    """Numbered from 1, with marks at thirds of the sides. ``sheet_of``: rows and columns."""
    rows, columns = sheet_of
    side = int(scale * world.SIZE)
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(images), rows * columns):
        sheet = Image.new("RGB", (columns * (side + GAP) + GAP, rows * (side + GAP) + GAP), "white")
        draw = ImageDraw.Draw(sheet)
        for place, image in enumerate(images[first : first + rows * columns]):
            x, y = (GAP + at * (side + GAP) for at in (place % columns, place // columns))
            pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side)), (x, y))
            draw.text((x, y - 16), str(first + place + 1), "black")
            for third in (side // 3, 2 * side // 3):
                draw.line((x + third, y - 6, x + third, y), "black")
                draw.line((x - 6, y + third, x, y + third), "black")
        sheet.save(folder / f"sheet-{first // (rows * columns) + 1:02}.png")


def described(reading: reader.Reading) -> str:
    things = [Label(one.color, one.shape, world.cell_of(one.x, one.y)) for one in reading.things]
    return f"{reading.style or 'plain'}: " + "; ".join(map(str, things))


def agreement(text: str, reading: reader.Reading) -> dict[str, list[bool]]:
    """Of one picture: whether style and number agree, and of each thing the rest."""
    style, labels = parsed(text)
    same: dict[str, list[bool]] = {
        "style": [style == (reading.style or "plain")],
        "number of things": [len(labels) == len(reading.things)],
    }
    if len(labels) != len(reading.things):
        return same
    # Things have no names: those belong together that agree the most.
    pairs = max(
        (list(zip(labels, order, strict=True)) for order in permutations(reading.things)),
        key=lambda some: sum(sum(_matches(*pair).values()) for pair in some),
    )
    for pair in pairs:
        for what, agrees in _matches(*pair).items():
            same.setdefault(what, []).append(agrees)
    return same


def _matches(label: Label, seen: reader.Seen) -> dict[str, bool]:
    row, column = divmod(world.CELLS.index(label.cell), 3)
    inside = all(
        at / 3 - MARGIN <= place <= (at + 1) / 3 + MARGIN
        for at, place in ((column, seen.x), (row, seen.y))
    )
    return {"color": label.color == seen.color, "shape": label.shape == seen.shape, "place": inside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", type=Path, default=LABELS)
    parser.add_argument("--update", action="store_true", help="write the reader's column anew")
    parser.add_argument("--sheets", type=Path, help="write the pictures there, and nothing else")
    given = parser.parse_args()
    names, prompts, images = pictures()
    if given.sheets:
        save_sheets(images, given.sheets)
        return
    readings = [reader.read(one[None])[0] for one in images]
    with given.labels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if len(rows) != len(images):
        raise SystemExit(f"{given.labels} has {len(rows)} lines for {len(images)} pictures")
    total: dict[str, list[bool]] = {}
    for row, name, prompt, reading in zip(rows, names, prompts, readings, strict=True):
        row |= {"model": name, "prompt": prompt, "by the reader": described(reading)}
        for what, same in agreement(row["by eye"], reading).items():
            total.setdefault(what, []).extend(same)
    for what, same in total.items():
        print(f"{what}: {sum(same)} of {len(same)} agree, {100 * sum(same) / len(same):.1f} %")
    if given.update:
        with given.labels.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
