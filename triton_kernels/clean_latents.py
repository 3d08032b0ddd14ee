"""The clean latents of a prediction in Triton; and their gradient. Every value is read once, and
what depends on the noise level alone is made by each program, which reads the level itself."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sdcore.triton_kernels import chips
from sdcore.triton_kernels.samples import number, offsets, put, read, row, steps

# Values of one program: latents are few, and have to fill the chip.
BLOCK, WARPS = 256, 4


@triton.jit
def _of_channels(pointer, stride, i, inside, size, otherwise):
    """The number of each value's channel, of a tensor that may be absent."""
    if pointer is None:
        return otherwise
    else:
        return tl.load(pointer + i // size * stride, inside, 0).to(tl.float32)


@triton.jit
def _clean(
    sample, prediction, out, alpha, sigma, scale, shift, stride_x, stride_p, stride_o,
    step_a, step_s, step_scale, step_shift, n, size,
    KIND: tl.constexpr, ALONE: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``size``: the values of a channel, which follow each other in the order of i."""
    b = row(ALONE)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    a, s = number(alpha, step_a, b, 1.0), number(sigma, step_s, b, 1.0)
    value = read(prediction, stride_p, b, i, inside, LAYOUT, 1)
    if KIND == 0:
        value = tl.fma(-s, value, read(sample, stride_x, b, i, inside, LAYOUT, 0)) * (1 / a)
    elif KIND == 1:
        value = tl.fma(-s, value, a * read(sample, stride_x, b, i, inside, LAYOUT, 0))
    value *= _of_channels(scale, step_scale, i, inside, size, 1.0)
    value += _of_channels(shift, step_shift, i, inside, size, 0.0)
    tl.store(out + b * stride_o + offsets(i, LAYOUT, 2), value, inside)


@triton.jit
def _clean_backward(
    grad, to_sample, to_prediction, alpha, sigma, scale, stride_g, stride_x, stride_p,
    step_a, step_s, step_scale, n, size,
    KIND: tl.constexpr, ALONE: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = row(ALONE)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    a, s = number(alpha, step_a, b, 1.0), number(sigma, step_s, b, 1.0)
    of_clean = read(grad, stride_g, b, i, inside, LAYOUT, 0)
    of_clean *= _of_channels(scale, step_scale, i, inside, size, 1.0)
    if KIND == 0:
        of_clean *= 1 / a
        put(to_sample, stride_x, b, i, inside, of_clean, LAYOUT, 1)
        put(to_prediction, stride_p, b, i, inside, -s * of_clean, LAYOUT, 2)
    elif KIND == 1:
        put(to_sample, stride_x, b, i, inside, a * of_clean, LAYOUT, 1)
        put(to_prediction, stride_p, b, i, inside, -s * of_clean, LAYOUT, 2)
    else:
        put(to_prediction, stride_p, b, i, inside, of_clean, LAYOUT, 2)


# ---------------------------------------------------------------------------------------------
# Launchers. ``places``: how samples lie in the tensors of a kernel, going through channel after
# channel.


def clean(
    sample: Tensor,
    prediction: Tensor,
    out: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: int,
    places: tuple,
) -> None:
    rows, n = len(out), out[0].numel() if len(out) else 0
    if n == 0:
        return
    with chips.on(out):
        _clean[(triton.cdiv(n, BLOCK), rows)](
            sample, prediction, out, alpha, sigma, scale, shift,
            *steps([sample, prediction, out, alpha, sigma, scale, shift]), n, n // out.shape[1],
            KIND=kind, ALONE=rows == 1, LAYOUT=places, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def backward(
    grad: Tensor,
    to_sample: Tensor | None,
    to_prediction: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    scale: Tensor | None,
    kind: int,
    places: tuple,
) -> None:
    rows, n = len(grad), grad[0].numel() if len(grad) else 0
    if n == 0:
        return
    with chips.on(grad):
        _clean_backward[(triton.cdiv(n, BLOCK), rows)](
            grad, to_sample, to_prediction, alpha, sigma, scale,
            *steps([grad, to_sample, to_prediction, alpha, sigma, scale]), n, n // grad.shape[1],
            KIND=kind, ALONE=rows == 1, LAYOUT=places, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
