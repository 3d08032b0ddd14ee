"""The benchmarks' runner: its schema, its CSV, what it does with results that are wrong."""

from __future__ import annotations

import contextlib
import csv
import importlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import bench_sliced_wasserstein, charts, measure, scaling, suite
from benchmarks.measure import Row
from benchmarks.suite import Asked

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
WITH_TIMES = [
    path
    for path in sorted(RESULTS.glob("*.csv"))
    if path.read_text().startswith("op,case,implementation,dtype,milliseconds")
]


def row(case: str = "a", name: str = "ours", milliseconds: float = 2.0, **more: object) -> Row:
    made = Row("op", case, name, "float32", milliseconds, 0.1, "wall clock", "float64", **more)
    made.device = "a device"
    return made


class Fixed:
    """Ceilings that are known, so that nothing has to be measured."""

    def __init__(self, device: str) -> None:
        self.rows = [row("copy", "this machine")]

    def measure(self, *dtypes: torch.dtype) -> None:
        pass


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> dict[str, suite.Rows]:
    """What the runner finds instead of the real ones."""
    made: dict[str, suite.Rows] = {}
    monkeypatch.setattr(suite, "Ceilings", Fixed)
    monkeypatch.setattr(runner, "names", lambda: list(made))
    monkeypatch.setattr(runner, "rows_of", lambda name: made[name])
    return made


def good(name: str) -> suite.Rows:
    def rows(asked: Asked) -> Iterator[Row]:
        yield Row(name, "c", "ours", "float32", 1.0, 0, "", "exact", ratios={"p": 3}, passed=True)
        yield Row(name, "c", "p", "float32", 3.0, 0, "", "the peer")

    return rows


def ops(path: Path) -> list[str]:
    return [one.op for one in measure.read(path) if one.case != "copy"]


def test_a_row_survives_its_file(tmp_path: Path) -> None:
    made = row(ratios={"SDPA, mask of its dtype": 1.5, "x": 2.0}, passed=True, driver="1.2")
    made.against(measure.Work(0.5, "copy 8 GB/s", 100, 7))
    assert made.share_of_ceiling == "25 %" and made.floor == pytest.approx(0.5)
    none = row("b", milliseconds=math.nan, passed=None)
    measure.write([made, none], tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        assert next(csv.reader(file)) == [one.name for one in fields(Row)]
    found, other = measure.read(tmp_path / "a.csv")
    assert found == made
    assert math.isnan(other.milliseconds) and other.passed is None and other.moved is None


def test_a_rerun_replaces_its_rows_and_keeps_others(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    measure.write([row("a"), row("b"), row("b", "peer")], path)
    other = row("b", milliseconds=7.0)
    other.device = "another device"
    measure.write([row("b", milliseconds=3.0), other, row("c")], path)
    found = {(one.case, one.implementation, one.device): one for one in measure.read(path)}
    assert len(found) == len(measure.read(path)) == 5
    assert found["b", "ours", "a device"].milliseconds == 3.0
    assert found["a", "ours", "a device"].milliseconds == 2.0
    measure.write([row("z")], path, without=["op"])
    kept = {(one.case, one.device) for one in measure.read(path)}
    assert kept == {("b", "another device"), ("z", "a device")}


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    measure.write([row("a")], path)
    before = path.read_bytes()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for name, broken in (("replace", stop), ("chmod", stop)):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, broken)
            with pytest.raises(KeyboardInterrupt):
                measure.write([row("b")], path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", WITH_TIMES, ids=lambda path: path.stem)
def test_older_files_are_read(path: Path) -> None:
    rows = measure.read(path)
    assert rows and all(one.milliseconds > 0 or math.isnan(one.milliseconds) for one in rows)
    assert len({one.key for one in rows}) == len(rows)
    shares = [one for one in rows if "%" in one.share_of_ceiling]
    assert all(one.floor is not None for one in shares)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("op,case\n1,2\n")
    missing = "lacks implementation, dtype, device, milliseconds, spread"
    with pytest.raises(ValueError, match=missing):
        measure.read(tmp_path / "a.csv")


def test_only(benchmarks: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("wide_attention", "region_attention", "geglu"):
        benchmarks[name] = good(name)
    given = ["--out", str(tmp_path), "--only"]
    assert runner.main([*given, "attention"]) == 0
    assert set(ops(tmp_path / "benchmarks.csv")) == {"wide_attention", "region_attention"}
    assert "3×" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        runner.main([*given, "nothing"])
    assert "there are wide_attention" in capsys.readouterr().err


def test_a_wrong_result_of_ours(
    benchmarks: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A status, no speed-up, and nothing left of the op's earlier rows."""
    benchmarks["bad"], benchmarks["last"] = good("bad"), good("last")
    given = ["--out", str(tmp_path)]
    assert runner.main(given) == 0
    capsys.readouterr()

    def wrong(asked: Asked) -> Iterator[Row]:
        given = [(torch.ones(2),)]
        ways = {"ours": torch.neg, "peer": torch.abs}
        yield from measure.compared(
            "bad", "c", torch.float32, ways, given,
            lambda call: ("off by 2", bool(call(*given[0])[0] > 0)), measure.Work(),
        )  # fmt: skip

    benchmarks["bad"] = wrong
    assert runner.main(given) == 1
    out = capsys.readouterr().out
    assert "WRONG: bad: bad, c: ours is wrong: off by 2" in out
    assert not [line for line in out.splitlines() if line.startswith("bad") and "×" in line]
    assert ops(tmp_path / "benchmarks.csv") == ["last", "last"]


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build",
    ],
)
def test_the_drivers_version(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert measure.driver("cuda") == "535.104.05"
    assert measure.driver("cpu") == ""


def test_gradients_of_few_directions_may_be_further_off() -> None:
    exact = torch.ones(()), torch.tensor([1.0, 0.0])

    def said(off: float, directions: int) -> str:
        found = torch.ones(()), 2 * torch.tensor([1.0, off])  # of the sum of two
        return bench_sliced_wasserstein.agreement(found, exact, "binned", directions)

    for off, directions in ((0.09, 100), (0.09, 32), (0.19, 8), (0.5, 1)):
        said(off, directions)
    for off, directions in ((0.11, 100), (0.11, 32), (0.21, 8), (0.6, 1)):
        with pytest.raises(measure.WrongError, match=r"binned: .*gradient by"):
            said(off, directions)


def test_a_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also among the gradients, where what else there is is right."""
    assert math.isnan(measure.worst([1.0, math.nan, 2.0])) and measure.worst([1.0, 2.0]) == 2
    geglu, norm, cross, wide = (
        importlib.import_module(f"benchmarks.bench_{name}")
        for name in ("geglu", "group_norm_silu", "masked_cross_attention", "wide_attention")
    )

    def spoiled(call: Callable[..., list[torch.Tensor]]) -> Callable[..., list[torch.Tensor]]:
        def other(*given: torch.Tensor) -> list[torch.Tensor]:
            first, *gradients = call(*given)
            return [first, *(one * math.nan for one in gradients)]

        return other

    x, y = torch.rand(3, 8), torch.rand(3, 4)
    right = geglu.called(geglu.reference, True)
    assert geglu.checked(right, (x, y), True)[1]
    assert not geglu.checked(spoiled(right), (x, y), True)[1]
    x, weights = torch.rand(2, 64, 4, 4), torch.rand(64)
    right = norm.called(norm.plain, True)
    assert norm.checked(right, (x, weights, weights, x), True)[1]
    assert not norm.checked(spoiled(right), (x, weights, weights, x), True)[1]
    right = wide.called(wide.plain, True)
    given = tuple(torch.randn(4, 1, 64, wide.WIDTH))
    assert wide.checked(right, given)[1] and not wide.checked(spoiled(right), given)[1]
    found = [torch.ones(2), torch.ones(2)]
    assert cross.error(found, found) == 0
    assert math.isnan(cross.error([found[0], found[1] * math.nan], found))


def test_a_spread_takes_more_than_one_sample() -> None:
    assert measure.of_samples([4.0, 1.0, 2.0, 3.0, 9.0]) == (3.0, 1.0)
    median, spread = measure.of_samples([5.0])
    assert median == 5 and math.isnan(spread)


def test_other_columns_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    measure.save_csv([{"a": 1}], path)
    measure.save_csv([{"a": 2}], path)
    assert path.read_text() == "a\n2\n"
    with pytest.raises(SystemExit, match="other columns"):
        measure.save_csv([{"b": 1}], path)
    assert path.read_text() == "a\n2\n"


def test_free_memory_where_no_one_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Path) -> str:
        raise FileNotFoundError(self)

    assert scaling.available("cpu") > 0
    monkeypatch.setattr(Path, "read_text", nothing)
    assert scaling.available("cpu") == 2**33


def test_gradients_of_many_float16_colors_are_told() -> None:
    """Of the mean they would be below what float16 has."""
    given = bench_sliced_wasserstein.Case(2**20, 1, torch.float16).inputs("cpu")[0]
    exact = bench_sliced_wasserstein.exact_double(*given, ties=True)
    ours = bench_sliced_wasserstein.Ours("reference", "exact").loss()
    found = bench_sliced_wasserstein.with_gradient(ours)(*given)
    bench_sliced_wasserstein.agreement(found, exact, "exact", 32)
    peers = bench_sliced_wasserstein.with_gradient(bench_sliced_wasserstein.torch_sort)(*given)
    assert peers[1].isfinite().all()


def test_a_peer_that_fails_is_no_fault_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("diffusers")
    bench = importlib.import_module("benchmarks.bench_fast_decoder")
    measure.skipped.cache_clear()

    class Twice(torch.nn.Module):
        factor = 2.0

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.factor * self.weight * x

    @contextlib.contextmanager
    def compiled(case: Any, mode: str | None) -> Iterator[Any]:
        case.model.factor = 3.0
        try:
            yield case.model
        finally:
            case.model.factor = 2.0

    def call(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return model(inputs["x"])

    case = bench.Case("a", Twice(), ("torch.compile",), {"x": torch.ones(2)}, call, {})
    monkeypatch.setattr(bench, "compiled", compiled)
    asked = Asked("cpu", "full")
    asked.ceilings.multiplying = lambda *_: measure.Work()
    assert [one.implementation for one in bench.measured(case, asked)] == ["as it is"]
    assert "torch.compile is skipped: a, torch.compile: off by 5" in capsys.readouterr().out


def test_a_wrong_peer_is_told() -> None:
    given = [(torch.ones(2),)]
    ways = {"ours": torch.abs, "peer": torch.neg, "crash": torch.linalg.inv}
    found = measure.compared(
        "op", "c", torch.float32, ways, given,
        lambda call: ("", bool(call(*given[0])[0] > 0)), measure.Work(),
    )  # fmt: skip
    assert [one.passed for one in found] == [True, False]
    assert list(found[0].ratios) == ["peer"]


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, ImportError])
def test_a_crash_keeps_other_rows(
    benchmarks: dict, tmp_path: Path, capsys: pytest.CaptureFixture, error: type
) -> None:
    def crash(asked: Asked) -> Iterator[Row]:
        yield from good("half")(asked)
        raise error("no more")

    benchmarks |= {"first": good("first"), "half": crash, "last": good("last")}
    assert runner.main(["--out", str(tmp_path)]) == 1
    assert set(ops(tmp_path / "benchmarks.csv")) == {"first", "half", "last"}
    out = capsys.readouterr().out
    assert f"failed: half: {error.__name__}: no more" in out and "last" in out


def test_what_all_rows_share(benchmarks: dict, tmp_path: Path) -> None:
    benchmarks["one"] = good("one")
    runner.main(["--out", str(tmp_path), "--device", "cpu"])
    found = [one for one in measure.read(tmp_path / "benchmarks.csv") if one.op == "one"]
    for one in found:
        assert one.device.endswith("threads") and one.commit and one.date
        assert f"torch {torch.__version__}" in one.versions


def test_a_dtype_that_is_not_measured_is_skipped(capsys: pytest.CaptureFixture) -> None:
    measure.skipped.cache_clear()
    asked = Asked("cpu", dtype=torch.float16)
    assert asked.dtypes(torch.float32, torch.float16) == [torch.float16]
    assert asked.dtypes(torch.float32, torch.bfloat16) == []
    assert "float16 is skipped: only float32, bfloat16" in capsys.readouterr().out
    assert Asked("cpu").dtypes(torch.float32) == [torch.float32]


@pytest.mark.parametrize("name", runner.names())
def test_every_benchmark_has_the_interface(name: str) -> None:
    pytest.importorskip("diffusers")
    module = importlib.import_module(f"benchmarks.bench_{name}")
    assert callable(module.rows) and runner.rows_of(name) is module.rows
    assert f"python -m benchmarks.bench_{name}" in module.__doc__


def test_a_real_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small size: each of its rows is checked, and says what it was compared with."""
    bench = importlib.import_module("benchmarks.bench_wide_attention")
    monkeypatch.setattr(bench, "ON_A_CPU", (64,))
    found = list(bench.rows(Asked("cpu", "quick")))
    first = found[0]
    assert first.implementation == "ours" and "SDPA" in first.ratios and first.passed
    assert first.operations == 4 * 64**2 * bench.WIDTH and "Gflop/s" in first.ceiling
    monkeypatch.setattr(bench, "wide_attention", lambda q, k, v: q)
    with pytest.raises(measure.WrongError, match="ours is wrong"):
        list(bench.rows(Asked("cpu", "quick")))


def curves() -> list[Row]:
    found = []
    for n in (1024, 4096, 16384):
        for name, slower in (("ours", 1), ("torch", 8)):
            for count in (4, 16, 64):
                one = row(f"n = {n:,}, L = {count}", name, slower * n * count * 1e-5)
                one.share_of_ceiling = "50 %"
                one.ratios = {"torch": 8.0} if name == "ours" else {}
                found.append(one)
    return [*found, row("n = m = 5, d = 3"), row("n = 1,024, else")]


def test_charts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = charts.panels(curves())
    assert sorted((one.axis, one.fixed) for one in found) == [
        ("L", "n = 1,024"), ("L", "n = 16,384"), ("L", "n = 4,096"),
        ("n", "L = 16"), ("n", "L = 4"), ("n", "L = 64"),
    ]  # fmt: skip
    assert all([size for size, _ in one.lines["torch"]] == sorted({1024, 4096, 16384})
               for one in found if one.axis == "n")  # fmt: skip
    axes = charts.figure(found[:1]).axes[0]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines) == ["ours", "torch", "ceiling"]
    measure.write(curves(), tmp_path / "a.csv")
    written = charts.draw(tmp_path / "a.csv", tmp_path / "charts")
    assert [path.suffix for path in written] == [".png", ".svg"]
    assert all(path.stat().st_size > 5000 for path in written)
