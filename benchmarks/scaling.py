"""Curves: how times grow with the size, of points from 1,024 to 16 million and the like.

Each op has its curves: sizes along one axis, the others fixed. A case's name says them, as in
"n = 1,048,576, L = 32", from which ``benchmarks.charts`` draws. The curve of an implementation ends
before a point that would take too long or does not fit the memory, and where it fails; the others
go on without it. Results are checked as the ops' own benchmarks do; where all directions would take
too long to sort in float64, along the first of them. Without gradients, but for sliced_wasserstein.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import bench_delta_combine as combine
from benchmarks import bench_geglu as gelu
from benchmarks import bench_group_norm_silu as norm
from benchmarks import bench_masked_cross_attention as cross
from benchmarks import bench_sliced_wasserstein as wasserstein
from benchmarks import bench_wide_attention as wide
from benchmarks import measure
from benchmarks.measure import Row, Work
from benchmarks.suite import Asked

LIMIT, QUICK_LIMIT = 1000.0, 150.0  # milliseconds of a call
ENOUGH = 200.0  # milliseconds of calls with one set of inputs after the other
SORTED = 2**24  # points times directions that are sorted in float64 for a check
# Bytes beside the inputs, for each point and direction: keys and their order, before and after, of
# both sides, with what a sort needs besides.
OF_A_SORT = {"torch": 64, "POT": 96}
Check = Callable[[Callable[..., Any]], tuple[str, bool | None]]


@dataclass(frozen=True)
class Way:
    name: str
    call: Callable[..., Any]
    check: Check
    work: Work
    is_ours: bool
    needs: int = 0  # bytes, roughly


@dataclass(frozen=True)
class Point:
    case: str
    dtype: torch.dtype
    cost: float  # to which times are roughly proportional
    given: list[tuple[Any, ...]]
    ways: list[Way]


def curve(op: str, points: Iterable[Callable[[], Point]], asked: Asked) -> Iterator[Row]:
    """``points`` from small to large; each is made when it is its turn."""
    limit, repeats = (QUICK_LIMIT, 3) if asked.quick else (LIMIT, 7)
    last: dict[str, tuple[float, float]] = {}  # cost and time of the last point
    ended: set[str] = set()
    for make in points:
        point = make()
        found: list[tuple[Way, Row]] = []
        for way in point.ways:
            cost, taken = last.get(way.name, (point.cost, 0.0))
            predicted = taken * point.cost / cost
            if way.name in ended:
                continue
            if why := _too_much(way, predicted, limit, asked.device):
                measure.skipped(f"{op}, {point.case} and beyond: {way.name}", why)
                ended.add(way.name)
                continue
            given = point.given[: max(2, int(ENOUGH / predicted))] if predicted else point.given
            row = measure.measured(
                op, point.case, point.dtype, way.name, way.call, given, way.check, way.work,
                way.is_ours, repeats if predicted < ENOUGH else 3,
            )  # fmt: skip
            if row is None:
                ended.add(way.name)
                continue
            last[way.name] = point.cost, row.milliseconds
            found.append((way, row))
        peers = {row.implementation: row.milliseconds for way, row in found if not way.is_ours}
        for way, row in found:
            if way.is_ours:
                row.ratios = {name: time / row.milliseconds for name, time in peers.items()}
            yield row
        if not any(way.is_ours for way, _ in found):
            return


def _too_much(way: Way, predicted: float, limit: float, device: str) -> str:
    if predicted > limit:
        return f"it would take some {predicted / 1e3:.2g} s"
    if 2 * way.needs > (free := available(device)):
        return f"it would need some {way.needs / 1e9:.2g} GB, of {free / 1e9:.2g}"
    return ""


def available(device: str) -> int:
    """Bytes of memory that are free; where no one says, 8 GiB."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    return 2**33


# ---------------------------------------------------------------------------------------------
# The ops


def sliced_wasserstein(asked: Asked) -> Iterator[Row]:
    """Along n and along L, value and gradient."""
    if asked.quick:
        points, directions, (n, count) = range(10, 17, 2), range(0, 7, 2), (2**14, 16)
    else:
        points, directions, (n, count) = range(10, 25), range(0, 11), (2**20, 32)
    for dtype in asked.dtypes(torch.float32, torch.float16, torch.bfloat16):
        along_n = ((2**k, count) for k in points)
        along_l = ((n, 2**k) for k in directions)
        for sizes in (along_n, along_l):
            cases = (wasserstein.Case(*size, dtype) for size in sizes)
            makes = (functools.partial(_wasserstein_point, case, asked) for case in cases)
            yield from curve("sliced_wasserstein", makes, asked)


def _wasserstein_point(case: wasserstein.Case, asked: Asked) -> Point:
    given = case.inputs(asked.device)
    some = max(1, min(case.directions, SORTED // case.n))
    x, y, directions = given[0]
    checked = x, y, directions[:some]
    exact = wasserstein.exact_double(*checked, ties=case.has_ties)

    def check(loss: Callable[..., Any], method: str, _: Any) -> tuple[str, bool]:
        found = wasserstein.with_gradient(loss)(*checked)
        said = wasserstein.agreement(found, exact, method, some)
        return said + (f" along {some} of them" if some < case.directions else ""), True

    ways = [
        Way(
            one.name, wasserstein.with_gradient(one.loss()),
            functools.partial(check, one.loss(), one.method),
            wasserstein.work_of(case, one, asked.ceilings), True,
            32 * case.pairs if one.method == "exact" else 64 * case.n,
        )
        for one in wasserstein.OURS
        if not one.variant and one.runs(case, asked.device)
    ]  # fmt: skip
    for name, loss in wasserstein.peers_of(case, asked):
        if name in (("torch",) if asked.quick else OF_A_SORT):
            call, needs = wasserstein.with_gradient(loss), OF_A_SORT[name] * case.pairs
            ways.append(Way(name, call, lambda _: ("the peer", None), Work(), False, needs))
    name = f"n = {case.n:,}, L = {case.directions:,}"
    return Point(name, case.dtype, case.pairs, given, ways)


def masked_cross_attention(asked: Asked) -> Iterator[Row]:
    """Along the pixels that attend, and along the batch."""
    if asked.quick:
        pixels, batches, n = range(8, 13, 2), range(0, 3), 256
    else:
        pixels, batches, n = range(8, 17), range(0, 7), 4096
    own = torch.bfloat16 if asked.on_gpu else torch.float32
    for dtype in asked.dtypes(own, torch.float32, torch.float16, torch.bfloat16):
        for sizes in (((2, 2**k) for k in pixels), ((2**k, n) for k in batches)):
            cases = (cross.Case(batch, 8, n, 64, dtype) for batch, n in sizes)
            makes = (functools.partial(_cross_point, case, asked) for case in cases)
            yield from curve("masked_cross_attention", makes, asked)


def _cross_point(case: cross.Case, asked: Asked) -> Point:
    masks, given = cross.Masks.of(case, asked.device), case.inputs(asked.device, False)
    work = asked.ceilings.copying(2 * case.bytes)

    def check(mask: Any, call: Callable[..., Any]) -> tuple[str, bool]:
        off = cross.error(call(*given[0]), cross.exact(given[0], mask, False))
        return f"float64, off by {off:.1e}", off <= cross.bound(mask, case.dtype)

    ours = cross.ours(masks, quick=True)
    ways = [
        Way(
            name, cross.called(function, False), functools.partial(check, mask), work,
            name.startswith("ours"),
        )
        for name, function, mask in (*ours, *cross.peers(case, masks, asked))
    ]  # fmt: skip
    name = f"pixels = {case.n:,}, batch = {case.batch:,}, 8 heads of 64"
    return Point(name, case.dtype, case.batch * case.n, given, ways)


def wide_attention(asked: Asked) -> Iterator[Row]:
    """Along the tokens and along the batch."""
    if asked.quick:
        tokens, batches, n = range(8, 12), range(0, 3), 256
    else:
        tokens, batches, n = range(8, 17), range(0, 7), 1024
    own = torch.bfloat16 if asked.on_gpu else torch.float32
    for dtype in asked.dtypes(own, torch.float32, torch.float16, torch.bfloat16):
        for sizes in (((1, 2**k) for k in tokens), ((2**k, n) for k in batches)):
            makes = (functools.partial(_wide_point, *size, dtype, asked) for size in sizes)
            yield from curve("wide_attention", makes, asked)


def _wide_point(batch: int, tokens: int, dtype: torch.dtype, asked: Asked) -> Point:
    given = wide.inputs(batch, tokens, dtype, asked.device)
    scores = batch * tokens**2
    work = asked.ceilings.multiplying(4 * scores * wide.WIDTH, dtype)
    check = functools.partial(wide.checked, given=given[0])
    whole = ("plain products", "SDPA, math")  # which hold all scores, and their softmax
    ways = [
        Way(
            name, wide.called(function, False), check, work, name == "ours",
            3 * 4 * scores if name in whole else 0,
        )
        for name, function in wide.ways(tokens).items()
    ]  # fmt: skip
    return Point(f"tokens = {tokens:,}, batch = {batch:,}", dtype, scores, given, ways)


def group_norm_silu(asked: Asked) -> Iterator[Row]:
    """Along the pixels, of 128 channels, contiguous."""
    yield from _of_pixels("group_norm_silu", asked, range(4, 9) if asked.quick else range(4, 11))


def geglu(asked: Asked) -> Iterator[Row]:
    """Along the pixels, of 1280 outputs each."""
    yield from _of_pixels("geglu", asked, range(2, 7) if asked.quick else range(2, 9))


def delta_combine(asked: Asked) -> Iterator[Row]:
    """Along the pixels, of epsilon predictions of latents of 4 channels."""
    yield from _of_pixels("delta_combine", asked, range(4, 9) if asked.quick else range(4, 12))


def _of_pixels(op: str, asked: Asked, powers: range) -> Iterator[Row]:
    """Of squares, whose sides are powers of two."""
    make = {"group_norm_silu": _norm_point, "geglu": _gelu_point, "delta_combine": _combine_point}
    own = torch.bfloat16 if asked.on_gpu else torch.float32
    for dtype in asked.dtypes(own, torch.float32, torch.float16, torch.bfloat16):
        makes = (functools.partial(make[op], 2**k, dtype, asked) for k in powers)
        yield from curve(op, makes, asked)


def _norm_point(side: int, dtype: torch.dtype, asked: Asked) -> Point:
    shape = (1, 128, side, side)
    given = norm.inputs(shape, dtype, asked.device, False)
    case = f"pixels = {side**2:,}, 128 channels"
    return _layer_point(norm, norm.ours, case, shape, dtype, given, asked)


def _gelu_point(side: int, dtype: torch.dtype, asked: Asked) -> Point:
    shape = (1, side**2, 2 * 1280)
    given = gelu.inputs(shape, dtype, asked.device)
    case = f"pixels = {side**2:,}, 1,280 wide"
    return _layer_point(gelu, gelu.geglu, case, shape, dtype, given, asked)


def _layer_point(
    bench: ModuleType,
    ours: Callable[..., Any],
    case: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    given: list[tuple[Any, ...]],
    asked: Asked,
) -> Point:
    check = functools.partial(bench.checked, given=given[0], backward=False)
    work = asked.ceilings.copying(bench.moved(shape, dtype, asked.device, False))
    torch._dynamo.reset()  # after eight kinds of calls it would compile no more
    functions = {"ours": ours, **asked.peers(bench.peers())}
    calls = {name: bench.called(one, False) for name, one in functions.items()}
    return _point(case, dtype, torch.Size(shape).numel(), given, calls, check, work)


def _combine_point(side: int, dtype: torch.dtype, asked: Asked) -> Point:
    shape = (1, 4, side, side)
    sets = measure.sets_for(8 * 4 * side**2 * dtype.itemsize, asked.device)
    given = [combine.inputs(shape, dtype, asked.device, n) for n in range(sets)]
    plain = combine.plain({})
    torch._dynamo.reset()
    peers = {"PyTorch": plain, "torch.compile": torch.compile(plain, dynamic=False)}
    calls = {"ours": combine.ours({}), **asked.peers(peers)}
    check = functools.partial(combine.checked, options={}, given=given[0])
    work = asked.ceilings.copying(8 * 4 * side**2 * dtype.itemsize)
    return _point(f"pixels = {side**2:,}, 4 channels", dtype, side**2, given, calls, check, work)


def _point(
    case: str,
    dtype: torch.dtype,
    cost: float,
    given: list[tuple[Any, ...]],
    calls: dict[str, Callable[..., Any]],
    check: Check,
    work: Work,
) -> Point:
    # What is checked is computed in float64, several times over.
    needs = 6 * 8 * given[0][0].numel()
    ways = [Way(name, call, check, work, name == "ours", needs) for name, call in calls.items()]
    return Point(case, dtype, cost, given, ways)


CURVES = {
    one.__name__: one
    for one in (
        sliced_wasserstein, masked_cross_attention, wide_attention, group_norm_silu, geglu,
        delta_combine,
    )
}  # fmt: skip
