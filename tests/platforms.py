"""Where the tests of an op run: every backend on every device that it has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import sdcore


@dataclass(frozen=True)
class Platform:
    device: str
    backend: str

    def forced(self) -> contextlib.AbstractContextManager[None]:
        return sdcore.backend(self.backend)


def platforms(*names: str) -> list:
    """Parameters for the named backends.

    Triton kernels run on a GPU, and on the CPU in a process of its own with TRITON_INTERPRET=1,
    which selects the tests marked ``interpreter``.
    """
    devices = {
        "reference": ("cpu", "cuda"),
        "cpp": ("cpu",),
        "triton": ("cpu", "cuda"),
        "cuda": ("cuda",),
    }
    return [_param(device, name) for name in names for device in devices[name]]


def _param(device: str, name: str) -> object:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    if (device, name) == ("cpu", "triton"):
        marks.append(pytest.mark.interpreter)
    return pytest.param(Platform(device, name), id=f"{device}-{name}", marks=marks)


def assert_replays(function: Callable[[], Sequence[Tensor]]) -> None:
    """On a GPU: it repeats bit for bit, waits for nothing, and does the same from a CUDA graph. Its
    results must be without history, which would keep gradients on the stream of the call."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        wanted = function()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for one, other in zip(again, wanted, strict=True):
            assert one.equal(other)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = function()
        for one in found:
            one.zero_()
        graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(found, wanted, strict=True):
        assert one.equal(other)


def assert_as_good(
    ours: Tensor,
    plain: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    slack: float = 1.0,
) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus ``slack`` times its epsilon
    (of float64 1e-15)."""
    assert ours.dtype == plain.dtype
    epsilon = slack * (1e-15 if dtype == torch.float64 else torch.finfo(dtype).eps)
    ours, plain = ours.detach().cpu().double(), plain.detach().double()
    error, allowed = (ours - exact).norm(), 2 * (plain - exact).norm() + epsilon * exact.norm()
    assert error <= allowed, f"{error:.3g}, allowed {allowed:.3g}"
