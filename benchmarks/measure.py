"""Timing, checking and reporting, shared by all benchmarks.

On a CPU a time is the median wall-clock of whole calls. On a GPU it is that of CUDA graph
replays, so that launch overhead is out of it, over several sets of inputs that together exceed the
cache several times, so that inputs are cold.
"""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# Several times the 60 MB of the largest second-level cache in use.
COLD_BYTES = 200_000_000


@dataclass
class Row:
    """One measurement. ``check`` says what was compared; a row without it is not printed."""

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
    samples.sort()
    quarter = len(samples) // 4
    spread = (samples[-1 - quarter] - samples[quarter]) / 2
    return statistics.median(samples), spread, how


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
    samples = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        calls()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / len(inputs))
    return samples, "graph" if graph else "eager"


def sets_for(bytes_each: int, device: str) -> int:
    """How many sets of inputs make them cold on a GPU; on a CPU one, used over and over."""
    return max(2, -(-COLD_BYTES // bytes_each)) if device == "cuda" else 1


@dataclass(frozen=True)
class Ceilings:
    """What a GPU does in a second: bytes that a copy reads and writes, updates and reads of a table
    in shared memory, operations of a float32 matrix product."""

    copy: float
    updates: float
    reads: float
    products: float

    def __str__(self) -> str:
        return (
            f"copy {self.copy / 1e12:.2f} TB/s; shared memory, 4096 bins, "
            f"{self.updates / 1e9:.0f} G updates/s and {self.reads / 1e9:.0f} G reads/s; "
            f"float32 products {self.products / 1e12:.1f} Tflop/s"
        )


def ceilings() -> Ceilings:
    return Ceilings(copy_bandwidth(), *shared_memory_rates(), product_rate())


def copy_bandwidth() -> float:
    """Device-to-device copy, bytes read plus bytes written per second: the memory's ceiling."""
    source = torch.empty(1 << 28, device="cuda", dtype=torch.float32).normal_()
    target = torch.empty_like(source)
    # Not in a graph: there a copy may go to the copy engine, which is slower.
    median, _, _ = milliseconds(lambda: target.copy_(source), [()] * 10, "cuda", graph=False)
    return 2 * source.numel() * source.element_size() / (median * 1e-3)


def shared_memory_rates(bins: int = 4096) -> tuple[float, float]:
    """Updates and reads of random entries of a table in shared memory, per second: the ceilings
    of counting projections, and of fetching their slopes."""
    from sdcore import backends

    module, device = backends.cuda_module(), torch.cuda.current_device()
    blocks, threads, each = (
        2 * torch.cuda.get_device_properties(device).multi_processor_count,
        1024,
        4096,
    )
    counts = torch.zeros(bins, dtype=torch.int32, device="cuda")
    table = torch.rand(bins, device="cuda")
    sums = torch.empty(blocks * threads, device="cuda")

    def update() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        module.shared_atomics(counts.data_ptr(), bins, each, blocks, threads, 1, device, stream)

    def read() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        arguments = (table.data_ptr(), bins, sums.data_ptr(), each, blocks, threads, 1)
        module.shared_gathers(*arguments, device, stream)

    done = blocks * threads * each
    updates, reads = (milliseconds(call, [()], "cuda")[0] for call in (update, read))
    return done / (updates * 1e-3), done / (reads * 1e-3)


def product_rate(size: int = 4096, dtype: torch.dtype = torch.float32) -> float:
    """Operations per second, two a multiply-add, of a square matrix product."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    median, _, _ = milliseconds(torch.mm, [(a, b)], "cuda")
    return 2 * size**3 / (median * 1e-3)


def report(rows: list[Row], path: Path | None, earlier: Sequence[Row] = ()) -> None:
    """Fill in what all rows share, print them as a table, and write them, after those that came
    earlier, to the CSV: a run that is cut short leaves what it had measured."""
    shared = versions(), commit(), time.strftime("%Y-%m-%d")
    for row in rows:
        row.device = device_name(row.device)
        row.versions, row.commit, row.date = shared
    print(f"\n{rows[0].device}; {rows[0].versions}; {rows[0].commit}\n")
    print_table(rows)
    if path is not None:
        lines = [
            asdict(row) | {"ratios": "; ".join(f"{k} {v:.3g}" for k, v in row.ratios.items())}
            for row in (*earlier, *rows)
        ]
        write_csv([f.name for f in fields(Row)], lines, path)
    print(flush=True)


def write_csv(head: Sequence[str], lines: Sequence[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, head, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print(f"\nwritten to {path}")


def print_table(rows: list[Row]) -> None:
    head = ("case", "dtype", "implementation", "ms", "± ms", "faster than", "check", "ceiling")
    lines = [
        (
            row.case,
            row.dtype,
            row.implementation,
            f"{row.milliseconds:.4g}",
            f"{row.spread:.2g}",
            ", ".join(f"{name} {ratio:.3g}×" for name, ratio in row.ratios.items()),
            row.check,
            row.share_of_ceiling,
        )
        for row in rows
    ]
    print_lines(head, lines)


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


def versions() -> str:
    names = ("sdcore", "torch", "triton", "POT")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def commit() -> str:
    root = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return "no git"
    return answer.stdout.strip() or "no commit"
