"""Timing, checking and reporting, shared by all benchmarks.

On a CPU a time is the median wall-clock of whole calls. On a GPU it is that of CUDA graph
replays, so that launch overhead is out of it, over several sets of inputs. These are cold: what was
in the cache before a replay is evicted, or the sets together exceed the cache several times.
"""

from __future__ import annotations

import csv
import functools
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# Several times the 60 MB of the largest second-level cache in use.
COLD_BYTES = 200_000_000
# Of which a replay's own 20 µs are little.
MOST_SETS = 1024
# Of which the versions are told if they were imported, by the module's name.
PACKAGES = {
    "sdcore": "sdcore", "torch": "torch", "triton": "triton", "diffusers": "diffusers",
    "ot": "POT", "xformers": "xformers", "liger_kernel": "liger-kernel", "apex": "apex",
}  # fmt: skip
KEY = ("op", "case", "implementation", "dtype", "device")


class WrongError(Exception):
    """A result of ours that is further off than allowed: no time is told then."""


@dataclass(frozen=True)
class Work:
    """What has to be done, in milliseconds at the ceiling that is named."""

    floor: float = 0.0  # 0 if there is no ceiling to compare with
    ceiling: str = ""
    moved: int | None = None
    operations: int | None = None


@dataclass
class Row:
    """One measurement. ``check`` says what was compared, ``passed`` whether that was right: None
    where nothing was. Times are NaN where there are none."""

    op: str
    case: str
    implementation: str
    dtype: str
    milliseconds: float
    spread: float
    timing: str
    check: str
    share_of_ceiling: str = ""
    ratios: dict[str, float] = field(default_factory=dict)
    device: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""
    passed: bool | None = None
    ceiling: str = ""
    moved: int | None = None  # bytes
    operations: int | None = None
    driver: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(getattr(self, name) for name in KEY)

    @property
    def floor(self) -> float | None:
        """Milliseconds at the ceiling."""
        found = re.search(r"([\d.e+-]+) ?%", self.share_of_ceiling)
        return self.milliseconds * float(found[1]) / 100 if found else None

    def against(self, work: Work) -> Row:
        """With the work, and the share of its ceiling."""
        self.ceiling, self.moved, self.operations = work.ceiling, work.moved, work.operations
        if work.floor:
            self.share_of_ceiling = percent(work.floor / self.milliseconds)
        return self


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measured(
    op: str,
    case: str,
    dtype: torch.dtype,
    name: str,
    call: Callable[..., Any],
    given: Sequence[tuple[Any, ...]],
    check: Callable[[Callable[..., Any]], tuple[str, bool | None]],
    work: Work,
    is_ours: bool,
    repeats: int = 7,
) -> Row | None:
    """None, and a line, where there is not enough memory for it, or where a peer does not run.

    Raises:
        WrongError: ``check``, which gives what was compared and whether it was right, says that
            ours is not.
    """
    try:
        said, passed = check(call)
        if is_ours and not passed:
            raise WrongError(f"{op}, {case}: {name} is wrong: {said}")
        taken = milliseconds(call, given, given[0][0].device.type, repeats)
    except Exception as problem:  # a peer may fail in ways of its own
        if is_ours and not isinstance(problem, torch.OutOfMemoryError):
            raise
        skipped(f"{op}, {case}: {name}", str(problem))
        return None
    return Row(op, case, name, dtype_name(dtype), *taken, said, passed=passed).against(work)


def compared(
    op: str,
    case: str,
    dtype: torch.dtype,
    ways: dict[str, Callable[..., Any]],
    given: Sequence[tuple[Any, ...]],
    check: Callable[[Callable[..., Any]], tuple[str, bool]],
    work: Work,
) -> list[Row]:
    """A row of each way that runs. "ours" is compared with the others."""
    found = (
        measured(op, case, dtype, name, call, given, check, work, name == "ours")
        for name, call in ways.items()
    )
    rows = {row.implementation: row for row in found if row is not None}
    if "ours" in rows:
        rows["ours"].ratios = {
            name: row.milliseconds / rows["ours"].milliseconds
            for name, row in rows.items()
            if name != "ours"
        }
    return list(rows.values())


@functools.cache  # each is said once
def skipped(what: str, why: str) -> None:
    print(f"{what} is skipped: {(why.splitlines() or ['no reason given'])[0][:160]}", flush=True)


def milliseconds(
    function: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    device: str,
    repeats: int = 7,
    graph: bool = True,
) -> tuple[float, float, str]:
    """Median time of ``function(*inputs[i])``, half the range of its middle half, and how taken."""
    if device == "cuda":
        samples, how = _on_gpu(function, inputs, repeats, graph)
    else:
        samples, how = _on_cpu(function, inputs, repeats), "wall clock"
    return *of_samples(samples), how


def of_samples(samples: Iterable[float]) -> tuple[float, float]:
    """Median, and half the range of the middle half; of a single one that is NaN, unknown."""
    found = sorted(samples)
    quarter = len(found) // 4
    spread = (found[-1 - quarter] - found[quarter]) / 2 if len(found) > 1 else math.nan
    return statistics.median(found), spread


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN if one is, which ``max`` may pass over."""
    found = list(errors)
    return math.nan if any(map(math.isnan, found)) else max(found)


def _on_cpu(
    function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], repeats: int
) -> list[float]:
    function(*inputs[0])
    samples = []
    for i in range(repeats):
        start = time.perf_counter()
        function(*inputs[i % len(inputs)])
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def _on_gpu(
    function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], repeats: int, graph: bool
) -> tuple[list[float], str]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for arguments in inputs[:3]:
            function(*arguments)
    torch.cuda.synchronize()

    def calls() -> None:
        for arguments in inputs:
            function(*arguments)

    if graph:
        # One graph of all calls: a replay launches two kernels for PyTorch's random state and waits
        # for the host, 20 µs that are none of the function's.
        whole = torch.cuda.CUDAGraph()
        with torch.cuda.graph(whole):
            calls()
        calls = whole.replay
    calls()
    evict = _evicting() if len(inputs) > 1 else lambda: None
    samples = []
    for _ in range(repeats):
        evict()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        calls()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / len(inputs))
    return samples, "graph" if graph else "eager"


def _evicting() -> Callable[[], Any]:
    """A function that fills the cache with other memory. It reads: what is written would have to
    leave the cache in somebody else's time."""
    other = torch.zeros(COLD_BYTES // 4, device="cuda")
    return other.sum


def sets_for(bytes_each: int, device: str, most: int = MOST_SETS) -> int:
    """How many sets of inputs there are to be on a GPU; on a CPU one, used over and over."""
    return min(max(2, -(-COLD_BYTES // bytes_each)), most) if device == "cuda" else 1


def finished(row: Row, device: str) -> Row:
    """With what all rows of a run share."""
    row.device, row.driver = device_name(device), driver(device)
    row.versions, row.commit, row.date = versions(), commit(), time.strftime("%Y-%m-%d")
    return row


def read(path: Path) -> list[Row]:
    """The rows of a CSV; what an older one lacks is left at its default.

    Raises:
        ValueError: it is no benchmark's.
        OSError: it can't be read.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        wanted = *KEY, "milliseconds", "spread"
        if missing := [name for name in wanted if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} is no benchmark's CSV: it lacks {', '.join(missing)}")
        return [_parsed(line) for line in reader]


def _parsed(line: dict[str, str]) -> Row:
    known = {one.name: line.get(one.name) or "" for one in fields(Row)}
    ratios = (pair.rpartition(" ") for pair in known["ratios"].split("; ") if pair)
    numbers = {name: int(known[name]) if known[name] else None for name in ("moved", "operations")}
    times = {name: float(known[name] or "nan") for name in ("milliseconds", "spread")}
    return Row(
        **known
        | numbers
        | times
        | {
            "ratios": {name: float(value) for name, _, value in ratios},
            "passed": {"yes": True, "no": False}.get(known["passed"]),
        }
    )


def write(rows: Iterable[Row], path: Path, without: Iterable[str] = ()) -> None:
    """Rows take the place of those of their key in the file, or come after them. Others stay, but
    for those of the ops in ``without`` on the same device."""
    new = {row.key: row for row in rows}
    devices, dropped = {row.device for row in new.values()}, set(without)
    old = {row.key: row for row in read(path)} if path.exists() else {}
    kept = {
        key: row
        for key, row in old.items()
        if key in new or not (row.op in dropped and row.device in devices)
    }
    write_csv([f.name for f in fields(Row)], [_line(row) for row in (kept | new).values()], path)


def _line(row: Row) -> dict[str, Any]:
    passed = "" if row.passed is None else "yes" if row.passed else "no"
    # A name may hold a semicolon as little as it may end with a number.
    ratios = "; ".join(f"{name} {ratio:.3g}" for name, ratio in row.ratios.items())
    times = {
        name: "" if math.isnan(value) else value
        for name, value in (("milliseconds", row.milliseconds), ("spread", row.spread))
    }
    return asdict(row) | times | {"passed": passed, "ratios": ratios}


def save_csv(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Lines of a kind of their own, in the place of those of an earlier run.

    Raises:
        SystemExit: the file holds lines of another kind, which stay.
    """
    head = list(lines[0])
    if path.exists():
        with path.open(newline="") as file:
            if next(csv.reader(file), head) != head:
                raise SystemExit(f"{path} holds other columns than these, and stays as it is")
    write_csv(head, lines, path)


def write_csv(head: Sequence[str], lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Whole or not at all: whoever interrupts it keeps the file that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", newline="") as file:
            writer = csv.DictWriter(file, head, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def print_table(rows: Sequence[Row]) -> None:
    """A line for each row that is not told beside another, as one of its peers."""
    peers = {(row.op, row.case, name) for row in rows for name in row.ratios}
    lines = [
        (
            row.op,
            row.case,
            row.dtype,
            row.implementation,
            f"{row.milliseconds:.4g}",
            _peers(row),
            _share(row),
            {True: "yes", False: "NO", None: "-"}[row.passed],
        )
        for row in rows
        if not math.isnan(row.milliseconds)
        and (row.ratios or (row.op, row.case, row.implementation) not in peers)
    ]
    head = (
        "op",
        "case",
        "dtype",
        "implementation",
        "ms",
        "peers: ms (ratio)",
        "ceiling",
        "checked",
    )
    print_lines(head, lines)


def _peers(row: Row) -> str:
    if row.passed is False:
        return ""
    return ", ".join(
        f"{name} {row.milliseconds * ratio:.4g} ({ratio:.3g}×)"
        for name, ratio in row.ratios.items()
        if name != row.implementation
    )


def _share(row: Row) -> str:
    floor = row.floor
    return "" if floor is None else percent(floor / row.milliseconds)


def print_lines(head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Columns, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for line in (head, *lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def driver(device: str) -> str:
    """The version of the GPU's driver."""
    if device != "cuda":
        return ""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else "unknown"


def versions() -> str:
    found = []
    for module, name in PACKAGES.items():
        if module not in sys.modules:
            continue
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} {getattr(sys.modules[module], '__version__', 'unknown')}")
    if torch.version.cuda:
        found.append(f"CUDA {torch.version.cuda}")
    return ", ".join(found)


@functools.cache
def commit() -> str:
    """With "-dirty" if the tree differs from it."""
    root = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return answer.stdout.strip() or "unknown"
