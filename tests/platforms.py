"""Where the tests of an op run: every backend on every device that it has."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest

import sdcore
from sdcore import backends


@dataclass(frozen=True)
class Platform:
    device: str
    backend: str

    def forced(self) -> contextlib.AbstractContextManager[None]:
        return sdcore.backend(self.backend)


def platforms(*names: str) -> list:
    """Parameters for the named backends. A Triton kernel runs on a GPU, and, in a process of its
    own with TRITON_INTERPRET=1, on the CPU; there nothing else runs."""
    found = []
    interpreted = backends.triton_interpreted()
    for name in names:
        if name == "triton":
            found.append(_param("cpu", name, pytest.mark.interpreter, interpreted))
            found.append(_param("cuda", name, pytest.mark.gpu, not interpreted))
        elif name == "cuda":
            found.append(_param("cuda", name, pytest.mark.gpu, not interpreted))
        elif name == "cpp":
            found.append(_param("cpu", name, (), not interpreted))
        else:
            found.append(_param("cpu", name, (), not interpreted))
            found.append(_param("cuda", name, pytest.mark.gpu, not interpreted))
    return found


def _param(device: str, name: str, marks: object, here: bool) -> object:
    marks = list(marks) if isinstance(marks, tuple) else [marks]
    if not here:
        marks.append(pytest.mark.skip(reason="only in the process with TRITON_INTERPRET=1"
                                      if name == "triton" else "TRITON_INTERPRET=1 is set"))  # fmt: skip
    return pytest.param(Platform(device, name), id=f"{device}-{name}", marks=marks)
