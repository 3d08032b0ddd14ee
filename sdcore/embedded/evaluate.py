"""Measures the embedded models by the reader, on prompts that were kept from their training.

``python -m sdcore.embedded.evaluate [MODEL …] [--count N] [--device cuda] [--csv FILE]
[--sheets FOLDER]``

Per model: of pictures of one thing, the shares with the right color and shape; of two things, the
share with both colors, both shapes and the relation right; the share in ink. Of v1-edge, how far
what is drawn covers what was outlined (intersection over union), and of the autoencoders, PSNR and
the sliced W₁ between the colors of a render and of its reconstruction.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sdcore import embedded
from sdcore.embedded import FOLDER, reader, world
from sdcore.ops import sliced_wasserstein

STEPS, GUIDANCE = 20, 4.0
SEED = 10**7  # of scenes that no training run draws
BATCH = 50
SHEET = (4, 6)  # rows and columns


def generate(
    pipe: DiffusionPipeline, prompts: list[str], seed: int, outlines: Tensor | None = None
) -> Tensor:
    """Pictures [N, 3, side, side] in [0, 1], on the CPU; DDIM, with guidance."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    found = []
    for first in tqdm(range(0, len(prompts), BATCH), "pictures", leave=False):
        some = prompts[first : first + BATCH]
        options = {}
        if outlines is not None:
            options["image"] = outlines[first : first + BATCH].expand(-1, 3, -1, -1)
        images = pipe(
            some,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            height=world.SIZE,
            width=world.SIZE,
            generator=torch.Generator("cpu").manual_seed(seed + first),
            output_type="pt",
            **options,
        ).images
        found.append(images.float().cpu())
    return torch.cat(found)


def measure(name: str, pipe: DiffusionPipeline, count: int) -> tuple[dict[str, float], Tensor]:
    """The model's figures, and pictures of it with their prompts."""
    style = "ink" if name == "v1-ink" else "plain"
    figures = {}
    shown = []
    for things in (1, 2):
        scenes = world.scenes(count, SEED + things, things=things, style=style, held_out=True)
        rng = random.Random(SEED)
        prompts = [world.caption(one, rng) for one in scenes]
        drawn = world.outlines(scenes) if name == "v1-edge" else None
        images = generate(pipe, prompts, SEED, drawn)
        readings = reader.read(images)
        verdicts = [reader.judge(*pair) for pair in zip(readings, scenes, strict=True)]
        if things == 1:
            figures["one: color"] = mean(one.count and one.colors for one in verdicts)
            figures["one: shape"] = mean(one.count and one.shapes for one in verdicts)
        else:
            figures["two: all right"] = mean(one.all_right for one in verdicts)
        figures[f"{things}: in ink"] = mean(one.style == "ink" for one in readings)
        if drawn is not None:
            figures[f"{things}: IoU"] = mean(overlaps(images, scenes))
        shown.append(images[: SHEET[0] * SHEET[1] // 2])
    return figures, torch.cat(shown)


def overlaps(images: Tensor, scenes: list[world.Scene]) -> list[float]:
    """Intersection over union of what stands out and of what was to be drawn."""
    found = reader.foreground(images)
    wanted = [covered.amax(0) > 0.5 for covered in world.masks(scenes)]
    return [
        float((a & b).sum() / (a | b).sum().clamp(min=1))
        for a, b in zip(found, wanted, strict=True)
    ]


def measure_autoencoder(pipe: DiffusionPipeline, count: int) -> dict[str, float]:
    """Of held-out renders."""
    ratios, distances = [], []
    directions = torch.nn.functional.normalize(
        torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), dim=1
    )
    with torch.inference_mode():
        scenes = world.scenes(count, SEED + 3, held_out=True)
        for first in range(0, count, BATCH):
            images = world.render(scenes[first : first + BATCH])
            inputs = (2 * images - 1).to(pipe.device, pipe.vae.dtype)
            latents = pipe.vae.encode(inputs).latent_dist.mean
            again = (pipe.vae.decode(latents).sample.float().cpu() / 2 + 0.5).clamp(0, 1)
            error = (again - images).square().mean((1, 2, 3))
            ratios += (-10 * error.log10()).tolist()
            colors = [side.flatten(2).mT.contiguous() for side in (images, again)]
            distances += sliced_wasserstein(*colors, directions=directions).tolist()
    return {"PSNR, dB": mean(ratios), "PSNR, least": min(ratios), "sliced W1": mean(distances)}


def save_sheet(images: Tensor, path: Path) -> None:
    rows, columns = SHEET
    side = world.SIZE
    sheet = Image.new("RGB", (columns * (side + 4) + 4, rows * (side + 4) + 4), "white")
    pixels = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
    for number, one in enumerate(pixels[: rows * columns]):
        at = (4 + number % columns * (side + 4), 4 + number // columns * (side + 4))
        sheet.paste(Image.fromarray(np.ascontiguousarray(one)), at)
    sheet.save(path, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(embedded.NAMES), metavar="MODEL")
    parser.add_argument("--count", type=int, default=500, help="prompts of each kind")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the models are")
    parser.add_argument("--csv", type=Path, help="write the figures there")
    parser.add_argument("--sheets", type=Path, help="write a sheet of pictures of each model there")
    given = parser.parse_args()
    rows = []
    for name in given.models:
        pipe = embedded.load(name, device=given.device, folder=given.folder)
        figures, images = measure(name, pipe, given.count)
        if "-" not in name:
            figures |= measure_autoencoder(pipe, given.count)
        rows += [{"model": name, "figure": key, "value": f"{v:.4f}"} for key, v in figures.items()]
        print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in figures.items()))
        if given.sheets:
            given.sheets.mkdir(parents=True, exist_ok=True)
            save_sheet(images, given.sheets / f"{name}.jpg")
    if given.csv:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, ("model", "figure", "value"), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
