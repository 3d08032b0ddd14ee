"""Sliced Wasserstein on the CUDA backend: what the kernels work in, and the order of launches.

Work memory comes from torch's allocator, which keeps it for this stream.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdcore import backends
from sdcore.ops.pointers import address, described

# Points of up to this many coordinates are projected in the kernels, in registers. Beyond, a
# matrix product projects them, a bounded number of points at a time, and each direction of each
# batch element becomes a batch element of one coordinate.
MOST_COORDINATES = 4
PROJECTIONS_AT_ONCE = 1 << 24


def place(tensor: Tensor) -> tuple[int, int]:
    """Where a launch goes: the tensor's device, and PyTorch's current stream there."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


@functools.cache
def most_bins(device: int, double: bool) -> int:
    """What shared memory holds: a weighted histogram, 8 bytes a bin, or two tables of slopes."""
    shared = int(backends.cuda_module().devices()[device]["shared_memory_per_block"])
    return shared // (16 if double else 8) - 512


def refuses_bins(bins: int, points: Tensor) -> str | None:
    double = points.dtype == torch.float64
    most = most_bins(points.device.index, double)
    if bins <= most:
        return None
    return f"this GPU's shared memory holds {most} {'float64 ' * double}bins, not {bins}"


def binned(
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
    bins: int,
    value_range: list[float] | None,
    scale: float | None,
    rescale: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, tables [B, L, bins] of x and y, edges [B, L, 2], as the op defines them."""
    sides = [_Side(x, weights_x, rescale), _Side(y, weights_y)]
    problem = _Problem(sides, directions.contiguous(), bins, value_range)
    first, second = problem.histograms()
    return problem.solve(first, second, False, p, scale, table_y=True)


def binned_to(
    x: Tensor,
    histogram_y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    p: int,
    value_range: list[float],
    scale: float | None,
    rescale: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same against a histogram [B or 1, L, bins] of y; without a table for y."""
    histogram_y = histogram_y.contiguous()
    bins = histogram_y.shape[-1]
    side = _Side(x, weights_x, rescale)
    problem = _Problem([side], directions.contiguous(), bins, value_range)
    one_y = histogram_y.shape[0] == 1
    (found,) = problem.histograms()
    known = _Histograms(histogram_y, None, 64, bins, 1)
    values, table, _, edges = problem.solve(found, known, one_y, p, scale, table_y=False)
    return values, table, edges


def histogram(
    points: Tensor,
    directions: Tensor,
    weights: Tensor | None,
    bins: int,
    value_range: list[float],
) -> Tensor:
    """Masses [B, L, bins], int64; -1 throughout where a projection is not finite."""
    batch = points.shape[0]
    if batch == 0:
        return directions.new_empty(0, directions.shape[0], bins, dtype=torch.int64)
    problem = _Problem([_Side(points, weights)], directions.contiguous(), bins, value_range)
    (found,) = problem.histograms()
    shape = (batch, directions.shape[0], found.chunks)
    masses = found.masses.view(*shape, found.pitch)[..., :bins]
    if found.bits == 16:  # torch sums no unsigned integers
        masses = masses.int() & 0xFFFF
    bad = (found.totals == -1).view(batch, directions.shape[0], -1).any(-1, keepdim=True)
    return torch.where(bad, -1, masses.sum(2, dtype=torch.int64))


def gather(
    grad: Tensor,
    points: Tensor,
    directions: Tensor,
    weights: Tensor | None,
    table: Tensor,
    edges: Tensor,
    scale: float | None,
    rescale: list[float] | None,
) -> Tensor:
    """The gradient to ``points``, in their dtype and, where dense, their strides."""
    out = torch.empty_like(points)
    batch, n, d = points.shape
    if batch == 0:
        return out
    directions, table, edges = directions.contiguous(), table.contiguous(), edges.contiguous()
    weights = None if weights is None else weights.contiguous()
    few = d <= MOST_COORDINATES
    mass = (1 / n if weights is None else 1.0) * (1.0 if scale is None else scale)
    mass *= 1.0 if rescale is None else rescale[0]
    if not few:
        grad = (grad if scale is None else grad[:, None].expand(-1, len(directions))).contiguous()
    strides = (grad.stride(0), 0 if grad.dim() == 1 else grad.stride(1)) if few else (1, 0)

    def launch(points: Tensor, directions: Tensor, weights: Tensor | None, out: Tensor) -> None:
        backends.cuda_module().sliced_wasserstein_gather(
            grad.data_ptr(),
            strides,
            described(points),
            rescale,
            (directions.data_ptr(), directions.shape[0]),
            address(weights),
            mass,
            table.data_ptr(),
            edges.data_ptr(),
            table.shape[-1],
            described(out),
            place(points),
        )

    if few:
        launch(points, directions, weights, out)
        return out
    one = _one(directions)
    for first, slopes in _projected(points, directions):
        launch(slopes, one, None, slopes)
        count = slopes.shape[1]
        pulled = slopes.view(batch, -1, count).mT @ directions
        if weights is not None:
            pulled *= weights[:, first : first + count, None]
        out[:, first : first + count] = pulled
    return out


class _Side(NamedTuple):
    points: Tensor
    weights: Tensor | None
    rescale: list[float] | None = None  # of points of few coordinates


class _Histograms(NamedTuple):
    """What was counted, [B, L, chunks, pitch], and the sum of each part, [B, L, chunks, parts]."""

    masses: Tensor
    totals: Tensor | None
    bits: int
    pitch: int
    chunks: int

    def described(self) -> tuple[int, int, int, int, int]:
        return (
            self.masses.data_ptr(),
            address(self.totals),
            self.bits,
            self.pitch,
            self.chunks,
        )


class _Problem:
    """One or two sides over common bins."""

    def __init__(
        self,
        sides: list[_Side],
        directions: Tensor,
        bins: int,
        value_range: list[float] | None,
    ) -> None:
        self.sides = [
            s._replace(weights=None if s.weights is None else s.weights.contiguous()) for s in sides
        ]
        self.directions, self.bins = directions, bins
        self.batch, self.count = sides[0].points.shape[0], directions.shape[0]
        self.few = sides[0].points.shape[-1] <= MOST_COORDINATES
        # With it the blocks that solve know the last of them.
        self.finished = torch.empty(1, dtype=torch.int32, device=directions.device)
        self.ends = self._ends(value_range)

    def _ends(self, value_range: list[float] | None) -> tuple[str, int, float, float]:
        """Where bins begin and end, as the kernels take it."""
        if value_range is not None:
            if self.few:
                return "box", 0, *value_range
            self._held = _edges_of_box(self.directions, value_range, self.batch)
            return "given", self._held.data_ptr(), 0.0, 0.0
        kind = torch.int64 if self.directions.dtype == torch.float64 else torch.int32
        extremes = self.directions.new_zeros(self.batch, self.count, 2, dtype=kind)
        module = backends.cuda_module()
        if self.batch and self.few:
            points = [described(side.points) for side in self.sides]
            module.sliced_wasserstein_range(
                points, self._directions(), extremes.data_ptr(), place(extremes)
            )
        elif self.batch:
            one = _one(self.directions)
            for side in self.sides:
                for _, part in _projected(side.points, self.directions):
                    module.sliced_wasserstein_range(
                        [described(part)], (one.data_ptr(), 1), extremes.data_ptr(), place(part)
                    )
        self._held = extremes
        return "found", extremes.data_ptr(), 0.0, 0.0

    def _directions(self) -> tuple[int, int]:
        return self.directions.data_ptr(), self.count

    def histograms(self) -> list[_Histograms]:
        """Each side counted, in one launch if both can be."""
        if not self.batch:
            return [_Histograms(self.finished, None, 32, 0, 0) for _ in self.sides]
        weighted = {side.weights is not None for side in self.sides}
        if self.few and len(weighted) == 1:
            return self._count_together(self.sides)
        if self.few:
            return [self._count_together([side])[0] for side in self.sides]
        return [self._count_projected(side) for side in self.sides]

    def _count_together(self, sides: list[_Side]) -> list[_Histograms]:
        found, arguments = [], []
        everyone = sum(side.points.shape[1] for side in sides)
        for side in sides:
            n, d = side.points.shape[1:]
            plan = self._plan(n, everyone - n, d, self.batch, self.count, side.weights)
            histograms = self._allocate(plan, plan.chunks)
            found.append(histograms)
            points = described(side.points), side.rescale
            argument = (*points, address(side.weights), histograms.described(), 0)
            arguments.append((*argument, plan.chunks, plan.group))
        self._launch(arguments, self._directions())
        return found

    def _count_projected(self, side: _Side) -> _Histograms:
        n, problems = side.points.shape[1], self.batch * self.count
        sizes = _sizes(n, problems)
        plans = [self._plan(size, 0, 1, problems, 1, side.weights) for size in sizes]
        histograms = self._allocate(plans[0], sum(plan.chunks for plan in plans))
        one, chunk = _one(self.directions), 0
        for (first, part), plan in zip(
            _projected(side.points, self.directions), plans, strict=True
        ):
            weights = None
            if side.weights is not None:
                weights = side.weights[:, first : first + part.shape[1]]
                weights = weights.repeat_interleave(self.count, 0)
            argument = (described(part), None, address(weights), histograms.described(), chunk)
            self._launch([(*argument, plan.chunks, plan.group)], (one.data_ptr(), 1))
            chunk += plan.chunks
        return histograms

    def _plan(
        self, n: int, others: int, d: int, batch: int, count: int, weights: Tensor | None
    ) -> _Plan:
        double, index = self.directions.dtype == torch.float64, self.directions.device.index
        weighted = weights is not None
        plan = backends.cuda_module().sliced_wasserstein_plan
        return _Plan(*plan(n, others, d, batch, count, self.bins, weighted, double, index))

    def _allocate(self, plan: _Plan, chunks: int) -> _Histograms:
        kind = {16: torch.int16, 32: torch.int32, 64: torch.int64}[plan.bits]
        rows = self.batch * self.count * chunks
        masses = self.directions.new_empty(rows, plan.pitch, dtype=kind)
        totals = self.directions.new_empty(rows, plan.parts, dtype=torch.int64)
        return _Histograms(masses, totals, plan.bits, plan.pitch, chunks)

    def _launch(self, sides: list[Any], directions: tuple[int, int]) -> None:
        backends.cuda_module().sliced_wasserstein_histogram(
            sides, directions, self.ends, self.bins, self.finished.data_ptr(), place(self.finished)
        )

    def solve(
        self,
        x: _Histograms,
        y: _Histograms,
        one_y: bool,
        p: int,
        scale: float | None,
        table_y: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        directions, batch, count, bins = self.directions, self.batch, self.count, self.bins
        values = directions.new_empty((batch, count) if scale is None else (batch,))
        tables = [directions.new_empty(batch, count, bins) for _ in range(1 + table_y)]
        edges = directions.new_empty(batch, count, 2)
        if batch:
            module = backends.cuda_module()
            parts = -(-bins // module.sliced_wasserstein_part)
            double = {"dtype": torch.float64, "device": directions.device}
            costs = torch.empty(batch, count, parts, **double)
            moments = torch.empty(2, batch, count, 2 * bins + parts, **double) if p == 2 else None
            module.sliced_wasserstein_solve(
                x.described(),
                y.described(),
                one_y,
                self._directions(),
                self.sides[0].points.shape[-1] if self.few else 1,
                self.ends,
                batch,
                bins,
                p,
                values.data_ptr(),
                scale,
                tables[0].data_ptr(),
                tables[1].data_ptr() if table_y else 0,
                edges.data_ptr(),
                costs.data_ptr(),
                self.finished.data_ptr(),
                address(moments),
                directions.dtype == torch.float64,
                place(directions),
            )
        return values, tables[0], tables[-1], edges


class _Plan(NamedTuple):
    chunks: int
    pitch: int
    parts: int
    group: int
    bits: int


def _sizes(n: int, problems: int) -> list[int]:
    some = max(1, PROJECTIONS_AT_ONCE // problems)
    return [min(some, n - first) for first in range(0, n, some)]


def _projected(points: Tensor, directions: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Projections [B·L, some, 1] of consecutive points, and the number of the first of them."""
    batch, n, _ = points.shape
    first = 0
    for size in _sizes(n, batch * directions.shape[0]):
        part = points[:, first : first + size].to(directions.dtype)
        with torch.autocast("cuda", enabled=False):
            projections = (directions @ part.mT).contiguous()
        yield first, projections.view(-1, size, 1)
        first += size


def _one(directions: Tensor) -> Tensor:
    """The direction that leaves a projection as it is."""
    return directions.new_ones(1, 1)


def _edges_of_box(directions: Tensor, value_range: list[float], batch: int) -> Tensor:
    low, high = value_range
    ends = torch.stack([directions * low, directions * high])
    edges = torch.stack([ends.amin(0).sum(-1), ends.amax(0).sum(-1)], -1)
    return edges.expand(batch, -1, -1).contiguous()
