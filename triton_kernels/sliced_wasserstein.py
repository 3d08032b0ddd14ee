"""Sliced Wasserstein distance by binning, forward and backward.

Forward: the range of the projections (unless the caller knows one), a histogram of each side,
and one program per direction that solves the transport problem between the two histograms and
writes the tables of slopes. Backward: each point finds its bin again and adds up table entries.
The formulas are in sdcore/ops/sliced_wasserstein.py.

Points are read in any strides and dtype; arithmetic is that of ``directions``. With ``rescale``,
(times, plus, least, most), points of up to four coordinates are taken as times · x + plus, kept
from least to most, as they are read: x itself is not copied.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdcore.triton_kernels import chips

# Points of up to this many coordinates are projected in the kernels, in registers. Beyond, a
# matrix product projects them, a bounded number of points at a time.
MOST_COORDINATES = 4
PROJECTIONS_AT_ONCE = 1 << 24
# Weights are added as integers of 2^-62, so that the sum does not depend on the order.
WEIGHT_UNIT = tl.constexpr(4611686018427387904.0)
# EDGE_ROUNDINGS of sdcore/ops/sliced_wasserstein.py.
EDGE_ROUNDINGS = tl.constexpr(8.0)
# A program's directions and points. Counting in memory is bound by the atomics of the second-level
# cache, 85 G a second when they spread over many addresses, which more directions help: 411 µs a
# side for 32 directions of 1,048,576 points on an H200, where (8, 512) takes 625.
HISTOGRAM_TILE = (32, 128)
HISTOGRAM_WARPS = 8  # the times are those of 4, which spill on some chips
# The points are kept in registers over all directions, of which each exchange among threads takes a
# few: 36.7 µs for both sides on an H200, where (4, 2048) takes 47.4.
RANGE_TILE = (8, 2048)
RANGE_WARPS = 4
BACKWARD_POINTS = 1024  # with 8 warps 71 µs; tiles of several directions took 110 and more
SLOPE_TILE = (8, 512)
WARPS = 4
# 48 KiB are what a program may declare in PTX.
SHARED_WORDS = 12288
# A program that counts in shared memory: its points at a time, half as many if weighted, and its
# threads; how many of them a multiprocessor gets, for which a thread may have 64 registers
# (weighted ones spill then, and come one by one); and its most directions, whose lines are kept in
# registers: four spill. 28.7 µs a side on an H200; half as many warps and twice the programs, 34.5.
SHARED_HISTOGRAM_POINTS = 2048
SHARED_HISTOGRAM_WARPS = 16
SHARED_HISTOGRAM_PROGRAMS = 2
SHARED_HISTOGRAM_REGISTERS = 64
SHARED_HISTOGRAM_REGISTERS_WEIGHTED = 80
SHARED_HISTOGRAM_DIRECTIONS = 3
# A program that fetches slopes from shared memory, where so many tables lie at most: one in use,
# the others on their way: 47.8 µs on an H200. With 16 points a thread 40.7, and registers spill.
SHARED_BACKWARD_POINTS = 4096
SHARED_BACKWARD_WARPS = 16
SHARED_BACKWARD_TABLES = 3
# Bins that one program holds at a time when it solves a direction's problem. More of them, or more
# warps, spill on some chips.
BINS = 1024
SOLVE_WARPS = 8


@triton.jit
def _taken(x, times, plus, least, most, RESCALED: tl.constexpr):
    """A coordinate as it counts: times · x + plus, kept from least to most; NaN stays."""
    if RESCALED:
        place = _rescaled(x, times, plus)
        lowest, highest = tl.full([], least, x.dtype), tl.full([], most, x.dtype)
        return tl.where(place < lowest, lowest, tl.where(place > highest, highest, place))
    else:
        return x


@triton.jit
def _rescaled(x, times, plus):
    """Written as one fused operation, so that it rounds alike in all kernels."""
    return tl.fma(x, tl.full([], times, x.dtype), tl.full([], plus, x.dtype))


@triton.jit
def _passes_on(x, times, plus, least, most):
    """Whether a gradient to a coordinate as it counts is one to x: one where it was not moved to an
    end, else zero."""
    place = _rescaled(x, times, plus)
    lowest, highest = tl.full([], least, x.dtype), tl.full([], most, x.dtype)
    return ((place >= lowest) & (place <= highest)).to(tl.int32)


@triton.jit
def _projections(
    points, directions, b, dirs, rows, inside, sb, sn, sd, times, plus, least, most,
    D: tl.constexpr, PROJECTED: tl.constexpr, RESCALED: tl.constexpr,
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
            x = _taken(x, times, plus, least, most, RESCALED)
            value += x * tl.load(directions + dirs * D + k)[:, None]
    return value


@triton.jit
def _scale(edges, slot, bins):
    """A projection's place in bins is ``scale * projection + offset``."""
    low, high = tl.load(edges + slot * 2), tl.load(edges + slot * 2 + 1)
    scale = tl.where(high > low, bins / (high - low), 0.0)
    # Bins begin a few roundings lower: what lies on an edge counts in the bin above.
    above: tl.constexpr = EDGE_ROUNDINGS * (2.0**-52 if low.dtype == tl.float64 else 2.0**-23)
    return scale, -((low - (high - low) * above) * scale)


@triton.jit
def _bins(projection, scale, offset, bins):
    """Bin of each projection; NaN goes to bin 0.

    Written as one fused operation, so that it rounds alike in all kernels.
    """
    place = tl.fma(projection, scale, offset)
    place = tl.where(place > 0, place, 0.0)
    return tl.minimum(place, bins - 1).to(tl.int32)


@triton.jit
def _coordinate(at, valid, wanted: tl.constexpr, REAL: tl.constexpr):
    if wanted:
        return tl.load(at, mask=valid, other=0.0).to(REAL)
    else:
        return tl.zeros(at.shape, REAL)


@triton.jit
def _coordinates(at, valid, sd, D: tl.constexpr, REAL: tl.constexpr):
    """Four coordinates of each point, of which D are read and the others zero."""
    x0 = _coordinate(at, valid, True, REAL)
    x1 = _coordinate(at + sd, valid, D > 1, REAL)
    x2 = _coordinate(at + 2 * sd, valid, D > 2, REAL)
    x3 = _coordinate(at + 3 * sd, valid, D > 3, REAL)
    return x0, x1, x2, x3


@triton.jit
def _direction(direction, D: tl.constexpr):
    """Four coordinates of each direction, of which D are read and the others zero."""
    theta0 = tl.load(direction)
    theta1 = theta0 * 0
    theta2 = theta1
    theta3 = theta1
    if D > 1:
        theta1 = tl.load(direction + 1)
    if D > 2:
        theta2 = tl.load(direction + 2)
    if D > 3:
        theta3 = tl.load(direction + 3)
    return theta0, theta1, theta2, theta3


@triton.jit
def _dot(x0, x1, x2, x3, theta0, theta1, theta2, theta3, D: tl.constexpr):
    value = x0 * theta0
    if D > 1:
        value = tl.fma(x1, theta1, value)
    if D > 2:
        value = tl.fma(x2, theta2, value)
    if D > 3:
        value = tl.fma(x3, theta3, value)
    return value


@triton.jit
def edges_kernel(
    directions, edges, low: tl.float64, high: tl.float64, slots, count_l,
    D: tl.constexpr, KNOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """edges[slot]: the ends of the box's projection, or without KNOWN those of an empty set."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = slot < slots
    REAL: tl.constexpr = directions.dtype.element_ty
    if KNOWN:
        least = tl.zeros([BLOCK], REAL)
        most = least
        for k in range(D):
            theta = tl.load(directions + slot % count_l * D + k, mask=valid, other=0.0)
            a, b = theta * tl.full([], low, REAL), theta * tl.full([], high, REAL)
            least += tl.minimum(a, b)
            most += tl.maximum(a, b)
    else:
        least = tl.full([BLOCK], float("inf"), REAL)
        most = -least
    at = edges + slot.to(tl.int64) * 2
    tl.store(at, least, mask=valid)
    tl.store(at + 1, most, mask=valid)


@triton.jit(do_not_specialize=["count_l", "blocks"])
def range_kernel(
    points, directions, edges, n, count_l, blocks, sb, sn, sd,
    D: tl.constexpr, PROJECTED: tl.constexpr, DIRECTIONS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Widens edges[b, direction] to the projections of a block of points.

    Where there is no more point or direction, the last one comes again.
    """
    block = tl.program_id(0) % blocks
    b = tl.program_id(0) // blocks
    rows = tl.minimum(block * POINTS + tl.arange(0, POINTS), n - 1)
    REAL: tl.constexpr = directions.dtype.element_ty
    points += b.to(tl.int64) * sb + rows.to(tl.int64) * sn
    if not PROJECTED:
        x0, x1, x2, x3 = _coordinates(points, rows < n, sd, D, REAL)
    for first in range(0, count_l, DIRECTIONS):
        dirs = tl.minimum(first + tl.arange(0, DIRECTIONS), count_l - 1)
        if PROJECTED:
            value = tl.load(points[None, :] + dirs.to(tl.int64)[:, None] * sd).to(REAL)
        else:
            theta0, theta1, theta2, theta3 = _direction(directions + dirs * D, D)
            value = _dot(
                x0[None, :], x1[None, :], x2[None, :], x3[None, :],
                theta0[:, None], theta1[:, None], theta2[:, None], theta3[:, None], D,
            )  # fmt: skip
        at = edges + (b.to(tl.int64) * count_l + dirs) * 2
        # Adding zero makes -0 a zero, which atomics on numbers' bits would take for less.
        tl.atomic_min(at, tl.min(value, 1) + 0.0, sem="relaxed")
        tl.atomic_max(at + 1, tl.max(value, 1) + 0.0, sem="relaxed")


@triton.jit
def histogram_kernel(
    points, directions, weights, edges, histogram, poison, n, first, count_n, count_l, blocks,
    sb, sn, sd, bins, times: tl.float64, plus: tl.float64, least: tl.float64, most: tl.float64,
    D: tl.constexpr, PROJECTED: tl.constexpr, RESCALED: tl.constexpr, DIRECTIONS: tl.constexpr,
    POINTS: tl.constexpr,
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
    value = _projections(
        points, directions, b, dirs, rows, inside, sb, sn, sd, times, plus, least, most,
        D, PROJECTED, RESCALED,
    )  # fmt: skip
    slot = b.to(tl.int64) * count_l + dirs
    scale, offset = _scale(edges, slot, bins)
    index = _bins(value, scale[:, None], offset[:, None], bins)
    bad = ~(tl.abs(value) < float("inf"))  # also for NaN
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
def _shared_array(WORDS: tl.constexpr):
    """Address of so many words of shared memory, which Triton itself has no name for."""
    return tl.inline_asm_elementwise(
        f"{{ .shared .align 16 .b32 sdcore_words[{WORDS}]; mov.u32 $0, sdcore_words; }}",
        "=r", [], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _shared_store(address, value):
    tl.inline_asm_elementwise(
        "st.shared.b32 [$1], $2; mov.b32 $0, 0;",
        "=r,r,r", [address, value], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _shared_load(address):
    return tl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], tl.uint32, is_pure=False, pack=1
    )


@triton.jit
def _shared_increment(address):
    tl.inline_asm_elementwise(
        "red.shared.add.u32 [$1], 1; mov.b32 $0, 0;",
        "=r,r", [address], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _shared_add_wide(address, mass, HIGH: tl.constexpr):
    """Adds 64 bits as two halves, HIGH bytes apart: shared memory has no such atomic."""
    tl.inline_asm_elementwise(
        f"""{{ .reg .b32 low, high, before;
        mov.b64 {{low, high}}, $2;
        atom.shared.add.u32 before, [$1], low;
        add.cc.u32 before, before, low;
        addc.u32 high, high, 0;
        red.shared.add.u32 [$1+{HIGH}], high;
        mov.b32 $0, 0; }}""",
        "=r,r,l", [address, mass], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _line(directions, edges, slot, number, counters, bins, D: tl.constexpr):
    """What a direction's points are counted with, in registers."""
    theta0, theta1, theta2, theta3 = _direction(directions + number * D, D)
    scale, offset = _scale(edges, slot, bins)
    return theta0, theta1, theta2, theta3, scale, offset, counters


# Without knowing that these strides are one, Triton gives each thread single elements, so that all
# blocks have one layout: it would change layouts in shared memory, of which none is left.
@triton.jit(do_not_specialize=["count_l", "chunks", "sn", "sw"])
def shared_histogram_kernel(
    points, directions, weights, edges, histogram, poison, n, count_l, chunks, each,
    sb, sn, sd, sw, bins, times: tl.float64, plus: tl.float64, least: tl.float64, most: tl.float64,
    D: tl.constexpr, RESCALED: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr,
    POINTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """What histogram_kernel does, in the shared memory of an NVIDIA chip, for 32-bit numbers.

    A program counts a chunk of ``each`` points for GROUP directions in WORDS words, twice as many
    if weighted, and then adds them to the histogram. Elementwise assembly runs once for each
    element, provided that blocks have an element or more for each thread. STEP: the threads, as
    many words as are zeroed or added in one step.
    """
    chunk = tl.program_id(0) % chunks
    b = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(1) * GROUP
    begin = chunk.to(tl.int64) * each
    count = tl.maximum(tl.minimum(n - begin, each), 0).to(tl.int32)
    rows = tl.arange(0, POINTS)
    points += b * sb + begin * sn + rows.to(tl.int64) * sn
    if weights is not None:
        weights += b * n + begin + rows.to(tl.int64) * sw
    REAL: tl.constexpr = directions.dtype.element_ty
    PLANES: tl.constexpr = 1 if weights is None else 2
    base = _shared_array(PLANES * WORDS)
    words = tl.arange(0, STEP)
    for i in range(0, PLANES * WORDS, STEP):
        _shared_store(base + (i + words) * 4, tl.zeros([STEP], tl.int32))

    lines = ()
    checks = ()
    for g in tl.static_range(GROUP):
        number = tl.minimum(first + g, count_l - 1)
        lines += _line(
            directions, edges, b * count_l + number, number, base + g * bins * 4, bins, D
        )
        checks += (tl.zeros([POINTS], REAL),)
    tl.debug_barrier()

    for start in range(0, count, POINTS):
        valid = rows < count - start
        x0, x1, x2, x3 = _coordinates(points, valid, sd, D, REAL)
        x0 = _taken(x0, times, plus, least, most, RESCALED)
        x1 = _taken(x1, times, plus, least, most, RESCALED)
        x2 = _taken(x2, times, plus, least, most, RESCALED)
        x3 = _taken(x3, times, plus, least, most, RESCALED)
        points += POINTS * sn.to(tl.int64)
        if weights is not None:
            weight = tl.load(weights, mask=valid, other=0.0)
            weights += POINTS * sw
            mass = (tl.where(weight > 0, weight, 0.0) * WEIGHT_UNIT).to(tl.int64)
        found = ()
        for g in tl.static_range(GROUP):
            theta0, theta1, theta2, theta3, scale, offset, counters = lines[7 * g : 7 * g + 7]
            value = _dot(x0, x1, x2, x3, theta0, theta1, theta2, theta3, D)
            address = counters + _bins(value, scale, offset, bins) * 4
            if weights is not None:
                _shared_add_wide(address, mass, WORDS * 4)
            else:
                _shared_increment(address)
            check = checks[g] + value * 0.0  # NaN from the first that is not finite
            if weights is not None:
                check = tl.where(weight == weight, check, float("nan"))
            found += (check,)
        checks = found
    tl.debug_barrier()

    here = tl.minimum(count_l - first, GROUP)
    target = histogram + (b * count_l + first) * bins
    for i in range(0, WORDS, STEP):
        valid = i + words < here * bins
        counted = _shared_load(base + (i + words) * 4)
        if weights is not None:
            high = _shared_load(base + (WORDS + i + words) * 4)
            counted = (high.to(tl.int64) << 32) | counted.to(tl.int64)
        else:
            counted = counted.to(tl.int32)
        tl.atomic_add(target + i + words, counted, mask=valid & (counted != 0), sem="relaxed")
    for g in tl.static_range(GROUP):
        check = checks[g]
        slot = b * count_l + tl.minimum(first + g, count_l - 1)
        marks = (poison + slot).broadcast_to(check.shape)
        tl.store(marks, tl.full(check.shape, 1, tl.int32), mask=check != check)
        if weights is None:
            # What was read past the end of the chunk were zeros, which don't count.
            theta0, theta1, theta2, theta3, scale, offset, counters = lines[7 * g : 7 * g + 7]
            zero = _taken(theta0 * 0.0, times, plus, least, most, RESCALED)
            value = _dot(zero, zero, zero, zero, theta0, theta1, theta2, theta3, D)
            bin_of_zero = _bins(value, scale, offset, bins)
            extra = tl.cdiv(count, POINTS) * POINTS - count
            tl.atomic_add(
                target + g * bins + bin_of_zero, -extra, mask=(g < here) & (extra > 0),
                sem="relaxed",
            )  # fmt: skip


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
    # A division in float64 takes some 30 instructions: none for each bin.
    unit_x = 1 / _total(histogram_x, bins, BLOCK)
    unit_y = 1 / _total(histogram_y, bins, BLOCK)
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
        f, f_before = end_x.to(tl.float64) * unit_x, (end_x - count_x).to(tl.float64) * unit_x
        g, g_before = end_y.to(tl.float64) * unit_y, (end_y - count_y).to(tl.float64) * unit_y
        gap += tl.where(valid, tl.abs(f - g), 0.0)
        slope_x = _slope_1(f_before, f, g_before, g, REAL)
        slope_y = _slope_1(g_before, g, f_before, f, REAL)
        slope_x = tl.where(bad, nan, tl.where(count_x > 0, slope_x, 0.0))
        slope_y = tl.where(bad, nan, tl.where(count_y > 0, slope_y, 0.0))
        tl.store(table_x + slot * bins + columns, slope_x.to(REAL), mask=valid)
        tl.store(table_y + slot * bins + columns, slope_y.to(REAL), mask=valid)
    width = _width(edges, slot, bins)
    tl.store(values + slot, tl.where(bad, nan, tl.sum(gap) * width).to(REAL))


@triton.jit
def _slope_1(f_before, f, g_before, g, REAL: tl.constexpr):
    from_below = tl.maximum(0.0, tl.minimum(g_before, f) - f_before)
    from_above = tl.maximum(0.0, f - tl.maximum(g, f_before))
    return (from_below - from_above).to(REAL) / (f - f_before).to(REAL)


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
def _start_copy(address, row, chunk, count):
    """Chunks below ``count`` of a row, 16 bytes each, to shared memory, while the program goes on.

    Pointers are made here, where the compiler can't keep one for each chunk: registers are scarce.
    """
    tl.inline_asm_elementwise(
        """{ .reg .pred wanted; .reg .b32 to; .reg .b64 from;
        setp.lt.s32 wanted, $3, $4;
        mad.lo.s32 to, $3, 16, $1;
        mad.wide.s32 from, $3, 16, $2;
        @wanted cp.async.cg.shared.global [to], [from], 16;
        mov.b32 $0, 0; }""",
        "=r,r,l,r,r", [address, row, chunk, count], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _close_copies():
    tl.inline_asm_elementwise(
        "cp.async.commit_group; mov.b32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _await_copies(OPEN: tl.constexpr):
    """All but the last OPEN groups of copies have arrived, those of this thread."""
    tl.inline_asm_elementwise(
        f"cp.async.wait_group {OPEN}; mov.b32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1
    )


# As in shared_histogram_kernel, one layout for all.
@triton.jit(do_not_specialize=["count_l", "blocks", "sn", "on", "sw"])
def backward_kernel(
    grad, points, directions, weights, table, edges, out, n, count_l, blocks,
    sb, sn, sd, ob, on, od, sw, bins,
    times: tl.float64, plus: tl.float64, least: tl.float64, most: tl.float64,
    D: tl.constexpr, RESCALED: tl.constexpr, TABLES: tl.constexpr, CHUNKS: tl.constexpr,
    POINTS: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of points of up to four coordinates, summed over all directions.

    One direction at a time: a tile of several would have to be summed across threads. TABLES: the
    tables are 32-bit, go through a ring of so many in an NVIDIA chip's shared memory, and are
    copied by CHUNKS copies of 16 bytes each; zero: entries are read from memory.
    """
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = block * POINTS + tl.arange(0, POINTS)
    valid = rows < n
    REAL: tl.constexpr = directions.dtype.element_ty
    points += b * sb + rows.to(tl.int64) * sn
    x0, x1, x2, x3 = _coordinates(points, valid, sd, D, REAL)
    if RESCALED:
        # A bit for each coordinate: one register, where they would take as many as there are.
        passing = _passes_on(x0, times, plus, least, most)
        if D > 1:
            passing |= _passes_on(x1, times, plus, least, most) << 1
        if D > 2:
            passing |= _passes_on(x2, times, plus, least, most) << 2
        if D > 3:
            passing |= _passes_on(x3, times, plus, least, most) << 3
        x0 = _taken(x0, times, plus, least, most, RESCALED)
        x1 = _taken(x1, times, plus, least, most, RESCALED)
        x2 = _taken(x2, times, plus, least, most, RESCALED)
        x3 = _taken(x3, times, plus, least, most, RESCALED)
    sum0 = tl.zeros([POINTS], REAL)
    sum1 = sum0
    sum2 = sum0
    sum3 = sum0
    table += b * count_l * bins
    if TABLES:
        base = _shared_array(TABLES * CHUNKS * 4)
        chunks = tl.arange(0, CHUNKS)
        for early in tl.static_range(TABLES - 1):
            wanted = tl.where(early < count_l, bins // 4, 0)
            _start_copy(base + early * CHUNKS * 16, table + early * bins, chunks, wanted)
            _close_copies()
        slot_here = 0
        slot_ahead = TABLES - 1
    for number in range(count_l):
        slot = b * count_l + number
        theta0, theta1, theta2, theta3 = _direction(directions + number * D, D)
        scale, offset = _scale(edges, slot, bins)
        pull = tl.load(grad + slot)
        value = _dot(x0, x1, x2, x3, theta0, theta1, theta2, theta3, D)
        index = _bins(value, scale, offset, bins)
        if TABLES:
            _await_copies(TABLES - 2)
            # This table is complete, and nobody reads the one before it any more.
            tl.debug_barrier()
            wanted = tl.where(number + TABLES - 1 < count_l, bins // 4, 0)
            row = table + (TABLES - 1) * bins
            _start_copy(base + slot_ahead * CHUNKS * 16, row, chunks, wanted)
            _close_copies()
            slope = _shared_load(base + slot_here * CHUNKS * 16 + index * 4)
            slope = slope.to(REAL, bitcast=True)
            slot_here = tl.where(slot_here == TABLES - 1, 0, slot_here + 1)
            slot_ahead = tl.where(slot_ahead == TABLES - 1, 0, slot_ahead + 1)
        else:
            slope = tl.load(table + index, mask=valid, other=0.0)
        table += bins
        sum0 += slope * (theta0 * pull)
        if D > 1:
            sum1 += slope * (theta1 * pull)
        if D > 2:
            sum2 += slope * (theta2 * pull)
        if D > 3:
            sum3 += slope * (theta3 * pull)
    if weights is not None:
        weights += b * n + rows.to(tl.int64) * sw
        mass = tl.load(weights, mask=valid, other=0.0).to(REAL)
    else:
        mass = 1.0 / tl.full([], n, REAL)  # n = 1 is a constant, without .to
    if RESCALED:
        mass *= tl.full([], times, REAL)
        sum0 = tl.where((passing & 1) != 0, sum0, 0.0)
        sum1 = tl.where((passing & 2) != 0, sum1, 0.0)
        sum2 = tl.where((passing & 4) != 0, sum2, 0.0)
        sum3 = tl.where((passing & 8) != 0, sum3, 0.0)
    at = out + b * ob + rows.to(tl.int64) * on
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
    value = _projections(
        projections, directions, b, dirs, rows, inside, sb, 1, sl, 0.0, 0.0, 0.0, 0.0,
        1, True, False,
    )  # fmt: skip
    slot = b.to(tl.int64) * count_l + dirs
    scale, offset = _scale(edges, slot, bins)
    index = _bins(value, scale[:, None], offset[:, None], bins)
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
    rescale: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [B, L], tables [B, L, bins] of x and y, edges [B, L, 2], as the op defines them."""
    batch, count_l = x.shape[0], directions.shape[0]
    directions = directions.contiguous()
    values = directions.new_empty(batch, count_l)
    tables = [directions.new_empty(batch, count_l, bins) for _ in range(2)]
    if batch == 0:
        return values, *tables, directions.new_empty(0, count_l, 2)
    with chips.on(x):
        edges = _edges(directions, value_range, batch)
        if value_range is None:
            for points in (x, y):
                _widen(edges, points, directions)
        poison = torch.zeros(batch, count_l, dtype=torch.int32, device=x.device)
        histograms = [
            _histogram(points, directions, weights, edges, poison, bins, taken)
            for points, weights, taken in ((x, weights_x, rescale), (y, weights_y, None))
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
    with chips.on(points):
        edges = _edges(directions, value_range, batch)
        poison = torch.zeros(batch, count_l, dtype=torch.int32, device=points.device)
        masses = _histogram(points, directions, weights, edges, poison, bins, None)
    return torch.where(poison[..., None] != 0, -1, masses.long())


def binned_to(
    x: Tensor,
    histogram_y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    p: int,
    value_range: list[float],
    rescale: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values [B, L], table of x [B, L, bins] and edges, against a histogram [B or 1, L, bins]."""
    batch, (count_l, bins) = x.shape[0], histogram_y.shape[1:]
    directions = directions.contiguous()
    values = directions.new_empty(batch, count_l)
    tables = [directions.new_empty(batch, count_l, bins) for _ in range(2)]
    if batch == 0:
        return values, tables[0], directions.new_empty(0, count_l, 2)
    with chips.on(x):
        edges = _edges(directions, value_range, batch)
        masses_y = histogram_y.expand(batch, -1, -1).contiguous()
        poison = (masses_y[..., 0] < 0).to(torch.int32).contiguous()
        masses_x = _histogram(x, directions, weights_x, edges, poison, bins, rescale)
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
    rescale: list[float] | None,
) -> Tensor:
    """The gradient to ``points``, in their dtype and, where dense, their strides."""
    out = torch.empty_like(points)
    batch, n, d = points.shape
    if batch == 0:
        return out
    grad, directions = grad.contiguous(), directions.contiguous()
    table, edges = table.contiguous(), edges.contiguous()
    count_l, bins = table.shape[1:]
    with chips.on(points):
        if d <= MOST_COORDINATES:
            tables = _tables_shared(table)
            if tables:
                long, warps = SHARED_BACKWARD_POINTS, SHARED_BACKWARD_WARPS
            else:
                (_, long), warps = _tile((1, BACKWARD_POINTS), directions), 8
            blocks = triton.cdiv(n, long)
            backward_kernel[(blocks * batch,)](
                grad, points, directions, None if weights is None else weights.contiguous(),
                table, edges, out, n, count_l, blocks, *points.stride(), *out.stride(), 1, bins,
                *_numbers(rescale), D=d, RESCALED=rescale is not None, TABLES=tables,
                POINTS=long, num_warps=warps, CHUNKS=_chunks(bins),
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


def _numbers(rescale: list[float] | None) -> list[float]:
    """What kernels take; nothing of it counts without RESCALED."""
    return [0.0] * 4 if rescale is None else rescale


def _tile(tile: tuple[int, int], directions: Tensor) -> tuple[int, int]:
    """Directions and points of a program. Float64 numbers and divisions take more registers."""
    return (tile[0], tile[1] // 4) if directions.dtype == torch.float64 else tile


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


def _edges(directions: Tensor, value_range: list[float] | None, batch: int) -> Tensor:
    """Ends of the bins [B, L, 2]; without a range for ``_widen`` to begin with."""
    count_l, d = directions.shape
    edges = directions.new_empty(batch, count_l, 2)
    low, high = value_range or (0.0, 0.0)
    edges_kernel[(triton.cdiv(batch * count_l, 128),)](
        directions, edges, float(low), float(high), batch * count_l, count_l,
        D=d, KNOWN=value_range is not None, BLOCK=128, num_warps=4,
    )  # fmt: skip
    return edges


def _widen(edges: Tensor, points: Tensor, directions: Tensor) -> None:
    batch, count_l = edges.shape[:2]
    for _, n, source, projected in _passes(points, directions):
        wide, long = _tile(RANGE_TILE, directions)
        blocks = triton.cdiv(n, long)
        range_kernel[(blocks * batch,)](
            source, directions, edges, n, count_l, blocks, *source.stride(),
            D=points.shape[-1], PROJECTED=projected, DIRECTIONS=wide, POINTS=long,
            num_warps=RANGE_WARPS,
        )  # fmt: skip


def _histogram(
    points: Tensor,
    directions: Tensor,
    weights: Tensor | None,
    edges: Tensor,
    poison: Tensor,
    bins: int,
    rescale: list[float] | None,
) -> Tensor:
    batch, count_n, d = points.shape
    count_l = directions.shape[0]
    weights = None if weights is None else weights.contiguous()
    kind = torch.int32 if weights is None else torch.int64
    histogram = torch.zeros(batch, count_l, bins, device=points.device, dtype=kind)
    group = _directions_shared(directions, weights, bins)
    if group:
        long, registers = SHARED_HISTOGRAM_POINTS, SHARED_HISTOGRAM_REGISTERS
        if rescale is not None:
            long //= 2  # spills on some chips otherwise
        if weights is not None:
            long, registers = SHARED_HISTOGRAM_POINTS // 2, SHARED_HISTOGRAM_REGISTERS_WEIGHTED
        groups = triton.cdiv(count_l, group)
        programs = SHARED_HISTOGRAM_PROGRAMS * chips.multiprocessors(points)
        chunks = max(1, min(programs // (groups * batch), triton.cdiv(count_n, long)))
        each = triton.cdiv(triton.cdiv(count_n, chunks), long) * long
        shared_histogram_kernel[(chunks * batch, groups)](
            points, directions, weights, edges, histogram, poison, count_n, count_l, chunks, each,
            *points.stride(), 1, bins, *_numbers(rescale),
            D=d, RESCALED=rescale is not None, GROUP=group,
            WORDS=triton.cdiv(group * bins, 1024) * 1024, POINTS=long,
            STEP=32 * SHARED_HISTOGRAM_WARPS, num_warps=SHARED_HISTOGRAM_WARPS,
            maxnreg=registers,
        )  # fmt: skip
        return histogram
    for first, n, source, projected in _passes(points, directions):
        wide, long = _tile(HISTOGRAM_TILE, directions)
        if weights is not None:
            long //= 2  # spills on sm_120 otherwise
        blocks = triton.cdiv(n, long)
        histogram_kernel[(blocks * batch, triton.cdiv(count_l, wide))](
            source, directions, weights, edges, histogram, poison, n, first, count_n, count_l,
            blocks, *source.stride(), bins, *_numbers(rescale),
            D=d, PROJECTED=projected, RESCALED=rescale is not None, DIRECTIONS=wide, POINTS=long,
            num_warps=HISTOGRAM_WARPS,
        )  # fmt: skip
    return histogram


def speaks_ptx(tensor: Tensor) -> bool:
    """Whether kernels for this tensor may hold PTX, with which they reach shared memory.

    Copies that a program does not wait for are from sm_80 on.
    """
    if not tensor.is_cuda or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def _directions_shared(directions: Tensor, weights: Tensor | None, bins: int) -> int:
    """Directions that a program counts in shared memory; 0 if it cannot."""
    count_l, d = directions.shape
    if not speaks_ptx(directions) or d > MOST_COORDINATES or directions.dtype != torch.float32:
        return 0
    words = SHARED_WORDS if weights is None else SHARED_WORDS // 2
    return min(words // bins, SHARED_HISTOGRAM_DIRECTIONS, count_l)


def _tables_shared(table: Tensor) -> int:
    """Tables that a program keeps in shared memory; 0 if it cannot: a ring has two or more."""
    bins = table.shape[-1]
    # Copies of 16 bytes need rows that begin at multiples of 16 bytes.
    if not speaks_ptx(table) or table.dtype != torch.float32 or bins % 4 or table.data_ptr() % 16:
        return 0
    tables = min(SHARED_WORDS // (4 * _chunks(bins)), SHARED_BACKWARD_TABLES)
    return tables if tables > 1 else 0


def _chunks(bins: int) -> int:
    """Copies of 16 bytes for a table: a power of two, and one or more a thread."""
    return max(triton.next_power_of_2(triton.cdiv(bins, 4)), 32 * SHARED_BACKWARD_WARPS)


def _solve_1(
    histograms: list[Tensor],
    edges: Tensor,
    poison: Tensor,
    values: Tensor,
    tables: list[Tensor],
    bins: int,
) -> None:
    _, block = _tile((1, BINS), values)
    solve_1_kernel[(values.numel(),)](
        *histograms, edges, poison, values, *tables, bins, BLOCK=block, num_warps=SOLVE_WARPS
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
            histogram, *moments, bins, BLOCK=BINS, num_warps=SOLVE_WARPS
        )  # fmt: skip
        sides.append(moments)
    steps = bins.bit_length()
    for this, other, table, has_values in (
        (sides[0], sides[1], tables[0], True),
        (sides[1], sides[0], tables[1], False),
    ):
        solve_2_kernel[(values.numel(),)](
            this[0], *other, edges, poison, values, table, bins, steps,
            HAS_VALUES=has_values, BLOCK=BINS, num_warps=SOLVE_WARPS,
        )  # fmt: skip
