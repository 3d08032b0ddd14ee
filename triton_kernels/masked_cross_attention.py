"""Cross-attention to some tens of tokens, each pixel to those that its mask lets it see.

All tokens fit in one tile, or two: 77 are one of 64 and one of 16. So a row's softmax is done at
once, forward and backward, and nothing of it is kept in between. Masks are spread out in registers,
a tile at a time. The formulas are in sdcore/ops/masked_cross_attention.py.

q [B, H, N, D], k [B / share, H, T, D], v [B / share, H, T, DV], in any strides with the last 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdcore.triton_kernels import chips

LOG2E = tl.constexpr(1.4426950408889634)
MOST_TOKENS = 320
MOST_STRIDE = 1 << 24  # times 256, the most rows of a tile, it still takes 32 bits
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
def _places(start, rows, d, stride):
    """Of a tile from row ``start`` on. Where it begins takes 64 bits, what lies within it 32 (see
    _rowwise), unsigned, which chips add to the former themselves."""
    within = (rows[:, None] * stride + d[None, :]).to(tl.uint32)
    return tl.cast(start, tl.int64) * stride + within.to(tl.int64)


@triton.jit
def _rows(
    at, start, BLOCK: tl.constexpr, stride, count, D: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK_D] of a matrix, its rows from ``start`` on; zeros beyond ``count`` rows and D
    columns."""
    rows, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at += _places(start, rows, d, stride)
    if D == BLOCK_D:
        if EVEN:
            return tl.load(at)
        else:
            return tl.load(at, mask=(rows < count - start)[:, None], other=0.0)
    else:
        if EVEN:
            return tl.load(at, mask=(d < D)[None, :], other=0.0)
        else:
            inside = (rows < count - start)[:, None] & (d < D)[None, :]
            return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store(at, value, start, stride, count, D: tl.constexpr, EVEN: tl.constexpr):
    rows, d = tl.arange(0, value.shape[0]), tl.arange(0, value.shape[1])
    at += _places(start, rows, d, stride)
    value = value.to(at.dtype.element_ty)
    if EVEN and value.shape[1] == D:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=(rows < count - start)[:, None] & (d < D)[None, :])


@triton.jit
def _store_tokens(at, value, rows, first: tl.constexpr, BLOCK_T: tl.constexpr, N, T: tl.constexpr):
    t = first + tl.arange(0, BLOCK_T)
    at += rows.to(tl.int64)[:, None] * T + t[None, :]
    tl.store(at, value, mask=(rows < N)[:, None] & (t < T)[None, :])


@triton.jit
def _marks(
    marks, rows, N, T: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr
):
    """What each row's mask is made of: its bits in WORDS words, or its set of regions in one."""
    found = ()
    for j in tl.static_range(WORDS):
        at = marks + rows.to(tl.int64) * WORDS + j
        word = tl.load(at) if EVEN else tl.load(at, mask=rows < N, other=0)
        if BITS and WORD * (j + 1) > T:
            word &= (1 << T % 32) - 1
        found += (word,)
    return found


@triton.jit
def _regions_of(
    tokens, first: tl.constexpr, BLOCK_T: tl.constexpr, T: tl.constexpr, REGIONS: tl.constexpr
):
    """The sets of regions of the tokens from ``first`` on; zeros where masks are others."""
    t = first + tl.arange(0, BLOCK_T)
    if REGIONS:
        if first + BLOCK_T > T:
            return tl.load(tokens + t, mask=t < T, other=0)
        else:
            return tl.load(tokens + t)
    else:
        return tl.zeros((BLOCK_T,), tl.int32)


@triton.jit
def _where_common(s, one, other, PTX: tl.constexpr):
    """``s`` where two sets of bits have one in common, else -inf.

    PTX, for LLVM packs these comparisons into words and spreads them out again: five instructions a
    score in place of two.
    """
    if PTX and one.dtype.primitive_bitwidth == 32:
        one, other = tl.broadcast_to(one, s.shape), tl.broadcast_to(other, s.shape)
        return tl.inline_asm_elementwise(
            """{
            .reg .pred common;
            .reg .b32 both;
            and.b32 both, $2, $3;
            setp.ne.b32 common, both, 0;
            selp.f32 $0, $1, 0fFF800000, common;
            }""",
            "=f,f,r,r",
            [s, one, other],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.where((one & other) != 0, s, float("-inf"))


@triton.jit
def _masked(
    s, marks, regions, first: tl.constexpr, BLOCK_T: tl.constexpr, T: tl.constexpr,
    BITS: tl.constexpr, REGIONS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Scores [rows, BLOCK_T], -inf for the tokens that a row may not attend to, or beyond T."""
    t = first + tl.arange(0, BLOCK_T)
    if REGIONS:
        return _where_common(s, marks[0][:, None], regions[None, :], PTX)
    elif BITS:
        low: tl.constexpr = first // WORD
        spread = tl.broadcast_to(marks[low][:, None], s.shape)
        for j in tl.static_range(low + 1, (min(first + BLOCK_T, T) + WORD - 1) // WORD):
            spread = tl.where((t // WORD == j)[None, :], marks[j][:, None], spread)
        # A thread has the same t % 8 in all its columns, or two: few shifts, and constants.
        return _where_common(s, spread >> (t % 8)[None, :], (1 << t % WORD // 8 * 8)[None, :], PTX)
    elif first + BLOCK_T > T:
        return tl.where((t < T)[None, :], s, float("-inf"))
    else:
        return s


@triton.jit
def _gate_logits(
    features, psi, bias, first: tl.constexpr, BLOCK_T: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = first + tl.arange(0, BLOCK_T)
    words = _rows(psi, first, BLOCK_T, R, T, R, BLOCK_R, False)
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
    factor, bn, bt, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of query and key, times ``factor``, with the bias, as exponents of 2."""
    s = tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor
    if BIAS:
        t = first + tl.arange(0, BLOCK_T)
        at = bias + rows.to(tl.int64)[:, None] * bn + t[None, :] * bt
        inside = (rows < N)[:, None] & (t < T)[None, :]
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    return s


@triton.jit
def _factors(scale, BIAS: tl.constexpr, POSITIVE: tl.constexpr):
    """What scores are multiplied by when they are made, and what again under their power: the
    latter costs nothing there, but the largest is still the largest only if it is positive."""
    if POSITIVE and not BIAS:
        return 1.0, scale * LOG2E
    else:
        return scale * LOG2E, 1.0


@triton.jit
def _within(
    s, first: tl.constexpr, BLOCK_T: tl.constexpr, T: tl.constexpr,
    low: tl.constexpr, high: tl.constexpr,
):  # fmt: skip
    """Scores, -inf outside of the segment from ``low`` up to ``high``."""
    if low > first or (high < T and high < first + BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        s = tl.where(((t >= low) & (t < high))[None, :], s, float("-inf"))
    return s


@triton.jit
def _powers(
    s0, s1, factor, T: tl.constexpr, BLOCK_T0: tl.constexpr, BLOCK_T1: tl.constexpr,
    low: tl.constexpr, high: tl.constexpr,
):  # fmt: skip
    """Of a segment's scores, in both tiles, times ``factor``: their powers over that of the
    largest, zero where closed; the sum of these; and the largest."""
    e0 = _within(s0, 0, BLOCK_T0, T, low, high)
    e1 = e0
    largest = tl.max(e0, 1)
    if BLOCK_T1 > 0:
        e1 = _within(s1, BLOCK_T0, BLOCK_T1, T, low, high)
        largest = tl.maximum(largest, tl.max(e1, 1))
    # In a row that may attend to nothing, powers are zeros then, and not NaN.
    largest = tl.where(largest == float("-inf"), 0.0, largest) * factor
    e0 = tl.exp2(e0 * factor - largest[:, None])
    total = tl.sum(e0, 1)
    if BLOCK_T1 > 0:
        e1 = tl.exp2(e1 * factor - largest[:, None])
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
    s0, s1, factor, weights, rows, N, T: tl.constexpr, BLOCK_T0: tl.constexpr,
    BLOCK_T1: tl.constexpr, SEGMENTS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The weighted sum of the segments' probabilities, of both tiles."""
    p0 = tl.zeros(s0.shape, tl.float32)
    p1 = tl.zeros(s1.shape, tl.float32)
    for i in tl.static_range(len(SEGMENTS) // 2):
        e0, e1, total, _ = _powers(
            s0, s1, factor, T, BLOCK_T0, BLOCK_T1, SEGMENTS[2 * i], SEGMENTS[2 * i + 1]
        )  # fmt: skip
        share = (_normalizer(total) * _weight(weights, rows, i, N, WEIGHTS))[:, None]
        p0 += e0 * share
        if BLOCK_T1 > 0:
            p1 += e1 * share
    return p0, p1


@triton.jit
def _gate(
    gates, phi, psi, gate_bias, fb, sb, N, T: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T0: tl.constexpr, BLOCK_T1: tl.constexpr, BIASED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: the bits [B, N, T / 32] of BLOCK_N rows' gates, for all heads."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    start = tl.program_id(0) * BLOCK_N
    rows = start + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    phi += b * fb
    psi += b * sb
    features = _rows(phi, start, BLOCK_N, R, N, R, BLOCK_R, EVEN)
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
    q, k, v, out, marks, tokens, bias, weights,
    qb, qh, qn, kb, kh, kt, vb, vh, vt, ob, oh, on,
    mb, tb, bb, bh, bn, bt, wb, N, share, tiles, longer, scale: tl.float32,
    T: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T0: tl.constexpr, BLOCK_T1: tl.constexpr,
    SEGMENTS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, REGIONS: tl.constexpr,
    BIAS: tl.constexpr, WEIGHTS: tl.constexpr, POSITIVE: tl.constexpr, EVEN: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
    AFTER_GATE: tl.constexpr,
):  # fmt: skip
    """One program: some tiles of rows of one head, whose keys and values stay where they are."""
    chunk = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    marks += b * mb
    tokens += b * tb
    bias += b * bb + h * bh
    weights += b * wb
    query_at = _at(q, b, qb, h, qh, ALIGNED)
    out_at = _at(out, b, ob, h, oh, ALIGNED)
    keys = _at(k, b // share, kb, h, kh, ALIGNED)
    values = _at(v, b // share, vb, h, vh, ALIGNED)
    before, after = _factors(scale, BIAS, POSITIVE)
    first = chunk * tiles + tl.minimum(chunk, longer)
    last = first + tiles + tl.where(chunk < longer, 1, 0)
    end = tl.minimum(N, last * BLOCK_N)
    start = first * BLOCK_N
    following = _rows(query_at, start, BLOCK_N, qn, N, D, BLOCK_D, EVEN)
    key0 = _rows(keys, 0, BLOCK_T0, kt, T, D, BLOCK_D, BLOCK_T0 <= T)
    value0 = _rows(values, 0, BLOCK_T0, vt, T, DV, BLOCK_DV, BLOCK_T0 <= T)
    if BLOCK_T1 > 0:
        key1 = _rows(keys, BLOCK_T0, BLOCK_T1, kt, T, D, BLOCK_D, False)
        value1 = _rows(values, BLOCK_T0, BLOCK_T1, vt, T, DV, BLOCK_DV, False)
    if AFTER_GATE:
        tl.extra.cuda.gdc_wait()
    rows = start + tl.arange(0, BLOCK_N)
    following_marks = _marks(marks, rows, N, T, WORDS, BITS, EVEN)
    for _tile in range(first, last):
        query, mark = following, following_marks
        # The next tile's are read while this one is computed, and the first beside the keys.
        following = _rows(query_at, start + BLOCK_N, BLOCK_N, qn, end, D, BLOCK_D, False)
        following_marks = _marks(marks, rows + BLOCK_N, end, T, WORDS, BITS, False)
        s0 = _scores(query, key0, bias, rows, 0, BLOCK_T0, N, T, before, bn, bt, BIAS, PRECISION)
        s1 = s0
        # Read anew for each tile, from the nearest cache: there are no registers to keep them in.
        regions0 = _regions_of(tokens, 0, BLOCK_T0, T, REGIONS)
        if BLOCK_T1 > 0:
            s1 = _scores(
                query, key1, bias, rows, BLOCK_T0, BLOCK_T1, N, T, before, bn, bt, BIAS, PRECISION
            )
            regions1 = _regions_of(tokens, BLOCK_T0, BLOCK_T1, T, REGIONS)
            s1 = _masked(s1, mark, regions1, BLOCK_T0, BLOCK_T1, T, BITS, REGIONS, PTX)
        s0 = _masked(s0, mark, regions0, 0, BLOCK_T0, T, BITS, REGIONS, PTX)
        if len(SEGMENTS) == 2:
            # What one softmax is divided by, its output may be as well, later.
            p0, p1, total, _ = _powers(
                s0, s1, after, T, BLOCK_T0, BLOCK_T1, SEGMENTS[0], SEGMENTS[1]
            )  # fmt: skip
            factor = _normalizer(total) * _weight(weights, rows, 0, N, WEIGHTS)
        else:
            p0, p1 = _softmax(
                s0, s1, after, weights, rows, N, T, BLOCK_T0, BLOCK_T1, SEGMENTS, WEIGHTS
            )  # fmt: skip
            factor = tl.full((BLOCK_N,), 1.0, tl.float32)
        found = tl.dot(p0.to(value0.dtype), value0, input_precision=PRECISION)
        if BLOCK_T1 > 0:
            found = tl.dot(p1.to(value1.dtype), value1, found, input_precision=PRECISION)
        _store(out_at, found * factor[:, None], start, on, N, DV, EVEN)
        start += BLOCK_N
        rows += BLOCK_N


@triton.jit
def _score_gradients(
    p0, p1, s0, s1, factor, g0, g1, weights, rows, N, T: tl.constexpr,
    BLOCK_T0: tl.constexpr, BLOCK_T1: tl.constexpr, SEGMENTS: tl.constexpr, WEIGHTS: tl.constexpr,
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
                s0, s1, factor, T, BLOCK_T0, BLOCK_T1, SEGMENTS[2 * i], SEGMENTS[2 * i + 1]
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
def _store_sum(
    at, total, first: tl.constexpr, stride, T, D: tl.constexpr, TRANSPOSED: tl.constexpr
):
    if TRANSPOSED:
        total = tl.trans(total)
    _store(at, total, first, stride, T, D, False)


@triton.jit
def _backward(
    grad, q, k, v, dq, dk, dv, marks, tokens, bias, weights,
    gb, gh, gn, qb, qh, qn, kb, kh, kt, vb, vh, vt, db, dh, dn,
    mb, tb, bb, bh, bn, bt, wb, B, H, N, share, tiles, longer, scale: tl.float32,
    T: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T0: tl.constexpr, BLOCK_T1: tl.constexpr,
    SEGMENTS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, REGIONS: tl.constexpr,
    BIAS: tl.constexpr, WEIGHTS: tl.constexpr, POSITIVE: tl.constexpr,
    TRANSPOSED: tl.constexpr, NEED_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program: some tiles of rows of one head. dk and dv [chunk, B, T, H, ...] are what its
    tiles contribute, to be added up."""
    chunk = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    marks += b * mb
    tokens += b * tb
    bias += b * bb + h * bh
    weights += b * wb
    keys = _at(k, b // share, kb, h, kh, ALIGNED)
    values = _at(v, b // share, vb, h, vh, ALIGNED)
    before, after = _factors(scale, BIAS, POSITIVE)
    key0 = _rows(keys, 0, BLOCK_T0, kt, T, D, BLOCK_D, BLOCK_T0 <= T)
    value0 = _rows(values, 0, BLOCK_T0, vt, T, DV, BLOCK_DV, BLOCK_T0 <= T)
    dk0 = _no_sum(BLOCK_T0, BLOCK_D, TRANSPOSED)
    dv0 = _no_sum(BLOCK_T0, BLOCK_DV, TRANSPOSED)
    if BLOCK_T1 > 0:
        key1 = _rows(keys, BLOCK_T0, BLOCK_T1, kt, T, D, BLOCK_D, False)
        value1 = _rows(values, BLOCK_T0, BLOCK_T1, vt, T, DV, BLOCK_DV, False)
        dk1 = _no_sum(BLOCK_T1, BLOCK_D, TRANSPOSED)
        dv1 = _no_sum(BLOCK_T1, BLOCK_DV, TRANSPOSED)
    query_at = _at(q, b, qb, h, qh, ALIGNED)
    back_at = _at(grad, b, gb, h, gh, ALIGNED)
    first = chunk * tiles + tl.minimum(chunk, longer)
    last = first + tiles + tl.where(chunk < longer, 1, 0)
    start = first * BLOCK_N
    for _tile in range(first, last):
        rows = start + tl.arange(0, BLOCK_N)
        query = _rows(query_at, start, BLOCK_N, qn, N, D, BLOCK_D, EVEN)
        back = _rows(back_at, start, BLOCK_N, gn, N, DV, BLOCK_DV, EVEN)
        mark = _marks(marks, rows, N, T, WORDS, BITS, EVEN)
        s0 = _scores(query, key0, bias, rows, 0, BLOCK_T0, N, T, before, bn, bt, BIAS, PRECISION)
        s1 = s0
        # Read anew for each tile, from the nearest cache: there are no registers to keep them in.
        regions0 = _regions_of(tokens, 0, BLOCK_T0, T, REGIONS)
        if BLOCK_T1 > 0:
            s1 = _scores(
                query, key1, bias, rows, BLOCK_T0, BLOCK_T1, N, T, before, bn, bt, BIAS, PRECISION
            )
            regions1 = _regions_of(tokens, BLOCK_T0, BLOCK_T1, T, REGIONS)
            s1 = _masked(s1, mark, regions1, BLOCK_T0, BLOCK_T1, T, BITS, REGIONS, PTX)
        s0 = _masked(s0, mark, regions0, 0, BLOCK_T0, T, BITS, REGIONS, PTX)
        p0, p1 = _softmax(
            s0, s1, after, weights, rows, N, T, BLOCK_T0, BLOCK_T1, SEGMENTS, WEIGHTS
        )  # fmt: skip
        # Rounded here, so that they wait in shared memory, and not in registers, for their sum.
        part0, part1 = p0.to(back.dtype), p1.to(back.dtype)
        if NEED_Q or NEED_K:
            g0 = tl.dot(back, tl.trans(value0), input_precision=PRECISION)
            g1 = tl.dot(back, tl.trans(value1), input_precision=PRECISION) if BLOCK_T1 > 0 else g0
            d0, d1 = _score_gradients(
                p0, p1, s0, s1, after, g0, g1, weights, rows, N, T, BLOCK_T0, BLOCK_T1, SEGMENTS,
                WEIGHTS,
            )  # fmt: skip
            d0 = d0.to(query.dtype)
            if BLOCK_T1 > 0:
                d1 = d1.to(query.dtype)
        if NEED_Q:
            found = tl.dot(d0, key0, input_precision=PRECISION)
            if BLOCK_T1 > 0:
                found = tl.dot(d1, key1, found, input_precision=PRECISION)
            _store(_at(dq, b, db, h, dh, ALIGNED), found * scale, start, dn, N, D, EVEN)
        start += BLOCK_N
        # All sums at the end, when probabilities and gradients both are in shared memory: where
        # one took another's place there, ptxas 12.8 (Triton 3.6) made code that reads registers
        # before they are set. That of CUDA 13.0 does not.
        if NEED_V:
            dv0 = _summed(dv0, part0, back, TRANSPOSED, PRECISION)
            if BLOCK_T1 > 0:
                dv1 = _summed(dv1, part1, back, TRANSPOSED, PRECISION)
        if NEED_K:
            dk0 = _summed(dk0, d0, query, TRANSPOSED, PRECISION)
            if BLOCK_T1 > 0:
                dk1 = _summed(dk1, d1, query, TRANSPOSED, PRECISION)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    at = (chunk.to(tl.int64) * B + b) * T * H + h
    if NEED_K:
        _store_sum(dk + at * D, dk0 * scale, 0, H * D, T, D, TRANSPOSED)
        if BLOCK_T1 > 0:
            _store_sum(dk + at * D, dk1 * scale, BLOCK_T0, H * D, T, D, TRANSPOSED)
    if NEED_V:
        _store_sum(dv + at * DV, dv0, 0, H * DV, T, DV, TRANSPOSED)
        if BLOCK_T1 > 0:
            _store_sum(dv + at * DV, dv1, BLOCK_T0, H * DV, T, DV, TRANSPOSED)


@triton.jit
def _sum(
    parts_k, parts_v, dk, dv, size_k, size_v, chunks, share,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, AFTER_PARTS: tl.constexpr,
):  # fmt: skip
    """dk and dv [groups, size]: the sums of [chunks, groups, share, size]."""
    if AFTER_PARTS:
        tl.extra.cuda.gdc_wait()
    if tl.program_id(2) == 0:
        _sum_of(parts_k, dk, size_k, chunks, share, BLOCK, BLOCK_C)
    else:
        _sum_of(parts_v, dv, size_v, chunks, share, BLOCK, BLOCK_C)


@triton.jit
def _sum_of(parts, out, size, chunks, share, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group, groups = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, chunks * share, BLOCK_C):
        part = first + tl.arange(0, BLOCK_C)
        row = (part // share) * groups * share + part % share + group * share
        inside = (part < chunks * share)[:, None] & (at < size)[None, :]
        total += tl.sum(tl.load(parts + row[:, None] * size + at[None, :], inside, 0.0), 0)
    out += group * size
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _per_token(
    s0, s1, open0, open1, g0, g1, weights, rows, N, T: tl.constexpr, BLOCK_T0: tl.constexpr,
    BLOCK_T1: tl.constexpr, BLOCK_S: tl.constexpr, SEGMENTS: tl.constexpr, WEIGHTS: tl.constexpr,
    MULTIPLICATIVE: tl.constexpr,
):  # fmt: skip
    """The loss's gradients to the scores, or (MULTIPLICATIVE) to gates that multiply their powers;
    and to the weights of the segments [rows, BLOCK_S]. ``open``: scores, -inf where closed."""
    d0 = tl.zeros(s0.shape, tl.float32)
    d1 = tl.zeros(s1.shape, tl.float32)
    dw = tl.zeros((rows.shape[0], BLOCK_S), tl.float32)
    both: tl.constexpr = BLOCK_T0 + BLOCK_T1
    for i in tl.static_range(len(SEGMENTS) // 2):
        e0, e1, total, largest = _powers(
            open0, open1, 1.0, T, BLOCK_T0, BLOCK_T1, SEGMENTS[2 * i], SEGMENTS[2 * i + 1]
        )  # fmt: skip
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
            e0 = tl.minimum(s0 - lse[:, None], CLAMP * LOG2E)
            e0 = tl.exp2(_within(e0, 0, BLOCK_T0, both, SEGMENTS[2 * i], SEGMENTS[2 * i + 1]))
            if BLOCK_T1 > 0:
                e1 = tl.minimum(s1 - lse[:, None], CLAMP * LOG2E)
                e1 = tl.exp2(
                    _within(e1, BLOCK_T0, BLOCK_T1, both, SEGMENTS[2 * i], SEGMENTS[2 * i + 1])
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
    grad, q, k, v, marks, tokens, phi, psi, gate_bias, bias, weights,
    dphi, dpsi, dgate_bias, dbias, dweights,
    gb, gh, gn, qb, qh, qn, kb, kh, kt, vb, vh, vt,
    mb, tb, fb, sb, bb, bh, bn, bt, wb, B, N, share, tiles, longer, scale: tl.float32,
    T: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T0: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_S: tl.constexpr,
    HEADS: tl.constexpr, SEGMENTS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr,
    REGIONS: tl.constexpr, GATE: tl.constexpr, GATE_BIASED: tl.constexpr,
    MULTIPLICATIVE: tl.constexpr, BIAS: tl.constexpr, WEIGHTS: tl.constexpr,
    NEED_BIAS: tl.constexpr, NEED_WEIGHTS: tl.constexpr, EVEN: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Gradients to what is stated for all heads together: one program sums them over HEADS heads,
    for some tiles of rows."""
    chunk = tl.program_id(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    marks += b * mb
    tokens += b * tb
    bias += b * bb
    weights += b * wb
    if GATE:
        dpsi0 = tl.zeros((BLOCK_T0, BLOCK_R), tl.float32)
        if BLOCK_T1 > 0:
            dpsi1 = tl.zeros((BLOCK_T1, BLOCK_R), tl.float32)
        dshift = tl.zeros((BLOCK_N,), tl.float32)
    factor = scale * LOG2E
    first = chunk * tiles + tl.minimum(chunk, longer)
    for tile in range(first, first + tiles + tl.where(chunk < longer, 1, 0)):
        start = tile * BLOCK_N
        rows = start + tl.arange(0, BLOCK_N)
        mark = _marks(marks, rows, N, T, WORDS, BITS, EVEN)
        d0 = tl.zeros((BLOCK_N, BLOCK_T0), tl.float32)
        dw = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
        if BLOCK_T1 > 0:
            d1 = tl.zeros((BLOCK_N, BLOCK_T1), tl.float32)
        for i in range(HEADS):
            h = (group * HEADS + i).to(tl.int64)
            query = _rows(_at(q, b, qb, h, qh, ALIGNED), start, BLOCK_N, qn, N, D, BLOCK_D, EVEN)
            back = _rows(
                _at(grad, b, gb, h, gh, ALIGNED), start, BLOCK_N, gn, N, DV, BLOCK_DV, EVEN
            )
            keys = _at(k, b // share, kb, h, kh, ALIGNED)
            values = _at(v, b // share, vb, h, vh, ALIGNED)
            s0 = _scores(
                query, _rows(keys, 0, BLOCK_T0, kt, T, D, BLOCK_D, False), bias + h * bh, rows, 0,
                BLOCK_T0, N, T, factor, bn, bt, BIAS, PRECISION,
            )  # fmt: skip
            regions = _regions_of(tokens, 0, BLOCK_T0, T, REGIONS)
            open0 = _masked(s0, mark, regions, 0, BLOCK_T0, T, BITS, REGIONS, PTX)
            value = _rows(values, 0, BLOCK_T0, vt, T, DV, BLOCK_DV, False)
            g0 = tl.dot(back, tl.trans(value), input_precision=PRECISION)
            s1, open1, g1 = s0, open0, g0
            if BLOCK_T1 > 0:
                s1 = _scores(
                    query, _rows(keys, BLOCK_T0, BLOCK_T1, kt, T, D, BLOCK_D, False), bias + h * bh,
                    rows, BLOCK_T0, BLOCK_T1, N, T, factor, bn, bt, BIAS, PRECISION,
                )  # fmt: skip
                others = _regions_of(tokens, BLOCK_T0, BLOCK_T1, T, REGIONS)
                open1 = _masked(s1, mark, others, BLOCK_T0, BLOCK_T1, T, BITS, REGIONS, PTX)
                value = _rows(values, BLOCK_T0, BLOCK_T1, vt, T, DV, BLOCK_DV, False)
                g1 = tl.dot(back, tl.trans(value), input_precision=PRECISION)
            more0, more1, morew = _per_token(
                s0, s1, open0, open1, g0, g1, weights, rows, N, T, BLOCK_T0, BLOCK_T1, BLOCK_S,
                SEGMENTS, WEIGHTS, MULTIPLICATIVE,
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
            features = _rows(phi + b * fb, start, BLOCK_N, R, N, R, BLOCK_R, EVEN)
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
            token = _rows(psi + b * sb, 0, BLOCK_T0, R, T, R, BLOCK_R, False).to(like)
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
                token = _rows(psi + b * sb, BLOCK_T0, BLOCK_T1, R, T, R, BLOCK_R, False).to(like)
                dz = dz.to(like)
                found = tl.dot(dz, token, found, input_precision=WIDE)
                dpsi1 = tl.dot(tl.trans(dz), wide, dpsi1, input_precision=WIDE)
            _store(dphi + b * N * R, found * root, start, R, N, R, EVEN)
    if GATE:
        scaled: tl.constexpr = R**-0.5
        at = dpsi + (chunk.to(tl.int64) * B + b) * T * R
        _store(at, dpsi0 * scaled, 0, R, T, R, False)
        if BLOCK_T1 > 0:
            _store(at, dpsi1 * scaled, BLOCK_T0, R, T, R, False)
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
    wide: bool = False  # a backward's: sums for the text are transposed


# Numbers of a tile of keys, up to which a tile of rows fits beside it in registers, and that tile:
# rows, warps, stages, programs of a multiprocessor. By the compiler's report; more would spill.
FORWARD = ((5120, (64, 4, 1, 5)), (10240, (64, 4, 1, 2)), (20480, (32, 4, 1, 2)))
BACKWARD = ((5120, (64, 8, 1, 1)),)
# With Hopper's wide products, in 16 bits. Registers are full: four to eight of what is used after
# the loop wait in memory. In one stage they don't, and it takes 14 % longer.
WIDE_BACKWARD = ((5120, (64, 4, 3, 2, True)),)
LEAST = (16, 8, 1, 1)  # beyond
LONG = 8  # tiles of a program from which on four programs were faster than five, in one run
BOTH_SIZE = 16384  # beyond it the sums for dK and dV have no room together
AMD_SIZE = 10240  # beyond it AMD's chips spill
LOAD, SUMS = 1, 2  # what keys and values, and sums for dK and dV, take, in tiles of rows
GATE_ROWS, GATE_WARPS = 64, 4
REGISTERS = 65536  # of a multiprocessor
SUM_COLUMNS = 128
SCORES_ROWS, SCORES_WARPS = 32, 8


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
    tile = _tile(FORWARD, dtype, tokens, width)
    # Heads of 40 in 64 columns take more registers; held to as few as five programs need, they were
    # slower than four.
    return tile if width == _block(width) else replace(tile, programs=min(tile.programs, 4))


def backward_tile(
    q: Tensor, tokens: int, width: int, added: bool = False, single: bool = True
) -> Tile:
    """The same, for the gradients; ``added``: with a mask that is added, whose tile takes room;
    ``single``: with one segment, for more of which there is less room."""
    wide = q.dtype != torch.float32 and single and not added and chips.generation(q) in (9, 10)
    fits = WIDE_BACKWARD if wide else BACKWARD
    tile = _tile(fits, q.dtype, tokens, width * (2 if added else 1))
    if not single:
        tile = replace(tile, n=min(tile.n, 32))
    # Of AMD's wider warps, four hold what eight do here, and eight spill.
    return replace(tile, warps=4) if chips.amd() else tile


def _tile(
    fits: Sequence[tuple[int, tuple[Any, ...]]], dtype: torch.dtype, tokens: int, width: int
) -> Tile:
    size = _size(dtype, tokens, width)
    n, *others = next((found for most, found in fits if size <= most), LEAST)
    return Tile(n, *token_tiles(tokens), *others)


def refuses(q: Tensor, tokens: int, width: int) -> str | None:
    """Why these kernels can't take q [B, H, N, D] and so many tokens of this width; or None."""
    if q.dtype == torch.float64:
        return "it takes no float64"
    if tokens > MOST_TOKENS:
        return f"it takes up to {MOST_TOKENS} tokens, and these are {tokens}"
    wider = max(q.shape[-1], width)
    if chips.amd():
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
    numbers += (tile.stages - 1) * tile.n * 2 * block
    return int(numbers * (8 if q.dtype == torch.float32 else 2))


def _shared_memory(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return 1 << 30  # in the interpreter
    return torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin


def _rowwise(tensor: Tensor) -> Tensor:
    """Rows of numbers that lie side by side, a tile of them within 32 bits."""
    fits = tensor.stride(-1) == 1 and tensor.stride(-2) < MOST_STRIDE
    return tensor if fits else tensor.contiguous()


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
    if batch * heads * triton.cdiv(n, tile.n) >= LONG * tile.programs * chips.multiprocessors(q):
        tile = replace(tile, programs=min(tile.programs, 4))
    added = None if bias is None else bias.expand(batch, heads, n, count)
    chunks = _chunks(q, batch * heads, triton.cdiv(n, tile.n), tile.programs, LOAD)
    with chips.on(q):
        if phi is not None:
            _gates(gates, phi, psi, gate_bias, q.dtype, count)
            bits = gates
        marks = bits if pixels is None else pixels
        _forward[(chunks, heads, batch)](
            q, k, v, out, _or(marks, q), _or(tokens, q), _or(added, q),
            _or(weights, q),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            _batch_stride(marks), _batch_stride(tokens),
            *_strides(added), _batch_stride(weights), n, batch // len(k),
            *divmod(triton.cdiv(n, tile.n), chunks), scale,
            T=count, D=d, DV=width, BLOCK_D=_block(d), BLOCK_DV=_block(width),
            SEGMENTS=tuple(segments), POSITIVE=scale > 0,
            **_common((q, k, v, out), tile, bits, pixels, bias, weights),
            **_overlapping(q, "AFTER_GATE", phi is not None),
            **_registers(q, tile, pixels, bias is None and len(segments) == 2),
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
        PRECISION=chips.precision(dtype), EARLY=_overlaps(phi), num_warps=GATE_WARPS,
    )  # fmt: skip


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Something to point to, for what the kernel won't read."""
    return other if tensor is None else tensor


def _overlapping(tensor: Tensor, name: str, wanted: bool) -> dict[str, bool]:
    """Options of a kernel that begins while the one before it runs, once all of that one's programs
    let it (EARLY), and itself waits for that one's end before it reads what that one wrote
    (constant ``name``). Only for two launches in a row."""
    wanted = wanted and _overlaps(tensor)
    return {name: wanted, "launch_pdl": True} if wanted else {name: False}


def _overlaps(tensor: Tensor) -> bool:
    """Whether the chip has programmatic dependent launch."""
    return chips.generation(tensor) >= 9


def _registers(q: Tensor, tile: Tile, pixels: Tensor | None, wanted: bool) -> dict[str, int]:
    """The option by which a program takes so few that a multiprocessor does hold ``programs``, on
    the chip for which it was seen that none spill then."""
    narrow = pixels is None or pixels.element_size() <= 4
    if not wanted or not narrow or chips.generation(q) != 9:
        return {}
    each = REGISTERS // (32 * tile.warps * tile.programs)
    return {"maxnreg": min(255, each // 8 * 8)}


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _aligned(tensor: Tensor) -> bool:
    """Whether each head's rows begin at multiples of eight numbers."""
    return tensor.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in tensor.stride()[:3])


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
        "WORDS": _words(bits, pixels),
        "BITS": bits is not None,
        "REGIONS": pixels is not None,
        "BIAS": bias is not None,
        "WEIGHTS": weights is not None,
        "EVEN": q.shape[2] % tile.n == 0,
        "ALIGNED": all(map(_aligned, heads)),
        "PRECISION": chips.precision(q.dtype),
        "PTX": chips.generation(q) > 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _words(bits: Tensor | None, pixels: Tensor | None) -> int:
    return 1 if pixels is not None else 0 if bits is None else bits.shape[-1]


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
    marks = bits if pixels is None else pixels
    tile = backward_tile(q, count, max(d, width), bias is not None, len(segments) == 2)
    added = None if bias is None else bias.expand(batch, heads, n, count)
    every = triton.cdiv(n, tile.n)
    sums = need_k or need_v
    chunks = _chunks(q, batch * heads, every, tile.programs, SUMS if sums else LOAD)
    parts_k = q.new_empty((chunks, batch, count, heads, d) if need_k else 0, dtype=torch.float32)
    parts_v = q.new_empty(
        (chunks, batch, count, heads, width) if need_v else 0, dtype=torch.float32
    )
    wants = [(need_q, need_k, need_v)]
    if need_k and need_v and _size(q.dtype, count, max(d, width)) > BOTH_SIZE:
        wants = [(need_q, True, False), (False, False, True)]
    with chips.on(q):
        for want_q, want_k, want_v in wants:
            _backward[(chunks, heads, batch)](
                grad, q, k, v, dq, parts_k, parts_v, _or(marks, q), _or(tokens, q),
                _or(added, q), _or(weights, q),
                *grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                *(dq.stride()[:3] if need_q else (0, 0, 0)),
                _batch_stride(marks), _batch_stride(tokens),
                *_strides(added), _batch_stride(weights), batch, heads, n, share,
                *divmod(every, chunks), scale,
                T=count, D=d, DV=width, BLOCK_D=_block(d), BLOCK_DV=_block(width),
                SEGMENTS=tuple(segments), POSITIVE=scale > 0,
                TRANSPOSED=tile.wide, NEED_Q=want_q, NEED_K=want_k, NEED_V=want_v,
                EARLY=_overlaps(q),
                **_common(
                    (q, k, v, grad, *([dq] if need_q else [])), tile, bits, pixels, bias, weights
                ),
            )  # fmt: skip
        _add(parts_k, parts_v, dk, dv, groups, share)
    return dq, dk, dv


def _chunks(q: Tensor, each: int, most: int, programs: int, extra: int) -> int:
    """Into how many programs to part the ``most`` tiles of each of ``each`` heads, so that all take
    the least time: a multiprocessor holds ``programs``, and what one does besides takes as long as
    ``extra`` tiles."""
    slots = programs * chips.multiprocessors(q)

    def time(chunks: int) -> float:
        return triton.cdiv(each * chunks, slots) * (most / chunks + extra)

    full = (waves * slots // each for waves in range(1, 9))
    return min({max(1, min(most, chunks)) for chunks in (*full, most)}, key=time)


def _add(parts_k: Tensor, parts_v: Tensor, dk: Tensor, dv: Tensor, groups: int, share: int) -> None:
    """dk and dv, of which the memory is [groups, ...], from parts [chunks, groups · share, ...] in
    a fixed order; what is empty is not needed."""
    needed = [pair for pair in ((parts_k, dk), (parts_v, dv)) if pair[1].numel()]
    if needed:
        (first, one), (second, other) = needed[0], needed[-1]
        sizes = one.numel() // groups, other.numel() // groups
        _sum[(triton.cdiv(max(sizes), SUM_COLUMNS), groups, len(needed))](
            first, second, one, other, *sizes, len(first), share,
            BLOCK=SUM_COLUMNS, BLOCK_C=16, **_overlapping(dk, "AFTER_PARTS", True),
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
    marks = bits if pixels is None else pixels
    # Its programs hold more: scores and their gradients, and those to the features.
    tile = replace(tile, n=SCORES_ROWS, warps=SCORES_WARPS, stages=1)
    added = None if bias is None else bias.expand(batch, heads, n, count)
    groups = heads if need_bias and bias is not None and bias.shape[1] > 1 else 1
    features = phi.shape[-1] if need_gate and phi is not None else 1
    pieces = len(segments) // 2
    every = max(1, triton.cdiv(n, tile.n))
    chunks = _chunks(q, max(1, batch * groups), every, 2, SUMS)

    def empty(needed: bool, *shape: int, dtype: Any = torch.float32) -> Tensor:
        made = q.new_empty(shape if needed else 0, dtype=dtype)
        return made if grad.numel() else made.zero_()

    dphi = empty(need_gate, batch, n, features, dtype=None if phi is None else phi.dtype)
    dpsi = empty(need_gate, chunks, batch, count, features)
    dshift = empty(need_gate, chunks, batch)
    dbias = empty(need_bias, batch, groups, n, count)
    dweights = empty(need_weights, batch, groups, pieces, n)
    if grad.numel():
        with chips.on(q):
            _scores_backward[(chunks, groups, batch)](
                grad, q, k, v, _or(marks, q), _or(tokens, q), _or(phi, q),
                _or(psi, q), _or(gate_bias, q), _or(added, q), _or(weights, q),
                dphi, dpsi, dshift, dbias, dweights,
                *grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                _batch_stride(marks), _batch_stride(tokens),
                _batch_stride(phi), _batch_stride(psi), *_strides(added), _batch_stride(weights),
                batch, n, batch // len(k), *divmod(every, chunks), scale,
                T=count, D=d, DV=width, R=features, BLOCK_D=_block(d), BLOCK_DV=_block(width),
                BLOCK_R=_block(features), BLOCK_S=triton.next_power_of_2(pieces),
                HEADS=heads // groups, SEGMENTS=tuple(segments), GATE=need_gate,
                GATE_BIASED=gate_bias is not None, MULTIPLICATIVE=multiplicative and need_gate,
                NEED_BIAS=need_bias, NEED_WEIGHTS=need_weights,
                WIDE=chips.precision(q.dtype),
                **_common((q, k, v, grad), tile, bits, pixels, bias, weights),
            )  # fmt: skip
    return dphi, dpsi, dshift, dbias, dweights
