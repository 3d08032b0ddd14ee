"""Delta Sampling's combination, guidance and step in Triton; and their gradient.

Each output is a sum of inputs, each times a number of its sample: see ``slopes`` of the op's file.
A program makes these numbers from the noise level, which it reads, and then a block of one sample.
All inputs are read once. A rescaling needs sums over whole samples: a first launch makes them, for
blocks, and each program of the second adds up those of its sample, in one order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdcore.triton_kernels import chips
from sdcore.triton_kernels.samples import number, offsets, put, read, row, steps

# Values of one program. At (1, 4, 128, 128) it has to fill the chip, at larger ones its latency has
# to be hidden: each thread then has eight.
SMALL_BLOCK, BLOCK, WARPS = 256, 1024, 4
FEW = 1 << 20  # values up to which blocks are small
SUMS_BLOCK, MOST_CHUNKS = 2048, 128  # of a sample, in the first launch of a rescaling


@triton.jit
def _clean(TYPE: tl.constexpr, a, s, over_n):
    """(X, P): the clean latents are X · sample + P · prediction; over_n is (a² + s²)^-½."""
    if TYPE == 0:
        return 1 / a, -s / a
    elif TYPE == 1:
        return a / (a * a + s * s), -s * over_n
    else:
        return 0 * a, 0 * a + 1


@triton.jit
def _over(TYPE: tl.constexpr, a, s, n):
    """1 / P."""
    if TYPE == 0:
        return -a / s
    elif TYPE == 1:
        return -n / s
    else:
        return 0 * a + 1


@triton.jit
def _slopes(
    a, s, next_a, next_s, strength,
    T: tl.constexpr, S: tl.constexpr, A: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """to_source, to_adapted, to_state, to_p, to_sample. Shorter chains of divisions than the
    formulas have: at the smallest sizes they take time. A root by the chip's own instruction, since
    an exact one has a branch in its code, after which alone predictions would be read."""
    to_source, to_adapted, to_state = -strength, strength, 0.0 * strength
    square = a * a + s * s
    n = tl.sqrt(square)
    over_n = 1 / n
    x_t, p_t = _clean(T, a, s, over_n)
    if T != S or T != A:
        x_s, p_s = _clean(S, a, s, over_n)
        x_a, p_a = _clean(A, a, s, over_n)
        over = strength * _over(T, a, s, n)
        to_source, to_adapted, to_state = -p_s * over, p_a * over, (x_a - x_s) * over
    to_p, to_sample = 0.0 * strength + 1, 0.0 * strength
    if OUTPUT == 1:
        to_p, to_sample = p_t, x_t
    if OUTPUT == 2:
        if T == 0:
            to_p, to_sample = next_s - next_a * (s / a), next_a / a
        elif T == 1:
            to_p = (next_s * a - next_a * s) / n
            to_sample = (next_a * a + next_s * s) / square
        else:
            to_p, to_sample = next_a - next_s * (a / s), next_s / s
    return to_source, to_adapted, to_state, to_p, to_sample


@triton.jit
def _sample_slopes(
    alpha, sigma, next_alpha, next_sigma, strengths, step_a, step_s, step_na, step_ns, step_l,
    strength, b, T: tl.constexpr, S: tl.constexpr, A: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """The slopes of sample b."""
    return _slopes(
        number(alpha, step_a, b, 1.0), number(sigma, step_s, b, 1.0),
        number(next_alpha, step_na, b, 1.0), number(next_sigma, step_ns, b, 1.0),
        strength * number(strengths, step_l, b, 1.0), T, S, A, OUTPUT,
    )  # fmt: skip


@triton.jit
def _branch(
    target, source, adapted, state, stride_t, stride_s, stride_a, stride_x, b, i, inside,
    to_source, to_adapted, to_state, LAYOUT: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    value = read(target, stride_t, b, i, inside, LAYOUT, SIDE)
    if source is not None:
        of_source = read(source, stride_s, b, i, inside, LAYOUT, 2 + SIDE)
        of_adapted = read(adapted, stride_a, b, i, inside, LAYOUT, 4 + SIDE)
        if state is not None:
            value += to_adapted * of_adapted + to_source * of_source
            value += to_state * read(state, stride_x, b, i, inside, LAYOUT, 7)
        else:  # of equal ones the difference is zero
            value += to_adapted * (of_adapted - of_source)
    return value


@triton.jit
def _merged(count, mean, square, values, inside):
    """With values more: how many, their mean, and the sum of squares of what they are off it."""
    there = tl.sum(inside.to(tl.float32))
    own = tl.sum(values) / tl.maximum(there, 1)
    off = tl.where(inside, values - own, 0)
    total = tl.maximum(count + there, 1)
    gap = own - mean
    square += tl.sum(off * off) + gap * gap * count * there / total
    return count + there, mean + gap * there / total, square


@triton.jit
def _sums(
    target, target_u, source, source_u, adapted, adapted_u, state, sums,
    alpha, sigma, strengths, guidances,
    stride_t, stride_tu, stride_s, stride_su, stride_a, stride_au, stride_x,
    step_a, step_s, step_l, step_g, strength, guidance, n, length,
    T: tl.constexpr, S: tl.constexpr, A: tl.constexpr, ALONE: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a part of a sample: number, mean and squares about it, of the conditional branch and of
    the guided prediction."""
    b, chunk = row(ALONE), tl.program_id(0)
    to_source, to_adapted, to_state, _, _ = _sample_slopes(
        alpha, sigma, None, None, strengths, step_a, step_s, 0, 0, step_l, strength, b, T, S, A, 0
    )
    g = guidance * number(guidances, step_g, b, 1.0)
    count, mean, square = 0.0, 0.0, 0.0
    count_p, mean_p, square_p = 0.0, 0.0, 0.0
    for first in range(chunk * length, tl.minimum((chunk + 1) * length, n), BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < tl.minimum((chunk + 1) * length, n)
        c = _branch(
            target, source, adapted, state, stride_t, stride_s, stride_a, stride_x, b, i, inside,
            to_source, to_adapted, to_state, LAYOUT, 0,
        )  # fmt: skip
        u = _branch(
            target_u, source_u, adapted_u, state, stride_tu, stride_su, stride_au, stride_x, b, i,
            inside, to_source, to_adapted, to_state, LAYOUT, 1,
        )  # fmt: skip
        c, u = tl.where(inside, c, 0), tl.where(inside, u, 0)
        count, mean, square = _merged(count, mean, square, c, inside)
        count_p, mean_p, square_p = _merged(count_p, mean_p, square_p, u + g * (c - u), inside)
    at = sums + (b * tl.num_programs(0) + chunk) * 5
    tl.store(at, count)
    tl.store(at + 1, mean)
    tl.store(at + 2, square)
    tl.store(at + 3, mean_p)
    tl.store(at + 4, square_p)


@triton.jit
def _spread(counts, means, squares):
    """The sum of squares about the mean of all, by that of parts."""
    mean = tl.sum(counts * means) / tl.sum(counts)
    off = means - mean
    return tl.sum(squares + counts * off * off)


@triton.jit
def _combine(
    target, target_u, source, source_u, adapted, adapted_u, sample, state, out, out_u, sums,
    alpha, sigma, next_alpha, next_sigma, strengths, guidances,
    stride_t, stride_tu, stride_s, stride_su, stride_a, stride_au, stride_x, stride_st, stride_o,
    step_a, step_s, step_na, step_ns, step_l, step_g, strength, guidance, rescale, n, chunks,
    T: tl.constexpr, S: tl.constexpr, A: tl.constexpr, GUIDED: tl.constexpr, OUTPUT: tl.constexpr,
    ALONE: tl.constexpr, LAYOUT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = row(ALONE)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    to_source, to_adapted, to_state, to_p, to_sample = _sample_slopes(
        alpha, sigma, next_alpha, next_sigma, strengths, step_a, step_s, step_na, step_ns, step_l,
        strength, b, T, S, A, OUTPUT,
    )  # fmt: skip
    c = _branch(
        target, source, adapted, state, stride_t, stride_s, stride_a, stride_st, b, i, inside,
        to_source, to_adapted, to_state, LAYOUT, 0,
    )  # fmt: skip
    moved = 0.0
    if OUTPUT > 0:
        moved = to_sample * read(sample, stride_x, b, i, inside, LAYOUT, 6)
    at = out + b * stride_o + offsets(i, LAYOUT, 8)
    if target_u is not None:
        u = _branch(
            target_u, source_u, adapted_u, state, stride_tu, stride_su, stride_au, stride_st, b, i,
            inside, to_source, to_adapted, to_state, LAYOUT, 1,
        )  # fmt: skip
        if GUIDED:
            c = u + guidance * number(guidances, step_g, b, 1.0) * (c - u)
        elif OUTPUT > 0:
            tl.store(out_u + b * stride_o + offsets(i, LAYOUT, 8), to_p * u + moved, inside)
        else:
            tl.store(out_u + b * stride_o + offsets(i, LAYOUT, 8), u, inside)
    if sums is not None:
        part = tl.arange(0, CHUNKS)
        there = part < chunks
        parts = sums + (b * chunks + part) * 5
        counts = tl.load(parts, there, 0)
        wanted = _spread(counts, tl.load(parts + 1, there, 0), tl.load(parts + 2, there, 0))
        found = _spread(counts, tl.load(parts + 3, there, 0), tl.load(parts + 4, there, 0))
        c *= rescale * tl.sqrt_rn(wanted / found) + (1 - rescale)
    if OUTPUT > 0:
        c = to_p * c + moved
    tl.store(at, c, inside)


@triton.jit
def _combine_backward(
    grad, grad_u, target, target_u, source, source_u, adapted, adapted_u, sample, state,
    alpha, sigma, next_alpha, next_sigma, strengths, guidances,
    stride_g, stride_t, stride_tu, stride_s, stride_su, stride_a, stride_au, stride_x, stride_st,
    step_a, step_s, step_na, step_ns, step_l, step_g, strength, guidance, n,
    T: tl.constexpr, S: tl.constexpr, A: tl.constexpr, GUIDED: tl.constexpr, OUTPUT: tl.constexpr,
    DELTA_U: tl.constexpr, ALONE: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = row(ALONE)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    to_source, to_adapted, to_state, to_p, to_sample = _sample_slopes(
        alpha, sigma, next_alpha, next_sigma, strengths, step_a, step_s, step_na, step_ns, step_l,
        strength, b, T, S, A, OUTPUT,
    )  # fmt: skip
    of_c = read(grad, stride_g, b, i, inside, LAYOUT, 8)
    of_u = tl.zeros_like(of_c)
    if grad_u is not None:
        of_u = read(grad_u, stride_g, b, i, inside, LAYOUT, 8)
    put(sample, stride_x, b, i, inside, to_sample * (of_c + of_u), LAYOUT, 6)
    of_c, of_u = to_p * of_c, to_p * of_u
    if GUIDED:
        g = guidance * number(guidances, step_g, b, 1.0)
        weight = g
        if DELTA_U:
            weight = 1.0  # the sum of g and 1 - g, in which both branches would cancel
        of_state = weight * of_c
        of_c, of_u = g * of_c, (1 - g) * of_c
    else:
        of_state = of_c
        if DELTA_U:
            of_state += of_u
    put(target, stride_t, b, i, inside, of_c, LAYOUT, 0)
    put(target_u, stride_tu, b, i, inside, of_u, LAYOUT, 1)
    put(source, stride_s, b, i, inside, to_source * of_c, LAYOUT, 2)
    put(source_u, stride_su, b, i, inside, to_source * of_u, LAYOUT, 3)
    put(adapted, stride_a, b, i, inside, to_adapted * of_c, LAYOUT, 4)
    put(adapted_u, stride_au, b, i, inside, to_adapted * of_u, LAYOUT, 5)
    put(state, stride_st, b, i, inside, to_state * of_state, LAYOUT, 7)


# ---------------------------------------------------------------------------------------------
# Launchers


def _block(values: int) -> int:
    return SMALL_BLOCK if values <= FEW else BLOCK


def combine(
    halves: Sequence[Tensor | None],
    parts: Sequence[Tensor | None],
    scalars: Sequence[Tensor | None],
    places: tuple,
    strength: float,
    guidance: float,
    rescale: float,
    types: Sequence[int],
    guided: bool,
    output: int,
) -> None:
    """Writes ``halves``, of the conditional branch and, if they stay apart, of the unconditional
    one, from the flat op's eight tensors and six scalars; ``places``: how samples lie in these
    tensors and in the first half."""
    target = parts[0]
    rows, n = len(target), target[0].numel() if len(target) else 0
    if n == 0:
        return
    kinds = dict(zip("TSA", types, strict=True)) | {"ALONE": rows == 1}
    sums, chunks = None, 0
    with chips.on(target):
        if rescale:
            chunks = min(MOST_CHUNKS, triton.cdiv(n, SUMS_BLOCK))
            sums = target.new_empty((rows, chunks, 5), dtype=torch.float32)
            predictions, few = [*parts[:6], parts[7]], [*scalars[:2], *scalars[4:]]
            _sums[(chunks, rows)](
                *predictions, sums, *few, *steps(predictions), *steps(few), strength, guidance,
                n, triton.cdiv(n, chunks), **kinds, LAYOUT=places, BLOCK=SUMS_BLOCK, num_warps=8,
            )  # fmt: skip
        block = _block(rows * n)
        _combine[(triton.cdiv(n, block), rows)](
            *parts, *halves, sums, *scalars, *steps([*parts, halves[0]]), *steps(scalars),
            strength, guidance, rescale, n, chunks, **kinds, GUIDED=guided, OUTPUT=output,
            LAYOUT=places, CHUNKS=MOST_CHUNKS, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip


def backward(
    halves: Sequence[Tensor | None],
    found: Sequence[Tensor | None],
    scalars: Sequence[Tensor | None],
    places: tuple,
    strength: float,
    guidance: float,
    types: Sequence[int],
    guided: bool,
    output: int,
    delta_u: bool,
) -> None:
    """Writes ``found``, the gradients to the flat op's eight tensors, where they are wanted, by
    ``halves``, those to what came out; ``places``: how samples lie in ``found`` and in the first
    half; ``delta_u``: whether the unconditional branch has a delta, too."""
    like = next(one for one in found if one is not None)
    rows, n = len(like), like[0].numel() if len(like) else 0
    if n == 0:
        return
    block = _block(rows * n)
    with chips.on(like):
        _combine_backward[(triton.cdiv(n, block), rows)](
            *halves, *found, *scalars, *steps([halves[0], *found]), *steps(scalars), strength,
            guidance, n, **dict(zip("TSA", types, strict=True)), GUIDED=guided, OUTPUT=output,
            DELTA_U=delta_u, ALONE=rows == 1, LAYOUT=places, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
