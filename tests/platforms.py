"""Where the tests of an op run: every backend on every device that it has."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest

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
