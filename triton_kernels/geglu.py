"""GEGLU in Triton; and its gradient.

A program has a tile of the output: columns of a row, of several where rows are short. What it reads
of x lies there, and as far behind as a row of the output is long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdcore.triton_kernels import chips

# Values of a tile, and its warps: eight a thread, 16 bytes of a half type at once. What of a row's
# last tile is idle still computes, and 47 instructions a value, for erf most of them, take an H100
# about four fifths of the time that its memory takes for the six bytes (counted, not measured).
# Rows of Stable Diffusion's are multiples of 1280 long: of 512 values no tile, or half of one, is
# idle.
BLOCK, WARPS = 512, 2


@triton.jit
def _tile(n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program: its rows, as a column, and its columns, as a row."""
    across = (n - 1) // COLUMNS + 1
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS
    column = (tl.program_id(0) % across).to(tl.int64) * COLUMNS
    return row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _start(rows, run, step, outer):
    """Where rows begin that lie ``step`` apart, in runs of so many that lie ``outer`` apart; all in
    one run if its length is None."""
    if run is None:
        return rows * step
    else:
        return rows // run * outer + rows % run * step


@triton.jit
def _normal(gate):
    """The normal distribution up to here; gelu is the gate times it."""
    return 0.5 * (1 + tl.erf(gate * 0.7071067811865476))


@triton.jit
def _geglu(
    x, out, run, step, outer, rows, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, column = _tile(n, ROWS, COLUMNS)
    inside = (row < rows) & (column < n)
    at = x + _start(row, run, step, outer) + column
    value = tl.load(at, inside, 0).to(tl.float32)
    gate = tl.load(at + n, inside, 0).to(tl.float32)
    tl.store(out + row * n + column, value * (gate * _normal(gate)), inside)


@triton.jit
def _geglu_backward(
    grad, x, out, run_g, step_g, outer_g, run, step, outer, rows, n,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = _tile(n, ROWS, COLUMNS)
    inside = (row < rows) & (column < n)
    at = x + _start(row, run, step, outer) + column
    value = tl.load(at, inside, 0).to(tl.float32)
    gate = tl.load(at + n, inside, 0).to(tl.float32)
    of_out = tl.load(grad + _start(row, run_g, step_g, outer_g) + column, inside, 0).to(tl.float32)
    normal = _normal(gate)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    to = out + 2 * row * n + column
    tl.store(to, of_out * (gate * normal), inside)
    tl.store(to + n, of_out * value * (normal + gate * density), inside)


# ---------------------------------------------------------------------------------------------
# Launchers


def refuses(x: Tensor) -> str | None:
    """Why these kernels can't take it; None if they can."""
    return "it takes no float64" if x.dtype == torch.float64 else None


def _rows(tensor: Tensor) -> tuple[Tensor, int | None, int, int]:
    """The tensor, and how its rows lie: see ``_start``. A copy, if that can't be said, or what is
    in a row has gaps."""
    runs: list[tuple[int, int]] = []  # length and stride, the outermost first
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        elif size > 1:
            runs.append((size, stride))
    if len(runs) > 2 or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        tensor, runs = tensor.contiguous(), [(0, tensor.shape[-1])]
    if len(runs) == 2:
        (_, outer), (length, step) = runs
        return tensor, length, step, outer
    return tensor, None, runs[0][1] if runs else 0, 0


def _shape(out: Tensor, n: int) -> tuple[tuple[int], dict[str, int]]:
    """Programs, and what they are compiled for."""
    columns = min(BLOCK, triton.next_power_of_2(n))
    rows = BLOCK // columns
    grid = (triton.cdiv(out.numel() // out.shape[-1], rows) * triton.cdiv(n, columns),)
    return grid, {"ROWS": rows, "COLUMNS": columns, "num_warps": WARPS}


def forward(x: Tensor, out: Tensor) -> None:
    """Writes ``out``, which is contiguous."""
    n = out.shape[-1]
    if out.numel() == 0:
        return
    x, *places = _rows(x)
    grid, kinds = _shape(out, n)
    with chips.on(x):
        _geglu[grid](x, out, *places, out.numel() // n, n, **kinds)


def backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    """Writes ``out``, the gradient to x, which is contiguous, by that to what came out."""
    n = grad.shape[-1]
    if out.numel() == 0:
        return
    grad, *of_grad = _rows(grad)
    x, *places = _rows(x)
    grid, kinds = _shape(out, n)
    with chips.on(x):
        _geglu_backward[grid](grad, x, out, *of_grad, *places, grad.numel() // n, n, **kinds)
