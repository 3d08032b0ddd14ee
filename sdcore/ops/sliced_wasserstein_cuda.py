"""Sliced Wasserstein on the CUDA backend: what the kernels work in, and the order of launches.

``sdcore._cuda`` takes addresses: tensors must outlive the call that is given theirs, hence the
local names. Work memory comes from torch's allocator, which keeps it for this stream.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sdcore import backends

# Points of up to this many coordinates are projected in the kernels, in registers. Beyond, a
# matrix product projects them, a bounded number of points at a time, and each direction of each
# batch element becomes a batch element of one coordinate.
MOST_COORDINATES = 4
PROJECTIONS_AT_ONCE = 1 << 24

Described = tuple[int, str, tuple[int, ...], tuple[int, ...]]


def described(points: Tensor) -> Described:
    return (
        points.data_ptr(),
        str(points.dtype).removeprefix("torch."),
        tuple(points.shape),
        points.stride(),
    )


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def place(tensor: Tensor) -> tuple[int, int]:
    """Where a launch goes: the tensor's device, and PyTorch's current stream there."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


@functools.cache
def most_bins(device: int) -> int:
    """One direction's histogram of weighted points, 8 bytes a bin, must fit shared memory."""
    return int(backends.cuda_module().devices()[device]["shared_memory_per_block"]) // 8 - 64


def refuses_bins(bins: int, device: torch.device) -> str | None:
    most = most_bins(device.index)
    return f"this GPU's shared memory holds {most} bins, not {bins}" if bins > most else None


def binned(
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
    bins: int,
    value_range: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [B, L], tables [B, L, bins] of x and y, edges [B, L, 2], as the op defines them."""
    work = _Work([x, y], directions, [weights_x, weights_y], bins, value_range)
    return work.solve(work.masses(0), work.masses(1), p, table_y=True)


def binned_to(
    x: Tensor,
    histogram_y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    p: int,
    value_range: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same against a histogram [B or 1, L, bins] of y; without a table for y."""
    histogram_y = histogram_y.contiguous()
    work = _Work([x], directions, [weights_x], histogram_y.shape[-1], value_range)
    step = directions.shape[0] if histogram_y.shape[0] > 1 else 0
    masses_y = histogram_y.data_ptr(), True, 0, step
    values, table, _, edges = work.solve(work.masses(0), masses_y, p, table_y=False)
    return values, table, edges


def histogram(
    points: Tensor,
    directions: Tensor,
    weights: Tensor | None,
    bins: int,
    value_range: list[float],
) -> Tensor:
    """Masses [B, L, bins], int64; -1 throughout where a projection is not finite."""
    work = _Work([points], directions, [weights], bins, value_range)
    found = work.histograms[0].view(points.shape[0], -1, bins)
    return torch.where(work.poison.view(points.shape[0], -1, 1) != 0, -1, found.long())


def gather(
    grad: Tensor,
    points: Tensor,
    directions: Tensor,
    weights: Tensor | None,
    table: Tensor,
    edges: Tensor,
) -> Tensor:
    """The gradient to ``points``, in their dtype and, where dense, their strides."""
    out = torch.empty_like(points)
    batch, n, d = points.shape
    if batch == 0:
        return out
    grad, directions = grad.contiguous(), directions.contiguous()
    table, edges = table.contiguous(), edges.contiguous()
    weights = None if weights is None else weights.contiguous()

    def launch(points: Tensor, directions: Tensor, weights: int, mass: float, out: Tensor) -> None:
        backends.cuda_module().sliced_wasserstein_gather(
            grad.data_ptr(),
            described(points),
            (directions.data_ptr(), directions.shape[0]),
            weights,
            mass,
            table.data_ptr(),
            edges.data_ptr(),
            table.shape[-1],
            described(out),
            place(points),
        )

    if d <= MOST_COORDINATES:
        mass = 1 / n if weights is None else 1.0
        launch(points, directions, address(weights), mass, out)
        return out
    for first, slopes in _projected(points, directions):
        launch(slopes, _one(directions), 0, 1.0, slopes)
        count = slopes.shape[1]
        pulled = slopes.view(batch, -1, count).mT @ directions
        mass = 1 / n if weights is None else weights[:, first : first + count, None]
        out[:, first : first + count] = pulled * mass
    return out


class _Work:
    """The histograms of one or two sides over common bins, and the memory they are in."""

    def __init__(
        self,
        sides: list[Tensor],
        directions: Tensor,
        weights: list[Tensor | None],
        bins: int,
        value_range: list[float] | None,
    ) -> None:
        self.sides, self.directions, self.bins = sides, directions.contiguous(), bins
        self.weights = [None if w is None else w.contiguous() for w in weights]
        self.batch, self.count = sides[0].shape[0], directions.shape[0]
        problems = self.batch * self.count
        words = [problems * bins * (1 if w is None else 2) for w in weights]
        words += [problems, 2 * problems * directions.element_size() // 4]
        # One piece of memory, so that one launch zeroes it.
        work = torch.zeros(
            sum(-(-size // 2) for size in words), dtype=torch.int64, device=sides[0].device
        )
        pieces, first = [], 0
        for size in words:
            pieces.append(work[first : first + -(-size // 2)].view(torch.int32)[:size])
            first += -(-size // 2)
        *histograms, self.poison, extremes = pieces
        self.histograms = [
            h if w is None else h.view(torch.int64)
            for h, w in zip(histograms, weights, strict=True)
        ]
        if self.batch:
            self.ends = self._ends(extremes, value_range)
            self._count()

    def _ends(self, extremes: Tensor, value_range: list[float] | None) -> tuple[Any, ...]:
        """Where bins begin and end, as the kernels take it."""
        few = self.sides[0].shape[-1] <= MOST_COORDINATES
        if value_range is not None:
            if few:
                return "box", 0, *value_range
            self._given = _edges_of_box(self.directions, value_range, self.batch)
            return "given", self._given.data_ptr(), 0.0, 0.0
        range = backends.cuda_module().sliced_wasserstein_range
        if few:
            sides = [described(points) for points in self.sides]
            range(sides, self._described(), extremes.data_ptr(), place(extremes))
        else:
            for points in self.sides:
                for _, part in _projected(points, self.directions):
                    one = _one(self.directions)
                    range([described(part)], (one.data_ptr(), 1), extremes.data_ptr(), place(part))
        self._extremes = extremes
        return "found", extremes.data_ptr(), 0.0, 0.0

    def _count(self) -> None:
        count = backends.cuda_module().sliced_wasserstein_histogram
        addresses = [h.data_ptr() for h in self.histograms]
        if self.sides[0].shape[-1] <= MOST_COORDINATES:
            described_sides = [
                (described(points), address(weights), histogram)
                for points, weights, histogram in zip(
                    self.sides, self.weights, addresses, strict=True
                )
            ]
            count(
                described_sides, self._described(), self.ends, self.bins,
                self.poison.data_ptr(), place(self.poison),
            )  # fmt: skip
            return
        one = _one(self.directions)
        for points, weights, histogram in zip(self.sides, self.weights, addresses, strict=True):
            for first, part in _projected(points, self.directions):
                some = None
                if weights is not None:
                    some = weights[:, first : first + part.shape[1]]
                    some = some.repeat_interleave(self.count, 0)
                count(
                    [(described(part), address(some), histogram)], (one.data_ptr(), 1), self.ends,
                    self.bins, self.poison.data_ptr(), place(part),
                )  # fmt: skip

    def _described(self) -> tuple[int, int]:
        return self.directions.data_ptr(), self.count

    def masses(self, side: int) -> tuple[int, bool, int, int]:
        """A side's histogram for ``solve``. Of counts the sum is known."""
        wide = self.weights[side] is not None
        total = 0 if wide else self.sides[side].shape[1]
        return self.histograms[side].data_ptr(), wide, total, self.count

    def solve(
        self,
        x: tuple[int, bool, int, int],
        y: tuple[int, bool, int, int],
        p: int,
        table_y: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        directions, batch, count, bins = self.directions, self.batch, self.count, self.bins
        values = directions.new_empty(batch, count)
        tables = [directions.new_empty(batch, count, bins) for _ in range(1 + table_y)]
        edges = directions.new_empty(batch, count, 2)
        if batch:
            moments = None
            if p == 2:
                moments = directions.new_empty(4, batch, count, bins, dtype=torch.float64)
            dim = self.sides[0].shape[-1]
            backends.cuda_module().sliced_wasserstein_solve(
                x,
                y,
                self._described(),
                dim if dim <= MOST_COORDINATES else 1,
                self.ends,
                batch,
                bins,
                p,
                self.poison.data_ptr(),
                values.data_ptr(),
                tables[0].data_ptr(),
                tables[1].data_ptr() if table_y else 0,
                edges.data_ptr(),
                address(moments),
                directions.dtype == torch.float64,
                place(directions),
            )
        return values, tables[0], tables[-1], edges


def _projected(points: Tensor, directions: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Projections [B·L, some, 1] of consecutive points, and the number of the first of them."""
    batch, n, _ = points.shape
    some = max(1, PROJECTIONS_AT_ONCE // (batch * directions.shape[0]))
    for first in range(0, n, some):
        part = points[:, first : first + some].to(directions.dtype)
        with torch.autocast("cuda", enabled=False):
            projections = (directions @ part.mT).contiguous()
        yield first, projections.view(-1, projections.shape[-1], 1)


def _one(directions: Tensor) -> Tensor:
    """The direction that leaves a projection as it is."""
    return directions.new_ones(1, 1)


def _edges_of_box(directions: Tensor, value_range: list[float], batch: int) -> Tensor:
    low, high = value_range
    ends = torch.stack([directions * low, directions * high])
    edges = torch.stack([ends.amin(0).sum(-1), ends.amax(0).sum(-1)], -1)
    return edges.expand(batch, -1, -1).contiguous()
