"""What masks on the cross-attention cost in a UNet, and what regions do to pictures.

``python -m benchmarks.bench_region_attention [--device cuda] [--quick] [--csv FILE]``
``python -m benchmarks.bench_region_attention --quality [v1 v2] [--folder FOLDER] [--csv FILE]
[--sheets FOLDER]``

Cost: one call of a UNet in a CUDA graph, two rows, as it is, with RegionAttention's masks on all
cross-attentions, and with GatedAttention on its default layers, heads of the UNet's dtype, in
inference. The UNet has the size of SDXL's, with random weights in bfloat16, for 1024 pixels; on a
CPU, and with --quick, that of the embedded xl.

Quality: prompts of two things, "a red circle and a blue square", that say nothing of where, and a
half of the picture for each: in turn left and right, right and left, above and below, below and
above. The same seeds without the method, with it, and with phrases that are encoded alone. A
picture counts where both things, by the reader, are there with their color and shape and the
center within their half; with a 95 % interval (Wilson's).
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdcore
from benchmarks import bench_patching, measure, suite
from benchmarks.measure import Row
from benchmarks.suite import Asked
from sdcore import embedded
from sdcore.embedded import evaluate, reader, world
from sdcore.masks import RegionMask
from sdcore.methods.cross_attention import Layer, Wanted, layers, masked

SETS = 3  # of inputs
ALONE = 0.4
LEFT, RIGHT, TOP, BOTTOM = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 0.5), (0, 0.5, 1, 1)
HALVES = ((LEFT, RIGHT), (RIGHT, LEFT), (TOP, BOTTOM), (BOTTOM, TOP))
# What regions are given, by way.
WAYS: dict[str, dict[str, float] | None] = {
    "without": None,
    "with": {},
    f"phrases alone: {ALONE:g}": {"alone": ALONE},
}


# ---------------------------------------------------------------------------------------------
# Cost


def rows(asked: Asked) -> Iterator[Row]:
    device = asked.device
    if not asked.has(torch.bfloat16 if asked.full_models else torch.float32):
        return
    pipe, options = bench_patching.pipeline(device, asked.full_models)
    unet = pipe.unet.requires_grad_(False)
    what = (
        f"SDXL's UNet, latents of {unet.config.sample_size}², 2 rows"
        if asked.full_models
        else "the embedded xl's, 2 rows"
    )
    if asked.cases not in what:
        return
    inputs = [_inputs(options) for _ in range(SETS)]
    step = torch.tensor(500, device=device)

    def call(sample: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        times = torch.zeros(len(sample), 6, device=device, dtype=sample.dtype)
        with torch.no_grad():
            return unet(
                sample,
                step,
                text,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": times},
                return_dict=False,
            )[0]

    plain = call(*inputs[0])
    gates = sdcore.GatedAttention.for_unet(unet).to(unet.dtype)
    gates.watch = False
    ways = {
        "as it is": contextlib.nullcontext(),
        "regions": _regions(unet, inputs[0], open_to_all=False),
        "regions, all open": _regions(unet, inputs[0], open_to_all=True),
        "gates, all open": gates.attached(unet),
    }
    taken, repeats = [], 3 if asked.quick else 7
    for name, way in ways.items():
        with way:
            off = float((call(*inputs[0]) - plain).norm() / plain.norm())
            milliseconds, spread, how = measure.milliseconds(call, inputs, device, repeats)
        if "all open" in name and not off <= 0.05:
            raise measure.WrongError(f"{name}: off by {off:.3g}")
        if name == "regions" and not off >= 1e-4:
            raise measure.WrongError("regions change nothing")
        taken.append((name, off, milliseconds, spread, how))
    for name, off, milliseconds, spread, how in taken:
        yield Row(
            "region_attention",
            what,
            name,
            str(unet.dtype).removeprefix("torch."),
            milliseconds,
            spread,
            how,
            "the reference" if name == "as it is" else f"differs by {off:.1e}",
            ratios={"as it is": taken[0][2] / milliseconds},
            passed=True if "all open" in name else None,
        )


def _inputs(options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows: of the negative prompt and of the prompt."""
    text, pooled = (
        torch.cat([options[f"negative_{name}"], options[name]])
        for name in ("prompt_embeds", "pooled_prompt_embeds")
    )
    latents = options["latents"]
    return torch.randn_like(latents).repeat(2, 1, 1, 1), text, pooled


@contextlib.contextmanager
def _regions(unet: Any, inputs: tuple[Tensor, ...], open_to_all: bool) -> Iterator[None]:
    """Two regions side by side, each with eight of the tokens; or the same with all tokens open."""
    made: dict[int, RegionMask] = {}
    rows, count = inputs[1].shape[:2]

    def wanted(layer: Layer) -> Wanted:
        n = layer.hidden_states.shape[1]
        if n not in made:
            made[n] = mask(n, layer.hidden_states.device)
        return Wanted(made[n])

    def mask(n: int, device: torch.device) -> RegionMask:
        pixels = torch.ones(1, n, 3, dtype=torch.bool)
        left = torch.arange(n) % math.isqrt(n) < math.isqrt(n) / 2
        pixels[0, :, 1], pixels[0, :, 2] = left, ~left
        tokens = torch.zeros(rows, count, 3, dtype=torch.bool)
        tokens[..., 0] = True
        if not open_to_all:
            tokens[:, 1:17, 0] = False
            tokens[:, 1:9, 1], tokens[:, 9:17, 2] = True, True
        return RegionMask.from_members(pixels.to(device), tokens.to(device))

    with masked(unet, layers(unet), wanted):
        yield


# ---------------------------------------------------------------------------------------------
# Quality


def quality(
    name: str, count: int, device: str, folder: Path
) -> tuple[list[dict[str, Any]], Tensor]:
    """Rows with shares, and pictures: of each prompt one in each way."""
    pipe = embedded.load(name, device=device, folder=folder)
    pipe.set_progress_bar_config(disable=True)
    made: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    asked = list(_asked(count))
    for number, (scene, boxes) in enumerate(asked):
        phrases = [world.with_article(f"{one.color} {one.shape}") for one in scene.things]
        prompt = " and ".join(phrases)
        regions = [
            sdcore.Region(phrase, box=box) for phrase, box in zip(phrases, boxes, strict=True)
        ]
        for way, options in WAYS.items():
            with contextlib.ExitStack() as stack:
                if options is not None:
                    method = sdcore.RegionAttention(*regions, **options)
                    stack.enter_context(sdcore.patch(pipe, method))
                made[way].append(evaluate.generate(pipe, [prompt], 1000 + number)[0])
    lines = []
    for way, pictures in made.items():
        readings = reader.read(torch.stack(pictures))
        good = sum(_right(reading, *one) for reading, one in zip(readings, asked, strict=True))
        low, high = wilson(good, count)
        figures = {"share": good / count, "low": low, "high": high}
        lines.append(
            {"model": name, "regions": way, "prompts": count}
            | {key: f"{value:.3f}" for key, value in figures.items()}
        )
    turns = [one for some in zip(*made.values(), strict=True) for one in some]
    return lines, torch.stack(turns)


Box = tuple[float, float, float, float]


def _asked(count: int) -> Iterator[tuple[world.Scene, tuple[Box, Box]]]:
    """Scenes of two things that differ in color and shape, and boxes for them."""
    rng = random.Random(evaluate.SEED + 6)
    for number in range(count):
        while True:
            scene = world.scene(rng, things=2, held_out=True)
            first, second = scene.things
            if first.color != second.color and first.shape != second.shape:
                break
        yield scene, HALVES[number % len(HALVES)]


def _right(reading: reader.Reading, scene: world.Scene, boxes: tuple[Box, Box]) -> bool:
    """Whether each thing is there, in its half of the picture."""
    return all(
        any(
            seen.color == thing.color
            and seen.shape == thing.shape
            and box[0] <= seen.x <= box[2]
            and box[1] <= seen.y <= box[3]
            for seen in reading.things
        )
        for thing, box in zip(scene.things, boxes, strict=True)
    )


def wilson(good: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of 95 % of a share (Wilson, 1927)."""
    share, spread = good / count, z * z / count
    center = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return (center - half) / (1 + spread), (center + half) / (1 + spread)


def main() -> None:
    parser = suite.parser_of(__doc__)
    parser.add_argument("--quality", nargs="*", metavar="MODEL", help="default: v1 v2")
    parser.add_argument("--count", type=int, default=200, help="prompts")
    parser.add_argument("--folder", type=Path, default=embedded.FOLDER, help="where models are")
    parser.add_argument("--sheets", type=Path, help="write a sheet of pictures of each model there")
    given = parser.parse_args()
    if given.quality is None:
        suite.run(rows, given)
        return
    lines: list[dict[str, Any]] = []
    for name in given.quality or ("v1", "v2"):
        more, pictures = quality(name, given.count, given.device, given.folder)
        lines += more
        if given.sheets:
            given.sheets.mkdir(parents=True, exist_ok=True)
            evaluate.save_sheet(pictures, given.sheets / f"regions-{name}.jpg")
    measure.print_lines(list(lines[0]), [list(map(str, line.values())) for line in lines])
    if given.csv:
        measure.save_csv(lines, given.csv)


if __name__ == "__main__":
    main()
