"""Sliced Wasserstein value and gradient, against what else there is.

``python -m benchmarks.bench_sliced_wasserstein [--device cuda] [--dtype bfloat16] [--quick]
[--csv FILE] [--cases PART] [--only PART] [--skip PART]``

``--cases`` and ``--only`` measure the cases, and the implementations, whose names have that part,
or one of several between semicolons: ``--cases 1,048,576 --only "torch; cuda exact"``. ``--skip``
leaves out peers likewise: ``--skip torch.compile``.

Peers: ``torch`` is the vectorized sort with autograd, projections made contiguous for the sort
(nearly twice as fast on a CPU as sorting a transposed view); ``torch.compile`` is the same,
compiled for each shape; ``POT`` is ot.sliced_wasserstein_distance on its PyTorch backend;
``published loop`` is the loss of SW-Guidance as published, one direction at a time, and its
``GPU part`` the same with indices that were drawn before, in a graph. All are given the same
directions. Matrix products are those of float32: TF32 is off, as it is by default. With --quick
these are ``torch`` and ``POT`` alone.

Ours: as it is; ``binned, in [0, 1]`` with that range given, which colors have; and ``kept``
against a palette that keeps its histograms or sorted projections for these directions.

Share of the ceiling: the time that the work would take at the rates measured in the same run, over
the time taken. Parts are added up as if none overlapped. The work of N = n L points and directions:

- binned: N updates of a table in shared memory for each side that is counted (kept: x alone), N
  reads for the gradient to x, and the points' bytes at the bandwidth of a copy. x is read to be
  counted and again for its gradient, which is written; y is read unless it is kept; both are read
  once more for a range that is not given.
- exact: the bytes of a radix sort, 8 bits a pass, at the bandwidth of a copy. Keys have 4 bytes and
  take 4 passes; x carries 4 bytes of payload, its order, and y none. A pass reads and writes each
  key with its payload, and the histograms of digits take one more reading of the keys: 68 N bytes
  for x and 36 N for y, which is left out where it is kept. Projecting, matching and scattering the
  gradient are not in it; and a sort that stays in the cache may do better than a copy.
- with more than 4 coordinates, either: three products of points and directions, which project x and
  y (kept: x alone) and bring the gradient back, 2 d N operations each, at the rate of a large
  float32 product. Up to 4 they are a few instructions beside each update, and not in it.

On a CPU, of either method: those products, for any d, and the points' bytes once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdcore
from benchmarks import measure, suite
from benchmarks.baselines import sw_guidance
from benchmarks.ceilings import Ceilings
from benchmarks.measure import Row, Work
from benchmarks.suite import Asked
from sdcore import backends, images
from sdcore.ops import sliced_wasserstein
from sdcore.ops.sliced_wasserstein_cuda import MOST_COORDINATES

VALUE_TOLERANCE = {"exact": 1e-5, "binned": 1e-3}
# With fewer directions than these, errors of their signs average out less.
GRADIENT_TOLERANCE, AVERAGED = {"exact": 0.02, "binned": 0.1}, 32
# Of inputs, at most: peers take dozens of launches for each; and outside of a graph many more.
SETS, SLOW_SETS = 64, 8


@dataclass(frozen=True)
class Case:
    n: int
    directions: int
    dtype: torch.dtype
    image: str = "random"
    d: int = 3

    def __str__(self) -> str:
        name = f"n = m = {self.n:,}, d = {self.d}, L = {self.directions}"
        return name if self.image == "random" else f"{name}, {self.image}"

    @property
    def name(self) -> str:
        return f"{self}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def are_colors(self) -> bool:
        return self.image != "features"

    @property
    def has_ties(self) -> bool:
        return self.image not in ("random", "features") or self.dtype != torch.float32

    @property
    def pairs(self) -> int:
        """Points times directions, of one side."""
        return self.n * self.directions

    def inputs(self, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(x, y, directions), several times over where that makes them cold."""
        each = 2 * self.d * self.n * self.dtype.itemsize
        generator = torch.Generator(device).manual_seed(0)
        return [self._input(device, generator) for _ in range(measure.sets_for(each, device, SETS))]

    def _input(self, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, device=device, generator=generator)

        if not self.are_colors:
            return self._features(device, generator)
        x, y = uniform(self.n, 3), uniform(self.n, 3) ** 1.5
        if self.image == "constant":
            x = x[:1].expand(self.n, 3).contiguous()
        if self.image == "photo":
            x = photo(self.n).to(device)
        if self.image == "two colors":
            x = torch.where(uniform(self.n, 1) < 0.5, x[:1], x[1:2])
        directions = unit_vectors(self.directions, 3, generator)
        return x.to(self.dtype).requires_grad_(), y.to(self.dtype), directions

    def _features(self, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        def normal() -> Tensor:
            return torch.randn(self.n, self.d, device=device, generator=generator)

        # Far enough apart that the binned W_1 gradient is not a guess.
        x, y = normal(), 1.5 * normal() + 0.5
        directions = unit_vectors(self.directions, self.d, generator)
        return x.to(self.dtype).requires_grad_(), y.to(self.dtype), directions


def unit_vectors(count: int, d: int, generator: torch.Generator) -> Tensor:
    directions = torch.randn(count, d, device=generator.device, generator=generator)
    return torch.nn.functional.normalize(directions, dim=1)


def photo(n: int) -> Tensor:
    """n colors of the photographs in docs, in the order of the pixels."""
    image = images.read(Path(__file__).parents[1] / "docs" / "recolor.jpg")
    side = math.isqrt(n)
    planes = image.permute(2, 0, 1)[None]
    grown = torch.nn.functional.interpolate(planes, (side, -(-n // side)), mode="bilinear")
    return grown[0].permute(1, 2, 0).reshape(-1, 3)[:n].clamp(0, 1).contiguous()


def torch_sort(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """The vectorized peer."""
    directions = directions.to(x.dtype)
    return ((directions @ x.T).sort(1).values - (directions @ y.T).sort(1).values).abs().mean()


def pot(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    # POT imports every array library that it finds, unless told not to.
    for library in ("JAX", "CUPY", "TENSORFLOW"):
        os.environ.setdefault(f"POT_BACKEND_DISABLE_{library}", "1")
    import ot

    return ot.sliced_wasserstein_distance(x, y, projections=directions.T.to(x.dtype), p=1)


def ours(backend: str, method: str, **options: Any) -> Callable[..., Tensor]:
    def loss(x: Tensor, y: Tensor | sdcore.Palette, directions: Tensor) -> Tensor:
        with sdcore.backend(backend):
            return sliced_wasserstein(x, y, directions=directions, method=method, **options)

    return loss


@dataclass(frozen=True)
class Ours:
    """One way to call ours: a method on a backend; variant is "", "in [0, 1]" or "kept"."""

    backend: str
    method: str
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.backend} {self.method}" + f", {self.variant}" * bool(self.variant)

    @property
    def kept(self) -> bool:
        return self.variant == "kept"

    def loss(self) -> Callable[..., Tensor]:
        in_range = self.variant and self.method == "binned"
        return ours(self.backend, self.method, **({"value_range": (0, 1)} if in_range else {}))

    def runs(self, case: Case, device: str) -> bool:
        """A palette and the range of colors are for colors; Triton is measured on those alone."""
        if not case.are_colors and (self.variant or self.backend == "triton"):
            return False
        reason = backends.unavailable(self.backend)
        reason = reason or backends.unsuitable_device(self.backend, device)
        return reason is None and backends.has(f"sliced_wasserstein_{self.method}", self.backend)


OURS = (
    Ours("cpp", "exact"),
    Ours("cpp", "binned"),
    Ours("cuda", "exact", "kept"),
    Ours("cuda", "exact"),
    Ours("cuda", "binned", "kept"),
    Ours("cuda", "binned", "in [0, 1]"),
    Ours("cuda", "binned"),
    Ours("triton", "binned"),
)


@functools.cache
def compiled() -> Callable[..., Tensor]:
    return torch.compile(torch_sort, dynamic=False)


def with_palettes(inputs: list[Any], method: str) -> list[Any]:
    """The same with y as a palette that keeps what it was called with these directions for."""
    loss = Ours("cuda", method, "kept").loss()
    found = [(x, sdcore.Palette(y).to(y.device), directions) for x, y, directions in inputs]
    for arguments in found:
        loss(*arguments)
    return found


def with_gradient(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """And the gradient of the sum over points: that of their mean float16 can't represent."""

    def both(x: Tensor, y: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(x, y, directions)
        # A peer's value may be of float16 itself.
        count = min(len(x), torch.finfo(value.dtype).max)
        return value, torch.autograd.grad(value, x, torch.full_like(value, count))[0]

    return both


def agreement(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], method: str, directions: int
) -> str:
    """Relative errors of value and gradient; raises if they are not what the method promises.
    ``found`` is :func:`with_gradient`'s, ``expected`` has the gradient of the mean."""
    value, gradient = found[0].double(), found[1].double() / len(found[1])
    value_error = ((value - expected[0]).abs() / expected[0]).item()
    gradient_error = ((gradient - expected[1]).norm() / expected[1].norm()).item()
    fewer = max(1.0, AVERAGED / directions) ** 0.5
    limits = VALUE_TOLERANCE[method], GRADIENT_TOLERANCE[method] * fewer
    if not (value_error < limits[0] and gradient_error < limits[1]):
        raise measure.WrongError(
            f"{method}: value off by {value_error:.2g}, gradient by {gradient_error:.2g} "
            f"(limits {limits[0]:.2g} and {limits[1]:.2g})"
        )
    return f"value {value_error:.0e}, gradient {gradient_error:.0e}"


def exact_double(x: Tensor, y: Tensor, directions: Tensor, ties: bool) -> tuple[Tensor, Tensor]:
    """Value and gradient by sorting in float64, a few directions at a time.

    Sorting gives equal points different gradients, as it happens to order them; sharing the sum
    among them makes it the gradient that does not depend on the order.
    """
    points = x.detach()
    x, y, directions = x.detach().double().requires_grad_(), y.double(), directions.double()
    value, gradient = x.new_zeros(()), torch.zeros_like(x)
    for some in directions.split(8):
        part = torch_sort(x, y, some) * (len(some) / len(directions))
        value += part.detach()
        gradient += torch.autograd.grad(part, x)[0]
    if not ties:
        return value, gradient
    return value, shared_by_equals(gradient, points)


def shared_by_equals(gradient: Tensor, points: Tensor) -> Tensor:
    """The mean over equal points of their gradients."""
    _, color, count = points.double().unique(dim=0, return_inverse=True, return_counts=True)
    total = gradient.new_zeros(len(count), points.shape[1]).index_add_(0, color, gradient)
    return (total / count[:, None])[color]


def run_case(case: Case, asked: Asked, peers: bool) -> list[Row]:
    device, skip = asked.device, asked.options.get("skip")
    only = asked.options.get("only_ways") or ""
    rivals = [
        found
        for found in peers_of(case, asked)
        if peers and _named(found[0], only) and not (skip and _named(found[0], skip))
    ]
    wanted = [one for one in OURS if _named(one.name, only) and one.runs(case, device)]
    if not rivals and not wanted:
        return []
    inputs = case.inputs(device)
    rows, taken = [], {}
    for name, loss in rivals:
        try:
            row, parts = _peer_row(case, name, loss, inputs, device)
        except Exception as problem:  # a peer may fail in ways of its own
            measure.skipped(f"{case.name}: {name}", str(problem))
            continue
        rows.append(row)
        taken |= parts
    expected = exact_double(*inputs[0], ties=case.has_ties) if wanted else None
    for one in wanted:
        these = with_palettes(inputs, one.method) if one.kept else inputs
        loss = one.loss()
        check = agreement(with_gradient(loss)(*these[0]), expected, one.method, case.directions)
        row = _row(case, one.name, loss, these, device)
        row.check, row.passed = check, True
        row.ratios = {rival: time / row.milliseconds for rival, time in taken.items()}
        rows.append(row.against(work_of(case, one, asked.ceilings)))
    return rows


def _named(name: str, parts: str) -> bool:
    return any(part.strip() in name for part in parts.split(";"))


def peers_of(case: Case, asked: Asked) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    yield "torch", torch_sort
    if asked.on_gpu and not asked.quick:
        yield "torch.compile", compiled()
        if case.are_colors and case.pairs <= 1 << 25:
            yield "published loop", sw_guidance.loss
    if case.are_colors and case.dtype == torch.float32:
        if _installed("ot"):
            yield "POT", pot
        else:
            measure.skipped("POT", "it is not installed")


def _peer_row(
    case: Case, name: str, loss: Callable[..., Tensor], inputs: list[Any], device: str
) -> tuple[Row, dict[str, float]]:
    """The row, and the times in it that ours are compared with."""
    row = _row(case, name, loss, inputs, device)
    row.check = "the peer"
    if name != "published loop":
        return row, {name: row.milliseconds}
    host, _, _ = measure.milliseconds(sw_guidance.host_part, inputs, device, 1, graph=False)
    drawn = sw_guidance.host_part(*inputs[0])
    rest = functools.partial(sw_guidance.loss, drawn=drawn)
    gpu, _, _ = measure.milliseconds(with_gradient(rest), inputs, device, 1)
    row.check += f"; indices and their copies alone {host:.3g} ms, all but them {gpu:.3g} ms"
    return row, {name: row.milliseconds, f"{name}'s GPU part": gpu}


def work_of(case: Case, one: Ours, ceilings: Ceilings) -> Work:
    """The file's docstring says what it consists of."""
    sides = 1 if one.kept else 2
    points = case.n * case.d * case.dtype.itemsize
    products = (sides + 1) * 2 * case.d * case.pairs
    operations = (sides + 1 if one.method == "binned" else sides) * case.pairs
    if ceilings.device != "cuda":
        time = products / ceilings.products(torch.float32) + 3 * points / ceilings.copy
        return Work(1e3 * time, "products and copy", 3 * points, operations)
    projecting = 0.0
    if case.d > MOST_COORDINATES:  # else kernels project points beside the counting
        projecting = products / ceilings.products(torch.float32)
    if one.method == "exact":
        moved = sorting_bytes(case, one)
        time, name = moved / ceilings.copy + projecting, "copies of a radix sort"
        return Work(1e3 * time, name, moved, operations)
    moved = ({"kept": 2, "in [0, 1]": 3, "": 5}[one.variant] + 1) * points
    if ceilings.shared_memory is None:
        return Work(moved=moved, operations=operations)
    updates, reads = ceilings.shared_memory
    time = sides * case.pairs / updates + case.pairs / reads + moved / ceilings.copy + projecting
    return Work(1e3 * time, "shared memory and copy", moved, operations)


def sorting_bytes(case: Case, one: Ours) -> int:
    """What a radix sort of the keys moves; the file's docstring has the formula."""
    x, y = (4 + 2 * 4 * entry for entry in (8, 4))
    return case.pairs * (x if one.kept else x + y)


def _row(case: Case, name: str, loss: Callable[..., Tensor], inputs: list[Any], device: str) -> Row:
    repeats = {"torch": 3, "torch.compile": 3, "POT": 1, "published loop": 1}.get(name, 11)
    graph = name not in ("POT", "published loop", "torch.compile")
    given = inputs if graph else inputs[:SLOW_SETS]
    median, spread, how = measure.milliseconds(
        with_gradient(loss), given, device, repeats, graph=graph
    )
    dtype = str(case.dtype).removeprefix("torch.")
    return Row("sliced_wasserstein", str(case), name, dtype, median, spread, how, "")


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def cases(device: str, quick: bool) -> list[tuple[Case, bool]]:
    if quick:
        return [(Case(65536, 32, torch.float32), True)]
    features = Case(16384, 256, torch.float32, "features", d=256)
    found = [(Case(1048576, 32, torch.float32), True), (features, True)]
    if device == "cuda":
        found += [
            (Case(589824, 30, torch.bfloat16), True),
            (Case(1048576, 96, torch.float32), True),
            (Case(262144, 32, torch.float32), True),
        ]
    kinds = ["constant", "two colors"] + ["photo"] * (device == "cuda")
    return found + [(Case(1048576, 32, torch.float32, image), False) for image in kinds]


def rows(asked: Asked) -> Iterator[Row]:
    if not asked.has(torch.float32, torch.float16, torch.bfloat16):
        return
    for case, peers in cases(asked.device, asked.quick):
        if asked.dtype is not None and case.dtype != asked.dtype:
            case = dataclasses.replace(case, dtype=asked.dtype)
        if asked.cases in case.name:
            yield from run_case(case, asked, peers)


def main() -> None:
    parser = suite.parser_of(__doc__)
    parser.add_argument(
        "--only", default="", metavar="PART", dest="only_ways", help="only implementations so named"
    )
    parser.add_argument("--skip", default="", metavar="PART", help="no peers so named")
    suite.main(rows, parser)


if __name__ == "__main__":
    main()
