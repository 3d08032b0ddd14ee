"""Tensors as the compiled modules take them: addresses, sizes and strides.

A tensor must outlive the call that is given its address: it needs a name there.
"""

from __future__ import annotations

from torch import Tensor


def described(points: Tensor) -> tuple[int, str, tuple[int, ...], tuple[int, ...]]:
    """Address, dtype, shape and strides in elements."""
    return (
        points.data_ptr(),
        str(points.dtype).removeprefix("torch."),
        tuple(points.shape),
        points.stride(),
    )


def address(tensor: Tensor | None) -> int:
    """0 for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()
