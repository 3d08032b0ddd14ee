"""Whether a folder holds what was put there: SHA-256 of its files, as ``sha256sum`` writes it."""

from __future__ import annotations

import hashlib
from pathlib import Path

NAME = "SHA256SUMS"


def write(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / NAME).write_text("".join(lines))


def check(folder: Path) -> None:
    """Raises:
    ValueError: a file is missing, is not the one that was put there, or was not put there.
    """
    sums = folder / NAME
    if not sums.is_file():
        raise ValueError(f"{folder} has no {NAME}: it is no embedded model, or not all of one")
    expected = {}
    for line in sums.read_text().splitlines():
        digest, _, name = line.partition("  ")
        expected[name] = digest
    present = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path.name != NAME
    }
    for name in sorted(expected.keys() | present.keys()):
        if name not in present:
            raise ValueError(f"{folder / name} is missing")
        if name not in expected:
            raise ValueError(f"{folder / name} does not belong to this embedded model")
        if _digest(present[name]) != expected[name]:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the one in {NAME}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
