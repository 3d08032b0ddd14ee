"""Group normalization with SiLU, as the decoders and UNets of Stable Diffusion have it.

``python -m benchmarks.bench_group_norm_silu [--device cuda] [--csv FILE] [--cases PART]``

Forward alone, and forward with the gradient to the input, of 32 groups, contiguous and channels
last. Peers: ``group_norm`` and ``silu`` of PyTorch, the same compiled, and Liger's and Apex's group
norm where they are installed. Every row is checked against float64: its error may be twice that of
plain PyTorch in the same dtype, with a mean of 100 and deviations of 0.01, too (rounded to
the dtype: of half types these are of a value or two).

Share of the ceiling: the time in which a copy would move the tensor three times (twice, where it
fits the cache: then it is read from memory once), with the gradient eight times, over the time
taken.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Row
from sdcore.ops import group_norm_silu
from sdcore.ops.group_norm_silu import reference

SHAPES = (
    (1, 128, 768, 768), (1, 256, 768, 768), (1, 256, 384, 384), (1, 512, 384, 384),
    (1, 512, 192, 192), (2, 320, 128, 128), (2, 1280, 32, 32),
)  # fmt: skip
ON_A_CPU = ((1, 128, 64, 64), (2, 320, 32, 32))
GROUPS, EPS = 32, 1e-6
PEERS = {"Liger": "liger_kernel.ops.group_norm", "Apex": "apex.contrib.group_norm"}
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm_silu(x, GROUPS, weight, bias, EPS)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def peers() -> dict[str, Function]:
    found = {"PyTorch": plain, "torch.compile": torch.compile(plain, dynamic=False)}
    for name, module in PEERS.items():
        try:
            imported = importlib.import_module(module)
        except ImportError:
            print(f"{name} is not installed")
            continue
        found[name] = _liger(imported) if name == "Liger" else _apex(imported)
    return found


def _liger(module: Any) -> Function:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.silu(
            module.LigerGroupNormFunction.apply(
                x.reshape(len(x), channels, -1), weight, bias, channels, GROUPS, EPS
            ).reshape(x.shape)
        )

    return call


def _apex(module: Any) -> Function:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return module.group_norm.cuda_group_norm_nhwc_one_pass(
            x, GROUPS, weight, bias, EPS, act="silu"
        )

    return call


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, last: bool
) -> list[tuple[Tensor, ...]]:
    """(x, weight, bias, the gradient to the output), several times over where that makes them
    cold."""
    generator = torch.Generator(device).manual_seed(0)
    format = torch.channels_last if last else torch.contiguous_format

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    def one() -> tuple[Tensor, ...]:
        x, grad = (drawn(*shape).contiguous(memory_format=format) for _ in range(2))
        return x, drawn(shape[1]), drawn(shape[1]), grad

    bytes_each = 2 * torch.Size(shape).numel() * dtype.itemsize
    return [one() for _ in range(measure.sets_for(bytes_each, device))]


def called(function: Function, backward: bool) -> Callable[..., list[Tensor]]:
    def forward_only(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
        return [function(x, weight, bias)]

    def both(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = function(x, weight, bias)
        return [y, *torch.autograd.grad(y, x, grad)]

    return both if backward else forward_only


def checked(function: Function, given: tuple[Tensor, ...], backward: bool) -> str | None:
    """None if the error is more than twice plain PyTorch's; at ordinary inputs, and at a mean of
    100 with deviations of 0.01."""
    x, *others = given
    worst = 0.0
    for values in (x, (100 + 0.01 * x.float()).to(x.dtype)):
        low = values, *others
        high = [one.double() for one in low]
        exact = called(_specified, backward)(*high)
        theirs = called(plain, backward)(*low)
        found = called(function, backward)(*low)
        for a, b, c in zip(found, theirs, exact, strict=True):
            size = float(c.norm())
            error = float((a.double() - c).norm()) / size
            allowed = 2 * float((b.double() - c).norm()) / size + torch.finfo(x.dtype).eps
            worst = max(worst, error / allowed)
        del exact, theirs, found, high
    return f"float64, {worst:.2f} of what is allowed" if worst <= 1 else None


def _specified(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference(x, GROUPS, weight, bias, EPS)[0]


def measured(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, ceiling: float, others: dict
) -> list[Row]:
    rows = []
    bytes_each = torch.Size(shape).numel() * dtype.itemsize
    cached = device == "cuda" and bytes_each < torch.cuda.get_device_properties(0).L2_cache_size
    for last in (False, True):
        given = inputs(shape, dtype, device, last)
        for backward in (False, True):
            moved = bytes_each * (8 if backward else 2 if cached else 3)
            case = f"{shape}, {'channels last' if last else 'contiguous'}" + (
                ", with the gradient" if backward else ""
            )
            times = {}
            here = []
            torch._dynamo.reset()  # after eight kinds of calls it would compile no more
            for name, function in {"ours": ours, **others}.items():
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
                        "group_norm_silu", case, name, str(dtype).removeprefix("torch."), taken,
                        spread, how, check, f"{100 * share:.0f} %" if share else "", device=device,
                    )
                )  # fmt: skip
            here[0].ratios = {name: times[name] / times["ours"] for name in others}
            rows += here
        del given
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
