"""What of wide attention is no plain product, in Triton.

Probabilities: each program multiplies a tile of queries and keys, takes the largest score of each
row off within its tile, and writes powers and, of each row, that score and their sum; a second
kernel then brings all tiles of a row to the same scale. Gradients: the product of the outputs'
gradients and values, and with it, before it is written, probabilities and row sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdcore.triton_kernels import chips

# A tile of scores, and what of the width is multiplied at a time.
ROWS, COLUMNS, WIDTH = 128, 128, 64
WARPS, STAGES = 8, 3
ALONG = 2048  # probabilities of a row that are brought to scale at a time


@triton.jit
def _product(
    a, b, stride_a, stride_b, n, T, D, row, column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of rows of a from ``row`` and of b from ``column``, D numbers each that lie side by side."""
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    k = tl.arange(0, WIDTH)
    from_a = a + rows.to(tl.int64)[:, None] * stride_a + k[None, :]
    from_b = b + columns.to(tl.int64)[None, :] * stride_b + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, D, WIDTH):
        there = first + k < D
        left = tl.load(from_a + first, (rows < n)[:, None] & there[None, :], 0)
        right = tl.load(from_b + first, there[:, None] & (columns < T)[None, :], 0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def _powers(
    q, k, p, largest, sums, batch_q, stride_q, batch_k, stride_k, batch_p, stride_p, n, T, D, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``scale``: with log2(e) in it."""
    tile, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row, column = tl.program_id(1) * ROWS, tile * COLUMNS
    scores = scale * _product(
        q + b * batch_q, k + b * batch_k, stride_q, stride_k, n, T, D, row, column,
        ROWS, COLUMNS, WIDTH, PRECISION,
    )  # fmt: skip
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    scores = tl.where((columns < T)[None, :], scores, float("-inf"))
    high = tl.max(scores, 1)
    powers = tl.exp2(scores - high[:, None])
    at = (b * n + rows) * tl.num_programs(0) + tile
    tl.store(largest + at, high, rows < n)
    tl.store(sums + at, tl.sum(powers, 1), rows < n)
    inside = (rows < n)[:, None] & (columns < T)[None, :]
    tl.store(
        p + b * batch_p + rows.to(tl.int64)[:, None] * stride_p + columns[None, :], powers, inside
    )


@triton.jit
def _scaled(
    p, largest, sums, batch_p, stride_p, n, T, tiles,
    COLUMNS: tl.constexpr, TILES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """One row: its tiles' powers, over the sum of them all."""
    row, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = tl.arange(0, TILES)
    first = (b * n + row) * tiles
    high = tl.load(largest + first + tile, tile < tiles, float("-inf"))
    of_tile = tl.load(sums + first + tile, tile < tiles, 0)
    highest = tl.max(high, 0)
    total = tl.sum(of_tile * tl.exp2(high - highest), 0)
    at = p + b * batch_p + row.to(tl.int64) * stride_p
    for start in range(0, T, ALONG):
        column = start + tl.arange(0, ALONG)
        own = tl.load(largest + first + column // COLUMNS, column < T, float("-inf"))
        value = tl.load(at + column, column < T, 0).to(tl.float32)
        tl.store(at + column, value * (tl.exp2(own - highest) / total), column < T)


@triton.jit
def _pulls(
    grad, v, p, off, out, batch_g, stride_g, batch_v, stride_v, batch_p, stride_p, n, T, D, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    row, column = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    of_p = _product(
        grad + b * batch_g, v + b * batch_v, stride_g, stride_v, n, T, D, row, column,
        ROWS, COLUMNS, WIDTH, PRECISION,
    )  # fmt: skip
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < T)[None, :]
    at = rows.to(tl.int64)[:, None]
    share = tl.load(p + b * batch_p + at * stride_p + columns[None, :], inside, 0).to(tl.float32)
    taken = tl.load(off + b * n + rows, rows < n, 0)
    found = scale * share * (of_p - taken[:, None])
    tl.store(out + (b * n + at) * T + columns[None, :], found, inside)


# ---------------------------------------------------------------------------------------------
# Launchers


def refuses(q: Tensor) -> str | None:
    """Why these kernels can't take it; None if they can."""
    if q.dtype == torch.float64:
        return "it takes no float64"
    if len(q) >= 2**16:
        return "it takes at most 65,535 heads"
    return None


def _rows(tensor: Tensor) -> Tensor:
    """With the numbers of a row side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _kinds(dtype: torch.dtype) -> dict[str, object]:
    rows, width = (ROWS, WIDTH) if dtype != torch.float32 else (ROWS // 2, WIDTH // 2)
    return {
        "ROWS": rows, "COLUMNS": COLUMNS, "WIDTH": width, "PRECISION": chips.precision(dtype),
        "num_warps": WARPS, "num_stages": 2 if chips.amd() else STAGES,
    }  # fmt: skip


def probabilities(q: Tensor, k: Tensor, scale: float, p: Tensor) -> None:
    """Writes softmax(scale · q kᵀ) to p, whose rows' numbers lie side by side."""
    q, k = _rows(q), _rows(k)
    (batch, n, d), tokens = q.shape, k.shape[1]
    if p.numel() == 0:
        return
    tiles, kinds = triton.cdiv(tokens, COLUMNS), _kinds(q.dtype)
    largest, sums = q.new_empty((2, batch, n, tiles), dtype=torch.float32)
    with chips.on(q):
        _powers[(tiles, triton.cdiv(n, kinds["ROWS"]), batch)](
            q, k, p, largest, sums, *q.stride()[:2], *k.stride()[:2], *p.stride()[:2], n, tokens,
            d, scale * 1.4426950408889634, **kinds,
        )  # fmt: skip
        _scaled[(n, batch)](
            p, largest, sums, *p.stride()[:2], n, tokens, tiles, COLUMNS=COLUMNS,
            TILES=triton.next_power_of_2(tiles), ALONG=min(ALONG, triton.next_power_of_2(tokens)),
            num_warps=4,
        )  # fmt: skip


def pulls(grad: Tensor, v: Tensor, p: Tensor, off: Tensor, scale: float) -> Tensor:
    """scale · p · (grad vᵀ - off)."""
    grad, v = _rows(grad), _rows(v)
    (batch, n, d), tokens = grad.shape, v.shape[1]
    out, kinds = p.new_empty((batch, n, tokens)), _kinds(p.dtype)
    if out.numel() == 0:
        return out
    with chips.on(p):
        _pulls[(triton.cdiv(tokens, COLUMNS), triton.cdiv(n, kinds["ROWS"]), batch)](
            grad, v, p, off, out, *grad.stride()[:2], *v.stride()[:2], *p.stride()[:2], n, tokens,
            d, scale, **kinds,
        )  # fmt: skip
    return out
