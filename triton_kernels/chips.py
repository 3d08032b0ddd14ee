"""What launchers ask of the chip that a tensor is on."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the tensor's device (on a CPU, to the interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def multiprocessors(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return 2  # in the interpreter: so few that programs take several tiles
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def amd() -> bool:
    return torch.version.hip is not None


def generation(tensor: Tensor) -> int:
    """Of NVIDIA's chips: 9 is Hopper, 10 Blackwell; 0 of others, and in the interpreter."""
    if amd() or not tensor.is_cuda:
        return 0
    return torch.cuda.get_device_capability(tensor.device)[0]


def precision(dtype: torch.dtype) -> str:
    """Of products: as exact as PyTorch, which does not multiply in TF32 unless asked for. Exact
    products of float32 take no tensor cores; three of TF32 are as good."""
    if dtype != torch.float32:
        return "tf32"
    return "ieee" if amd() else "tf32x3"
