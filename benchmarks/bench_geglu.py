"""GEGLU, as the feed-forwards of SDXL's UNet have it at 768².

``python -m benchmarks.bench_geglu [--device cuda] [--csv FILE] [--cases PART]``

Forward alone, and forward with the gradient. Peers: Diffusers' operations in PyTorch (``chunk``,
``gelu``, a product), the same compiled, and Liger's where it is installed, which has the
approximation of GELU by tanh, and takes the halves as two tensors: here it has to copy them out.
Every row is checked against float64: its error may be twice that of plain PyTorch in the same
dtype, plus the dtype's epsilon.

Share of the ceiling: the time in which a copy would move all values, each output's three (two are
read and one is written), with the gradient eight (three more are read and two written), over the
time taken. Where x fits the cache, it is read from memory once, and with the gradient they are six.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Row
from sdcore.ops import geglu
from sdcore.ops.geglu import reference

SHAPES = ((1, 2304, 2 * 2560), (1, 576, 2 * 5120))  # of 10 and of 60 feed-forwards
ON_A_CPU = ((1, 576, 2 * 1280),)
Function = Callable[[Tensor], Tensor]


def peers() -> dict[str, Function]:
    found = {"PyTorch": reference, "torch.compile": torch.compile(reference, dynamic=False)}
    try:
        liger = importlib.import_module("liger_kernel.ops.geglu")
    except ImportError:
        print("Liger is not installed")
        return found

    def of_liger(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, -1)
        return liger.LigerGELUMulFunction.apply(gate, value)

    return found | {"Liger": of_liger}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor]]:
    """(x, the gradient to the output), several times over where that makes them cold."""
    generator = torch.Generator(device).manual_seed(0)
    *lead, width = shape

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    bytes_each = torch.Size(shape).numel() * dtype.itemsize
    count = measure.sets_for(bytes_each, device)
    return [(drawn(*shape), drawn(*lead, width // 2)) for _ in range(count)]


def called(function: Function, backward: bool) -> Callable[[Tensor, Tensor], list[Tensor]]:
    def forward_only(x: Tensor, grad: Tensor) -> list[Tensor]:
        return [function(x)]

    def both(x: Tensor, grad: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = function(x)
        return [y.detach(), *torch.autograd.grad(y, x, grad)]

    return both if backward else forward_only


def checked(function: Function, given: tuple[Tensor, Tensor], backward: bool) -> str | None:
    """None if the error is more than is allowed."""
    exact = called(reference, backward)(*(one.double() for one in given))
    theirs = called(reference, backward)(*given)
    worst = 0.0
    for a, b, c in zip(called(function, backward)(*given), theirs, exact, strict=True):
        size = float(c.norm())
        error = float((a.double() - c).norm()) / size
        allowed = 2 * float((b.double() - c).norm()) / size + torch.finfo(a.dtype).eps
        worst = max(worst, error / allowed)
    return f"float64, {worst:.2f} of what is allowed" if worst <= 1 else None


def measured(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    ceiling: float,
    others: dict[str, Function],
) -> list[Row]:
    rows = []
    given = inputs(shape, dtype, device)
    of_x = torch.Size(shape).numel() * dtype.itemsize
    cached = device == "cuda" and of_x < torch.cuda.get_device_properties(0).L2_cache_size
    for backward in (False, True):
        moved = of_x // 2 * (3 if not backward else 6 if cached else 8)
        case = f"{shape}{', with the gradient' if backward else ''}"
        times = {}
        here = []
        torch._dynamo.reset()  # after eight kinds of calls it would compile no more
        for name, function in {"ours": geglu, **others}.items():
            check = checked(function, given[0], backward)
            if check is None:
                if name == "ours":
                    raise SystemExit(f"{case}: {name} is wrong")
                check = "more than twice PyTorch's error"
            taken, spread, how = measure.milliseconds(called(function, backward), given, device)
            times[name] = taken
            share = moved / (taken * 1e-3) / ceiling if device == "cuda" else 0
            here.append(
                Row(
                    "geglu", case, name, str(dtype).removeprefix("torch."), taken, spread, how,
                    check, f"{100 * share:.0f} %" if share else "", device=device,
                )
            )  # fmt: skip
        here[0].ratios = {name: times[name] / times["ours"] for name in others}
        rows += here
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--cases", default="", help="those of which the shape holds this")
    given = parser.parse_args()
    gpu = given.device == "cuda"
    ceiling = measure.copy_bandwidth() if gpu else 1.0
    if gpu:
        print(f"copy {ceiling / 1e12:.2f} TB/s")
    dtype = torch.bfloat16 if gpu else torch.float32
    others = peers()
    rows: list[Row] = []
    for shape in SHAPES if gpu else ON_A_CPU:
        if given.cases in str(shape):
            more = measured(shape, dtype, given.device, ceiling, others)
            measure.report(more, given.csv, rows)
            rows += more


if __name__ == "__main__":
    main()
