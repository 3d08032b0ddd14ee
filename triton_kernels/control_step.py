"""A step of gradient descent on what is added to a sample, and the sum, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sdcore.triton_kernels import chips
from sdcore.triton_kernels.samples import number, put, read, row, steps

# Values of one program, as in clean_latents.
BLOCK, WARPS = 256, 4


@triton.jit
def _step(
    control, gradient, stepped, sample, moved, factors, rate, stride_c, stride_g, stride_o,
    stride_x, stride_m, step_f, by, n, n_control,
    ALONE: tl.constexpr, CONTROL: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the n values of a sample the first n_control have one of the control. CONTROL and SAMPLE:
    how these, and those that are like them, lie."""
    b = row(ALONE)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, held = i < n, i < n_control
    by *= number(rate, 0, b, 1.0) * number(factors, step_f, b, 1.0)
    value = read(control, stride_c, b, i, held, CONTROL, 0)
    value = tl.fma(-by, read(gradient, stride_g, b, i, held, CONTROL, 1), value)
    put(stepped, stride_o, b, i, held, value, CONTROL, 2)
    value = read(sample, stride_x, b, i, inside, SAMPLE, 0) + tl.where(held, value, 0)
    put(moved, stride_m, b, i, inside, value, SAMPLE, 1)


def step(
    control: Tensor,
    gradient: Tensor,
    stepped: Tensor,
    sample: Tensor,
    moved: Tensor,
    factors: Tensor | None,
    rate: Tensor | None,
    by: float,
    places: tuple[tuple, tuple],
) -> None:
    """Writes ``stepped`` and ``moved``; ``places``: how samples lie in the first three, and in the
    other two, going through channel after channel."""
    rows, n = len(sample), sample[0].numel() if len(sample) else 0
    if n == 0:
        return
    with chips.on(sample):
        _step[(triton.cdiv(n, BLOCK), rows)](
            control, gradient, stepped, sample, moved, factors, rate,
            *steps([control, gradient, stepped, sample, moved, factors]), by, n,
            control[0].numel(), ALONE=rows == 1, CONTROL=places[0], SAMPLE=places[1],
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
