"""GEGLU, as the feed-forwards of SDXL's UNet have it at 768².

``python -m benchmarks.bench_geglu [--device cuda] [--dtype float16] [--quick] [--csv FILE]
[--cases PART]``

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

import functools
import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import measure, suite
from benchmarks.measure import Row
from benchmarks.suite import Asked
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
        measure.skipped("Liger's GEGLU", "it is not installed")
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


def checked(
    call: Callable[..., list[Tensor]], given: tuple[Tensor, Tensor], backward: bool
) -> tuple[str, bool]:
    """What was compared, and whether the error is no more than is allowed."""
    exact = called(reference, backward)(*(one.double() for one in given))
    theirs = called(reference, backward)(*given)
    shares = []
    for a, b, c in zip(call(*given), theirs, exact, strict=True):
        size = float(c.norm())
        error = float((a.double() - c).norm()) / size
        allowed = 2 * float((b.double() - c).norm()) / size + torch.finfo(a.dtype).eps
        shares.append(error / allowed)
    worst = measure.worst(shares)
    if not worst <= 1:
        return f"more than twice PyTorch's error: {worst:.3g} of what is allowed", False
    return f"float64, {worst:.2f} of what is allowed", True


def moved(shape: tuple[int, ...], dtype: torch.dtype, device: str, backward: bool) -> int:
    """Bytes; the file's docstring says of what."""
    of_x = torch.Size(shape).numel() * dtype.itemsize
    cached = device == "cuda" and of_x < torch.cuda.get_device_properties(0).L2_cache_size
    return of_x // 2 * (3 if not backward else 6 if cached else 8)


def measured(
    shape: tuple[int, ...], dtype: torch.dtype, asked: Asked, others: dict[str, Function]
) -> Iterator[Row]:
    given = inputs(shape, dtype, asked.device)
    for backward in (False, True):
        case = f"{shape}{', with the gradient' if backward else ''}"
        torch._dynamo.reset()  # after eight kinds of calls it would compile no more
        ways = {name: called(one, backward) for name, one in {"ours": geglu, **others}.items()}
        check = functools.partial(checked, given=given[0], backward=backward)
        work = asked.ceilings.copying(moved(shape, dtype, asked.device, backward))
        yield from measure.compared("geglu", case, dtype, ways, given, check, work)


def rows(asked: Asked) -> Iterator[Row]:
    others = asked.peers(peers())
    own = torch.bfloat16 if asked.on_gpu else torch.float32
    shapes = SHAPES[: 1 if asked.quick else None] if asked.on_gpu else ON_A_CPU
    for dtype in asked.dtypes(own, torch.float32, torch.float16, torch.bfloat16):
        for shape in shapes:
            if asked.cases in str(shape):
                yield from measured(shape, dtype, asked, others)


if __name__ == "__main__":
    suite.main(rows, suite.parser_of(__doc__))
