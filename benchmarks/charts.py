"""Charts of time against size, of what ``benchmarks.scaling`` has measured.

``python -m benchmarks.charts benchmarks.csv [--out FOLDER]``

One file for each op, as PNG and SVG: a panel for each of its axes, a line for each implementation,
and, dashed, the time that the work would take at the ceilings that were measured with it. The sizes
are in the cases' names, such as "n = 1,048,576, L = 32": where all but one of them agree, rows are
one curve.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import measure
from benchmarks.measure import Row
from sdcore.figures import FAINT, INK, LINES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Ours first: in the figures' colors. What else there is follows, in quieter ones.
OURS, PEERS = LINES, ("#6f6f6f", "#b07d2b", "#8d6cab", "#4d9a9a", "#b56576", "#7d8a4c", "#5c7da6")
MARKERS = "osD^vPX<>"
LEAST = 3  # points of a panel's longest line; of others two
UNITS = ((1e3, "s", 1e-3), (1.0, "ms", 1.0), (1e-3, "µs", 1e3))


@dataclass
class Panel:
    """Along ``axis``, with what is the same for all points in ``fixed``."""

    op: str
    axis: str
    fixed: str
    device: str
    dtype: str
    lines: dict[str, list[tuple[int, Row]]] = field(default_factory=lambda: defaultdict(list))


def sizes(case: str) -> dict[str, int]:
    """The numbers that a case's name says by name."""
    found = re.findall(r"(?:^|, )(\w+) = ([\d,]*\d)(?=, |$)", case)
    return {name: int(number.replace(",", "")) for name, number in found}


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Those with a curve, of the rows that have times."""
    found: dict[tuple[str, ...], Panel] = {}
    for row in rows:
        for axis, size in sizes(row.case).items():
            fixed = re.sub(rf"(^|, ){axis} = [\d,]*\d(?=, |$)", "", row.case).removeprefix(", ")
            key = row.op, axis, fixed, row.device, row.dtype
            if not math.isnan(row.milliseconds):
                found.setdefault(key, Panel(*key)).lines[row.implementation].append((size, row))
    for panel in found.values():
        panel.lines = {
            name: sorted(points, key=lambda point: point[0])
            for name, points in panel.lines.items()
            if len(points) > 1
        }
    return [
        panel for panel in found.values() if max(map(len, panel.lines.values()), default=0) >= LEAST
    ]


def figure(shown: Sequence[Panel]) -> Figure:
    """Of one op's panels, side by side."""
    # Not through pyplot, which would choose a window system and keep the figure for good.
    from matplotlib.figure import Figure

    made = Figure(
        figsize=(5.6 * len(shown) + 0.4, 5.4), dpi=130, facecolor="white", layout="constrained"
    )
    axes: Any = made.subplots(1, len(shown), squeeze=False)[0]
    looks = _looks(shown)
    for one, panel in zip(axes, shown, strict=True):
        _draw_panel(one, panel, looks)
    handles = {
        label: handle
        for one in axes
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True)
    }
    made.legend(
        handles.values(), handles.keys(), loc="outside lower center", frameon=False,
        labelcolor=INK, ncols=min(3, len(handles)), fontsize=9,
    )  # fmt: skip
    first = shown[0]
    made.suptitle(f"{first.op}, {first.dtype}\n{first.device}", color=INK, fontsize=12)
    return made


def _looks(shown: Sequence[Panel]) -> dict[str, dict[str, Any]]:
    """Of each implementation, the same in all panels."""
    rows = {name: points[0][1] for panel in shown for name, points in panel.lines.items()}
    compared = {name for name, row in rows.items() if row.ratios}
    looks: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(sorted(rows, key=lambda name: name not in compared)):
        ours = name in compared
        rank = number if ours else number - len(compared)
        colors = OURS if ours else PEERS
        looks[name] = {
            "color": colors[rank % len(colors)], "marker": MARKERS[number % len(MARKERS)],
            "linewidth": 2.2 if ours else 1.3, "markersize": 4.5 if ours else 3.5,
            "zorder": 4 if ours else 3,
        }  # fmt: skip
    return looks


def _draw_panel(axes: Any, panel: Panel, looks: dict[str, dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name, points in panel.lines.items():
        at, times = zip(*((size, row.milliseconds) for size, row in points), strict=True)
        axes.plot(at, times, label=name, **looks[name])
    for label, (at, times), color in _ceilings(panel, looks):
        axes.plot(at, times, color=color, linewidth=1.1, linestyle=(0, (5, 3)), label=label)
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _time(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    known = sorted({size for points in panel.lines.values() for size, _ in points})
    axes.set_xticks(known[:: -(-len(known) // 8)])
    axes.set_xlabel(panel.axis, color=INK)
    axes.set_title(panel.fixed, color=INK, fontsize=10)
    axes.tick_params(which="minor", length=0)
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=9)
    axes.grid(color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


Line = tuple[Sequence[float], Sequence[float]]


def _ceilings(panel: Panel, looks: dict[str, Any]) -> Iterator[tuple[str, Line, str]]:
    """One for all, if the work is the same for all; else one for each of ours."""
    floors = {
        name: [(size, row.floor) for size, row in points if row.floor]
        for name, points in panel.lines.items()
    }
    ours = {
        name: floor for name, floor in floors.items() if floor and panel.lines[name][0][1].ratios
    }
    if not ours:
        return
    longest = dict(max(floors.values(), key=len))
    points = [point for floor in ours.values() for point in floor]
    if all(math.isclose(taken, longest.get(at, 0), rel_tol=0.02) for at, taken in points):
        yield "ceiling", tuple(zip(*longest.items(), strict=True)), INK
        return
    for name, floor in ours.items():
        yield f"ceiling of {name}", tuple(zip(*floor, strict=True)), looks[name]["color"]


def _short(size: float) -> str:
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if size >= unit:
            return f"{size / unit:.3g}{name}"
    return f"{size:.3g}"


def _time(milliseconds: float) -> str:
    name, factor = next(
        ((name, factor) for least, name, factor in UNITS if milliseconds >= 0.999 * least),
        UNITS[-1][1:],
    )
    return f"{milliseconds * factor:.3g} {name}"


def draw(path: Path, folder: Path) -> list[Path]:
    """The files that were written.

    Raises:
        ValueError: ``path`` is no benchmark's CSV.
        ImportError: matplotlib is not installed.
    """
    groups: dict[tuple[str, str, str], list[Panel]] = defaultdict(list)
    for panel in panels(measure.read(path)):
        groups[panel.op, panel.device, panel.dtype].append(panel)
    folder.mkdir(parents=True, exist_ok=True)
    devices = {device for _, device, _ in groups}
    written = []
    for (op, device, dtype), shown in groups.items():
        name = f"{op}-{dtype}"
        if len(devices) > 1:
            name += "-" + re.sub(r"\W+", "-", device)
        written += save(figure(shown), folder / name)
    return written


def save(figure: Figure, path: Path) -> list[Path]:
    """As PNG and SVG, the same bytes for the same figure."""
    from matplotlib import rc_context

    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "svg")]
    with rc_context({"svg.hashsalt": "sdcore"}):
        for file in files:
            figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, help="a folder, by default the CSV's")
    given = parser.parse_args()
    for file in draw(given.csv, given.out or given.csv.parent):
        print(f"drawn: {file}")


if __name__ == "__main__":
    main()
