"""Trains the network of :mod:`sdcore.embedded.reader` on renders, and measures the reader.

``python -m sdcore.embedded.train_reader [--scenes N] [--epochs N] [--csv FILE]``

Writes reader.safetensors beside itself; some minutes on two cores. ``--epochs 0`` measures only.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sdcore.embedded import reader, world

# Renders are sharp and generated pictures are not quite: the most of blur, in pixels, and of noise.
MOST_BLUR, MOST_NOISE = 1.2, 0.04
BATCH = 256
AT_ONCE = 50  # pictures


def degraded(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture blurred, of another contrast, and noisy, by its own random amounts."""

    def uniform(low: float, high: float) -> Tensor:
        value = torch.rand(len(images), 1, 1, 1, generator=generator)
        return low + (high - low) * value

    out = _blurred(images, uniform(0, MOST_BLUR).flatten())
    mean = out.mean((2, 3), keepdim=True)
    out = mean + uniform(0.85, 1.1) * (out - mean) + uniform(-0.05, 0.05)
    noise = torch.randn(out.shape, generator=generator)
    return (out + uniform(0, MOST_NOISE) * noise).clamp(0, 1)


def _blurred(images: Tensor, widths: Tensor) -> Tensor:
    """By Gaussians of these standard deviations, in pixels."""
    at = torch.arange(-4, 5)
    kernels = torch.softmax(-(at**2) / (2 * widths[:, None] ** 2 + 1e-3), 1)  # [B, 9]
    batch, channels = images.shape[:2]
    kernels = kernels.repeat_interleave(channels, 0)[:, None]
    rows = F.pad(images, (4, 4, 4, 4), mode="replicate").flatten(0, 1)[None]
    rows = F.conv2d(rows, kernels[:, :, None], groups=batch * channels)
    return F.conv2d(rows, kernels[..., None], groups=batch * channels)[0].unflatten(
        0, (batch, channels)
    )


def spoiled(scenes: list[world.Scene], rng: random.Random) -> Tensor:
    """Pictures with one part that is none of the world's shapes: two of them in one, or a piece."""
    pictures = []
    for one in scenes:
        first = one.things[0]
        if rng.random() < 0.5:
            pictures.append(_merged(one, first, rng))
        else:
            pictures.append(_cut(one, first, rng))
    return torch.cat(pictures)


def _merged(scene: world.Scene, first: world.Thing, rng: random.Random) -> Tensor:
    others = [shape for shape in world.SHAPES if shape != first.shape]
    turn, far = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 0.9) * first.radius
    second = replace(
        first,
        shape=rng.choice(others),
        x=first.x + far * math.cos(turn),
        y=first.y + far * math.sin(turn),
        radius=rng.uniform(0.7, 1.1) * first.radius,
    )
    return world.render([replace(scene, things=(first, second))])


def _cut(scene: world.Scene, first: world.Thing, rng: random.Random) -> Tensor:
    whole, bare = world.render([replace(scene, things=things) for things in ((first,), ())])
    turn, far = rng.uniform(0, 2 * math.pi), rng.uniform(-0.1, 0.25) * first.radius
    x, y = world.pixel_grid(world.SIZE, "cpu")
    beyond = (x - first.x) * math.cos(turn) + (y - first.y) * math.sin(turn) > far
    return torch.where(beyond, bare, whole)[None]


def crops(count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What the network sees of the things of so many scenes, and what they are; -1: not known."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    seen: list[Tensor] = []
    known: list[dict[str, int]] = []
    for first in range(0, count, AT_ONCE):
        many = min(AT_ONCE, count - first)
        style = "ink" if rng.random() < 0.3 else "plain"
        if rng.random() < 0.15:
            scenes = [world.scene(rng, things=1, style=style) for _ in range(many)]
            images = degraded(spoiled(scenes, rng), generator)
            label = {"shape": len(world.SHAPES), "color": -1, "texture": -1, "style": -1}
            for image, parts in zip(images, reader.parts_of(images), strict=True):
                seen += [reader.crop(image, part) for part in parts[:1]]
                known += [label] * len(parts[:1])
            continue
        scenes = [world.scene(rng, style=style) for _ in range(many)]
        images = degraded(world.render(scenes), generator)
        for one, image, parts in zip(scenes, images, reader.parts_of(images), strict=True):
            for part in parts:
                thing = min(one.things, key=lambda t, p=part: math.hypot(t.x - p.x, t.y - p.y))
                if math.hypot(thing.x - part.x, thing.y - part.y) < 0.5 * thing.radius:
                    seen.append(reader.crop(image, part))
                    known.append(_labels(thing, one.style))
    return torch.stack(seen), {
        name: torch.tensor([label[name] for label in known]) for name in reader.HEADS
    }


def _labels(thing: world.Thing, style: str) -> dict[str, int]:
    values = {"shape": thing.shape, "color": thing.color, "texture": thing.texture, "style": style}
    labels = {name: reader.HEADS[name].index(value) for name, value in values.items()}
    if style == "ink":
        labels["texture"] = -1  # which ink does not show
    return labels


def train(scenes: int, epochs: int, seed: int = 0) -> reader.Classifier:
    torch.manual_seed(seed)
    start = time.perf_counter()
    inputs, labels = crops(scenes, seed)
    print(f"{len(inputs):,} things of {scenes:,} scenes in {time.perf_counter() - start:.0f} s")
    network = reader.Classifier()
    steps = epochs * math.ceil(len(inputs) / BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(inputs)).split(BATCH):
            some = inputs[chosen]
            if torch.rand(()) < 0.5:
                some = some.flip(3)
            loss = sum(
                F.cross_entropy(logits, labels[name][chosen], ignore_index=-1)
                for name, logits in network(some).items()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: loss {total / len(inputs):.4f}, {seconds:.0f} s", flush=True)
    return network.eval()


def save(network: reader.Classifier, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.half() for name, value in network.state_dict().items()}, path)


def measured(count: int, seed: int, style: str, degrade: bool) -> dict[str, float]:
    """Shares of held-out renders that are read right."""
    scenes = world.scenes(count, seed, style=style, held_out=True)
    generator = torch.Generator().manual_seed(seed)
    right = {
        "count": 0,
        "style": 0,
        "color": 0,
        "shape": 0,
        "texture": 0,
        "position": 0,
        "layout": 0,
    }
    things = 0
    for first in range(0, count, AT_ONCE):
        some = scenes[first : first + AT_ONCE]
        images = world.render(some)
        readings = reader.read(degraded(images, generator) if degrade else images)
        for one, reading in zip(some, readings, strict=True):
            verdict = reader.judge(reading, one)
            right["count"] += verdict.count
            right["style"] += verdict.style
            right["layout"] += verdict.layout
            things += len(one.things)
            for thing, seen in _nearest(one, reading):
                right["color"] += seen.color == thing.color
                right["shape"] += seen.shape == thing.shape
                right["texture"] += seen.texture == thing.texture
                right["position"] += math.hypot(seen.x - thing.x, seen.y - thing.y) < 0.04
    of_scenes = ("count", "style", "layout")
    shares = {
        name: value / (count if name in of_scenes else things) for name, value in right.items()
    }
    if style == "ink":
        shares["texture"] = math.nan  # which ink does not show
    return shares


def _nearest(
    scene: world.Scene, reading: reader.Reading
) -> Iterator[tuple[world.Thing, reader.Seen]]:
    """Each thing with the nearest that was seen; none, if nothing was."""
    for thing in scene.things if reading.things else ():
        near = min(reading.things, key=lambda s, t=thing: math.hypot(s.x - t.x, s.y - t.y))
        yield thing, near


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=20000, help="to train on (default: 20000)")
    parser.add_argument("--epochs", type=int, default=12, help="0: measure what there is")
    parser.add_argument("--csv", type=Path, help="write the measurements there")
    arguments = parser.parse_args()
    if arguments.epochs:
        save(train(arguments.scenes, arguments.epochs), reader.WEIGHTS)
        reader.classifier.cache_clear()
    rows = []
    for style in world.STYLES:
        for degrade in (False, True):
            name = f"{style}, {'degraded' if degrade else 'sharp'}"
            shares = {k: f"{v:.4f}" for k, v in measured(1000, 10**6, style, degrade).items()}
            rows.append({"pictures": name, **shares})
            print(name + ": " + ", ".join(f"{k} {v}" for k, v in shares.items()), flush=True)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
