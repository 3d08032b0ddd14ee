"""What this machine can do at most, measured once a run: what rows are compared with.

Copies of memory (bytes read and written), products of matrices in each dtype that is used; on a GPU
also updates and reads of random entries of a table in shared memory, and launches. A CPU copies and
multiplies with all of its threads, and the fastest of several counts. What stays in a cache may be
faster than a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import Row, Work
from sdcore import backends

BINS = 4096  # of the table in shared memory
SIDES = {"cuda": 8192, "cpu": 2048}  # of the matrices: large enough for the full rate
VALUES = {"cuda": 1 << 28, "cpu": 1 << 26}  # that are copied, of 4 bytes


class Ceilings:
    """Each is measured when it is first asked for, and is in ``rows`` then. Per second."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.rows: list[Row] = []
        self._products: dict[str, float] = {}

    @functools.cached_property
    def copy(self) -> float:
        values = VALUES[self.device]
        # Not in a graph: there a copy may go to the copy engine, which is slower.
        source = torch.empty(values, device=self.device, dtype=torch.float32).normal_()
        target = torch.empty_like(source)
        sets = [()] * (10 if self.device == "cuda" else 1)
        moved = 2 * values * source.element_size()
        rate = self._rate("copy", lambda: target.copy_(source), moved, graph=False, sets=sets)
        self.rows[-1].ceiling, self.rows[-1].moved = f"{rate / 1e9:.4g} GB/s", moved
        return rate

    def products(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """Operations, two a multiply-add, of a square matrix product."""
        name = self._kind(dtype, tf32)
        if name not in self._products:
            self._products[name] = self._measured_products(name, dtype)
        return self._products[name]

    def _kind(self, dtype: torch.dtype, tf32: bool) -> str:
        on_gpu = self.device == "cuda"
        return "TF32" if tf32 and on_gpu and dtype == torch.float32 else measure.dtype_name(dtype)

    def _measured_products(self, name: str, dtype: torch.dtype) -> float:
        side = SIDES[self.device]
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        count = 2 * side**3
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = name == "TF32"
        try:
            rate = self._rate(f"{name} products", lambda: torch.mm(a, b), count, dtype=dtype)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        self.rows[-1].ceiling, self.rows[-1].operations = f"{rate / 1e9:.4g} Gflop/s", count
        return rate

    @functools.cached_property
    def shared_memory(self) -> tuple[float, float] | None:
        """Updates and reads of random entries of a table: the ceilings of counting projections, and
        of fetching their slopes. None where the kernels that measure it can't run."""
        if self.device != "cuda":
            return None
        if reason := backends.unavailable("cuda"):
            measure.skipped("the ceiling of shared memory", reason)
            return None
        module, device = backends.cuda_module(), torch.cuda.current_device()
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        blocks, threads, each = 2 * multiprocessors, 1024, 4096
        counts = torch.zeros(BINS, dtype=torch.int32, device="cuda")
        table = torch.rand(BINS, device="cuda")
        sums = torch.empty(blocks * threads, device="cuda")

        def update() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            module.shared_atomics(counts.data_ptr(), BINS, each, blocks, threads, 1, device, stream)

        def read() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            arguments = (table.data_ptr(), BINS, sums.data_ptr(), each, blocks, threads, 1)
            module.shared_gathers(*arguments, device, stream)

        rates = []
        for name, call in (("updates", update), ("reads", read)):
            done = blocks * threads * each
            rates.append(self._rate(f"{name} of shared memory, {BINS} bins", call, done))
            self.rows[-1].ceiling = f"{rates[-1] / 1e9:.4g} G {name}/s"
            self.rows[-1].operations = done
        return rates[0], rates[1]

    @functools.cached_property
    def launches(self) -> float:
        """Kernels of next to no work, one after the other in a CUDA graph."""
        one = torch.zeros(1, device=self.device)
        rate = self._rate("launches in a graph", lambda: one.add_(1), 1, sets=[()] * 2000)
        self.rows[-1].ceiling = f"{1e6 / rate:.3g} µs a launch"
        return rate

    def _rate(
        self,
        case: str,
        call: Callable[[], Any],
        count: int,
        dtype: torch.dtype | None = None,
        graph: bool = True,
        sets: list[tuple] | None = None,
    ) -> float:
        taken = measure.milliseconds(call, sets or [()], self.device, graph=graph)
        if self.device == "cpu":
            # Whoever else runs on it slows it down, by turns.
            more = (measure.milliseconds(call, [()], "cpu", 3) for _ in range(5))
            taken = min(taken, *more)
        name = measure.dtype_name(dtype) if dtype else ""
        self.rows.append(Row("ceiling", case, "this machine", name, *taken, "a ceiling"))
        return count / (taken[0] * 1e-3)

    def measure(self, *dtypes: torch.dtype) -> None:
        """All of them now, before anything else is in memory."""
        _ = self.copy, self.shared_memory
        for dtype in dtypes:
            self.products(dtype)
        if self.device == "cuda":
            _ = self.launches

    def copying(self, moved: int) -> Work:
        """That a copy would move these bytes."""
        name = f"copy {self.copy / 1e9:.4g} GB/s"
        return Work(1e3 * moved / self.copy, name, moved=moved)

    def multiplying(self, operations: int, dtype: torch.dtype, tf32: bool = False) -> Work:
        """That large matrix products would do these operations."""
        rate = self.products(dtype, tf32)
        name = f"{self._kind(dtype, tf32)} products {rate / 1e9:.4g} Gflop/s"
        return Work(1e3 * operations / rate, name, operations=operations)
