"""Sliced Wasserstein distance by binning, forward and backward.

Forward: the range of the projections (unless the caller knows one), a histogram of each side,
and one program per direction that solves the transport problem between the two histograms and
writes the tables of slopes. Backward: each point finds its bin again and adds up table entries.
The formulas are in sdcore/ops/sliced_wasserstein.py.

Points are read in any strides and dtype; arithmetic is that of ``directions``.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

# Up to this many coordinates of a point stay in registers for all directions; beyond, they are
# read again for each.
MOST_IN_REGISTERS = 4
# A histogram in shared memory takes 4 bytes a bin; beyond, points are counted in global memory.
MOST_SHARED_BINS = 8192
# Weights are added as integers of 2^-62, so that the sum does not depend on the order.
WEIGHT_UNIT = tl.constexpr(4611686018427387904.0)
# Programs that one launch aims at: a few waves of a large GPU.
PROGRAMS = 2048


@triton.jit
def _coordinate(points, batch, rows, valid, k, stride_b, stride_n, stride_d, REAL: tl.constexpr):
    """Coordinate k of the points ``rows``; zero where not valid."""
    at = batch.to(tl.int64) * stride_b + rows.to(tl.int64) * stride_n + k * stride_d
    return tl.load(points + at, mask=valid, other=0.0).to(REAL)


@triton.jit
def _coordinates(points, batch, rows, valid, sb, sn, sd, D: tl.constexpr, REAL: tl.constexpr):
    """The first four coordinates, as far as there are so many."""
    x0 = _coordinate(points, batch, rows, valid, 0, sb, sn, sd, REAL)
    x1 = x0
    x2 = x0
    x3 = x0
    if D > 1:
        x1 = _coordinate(points, batch, rows, valid, 1, sb, sn, sd, REAL)
    if D > 2:
        x2 = _coordinate(points, batch, rows, valid, 2, sb, sn, sd, REAL)
    if D > 3:
        x3 = _coordinate(points, batch, rows, valid, 3, sb, sn, sd, REAL)
    return x0, x1, x2, x3


@triton.jit
def _project(
    x0, x1, x2, x3, points, batch, rows, valid, direction, sb, sn, sd,
    D: tl.constexpr, IN_REGISTERS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """The points' projections to the direction that starts at ``direction``."""
    value = x0 * tl.load(direction)
    if IN_REGISTERS:
        if D > 1:
            value += x1 * tl.load(direction + 1)
        if D > 2:
            value += x2 * tl.load(direction + 2)
        if D > 3:
            value += x3 * tl.load(direction + 3)
    else:
        for k in range(1, D):
            x = _coordinate(points, batch, rows, valid, k, sb, sn, sd, REAL)
            value += x * tl.load(direction + k)
    return value


@triton.jit
def _bin(projection, low, high, bins):
    """Bin of each projection, and the position it was made from; NaN goes to bin 0."""
    scale = tl.where(high > low, bins / (high - low), 0.0)
    position = (projection - low) * scale
    inside = tl.minimum(tl.where(position > 0, position, 0.0), bins - 1)
    return inside.to(tl.int32), position


@triton.jit
def range_kernel(
    points, directions, edges, n, count_l, chunk, sb, sn, sd,
    D: tl.constexpr, IN_REGISTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """edges[b, chunk, l] = least and greatest projection of a chunk of points."""
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    l = tl.program_id(1)  # noqa: E741
    b = tl.program_id(2)
    REAL: tl.constexpr = directions.dtype.element_ty
    least = tl.full([BLOCK], float("inf"), REAL)
    most = tl.full([BLOCK], float("-inf"), REAL)
    begin = part * chunk
    for first in range(begin, min(begin + chunk, n), BLOCK):
        rows = first + tl.arange(0, BLOCK)
        valid = rows < n
        x0, x1, x2, x3 = _coordinates(points, b, rows, valid, sb, sn, sd, D, REAL)
        value = _project(
            x0, x1, x2, x3, points, b, rows, valid, directions + l * D, sb, sn, sd,
            D, IN_REGISTERS, REAL,
        )  # fmt: skip
        least = tl.where(valid & (value < least), value, least)
        most = tl.where(valid & (value > most), value, most)
    at = ((b * parts + part).to(tl.int64) * count_l + l) * 2
    tl.store(edges + at, tl.min(least))
    tl.store(edges + at + 1, tl.max(most))


@triton.jit
def histogram_kernel(
    points, directions, weights, edges, histogram, poison, n, count_l, chunk, sb, sn, sd, bins,
    D: tl.constexpr, IN_REGISTERS: tl.constexpr, SHARED_BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds a chunk of points to histogram[b, l]; marks poison[b, l] if one is not finite.

    SHARED_BINS: the power of two in which the bins fit a histogram in shared memory, or 0 to
    count in global memory. With weights, the histogram is 64-bit and in global memory.
    """
    part = tl.program_id(0)
    l = tl.program_id(1)  # noqa: E741
    b = tl.program_id(2)
    REAL: tl.constexpr = directions.dtype.element_ty
    slot = b.to(tl.int64) * count_l + l
    low = tl.load(edges + slot * 2)
    high = tl.load(edges + slot * 2 + 1)
    target = histogram + slot * bins
    bad = tl.zeros([BLOCK], tl.int32)
    counts = tl.zeros([SHARED_BINS if SHARED_BINS else 1], tl.int32)
    begin = part * chunk
    for first in range(begin, min(begin + chunk, n), BLOCK):
        rows = first + tl.arange(0, BLOCK)
        valid = rows < n
        x0, x1, x2, x3 = _coordinates(points, b, rows, valid, sb, sn, sd, D, REAL)
        value = _project(
            x0, x1, x2, x3, points, b, rows, valid, directions + l * D, sb, sn, sd,
            D, IN_REGISTERS, REAL,
        )  # fmt: skip
        index, position = _bin(value, low, high, bins)
        bad |= (valid & ~(tl.abs(position) < float("inf"))).to(tl.int32)
        if weights is not None:
            mass = tl.load(weights + b.to(tl.int64) * n + rows, mask=valid, other=0.0)
            bad |= (mass != mass).to(tl.int32)
            tl.atomic_add(target + index, (mass * WEIGHT_UNIT).to(tl.int64), mask=valid)
        elif SHARED_BINS:
            counts += tl.histogram(index, SHARED_BINS, mask=valid)
        else:
            tl.atomic_add(target + index, 1, mask=valid)
    if SHARED_BINS:
        columns = tl.arange(0, SHARED_BINS)
        tl.atomic_add(target + columns, counts, mask=(columns < bins) & (counts > 0))
    tl.atomic_max(poison + slot, tl.max(bad))


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
def backward_kernel(
    grad, points, directions, weights, table, edges, out, n, count_l, sb, sn, sd, ob, on, od, bins,
    first_k,
    D: tl.constexpr, IN_REGISTERS: tl.constexpr, OUT_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Coordinates first_k to first_k + OUT_D (at most 4) of the gradient of a block of points."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1)
    valid = rows < n
    REAL: tl.constexpr = directions.dtype.element_ty
    x0, x1, x2, x3 = _coordinates(points, b, rows, valid, sb, sn, sd, D, REAL)
    sum0 = tl.zeros([BLOCK], REAL)
    sum1 = tl.zeros([BLOCK], REAL)
    sum2 = tl.zeros([BLOCK], REAL)
    sum3 = tl.zeros([BLOCK], REAL)
    for l in range(count_l):  # noqa: E741
        slot = b.to(tl.int64) * count_l + l
        direction = directions + l * D
        value = _project(
            x0, x1, x2, x3, points, b, rows, valid, direction, sb, sn, sd, D, IN_REGISTERS, REAL
        )
        low = tl.load(edges + slot * 2)
        high = tl.load(edges + slot * 2 + 1)
        index, _ = _bin(value, low, high, bins)
        slope = tl.load(table + slot * bins + index) * tl.load(grad + slot)
        pull = direction + first_k
        sum0 += slope * tl.load(pull)
        if OUT_D > 1:
            sum1 += slope * tl.load(pull + 1)
        if OUT_D > 2:
            sum2 += slope * tl.load(pull + 2)
        if OUT_D > 3:
            sum3 += slope * tl.load(pull + 3)
    if weights is not None:
        mass = tl.load(weights + b.to(tl.int64) * n + rows, mask=valid, other=0.0).to(REAL)
    else:
        mass = 1.0 / n.to(REAL)
    at = out + b.to(tl.int64) * ob + rows.to(tl.int64) * on + first_k * od
    kind: tl.constexpr = out.dtype.element_ty
    tl.store(at, (sum0 * mass).to(kind), mask=valid)
    if OUT_D > 1:
        tl.store(at + od, (sum1 * mass).to(kind), mask=valid)
    if OUT_D > 2:
        tl.store(at + 2 * od, (sum2 * mass).to(kind), mask=valid)
    if OUT_D > 3:
        tl.store(at + 3 * od, (sum3 * mass).to(kind), mask=valid)


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
    with _on(points):
        # Beyond four coordinates, a launch per four of them: each finds the bins again.
        for first in range(0, d, MOST_IN_REGISTERS):
            block = 1024
            backward_kernel[(triton.cdiv(n, block), batch)](
                grad.contiguous(), points, directions.contiguous(),
                None if weights is None else weights.contiguous(),
                table.contiguous(), edges.contiguous(), out,
                n, directions.shape[0], *points.stride(), *out.stride(), table.shape[-1], first,
                D=d, IN_REGISTERS=d <= MOST_IN_REGISTERS,
                OUT_D=min(d - first, MOST_IN_REGISTERS), BLOCK=block, num_warps=8,
            )  # fmt: skip
    return out


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the tensor's device (on a CPU, to the interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _chunks(n: int, others: int, block: int) -> tuple[int, int]:
    """How many chunks the points are cut into, and the points in each, a multiple of ``block``."""
    wanted = max(1, PROGRAMS // others)
    chunk = triton.cdiv(triton.cdiv(n, wanted), block) * block
    return triton.cdiv(n, chunk), chunk


def _edges_of_data(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    count_l, d = directions.shape
    found = []
    block = 1024
    for points in (x, y):
        batch, n, _ = points.shape
        parts, chunk = _chunks(n, count_l * batch, block)
        edges = directions.new_empty(batch, parts, count_l, 2)
        range_kernel[(parts, count_l, batch)](
            points, directions, edges, n, count_l, chunk, *points.stride(),
            D=d, IN_REGISTERS=d <= MOST_IN_REGISTERS, BLOCK=block, num_warps=4,
        )  # fmt: skip
        found.append(edges)
    both = torch.cat(found, 1)
    return torch.stack([both[..., 0].amin(1), both[..., 1].amax(1)], -1)


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
    batch, n, d = points.shape
    count_l = directions.shape[0]
    shared = weights is None and bins <= MOST_SHARED_BINS
    histogram = torch.zeros(
        batch, count_l, bins, device=points.device,
        dtype=torch.int32 if weights is None else torch.int64,
    )  # fmt: skip
    block = 2048
    parts, chunk = _chunks(n, count_l * batch, block)
    histogram_kernel[(parts, count_l, batch)](
        points, directions, None if weights is None else weights.contiguous(), edges, histogram,
        poison, n, count_l, chunk, *points.stride(), bins,
        D=d, IN_REGISTERS=d <= MOST_IN_REGISTERS,
        SHARED_BINS=triton.next_power_of_2(bins) if shared else 0, BLOCK=block, num_warps=8,
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
        *histograms, edges, poison, values, *tables, bins,
        BLOCK=min(4096, triton.next_power_of_2(bins)), num_warps=8,
    )  # fmt: skip


def _solve_2(
    histograms: list[Tensor],
    edges: Tensor,
    poison: Tensor,
    values: Tensor,
    tables: list[Tensor],
    bins: int,
) -> None:
    block = min(1024, triton.next_power_of_2(bins))
    sides = []
    for histogram in histograms:
        moments = torch.empty(3, *histogram.shape, dtype=torch.float64, device=histogram.device)
        moments_kernel[(values.numel(),)](histogram, *moments, bins, BLOCK=block, num_warps=8)
        sides.append(moments)
    steps = bins.bit_length()
    for this, other, table, has_values in (
        (sides[0], sides[1], tables[0], True),
        (sides[1], sides[0], tables[1], False),
    ):
        solve_2_kernel[(values.numel(),)](
            this[0], *other, edges, poison, values, table, bins, steps,
            HAS_VALUES=has_values, BLOCK=block, num_warps=8,
        )  # fmt: skip
