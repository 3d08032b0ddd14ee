"""The figures that commands and methods draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

    from sdcore.palette import Palette

# Enough that a cloud of pixels looks full, few enough that dots do not hide each other.
DOTS = 5000
SWATCHES = 8  # colors of a palette that are shown
INK, FAINT = "#222222", "#9a9a9a"
LINES = ("#1f5fbf", "#d62728", "#2a9134")
CHANNELS = (("red", "#d62728"), ("green", "#2a9134"), ("blue", "#1f5fbf"))


def supported(suffix: str) -> bool:
    """Whether matplotlib can save a figure to a file with this suffix."""
    from matplotlib.backend_bases import FigureCanvasBase

    return suffix.lower().removeprefix(".") in FigureCanvasBase.get_supported_filetypes()


def draw_recolor(source: Tensor, reference: Tensor, result: Tensor, caption: str) -> Figure:
    """Three images [H, W, 3], their pixels in the RGB cube, and the channels' distributions."""
    # Not through pyplot, which would choose a window system and keep the figure for good.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    images = {
        "source": source.cpu().numpy(),
        "reference": reference.cpu().numpy(),
        "recolored": result.cpu().numpy(),
    }
    figure = Figure(figsize=(13, 11), dpi=110, facecolor="white")
    panels: Any = figure.subfigures(3, 1, height_ratios=(3.1, 3.7, 3.2))
    top, middle, bottom = panels
    _draw_images(top, images)
    with rc_context({"grid.color": "#dcdcdc"}):  # 3-D axes offer no other way.
        _draw_clouds(middle, images)
    pixels = {name: (image.reshape(-1, 3), None) for name, image in images.items()}
    _draw_distributions(bottom, pixels, "and their channels' distributions")
    bottom.text(0.5, 0.02, caption, ha="center", va="bottom", color=INK, fontsize=10)
    return figure


def draw_colors(
    shown: dict[str, Tensor],
    palettes: Sequence[Palette],
    distances: Sequence[Sequence[float]],
    caption: str,
) -> Figure:
    """Pictures [H, W, 3] above their palettes: without guidance, the reference (a strip of its
    colors if it is no picture), guided; the distributions of their channels; and the distance to
    the reference over the inner steps of each guided one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9.4), dpi=110, facecolor="white")
    panels: Any = figure.subfigures(2, 1, height_ratios=(5.4, 4))
    top, bottom = panels
    top.subplots_adjust(0.02, 0.03, 0.98, 0.94, wspace=0.04, hspace=0.04)
    above, below = top.subplots(2, 3, height_ratios=(8, 1))
    for axes, strip, (name, picture), palette in zip(
        above, below, shown.items(), palettes, strict=True
    ):
        axes.imshow(picture.cpu().numpy())
        axes.set_title(name, color=INK, fontsize=13)
        axes.axis("off")
        _draw_palette(strip, palette)
    left, right = bottom.subfigures(1, 2, width_ratios=(3, 1))
    images = {
        name: (palette.colors.cpu().numpy(), palette.weights.cpu().numpy())
        for name, palette in zip(shown, palettes, strict=True)
    }
    _draw_distributions(left, images, "the channels' distributions")
    _draw_descent(right, distances)
    bottom.text(0.5, 0.02, caption, ha="center", va="bottom", color=INK, fontsize=10)
    return figure


def swatches(palette: Palette, height: int = 256) -> Tensor:
    """[height, height, 3]: a palette's colors as stripes, each as wide as its weight."""
    few = palette.reduced(height)
    edges = (few.weights.cumsum(0) * height).round().clamp(max=height).long()
    at = torch.searchsorted(edges, torch.arange(height, device=edges.device), right=True)
    return few.colors[at.clamp(max=len(few) - 1)].clamp(0, 1).expand(height, -1, -1)


def _draw_palette(axes: Any, palette: Palette) -> None:
    """The colors of up to SWATCHES boxes, each as wide as its weight."""
    few = palette.reduced(SWATCHES)
    order = few.weights.argsort(descending=True)
    start = 0.0
    for color, weight in zip(few.colors[order].tolist(), few.weights[order].tolist(), strict=True):
        axes.barh(0, weight, left=start, height=1, color=[min(1, max(0, one)) for one in color])
        start += weight
    axes.set(xlim=(0, 1), ylim=(-0.5, 0.5))
    axes.axis("off")


def _draw_descent(panel: SubFigure, distances: Sequence[Sequence[float]]) -> None:
    axes = panel.subplots()
    panel.subplots_adjust(0.16, 0.26, 0.94, 0.93)
    panel.suptitle("distance to the reference", color=INK, fontsize=12, y=1.02)
    for step, inner in enumerate(distances):
        at = [step + number / len(inner) for number in range(len(inner))]
        axes.plot(at, inner, color=LINES[0], linewidth=1.3)
    axes.set_xlabel("step", color=INK)
    axes.set_ylim(bottom=0)
    _style(axes)


def _style(axes: Any) -> None:
    axes.tick_params(colors=FAINT, labelcolor=INK)
    axes.grid(color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def _draw_images(panel: SubFigure, images: dict[str, np.ndarray]) -> None:
    panel.subplots_adjust(0.02, 0.02, 0.98, 0.9, wspace=0.04)
    for axes, (name, image) in zip(panel.subplots(1, 3), images.items(), strict=True):
        axes.imshow(image)
        axes.set_title(name, color=INK, fontsize=13)
        axes.axis("off")
        axes.set_anchor("N")


def _draw_clouds(panel: SubFigure, images: dict[str, np.ndarray]) -> None:
    panel.subplots_adjust(0.01, 0.02, 0.99, 0.96, wspace=0)
    panel.suptitle("their pixels in the RGB cube", color=INK, fontsize=12, y=0.99)
    each = panel.subplots(1, 3, subplot_kw={"projection": "3d"})
    for axes, image in zip(each, images.values(), strict=True):
        pixels = image.reshape(-1, 3)
        some = np.random.default_rng(0).permutation(len(pixels))[:DOTS]
        axes.scatter(*pixels[some].T, c=pixels[some], s=5, linewidths=0, depthshade=False)
        axes.view_init(elev=22, azim=-52)
        axes.set_box_aspect((1, 1, 1), zoom=1.06)
        for letter, (name, color) in zip("xyz", CHANNELS, strict=True):
            _style_edge(axes, letter, name, color)


def _style_edge(axes: Any, letter: str, name: str, color: str) -> None:
    """One edge of the RGB cube, from 0 to 1, in the color of its channel."""
    axes.set(**{f"{letter}lim": (0, 1), f"{letter}ticks": (0, 0.5, 1), f"{letter}ticklabels": []})
    getattr(axes, f"set_{letter}label")(name, color=color, labelpad=-11)
    edge = getattr(axes, f"{letter}axis")
    edge.set_pane_color((0.975, 0.975, 0.975))
    edge.line.set(color=color, linewidth=1.8)


def _draw_distributions(
    panel: SubFigure, images: dict[str, tuple[np.ndarray, np.ndarray | None]], title: str
) -> None:
    """Cumulative distributions, of colors [n, 3] and their weights: what the distance compares,
    along three of its directions. In order: what was, the reference, and what came of it."""
    panel.suptitle(title, color=INK, fontsize=12, y=1.02)
    at = np.linspace(0, 1, 1025)
    panel.subplots_adjust(0.06, 0.26, 0.97, 0.93, wspace=0.16)
    each = panel.subplots(1, 3, sharey=True)
    for channel, (axes, (name, color)) in enumerate(zip(each, CHANNELS, strict=True)):
        looks: tuple[dict[str, Any], ...] = (
            {"color": FAINT, "linewidth": 1.5},
            {"color": color, "linewidth": 5, "alpha": 0.35},
            {"color": INK, "linewidth": 1.3, "linestyle": (0, (4, 2))},
        )
        for (label, (colors, weights)), look in zip(images.items(), looks, strict=True):
            axes.plot(at, _share_below(at, colors[:, channel], weights), label=label, **look)
        axes.set(xlim=(0, 1), ylim=(0, 1.01), xticks=(0, 0.25, 0.5, 0.75, 1))
        axes.set_xlabel(name, color=color)
        _style(axes)
    each[0].set_ylabel("share of pixels below", color=INK)
    each[0].legend(frameon=False, labelcolor=INK, loc="best")


def _share_below(at: np.ndarray, levels: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    order = np.argsort(levels)
    whole = np.arange(len(levels) + 1) if weights is None else np.cumsum([0, *weights[order]])
    return whole[np.searchsorted(levels[order], at, side="right")] / whole[-1]


def draw_lines(
    at: Sequence[float], panels: Sequence[tuple[str, dict[str, Sequence[float]]]]
) -> Figure:
    """A panel for each title, with its lines over the steps ``at``; a line's label may be empty."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(
        figsize=(4.6 * len(panels), 3.6), dpi=110, facecolor="white", layout="constrained"
    )
    for axes, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for (label, values), color in zip(lines.items(), LINES, strict=False):
            axes.plot(
                at, values, color=color, linewidth=1.6, marker="o", markersize=2.5, label=label
            )
        axes.set_title(title, color=INK, fontsize=11)
        axes.set_xlabel("step", color=INK)
        axes.set_ylim(0, 1.1 * max(max(values) for values in lines.values()))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _style(axes)
        if any(lines):
            axes.legend(frameon=False, labelcolor=INK, loc="best")
    return figure


def draw_regions(
    picture: Tensor,
    regions: Sequence[tuple[Any, tuple[float, ...] | None]],
    maps: Sequence[Tensor],
) -> Figure:
    """A picture [H, W, 3] with the boxes of its regions; and for each where its phrase was attended
    to, [h, w] in [0, 1], the brighter the more. Regions without a box have None."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(3 * (1 + len(maps)), 3.3), dpi=110, facecolor="white", layout="constrained"
    )
    height, width = picture.shape[:2]
    first, *others = figure.subplots(1, 1 + len(maps))
    first.imshow(picture.numpy())
    first.set_title("picture and regions", color=INK, fontsize=11)
    for number, ((phrase, box), axes, found) in enumerate(zip(regions, others, maps, strict=True)):
        color = LINES[number % len(LINES)]
        # Each over the whole of its own range: words share attention with the start token.
        axes.imshow(found.numpy(), cmap="gray", extent=(0, width, height, 0))
        title = phrase if isinstance(phrase, str) else f"tokens {phrase}"
        most = float(found.max())
        axes.set_title(f"{title}, up to {most:.0%}", color=color, fontsize=11, parse_math=False)
        if box is not None:
            for panel in (first, axes):
                panel.add_patch(_box(box, width, height, color))
    for axes in (first, *others):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(FAINT)
    return figure


def draw_pictures(named: dict[str, Tensor]) -> Figure:
    """Pictures [H, W, 3] side by side, each under its name."""
    from matplotlib.figure import Figure

    tallest = max(one.shape[0] / one.shape[1] for one in named.values())
    size = 2.2 * len(named), 0.5 + 2.2 * tallest
    figure = Figure(figsize=size, dpi=110, facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(named), squeeze=False)[0]
    for axes, (name, picture) in zip(panels, named.items(), strict=True):
        axes.imshow(picture.numpy())
        axes.set_title(name, color=INK, fontsize=10, parse_math=False)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(FAINT)
    return figure


def draw_gates(grids: dict[str, Tensor], labels: Sequence[str]) -> Figure:
    """A row for each layer, its gates for each word, [words, h, w] in [0, 1], side by side."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(2.6 + 1.1 * len(labels), 0.5 + 1.15 * len(grids)),
        dpi=110,
        facecolor="white",
        layout="constrained",
    )
    colors = ListedColormap(["#e6e6e6", LINES[0]])
    panels = figure.subplots(len(grids), len(labels), squeeze=False)
    for line, (name, grid) in zip(panels, grids.items(), strict=True):
        for axes, gates in zip(line, grid, strict=True):
            axes.imshow(gates.numpy(), cmap=colors, vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color(FAINT)
        short = name.replace(".transformer_blocks", "").removesuffix(".attn2")
        label = short.replace(".attentions", "\n")
        line[0].set_ylabel(label, color=INK, fontsize=8, rotation=0, ha="right")
    for axes, label in zip(panels[0], labels, strict=True):
        # A word may hold dollars, which matplotlib would take for a formula.
        axes.set_title(label, color=INK, fontsize=10, parse_math=False)
    return figure


def _box(box: tuple[float, ...], width: int, height: int, color: str) -> Any:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    corner, size = (left * width, top * height), ((right - left) * width, (bottom - top) * height)
    return Rectangle(corner, *size, fill=False, edgecolor=color, linewidth=2.5)
