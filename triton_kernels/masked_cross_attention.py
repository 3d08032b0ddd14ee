"""Cross-attention to some tens of tokens, each pixel to those that its mask lets it see.

All tokens fit in one tile, or two: 77 are one of 64 and one of 16. So a row's softmax is done at
once, forward and backward, and nothing of it is kept in between. Masks are spread out in registers,
a tile at a time. The formulas are in sdcore/ops/masked_cross_attention.py.

q [B, H, N, D], k [B / share, H, T, D], v [B / share, H, T, DV], in any strides with the last 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
MOST_TOKENS = 320
MOST_COORDINATES = 256
CLAMP = tl.constexpr(20.0)  # of S - lse, where a gate is closed
PENALTY = tl.constexpr(1e4)  # of a closed gate, as the published code has it
WORD = tl.constexpr(32)


@triton.jit
def _at(pointer, b, batch_stride, h, head_stride, ALIGNED: tl.constexpr):
    """Where a head begins. ALIGNED: at a multiple of 16 bytes, which a head of 40 or 80 numbers
    does not show by itself, and without which each number would be read alone."""
    offset = b * batch_stride + h * head_stride
    if ALIGNED:
        offset = tl.multiple_of(offset, 8)
    return pointer + offset


@triton.jit
def _rows(at, rows, stride, count, D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
    """[rows, BLOCK_D] of a matrix; zeros beyond ``count`` rows and D columns."""
    d = tl.arange(0, BLOCK_D)
    at += rows.to(tl.int64)[:, None] * stride + d[None, :]
    if D == BLOCK_D:
        if EVEN:
            return tl.load(at)
        else:
            return tl.load(at, mask=(rows < count)[:, None], other=0.0)
    else:
        if EVEN:
            return tl.load(at, mask=(d < D)[None, :], other=0.0)
        else:
            return tl.load(at, mask=(rows < count)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(at, value, rows, stride, count, D: tl.constexpr, EVEN: tl.constexpr):
    d = tl.arange(0, value.shape[1])
    at += rows.to(tl.int64)[:, None] * stride + d[None, :]
    value = value.to(at.dtype.element_ty)
    if EVEN and value.shape[1] == D:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=(rows < count)[:, None] & (d < D)[None, :])


@triton.jit
def _store_tokens(at, value, rows, first: tl.constexpr, BLOCK_T: tl.constexpr, N, T: tl.constexpr):
    t = first + tl.arange(0, BLOCK_T)
    at += rows.to(tl.int64)[:, None] * T + t[None, :]
    tl.store(at, value, mask=(rows < N)[:, None] & (t < T)[None, :])


@triton.jit
def _from_bits(
    words, rows, first: tl.constexpr, BLOCK_T: tl.constexpr, N, T: tl.constexpr, EVEN: tl.constexpr
):
    """[rows, BLOCK_T]: whether the bit of each token from ``first`` on is set."""
    t = first + tl.arange(0, BLOCK_T)
    count: tl.constexpr = (T + WORD - 1) // WORD
    at = words + rows.to(tl.int64) * count
    spread = tl.zeros((rows.shape[0], BLOCK_T), tl.int32)
    for j in tl.static_range(first // WORD, (first + BLOCK_T + WORD - 1) // WORD):
        if j < count:
            word = tl.load(at + j) if EVEN else tl.load(at + j, mask=rows < N, other=0)
            spread = tl.where((t // WORD == j)[None, :], word[:, None], spread)
    return ((spread >> (t % WORD)[None, :]) & 1) != 0


@triton.jit
def _regions_of(
    tokens, first: tl.constexpr, BLOCK_T: tl.constexpr, T: tl.constexpr, REGIONS: tl.constexpr
):
    """The sets of regions of the tokens from ``first`` on; zeros where masks are others."""
    t = first + tl.arange(0, BLOCK_T)
    if REGIONS:
        return tl.load(tokens + t, mask=t < T, other=0)
    else:
        return tl.zeros((BLOCK_T,), tl.int32)


@triton.jit
def _open(
    words, pixels, regions, rows, first: tl.constexpr, BLOCK_T: tl.constexpr, N, T: tl.constexpr,
    BITS: tl.constexpr, REGIONS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_T]: the tokens from ``first`` on that each row may attend to."""
    t = first + tl.arange(0, BLOCK_T)
    if BITS:
        return _from_bits(words, rows, first, BLOCK_T, N, T, EVEN) & (t < T)[None, :]
    elif REGIONS:
        pixel = tl.load(pixels + rows) if EVEN else tl.load(pixels + rows, mask=rows < N, other=0)
        return (pixel[:, None] & regions[None, :]) != 0
    else:
        return tl.broadcast_to((t < T)[None, :], (rows.shape[0], BLOCK_T))


@triton.jit
def _gate_logits(
    features, psi, bias, first: tl.constexpr, BLOCK_T: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = first + tl.arange(0, BLOCK_T)
    words = _rows(psi, t, R, T, R, BLOCK_R, False)
    z = tl.dot(features, tl.trans(words), input_precision=PRECISION) * (R**-0.5)
    if BIASED:
        z += tl.load(bias).to(tl.float32)
    return tl.where((t < T)[None, :], z, float("-inf"))


@triton.jit
def _reopened(z, open, best, none, first: tl.constexpr, BLOCK_T: tl.constexpr):
    """``open``, and in rows without any the token ``best``."""
    t = first + tl.arange(0, BLOCK_T)
    return open | (none[:, None] & (t[None, :] == best[:, None]))


@triton.jit
def _first_of(z, best, first: tl.constexpr, BLOCK_T: tl.constexpr):
    """The first token of a row whose logit is ``best``."""
    t = first + tl.arange(0, BLOCK_T)
    return tl.min(tl.where(z == best[:, None], t[None, :], 1 << 30), 1)


@triton.jit
def _store_bits(words, open, rows, first: tl.constexpr, BLOCK_T: tl.constexpr, N, T: tl.constexpr):
    t = first + tl.arange(0, BLOCK_T)
    count: tl.constexpr = (T + WORD - 1) // WORD
    bits = open.to(tl.int32) << (t % WORD)[None, :]
    for j in tl.static_range(first // WORD, (first + BLOCK_T + WORD - 1) // WORD):
        if j < count:
            word = tl.sum(tl.where((t // WORD == j)[None, :], bits, 0), 1)
            tl.store(words + rows.to(tl.int64) * count + j, word, mask=rows < N)


@triton.jit
def _scores(
    query, key, bias, rows, first: tl.constexpr, BLOCK_T: tl.constexpr, N, T: tl.constexpr,
    scale, bn, bt, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scaled products of query and key, with the bias, as exponents of 2."""
    s = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
    if BIAS:
        t = first + tl.arange(0, BLOCK_T)
        at = bias + rows.to(tl.int64)[:, None] * bn + t[None, :] * bt
        inside = (rows < N)[:, None] & (t < T)[None, :]
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    return s


@triton.jit
def _within(
    s, open, first: tl.constexpr, BLOCK_T: tl.constexpr, T: tl.constexpr,
    low: tl.constexpr, high: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores, -inf where closed and outside of the segment from ``low`` up to ``high``."""
    if MASKED or first + BLOCK_T > T:
        s = tl.where(open, s, float("-inf"))
    if low > first or (high < T and high < first + BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        s = tl.where(((t >= low) & (t < high))[None, :], s, float("-inf"))
    return s


@triton.jit
def _powers(
    s0, s1, open0, open1, T: tl.constexpr, BLOCK_T0: tl.constexpr, BLOCK_T1: tl.constexpr,
    low: tl.constexpr, high: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of a segment's scores, in both tiles: their powers over that of the largest, zero where
    closed; the sum of these; and the largest."""
    e0 = _within(s0, open0, 0, BLOCK_T0, T, low, high, MASKED)
    e1 = e0
    largest = tl.max(e0, 1)
    if BLOCK_T1 > 0:
        e1 = _within(s1, open1, BLOCK_T0, BLOCK_T1, T, low, high, MASKED)
        largest = tl.maximum(largest, tl.max(e1, 1))
    # In a row that may attend to nothing, powers are zeros then, and not NaN.
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    e0 = tl.exp2(e0 - largest[:, None])
    total = tl.sum(e0, 1)
    if BLOCK_T1 > 0:
        e1 = tl.exp2(e1 - largest[:, None])
        total += tl.sum(e1, 1)
    return e0, e1, total, largest


@triton.jit
def _normalizer(total):
    """1 / total; 0 for a row that may attend to nothing."""
    return tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def _weight(weights, rows, s: tl.constexpr, N, WEIGHTS: tl.constexpr):
    if WEIGHTS:
        return tl.load(weights + s * N + rows, mask=rows < N, other=0.0).to(tl.float32)
    else:
        return tl.full(rows.shape, 1.0, tl.float32)


@triton.jit
def _softmax(
    s0, s1, open0, open1, weights, rows, N, T: tl.constexpr, BLOCK_T0: tl.constexpr,
    BLOCK_T1: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The weighted sum of the segments' probabilities, of both tiles."""
    p0 = tl.zeros(s0.shape, tl.float32)
    p1 = tl.zeros(s1.shape, tl.float32)
    for i in tl.static_range(len(SEGMENTS) // 2):
        e0, e1, total, _ = _powers(
            s0,
            s1,
            open0,
            open1,
            T,
            BLOCK_T0,
            BLOCK_T1,
            SEGMENTS[2 * i],
            SEGMENTS[2 * i + 1],
            MASKED,
        )
        share = (_normalizer(total) * _weight(weights, rows, i, N, WEIGHTS))[:, None]
        p0 += e0 * share
        if BLOCK_T1 > 0:
            p1 += e1 * share
    return p0, p1


@triton.jit
def _gate(
    gates, phi, psi, gate_bias, fb, sb, N, T: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T0: tl.constexpr, BLOCK_T1: tl.constexpr, BIASED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the bits [B, N, T / 32] of BLOCK_N rows' gates, for all heads."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    phi += b * fb
    psi += b * sb
    features = _rows(phi, rows, R, N, R, BLOCK_R, EVEN)
    z0 = _gate_logits(features, psi, gate_bias, 0, BLOCK_T0, T, R, BLOCK_R, BIASED, PRECISION)
    best = tl.max(z0, 1)
    if BLOCK_T1 > 0:
        z1 = _gate_logits(
            features, psi, gate_bias, BLOCK_T0, BLOCK_T1, T, R, BLOCK_R, BIASED, PRECISION
        )
        best = tl.maximum(best, tl.max(z1, 1))
    none = best <= 0
    token = _first_of(z0, best, 0, BLOCK_T0)
    if BLOCK_T1 > 0:
        token = tl.minimum(token, _first_of(z1, best, BLOCK_T0, BLOCK_T1))
    count: tl.constexpr = (T + WORD - 1) // WORD
    gates += b * N * count
    open = _reopened(z0, z0 > 0, token, none, 0, BLOCK_T0)
    _store_bits(gates, open, rows, 0, BLOCK_T0, N, T)
    if BLOCK_T1 > 0:
        open = _reopened(z1, z1 > 0, token, none, BLOCK_T0, BLOCK_T1)
        _store_bits(gates, open, rows, BLOCK_T0, BLOCK_T1, N, T)


@triton.jit
def _forward(
    q, k, v, out, words, pixels, tokens, bias, weights,
    qb, qh, qn, kb, kh, kt, vb, vh, vt, ob, oh, on,
    mb, tb, bb, bh, bn, bt, wb, N, share, tiles, scale: tl.float32,
    T: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T0: tl.constexpr, BLOCK_T1: tl.constexpr,
    SEGMENTS: tl.constexpr, BITS: tl.constexpr, REGIONS: tl.constexpr,
    BIAS: tl.constexpr, WEIGHTS: tl.constexpr, EVEN: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: some tiles of rows of one head, whose keys and values stay where they are."""
    chunk = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    words += b * mb
    pixels += b * mb
    tokens += b * tb
    bias += b * bb + h * bh
    weights += b * wb
    query_at = _at(q, b, qb, h, qh, ALIGNED)
    out_at = _at(out, b, ob, h, oh, ALIGNED)
    keys = _at(k, b // share, kb, h, kh, ALIGNED)
    values = _at(v, b // share, vb, h, vh, ALIGNED)
    first = chunk * tiles
    last = tl.minimum(first + tiles, tl.cdiv(N, BLOCK_N))
    rows = first * BLOCK_N + tl.arange(0, BLOCK_N)
    following = _rows(query_at, rows, qn, N, D, BLOCK_D, EVEN)
    t0 = tl.arange(0, BLOCK_T0)
    key0 = _rows(keys, t0, kt, T, D, BLOCK_D, False)
    value0 = _rows(values, t0, vt, T, DV, BLOCK_DV, False)
    regions0 = _regions_of(tokens, 0, BLOCK_T0, T, REGIONS)
    if BLOCK_T1 > 0:
        t1 = BLOCK_T0 + tl.arange(0, BLOCK_T1)
        key1 = _rows(keys, t1, kt, T, D, BLOCK_D, False)
        value1 = _rows(values, t1, vt, T, DV, BLOCK_DV, False)
        regions1 = _regions_of(tokens, BLOCK_T0, BLOCK_T1, T, REGIONS)
    for _tile in range(first, last):
        query = following
        # The next tile's are read while this one is computed, and the first beside the keys.
        following = _rows(
            query_at, rows + BLOCK_N, qn, tl.minimum(N, last * BLOCK_N), D, BLOCK_D, False
        )
        open0 = _open(words, pixels, regions0, rows, 0, BLOCK_T0, N, T, BITS, REGIONS, EVEN)
        s0 = _scores(query, key0, bias, rows, 0, BLOCK_T0, N, T, scale, bn, bt, BIAS, PRECISION)
        if BLOCK_T1 > 0:
            open1 = _open(
                words, pixels, regions1, rows, BLOCK_T0, BLOCK_T1, N, T, BITS, REGIONS, EVEN
            )
            s1 = _scores(
                query, key1, bias, rows, BLOCK_T0, BLOCK_T1, N, T, scale, bn, bt, BIAS, PRECISION
            )
        else:
            open1, s1 = open0, s0
        if len(SEGMENTS) == 2:
            # What one softmax is divided by, its output may be as well, later.
            p0, p1, total, _ = _powers(
                s0, s1, open0, open1, T, BLOCK_T0, BLOCK_T1, SEGMENTS[0], SEGMENTS[1],
                BITS or REGIONS,
            )  # fmt: skip
            factor = _normalizer(total) * _weight(weights, rows, 0, N, WEIGHTS)
        else:
            p0, p1 = _softmax(
                s0, s1, open0, open1, weights, rows, N, T, BLOCK_T0, BLOCK_T1, SEGMENTS,
                BITS or REGIONS, WEIGHTS,
            )  # fmt: skip
            factor = tl.full((BLOCK_N,), 1.0, tl.float32)
        found = tl.dot(p0.to(value0.dtype), value0, input_precision=PRECISION)
        if BLOCK_T1 > 0:
            found = tl.dot(p1.to(value1.dtype), value1, found, input_precision=PRECISION)
        _store(out_at, found * factor[:, None], rows, on, N, DV, EVEN)
        rows += BLOCK_N


@triton.jit
def _score_gradients(
    p0, p1, s0, s1, g0, g1, open0, open1, weights, rows, N, T: tl.constexpr,
    BLOCK_T0: tl.constexpr, BLOCK_T1: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
    WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The loss's gradients to the scores of both tiles, by those to the probabilities' weighted
    sum, ``g``; ``p`` is that sum."""
    if len(SEGMENTS) == 2 and not WEIGHTS:
        mean = tl.sum(p0 * g0, 1)
        if BLOCK_T1 > 0:
            mean += tl.sum(p1 * g1, 1)
        d0 = p0 * (g0 - mean[:, None])
        d1 = d0
        if BLOCK_T1 > 0:
            d1 = p1 * (g1 - mean[:, None])
    else:
        d0 = tl.zeros(s0.shape, tl.float32)
        d1 = tl.zeros(s1.shape, tl.float32)
        for i in tl.static_range(len(SEGMENTS) // 2):
            e0, e1, total, _ = _powers(
                s0, s1, open0, open1, T, BLOCK_T0, BLOCK_T1, SEGMENTS[2 * i], SEGMENTS[2 * i + 1],
                MASKED,
            )  # fmt: skip
            mean = tl.sum(e0 * g0, 1)
            if BLOCK_T1 > 0:
                mean += tl.sum(e1 * g1, 1)
            inverse = _normalizer(total)
            mean = mean * inverse
            share = (inverse * _weight(weights, rows, i, N, WEIGHTS))[:, None]
            d0 += e0 * share * (g0 - mean[:, None])
            if BLOCK_T1 > 0:
                d1 += e1 * share * (g1 - mean[:, None])
    return d0, d1


@triton.jit
def _no_sum(BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        return tl.zeros((BLOCK_D, BLOCK_T), tl.float32)
    else:
        return tl.zeros((BLOCK_T, BLOCK_D), tl.float32)


@triton.jit
def _summed(total, part, rows, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """``total`` and, over rows, the products of ``part`` [rows, T] and ``rows`` [rows, D]: [T, D].

    TRANSPOSED, [D, T]: the tensor cores of Hopper take 64 rows at once, of which 16 tokens are
    none, but a head's width may be.
    """
    if TRANSPOSED:
        return tl.dot(tl.trans(rows), part, total, input_precision=PRECISION)
    else:
        return tl.dot(tl.trans(part), rows, total, input_precision=PRECISION)


@triton.jit
def _store_sum(at, total, t, stride, T, D: tl.constexpr, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        total = tl.trans(total)
    _store(at, total, t, stride, T, D, False)


@triton.jit
def _backward(
    grad, q, k, v, dq, dk, dv, words, pixels, tokens, bias, weights,
    gb, gh, gn, qb, qh, qn, kb, kh, kt, vb, vh, vt, db, dh, dn,
    mb, tb, bb, bh, bn, bt, wb, B, H, N, share, tiles, scale: tl.float32,
    T: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T0: tl.constexpr, BLOCK_T1: tl.constexpr,
    SEGMENTS: tl.constexpr, BITS: tl.constexpr, REGIONS: tl.constexpr, BIAS: tl.constexpr,
    WEIGHTS: tl.constexpr, TRANSPOSED: tl.constexpr, NEED_Q: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: some tiles of rows of one head. dk and dv [chunk, B, T, H, ...] are what its
    tiles contribute, to be added up."""
    chunk = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    words += b * mb
    pixels += b * mb
    tokens += b * tb
    bias += b * bb + h * bh
    weights += b * wb
    t0 = tl.arange(0, BLOCK_T0)
    keys = _at(k, b // share, kb, h, kh, ALIGNED)
    values = _at(v, b // share, vb, h, vh, ALIGNED)
    regions0 = _regions_of(tokens, 0, BLOCK_T0, T, REGIONS)
    key0 = _rows(keys, t0, kt, T, D, BLOCK_D, False)
    value0 = _rows(values, t0, vt, T, DV, BLOCK_DV, False)
    dk0 = _no_sum(BLOCK_T0, BLOCK_D, TRANSPOSED)
    dv0 = _no_sum(BLOCK_T0, BLOCK_DV, TRANSPOSED)
    if BLOCK_T1 > 0:
        t1 = BLOCK_T0 + tl.arange(0, BLOCK_T1)
        regions1 = _regions_of(tokens, BLOCK_T0, BLOCK_T1, T, REGIONS)
        key1 = _rows(keys, t1, kt, T, D, BLOCK_D, False)
        value1 = _rows(values, t1, vt, T, DV, BLOCK_DV, False)
        dk1 = _no_sum(BLOCK_T1, BLOCK_D, TRANSPOSED)
        dv1 = _no_sum(BLOCK_T1, BLOCK_DV, TRANSPOSED)
    for tile in range(chunk * tiles, tl.minimum((chunk + 1) * tiles, tl.cdiv(N, BLOCK_N))):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        query = _rows(_at(q, b, qb, h, qh, ALIGNED), rows, qn, N, D, BLOCK_D, EVEN)
        back = _rows(_at(grad, b, gb, h, gh, ALIGNED), rows, gn, N, DV, BLOCK_DV, EVEN)
        open0 = _open(words, pixels, regions0, rows, 0, BLOCK_T0, N, T, BITS, REGIONS, EVEN)
        s0 = _scores(query, key0, bias, rows, 0, BLOCK_T0, N, T, scale, bn, bt, BIAS, PRECISION)
        if BLOCK_T1 > 0:
            open1 = _open(
                words, pixels, regions1, rows, BLOCK_T0, BLOCK_T1, N, T, BITS, REGIONS, EVEN
            )
            s1 = _scores(
                query, key1, bias, rows, BLOCK_T0, BLOCK_T1, N, T, scale, bn, bt, BIAS, PRECISION
            )
        else:
            open1, s1 = open0, s0
        p0, p1 = _softmax(
            s0, s1, open0, open1, weights, rows, N, T, BLOCK_T0, BLOCK_T1, SEGMENTS,
            BITS or REGIONS, WEIGHTS,
        )  # fmt: skip
        # Rounded as the products take them, also for what follows: half the registers.
        p0 = p0.to(back.dtype)
        p1 = p1.to(back.dtype)
        if NEED_Q or NEED_K:
            g0 = tl.dot(back, tl.trans(value0), input_precision=PRECISION)
            g1 = tl.dot(back, tl.trans(value1), input_precision=PRECISION) if BLOCK_T1 > 0 else g0
            d0, d1 = _score_gradients(
                p0, p1, s0, s1, g0, g1, open0, open1, weights, rows, N, T, BLOCK_T0, BLOCK_T1,
                SEGMENTS, BITS or REGIONS, WEIGHTS,
            )  # fmt: skip
            d0 = d0.to(query.dtype)
            if BLOCK_T1 > 0:
                d1 = d1.to(query.dtype)
        if NEED_Q:
            found = tl.dot(d0, key0, input_precision=PRECISION)
            if BLOCK_T1 > 0:
                found = tl.dot(d1, key1, found, input_precision=PRECISION)
            _store(_at(dq, b, db, h, dh, ALIGNED), found * scale, rows, dn, N, D, EVEN)
        # All sums at the end, when probabilities and gradients both are in shared memory: where
        # one took another's place there, ptxas 12.8 (Triton 3.6) made code that reads registers
        # before they are set. That of CUDA 13.0 does not.
        if NEED_V:
            dv0 = _summed(dv0, p0, back, TRANSPOSED, PRECISION)
            if BLOCK_T1 > 0:
                dv1 = _summed(dv1, p1, back, TRANSPOSED, PRECISION)
        if NEED_K:
            dk0 = _summed(dk0, d0, query, TRANSPOSED, PRECISION)
            if BLOCK_T1 > 0:
                dk1 = _summed(dk1, d1, query, TRANSPOSED, PRECISION)
    at = (chunk.to(tl.int64) * B + b) * T * H + h
    if NEED_K:
        _store_sum(dk + at * D, dk0 * scale, t0, H * D, T, D, TRANSPOSED)
        if BLOCK_T1 > 0:
            _store_sum(dk + at * D, dk1 * scale, t1, H * D, T, D, TRANSPOSED)
    if NEED_V:
        _store_sum(dv + at * DV, dv0, t0, H * DV, T, DV, TRANSPOSED)
        if BLOCK_T1 > 0:
            _store_sum(dv + at * DV, dv1, t1, H * DV, T, DV, TRANSPOSED)


@triton.jit
def _sum(
    parts_k, parts_v, dk, dv, size_k, size_v, groups, chunks, share,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dk and dv [groups, ...], of ``size`` numbers: of [chunks, groups, share, ...] the sums."""
    if tl.program_id(1) == 0:
        _sum_of(parts_k, dk, size_k, groups, chunks, share, BLOCK, BLOCK_C)
    else:
        _sum_of(parts_v, dv, size_v, groups, chunks, share, BLOCK, BLOCK_C)


@triton.jit
def _sum_of(parts, out, size, groups, chunks, share, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    each = size // groups
    start = (at // each) * share * each + at % each
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, chunks * share, BLOCK_C):
        part = first + tl.arange(0, BLOCK_C)
        place = (part % share) * each + (part // share).to(tl.int64) * size * share
        inside = (part < chunks * share)[:, None] & (at < size)[None, :]
        total += tl.sum(tl.load(parts + place[:, None] + start[None, :], inside, 0.0), 0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _per_token(
    s0, s1, g0, g1, open0, open1, weights, rows, N, T: tl.constexpr, BLOCK_T0: tl.constexpr,
    BLOCK_T1: tl.constexpr, BLOCK_S: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
    WEIGHTS: tl.constexpr, MULTIPLICATIVE: tl.constexpr,
):  # fmt: skip
    """The loss's gradients to the scores, or (MULTIPLICATIVE) to gates that multiply their powers;
    and to the weights of the segments [rows, BLOCK_S]."""
    d0 = tl.zeros(s0.shape, tl.float32)
    d1 = tl.zeros(s1.shape, tl.float32)
    dw = tl.zeros((rows.shape[0], BLOCK_S), tl.float32)
    for i in tl.static_range(len(SEGMENTS) // 2):
        e0, e1, total, largest = _powers(
            s0,
            s1,
            open0,
            open1,
            T,
            BLOCK_T0,
            BLOCK_T1,
            SEGMENTS[2 * i],
            SEGMENTS[2 * i + 1],
            MASKED,
        )
        mean = tl.sum(e0 * g0, 1)
        if BLOCK_T1 > 0:
            mean += tl.sum(e1 * g1, 1)
        mean = mean * _normalizer(total)
        share = _normalizer(total) * _weight(weights, rows, i, N, WEIGHTS)
        dw = tl.where((tl.arange(0, BLOCK_S) == i)[None, :], mean[:, None], dw)
        if MULTIPLICATIVE:
            # Closed ones as well, of this segment. S - lse is at most 0 where one is open.
            lse = largest + tl.log2(tl.where(total == 0.0, 1.0, total))
            share = tl.where(total == 0.0, 0.0, _weight(weights, rows, i, N, WEIGHTS))
            inside0 = tl.broadcast_to((tl.arange(0, BLOCK_T0) < T)[None, :], s0.shape)
            e0 = tl.minimum(s0 - lse[:, None], CLAMP * LOG2E)
            e0 = tl.exp2(
                _within(e0, inside0, 0, BLOCK_T0, T, SEGMENTS[2 * i], SEGMENTS[2 * i + 1], False)
            )
            if BLOCK_T1 > 0:
                t1 = BLOCK_T0 + tl.arange(0, BLOCK_T1)
                inside1 = tl.broadcast_to((t1 < T)[None, :], s1.shape)
                e1 = tl.minimum(s1 - lse[:, None], CLAMP * LOG2E)
                e1 = tl.exp2(
                    _within(
                        e1,
                        inside1,
                        BLOCK_T0,
                        BLOCK_T1,
                        T,
                        SEGMENTS[2 * i],
                        SEGMENTS[2 * i + 1],
                        False,
                    )
                )
        d0 += e0 * share[:, None] * (g0 - mean[:, None])
        if BLOCK_T1 > 0:
            d1 += e1 * share[:, None] * (g1 - mean[:, None])
    return d0, d1, dw


@triton.jit
def _through_gate(
    z, d, T, first: tl.constexpr, BLOCK_T: tl.constexpr, MULTIPLICATIVE: tl.constexpr
):
    """The gradient to the gate's logits, straight through the threshold to the sigmoid."""
    p = 1.0 / (1.0 + tl.exp2(-z * LOG2E))
    t = first + tl.arange(0, BLOCK_T)
    dz = tl.where((t < T)[None, :], d * p * (1.0 - p), 0.0)
    if MULTIPLICATIVE:
        return dz
    else:
        return dz * PENALTY


@triton.jit
def _scores_backward(
    grad, q, k, v, words, pixels, tokens, phi, psi, gate_bias, bias, weights,
    dphi, dpsi, dgate_bias, dbias, dweights,
    gb, gh, gn, qb, qh, qn, kb, kh, kt, vb, vh, vt,
    mb, tb, fb, sb, bb, bh, bn, bt, wb, B, N, share, tiles, scale: tl.float32,
    T: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T0: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_S: tl.constexpr,
    HEADS: tl.constexpr, SEGMENTS: tl.constexpr, BITS: tl.constexpr, REGIONS: tl.constexpr,
    GATE: tl.constexpr, GATE_BIASED: tl.constexpr, MULTIPLICATIVE: tl.constexpr,
    BIAS: tl.constexpr, WEIGHTS: tl.constexpr, NEED_BIAS: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients to what is stated for all heads together: one program sums them over HEADS heads,
    for some tiles of rows."""
    chunk = tl.program_id(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    words += b * mb
    pixels += b * mb
    tokens += b * tb
    bias += b * bb
    weights += b * wb
    t0 = tl.arange(0, BLOCK_T0)
    regions0 = _regions_of(tokens, 0, BLOCK_T0, T, REGIONS)
    if BLOCK_T1 > 0:
        t1 = BLOCK_T0 + tl.arange(0, BLOCK_T1)
        regions1 = _regions_of(tokens, BLOCK_T0, BLOCK_T1, T, REGIONS)
    if GATE:
        dpsi0 = tl.zeros((BLOCK_T0, BLOCK_R), tl.float32)
        if BLOCK_T1 > 0:
            dpsi1 = tl.zeros((BLOCK_T1, BLOCK_R), tl.float32)
        dshift = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(chunk * tiles, tl.minimum((chunk + 1) * tiles, tl.cdiv(N, BLOCK_N))):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        open0 = _open(words, pixels, regions0, rows, 0, BLOCK_T0, N, T, BITS, REGIONS, EVEN)
        d0 = tl.zeros((BLOCK_N, BLOCK_T0), tl.float32)
        dw = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
        if BLOCK_T1 > 0:
            open1 = _open(
                words, pixels, regions1, rows, BLOCK_T0, BLOCK_T1, N, T, BITS, REGIONS, EVEN
            )
            d1 = tl.zeros((BLOCK_N, BLOCK_T1), tl.float32)
        else:
            open1 = open0
        for i in range(HEADS):
            h = (group * HEADS + i).to(tl.int64)
            query = _rows(_at(q, b, qb, h, qh, ALIGNED), rows, qn, N, D, BLOCK_D, EVEN)
            back = _rows(_at(grad, b, gb, h, gh, ALIGNED), rows, gn, N, DV, BLOCK_DV, EVEN)
            keys = _at(k, b // share, kb, h, kh, ALIGNED)
            values = _at(v, b // share, vb, h, vh, ALIGNED)
            s0 = _scores(
                query, _rows(keys, t0, kt, T, D, BLOCK_D, False), bias + h * bh, rows, 0,
                BLOCK_T0, N, T, scale, bn, bt, BIAS, PRECISION,
            )  # fmt: skip
            value = _rows(values, t0, vt, T, DV, BLOCK_DV, False)
            g0 = tl.dot(back, tl.trans(value), input_precision=PRECISION)
            if BLOCK_T1 > 0:
                s1 = _scores(
                    query, _rows(keys, t1, kt, T, D, BLOCK_D, False), bias + h * bh, rows,
                    BLOCK_T0, BLOCK_T1, N, T, scale, bn, bt, BIAS, PRECISION,
                )  # fmt: skip
                value = _rows(values, t1, vt, T, DV, BLOCK_DV, False)
                g1 = tl.dot(back, tl.trans(value), input_precision=PRECISION)
            else:
                s1, g1 = s0, g0
            more0, more1, morew = _per_token(
                s0, s1, g0, g1, open0, open1, weights, rows, N, T, BLOCK_T0, BLOCK_T1, BLOCK_S,
                SEGMENTS, BITS or REGIONS, WEIGHTS, MULTIPLICATIVE,
            )  # fmt: skip
            d0 += more0
            if BLOCK_T1 > 0:
                d1 += more1
            dw += morew
        if NEED_WEIGHTS:
            s = tl.arange(0, BLOCK_S)
            count: tl.constexpr = len(SEGMENTS) // 2
            at = dweights + ((b * groups + group) * count + s[None, :]) * N + rows[:, None]
            tl.store(at, dw, mask=(rows < N)[:, None] & (s < count)[None, :])
        if NEED_BIAS:
            at = dbias + (b * groups + group) * N * T
            _store_tokens(at, d0, rows, 0, BLOCK_T0, N, T)
            if BLOCK_T1 > 0:
                _store_tokens(at, d1, rows, BLOCK_T0, BLOCK_T1, N, T)
        if GATE:
            features = _rows(phi + b * fb, rows, R, N, R, BLOCK_R, EVEN)
            root: tl.constexpr = R**-0.5
            z = _gate_logits(
                features, psi + b * sb, gate_bias, 0, BLOCK_T0, T, R, BLOCK_R, GATE_BIASED,
                PRECISION,
            )  # fmt: skip
            dz = _through_gate(z, d0, T, 0, BLOCK_T0, MULTIPLICATIVE)
            dshift += tl.sum(tl.where((rows < N)[:, None], dz, 0.0), 1)
            # In float16 what is bounded by CLAMP would run over; bfloat16 holds it.
            like = tl.bfloat16 if features.dtype == tl.bfloat16 else tl.float32
            wide = features.to(like)
            token = _rows(psi + b * sb, t0, R, T, R, BLOCK_R, False).to(like)
            dz = dz.to(like)
            found = tl.dot(dz, token, input_precision=WIDE)
            dpsi0 = tl.dot(tl.trans(dz), wide, dpsi0, input_precision=WIDE)
            if BLOCK_T1 > 0:
                z = _gate_logits(
                    features, psi + b * sb, gate_bias, BLOCK_T0, BLOCK_T1, T, R, BLOCK_R,
                    GATE_BIASED, PRECISION,
                )  # fmt: skip
                dz = _through_gate(z, d1, T, BLOCK_T0, BLOCK_T1, MULTIPLICATIVE)
                dshift += tl.sum(tl.where((rows < N)[:, None], dz, 0.0), 1)
                token = _rows(psi + b * sb, t1, R, T, R, BLOCK_R, False).to(like)
                dz = dz.to(like)
                found = tl.dot(dz, token, found, input_precision=WIDE)
                dpsi1 = tl.dot(tl.trans(dz), wide, dpsi1, input_precision=WIDE)
            _store(dphi + b * N * R, found * root, rows, R, N, R, EVEN)
    if GATE:
        scaled: tl.constexpr = R**-0.5
        at = dpsi + (chunk.to(tl.int64) * B + b) * T * R
        _store(at, dpsi0 * scaled, t0, R, T, R, False)
        if BLOCK_T1 > 0:
            _store(at, dpsi1 * scaled, t1, R, T, R, False)
        tl.store(dgate_bias + chunk * B + b, tl.sum(dshift))


# ---------------------------------------------------------------------------------------------
# Launchers


@dataclass(frozen=True)
class Tile:
    """What one program holds at a time: rows, and tokens in a first and a second tile."""

    n: int
    t0: int
    t1: int
    warps: int
    stages: int  # tiles of rows that are on their way to it
    programs: int  # that a multiprocessor holds
    transposed: bool = False  # how a backward's sums are held


# Numbers of a tile of keys, up to which a tile of rows fits beside it in registers, and that tile:
# rows, warps, stages, programs of a multiprocessor. By the compiler's report; more would spill.
FORWARD = ((5120, (64, 4, 1, 5)), (10240, (64, 4, 1, 2)), (20480, (32, 4, 1, 2)))
BACKWARD = ((5120, (64, 8, 1, 1)),)
WIDE_BACKWARD = ((5120, (64, 4, 1, 2, True)),)  # with Hopper's wide products, in 16 bits
LEAST = (16, 8, 1, 1)  # beyond
BOTH_SIZE = 16384  # beyond it the sums for dK and dV have no room together
AMD_SIZE = 10240  # beyond it AMD's chips spill
LOAD, SUMS = 1, 2  # what keys and values, and sums for dK and dV, take, in tiles of rows
GATE_ROWS = 64
SCORES_ROWS, SCORES_WARPS = 32, 8
WARPS = 8


def token_tiles(tokens: int) -> tuple[int, int]:
    """The sizes of the first and the second tile of tokens; 0 for none."""
    whole = max(16, triton.next_power_of_2(tokens))
    half = whole // 2
    rest = max(16, triton.next_power_of_2(max(1, tokens - half)))
    # 77 tokens as 64 + 16 took half the time of 128.
    return (half, rest) if whole > 64 and rest < half else (whole, 0)


def _size(dtype: torch.dtype, tokens: int, width: int) -> int:
    # float32 is multiplied as the sum of three products, of parts that take more registers.
    return sum(token_tiles(tokens)) * _block(width) * (4 if dtype == torch.float32 else 1)


def forward_tile(dtype: torch.dtype, tokens: int, width: int) -> Tile:
    """For so many tokens, and heads of this width."""
    return _tile(FORWARD, dtype, tokens, width)


def backward_tile(q: Tensor, tokens: int, width: int, added: bool = False) -> Tile:
    """The same, for the gradients; ``added``: with a mask that is added, whose tile takes room."""
    wide = q.dtype != torch.float32 and not added and _wide_products(q)
    fits = WIDE_BACKWARD if wide else BACKWARD
    tile = _tile(fits, q.dtype, tokens, width * (2 if added else 1))
    # Of AMD's wider warps, four hold what eight do here, and eight spill.
    return replace(tile, warps=4) if amd() else tile


def _tile(
    fits: Sequence[tuple[int, tuple[Any, ...]]], dtype: torch.dtype, tokens: int, width: int
) -> Tile:
    size = _size(dtype, tokens, width)
    n, *others = next((found for most, found in fits if size <= most), LEAST)
    return Tile(n, *token_tiles(tokens), *others)


def amd() -> bool:
    return torch.version.hip is not None


def _wide_products(tensor: Tensor) -> bool:
    """Whether tensor cores take operands of 64 rows from shared memory (wgmma, tcgen05)."""
    if amd() or not tensor.is_cuda:
        return False
    return torch.cuda.get_device_capability(tensor.device)[0] in (9, 10)


def refuses(q: Tensor, tokens: int, width: int) -> str | None:
    """Why these kernels can't take q [B, H, N, D] and so many tokens of this width; or None."""
    if q.dtype == torch.float64:
        return "it takes no float64"
    if tokens > MOST_TOKENS:
        return f"it takes up to {MOST_TOKENS} tokens, and these are {tokens}"
    wider = max(q.shape[-1], width)
    if amd():
        if tokens > 96 or _size(q.dtype, tokens, wider) > AMD_SIZE:
            return f"on AMD's chips it takes no {tokens} tokens of {wider} numbers"
        return None
    needed, there = shared_memory(q, tokens, wider), _shared_memory(q)
    if needed > there:
        return f"{tokens} tokens of {wider} numbers need {needed} bytes shared, {there} exist"
    return None


def shared_memory(q: Tensor, tokens: int, width: int) -> int:
    """Bytes that a program may need, generously: the compiler says exactly, but only afterwards."""
    tile, block = backward_tile(q, tokens, width), _block(width)
    numbers = 1.8 * (tile.t0 + tile.t1) * 2 * block
    numbers += 1.5 * tile.n * 2 * (block + tile.t0 + tile.t1)
    return int(numbers * (8 if q.dtype == torch.float32 else 2))


def _shared_memory(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return 1 << 30  # in the interpreter
    return torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin


def _multiprocessors(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return 2  # in the interpreter: so few that programs take several tiles
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _rowwise(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _batch_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None or len(tensor) == 1 else tensor.stride(0)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _output(like: Tensor, *shape: int) -> Tensor:
    """[B, H, N, D] in memory as [B, N, H, D], as attention's input and output mostly lie."""
    batch, heads, n, d = shape
    return like.new_empty(batch, n, heads, d).transpose(1, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor | None,
    pixels: Tensor | None,
    tokens: Tensor | None,
    phi: Tensor | None,
    psi: Tensor | None,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    scale: float,
    segments: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The output [B, H, N, DV], and the bits of the gates that were open."""
    batch, heads, n, d = q.shape
    count, width = k.shape[2], v.shape[3]
    out = _output(q, batch, heads, n, width)
    words = triton.cdiv(count, 32)
    gates = q.new_empty((batch, n, words) if phi is not None else 0, dtype=torch.int32)
    if out.numel() == 0:
        return out, gates
    q, k, v = _rowwise(q), _rowwise(k), _rowwise(v)
    bits, pixels, tokens, phi, psi, weights = map(
        _contiguous, (bits, pixels, tokens, phi, psi, weights)
    )
    tile = forward_tile(q.dtype, count, max(d, width))
    added = None if bias is None else bias.expand(batch, heads, n, count)
    chunks, tiles = _chunks(q, batch * heads, triton.cdiv(n, tile.n), tile.programs, LOAD)
    with _on(q):
        if phi is not None:
            _gates(gates, phi, psi, gate_bias, q.dtype, count)
            bits = gates
        _forward[(chunks, heads, batch)](
            q, k, v, out, _or(bits, q), _or(pixels, q), _or(tokens, q), _or(added, q),
            _or(weights, q),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            _batch_stride(bits if pixels is None else pixels), _batch_stride(tokens),
            *_strides(added), _batch_stride(weights), n, batch // len(k), tiles, scale,
            T=count, D=d, DV=width, BLOCK_D=_block(d), BLOCK_DV=_block(width),
            SEGMENTS=tuple(segments),
            **_common((q, k, v, out), tile, bits, pixels, bias, weights),
        )  # fmt: skip
    return out, gates


def _gates(
    gates: Tensor,
    phi: Tensor,
    psi: Tensor,
    gate_bias: Tensor | None,
    dtype: torch.dtype,
    count: int,
) -> None:
    """``gates``, the bits [B, N, words], from the gate's features. A kernel of its own, for these
    are as much to read as a head's query, and all heads share them."""
    batch, n = gates.shape[:2]
    features = phi.shape[-1]
    _gate[(triton.cdiv(n, GATE_ROWS), batch)](
        gates, phi, psi, _or(gate_bias, phi), _batch_stride(phi), _batch_stride(psi), n, T=count,
        R=features, BLOCK_R=_block(features), BLOCK_N=GATE_ROWS, BLOCK_T0=token_tiles(count)[0],
        BLOCK_T1=token_tiles(count)[1], BIASED=gate_bias is not None, EVEN=n % GATE_ROWS == 0,
        PRECISION=_precision(dtype), num_warps=WARPS,
    )  # fmt: skip


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Something to point to, for what the kernel won't read."""
    return other if tensor is None else tensor


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _aligned(tensor: Tensor) -> bool:
    """Whether each head's rows begin at multiples of eight numbers."""
    return tensor.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in tensor.stride()[:3])


def _exactly() -> str:
    return "ieee" if amd() else "tf32x3"


def _common(
    heads: Sequence[Tensor],
    tile: Tile,
    bits: Tensor | None,
    pixels: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
) -> dict[str, Any]:
    q = heads[0]
    return {
        "BLOCK_N": tile.n,
        "BLOCK_T0": tile.t0,
        "BLOCK_T1": tile.t1,
        "BITS": bits is not None,
        "REGIONS": pixels is not None,
        "BIAS": bias is not None,
        "WEIGHTS": weights is not None,
        "EVEN": q.shape[2] % tile.n == 0,
        "ALIGNED": all(map(_aligned, heads)),
        "PRECISION": _precision(q.dtype),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _precision(dtype: torch.dtype) -> str:
    """As exact as PyTorch, which does not multiply in TF32 unless asked for."""
    return _exactly() if dtype == torch.float32 else "tf32"


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor | None,
    pixels: Tensor | None,
    tokens: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    scale: float,
    segments: Sequence[int],
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v; empty where not needed."""
    batch, heads, n, d = q.shape
    count, width = k.shape[2], v.shape[3]
    groups, share = len(k), batch // len(k)
    dq = _output(q, batch, heads, n, d) if need_q else q.new_empty(0)
    dk = _output(k, groups, heads, count, d) if need_k else k.new_empty(0)
    dv = _output(v, groups, heads, count, width) if need_v else v.new_empty(0)
    if q.numel() == 0 or grad.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad, q, k, v = _rowwise(grad), _rowwise(q), _rowwise(k), _rowwise(v)
    bits, pixels, tokens, weights = map(_contiguous, (bits, pixels, tokens, weights))
    tile = backward_tile(q, count, max(d, width), bias is not None)
    added = None if bias is None else bias.expand(batch, heads, n, count)
    every = triton.cdiv(n, tile.n)
    sums = need_k or need_v
    chunks, tiles = _chunks(q, batch * heads, every, tile.programs, SUMS if sums else LOAD)
    parts_k = q.new_empty((chunks, batch, count, heads, d) if need_k else 0, dtype=torch.float32)
    parts_v = q.new_empty(
        (chunks, batch, count, heads, width) if need_v else 0, dtype=torch.float32
    )
    wants = [(need_q, need_k, need_v)]
    if need_k and need_v and _size(q.dtype, count, max(d, width)) > BOTH_SIZE:
        wants = [(need_q, True, False), (False, False, True)]
    with _on(q):
        for want_q, want_k, want_v in wants:
            _backward[(chunks, heads, batch)](
                grad, q, k, v, dq, parts_k, parts_v, _or(bits, q), _or(pixels, q), _or(tokens, q),
                _or(added, q), _or(weights, q),
                *grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                *(dq.stride()[:3] if need_q else (0, 0, 0)),
                _batch_stride(bits if pixels is None else pixels), _batch_stride(tokens),
                *_strides(added), _batch_stride(weights), batch, heads, n, share, tiles, scale,
                T=count, D=d, DV=width, BLOCK_D=_block(d), BLOCK_DV=_block(width),
                SEGMENTS=tuple(segments), TRANSPOSED=tile.transposed, NEED_Q=want_q,
                NEED_K=want_k, NEED_V=want_v,
                **_common(
                    (q, k, v, grad, *([dq] if need_q else [])), tile, bits, pixels, bias, weights
                ),
            )  # fmt: skip
        _add(parts_k, parts_v, dk, dv, groups, share)
    return dq, dk, dv


def _chunks(q: Tensor, each: int, most: int, programs: int, extra: int) -> tuple[int, int]:
    """Into how many programs to part the ``most`` tiles of each of ``each`` heads, and the tiles of
    one. Where a multiprocessor holds so many programs, and what a program does besides takes as
    long as ``extra`` tiles, all of them take the least time so."""

    def time(tiles: int) -> int:
        waves = triton.cdiv(each * triton.cdiv(most, tiles), programs * _multiprocessors(q))
        return waves * (tiles + extra)

    tiles = min(range(1, most + 1), key=time)
    return triton.cdiv(most, tiles), tiles


def _add(parts_k: Tensor, parts_v: Tensor, dk: Tensor, dv: Tensor, groups: int, share: int) -> None:
    """dk and dv, of which the memory is [groups, ...], from parts [chunks, groups · share, ...] in
    a fixed order; what is empty is not needed."""
    needed = [pair for pair in ((parts_k, dk), (parts_v, dv)) if pair[1].numel()]
    if needed:
        (first, one), (second, other) = needed[0], needed[-1]
        block = 256
        grid = triton.cdiv(max(one.numel(), other.numel()), block), len(needed)
        _sum[grid](
            first, second, one, other, one.numel(), other.numel(), groups, len(first), share,
            BLOCK=block, BLOCK_C=16,
        )  # fmt: skip


def scores_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor | None,
    pixels: Tensor | None,
    tokens: Tensor | None,
    phi: Tensor | None,
    psi: Tensor | None,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    scale: float,
    segments: Sequence[int],
    multiplicative: bool,
    need_gate: bool,
    need_bias: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to phi, psi and the gate's bias; to the bias; and to the segments' weights."""
    batch, heads, n, d = q.shape
    count, width = k.shape[2], v.shape[3]
    grad, q, k, v = _rowwise(grad), _rowwise(q), _rowwise(k), _rowwise(v)
    bits, pixels, tokens, phi, psi, weights = map(
        _contiguous, (bits, pixels, tokens, phi, psi, weights)
    )
    tile = backward_tile(q, count, max(d, width), bias is not None)
    # Its programs hold more: scores and their gradients, and those to the features.
    tile = replace(tile, n=SCORES_ROWS, warps=SCORES_WARPS, stages=1)
    added = None if bias is None else bias.expand(batch, heads, n, count)
    groups = heads if need_bias and bias is not None and bias.shape[1] > 1 else 1
    features = phi.shape[-1] if need_gate and phi is not None else 1
    pieces = len(segments) // 2
    every = max(1, triton.cdiv(n, tile.n))
    chunks, tiles = _chunks(q, max(1, batch * groups), every, 2, SUMS)

    def empty(needed: bool, *shape: int, dtype: Any = torch.float32) -> Tensor:
        made = q.new_empty(shape if needed else 0, dtype=dtype)
        return made if grad.numel() else made.zero_()

    dphi = empty(need_gate, batch, n, features, dtype=None if phi is None else phi.dtype)
    dpsi = empty(need_gate, chunks, batch, count, features)
    dshift = empty(need_gate, chunks, batch)
    dbias = empty(need_bias, batch, groups, n, count)
    dweights = empty(need_weights, batch, groups, pieces, n)
    if grad.numel():
        with _on(q):
            _scores_backward[(chunks, groups, batch)](
                grad, q, k, v, _or(bits, q), _or(pixels, q), _or(tokens, q), _or(phi, q),
                _or(psi, q), _or(gate_bias, q), _or(added, q), _or(weights, q),
                dphi, dpsi, dshift, dbias, dweights,
                *grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                _batch_stride(bits if pixels is None else pixels), _batch_stride(tokens),
                _batch_stride(phi), _batch_stride(psi), *_strides(added), _batch_stride(weights),
                batch, n, batch // len(k), tiles, scale,
                T=count, D=d, DV=width, R=features, BLOCK_D=_block(d), BLOCK_DV=_block(width),
                BLOCK_R=_block(features), BLOCK_S=triton.next_power_of_2(pieces),
                HEADS=heads // groups, SEGMENTS=tuple(segments), GATE=need_gate,
                GATE_BIASED=gate_bias is not None, MULTIPLICATIVE=multiplicative and need_gate,
                NEED_BIAS=need_bias, NEED_WEIGHTS=need_weights,
                WIDE=_exactly() if q.dtype == torch.float32 else "tf32",
                **_common((q, k, v, grad), tile, bits, pixels, bias, weights),
            )  # fmt: skip
    return dphi, dpsi, dshift, dbias, dweights
