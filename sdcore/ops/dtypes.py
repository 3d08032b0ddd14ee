"""The dtypes of floats that ops take, and those that they compute in."""

from __future__ import annotations

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float32, of float64 float64."""
    return torch.promote_types(dtype, torch.float32)
