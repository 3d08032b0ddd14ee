"""The examples in docs/ run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import sdcore
from tests import pipelines

DOCS = Path(__file__).parent.parent / "docs"


def test_a_method_of_your_own(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (DOCS / "methods.md").read_text(), re.DOTALL)
    pipe = pipelines.small(pipelines.words(tmp_path), steps=4)
    names: dict[str, Any] = {"prompt": "a star", "pipe": pipe}
    plain = pipe("a star", generator=torch.Generator().manual_seed(0)).images[0]
    exec(compile(code, "methods.md", "exec"), names)
    assert len(names["calm"].moves) == 2
    assert names["calmer"].size == plain.size
    assert names["calmer"].tobytes() != plain.tobytes()
    with sdcore.patch(pipe, names["Calm"](0.0)):
        still = pipe("a star", generator=torch.Generator().manual_seed(0)).images[0]
    assert still.tobytes() == plain.tobytes()
