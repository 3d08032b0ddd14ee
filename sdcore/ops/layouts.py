"""How samples lie in memory, in several tensors at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from torch import Tensor


def dense_like(like: Tensor, rows: int) -> Tensor:
    """[rows, …] without gaps, samples one after another, each in memory as one of ``like`` is."""
    strides, step = [0] * like.ndim, 1
    for axis in reversed(_outermost_first(tuple(like.shape), like.stride())):
        strides[axis] = step
        step = step * like.shape[axis]
    strides[0] = step
    return like.new_empty_strided((rows, *like.shape[1:]), strides)


def joint(tensors: Sequence[Tensor | None]) -> tuple[tuple[int, ...], ...]:
    """Sizes of a sample's axes, and for each tensor its strides, so that going through the axes,
    the last one fastest, is going through the last tensor as it lies; neighbors are joined where
    all tensors allow it. () if samples have no gaps and lie alike in all. Strides of an absent
    tensor are 0."""
    shape = tuple(tensors[-1].shape)
    return _joint(shape, tuple(None if one is None else one.stride() for one in tensors))


def _outermost_first(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """A sample's axes. One of size 1 is where it is among the others, so that its stride, which
    says nothing, does not count."""
    axes = range(1, len(shape))
    return sorted(axes, key=lambda axis: (-strides[axis], axis))


@functools.lru_cache(1024)
def _joint(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...] | None, ...]
) -> tuple[tuple[int, ...], ...]:
    there = [one for one in strides if one is not None]
    groups: list[list[int]] = []  # axes that are one
    for axis in _outermost_first(shape, there[-1]):
        if shape[axis] == 1:
            continue
        if groups and all(one[groups[-1][-1]] == one[axis] * shape[axis] for one in there):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    lasts = [group[-1] for group in groups]
    if not groups or (len(groups) == 1 and all(one[lasts[0]] == 1 for one in there)):
        return ()
    sizes = tuple(math.prod(shape[axis] for axis in group) for group in groups)
    return (
        sizes,
        *(
            (0,) * len(lasts) if one is None else tuple(one[last] for last in lasts)
            for one in strides
        ),
    )
