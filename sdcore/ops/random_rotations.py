"""Random rotations: directions in orthonormal triples, as SW-Guidance draws them."""

from __future__ import annotations

import torch
from torch import Tensor


def random_rotations(
    count: int,
    d: int,
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``count`` independent rotations of R^d, uniform (Haar) on SO(d).

    The rows of a rotation are d orthonormal directions, so ``random_rotations(K, 3).flatten(0, 1)``
    is a set of 3K directions for :func:`sliced_wasserstein`.

    Args:
        count: how many, 0 or more.
        d: dimension, 1 or more.
        generator: random source; its device is used if ``device`` is not given.
        device: where the result lives. A generator must be on the same device.
        dtype: float32 or float64.

    Returns:
        [count, d, d], with R Rᵀ = 1 and det R = +1 to the rounding of ``dtype``.

    Method: the subgroup algorithm (Diaconis and Shahshahani, 1987; Stewart, 1980). A uniform
    rotation of R^k is one that takes the first axis to a uniform point of the sphere, after a
    uniform rotation of the other k − 1 axes. O(count·d³) operations in d steps; no
    factorization, hence no host synchronization on a GPU.

    Raises:
        ValueError: negative count, d < 1, another dtype, a generator on another device.
    """
    if count < 0 or d < 1:
        raise ValueError(f"count must be at least 0 and d at least 1; got count={count}, d={d}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
    device = resolve_device(generator, device)
    rotation = torch.ones(count, 1, 1, device=device, dtype=dtype)
    for k in range(2, d + 1):
        axis = random_directions((count, k), generator, device, dtype)
        # The reflection that swaps the first axis and `axis`. With the sign of the last axis
        # turned it is a rotation, and still takes the first axis to `axis`.
        normal = axis.clone()
        normal[:, 0] -= 1
        normal = torch.nn.functional.normalize(normal, dim=1)
        inner = torch.zeros(count, k, k, device=device, dtype=dtype)
        inner[:, 0, 0] = 1
        inner[:, 1:, 1:] = rotation
        inner[:, -1] *= -1
        along = (normal[:, :, None] * inner).sum(1, keepdim=True)
        rotation = inner - 2 * normal[:, :, None] * along
    return rotation


def random_directions(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Unit vectors along the last dimension, uniform on the sphere."""
    gaussian = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    return torch.nn.functional.normalize(gaussian, dim=-1)


def resolve_device(
    generator: torch.Generator | None, device: torch.device | str | None
) -> torch.device:
    """The device to draw on. Drawing elsewhere and copying would stall a GPU's stream."""
    if device is None:
        return generator.device if generator is not None else torch.device("cpu")
    device = torch.device(device)
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"generator must be on {device.type}, as the result; got one on {generator.device}"
        )
    return device
