"""Group normalization with SiLU in Triton; and its gradient.

Either way has a pass that reads all and leaves sums for each channel of each part of the pixels, a
small one that adds up a group's, and a pass that reads all again and writes. Tiles are pixels by
channels; what lies side by side in memory, pixels or (channels last) channels, is their long side.
The last pass goes through the tiles from the end: what was read last may still be in the cache.
Where a group is small, one program does all three for it, in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdcore.triton_kernels import chips

# Values of a tile, that is of one step of a program, and its warps: 32 a thread. With 8 warps,
# which have fewer loads in flight, passes that write took 1.2 to 1.35 times as long (H100).
TILE, WARPS = 4096, 4
# Programs on each multiprocessor, of the passes that leave sums, and of how many tiles one has been
# asked for at a time: 60 µs where one at a time took 100, and four programs of one 61.
PROGRAMS, AHEAD = 2, 3
# Of a group that one program has to itself: values (on an H100 4096 take 5 µs in place of the 8 of
# three launches, 16,384 take 9); channels; and values of a tile, 8 a thread. There are no more than
# two sizes of tiles, since each is compiled.
WHOLE, WIDEST, WHOLE_TILES, OF_A_WARP = 2**13, 1024, (2**10, 2**12), 2**8


@triton.jit
def _base(b, first, channel, P, C, LAST: tl.constexpr):
    """Where the tile from pixel ``first`` and ``channel`` begins."""
    at = b.to(tl.int64) * C * P
    if LAST:
        return at + tl.cast(first, tl.int64) * C + channel
    else:
        return at + channel.to(tl.int64) * P + first


@triton.jit
def _places(P, C, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of a tile's values, from where it begins."""
    p, c = tl.arange(0, PIXELS)[:, None], tl.arange(0, CHANNELS)[None, :]
    return p * C + c if LAST else c * P + p


@triton.jit
def _vector(pointer, at, inside, otherwise: tl.constexpr):
    """Numbers of channels; of one that may be absent."""
    if pointer is None:
        return tl.full(at.shape, otherwise, tl.float32)
    else:
        return tl.load(pointer + at, inside, otherwise).to(tl.float32)


@triton.jit
def _joined(count, mean, square):
    """Along the first axis: mean, and squares about it, of parts."""
    total = tl.sum(count, 0)
    whole = tl.sum(count * mean, 0) / tl.maximum(total, 1)
    off = mean - whole[None, :]
    return whole, tl.sum(square + count * off * off, 0)


@triton.jit
def _value(x, residual, added, at, inside):
    """What is normalized; with a residual the sum of all three, rounded once."""
    value = tl.load(x + at, inside, 0)
    if residual is not None:
        other = tl.load(residual + at, inside, 0).to(tl.float32)
        value = (value.to(tl.float32) + added + other).to(x.dtype.element_ty)
    return value


@triton.jit
def _origin(x, residual, shift, b, c, P, C, width, LAST: tl.constexpr):
    """The first value of each channel's group. All statistics are of what values are off it: of
    values close to each other the differences are exact, and a mean of them has all its digits."""
    first = c // width * width
    at = b.to(tl.int64) * C * P + (first if LAST else first.to(tl.int64) * P)
    added = _vector(shift, b * C + first, c < C, 0.0)
    return _value(x, residual, added, at, c < C).to(tl.float32)


@triton.jit
def _moments(
    x, residual, total, origin, added, b, channel, inside, start, end, P, C,
    LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Of each channel, of the pixels from ``start`` to ``end``: the mean, and the sum of squares
    about it, by Welford's updates in each place of the tile. With a residual, of ``total``, which
    it writes."""
    there = tl.broadcast_to(inside[None, :], (PIXELS, CHANNELS))
    places = _places(P, C, LAST, PIXELS, CHANNELS)
    full = (end - start) // PIXELS
    origin, added = origin[None, :], added[None, :]
    mean = tl.zeros((PIXELS, CHANNELS), tl.float32)
    square = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for tile in tl.range(0, full, num_stages=AHEAD):
        at = _base(b, start + tile * PIXELS, channel, P, C, LAST) + places
        value = _value(x, residual, added, at, there)
        if residual is not None:
            tl.store(total + at, value, there)
        value = value.to(tl.float32) - origin
        off = value - mean
        mean += off * (1 / (tile + 1.0))
        square += off * (value - mean)
    first = start + full * PIXELS
    valid = tl.broadcast_to(first + tl.arange(0, PIXELS)[:, None] < end, (PIXELS, CHANNELS))
    count = full + valid.to(tl.float32)
    if first < end:
        at = _base(b, first, channel, P, C, LAST) + places
        value = _value(x, residual, added, at, valid & there)
        if residual is not None:
            tl.store(total + at, value, valid & there)
        value = value.to(tl.float32) - origin
        off = value - mean
        mean = tl.where(valid, mean + off * (1 / (full + 1.0)), mean)
        square = tl.where(valid, square + off * (value - mean), square)
    return _joined(count, mean, square)


@triton.jit
def _statistics(
    x, residual, shift, total, means, squares, P, C, width, length,
    LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The moments of each channel of a part of the pixels."""
    part, b = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS
    c = channel + tl.arange(0, CHANNELS)
    start = part * length
    whole, about = _moments(
        x, residual, total, _origin(x, residual, shift, b, c, P, C, width, LAST),
        _vector(shift, b * C + c, c < C, 0.0), b, channel, c < C, start,
        tl.minimum(start + length, P), P, C, LAST, PIXELS, CHANNELS, AHEAD,
    )  # fmt: skip
    at = (b.to(tl.int64) * tl.num_programs(0) + part) * C + c
    tl.store(means + at, whole, c < C)
    tl.store(squares + at, about, c < C)


@triton.jit
def _center(origin, off):
    """What is taken off the values of a channel, in two parts. The first is near the values, and
    taking it off rounds only what is far from it; the second is what the first lacks, as one number
    of float32."""
    center = origin + off
    back = center - origin
    return center, (origin - (center - back)) + (off - back)


@triton.jit(do_not_specialize=["parts", "width"])
def _finish(
    x, means, squares, shift, mean, rstd, table, eps, parts, length, P, C, width,
    LAST: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of a group: mean and 1 / sqrt(variance + eps), of all parts and channels; and for each of its
    channels, in ``table`` [B, 3, C], what is taken off, in two parts, and that factor."""
    group, b = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, WIDTH)[None, :]
    channels = group * width + c
    added = _vector(shift, b * C + channels, c < width, 0.0)
    sum_of_means, total = 0.0, 0.0
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        inside = (part < parts) & (c < width)
        count = tl.where(inside, tl.minimum(length, P - part * length), 0).to(tl.float32)
        at = (b.to(tl.int64) * parts + part) * C + channels
        sum_of_means += tl.sum(count * (tl.load(means + at, inside, 0) + added))
        total += tl.sum(count)
    whole = sum_of_means / total
    about = 0.0
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        inside = (part < parts) & (c < width)
        count = tl.where(inside, tl.minimum(length, P - part * length), 0).to(tl.float32)
        at = (b.to(tl.int64) * parts + part) * C + channels
        off = tl.load(means + at, inside, 0) + added - whole
        about += tl.sum(tl.load(squares + at, inside, 0) + count * off * off)
    scale = 1 / tl.sqrt_rn(about / total + eps)
    tl.store(mean + b * tl.num_programs(0) + group, whole)
    tl.store(rstd + b * tl.num_programs(0) + group, scale)
    origin = _origin(x, None, None, b, channels, P, C, width, LAST)
    center, rest = _center(origin, whole - added)
    row = table + b.to(tl.int64) * 3 * C + channels
    tl.store(row, center, c < width)
    tl.store(row + C, rest, c < width)
    tl.store(row + 2 * C, tl.broadcast_to(scale, (1, WIDTH)), c < width)


@triton.jit
def _channels(x, weight, bias, shift, mean, rstd, b, c, P, C, groups, width, LAST: tl.constexpr):
    """Of a channel: what is taken off its values, in two parts, what they are multiplied by, and
    its weight and bias."""
    inside = c < C
    group = b * groups + c // width
    origin = _origin(x, None, None, b, c, P, C, width, LAST)
    off = tl.load(mean + group, inside, 0) - _vector(shift, b * C + c, inside, 0.0)
    center, rest = _center(origin, off)
    scale = tl.load(rstd + group, inside, 0)
    w, added = _vector(weight, c, inside, 1.0), _vector(bias, c, inside, 0.0)
    return center[None, :], rest[None, :], scale[None, :], w[None, :], added[None, :]


@triton.jit
def _activated(value, center, rest, scale, added, SILU: tl.constexpr):
    z = (value - center - rest) * scale + added
    return z * tl.sigmoid(z) if SILU else z


@triton.jit
def _apply(
    x, out, table, weight, bias, P, C,
    SILU: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * PIXELS
    b, channel = tl.program_id(2), tl.program_id(1) * CHANNELS
    c = channel + tl.arange(0, CHANNELS)
    inside = (first + tl.arange(0, PIXELS)[:, None] < P) & (c < C)[None, :]
    at = _base(b, first, channel, P, C, LAST) + _places(P, C, LAST, PIXELS, CHANNELS)
    value = tl.load(x + at, inside, 0).to(tl.float32)
    row = table + b.to(tl.int64) * 3 * C + c
    center, rest = tl.load(row, c < C, 0)[None, :], tl.load(row + C, c < C, 0)[None, :]
    scale = tl.load(row + 2 * C, c < C, 0) * _vector(weight, c, c < C, 1.0)
    bias = _vector(bias, c, c < C, 0.0)[None, :]
    tl.store(out + at, _activated(value, center, rest, scale[None, :], bias, SILU), inside)


@triton.jit(do_not_specialize=["C", "width"])
def _whole(
    x, residual, shift, total, out, weight, bias, mean, rstd, eps, P, C, width,
    SILU: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """All of a group: its moments, and what comes of them. What it reads a second time lies in the
    cache."""
    group, b = tl.program_id(0), tl.program_id(1)
    channel = group * width
    c = channel + tl.arange(0, CHANNELS)
    inside = tl.arange(0, CHANNELS) < width
    shifted = _vector(shift, b * C + c, inside, 0.0)
    origin = _origin(x, residual, shift, b, c, P, C, width, LAST)
    whole, about = _moments(
        x, residual, total, origin, shifted, b, channel, inside, 0, P, P, C, LAST, PIXELS, CHANNELS,
        AHEAD,
    )  # fmt: skip
    if residual is None:
        whole += shifted
    else:
        shifted = tl.zeros((CHANNELS,), tl.float32)  # in the sum already
        x = total
        tl.debug_barrier()  # other threads may read what these have written
    of_group = tl.sum(tl.where(inside, whole, 0), 0) / width
    off = whole - of_group
    variance = tl.sum(tl.where(inside, about + P * off * off, 0), 0) / (1.0 * P * width)
    scale = 1 / tl.sqrt_rn(variance + eps)
    tl.store(mean + b * tl.num_programs(0) + group, of_group)
    tl.store(rstd + b * tl.num_programs(0) + group, scale)
    center, rest = _center(origin, of_group - shifted)
    scale = scale * _vector(weight, c, inside, 1.0)
    center, rest, scale = center[None, :], rest[None, :], scale[None, :]
    bias = _vector(bias, c, inside, 0.0)[None, :]
    places = _places(P, C, LAST, PIXELS, CHANNELS)
    for first in tl.range((P - 1) // PIXELS * PIXELS, -1, -PIXELS, num_stages=AHEAD):
        there = (first + tl.arange(0, PIXELS)[:, None] < P) & inside[None, :]
        at = _base(b, first, channel, P, C, LAST) + places
        value = tl.load(x + at, there, 0).to(tl.float32)
        tl.store(out + at, _activated(value, center, rest, scale, bias, SILU), there)


@triton.jit
def _slope(grad, normal, w, added, SILU: tl.constexpr):
    """The gradient to what SiLU is taken of."""
    if SILU:
        z = normal * w + added
        s = tl.sigmoid(z)
        grad = grad * s * (1 + z * (1 - s))
    return grad


@triton.jit
def _summed(
    grad, x, center, rest, scale, w, added, b, channel, there, start, end, P, C,
    SILU: tl.constexpr, NORMALS: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Of each channel, of the pixels from ``start`` to ``end``: the sums of the gradient before
    SiLU, of it times the normalized values, and with NORMALS of these alone, else zeros."""
    places = _places(P, C, LAST, PIXELS, CHANNELS)
    plain = tl.zeros((PIXELS, CHANNELS), tl.float32)
    times = tl.zeros((PIXELS, CHANNELS), tl.float32)
    normals = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for tile in tl.range(0, tl.cdiv(end - start, PIXELS), num_stages=AHEAD):
        first = start + tile * PIXELS
        inside = (first + tl.arange(0, PIXELS)[:, None] < end) & there
        at = _base(b, first, channel, P, C, LAST) + places
        normal = (tl.load(x + at, inside, 0).to(tl.float32) - center - rest) * scale
        slope = tl.load(grad + at, inside, 0).to(tl.float32)
        slope = _slope(slope, normal, w, added, SILU)
        plain += slope
        times += slope * normal
        if NORMALS:
            normals += tl.where(inside, normal, 0)
    return tl.sum(plain, 0), tl.sum(times, 0), tl.sum(normals, 0)


@triton.jit
def _sums(
    grad, x, weight, bias, shift, mean, rstd, sums, P, C, groups, width, length,
    SILU: tl.constexpr, NORMALS: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Those of each channel of a part of the pixels."""
    part, b = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS
    c = channel + tl.arange(0, CHANNELS)
    center, rest, scale, w, added = _channels(
        x, weight, bias, shift, mean, rstd, b, c, P, C, groups, width, LAST
    )
    start = part * length
    plain, times, normals = _summed(
        grad, x, center, rest, scale, w, added, b, channel, (c < C)[None, :], start,
        tl.minimum(start + length, P), P, C, SILU, NORMALS, LAST, PIXELS, CHANNELS, AHEAD,
    )  # fmt: skip
    _store(sums, 0, plain, b, part, c, C)
    _store(sums, 1, times, b, part, c, C)
    if NORMALS:
        _store(sums, 2, normals, b, part, c, C)


@triton.jit
def _store(sums, kind: tl.constexpr, value, b, part, c, C):
    row = (kind * tl.num_programs(2) + b).to(tl.int64) * tl.num_programs(0) + part
    tl.store(sums + row * C + c, value, c < C)


@triton.jit
def _added(sums, kind: tl.constexpr, b, channels, inside, parts, C, PARTS: tl.constexpr):
    """A sum of ``_sums`` over all parts, for each channel."""
    row = (kind * tl.num_programs(1) + b).to(tl.int64) * parts
    found = tl.zeros(channels.shape, tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        at = (row + part) * C + channels[None, :]
        found += tl.sum(tl.load(sums + at, (part < parts) & inside[None, :], 0), 0)
    return found


@triton.jit(do_not_specialize=["parts", "width"])
def _finish_backward(
    sums, x, weight, shift, mean, rstd, table, to_weight, to_bias, to_shift, parts, P, C, width,
    LAST: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of a group: what all its values have in common in their gradients, and what they have in
    proportion to the normalized ones. For each of its channels, in ``table`` [B, 5, C]: what is
    taken off, in two parts, what that is multiplied by, and these two. And what this sample adds to
    the gradients to weight, bias and shift."""
    group, b = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, WIDTH)
    inside, channels = c < width, group * width + c
    w = _vector(weight, channels, inside, 1.0)
    at = b.to(tl.int64) * C + channels
    plain = _added(sums, 0, b, channels, inside, parts, C, PARTS)
    times = _added(sums, 1, b, channels, inside, parts, C, PARTS)
    common, along = _shares(plain, times, w, inside, P, width)
    scale = tl.load(rstd + b * tl.num_programs(0) + group)
    off = tl.load(mean + b * tl.num_programs(0) + group)
    origin = _origin(x, None, None, b, channels, P, C, width, LAST)
    center, rest = _center(origin, off - _vector(shift, at, inside, 0.0))
    row = table + b.to(tl.int64) * 5 * C + channels
    tl.store(row, center, inside)
    tl.store(row + C, rest, inside)
    tl.store(row + 2 * C, tl.broadcast_to(scale, (WIDTH,)), inside)
    tl.store(row + 3 * C, tl.broadcast_to(common, (WIDTH,)), inside)
    tl.store(row + 4 * C, tl.broadcast_to(along, (WIDTH,)), inside)
    normals = plain
    if to_shift is not None:
        normals = _added(sums, 2, b, channels, inside, parts, C, PARTS)
    _store_vectors(
        to_weight, to_bias, to_shift, at, plain, times, normals, w, scale, common, along, P, inside
    )


@triton.jit
def _shares(plain, times, w, inside, P, width):
    """What a group's values have in common in their gradients, and what they have in proportion to
    the normalized ones."""
    share = 1 / (1.0 * P * width)
    common = share * tl.sum(tl.where(inside, w * plain, 0), 0)
    return common, share * tl.sum(tl.where(inside, w * times, 0), 0)


@triton.jit
def _store_vectors(
    to_weight, to_bias, to_shift, at, plain, times, normals, w, scale, common, along, P, inside
):  # fmt: skip
    """What this sample adds to the gradients to weight, bias and shift, where they are wanted."""
    if to_weight is not None:
        tl.store(to_weight + at, times, inside)
    if to_bias is not None:
        tl.store(to_bias + at, plain, inside)
    if to_shift is not None:
        tl.store(to_shift + at, scale * (w * plain - P * common - along * normals), inside)


@triton.jit
def _pulled(
    value, slope, center, rest, scale, w, added, common, along, more, at, inside,
    SILU: tl.constexpr,
):  # fmt: skip
    """The gradient to values; ``more`` is added to it."""
    normal = (value - center - rest) * scale
    slope = _slope(slope, normal, w, added, SILU)
    found = scale * (w * slope - common - along * normal)
    if more is not None:
        found += tl.load(more + at, inside, 0).to(tl.float32)
    return found


@triton.jit
def _apply_backward(
    grad, more, x, out, table, weight, bias, P, C,
    SILU: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * PIXELS
    b, channel = tl.program_id(2), tl.program_id(1) * CHANNELS
    c = channel + tl.arange(0, CHANNELS)
    inside = (first + tl.arange(0, PIXELS)[:, None] < P) & (c < C)[None, :]
    at = _base(b, first, channel, P, C, LAST) + _places(P, C, LAST, PIXELS, CHANNELS)
    value = tl.load(x + at, inside, 0).to(tl.float32)
    slope = tl.load(grad + at, inside, 0).to(tl.float32)
    row = table + b.to(tl.int64) * 5 * C + c
    center, rest = tl.load(row, c < C, 0)[None, :], tl.load(row + C, c < C, 0)[None, :]
    scale = tl.load(row + 2 * C, c < C, 0)[None, :]
    common = tl.load(row + 3 * C, c < C, 0)[None, :]
    along = tl.load(row + 4 * C, c < C, 0)[None, :]
    w = _vector(weight, c, c < C, 1.0)[None, :]
    added = _vector(bias, c, c < C, 0.0)[None, :]
    found = _pulled(
        value, slope, center, rest, scale, w, added, common, along, more, at, inside, SILU
    )
    tl.store(out + at, found, inside)


@triton.jit(do_not_specialize=["C", "width"])
def _whole_backward(
    grad, more, x, out, weight, bias, shift, mean, rstd, to_weight, to_bias, to_shift, P, C, width,
    SILU: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """All of a group's gradients. Without ``out`` only those to vectors."""
    group, b = tl.program_id(0), tl.program_id(1)
    channel = group * width
    c = channel + tl.arange(0, CHANNELS)
    inside = tl.arange(0, CHANNELS) < width
    center, rest, scale, w, added = _channels(
        x, weight, bias, shift, mean, rstd, b, c, P, C, tl.num_programs(0), width, LAST
    )
    plain, times, normals = _summed(
        grad, x, center, rest, scale, w, added, b, channel, inside[None, :], 0, P, P, C, SILU,
        to_shift is not None, LAST, PIXELS, CHANNELS, AHEAD,
    )  # fmt: skip
    of_channels = tl.reshape(w, (CHANNELS,))
    common, along = _shares(plain, times, of_channels, inside, P, width)
    _store_vectors(
        to_weight, to_bias, to_shift, b.to(tl.int64) * C + c, plain, times, normals, of_channels,
        tl.reshape(scale, (CHANNELS,)), common, along, P, inside,
    )  # fmt: skip
    if out is not None:
        places = _places(P, C, LAST, PIXELS, CHANNELS)
        for first in tl.range((P - 1) // PIXELS * PIXELS, -1, -PIXELS, num_stages=AHEAD):
            there = (first + tl.arange(0, PIXELS)[:, None] < P) & inside[None, :]
            at = _base(b, first, channel, P, C, LAST) + places
            value = tl.load(x + at, there, 0).to(tl.float32)
            slope = tl.load(grad + at, there, 0).to(tl.float32)
            found = _pulled(
                value, slope, center, rest, scale, w, added, common, along, more, at, there, SILU
            )
            tl.store(out + at, found, there)


# ---------------------------------------------------------------------------------------------
# Launchers


def refuses(x: Tensor) -> str | None:
    """Why these kernels can't take it; None if they can."""
    if x.dtype == torch.float64:
        return "it takes no float64"
    if x.ndim and x.shape[0] >= 2**16:
        return "it takes at most 65,535 samples"
    if x.numel() and x[0, 0].numel() >= 2**31:
        return "a channel has 2^31 values or more"
    return None


def _tile(pixels: int, channels: int, last: bool) -> tuple[int, int]:
    """Pixels and channels of a tile."""
    if last:
        # 256 bytes of a half type: 128 took 1.1 to 1.25 times as long, where both divide channels.
        wide = min(128 if channels % 128 == 0 else 64, triton.next_power_of_2(channels))
        return TILE // wide, wide
    long = min(TILE, triton.next_power_of_2(pixels))
    return long, min(TILE // long, triton.next_power_of_2(channels))


def _whole_kinds(pixels: int, width: int) -> dict[str, int] | None:
    """Of a group that one program is to have: what that is compiled for; None if it is none."""
    if pixels * width > WHOLE or width > WIDEST:
        return None
    wide = triton.next_power_of_2(width)
    tile = WHOLE_TILES[pixels * wide > WHOLE_TILES[0]]
    long = tile // wide
    return {"PIXELS": long, "CHANNELS": wide, "AHEAD": AHEAD, "num_warps": tile // OF_A_WARP}


def _parts(x: Tensor, pixels: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Into how many parts pixels are divided, and how many are in one."""
    batch, channels = x.shape[:2]
    others = batch * triton.cdiv(channels, tile[1])
    wanted = max(1, PROGRAMS * chips.multiprocessors(x) // others)
    tiles = triton.cdiv(triton.cdiv(pixels, tile[0]), wanted)
    length = tiles * tile[0]
    return triton.cdiv(pixels, length), length


def _finish_tile(parts: int, width: int) -> dict[str, int]:
    wide = triton.next_power_of_2(width)
    return {"WIDTH": wide, "PARTS": min(triton.next_power_of_2(parts), max(1, TILE // wide))}


def forward(
    out: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    last: bool,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> None:
    """Writes the first four, of the flat op's arguments; ``last``: channels lie side by side."""
    if x.numel() == 0:
        mean.zero_()
        rstd.zero_()
        return
    batch, channels = x.shape[:2]
    pixels, width = x[0, 0].numel(), channels // groups
    if kinds := _whole_kinds(pixels, width):
        with chips.on(x):
            _whole[(groups, batch)](
                x, residual, shift, None if residual is None else total, out, weight, bias, mean,
                rstd, eps, pixels, channels, width, SILU=silu, LAST=last, **kinds,
            )  # fmt: skip
        return
    tile = _tile(pixels, channels, last)
    kinds = {"LAST": last, "PIXELS": tile[0], "CHANNELS": tile[1], "num_warps": WARPS}
    others = triton.cdiv(channels, tile[1]), batch
    parts, length = _parts(x, pixels, tile)
    means, squares = x.new_empty((2, batch, parts, channels), dtype=torch.float32)
    table = x.new_empty((batch, 3, channels), dtype=torch.float32)
    with chips.on(x):
        _statistics[(parts, *others)](
            x, residual, None if residual is None else shift, None if residual is None else total,
            means, squares, pixels, channels, width, length, AHEAD=AHEAD, **kinds,
        )  # fmt: skip
        if residual is not None:  # in the sum already
            x, shift = total, None
        _finish[(groups, batch)](
            x, means, squares, shift, mean, rstd, table, eps, parts, length, pixels, channels,
            width, LAST=last, **_finish_tile(parts, width), num_warps=4,
        )  # fmt: skip
        _apply[(triton.cdiv(pixels, tile[0]), *others)](
            x, out, table, weight, bias, pixels, channels, SILU=silu, **kinds,
        )  # fmt: skip


def backward(
    found: Sequence[Tensor],
    last: bool,
    grad: Tensor,
    more: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
) -> None:
    """Writes those of ``found`` that are not empty: the gradients to x, weight, bias and shift."""
    if x.numel() == 0:
        for one in found:
            one.zero_()
        return
    batch, channels = x.shape[:2]
    pixels, width = x[0, 0].numel(), channels // groups
    to_x, *vectors = found
    each = [
        x.new_empty((batch, channels), dtype=torch.float32) if one.numel() else None
        for one in vectors
    ]
    given = weight, bias, shift, mean, rstd
    if kinds := _whole_kinds(pixels, width):
        with chips.on(x):
            _whole_backward[(groups, batch)](
                grad, more, x, to_x if to_x.numel() else None, *given, *each, pixels, channels,
                width, SILU=silu, LAST=last, **kinds,
            )  # fmt: skip
    else:
        _in_parts_backward(to_x, each, last, grad, more, x, given, groups, silu)
    for one, of_samples in zip(vectors, each, strict=True):
        if of_samples is not None:
            one.copy_(of_samples if one.ndim == 2 else of_samples.sum(0))


def _in_parts_backward(
    to_x: Tensor,
    each: Sequence[Tensor | None],
    last: bool,
    grad: Tensor,
    more: Tensor | None,
    x: Tensor,
    given: Sequence[Tensor | None],
    groups: int,
    silu: bool,
) -> None:
    """``each``: gradients to weight, bias and shift, of each sample; ``given``: these three, means
    and deviations."""
    weight, bias, shift, mean, rstd = given
    batch, channels = x.shape[:2]
    pixels, width = x[0, 0].numel(), channels // groups
    tile = _tile(pixels, channels, last)
    kinds = {
        "SILU": silu, "LAST": last, "PIXELS": tile[0], "CHANNELS": tile[1], "num_warps": WARPS,
    }  # fmt: skip
    others = triton.cdiv(channels, tile[1]), batch
    parts, length = _parts(x, pixels, tile)
    shifted = each[2] is not None
    sums = x.new_empty((2 + shifted, batch, parts, channels), dtype=torch.float32)
    table = x.new_empty((batch, 5, channels), dtype=torch.float32)
    with chips.on(x):
        _sums[(parts, *others)](
            grad, x, *given, sums, pixels, channels, groups, width, length, NORMALS=shifted,
            AHEAD=AHEAD, **kinds,
        )  # fmt: skip
        _finish_backward[(groups, batch)](
            sums, x, weight, shift, mean, rstd, table, *each, parts, pixels, channels, width,
            LAST=last, **_finish_tile(parts, width), num_warps=4,
        )  # fmt: skip
        if to_x.numel():
            _apply_backward[(triton.cdiv(pixels, tile[0]), *others)](
                grad, more, x, to_x, table, weight, bias, pixels, channels, **kinds
            )  # fmt: skip
