"""README.md and docs/benchmarks.md, with every measured figure taken from the committed CSVs.

``python -m benchmarks.report [--check]``

Both are written from Jinja templates in ``benchmarks/templates``, which hold the words, and no
measured figure; what is between ``{{`` and ``}}`` there are calls of the functions of
:class:`Results`. ``--check`` writes nothing, and fails if a file is not what its template and the
CSVs make of it. The charts that they show are drawn anew where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import csv
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2

from benchmarks import charts, measure

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TEMPLATES = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "templates"
PAGES = {"README.md": ROOT / "README.md", "benchmarks.md": ROOT / "docs" / "benchmarks.md"}
CHART, CURVES = ROOT / "docs" / "speedups", ROOT / "docs" / "curves"

# A number with a unit, how many times as much, or an error: what a template must not hold.
MEASURED = re.compile(
    r"(?<![\w.])\d+(?:[.,]\d+)*\s*(?:ms|µs|s|min|GB|GiB|MB|dB|%|×|times|TB/s|GB/s|seconds|minutes)"
    r"(?![\w/]| \d)|\d(?:\.\d+)?e-\d"
)

Row = dict[str, str]


class NoFigureError(Exception):
    """No row, or more than one, is what a template asks for."""


class Results:
    """What templates call. ``name`` is that of a CSV. A row is named by its ``case`` and
    ``implementation``; or by values of other columns. Exactly one row must have them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = functools.cache(self._rows)

    def _rows(self, name: str) -> list[Row]:
        with (self.folder / f"{name}.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def row(self, name: str, **wanted: str) -> Row:
        found = [
            row
            for row in self.rows(name)
            if all(row.get(key) == value for key, value in wanted.items())
        ]
        if len(found) != 1:
            raise NoFigureError(f"{name}.csv has {len(found)} rows with {wanted}")
        return found[0]

    def number(self, name: str, column: str, **wanted: str) -> float:
        return float(self.row(name, **wanted)[column])

    def value(self, name: str, column: str, digits: int = 2, **wanted: str) -> str:
        return f"{self.number(name, column, **wanted):.{digits}f}"

    def percent(self, name: str, column: str, digits: int = 0, **wanted: str) -> str:
        """Of a share."""
        return f"{100 * self.number(name, column, **wanted):.{digits}f} %"

    def ms(self, name: str, case: str, implementation: str, dtype: str | None = None) -> str:
        return significant(self.milliseconds(name, case, implementation, dtype))

    def us(self, name: str, case: str, implementation: str, dtype: str | None = None) -> str:
        return significant(1e3 * self.milliseconds(name, case, implementation, dtype))

    def seconds(self, name: str, case: str, implementation: str, dtype: str | None = None) -> str:
        return significant(self.milliseconds(name, case, implementation, dtype) / 1e3)

    def times(
        self, name: str, case: str, slower: str, faster: str, dtype: str | None = None
    ) -> str:
        """How many times as long ``slower`` takes."""
        ours = self.milliseconds(name, case, faster, dtype)
        return significant(self.milliseconds(name, case, slower, dtype) / ours)

    def least_and_most(
        self, name: str, slower: str, faster: str, holds: str = "", holds_not: str = "\0"
    ) -> tuple[str, str]:
        """Of :meth:`times` over all cases whose name holds the one and not the other."""
        ratios = [
            one / other
            for case, one, other in self._pairs(name, slower, faster)
            if holds in case and holds_not not in case
        ]
        if not ratios:
            raise NoFigureError(f"{name}.csv has no {slower} beside {faster} in {holds!r}")
        return significant(min(ratios)), significant(max(ratios))

    def share(self, name: str, case: str, implementation: str) -> str:
        """Of the ceiling."""
        return self.row(name, case=case, implementation=implementation)["share_of_ceiling"]

    def found(self, name: str, pattern: str, **wanted: str) -> str:
        """What the pattern's group is in the row's check, such as its peak of memory."""
        check = self.row(name, **wanted)["check"]
        match = re.search(pattern, check)
        if match is None:
            raise NoFigureError(f"{pattern!r} is not in {check!r} of {name}.csv")
        return match[1]

    def conditions(self, name: str) -> str:
        """Devices, versions, commits and dates of a CSV's rows."""
        told = []
        for kind in ("device", "versions", "commit", "date"):
            cells = [row[kind] for row in self.rows(name) if row.get(kind)]
            parts = [part for cell in cells for part in cell.split(", ")]
            told.append(", ".join(dict.fromkeys(parts if kind == "versions" else sorted(cells))))
        return "; ".join(filter(None, told))

    def files(self) -> list[str]:
        """CSVs of times."""
        names = sorted(path.stem for path in self.folder.glob("*.csv"))
        return [name for name in names if self._timed(name)]

    def curves(self, name: str) -> list[str]:
        """Names of the charts of a CSV, without their suffix."""
        shown = charts.panels(measure.read(self.folder / f"{name}.csv"))
        return list(dict.fromkeys(f"{one.op}-{one.dtype}" for one in shown))

    def all_of(self, name: str) -> list[tuple[str, str, list[tuple[str, str, str, str]]]]:
        """Of each case its dtype, and of each implementation the time, how many times as long it
        took as the first one, and its share of the ceiling. Points of curves are left out."""
        cases: dict[tuple[str, str], list[Row]] = {}
        shown = charts.panels(measure.read(self.folder / f"{name}.csv"))
        points = {row.case for one in shown for line in one.lines.values() for _, row in line}
        for row in self._timed(name):
            if row["case"] in points:
                continue
            cases.setdefault((f"{row['op']}: {row['case']}", row["dtype"]), []).append(row)
        listed = []
        for (case, dtype), some in cases.items():
            first = float(some[0]["milliseconds"])
            lines = [
                (
                    row["implementation"],
                    significant(float(row["milliseconds"])),
                    significant(float(row["milliseconds"]) / first),
                    row["share_of_ceiling"],
                )
                for row in some
            ]
            listed.append((case, dtype, lines))
        return listed

    def _timed(self, name: str) -> list[Row]:
        return [row for row in self.rows(name) if row.get("milliseconds")]

    def milliseconds(
        self, name: str, case: str, implementation: str, dtype: str | None = None
    ) -> float:
        wanted = {"case": case, "implementation": implementation}
        if dtype is not None:
            wanted["dtype"] = dtype
        return self.number(name, "milliseconds", **wanted)

    def _pairs(self, name: str, slower: str, faster: str) -> Iterator[tuple[str, float, float]]:
        cases = {(row["case"], row["dtype"]): {} for row in self._timed(name)}
        for row in self._timed(name):
            cases[row["case"], row["dtype"]][row["implementation"]] = float(row["milliseconds"])
        for (case, _), times in cases.items():
            if slower in times and faster in times:
                yield case, times[slower], times[faster]


def significant(number: float, digits: int = 3) -> str:
    """With so many digits, but all that are before the point."""
    if number >= 10**digits:
        return f"{number:,.0f}"
    return f"{float(f'{number:.{digits}g}'):#.{digits}g}".rstrip(".")


def rendered(page: str) -> str:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(page).render(r=Results(RESULTS))


def measured_in(template: str) -> list[str]:
    """Figures that stand in a template by themselves, outside of code and of calls."""
    text = re.sub(r"```.*?```|`[^`\n]*`|\{\{.*?\}\}|\{%.*?%\}", "", template, flags=re.DOTALL)
    return [match[0] for match in MEASURED.finditer(text)]


def differing() -> list[str]:
    """Pages that are not what the templates and the CSVs make of them."""
    return [
        page
        for page, path in PAGES.items()
        if not path.exists() or path.read_text() != rendered(page)
    ]


# ---------------------------------------------------------------------------------------------
# The chart

MILLION = "n = m = 1,048,576, d = 3, L = 32"
SDXL = "an image, SDXL, 768², bfloat16, 30 steps, 28 guided"
# What is drawn, the CSV, its case, whose time is divided by whose, and how that peer is called.
BARS = (
    ("sliced_wasserstein, binned, 2^20 colors × 32", "sliced_wasserstein_h100", MILLION,
     "torch", "cuda binned, in [0, 1]", "PyTorch's sort, H100"),
    ("the same, by sorting", "sliced_wasserstein_h100", MILLION,
     "torch", "cuda exact", "PyTorch's sort, H100"),
    ("the same, binned, on 2 CPU cores", "sliced_wasserstein_cpu", MILLION,
     "torch", "cpp binned", "PyTorch's sort"),
    ("masked_cross_attention, 4096 pixels, gradients", "masked_cross_attention_h100",
     "(2, 10, 4096, 64), 77 tokens, forward and backward",
     "SDPA, mask of its dtype", "ours, bits", "PyTorch's SDPA, H100"),
    ("wide_attention, 9216 tokens, gradients", "wide_attention_h100",
     "9216 tokens, 512 wide, with gradients", "SDPA", "ours", "PyTorch's SDPA, H100"),
    ("group_norm_silu, 256 × 384², gradients", "group_norm_silu_h100",
     "(1, 256, 384, 384), channels last, with the gradient",
     "PyTorch", "ours", "PyTorch, H100"),
    ("geglu, 2304 × 5120, gradients", "geglu_h100", "(1, 2304, 5120), with the gradient",
     "PyTorch", "ours", "PyTorch, H100"),
    ("delta_combine, 64 × 4 × 128²", "delta_combine_h100", "(64, 4, 128, 128), epsilon, graph",
     "plain PyTorch", "ours", "PyTorch, H100"),
    ("ColorGuidance, quality, SDXL 768²", "color_guidance_h100", SDXL,
     "published", "ColorGuidance, quality", "SW-Guidance as published, H100"),
    ("ColorGuidance, fast, SDXL 768²", "color_guidance_h100", SDXL,
     "published", "ColorGuidance, fast", "SW-Guidance as published, H100"),
    ("DeltaSampling, SD 1.5's LoRA on 2.1", "delta_sampling_h100",
     "a step, SD 1.5 + LoRA to 2.1, 512²",
     "three calls, as published", "DeltaSampling", "three plain calls, H100"),
    ("FastDecoder, 1024²", "fast_decoder_h100", "decoding, 1024², bfloat16, end to end",
     "as it is", "FastDecoder", "Diffusers' decoder, H100"),
)  # fmt: skip


def draw(path: Path) -> None:
    """Bars of how many times as fast as its peer each is, as PNG and SVG."""
    from matplotlib.figure import Figure

    from sdcore import figures

    results = Results(RESULTS)
    ratios = [
        results.milliseconds(name, case, peer) / results.milliseconds(name, case, ours)
        for _, name, case, peer, ours, _ in BARS
    ]
    figure = Figure(figsize=(9, 4.6), dpi=130, facecolor="white", layout="constrained")
    axes = figure.subplots()
    places = range(len(BARS), 0, -1)
    of_methods = [one[0][0].isupper() for one in BARS]
    colors = ["#2a6fb0" if method else "#7fb2d9" for method in of_methods]
    axes.barh(places, ratios, color=colors, height=0.66)
    for place, ratio, (*_, peer) in zip(places, ratios, BARS, strict=True):
        axes.text(
            1.06 * ratio, place, f"{significant(ratio)} × {peer}", va="center",
            color=figures.INK, fontsize=8.5,
        )  # fmt: skip
    axes.set_yticks(places, [one[0] for one in BARS], fontsize=9, color=figures.INK)
    axes.set_xscale("log")
    axes.set_xlim(1, 12 * max(ratios))
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.set_xlabel("times as fast as", color=figures.INK)
    axes.spines[["top", "right"]].set_visible(False)
    charts.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if they differ")
    given = parser.parse_args(arguments)
    if given.check:
        if pages := differing():
            sys.exit(f"not what the CSVs say: {', '.join(pages)}; run python -m benchmarks.report")
        return
    for page, path in PAGES.items():
        path.write_text(rendered(page))
        print(f"written: {path.relative_to(ROOT)}")
    try:
        draw(CHART)
        results = Results(RESULTS)
        for name in filter(results.curves, results.files()):
            charts.draw(RESULTS / f"{name}.csv", CURVES / name)
    except ModuleNotFoundError as error:
        print(f"not drawn: {error.name} is not installed, which draws {CHART.name}.png")


if __name__ == "__main__":
    main()
