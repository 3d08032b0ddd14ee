"""Sliced Wasserstein value and gradient, against what else there is.

``python -m benchmarks.bench_sliced_wasserstein [--device cuda] [--quick] [--csv FILE]``

Peers: ``torch`` is the vectorized sort with autograd, projections made contiguous for the sort
(nearly twice as fast on a CPU as sorting a transposed view); ``torch.compile`` is the same,
compiled; ``POT`` is ot.sliced_wasserstein_distance on its PyTorch backend; ``published loop`` is
the loss of SW-Guidance as published, one direction at a time. All are given the same directions.

Ours, binned: as it is; ``in [0, 1]`` with that range given, which colors have; and ``kept``
against a palette whose histograms are kept for these directions.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdcore
from benchmarks import measure
from benchmarks.baselines import sw_guidance
from benchmarks.measure import Row
from sdcore import backends, images
from sdcore.ops import sliced_wasserstein

GRADIENT_TOLERANCE = {"exact": 0.02, "binned": 0.1}


@dataclass(frozen=True)
class Case:
    n: int
    directions: int
    dtype: torch.dtype
    image: str = "random"

    def __str__(self) -> str:
        name = f"n = m = {self.n:,}, d = 3, L = {self.directions}"
        return name if self.image == "random" else f"{name}, {self.image}"

    @property
    def has_ties(self) -> bool:
        return self.image != "random" or self.dtype != torch.float32

    def inputs(self, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(x, y, directions), several times over where that makes them cold."""
        each = 2 * 3 * self.n * torch.empty(0, dtype=self.dtype).element_size()
        generator = torch.Generator(device).manual_seed(0)
        return [self._input(device, generator) for _ in range(measure.sets_for(each, device))]

    def _input(self, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, device=device, generator=generator)

        x, y = uniform(self.n, 3), uniform(self.n, 3) ** 1.5
        if self.image == "constant":
            x = x[:1].expand(self.n, 3).contiguous()
        if self.image == "photo":
            x = _photo(self.n).to(device)
        if self.image == "two colors":
            x = torch.where(uniform(self.n, 1) < 0.5, x[:1], x[1:2])
        directions = torch.randn(self.directions, 3, device=device, generator=generator)
        directions = torch.nn.functional.normalize(directions, dim=1)
        return x.to(self.dtype).requires_grad_(), y.to(self.dtype), directions


def _photo(n: int) -> Tensor:
    """n colors of the photographs in docs, in the order of the pixels."""
    image = images.read(Path(__file__).parents[1] / "docs" / "recolor.jpg")
    side = math.isqrt(n)
    planes = image.permute(2, 0, 1)[None]
    grown = torch.nn.functional.interpolate(planes, (side, -(-n // side)), mode="bilinear")
    return grown[0].permute(1, 2, 0).reshape(-1, 3)[:n].clamp(0, 1).contiguous()


def torch_sort(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """The vectorized peer."""
    directions = directions.to(x.dtype)
    return ((directions @ x.T).sort(1).values - (directions @ y.T).sort(1).values).abs().mean()


def pot(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    # POT imports every array library that it finds, unless told not to.
    for library in ("JAX", "CUPY", "TENSORFLOW"):
        os.environ.setdefault(f"POT_BACKEND_DISABLE_{library}", "1")
    import ot

    return ot.sliced_wasserstein_distance(x, y, projections=directions.T.to(x.dtype), p=1)


def ours(backend: str, method: str, **options: Any) -> Callable[..., Tensor]:
    def loss(x: Tensor, y: Tensor | sdcore.Palette, directions: Tensor) -> Tensor:
        with sdcore.backend(backend):
            return sliced_wasserstein(x, y, directions=directions, method=method, **options)

    return loss


@functools.cache
def compiled() -> Callable[..., Tensor]:
    return torch.compile(torch_sort)


def with_palettes(inputs: list[Any]) -> list[Any]:
    """The same with y as a palette that has its histograms for these directions."""
    found = [(x, sdcore.Palette(y).to(y.device), directions) for x, y, directions in inputs]
    for arguments in found:
        ours("cuda", "binned", value_range=(0, 1))(*arguments)
    return found


def with_gradient(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def both(x: Tensor, y: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(x, y, directions)
        return value, torch.autograd.grad(value, x)[0]

    return both


def agreement(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], method: str) -> str:
    """Relative errors of value and gradient; raises if they are not what the method promises."""
    value, gradient = (t.double() for t in found)
    value_error = ((value - expected[0]).abs() / expected[0]).item()
    gradient_error = ((gradient - expected[1]).norm() / expected[1].norm()).item()
    limit = GRADIENT_TOLERANCE[method]
    if not (value_error < 1e-3 and gradient_error < limit):
        raise AssertionError(
            f"{method}: value off by {value_error:.2g}, gradient by {gradient_error:.2g} "
            f"(limits 1e-3 and {limit:.2g})"
        )
    return f"value {value_error:.0e}, gradient {gradient_error:.0e}"


def exact_double(x: Tensor, y: Tensor, directions: Tensor, ties: bool) -> tuple[Tensor, Tensor]:
    """Value and gradient by sorting in float64, a few directions at a time.

    Sorting gives equal points different gradients, as it happens to order them; sharing the sum
    among them makes it the gradient that does not depend on the order.
    """
    points = x.detach()
    x, y, directions = x.detach().double().requires_grad_(), y.double(), directions.double()
    value, gradient = x.new_zeros(()), torch.zeros_like(x)
    for some in directions.split(8):
        part = torch_sort(x, y, some) * (len(some) / len(directions))
        value += part.detach()
        gradient += torch.autograd.grad(part, x)[0]
    if not ties:
        return value, gradient
    _, color, count = points.float().unique(dim=0, return_inverse=True, return_counts=True)
    shared = gradient.new_zeros(len(count), 3).index_add_(0, color, gradient) / count[:, None]
    return value, shared[color]


def run_case(case: Case, device: str, peers: bool) -> list[Row]:
    inputs = case.inputs(device)
    expected = exact_double(*inputs[0], ties=case.has_ties)
    rivals: dict[str, float] = {}
    rows = []
    for name, loss in _peers(case, device) if peers else ():
        row = _row(case, name, loss, inputs, device)
        row.check = "the peer"
        rivals[name] = row.milliseconds
        rows.append(row)
    for backend, method, variant in (
        ("cpp", "exact", ""),
        ("cpp", "binned", ""),
        ("cuda", "exact", ""),
        ("cuda", "binned", ", kept"),
        ("cuda", "binned", ", in [0, 1]"),
        ("cuda", "binned", ""),
        ("triton", "binned", ""),
    ):
        if not _runs(backend, method, device):
            continue
        loss = ours(backend, method, **({"value_range": (0, 1)} if variant else {}))
        these = with_palettes(inputs) if variant == ", kept" else inputs
        check = agreement(with_gradient(loss)(*these[0]), expected, method)
        row = _row(case, f"{backend} {method}{variant}", loss, these, device)
        row.check = check
        row.ratios = {rival: taken / row.milliseconds for rival, taken in rivals.items()}
        row.share_of_ceiling = _updates(case, row)
        rows.append(row)
    return rows


def _peers(case: Case, device: str) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    yield "torch", torch_sort
    if device == "cuda":
        yield "torch.compile", compiled()
        if case.n * case.directions <= 1 << 25:
            yield "published loop", sw_guidance.loss
    if case.dtype == torch.float32 and _installed("ot"):
        yield "POT", pot


def _updates(case: Case, row: Row) -> str:
    """Points times directions, counted and fetched, per second: the unit of both ceilings."""
    passes = 2 if row.implementation.endswith("kept") else 3
    return f"{passes * case.n * case.directions / row.milliseconds / 1e6:.3g} G updates and reads/s"


def _row(case: Case, name: str, loss: Callable[..., Tensor], inputs: list[Any], device: str) -> Row:
    repeats = {"torch": 3, "torch.compile": 3, "POT": 1, "published loop": 1}.get(name, 11)
    graph = name not in ("POT", "published loop", "torch.compile")
    median, spread, how = measure.milliseconds(
        with_gradient(loss), inputs, device, repeats, graph=graph
    )
    dtype = str(case.dtype).removeprefix("torch.")
    return Row("sliced_wasserstein", str(case), name, dtype, median, spread, how, "", device=device)


def _runs(backend: str, method: str, device: str) -> bool:
    reason = backends.unavailable(backend) or backends.unsuitable_device(backend, device)
    return reason is None and backends.has(f"sliced_wasserstein_{method}", backend)


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def cases(device: str, quick: bool) -> list[tuple[Case, bool]]:
    if quick:
        return [(Case(65536, 32, torch.float32), True)]
    found = [(Case(1048576, 32, torch.float32), True)]
    if device == "cuda":
        found += [
            (Case(589824, 30, torch.bfloat16), True),
            (Case(1048576, 96, torch.float32), True),
            (Case(262144, 32, torch.float32), True),
        ]
    kinds = ["constant", "two colors"] + ["photo"] * (device == "cuda")
    return found + [(Case(1048576, 32, torch.float32, image), False) for image in kinds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--csv", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    rows = []
    for case, peers in cases(arguments.device, arguments.quick):
        print(f"{case}, {case.dtype} …", flush=True)
        rows += run_case(case, arguments.device, peers)
    measure.finish(rows, arguments.csv)
    if arguments.device == "cuda":
        _print_ceilings()
        _print_host_part()


def _print_ceilings() -> None:
    updates, reads = measure.shared_memory_rates()
    print(
        f"\nceilings in this run: copy {measure.copy_bandwidth() / 1e12:.2f} TB/s; shared memory, "
        f"4096 bins, {updates / 1e9:.0f} G updates/s and {reads / 1e9:.0f} G reads/s"
    )


def _print_host_part() -> None:
    case = Case(262144, 32, torch.float32)
    taken, _, _ = measure.milliseconds(
        sw_guidance.host_part, case.inputs("cuda"), "cuda", 1, graph=False
    )
    print(f"published loop, {case}: {taken:.0f} ms of it are the host's indices and their copies")


if __name__ == "__main__":
    main()
