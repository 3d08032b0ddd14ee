from __future__ import annotations

import pytest
import torch

from sdcore.ops import random_rotations

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 7, 32])
def test_is_a_rotation(d: int, dtype: torch.dtype, device: str) -> None:
    rotations = random_rotations(20, d, device=device, dtype=dtype)
    assert rotations.shape == (20, d, d) and rotations.dtype == dtype
    tolerance = 50 * torch.finfo(dtype).eps
    identity = torch.eye(d, device=device, dtype=dtype)
    torch.testing.assert_close(
        rotations @ rotations.mT, identity.expand(20, d, d), rtol=0, atol=tolerance
    )
    determinant = torch.linalg.det(rotations.cpu())
    torch.testing.assert_close(determinant, torch.ones(20, dtype=dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize("d", [2, 3, 5])
def test_is_uniform(d: int) -> None:
    """Moments of the Haar measure on SO(d): E R = 0, E R_ij^2 = 1/d, E R_11 R_22 = E det-part,
    and no direction preferred after a fixed rotation."""
    count = 200_000
    rotations = random_rotations(count, d, torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = 5 / count**0.5
    assert rotations.mean(0).abs().max() < noise
    assert ((rotations**2).mean(0) - 1 / d).abs().max() < noise
    # The fourth moment tells the sphere from, say, normalized cubes.
    assert ((rotations**4).mean(0) - 3 / (d * (d + 2))).abs().max() < noise
    # E (tr R)^2 = 1 on SO(d) for d > 2, 2 on SO(2): rows are dependent in the right way.
    trace = rotations.diagonal(dim1=1, dim2=2).sum(1)
    assert abs((trace**2).mean() - (2 if d == 2 else 1)) < 5 * noise


def test_generator_decides() -> None:
    first = random_rotations(3, 3, torch.Generator().manual_seed(5))
    again = random_rotations(3, 3, torch.Generator().manual_seed(5))
    other = random_rotations(3, 3, torch.Generator().manual_seed(6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_empty() -> None:
    assert random_rotations(0, 3).shape == (0, 3, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"count": -1, "d": 3}, "count"),
        ({"count": 1, "d": 0}, "d at least 1"),
        ({"count": 1, "d": 3, "dtype": torch.float16}, "float16"),
        ({"count": 1, "d": 3, "device": "meta", "generator": torch.Generator()}, "generator"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_rotations(**arguments)


@pytest.mark.gpu
def test_does_not_synchronize() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    random_rotations(10, 3, generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert random_rotations(10, 3, generator).is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
