"""Two benchmarks' CSVs beside each other."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import compare, measure

HEAD = (*compare.KEY, "milliseconds", "spread", "check")


def written(path: Path, rows: dict[str, tuple[float, float]], device: str = "a GPU") -> Path:
    lines = [
        {
            "op": "op", "case": case, "implementation": "ours", "dtype": "bfloat16",
            "timing": "graph", "device": device, "milliseconds": taken, "spread": spread,
        }
        for case, (taken, spread) in rows.items()
    ]  # fmt: skip
    measure.write_csv(HEAD, lines, path)
    return path


def test_what_changed_beyond_noise(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = written(
        tmp_path / "a.csv",
        {
            "slow": (1.0, 0.01),
            "fast": (1.0, 0.01),
            "noisy": (1.0, 0.1),
            "near": (1, 0),
            "old": (1, 0),
            "older": (1, 0),
            "once": (1, math.nan),
            "once, far": (1, math.nan),
        },
    )
    after = written(
        tmp_path / "b.csv",
        {
            "fast": (0.8, 0.01),
            "slow": (1.2, 0.01),
            "noisy": (1.3, 0.1),
            "near": (1.02, 0),
            "new": (1, 0),
            "once": (1.3, math.nan),
            "once, far": (1.7, math.nan),
        },
    )
    found, alone = compare.changes(before, after)
    verdicts = {one.key[1]: one.verdict(0.03) for one in found}
    assert verdicts == {
        "slow": "slower", "fast": "faster", "noisy": "same", "near": "same", "once": "same",
        "once, far": "slower",
    }  # fmt: skip
    assert {one.key[1]: one.verdict(0.01) for one in found}["near"] == "slower"
    assert [line.removeprefix("only in ") for line in alone] == [
        f"{before}: op: old, ours, bfloat16, graph, a GPU, and 1 more",
        f"{after}: op: new, ours, bfloat16, graph, a GPU",
    ]
    capsys.readouterr()
    assert compare.main([str(before), str(after)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-4:-1]] == [
        ["slower", "once,"], ["slower", "slow"], ["faster", "fast"],
    ]  # fmt: skip
    assert lines[-1] == "3 of 6 are the same within noise"
    assert compare.main([str(after), str(after)]) == 0


def test_files_that_cant_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = written(tmp_path / "a.csv", {"x": (1.0, 0.0)})
    other = written(tmp_path / "b.csv", {"x": (1.0, 0.0)}, device="another")
    (tmp_path / "c.csv").write_text("a,b\n1,2\n")
    twice = tmp_path / "d.csv"
    twice.write_text(one.read_text() + one.read_text().splitlines()[1] + "\n")
    for files, message in (
        ((one, other), "no row in common"),
        ((one, tmp_path / "c.csv"), "c.csv is no benchmark's CSV: it lacks op, case"),
        ((one, tmp_path / "nowhere.csv"), "nowhere.csv"),
        ((one, twice), "d.csv has two rows of op, x, ours"),
    ):
        assert compare.main(list(map(str, files))) == 2
        assert message in capsys.readouterr().err


# Others are of pictures and distances.
TIMES = [
    path
    for path in sorted(Path("benchmarks/results").glob("*.csv"))
    if "milliseconds" in path.read_text().partition("\n")[0]
]


@pytest.mark.parametrize("path", TIMES, ids=lambda path: path.stem)
def test_what_is_committed_can_be_read(path: Path) -> None:
    assert len(TIMES) >= 13
    assert compare.read(path)
