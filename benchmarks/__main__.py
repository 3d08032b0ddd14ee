"""The benchmark suite.

``python -m benchmarks [--quick | --full] [--only PART ...] [--scaling] [--device cuda] [--dtype
bfloat16] [--upstream PATH] [--out FOLDER]``: all benchmarks, and rows put into
FOLDER/benchmarks.csv, where a re-run takes the place of what it measures again.
``python -m benchmarks compare BEFORE.csv AFTER.csv``: what became slower or faster.
``python -m benchmarks report``: the pages that tell of the committed results.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import measure, suite
from benchmarks.measure import Row
from benchmarks.suite import Asked

OUT = Path("build/benchmarks")
SCALING = "scaling: "


def names() -> list[str]:
    """Of all benchmarks: those of ops, and methods."""
    files = sorted(Path(__file__).parent.glob("bench_*.py"))
    return [file.stem.removeprefix("bench_") for file in files]


def curve_names() -> list[str]:
    from benchmarks import scaling

    return [SCALING + name for name in scaling.CURVES]


def rows_of(name: str) -> suite.Rows:
    """Imported now: a benchmark that lacks a package fails alone."""
    if name.startswith(SCALING):
        from benchmarks import scaling

        return scaling.CURVES[name.removeprefix(SCALING)]
    return importlib.import_module(f"benchmarks.bench_{name}").rows


class Run:
    """Of several benchmarks, of which none can harm another."""

    def __init__(self, asked: Asked, path: Path) -> None:
        self.asked, self.path = asked, path
        self.rows: list[Row] = []
        self.wrong: dict[str, str] = {}  # by the benchmark's name
        self.failed: dict[str, str] = {}

    def measure(self, name: str, told: Callable[[str], None]) -> None:
        found: list[Row] = []
        try:
            for row in suite.collected(rows_of(name), self.asked, found):
                told(f"{row.op}: {row.case}, {row.implementation}")
                self.save(found)
        except measure.WrongError as error:
            self.wrong[name] = str(error)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self.failed[name] = f"{type(error).__name__}: {error}"
        self.rows += found
        self.save()
        if self.asked.on_gpu:
            torch.cuda.empty_cache()

    def save(self, more: Sequence[Row] = ()) -> None:
        """A wrong result takes the op's earlier rows with it."""
        ops = [name.removeprefix(SCALING) for name in self.wrong]
        rows = [*self.asked.ceilings.rows, *self.rows, *more]
        for row in rows:
            if not row.device:
                measure.finished(row, self.asked.device)
        if rows:
            measure.write(rows, self.path, without=ops)

    def print(self) -> None:
        rows = [*self.asked.ceilings.rows, *self.rows]
        if rows:
            print(f"\n{rows[-1].device}; {rows[-1].versions}; {rows[-1].commit}\n")
            # Two curves may share a point, which was measured for each then.
            measure.print_table(list({row.key: row for row in rows}.values()))
        untimed = [row for row in self.rows if row.milliseconds != row.milliseconds]
        if untimed:
            print(f"\n{len(untimed)} comparisons of accuracy keep their bounds")
        for what, which in (("WRONG", self.wrong), ("failed", self.failed)):
            for name, why in which.items():
                print(f"{what}: {name}: {why}")


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function that is told what was done last: of a bar, if tqdm is installed and this is a
    terminal; else of lines. The bar moves on by one for each text that begins with a "+"."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        yield lambda text: print(text, flush=True)
        return
    with tqdm(total=total, unit="benchmark", leave=False) as bar:

        def told(text: str) -> None:
            if text.startswith("+"):
                bar.update()
            else:
                bar.set_postfix_str(text[:80])

        yield told


def measured(asked: Asked, chosen: Sequence[str], path: Path) -> Run:
    run = Run(asked, path)
    own = torch.bfloat16 if asked.on_gpu else torch.float32
    asked.ceilings.measure(*{torch.float32, own, asked.dtype or own})
    with progress(len(chosen)) as told:
        for name in chosen:
            told(name)
            start = time.perf_counter()
            run.measure(name, told)
            told(f"+ {name}: {time.perf_counter() - start:.0f} s")
    return run


def chosen_by(given: argparse.Namespace) -> list[str]:
    found = [] if given.scaling else names()
    if given.scaling or given.size != "default":
        found += curve_names()
    parts = given.only
    return [name for name in found if not parts or any(part in name for part in parts)]


def draw(path: Path) -> None:
    try:
        from benchmarks import charts

        files = charts.draw(path, path.parent)
    except ImportError as error:
        measure.skipped("charts", str(error))
        return
    for file in files:
        print(f"drawn: {file}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    suite.shared_options(made)
    made.add_argument(
        "--only", nargs="+", metavar="PART", help="benchmarks whose names have one of these"
    )
    made.add_argument(
        "--scaling",
        action="store_true",
        help="curves over sizes alone, which --quick and --full have, too",
    )
    made.add_argument(
        "--upstream", type=Path, help="for color_guidance: a checkout of alobashev/sw-guidance"
    )
    made.add_argument("--out", type=Path, default=OUT, help="(%(default)s)")
    made.add_argument("--list", action="store_true", help="the benchmarks' names, and nothing else")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["compare"]:
        from benchmarks import compare

        return compare.main(arguments[1:])
    if arguments[:1] == ["report"]:
        from benchmarks import report

        report.main(arguments[1:])
        return 0
    options = parser()
    given = options.parse_args(arguments)
    chosen = chosen_by(given)
    if given.list:
        print("\n".join(chosen))
        return 0
    if not chosen:
        options.error(f"no benchmark is named so; there are {', '.join(names())}")
    path = given.out / "benchmarks.csv"
    start = time.perf_counter()
    run = measured(suite.asked_by(given), chosen, path)
    run.print()
    print(f"\n{time.perf_counter() - start:.0f} s; rows are in {path}")
    if path.exists():
        draw(path)
    return int(bool(run.wrong or run.failed))


if __name__ == "__main__":
    raise SystemExit(main())
