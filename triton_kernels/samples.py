"""What kernels that go through samples value by value, of any layout, have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_SPAN = 2**31  # of a sample's values in memory: offsets within it are 32 bits


@triton.jit
def row(ALONE: tl.constexpr):
    """Which one a program works on; of one alone addresses are known sooner."""
    if ALONE:
        return 0
    else:
        return tl.program_id(1).to(tl.int64)


@triton.jit
def number(pointer, stride, b, otherwise):
    """A sample's, of a tensor that may be absent."""
    if pointer is None:
        return otherwise
    else:
        return tl.load(pointer + b * stride).to(tl.float32)


@triton.jit
def offsets(i, LAYOUT: tl.constexpr, WHICH: tl.constexpr):
    """Where the i-th value of a sample is in tensor WHICH. LAYOUT: the sizes of the axes, and for
    each tensor its strides; empty where all lie alike and without gaps."""
    if len(LAYOUT) == 0:
        return i
    else:
        rest = i
        out = 0 * i
        for axis in tl.static_range(len(LAYOUT[0]) - 1, -1, -1):
            if axis > 0:
                out += rest % LAYOUT[0][axis] * LAYOUT[1 + WHICH][axis]
                rest = rest // LAYOUT[0][axis]
            else:
                out += rest * LAYOUT[1 + WHICH][axis]
        return out


@triton.jit
def read(pointer, stride, b, i, inside, LAYOUT: tl.constexpr, WHICH: tl.constexpr):
    return tl.load(pointer + b * stride + offsets(i, LAYOUT, WHICH), inside, 0).to(tl.float32)


@triton.jit
def put(pointer, stride, b, i, inside, value, LAYOUT: tl.constexpr, WHICH: tl.constexpr):
    if pointer is not None:
        tl.store(pointer + b * stride + offsets(i, LAYOUT, WHICH), value, inside)


# ---------------------------------------------------------------------------------------------
# For launchers


def refuses(*tensors: Tensor | None) -> str | None:
    """Why these kernels can't take the tensors; None if they can."""
    for one in tensors:
        if one is None:
            continue
        if one.dtype == torch.float64:
            return "it takes no float64"
        span = sum(
            (size - 1) * step for size, step in zip(one.shape[1:], one.stride()[1:], strict=True)
        )
        if span >= MOST_SPAN:
            return "a sample's values span 2^31 places in memory or more"
    return None


def steps(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if one is None else one.stride(0) for one in tensors]
