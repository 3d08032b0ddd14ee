"""How far sliced Wasserstein is from the exact solution, value and gradient.

``python -m benchmarks.bench_sliced_wasserstein_accuracy [--device cuda] [--dtype bfloat16]
[--quick] [--csv FILE]``

Inputs are rounded to the dtype first; everything else is compared on what that leaves, with
directions that are float32 numbers:

- E, the exact solution: sorting in float64, points that tie sharing the gradient.
- R, the rival. For ``binned``: the same 4096 bins in float64, by the reference backend; its
  distance to E is what bins cost. For ``exact``: the reference backend in the dtype itself; its
  distance to E is what arithmetic costs. Which points that costs is chance, so the worst counts of
  the three orders in which coordinates may be added up.
- O, ours: each backend in the dtype itself.

Stated are the relative distances |R − E| / |E| and |O − E| / |E|, over the values of all directions
and over the gradient to x of their mean, their ratio, and 1 − cos of the angle between gradients.
The mean is multiplied by n before it is differentiated, as whoever trains in float16 scales a loss:
otherwise that format has no numbers as small as the gradients.

The bound, of value and of gradient: O's distance is at most 1.5 times R's for ``binned``, twice R's
for ``exact``; or it is what rounding explains, and then the last column says "rounding":

- 2 ε + ε(float32), where ε is that of the format that the result comes in: the dtype for gradients,
  float32 for values. In float64, with nothing more exact to compare with, 1e-11: gaps between sets
  that nearly agree are some 1e-4 of the coordinates, and lose as many digits.
- For ``exact``, ten more mistakes in gradients, of n L: with p = 1 wrong signs, of points that all
  but meet their partners; with p = 2 neighbours in the wrong order, so that each has the other's
  partner, a mean gap of y away. There may be few such points, and then R may have got all of them
  right.

The command fails after its table if a row is out of bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sdcore
from benchmarks import measure, suite
from benchmarks.bench_sliced_wasserstein import photo, unit_vectors
from benchmarks.suite import Asked
from sdcore import backends
from sdcore.ops import sliced_wasserstein
from sdcore.ops.sliced_wasserstein import DTYPES, compute_dtype

# The spread of what moves y off x. The first is some eight bins, and less than bfloat16 resolves
# near 1.
NOISES = {"near, 0.003": 0.003, "near, 0.03": 0.03}
DATA = ("random", "photo", "two colors", *NOISES)
RANGES = {"binned": ((0.0, 1.0), None), "exact": (None,)}
FACTOR = {"binned": 1.5, "exact": 2.0}
MISTAKES = 10
QUICK = (torch.float32, torch.bfloat16)


class Solution(NamedTuple):
    """Values [L], and the gradient [n, 3] of n times their mean; float64."""

    value: Tensor
    gradient: Tensor


@dataclass
class Row:
    """One comparison. Distances are relative, to the exact solution."""

    op: str
    data: str
    n: int
    directions: int
    dtype: str
    backend: str
    method: str
    p: int
    value_range: str
    value_rival: float
    value: float
    value_ratio: float
    value_bound: str
    gradient_rival: float
    gradient: float
    gradient_ratio: float
    gradient_bound: str
    angle_rival: float
    angle: float
    device: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""

    @property
    def is_broken(self) -> bool:
        return "BROKEN" in (self.value_bound, self.gradient_bound)


def points(data: str, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x and y [n, 3], float64, in [0, 1]."""

    def uniform(count: int) -> Tensor:
        return torch.rand(count, 3, generator=generator, dtype=torch.float64)

    x, y = uniform(n), uniform(n)
    if data == "random":
        return x, y**1.5
    if data == "photo":
        return photo(n).double(), y
    if data == "two colors":
        return torch.where(uniform(n)[:, :1] < 0.5, x[:1], x[1:2]), y
    noise = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, (x + NOISES[data] * noise).clamp(0, 1)


def solution(backend: str, x: Tensor, y: Tensor, directions: Tensor, **options: Any) -> Solution:
    x = x.detach().requires_grad_()
    options |= {"directions": directions.to(compute_dtype(x.dtype))}
    with sdcore.backend(backend):
        values = sliced_wasserstein(x.detach(), y, reduction="none", **options)
        mean = sliced_wasserstein(x, y, **options)
        (gradient,) = torch.autograd.grad(len(x) * mean, x)
    return Solution(values.double(), gradient.double())


def exact_solution(x: Tensor, y: Tensor, directions: Tensor, p: int) -> Solution:
    """In float64. A matrix product may round equal points differently, which would undo their tie:
    points are projected by sums of products, and the op gets them with one coordinate."""
    x, y, directions = (t.detach().double() for t in (x, y, directions))
    x.requires_grad_()
    px, py = (_projected(side, directions)[..., None] for side in (x, y))
    with sdcore.backend("reference"):
        values = sliced_wasserstein(px, py, p=p, directions=px.new_ones(1, 1))
        (gradient,) = torch.autograd.grad(len(x) * values.mean(), x)
    return Solution(values.detach(), gradient)


def _projected(points: Tensor, directions: Tensor) -> Tensor:
    """[L, n]"""
    x, y, z = points.T
    u, v, w = (column[:, None] for column in directions.T)
    return x * u + y * v + z * w


def rivals(x: Tensor, y: Tensor, directions: Tensor, **options: Any) -> list[Solution]:
    if options["method"] == "binned":
        return [solution("reference", x.double(), y.double(), directions, **options)]
    found = []
    for turn in range(3):
        turned = (t.roll(turn, 1) for t in (x, y, directions))
        value, gradient = solution("reference", *turned, **options)
        found.append(Solution(value, gradient.roll(-turn, 1)))
    return found


def distance(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def angle(found: Tensor, exact: Tensor) -> float:
    """1 − cos, as half the squared distance of unit vectors: that doesn't cancel."""
    return ((found / found.norm() - exact / exact.norm()).norm() ** 2 / 2).item()


def rounding(dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 1e-11
    return 2 * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps


def allowances(
    exact: Solution, gaps: Tensor, dtype: torch.dtype, method: str, p: int
) -> tuple[float, float]:
    """What rounding explains of the distance of values, and of gradients. ``gaps`` [L]: the mean
    ones between neighbours of y."""
    value, gradient = rounding(compute_dtype(dtype)), rounding(dtype)
    if method == "exact" and dtype != torch.float64:
        # How far a mistake moves a point's gradient, and with p = 2 that of its neighbour.
        one = 2.0 if p == 1 else math.sqrt(2) * 2 * gaps.max().item()
        gradient += math.sqrt(MISTAKES) * one / len(exact.value) / exact.gradient.norm().item()
    return value, gradient


def verdict(ours: float, rival: float, factor: float, allowance: float) -> str:
    if ours <= factor * rival:
        return "met"
    return "rounding" if ours <= allowance else "BROKEN"  # and so is NaN


def rows_of(
    data: str, dtype: torch.dtype, n: int, count: int, device: str, names: list[str]
) -> Iterator[Row]:
    # On the CPU, so that all devices get the same.
    generator = torch.Generator().manual_seed(0)
    x, y = (side.to(device, dtype) for side in points(data, n, generator))
    directions = unit_vectors(count, 3, generator).to(device)
    along = _projected(y.double(), directions.double())
    gaps = (along.amax(1) - along.amin(1)) / n
    for p in (1, 2):
        exact = exact_solution(x, y, directions, p)
        for method, ranges in RANGES.items():
            able = [b for b in names if backends.has(f"sliced_wasserstein_{method}", b)]
            for value_range in ranges if able else ():
                options = {"p": p, "method": method, "value_range": value_range}
                theirs = rivals(x, y, directions, **options)
                for backend in able:
                    ours = solution(backend, x, y, directions, **options)
                    yield _row(data, dtype, backend, options, exact, gaps, theirs, ours)


def _row(
    data: str,
    dtype: torch.dtype,
    backend: str,
    options: dict[str, Any],
    exact: Solution,
    gaps: Tensor,
    theirs: list[Solution],
    ours: Solution,
) -> Row:
    method, p, value_range = options["method"], options["p"], options["value_range"]
    values = [
        max(distance(their.value, exact.value) for their in theirs),
        distance(ours.value, exact.value),
    ]
    gradients = [
        max(distance(their.gradient, exact.gradient) for their in theirs),
        distance(ours.gradient, exact.gradient),
    ]
    value_allowance, gradient_allowance = allowances(exact, gaps, dtype, method, p)
    factor = FACTOR[method]
    return Row(
        "sliced_wasserstein",
        data,
        len(exact.gradient),
        len(exact.value),
        str(dtype).removeprefix("torch."),
        backend,
        method,
        p,
        _range_name(method, value_range),
        *values,
        _ratio(*values),
        verdict(values[1], values[0], factor, value_allowance),
        *gradients,
        _ratio(*gradients),
        verdict(gradients[1], gradients[0], factor, gradient_allowance),
        max(angle(their.gradient, exact.gradient) for their in theirs),
        angle(ours.gradient, exact.gradient),
    )


def _range_name(method: str, value_range: tuple[float, float] | None) -> str:
    if method == "exact":
        return ""
    return "found" if value_range is None else "{:g} to {:g}".format(*value_range)


def _ratio(rival: float, ours: float) -> float:
    return ours / rival if rival else math.nan


def available(device: str) -> list[str]:
    """Backends to judge; the reference is what they are judged by."""
    return [
        name
        for name in ("cpp", "triton", "cuda")
        if not (backends.unavailable(name) or backends.unsuitable_device(name, device))
    ]


def print_table(rows: list[Row]) -> None:
    head = ("data", "dtype", "backend", "method", "p", "range")
    head += ("value: rival", "ours", "ratio", "bound")
    head += ("gradient: rival", "ours", "ratio", "bound", "1 - cos: rival", "ours")
    lines = []
    for row in rows:
        names = (row.data, row.dtype, row.backend, row.method, str(row.p), row.value_range)
        value = (row.value_rival, row.value, row.value_ratio, row.value_bound)
        gradient = (row.gradient_rival, row.gradient, row.gradient_ratio, row.gradient_bound)
        angles = (f"{row.angle_rival:.0e}", f"{row.angle:.0e}")
        lines.append((*names, *_cells(*value), *_cells(*gradient), *angles))
    measure.print_lines(head, lines)


def _cells(rival: float, ours: float, ratio: float, bound: str) -> tuple[str, ...]:
    return f"{rival:.1e}", f"{ours:.1e}", "" if math.isnan(ratio) else f"{ratio:.2f}", bound


def comparisons(asked: Asked) -> Iterator[Row]:
    n, count = (262144, 8) if asked.on_gpu else (16384, 4)
    if asked.quick:
        n, count = (65536, 8) if asked.on_gpu else (4096, 4)
    names = available(asked.device)
    if not asked.has(*DTYPES):
        return
    for data in DATA:
        if asked.cases in data:
            for dtype in (asked.dtype,) if asked.dtype else QUICK if asked.quick else DTYPES:
                yield from rows_of(data, dtype, n, count, asked.device, names)


def rows(asked: Asked) -> Iterator[measure.Row]:
    """Comparisons as rows without times."""
    for found in comparisons(asked):
        row = as_measured(found)
        if found.is_broken:
            raise measure.WrongError(f"{row.case}, {row.dtype}, {row.implementation}: {row.check}")
        yield row


def as_measured(row: Row) -> measure.Row:
    span = f", range {row.value_range}" if row.value_range else ""
    return measure.Row(
        "sliced_wasserstein_accuracy",
        f"{row.data}, {row.n:,} points, {row.directions} directions, p = {row.p}{span}",
        f"{row.backend} {row.method}",
        row.dtype,
        math.nan,
        math.nan,
        "not timed",
        f"value off by {row.value:.1e}, {row.value_bound} (rival {row.value_rival:.1e}); "
        f"gradient {row.gradient:.1e}, {row.gradient_bound} (rival {row.gradient_rival:.1e})",
        passed=not row.is_broken,
    )


def main() -> None:
    parser = suite.parser_of(__doc__)
    given = parser.parse_args()
    found = list(comparisons(suite.asked_by(given)))
    if not found:
        parser.error("no backend but the reference runs here")
    finish(found, given.device, given.csv)


def finish(rows: list[Row], device: str, path: Path | None) -> None:
    """Table and CSV; then an error if a bound is broken."""
    measured = measure.finished(as_measured(rows[0]), device)
    for row in rows:
        for name in ("device", "versions", "commit", "date"):
            setattr(row, name, getattr(measured, name))
    print(f"\n{rows[0].device}; {rows[0].versions}; {rows[0].commit}\n")
    print_table(rows)
    if path is not None:
        measure.save_csv([asdict(row) for row in rows], path)
    if broken := sum(row.is_broken for row in rows):
        raise SystemExit(f"{broken} of {len(rows)} rows break their bound")
    print(f"\nall {len(rows)} rows keep their bounds")


if __name__ == "__main__":
    main()
