"""Sliced Wasserstein distance by binning, forward and backward.

Forward: the range of the projections (unless the caller knows one), a histogram of each side,
and one program per direction that solves the transport problem between the two histograms and
writes the tables of slopes. Backward: each point finds its bin again and adds up table entries.
The formulas are in sdcore/ops/sliced_wasserstein.py.

Points are read in any strides and dtype; arithmetic is that of ``directions``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

# Points of up to this many coordinates are projected in the kernels, in registers. Beyond, a
# matrix product projects them, a bounded number of points at a time.
MOST_COORDINATES = 4
PROJECTIONS_AT_ONCE = 1 << 24
# Weights are added as integers of 2^-62, so that the sum does not depend on the order.
WEIGHT_UNIT = tl.constexpr(4611686018427387904.0)
# A program's directions and points, as measured for 32 directions of 1,048,576 points on an H200.
# Counting is bound by the atomics of the second-level cache, 85 G a second when they spread over
# many addresses, which more directions help: 411 µs a side, where (8, 512) takes 625.
RANGE_TILE = (4, 1024)  # 100 µs for both sides; (8, 512) takes 126
HISTOGRAM_TILE = (32, 128)
BACKWARD_TILE = (1, 1024)  # with 8 warps 71 µs; tiles of several directions took 110 and more
SLOPE_TILE = (8, 512)
WARPS = 4
# Bins that one program holds at a time when it solves a direction's problem.
BINS = 1024


@triton.jit
def _projections(
    points, directions, b, dirs, rows, inside, sb, sn, sd,
    D: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """Projections [directions, points] of the points ``rows`` to the directions ``dirs``.

    PROJECTED: ``points`` holds projections already, a direction in the place of a coordinate.
    """
    REAL: tl.constexpr = directions.dtype.element_ty
    at = points + b.to(tl.int64) * sb + rows.to(tl.int64)[None, :] * sn
    if PROJECTED:
        value = tl.load(at + dirs[:, None].to(tl.int64) * sd, mask=inside, other=0.0).to(REAL)
    else:
        value = tl.zeros(inside.shape, REAL)
        # A mask of points alone keeps the loads one-dimensional: one for all directions.
        valid = tl.max(inside.to(tl.int32), 0)[None, :] > 0
        for k in tl.static_range(D):
            x = tl.load(at + k * sd, mask=valid, other=0.0).to(REAL)
            value += x * tl.load(directions + dirs * D + k)[:, None]
    return value


@triton.jit
def _bins(projection, low, high, bins):
    """Bin of each projection, and whether it is finite. Those that are not go to bin 0 or last."""
    scale = tl.where(high > low, bins / (high - low), 0.0)
    position = (projection - low) * scale
    finite = tl.abs(position) < float("inf")  # false for NaN
    inside = tl.minimum(tl.where(position > 0, position, 0.0), bins - 1)
    return inside.to(tl.int32), finite


@triton.jit
def range_kernel(
    points, directions, least, most, n, count_l, blocks, sb, sn, sd,
    D: tl.constexpr, PROJECTED: tl.constexpr, DIRECTIONS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """least, most [b, block, direction]: the ends of the projections of each block of points."""
    block = tl.program_id(0) % blocks
    b = tl.program_id(0) // blocks
    dirs = tl.program_id(1) * DIRECTIONS + tl.arange(0, DIRECTIONS)
    rows = block * POINTS + tl.arange(0, POINTS)
    known = dirs < count_l
    dirs = tl.where(known, dirs, 0)
    inside = known[:, None] & (rows < n)[None, :]
    value = _projections(
        points, directions, b, dirs, rows, inside, sb, sn, sd, D, PROJECTED
    )  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * count_l + dirs
    tl.store(least + at, tl.min(tl.where(inside, value, float("inf")), 1), mask=known)
    tl.store(most + at, tl.max(tl.where(inside, value, float("-inf")), 1), mask=known)


@triton.jit
def histogram_kernel(
    points, directions, weights, edges, histogram, poison, n, first, count_n, count_l, blocks,
    sb, sn, sd, bins,
    D: tl.constexpr, PROJECTED: tl.constexpr, DIRECTIONS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Adds points to histogram[b, direction]; marks poison[b, direction] if one is not finite.

    ``points`` holds ``n`` of ``count_n`` points, from point ``first`` on; the weights are of all.
    """
    block = tl.program_id(0) % blocks
    b = tl.program_id(0) // blocks
    dirs = tl.program_id(1) * DIRECTIONS + tl.arange(0, DIRECTIONS)
    rows = block * POINTS + tl.arange(0, POINTS)
    known = dirs < count_l
    dirs = tl.where(known, dirs, 0)
    inside = known[:, None] & (rows < n)[None, :]
    value = _projections(points, directions, b, dirs, rows, inside, sb, sn, sd, D, PROJECTED)
    slot = b.to(tl.int64) * count_l + dirs
    low, high = tl.load(edges + slot * 2), tl.load(edges + slot * 2 + 1)
    index, finite = _bins(value, low[:, None], high[:, None], bins)
    bad = ~finite
    target = histogram + slot[:, None] * bins + index
    if weights is not None:
        at = weights + b.to(tl.int64) * count_n + first + rows
        mass = tl.load(at, mask=rows < n, other=0.0)[None, :]
        bad |= mass != mass
        mass = tl.where(mass > 0, mass, 0.0)
        tl.atomic_add(
            target, (mass * WEIGHT_UNIT).to(tl.int64).broadcast_to(inside.shape), mask=inside,
            sem="relaxed",
        )  # fmt: skip
    else:
        tl.atomic_add(target, tl.full(inside.shape, 1, tl.int32), mask=inside, sem="relaxed")
    marks = (poison + slot)[:, None].broadcast_to(inside.shape)
    tl.store(marks, tl.full(inside.shape, 1, tl.int32), mask=inside & bad)


@triton.jit
def _total(histogram, bins, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, bins, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        total += tl.load(histogram + columns, mask=columns < bins, other=0).to(tl.int64)
    return tl.sum(total).to(tl.float64)


@triton.jit
def solve_1_kernel(
    histogram_x, histogram_y, edges, poison, values, table_x, table_y, bins, BLOCK: tl.constexpr
):  # fmt: skip
    """W_1 of one direction's histograms, and its slopes per bin and unit of mass.

    Of the mass of x in bin b, quantiles F(b-) to F(b), the part below G(b-) comes from lower bins
    of y and pulls with slope +1, the part above G(b) from higher ones with slope -1.
    """
    slot = tl.program_id(0).to(tl.int64)
    histogram_x += slot * bins
    histogram_y += slot * bins
    total_x = _total(histogram_x, bins, BLOCK)
    total_y = _total(histogram_y, bins, BLOCK)
    REAL: tl.constexpr = values.dtype.element_ty
    bad = tl.load(poison + slot) != 0
    nan = float("nan")
    gap = tl.zeros([BLOCK], tl.float64)
    before_x = tl.zeros([], tl.int64)
    before_y = tl.zeros([], tl.int64)
    for first in range(0, bins, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        valid = columns < bins
        count_x = tl.load(histogram_x + columns, mask=valid, other=0).to(tl.int64)
        count_y = tl.load(histogram_y + columns, mask=valid, other=0).to(tl.int64)
        end_x = before_x + tl.cumsum(count_x)
        end_y = before_y + tl.cumsum(count_y)
        before_x += tl.sum(count_x)
        before_y += tl.sum(count_y)
        f, f_before = end_x.to(tl.float64) / total_x, (end_x - count_x).to(tl.float64) / total_x
        g, g_before = end_y.to(tl.float64) / total_y, (end_y - count_y).to(tl.float64) / total_y
        gap += tl.where(valid, tl.abs(f - g), 0.0)
        slope_x = _slope_1(f_before, f, g_before, g)
        slope_y = _slope_1(g_before, g, f_before, f)
        slope_x = tl.where(bad, nan, tl.where(count_x > 0, slope_x, 0.0))
        slope_y = tl.where(bad, nan, tl.where(count_y > 0, slope_y, 0.0))
        tl.store(table_x + slot * bins + columns, slope_x.to(REAL), mask=valid)
        tl.store(table_y + slot * bins + columns, slope_y.to(REAL), mask=valid)
    width = _width(edges, slot, bins)
    tl.store(values + slot, tl.where(bad, nan, tl.sum(gap) * width).to(REAL))


@triton.jit
def _slope_1(f_before, f, g_before, g):
    from_below = tl.maximum(0.0, tl.minimum(g_before, f) - f_before)
    from_above = tl.maximum(0.0, f - tl.maximum(g, f_before))
    return (from_below - from_above) / (f - f_before)


@triton.jit
def _width(edges, slot, bins):
    low = tl.load(edges + slot * 2).to(tl.float64)
    high = tl.load(edges + slot * 2 + 1).to(tl.float64)
    return (high - low) / bins


@triton.jit
def moments_kernel(histogram, level, first_moment, second_moment, bins, BLOCK: tl.constexpr):
    """Per direction, up to and including each bin: the mass, and its first and second moment.

    Bins are numbered from 0; the unit of length is a bin.
    """
    slot = tl.program_id(0).to(tl.int64)
    histogram += slot * bins
    total = _total(histogram, bins, BLOCK)
    before = tl.zeros([], tl.int64)
    before_1 = tl.zeros([], tl.float64)
    before_2 = tl.zeros([], tl.float64)
    for first in range(0, bins, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        valid = columns < bins
        count = tl.load(histogram + columns, mask=valid, other=0).to(tl.int64)
        mass = count.to(tl.float64) / total
        moment_1 = mass * columns.to(tl.float64)
        moment_2 = moment_1 * columns.to(tl.float64)
        at = slot * bins + columns
        end = before + tl.cumsum(count)
        tl.store(level + at, end.to(tl.float64) / total, mask=valid)
        tl.store(first_moment + at, before_1 + tl.cumsum(moment_1), mask=valid)
        tl.store(second_moment + at, before_2 + tl.cumsum(moment_2), mask=valid)
        before += tl.sum(count)
        before_1 += tl.sum(moment_1)
        before_2 += tl.sum(moment_2)


@triton.jit
def _quantile_moments(u, level, first_moment, second_moment, bins, steps):
    """First and second moment of the mass below quantile u, in bins, by binary search for u."""
    low = tl.zeros(u.shape, tl.int32)
    high = low + (bins - 1)
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(level + middle) < u
        low = tl.where(below, tl.minimum(middle + 1, high), low)
        high = tl.where(below, high, middle)
    some = low > 0
    rest = u - tl.load(level + low - 1, mask=some, other=0.0)
    at = low.to(tl.float64)
    moment_1 = tl.load(first_moment + low - 1, mask=some, other=0.0) + rest * at
    moment_2 = tl.load(second_moment + low - 1, mask=some, other=0.0) + rest * at * at
    return moment_1, moment_2


@triton.jit
def solve_2_kernel(
    level, level_other, first_other, second_other, edges, poison, values, table, bins, steps,
    HAS_VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One side's slopes of W_2^2 per bin and unit of mass: 2 (bin - mean of its partners).

    Differences of cumulated moments lose digits: in float64, 64 bins leave 12 of them.
    With HAS_VALUES also W_2^2 itself, as a sum over this side's bins.
    """
    slot = tl.program_id(0).to(tl.int64)
    level += slot * bins
    level_other += slot * bins
    first_other += slot * bins
    second_other += slot * bins
    REAL: tl.constexpr = table.dtype.element_ty
    bad = tl.load(poison + slot) != 0
    nan = float("nan")
    width = _width(edges, slot, bins)
    cost = tl.zeros([BLOCK], tl.float64)
    for first in range(0, bins, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        valid = columns < bins
        end = tl.load(level + columns, mask=valid, other=1.0)
        begin = tl.load(level + columns - 1, mask=valid & (columns > 0), other=0.0)
        mass = tl.where(valid, end - begin, 0.0)
        end_1, end_2 = _quantile_moments(end, level_other, first_other, second_other, bins, steps)
        begin_1, begin_2 = _quantile_moments(
            begin, level_other, first_other, second_other, bins, steps
        )
        at = columns.to(tl.float64)
        partners = end_1 - begin_1
        squares = mass * at * at - 2 * at * partners + (end_2 - begin_2)
        cost += tl.where(mass > 0, squares, 0.0)
        slope = 2 * width * (at - partners / mass)
        slope = tl.where(bad, nan, tl.where(mass > 0, slope, 0.0))
        tl.store(table + slot * bins + columns, slope.to(REAL), mask=valid)
    if HAS_VALUES:
        total = tl.maximum(tl.sum(cost), 0.0) * width * width
        tl.store(values + slot, tl.where(bad, nan, total).to(REAL))


@triton.jit
def _coordinate(points, rows, valid, sn, offset, wanted: tl.constexpr, REAL: tl.constexpr):
    if wanted:
        return tl.load(points + rows.to(tl.int64) * sn + offset, mask=valid, other=0.0).to(REAL)
    else:
        return tl.zeros(rows.shape, REAL)


@triton.jit
def backward_kernel(
    grad, points, directions, weights, table, edges, out, n, count_l, blocks,
    sb, sn, sd, ob, on, od, bins,
    D: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of points of up to four coordinates, summed over all directions.

    One direction at a time: a tile of several would have to be summed across threads.
    """
    block = tl.program_id(0) % blocks
    b = tl.program_id(0) // blocks
    rows = block * POINTS + tl.arange(0, POINTS)
    valid = rows < n
    REAL: tl.constexpr = directions.dtype.element_ty
    points += b.to(tl.int64) * sb
    x0 = _coordinate(points, rows, valid, sn, 0, True, REAL)
    x1 = _coordinate(points, rows, valid, sn, sd, D > 1, REAL)
    x2 = _coordinate(points, rows, valid, sn, 2 * sd, D > 2, REAL)
    x3 = _coordinate(points, rows, valid, sn, 3 * sd, D > 3, REAL)
    sum0 = tl.zeros([POINTS], REAL)
    sum1 = sum0
    sum2 = sum0
    sum3 = sum0
    for number in range(count_l):
        slot = b.to(tl.int64) * count_l + number
        direction = directions + number * D
        theta0 = tl.load(direction)
        value = x0 * theta0
        if D > 1:
            theta1 = tl.load(direction + 1)
            value += x1 * theta1
        if D > 2:
            theta2 = tl.load(direction + 2)
            value += x2 * theta2
        if D > 3:
            theta3 = tl.load(direction + 3)
            value += x3 * theta3
        index, _ = _bins(value, tl.load(edges + slot * 2), tl.load(edges + slot * 2 + 1), bins)
        slope = tl.load(table + slot * bins + index, mask=valid, other=0.0)
        slope *= tl.load(grad + slot)
        sum0 += slope * theta0
        if D > 1:
            sum1 += slope * theta1
        if D > 2:
            sum2 += slope * theta2
        if D > 3:
            sum3 += slope * theta3
    if weights is not None:
        mass = tl.load(weights + b.to(tl.int64) * n + rows, mask=valid, other=0.0).to(REAL)
    else:
        mass = 1.0 / tl.full([], n, REAL)  # n = 1 is a constant, without .to
    at = out + b.to(tl.int64) * ob + rows.to(tl.int64) * on
    kind: tl.constexpr = out.dtype.element_ty
    tl.store(at, (sum0 * mass).to(kind), mask=valid)
    if D > 1:
        tl.store(at + od, (sum1 * mass).to(kind), mask=valid)
    if D > 2:
        tl.store(at + 2 * od, (sum2 * mass).to(kind), mask=valid)
    if D > 3:
        tl.store(at + 3 * od, (sum3 * mass).to(kind), mask=valid)


@triton.jit
def slope_kernel(
    grad, projections, directions, table, edges, n, count_l, blocks, sb, sl, bins,
    DIRECTIONS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Replaces projections [b, dirs, n] by the derivative of the loss to them, per unit of mass."""
    block = tl.program_id(0) % blocks
    b = tl.program_id(0) // blocks
    dirs = tl.program_id(1) * DIRECTIONS + tl.arange(0, DIRECTIONS)
    rows = block * POINTS + tl.arange(0, POINTS)
    known = dirs < count_l
    dirs = tl.where(known, dirs, 0)
    inside = known[:, None] & (rows < n)[None, :]
    value = _projections(projections, directions, b, dirs, rows, inside, sb, 1, sl, 1, True)
    slot = b.to(tl.int64) * count_l + dirs
    low, high = tl.load(edges + slot * 2), tl.load(edges + slot * 2 + 1)
    index, _ = _bins(value, low[:, None], high[:, None], bins)
    slope = tl.load(table + slot[:, None] * bins + index, mask=inside, other=0.0)
    slope *= tl.load(grad + slot)[:, None]
    at = projections + b.to(tl.int64) * sb + dirs[:, None].to(tl.int64) * sl + rows[None, :]
    tl.store(at, slope, mask=inside)


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
    batch, count_l = x.shape[0], directions.shape[0]
    directions = directions.contiguous()
    values = directions.new_empty(batch, count_l)
    tables = [directions.new_empty(batch, count_l, bins) for _ in range(2)]
    if batch == 0:
        return values, *tables, directions.new_empty(0, count_l, 2)
    with _on(x):
        if value_range is None:
            edges = _edges_of_data(x, y, directions)
        else:
            edges = _edges_of_box(directions, value_range, batch)
        poison = torch.zeros(batch, count_l, dtype=torch.int32, device=x.device)
        histograms = [
            _histogram(points, directions, weights, edges, poison, bins)
            for points, weights in ((x, weights_x), (y, weights_y))
        ]
        solve = _solve_1 if p == 1 else _solve_2
        solve(histograms, edges, poison, values, tables, bins)
    return values, *tables, edges


def histogram(
    points: Tensor,
    directions: Tensor,
    weights: Tensor | None,
    bins: int,
    value_range: list[float],
) -> Tensor:
    """Masses [B, L, bins], int64; -1 throughout where a projection is not finite."""
    batch, count_l = points.shape[0], directions.shape[0]
    directions = directions.contiguous()
    if batch == 0:
        return directions.new_empty(0, count_l, bins, dtype=torch.int64)
    with _on(points):
        edges = _edges_of_box(directions, value_range, batch)
        poison = torch.zeros(batch, count_l, dtype=torch.int32, device=points.device)
        masses = _histogram(points, directions, weights, edges, poison, bins)
    return torch.where(poison[..., None] != 0, -1, masses.long())


def binned_to(
    x: Tensor,
    histogram_y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    p: int,
    value_range: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Values [B, L], table of x [B, L, bins] and edges, against a histogram [B or 1, L, bins]."""
    batch, (count_l, bins) = x.shape[0], histogram_y.shape[1:]
    directions = directions.contiguous()
    values = directions.new_empty(batch, count_l)
    tables = [directions.new_empty(batch, count_l, bins) for _ in range(2)]
    if batch == 0:
        return values, tables[0], directions.new_empty(0, count_l, 2)
    with _on(x):
        edges = _edges_of_box(directions, value_range, batch)
        masses_y = histogram_y.expand(batch, -1, -1).contiguous()
        poison = (masses_y[..., 0] < 0).to(torch.int32).contiguous()
        masses_x = _histogram(x, directions, weights_x, edges, poison, bins)
        solve = _solve_1 if p == 1 else _solve_2
        solve([masses_x, masses_y], edges, poison, values, tables, bins)
    return values, tables[0], edges


def binned_backward(
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
    count_l, bins = table.shape[1:]
    with _on(points):
        if d <= MOST_COORDINATES:
            _, long = _tile(BACKWARD_TILE, directions)
            blocks = triton.cdiv(n, long)
            backward_kernel[(blocks * batch,)](
                grad, points, directions, None if weights is None else weights.contiguous(),
                table, edges, out, n, count_l, blocks, *points.stride(), *out.stride(), bins,
                D=d, POINTS=long, num_warps=8,
            )  # fmt: skip
            return out
        for first, slopes in _projected(points, directions):
            count = slopes.shape[-1]
            wide, long = _tile(SLOPE_TILE, directions)
            blocks = triton.cdiv(count, long)
            slope_kernel[(blocks * batch, triton.cdiv(count_l, wide))](
                grad, slopes, directions, table, edges, count, count_l, blocks,
                slopes.stride(0), slopes.stride(1), bins,
                DIRECTIONS=wide, POINTS=long, num_warps=WARPS,
            )  # fmt: skip
            pulled = slopes.mT @ directions
            if weights is None:
                pulled /= n
            else:
                pulled *= weights[:, first : first + count, None]
            out[:, first : first + count] = pulled
    return out


def _tile(tile: tuple[int, int], directions: Tensor) -> tuple[int, int]:
    """Directions and points of a program. Float64 numbers and divisions take more registers."""
    return (tile[0], tile[1] // 4) if directions.dtype == torch.float64 else tile


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the tensor's device (on a CPU, to the interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _projected(points: Tensor, directions: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Projections [B, L, some] of consecutive points, and the number of the first of them."""
    batch, n, _ = points.shape
    some = max(1, PROJECTIONS_AT_ONCE // (batch * directions.shape[0]))
    for first in range(0, n, some):
        part = points[:, first : first + some].to(directions.dtype)
        with torch.autocast(points.device.type, enabled=False):
            yield first, (directions @ part.mT).contiguous()


def _passes(points: Tensor, directions: Tensor) -> Iterator[tuple[int, int, Tensor, bool]]:
    """First point, count, what a kernel reads, and whether that is projections."""
    if points.shape[-1] <= MOST_COORDINATES:
        yield 0, points.shape[1], points, False
        return
    for first, projections in _projected(points, directions):
        yield first, projections.shape[-1], projections.mT, True


def _edges_of_data(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    count_l, d = directions.shape
    least, most = [], []
    for points in (x, y):
        batch = points.shape[0]
        for _, n, source, projected in _passes(points, directions):
            wide, long = _tile(RANGE_TILE, directions)
            blocks = triton.cdiv(n, long)
            ends = directions.new_empty(2, batch, blocks, count_l)
            range_kernel[(blocks * batch, triton.cdiv(count_l, wide))](
                source, directions, ends[0], ends[1], n, count_l, blocks, *source.stride(),
                D=d, PROJECTED=projected, DIRECTIONS=wide, POINTS=long, num_warps=WARPS,
            )  # fmt: skip
            least.append(ends[0].amin(1))
            most.append(ends[1].amax(1))
    return torch.stack([torch.stack(least).amin(0), torch.stack(most).amax(0)], -1)


def _edges_of_box(directions: Tensor, value_range: list[float], batch: int) -> Tensor:
    low, high = value_range
    ends = torch.stack([directions * low, directions * high])
    edges = torch.stack([ends.amin(0).sum(-1), ends.amax(0).sum(-1)], -1)
    return edges.expand(batch, -1, -1).contiguous()


def _histogram(
    points: Tensor,
    directions: Tensor,
    weights: Tensor | None,
    edges: Tensor,
    poison: Tensor,
    bins: int,
) -> Tensor:
    batch, count_n, d = points.shape
    count_l = directions.shape[0]
    weights = None if weights is None else weights.contiguous()
    kind = torch.int32 if weights is None else torch.int64
    histogram = torch.zeros(batch, count_l, bins, device=points.device, dtype=kind)
    for first, n, source, projected in _passes(points, directions):
        wide, long = _tile(HISTOGRAM_TILE, directions)
        blocks = triton.cdiv(n, long)
        histogram_kernel[(blocks * batch, triton.cdiv(count_l, wide))](
            source, directions, weights, edges, histogram, poison, n, first, count_n, count_l,
            blocks, *source.stride(), bins,
            D=d, PROJECTED=projected, DIRECTIONS=wide, POINTS=long, num_warps=WARPS,
        )  # fmt: skip
    return histogram


def _solve_1(
    histograms: list[Tensor],
    edges: Tensor,
    poison: Tensor,
    values: Tensor,
    tables: list[Tensor],
    bins: int,
) -> None:
    solve_1_kernel[(values.numel(),)](
        *histograms, edges, poison, values, *tables, bins, BLOCK=BINS, num_warps=8
    )


def _solve_2(
    histograms: list[Tensor],
    edges: Tensor,
    poison: Tensor,
    values: Tensor,
    tables: list[Tensor],
    bins: int,
) -> None:
    sides = []
    for histogram in histograms:
        moments = torch.empty(3, *histogram.shape, dtype=torch.float64, device=histogram.device)
        moments_kernel[(values.numel(),)](
            histogram, *moments, bins, BLOCK=BINS, num_warps=8
        )  # fmt: skip
        sides.append(moments)
    steps = bins.bit_length()
    for this, other, table, has_values in (
        (sides[0], sides[1], tables[0], True),
        (sides[1], sides[0], tables[1], False),
    ):
        solve_2_kernel[(values.numel(),)](
            this[0], *other, edges, poison, values, table, bins, steps,
            HAS_VALUES=has_values, BLOCK=BINS, num_warps=8,
        )  # fmt: skip
