"""The command line: ``sdcore info``, ``recolor``, ``generate``, ``color``, ``regions``, ``delta``.

A command that can't do what it was asked says so in one line and exits with 2, before it starts
on anything that takes time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from sdcore import __version__, backends, images
from sdcore.methods.color_guidance import PRESETS, ColorGuidance
from sdcore.methods.delta_sampling import Control, DeltaSampling
from sdcore.methods.lora import LoRA
from sdcore.methods.region_attention import Region, RegionAttention
from sdcore.ops import random_rotations, sliced_wasserstein
from sdcore.palette import Palette
from sdcore.patching import FOLLOWS_SAMPLE, patch
from sdcore.recolor import DIRECTIONS, STEPS, recolor

EMBEDDED = "embedded:"  # before the name of a model that comes with the package

# Module and the distribution that brings it, in the extras `cli` and `diffusers`.
DIFFUSERS = ("diffusers", "diffusers")
TRANSFORMERS = ("transformers", "transformers")
PEFT = ("peft", "peft")
PILLOW = ("PIL", "Pillow")
POT = ("ot", "POT")
MATPLOTLIB = ("matplotlib.figure", "matplotlib")
TQDM = ("tqdm", "tqdm")

# Exact transport between more points takes minutes: its time grows with their square and more.
POINTS = 3000
SWEEP = (0.5, 1.0, 1.5, 2.0)  # strengths that a grid shows
# For the sliced distance over all pixels: 96 directions, a multiple of 3.
ROTATIONS = 32


class CommandError(Exception):
    """The command can't do what it was asked; the message is one line for the user."""


class Parser(argparse.ArgumentParser):
    """Errors in one line; argparse would print the usage above each."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 2 with an error in one line, or 130 on Ctrl-C."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (CommandError, images.ImageError, backends.BackendError) as error:
        print(f"sdcore {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sdcore {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> Parser:
    parser = Parser(prog="sdcore", description="Fused kernels for diffusion research.")
    parser.add_argument("--version", action="version", version=f"sdcore {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser(
        "info",
        help="what this machine can run, what it can't, and why",
        description="Versions, devices, compiled modules, and the backends of each op.",
    )
    info.add_argument("--json", action="store_true", help="the same as one JSON object")
    info.set_defaults(run=_info)

    command = commands.add_parser(
        "recolor",
        help="give one image the colors of another",
        description="Move the colors of SOURCE to the palette of REFERENCE by descending the "
        "sliced Wasserstein distance between them.",
        epilog=f"Photos: {', '.join(images.PHOTOS)}. To read a file that is called like one, "
        "write ./NAME.",
    )
    name: dict[str, Any] = {
        "nargs": "?",
        "help": "image file, or the name of a photo (default: %(default)s)",
    }
    command.add_argument("source", metavar="SOURCE", default="motorcycle", **name)
    command.add_argument("reference", metavar="REFERENCE", default="rocket", **name)
    command.add_argument(
        "--output",
        type=Path,
        default=Path("recolored.png"),
        metavar="FILE",
        help="where the recolored image goes (default: %(default)s)",
    )
    _add_figure(command, "figure.png", "images and colors before and after")
    command.add_argument(
        "--steps", type=_positive, default=STEPS, metavar="N", help="Adam steps (%(default)s)"
    )
    command.add_argument(
        "--directions",
        type=_positive,
        default=DIRECTIONS,
        metavar="L",
        help="random directions per step (%(default)s)",
    )
    command.add_argument(
        "--size",
        type=_positive,
        default=640,
        metavar="PIXELS",
        help="images with a longer side than this are reduced to it (%(default)s)",
    )
    _add_common(command, seed_of="the directions")
    command.set_defaults(run=_recolor)
    _add_generate(commands)
    _add_color(commands)
    _add_regions(commands)
    _add_delta(commands)
    return parser


def _add_generate(commands: Any) -> None:
    command = commands.add_parser(
        "generate",
        help="make pictures from a prompt",
        description="Make pictures from PROMPT with a Diffusers model.",
    )
    _add_model(command, "--model", "v1", "what makes the pictures")
    _add_picture(command, "generated.png", "; of several, a number is added to the name")
    command.add_argument("--count", type=_positive, default=1, help="of pictures (%(default)s)")
    _add_common(command, seed_of="the first picture")
    command.set_defaults(run=_generate)


def _add_color(commands: Any) -> None:
    command = commands.add_parser(
        "color",
        help="make a picture in the colors of a photo, or of a palette",
        description="Make a picture from PROMPT whose colors are those of a reference, by "
        "SW-Guidance.",
        epilog=f"Photos: {', '.join(images.PHOTOS)}. To read a file that is called like one, "
        "write ./NAME.",
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--reference", metavar="IMAGE", help="image file, or the name of a photo")
    what.add_argument(
        "--palette",
        metavar="COLORS",
        help="such as '#aabbcc,#ddeeff:2', where the second color is twice as much",
    )
    _add_model(command, "--model", "v2", "what makes the picture")
    _add_picture(command, "color.png", "")
    command.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="quality",
        help="the published settings, or some that take a fraction of the time (%(default)s)",
    )
    command.add_argument(
        "--inner", type=_positive, metavar="N", help="inner steps of each (default: the preset's)"
    )
    command.add_argument(
        "--batch",
        type=_positive,
        default=1,
        metavar="N",
        help="pictures, made at once; a number is added to their names (%(default)s)",
    )
    _add_figure(
        command,
        "color-figure.png",
        "the first picture without guidance, the reference and the picture with their colors, and "
        "how they came closer",
    )
    command.add_argument("--json", action="store_true", help="print a report as one JSON object")
    _add_common(command, seed_of="the first picture, and of the rotations")
    command.set_defaults(run=_color)


def _add_regions(commands: Any) -> None:
    command = commands.add_parser(
        "regions",
        help="make a picture in which phrases of the prompt have their places",
        description="Make a picture from PROMPT in which each region shows its phrase, and draw "
        "where the phrases were attended to.",
        epilog="A region is 'PHRASE: left,top,right,bottom', shares of width and height from the "
        "upper left corner, or 'PHRASE: FILE', an image that is light inside of the region.",
    )
    command.add_argument(
        "--region",
        dest="regions",
        action="append",
        required=True,
        metavar="REGION",
        help="a phrase of the prompt and its place; may be given several times",
    )
    command.add_argument(
        "--base",
        type=float,
        default=1.0,
        metavar="B",
        help="how much the rest of the prompt counts inside regions, 0 to 1 (%(default)s)",
    )
    command.add_argument(
        "--alone",
        type=float,
        default=0.0,
        metavar="A",
        help="how much of a region is its phrase encoded without the prompt, 0 to 1; 0 hides other "
        "regions' phrases instead (%(default)s)",
    )
    _add_model(command, "--model", "v1", "what makes the picture")
    _add_picture(command, "regions.png", "")
    command.add_argument(
        "--figure",
        type=Path,
        default=Path("regions-figure.png"),
        metavar="FILE",
        help="where the figure goes: the regions, and where phrases were attended to "
        "(default: %(default)s)",
    )
    _add_common(command, seed_of="the picture")
    command.set_defaults(run=_regions)


def _add_delta(commands: Any) -> None:
    command = commands.add_parser(
        "delta",
        help="carry a LoRA or a ControlNet to another model",
        description="Make a picture by Delta Sampling: TARGET's predictions, and to them added "
        "what a LoRA, a ControlNet or a fine-tune of SOURCE does to SOURCE's.",
    )
    _add_model(command, "--target", "v2", "what makes the picture")
    _add_model(command, "--source", "v1", "the base that ADAPTED comes from")
    command.add_argument(
        "--adapted",
        default=f"{EMBEDDED}v1-ink",
        help="a LoRA for SOURCE, a ControlNet for it, or a model of its own: a file, a folder, a "
        "repository's id, or embedded: and v1-ink or v1-edge (%(default)s)",
    )
    command.add_argument(
        "--image", type=Path, metavar="FILE", help="what the ControlNet is shown; makes ADAPTED one"
    )
    command.add_argument(
        "--strength", type=float, default=1.0, metavar="L", help="of what is added (%(default)s)"
    )
    _add_picture(command, "delta.png", "")
    command.add_argument(
        "--grid",
        type=Path,
        nargs="?",
        const=Path("delta-grid.png"),
        metavar="FILE",
        help="also draw a sweep of strengths beside the plain target and the plain adapted model "
        "(without FILE: %(const)s)",
    )
    _add_common(command, seed_of="the picture")
    command.set_defaults(run=_delta)


def _add_model(command: argparse.ArgumentParser, option: str, default: str, what: str) -> None:
    command.add_argument(
        option,
        default=EMBEDDED + default,
        metavar="MODEL",
        help=f"{what}: a local folder; the id of a repository, which Diffusers downloads; or a "
        "tiny model of shapes in colors that comes with sdcore: embedded: and v1, v2, v1-ink or xl "
        "(%(default)s)",
    )


def _add_picture(command: argparse.ArgumentParser, output: str, more: str) -> None:
    command.add_argument("--prompt", required=True, help="what to show")
    command.add_argument("--negative", default="", metavar="PROMPT", help="what not to show")
    command.add_argument(
        "--output",
        type=Path,
        default=Path(output),
        metavar="FILE",
        help=f"where the picture goes{more} (%(default)s)",
    )
    command.add_argument("--steps", type=_positive, default=20, metavar="N", help="(%(default)s)")
    command.add_argument(
        "--guidance", type=float, default=5.0, metavar="G", help="towards the prompt (%(default)s)"
    )
    for side in ("height", "width"):
        command.add_argument(
            f"--{side}", type=_positive, metavar="PIXELS", help="default: the model's"
        )


def _add_figure(command: argparse.ArgumentParser, default: str, what: str) -> None:
    figure = command.add_mutually_exclusive_group()
    figure.add_argument(
        "--figure",
        type=Path,
        default=Path(default),
        metavar="FILE",
        help=f"where the figure goes: {what} (default: %(default)s)",
    )
    figure.add_argument(
        "--no-figure", dest="figure", action="store_const", const=None, help="draw no figure"
    )


def _add_common(command: argparse.ArgumentParser, seed_of: str) -> None:
    command.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where PyTorch finds a GPU"
    )
    command.add_argument(
        "--seed", type=_seed, default=0, metavar="S", help=f"of {seed_of} (%(default)s)"
    )
    command.add_argument(
        "--quiet", action="store_true", help="print nothing but errors, and no progress bar"
    )


def _positive(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _seed(text: str) -> int:
    value = _integer(text)
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"must be 0 to 2^64 - 1; got {value}")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}") from None


def _info(args: argparse.Namespace) -> None:
    from sdcore import info

    facts = info.collect()
    print(json.dumps(facts, indent=2) if args.json else info.describe(facts))


def _recolor(args: argparse.Namespace) -> None:
    measured = args.figure is not None or not args.quiet
    _need(PILLOW, TQDM, *([POT] if measured else []), *([MATPLOTLIB] if args.figure else []))
    device = _device(args.device)
    _try_ops(device, ("binned", "exact") if measured else ("binned",))
    files = [images.find(args.source), images.find(args.reference)]
    _check_outputs(args.output, args.figure, files)
    source, reference = (images.fit(images.read(file), args.size).to(device) for file in files)
    if measured and _pixels(reference) < 2:
        raise CommandError("REFERENCE must have at least 2 pixels, to be sampled twice")

    start = time.perf_counter()
    result = images.quantize(_descend(source, reference, args))
    seconds = time.perf_counter() - start
    # Before all else: if anything should go wrong from here on, the picture is safe.
    images.write(result, args.output)
    if not args.quiet:
        backend = backends.default("sliced_wasserstein_binned", device.type)
        print(
            f"{args.source} {_shape(source)} with the palette of {args.reference} "
            f"{_shape(reference)}: {args.steps} steps in {seconds:.1f} s on {device} ({backend})",
            flush=True,
        )
    if measured:
        distances = _measure(source, reference, result, args.quiet)
    if args.figure is not None:
        _draw(args.figure, (source, reference, result), distances)
    if not args.quiet:
        print(_report(distances, args))


def _generate(args: argparse.Namespace) -> None:
    _need(PILLOW, DIFFUSERS, TRANSFORMERS, PEFT, extras="cli,diffusers")
    device = _device(args.device)
    files = _numbered(args.output, args.count)
    for file in files:
        images.check_writable(file)
    pipe = _loaded(args.model, args, device)
    for number, file in enumerate(files):
        start = time.perf_counter()
        picture = _picture(pipe, args.model, args, args.seed + number)
        images.write(picture, file)
        if not args.quiet:
            seconds = time.perf_counter() - start
            print(f"{file}: {_shape(picture)}, {args.steps} steps in {seconds:.1f} s")


def _color(args: argparse.Namespace) -> None:
    drawn = (MATPLOTLIB,) if args.figure else ()
    _need(PILLOW, TQDM, *drawn, DIFFUSERS, TRANSFORMERS, PEFT, extras="cli,diffusers")
    device = _device(args.device)
    file = None if args.reference is None else images.find(args.reference)
    outputs = _numbered(args.output, args.batch)
    for output in outputs:
        _check_outputs(output, args.figure, [] if file is None else [file])
    try:
        palette = _listed(args.palette) if file is None else Palette.from_image(file)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    pipe = _loaded(args.model, args, device)
    _follow_moves(pipe, args)
    guidance = ColorGuidance(
        palette, preset=args.preset, inner_steps=args.inner, seed=args.seed % (1 << 63)
    )
    start = time.perf_counter()
    pictures = _colored(pipe, guidance, args)
    seconds = time.perf_counter() - start
    for picture, output in zip(pictures, outputs, strict=True):
        images.write(picture, output)
    if args.quiet and args.figure is None and not args.json:
        return
    pipe.set_progress_bar_config(disable=True)
    plain = _picture(pipe, args.model, args, args.seed)
    before, *after = (_sliced_w1(one, palette) for one in (plain, *pictures))
    if args.figure is not None:
        shown = (plain, pictures[0])
        _draw_colors(args.figure, file, palette, shown, guidance, (before, after[0]))
    if args.json:
        report = {
            "pictures": list(map(str, outputs)),
            "figure": None if args.figure is None else str(args.figure),
            "scheduler": type(pipe.scheduler).__name__,
            "sliced_w1": {"without": before, "guided": after},
            **(guidance.report() or {}),
        }
        print(json.dumps(report, indent=2))
    elif not args.quiet:
        for output, picture, distance in zip(outputs, pictures, after, strict=True):
            print(f"{output}: {_shape(picture)}, sliced W1 to the palette {distance:.4f}")
        print(f"{args.steps} steps in {seconds:.1f} s; without guidance sliced W1 is {before:.4f}")
        if args.figure is not None:
            print(f"{args.figure}: the pictures, their colors, and how they came closer")


def _follow_moves(pipe: Any, args: argparse.Namespace) -> None:
    """Models of Stable Diffusion 1 come with PNDM, which steps from samples that it kept."""
    from diffusers import DDIMScheduler

    before = type(pipe.scheduler)
    if FOLLOWS_SAMPLE & {one.__name__ for one in before.__mro__}:
        return
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    if not _silent(args):
        print(f"DDIM steps in the place of {before.__name__}, which does not follow the guidance")


def _listed(text: str) -> Palette:
    """A palette from '#aabbcc,#ddeeff:2'."""
    colors, weights = [], []
    for part in text.split(","):
        color, _, weight = (one.strip() for one in part.partition(":"))
        try:
            weights.append(float(weight or 1))
        except ValueError:
            raise ValueError(f"a weight is a number; got {weight!r} for {color!r}") from None
        colors.append(color)
    return Palette.from_colors(colors, weights)


def _colored(pipe: Any, guidance: ColorGuidance, args: argparse.Namespace) -> list[Tensor]:
    """Pictures as :func:`_pictures` gives them, with the distance in the progress bar."""
    from tqdm import tqdm

    pipe.set_progress_bar_config(disable=True)
    try:
        handle = patch(pipe, guidance)
    except TypeError as error:
        raise CommandError(f"{args.model} can't be guided: {error}") from error
    with handle, tqdm(total=args.steps, unit="step", disable=_silent(args)) as bar:

        def show(_: Any, step: int, *rest: Any) -> dict[str, Any]:
            # The loss has three axes of each rotation.
            bar.set_postfix_str(f"distance {guidance.losses[-1][-1] / 3:.4f}", refresh=False)
            bar.update()
            return {}

        seeds = range(args.seed, args.seed + args.batch)
        return _pictures(pipe, args.model, args, seeds, callback_on_step_end=show)


def _draw_colors(
    path: Path,
    file: Path | None,
    palette: Palette,
    pictures: tuple[Tensor, Tensor],
    guidance: ColorGuidance,
    distances: tuple[float, float],
) -> None:
    from sdcore import figures

    plain, guided = pictures
    shown = {
        "without guidance": plain,
        "reference": figures.swatches(palette) if file is None else images.read(file),
        "guided": guided,
    }
    palettes = [Palette.from_image(plain), palette, Palette.from_image(guided)]
    caption = f"sliced W1 to the reference: {distances[0]:.4f} → {distances[1]:.4f}"
    curves = [[loss / 3 for loss in some] for some in guidance.losses]
    _save(figures.draw_colors(shown, palettes, curves, caption), path)


def _regions(args: argparse.Namespace) -> None:
    _need(PILLOW, MATPLOTLIB, DIFFUSERS, TRANSFORMERS, PEFT, extras="cli,diffusers")
    device = _device(args.device)
    method = _region_attention(args)
    _check_outputs(args.output, args.figure, [])
    pipe = _loaded(args.model, args, device)
    start = time.perf_counter()
    try:
        handle = patch(pipe, method)
    except TypeError as error:
        raise CommandError(f"{args.model} can't take regions: {error}") from error
    with handle:
        picture = _picture(pipe, args.model, args, args.seed)
    images.write(picture, args.output)
    from sdcore import figures

    named = [(region.phrase, region.box) for region in method.regions]
    figures.draw_regions(picture, named, [found[0] for found in method.maps]).savefig(args.figure)
    if not args.quiet:
        seconds = time.perf_counter() - start
        print(f"{args.output}: {_shape(picture)}, {args.steps} steps in {seconds:.1f} s")
        print(f"{args.figure}: where each phrase was attended to")


def _region_attention(args: argparse.Namespace) -> RegionAttention:
    try:
        regions = map(_region, args.regions)
        return RegionAttention(*regions, base=args.base, alone=args.alone, keep_maps=True)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def _region(text: str) -> Region:
    phrase, colon, place = (part.strip() for part in text.rpartition(":"))
    if not colon or not phrase or not place:
        raise ValueError(
            f"a region is 'PHRASE: left,top,right,bottom' or 'PHRASE: FILE'; got {text!r}"
        )
    parts = place.split(",")
    try:
        box = tuple(float(part) for part in parts)
    except ValueError:
        return Region(phrase, mask=place)
    if len(box) != 4:
        raise ValueError(f"a box is left,top,right,bottom; got {place!r} for {phrase!r}")
    return Region(phrase, box=box)


def _delta(args: argparse.Namespace) -> None:
    _need(PILLOW, MATPLOTLIB, DIFFUSERS, TRANSFORMERS, PEFT, extras="cli,diffusers")
    device = _device(args.device)
    inputs = [] if args.image is None else [args.image]
    _check_outputs(args.output, args.grid, inputs, "--grid")
    shown = None if args.image is None else images.read(args.image)
    target, source = (_loaded(name, args, device) for name in (args.target, args.source))
    adapted = _adapted(args, source, shown)

    def made(pipe: Any, name: str, strength: float) -> Tensor:
        try:
            handle = patch(pipe, DeltaSampling(source, adapted, strength=strength))
        except Exception as error:  # without a network, clients of repositories raise their own
            reason = str(error).splitlines()[0]
            raise CommandError(f"--adapted {args.adapted}: {reason}") from error
        with handle:
            return _picture(pipe, name, args, args.seed)

    start = time.perf_counter()
    picture = made(target, args.target, args.strength)
    images.write(picture, args.output)
    if not args.quiet:
        seconds = time.perf_counter() - start
        print(f"{args.output}: {_shape(picture)}, {args.steps} steps in {seconds:.1f} s")
    if args.grid is not None:
        from sdcore import figures

        named = {args.target: made(target, args.target, 0.0)}
        named |= {f"strength {one:g}": made(target, args.target, one) for one in SWEEP}
        named[f"{args.adapted}\non {args.source}"] = made(source, args.source, 1.0)
        figures.draw_pictures(named).savefig(args.grid)
        if not args.quiet:
            print(f"{args.grid}: strengths {', '.join(f'{one:g}' for one in SWEEP)}")


def _adapted(args: argparse.Namespace, source: Any, shown: Tensor | None) -> Any:
    """As DeltaSampling takes it."""
    name = args.adapted
    if name.startswith(EMBEDDED):
        from sdcore import embedded

        name = str(embedded.FOLDER / name.removeprefix(EMBEDDED))
        if not Path(name).is_dir():
            raise CommandError(f"--adapted {args.adapted}: there is no such embedded model")
    if shown is not None:
        return Control(name, shown.permute(2, 0, 1)[None].float() / 255)
    folder = Path(name)
    if (folder / "model_index.json").exists():
        return _loaded(args.adapted, args, source.device)
    if (folder / "config.json").exists():
        raise CommandError(f"--adapted {args.adapted} is a ControlNet, which needs --image FILE")
    return LoRA(name)


def _loaded(model: str, args: argparse.Namespace, device: torch.device) -> Any:
    silent = _silent(args)
    if silent:
        _hide_progress()
    start = time.perf_counter()
    pipe = _pipeline(model, device)
    pipe.set_progress_bar_config(disable=silent)
    if not silent:
        print(f"{model} in {time.perf_counter() - start:.1f} s on {device}", flush=True)
    return pipe


def _picture(pipe: Any, model: str, args: argparse.Namespace, seed: int, **more: Any) -> Tensor:
    """[H, W, 3], of the levels of 8 bits in [0, 1]."""
    return _pictures(pipe, model, args, [seed], **more)[0]


def _pictures(
    pipe: Any, model: str, args: argparse.Namespace, seeds: Sequence[int], **more: Any
) -> list[Tensor]:
    """One for each seed."""
    try:
        pictures = pipe(
            args.prompt,
            negative_prompt=args.negative,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            height=args.height,
            width=args.width,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator("cpu").manual_seed(seed % (1 << 64)) for seed in seeds],
            output_type="pt",
            **more,
        ).images
    except (TypeError, ValueError, FloatingPointError) as error:
        raise CommandError(f"{model} can't make this picture: {error}") from error
    return [images.quantize(one.float().cpu().permute(1, 2, 0)) for one in pictures]


def _silent(args: argparse.Namespace) -> bool:
    """Whether nothing but results is printed; a report in JSON is one."""
    return args.quiet or getattr(args, "json", False)


def _hide_progress() -> None:
    """Of what both libraries load."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()


def _numbered(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{number + 1}") for number in range(count)]


def _pipeline(model: str, device: torch.device) -> Any:
    """Half precision on a GPU, but for the embedded models, which are small."""
    from diffusers import DiffusionPipeline

    from sdcore import embedded

    try:
        if model.startswith(EMBEDDED):
            return embedded.load(model.removeprefix(EMBEDDED), device=str(device))
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, use_safetensors=True)
        return pipe.to(device)
    except (OSError, ValueError) as error:
        raise CommandError(f"{model}: {str(error).splitlines()[0]}") from error


def _need(*packages: tuple[str, str], extras: str = "cli") -> None:
    """All at once, so that one installation serves."""
    missing = []
    for module, distribution in packages:
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing.append(f"{distribution} ({error})")
    if missing:
        raise CommandError(f"needs {', '.join(missing)}: pip install 'sdcore[{extras}]'")


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: PyTorch finds no GPU here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _try_ops(device: torch.device, methods: Sequence[str]) -> None:
    """SDCORE_BACKEND may ask for a backend that can't run them: better to hear of it at once."""
    point = torch.zeros(1, 3, device=device)
    for method in methods:
        try:
            sliced_wasserstein(point, point, directions=1, method=method)
        except (backends.BackendError, ValueError) as error:
            raise CommandError(str(error)) from error


def _check_outputs(
    output: Path, figure: Path | None, inputs: Sequence[Path], option: str = "--figure"
) -> None:
    taken = [file.resolve() for file in inputs]
    if output.resolve() in taken:
        raise CommandError(f"--output {output} would replace an image that is read")
    images.check_writable(output)
    if figure is None:
        return
    from sdcore import figures

    if figure.resolve() in [*taken, output.resolve()]:
        raise CommandError(f"{option} {figure} would replace an image that is read or written")
    if not figures.supported(figure.suffix):
        raise CommandError(f"{option} {figure} must end in .png, .svg, .pdf or the like")
    images.check_creatable(figure)


def _descend(source: Tensor, reference: Tensor, args: argparse.Namespace) -> Tensor:
    from tqdm import tqdm

    with tqdm(total=args.steps, desc="Recoloring", unit="step", disable=args.quiet) as bar:

        def show(step: int, value: Tensor) -> None:
            # Reading the value makes a GPU wait, so not at every step.
            if not args.quiet and (step % 20 == 0 or step == args.steps):
                bar.set_postfix_str(f"sliced W2 {value.sqrt().item():.4f}", refresh=False)
            bar.update()

        return recolor(
            source,
            reference,
            steps=args.steps,
            directions=args.directions,
            seed=args.seed,
            progress=show,
        )


@dataclass(frozen=True)
class Distances:
    """Between two images, in units of a channel that spans 0 to 1."""

    w1: float
    w2: float
    sliced_w1: float


def _measure(
    source: Tensor, reference: Tensor, result: Tensor, quiet: bool
) -> dict[str, Distances]:
    """To the reference, before and after; and between two samples of the reference, the floor."""
    from tqdm import tqdm

    count = min(POINTS, _pixels(source), _pixels(reference) // 2)
    target, other = _sample(reference, 2 * count).split(count)
    distances = {}
    with tqdm(total=3, desc="Measuring", unit="pair", disable=quiet) as bar:
        for name, image in (("before", source), ("after", result)):
            sliced = _sliced_w1(image, reference)
            distances[name] = Distances(*_exact_w1_w2(_sample(image, count), target), sliced)
            bar.update()
        # The sliced distance takes all pixels: from an image to itself it is zero.
        distances["floor"] = Distances(*_exact_w1_w2(other, target), 0.0)
        bar.update()
    return distances


def _pixels(image: Tensor) -> int:
    return image.shape[0] * image.shape[1]


def _sample(image: Tensor, count: int) -> Tensor:
    """Pixels drawn without replacement; images of one size are sampled at the same places."""
    order = torch.randperm(_pixels(image), generator=torch.Generator().manual_seed(0))
    return image.reshape(-1, 3).cpu()[order[:count]].double()


def _exact_w1_w2(x: Tensor, y: Tensor) -> tuple[float, float]:
    import ot

    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    # POT's default stops short of the optimum at this size.
    w1, w2_squared = (ot.emd2([], [], c, numItermax=10_000_000) for c in (cost, cost**2))
    return float(w1), float(w2_squared) ** 0.5


def _sliced_w1(x: Tensor, y: Tensor | Palette) -> float:
    points = y if isinstance(y, Palette) else y.reshape(-1, 3)
    generator = torch.Generator().manual_seed(0)
    directions = random_rotations(ROTATIONS, 3, generator).flatten(0, 1).to(x.device)
    # In parts: the reference backend holds every projection of a call in memory.
    values = [
        sliced_wasserstein(x.reshape(-1, 3), points, directions=part, reduction="sum")
        for part in directions.split(12)
    ]
    return (torch.stack(values).sum() / len(directions)).item()


def _draw(
    path: Path, pictures: tuple[Tensor, Tensor, Tensor], distances: dict[str, Distances]
) -> None:
    from sdcore import figures

    before, after, floor = (distances[name] for name in ("before", "after", "floor"))
    caption = (
        f"Distance to the reference:   W1 {before.w1:.3f} → {after.w1:.3f} (floor {floor.w1:.3f})"
        f"   ·   W2 {before.w2:.3f} → {after.w2:.3f} (floor {floor.w2:.3f})"
        f"   ·   sliced W1 {before.sliced_w1:.4f} → {after.sliced_w1:.4f}"
    )
    _save(figures.draw_recolor(*pictures, caption), path)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise CommandError(f"can't write {path}: {error}") from error


def _report(distances: dict[str, Distances], args: argparse.Namespace) -> str:
    rows = [
        f"  {name:<8}{d.w1:8.4f}{d.w2:10.4f}{d.sliced_w1:13.5f}" for name, d in distances.items()
    ]
    files = [f"Image:  {args.output}"] + [f"Figure: {args.figure}"] * (args.figure is not None)
    return "\n".join(
        [
            "",
            "Distance to the palette, in units of a channel that spans 0 to 1",
            "                W1        W2    sliced W1",
            *rows,
            f"W1 and W2: exact transport (POT's emd2) between at most {POINTS} pixels of each",
            "image, drawn at random. The floor is between two disjoint draws from the reference:",
            "what zero looks like. Sliced W1 takes all pixels, so that its zero is zero;",
            f"{3 * ROTATIONS} directions.",
            "",
            *files,
        ]
    )


def _shape(image: Tensor) -> str:
    return f"{image.shape[1]}×{image.shape[0]}"
