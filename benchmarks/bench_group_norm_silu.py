"""Group normalization with SiLU, as the decoders and UNets of Stable Diffusion have it.

``python -m benchmarks.bench_group_norm_silu [--device cuda] [--dtype float16] [--quick]
[--csv FILE] [--cases PART]``

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

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure, suite
from benchmarks.measure import Row
from benchmarks.suite import Asked
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
            measure.skipped(f"{name}'s group norm", "it is not installed")
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
        return [y.detach(), *torch.autograd.grad(y, x, grad)]

    return both if backward else forward_only


def checked(
    call: Callable[..., list[Tensor]], given: tuple[Tensor, ...], backward: bool
) -> tuple[str, bool]:
    """What was compared, and whether the error is at most twice plain PyTorch's; at ordinary
    inputs, and at a mean of 100 with deviations of 0.01."""
    x, *others = given
    shares = []
    for values in (x, (100 + 0.01 * x.float()).to(x.dtype)):
        low = values, *others
        high = [one.double() for one in low]
        exact = called(_specified, backward)(*high)
        theirs = called(plain, backward)(*low)
        found = call(*low)
        for a, b, c in zip(found, theirs, exact, strict=True):
            size = float(c.norm())
            error = float((a.double() - c).norm()) / size
            allowed = 2 * float((b.double() - c).norm()) / size + torch.finfo(x.dtype).eps
            shares.append(error / allowed)
        del exact, theirs, found, high
    worst = measure.worst(shares)
    if not worst <= 1:
        return f"more than twice PyTorch's error: {worst:.3g} of what is allowed", False
    return f"float64, {worst:.2f} of what is allowed", True


def _specified(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference(x, GROUPS, weight, bias, EPS)[0]


def moved(shape: tuple[int, ...], dtype: torch.dtype, device: str, backward: bool) -> int:
    """Bytes; the file's docstring says of what."""
    each = torch.Size(shape).numel() * dtype.itemsize
    cached = device == "cuda" and each < torch.cuda.get_device_properties(0).L2_cache_size
    return each * (8 if backward else 2 if cached else 3)


def measured(
    shape: tuple[int, ...], dtype: torch.dtype, asked: Asked, others: dict[str, Function]
) -> Iterator[Row]:
    for layout in ("contiguous", "channels last")[: 1 if asked.quick else 2]:
        given = inputs(shape, dtype, asked.device, layout == "channels last")
        for backward in (False, True):
            case = f"{shape}, {layout}{', with the gradient' if backward else ''}"
            torch._dynamo.reset()  # after eight kinds of calls it would compile no more
            ways = {name: called(one, backward) for name, one in {"ours": ours, **others}.items()}
            check = functools.partial(checked, given=given[0], backward=backward)
            work = asked.ceilings.copying(moved(shape, dtype, asked.device, backward))
            yield from measure.compared("group_norm_silu", case, dtype, ways, given, check, work)
        del given


def rows(asked: Asked) -> Iterator[Row]:
    others = asked.peers(peers())
    own = torch.bfloat16 if asked.on_gpu else torch.float32
    shapes = SHAPES if asked.on_gpu else ON_A_CPU
    if asked.quick:
        shapes = shapes[-1:]
    for dtype in asked.dtypes(own, torch.float32, torch.float16, torch.bfloat16):
        for shape in shapes:
            if asked.cases in str(shape):
                yield from measured(shape, dtype, asked, others)


if __name__ == "__main__":
    suite.main(rows, suite.parser_of(__doc__))
