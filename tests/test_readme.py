"""What the README shows must run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from sdcore import cli

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_python_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which it is read, from the folder that the README is in."""
    pytest.importorskip("PIL", reason="reads a picture")
    pytest.importorskip("diffusers")
    monkeypatch.chdir(README.parent)
    names: dict[str, object] = {}
    exec(compile("\n".join(blocks("python")), "README.md", "exec"), names)
    assert isinstance(names["image"], torch.Tensor) and names["image"].grad is not None
    assert isinstance(names["loss"], torch.Tensor) and names["loss"] > 0
    assert len(names["observe"].records) == 4  # type: ignore[attr-defined]


def test_commands_exist() -> None:
    commands = re.findall(r"^sdcore (\w+)(.*?)(?: +#.*)?$", "\n".join(blocks("bash")), re.MULTILINE)
    known = {"info", "recolor", "generate", "color", "regions", "delta"}
    assert {name for name, _ in commands} == known
    for name, arguments in commands:
        parsed = cli._parser().parse_args([name, *shlex.split(arguments)])
        assert parsed.command == name


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./]+)\)", README.read_text()))
def test_links_lead_somewhere(path: str) -> None:
    assert (README.parent / path).exists()
