"""Sliced Wasserstein by sorting on the CUDA backend: what the kernels work in, and their order.

Work memory comes from torch's allocator, which keeps it for this stream. A pass takes some slots,
pairs of a batch element and a direction, so that memory is bounded. Their number follows from
sizes, or from free memory where that is short (but for sets that one block sorts); except for the
rounding of matrix products, with points of more than four coordinates, it changes no result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdcore import backends
from sdcore.ops.pointers import address, described
from sdcore.ops.sliced_wasserstein_cuda import MOST_COORDINATES, place

# Keys that one pass sorts on each side: 32 directions of a million points, in 0.8 GB. Fewer would
# leave the GPU idle between launches.
KEYS_OF_A_PASS = 1 << 25
# Slots of a pass take 7 bits of a key. The other 25 of 32 are a sign and the 24 that a float32
# number's significand has.
MOST_SLOTS = 128
DOUBLE_BITS = 54
# Passes of less work memory than this are made without asking how much is free.
LITTLE = 1 << 26


class Points(NamedTuple):
    points: Tensor  # [B, n, d]
    weights: Tensor | None  # float64 [B, n]


class Kept(NamedTuple):
    """What ``sort`` makes of a set, contiguous."""

    values: Tensor  # [1 or B, L, m]
    levels: Tensor  # likewise, or empty

    def described(self) -> tuple[int, int, int, bool]:
        levels = self.levels.data_ptr() if self.levels.numel() else 0
        return self.values.data_ptr(), levels, self.values.shape[-1], self.values.shape[0] == 1


NONE_KEPT = (0, 0, 0, False)


class Slopes(NamedTuple):
    """Slopes [slots, n] of a pass, in buckets; csrc/cuda/sliced_wasserstein_exact.h."""

    slopes: Tensor
    places: Tensor
    spare: Tensor  # memory for as many slopes
    bits: int

    def described(self) -> tuple[int, int, int, int]:
        return self.slopes.data_ptr(), self.places.data_ptr(), self.bits, self.slopes.shape[1]

    def in_order(self, finite: bool = False) -> Slopes:
        """In the order of the points; if ``finite``, with 0 in the place of NaN."""
        if self.bits == 0:
            if not finite:
                return self
            return self._replace(slopes=torch.where(self.slopes.isnan(), 0, self.slopes))
        backends.cuda_module().sliced_wasserstein_unpack(
            self.described(),
            self.slopes.shape[0],
            self.spare.data_ptr(),
            finite,
            self.slopes.dtype == torch.float64,
            place(self.slopes),
        )
        return Slopes(self.spare, self.places, self.slopes, 0)


def sort(points: Tensor, directions: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sorted projections [B, L, m], and the weights' sums up to each, float64, empty if equal."""
    batch, m, _ = points.shape
    count = len(directions)
    values = directions.new_empty(batch, count, m)
    shape = (0,) if weights is None else values.shape
    levels = values.new_empty(shape, dtype=torch.float64)
    for first, slots in _passes(batch * count, _slots(m)):
        rows = _rows(points, directions, first, slots)
        found, order = rows.sort(-1)
        values.view(-1, m)[first : first + slots] = found
        if weights is not None:
            _sum_weights(
                order.int(), weights.contiguous(), (first, slots, count), levels.view(-1, m)[first:]
            )
    return values, levels


class _Call(NamedTuple):
    """What is asked for, and where it goes."""

    x: Points
    y: Points | Kept
    directions: Tensor
    p: int
    grad: Tensor | None  # [B, L] of the values; None: ones
    scale: float
    need: tuple[bool, bool]  # which sides' gradients
    values: Tensor  # [B, L]
    gradients: list[Tensor]  # of the sides, [B, n, d] where needed


def exact(
    x: Points,
    y: Points | Kept,
    directions: Tensor,
    p: int,
    grad: Tensor | None,
    scale: float,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values [B, L], and the gradients of their sum, weighted by ``grad`` [B, L] (None: by one)
    and by ``scale``: Real [B, n, d] and [B, m, d], empty where not needed (for a kept set never).
    """
    directions = directions.contiguous()
    grad = None if grad is None else grad.contiguous()
    x = _dense(x)
    y = y if isinstance(y, Kept) else _dense(y)
    batch, _, d = x.points.shape
    values = directions.new_empty(batch, len(directions))
    need = need_x, need_y and isinstance(y, Points)
    gradients = [
        directions.new_empty(side.points.shape if needed else (0,))
        for side, needed in zip((x, y), need, strict=True)
    ]
    if batch:
        call = _Call(x, y, directions, p, grad, scale, need, values, gradients)
        if _is_small(call):
            _solve_small(call)
        elif d <= MOST_COORDINATES:
            _solve_few(call)
        else:
            _solve_many(call)
    return values, gradients[0], gradients[1]


def _solve_few(call: _Call) -> None:
    problem = _Problem(call.x, call.y, call.directions, call.p, call.need)
    can_pull_buckets = backends.cuda_module().sliced_wasserstein_can_pull_buckets
    for pass_ in problem.passes():
        for side, slopes in enumerate(problem.run(pass_, call.values)):
            if slopes is not None:
                slopes = slopes if can_pull_buckets(slopes.bits) else slopes.in_order()
                _pull_few(call, side, slopes.described(), pass_)


def _solve_many(call: _Call) -> None:
    """Points of many coordinates: matrix products project them, and pull slopes back. In between,
    each slot of a pass is a batch element with points on a line."""
    batch, count = call.values.shape
    one = call.directions.new_ones(1, 1)
    most = max(_count(call.x), _count(call.y))
    for first, slots in _passes(batch * count, _slots(most)):
        lines = [_lines(side, call.directions, first, slots) for side in (call.x, call.y)]
        problem = _Problem(*lines, one, call.p, call.need)
        found = call.values.view(-1)[first : first + slots]
        for side, slopes in enumerate(problem.run((0, slots, 1), found)):
            if slopes is not None:
                mass = 1.0 if lines[side].weights is not None else 1 / _count(lines[side])
                _pull_many(call, side, slopes.in_order(finite=True).slopes, first, mass)
    for side, gradient in zip((call.x, call.y), call.gradients, strict=True):
        if gradient.numel() and side.weights is not None:
            gradient *= side.weights[..., None]


def _lines(side: Points | Kept, directions: Tensor, first: int, slots: int) -> Points | Kept:
    """A pass's slots, each as a batch element of one direction."""
    count, here = len(directions), torch.arange(first, first + slots, device=directions.device)
    if isinstance(side, Points):
        rows = _rows(side.points, directions, first, slots)[..., None]
        return Points(rows, None if side.weights is None else side.weights[here // count])
    row = here % count if side.values.shape[0] == 1 else here
    levels = side.levels.flatten(0, 1)[row][:, None] if side.levels.numel() else side.levels
    return Kept(side.values.flatten(0, 1)[row][:, None], levels)


def _is_small(call: _Call) -> bool:
    """Whether one block of threads solves a slot: csrc/cuda/sliced_wasserstein_small.cu."""
    x, y = call.x, call.y
    weighted = y.levels.numel() > 0 if isinstance(y, Kept) else y.weights is not None
    if weighted or x.weights is not None:
        return False
    device = call.directions.device.index
    most = backends.cuda_module().sliced_wasserstein_most_small_points(device)
    return _count(x) == _count(y) <= most and call.directions.dtype == torch.float32


def _solve_small(call: _Call) -> None:
    n = _count(call.x)
    # Both sides' projections and slopes, in float32.
    most = min(max(1, KEYS_OF_A_PASS // n), call.values.numel())
    most = _that_fit(most, 3 * 4 * n, call.values.device)
    for first, slots in _passes(call.values.numel(), most):
        _solve_small_pass(call, first, slots)


def _solve_small_pass(call: _Call, first: int, slots: int) -> None:
    """Values, and then the slopes of one side after the other: with as many points of equal weight
    neither is different from the other."""
    n, count = _count(call.x), len(call.directions)
    few = call.x.points.shape[-1] <= MOST_COORDINATES
    rows = [_row_of_each(side, call, first, slots) for side in (call.x, call.y)]
    found = call.values.view(-1)[first : first + slots]
    slopes = torch.empty_like(rows[0]) if any(call.need) else None
    for side in [side for side in (0, 1) if call.need[side]] or [0]:
        backends.cuda_module().sliced_wasserstein_small(
            rows[side].data_ptr(),
            rows[1 - side].data_ptr(),
            slots,
            n,
            call.p,
            found.data_ptr(),
            address(slopes),
            math.nan if few else 0.0,
            place(found),
        )
        if slopes is not None and few:
            _pull_few(call, side, (slopes.data_ptr(), 0, 0, n), (first, slots, count))
        elif slopes is not None:
            _pull_many(call, side, slopes, first, 1 / n)


def _row_of_each(side: Points | Kept, call: _Call, first: int, slots: int) -> Tensor:
    """Projections [slots, n] of a pass's slots, of a kept set in order."""
    if isinstance(side, Points):
        return _rows(side.points, call.directions, first, slots)
    rows = side.values.flatten(0, 1)
    if len(rows) == call.values.numel():
        return rows[first : first + slots]
    # The same for all batch elements: of a pass alone, lest memory grow with the batch.
    return rows[torch.arange(first, first + slots, device=rows.device) % len(rows)]


def _pull_few(
    call: _Call, side: int, slopes: tuple[int, int, int, int], pass_: tuple[int, int, int]
) -> None:
    """From slopes of a pass, as ``Slopes.described`` has them, to the gradient [B, n, d]."""
    out = call.gradients[side]
    backends.cuda_module().sliced_wasserstein_pull(
        slopes,
        (call.directions.data_ptr(), len(call.directions)),
        out.shape[-1],
        pass_,
        address(call.grad),
        call.scale,
        address((call.x, call.y)[side].weights),
        out.data_ptr(),
        out.dtype == torch.float64,
        place(out),
    )


def _pull_many(call: _Call, side: int, slopes: Tensor, first: int, mass: float) -> None:
    """From slopes [slots, n] of a pass to the gradient [B, n, d], to which all passes add.

    A NaN among the values goes to the gradient by the directions: among the slopes it would lie
    beside those of other batch elements, and a product need not keep to its own rows.
    """
    values, out = call.values.view(-1)[first : first + len(slopes)], call.gradients[side]
    poison = torch.where(values.isnan(), values, 0)[:, None]
    for b, rows, some in _batches(first, len(slopes), len(call.directions)):
        theta = call.directions[some] + poison[rows]
        if call.grad is not None:
            theta = theta * call.grad[b, some, None]
        with torch.autocast("cuda", enabled=False):
            out[b].addmm_(
                slopes[rows].mT, theta, beta=float(some.start > 0), alpha=call.scale * mass
            )


class _Problem:
    """Sets of up to four coordinates, on one grid per slot."""

    def __init__(
        self,
        x: Points,
        y: Points | Kept,
        directions: Tensor,
        p: int,
        need: tuple[bool, bool],
    ) -> None:
        self.sides, self.directions, self.p, self.need = (x, y), directions, p, need
        self.batch, self.count = x.points.shape[0], len(directions)
        self.double = directions.dtype == torch.float64
        self.most = max(_count(x), _count(y))
        self.bits = _bits(self.double, self.most)
        self.exponents, self.poison = self._grid()

    def _directions(self) -> tuple[int, int]:
        return self.directions.data_ptr(), self.count

    def _grid(self) -> tuple[Tensor, Tensor]:
        kind = torch.int64 if self.double else torch.int32
        extremes = self.directions.new_zeros(self.batch, self.count, 2, dtype=kind)
        exponents, poison = extremes.new_empty(
            2, self.batch, self.count, dtype=torch.int32
        ).unbind()
        points = [described(side.points) for side in self.sides if isinstance(side, Points)]
        kept = [side.described() for side in self.sides if isinstance(side, Kept)]
        weights = [address(side.weights) if isinstance(side, Points) else 0 for side in self.sides]
        where = place(extremes)
        module = backends.cuda_module()
        module.sliced_wasserstein_range(points, self._directions(), extremes.data_ptr(), where)
        module.sliced_wasserstein_grid(
            extremes.data_ptr(),
            kept[0] if kept else NONE_KEPT,
            weights,
            [_count(side) for side in self.sides],
            self.batch,
            self.count,
            self.bits,
            exponents.data_ptr(),
            poison.data_ptr(),
            self.double,
            where,
        )
        return exponents, poison

    def passes(self) -> Iterator[tuple[int, int, int]]:
        """First slot, slots, directions."""
        slots = self.batch * self.count
        real = self.directions.element_size()
        # Keys and numbers twice, levels and moments: what a slot takes at the most.
        each = sum(_count(side) * (2 * (real + 4) + 16) for side in self.sides)
        most = _that_fit(min(_slots(self.most), slots), each, self.directions.device)
        for first, some in _passes(slots, most):
            yield first, some, self.count

    def run(self, pass_: tuple[int, int, int], values: Tensor) -> list[Slopes | None]:
        """Values of these slots, and the slopes of each side that needs them."""
        slots, device = pass_[1], self.directions.device
        module = backends.cuda_module()
        sides = [self._sorted(number, pass_) for number in (0, 1)]
        blocks = module.sliced_wasserstein_transport_blocks(*map(_count, self.sides), self.double)
        chunks = module.sliced_wasserstein_prefix_chunks(self.most)
        work = torch.empty(slots * (blocks + chunks), dtype=torch.float64, device=device)
        module.sliced_wasserstein_transport(
            *(side.described() for side in sides),
            pass_,
            self.bits,
            self.exponents.data_ptr(),
            self.poison.data_ptr(),
            self.p,
            work.data_ptr(),
            work[slots * blocks :].data_ptr(),
            values.data_ptr(),
            self.double,
            place(work),
        )
        return [side.slopes for side in sides]

    def _sorted(self, number: int, pass_: tuple[int, int, int]) -> _Sorted:
        """One side's points in order, with memory for what is to be found of them."""
        module, side, like = backends.cuda_module(), self.sides[number], self.directions
        slots, n = pass_[1], _count(side)
        moments = None
        if self.p == 2 and self.need[1 - number]:
            moments = like.new_empty(slots, n, dtype=torch.float64)
        if isinstance(side, Kept):
            return _Sorted(n, None, side.described(), side, None, None, None, moments)
        keys, order = self._sort(side, pass_, self.need[number])
        levels = slopes = cursors = None
        if side.weights is not None:
            levels = like.new_empty(slots, n, dtype=torch.float64)
            _sum_weights(order[0], side.weights, pass_, levels)
        if self.need[number]:
            bits = module.sliced_wasserstein_bucket_bits(n, self.double)
            # The other buffers of sorting are free again; the keys' own is, once they are used.
            slopes = Slopes(keys[1].view(like.dtype), order[1], keys[0].view(like.dtype), bits)
            if bits:
                cursors = order[0].new_zeros(slots, -(-n >> bits))
        kept = (0, address(levels), n, False)
        return _Sorted(n, keys[0], kept, levels, order, slopes, cursors, moments)

    def _sort(
        self, side: Points, pass_: tuple[int, int, int], need: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """Sorted keys and the points' numbers, [slots, n], each with a spare buffer; numbers only
        where they are needed."""
        module, where = backends.cuda_module(), place(side.points)
        slots, n = pass_[1], side.points.shape[1]
        like = self.directions
        keys = like.new_empty(2, slots, n, dtype=torch.int64 if self.double else torch.int32)
        order = None
        if need or side.weights is not None:
            order = like.new_empty(2, slots, n, dtype=torch.int32)
        module.sliced_wasserstein_keys(
            described(side.points),
            self._directions(),
            pass_,
            self.bits,
            self.exponents.data_ptr(),
            self.poison.data_ptr(),
            keys.data_ptr(),
            address(order),
            where,
        )
        bits, size = self.bits + (slots - 1).bit_length(), keys.element_size()
        bytes_ = module.radix_sort_workspace(
            slots * n, size, order is not None, bits, like.device.index
        )
        workspace = like.new_empty(bytes_, dtype=torch.uint8)
        now = module.radix_sort(
            (keys[0].data_ptr(), keys[1].data_ptr()),
            (0, 0) if order is None else (order[0].data_ptr(), order[1].data_ptr()),
            size,
            slots * n,
            bits,
            workspace.data_ptr(),
            bytes_,
            where,
        )
        return (keys[now], keys[1 - now]), None if order is None else (order[now], order[1 - now])


class _Sorted(NamedTuple):
    """A side of a pass, as the transport kernel takes it."""

    count: int
    keys: Tensor | None
    kept: tuple[int, int, int, bool]
    held: object  # what the addresses in `kept` belong to
    order: tuple[Tensor, Tensor] | None
    slopes: Slopes | None
    cursors: Tensor | None
    moments: Tensor | None

    def described(self) -> tuple[Any, ...]:
        slopes = self.slopes
        return (
            address(self.keys),
            self.kept,
            0 if self.order is None else self.order[0].data_ptr(),
            (0, 0, 0, self.count) if slopes is None else slopes.described(),
            address(self.cursors),
            address(self.moments),
        )


def _sum_weights(
    order: Tensor, weights: Tensor, pass_: tuple[int, int, int], levels: Tensor
) -> None:
    module, n = backends.cuda_module(), weights.shape[1]
    chunks = module.sliced_wasserstein_prefix_chunks(n)
    totals = levels.new_empty(pass_[1], chunks)
    module.sliced_wasserstein_levels(
        order.data_ptr(),
        weights.data_ptr(),
        n,
        pass_,
        levels.data_ptr(),
        totals.data_ptr(),
        place(levels),
    )


def _dense(side: Points) -> Points:
    return Points(side.points, None if side.weights is None else side.weights.contiguous())


def _count(side: Points | Kept) -> int:
    return side.points.shape[1] if isinstance(side, Points) else side.values.shape[-1]


def _slots(most: int) -> int:
    """Slots of a pass of sets of up to ``most`` points: a power of two."""
    return min(MOST_SLOTS, 1 << max(0, (KEYS_OF_A_PASS // most).bit_length() - 1))


def _bits(double: bool, most: int) -> int:
    """Of a projection in a key."""
    if double:
        return DOUBLE_BITS
    # At most 31, so that the difference of two fits 32.
    return min(31, 33 - _slots(most).bit_length())


def _free(device: torch.device) -> int:
    """Bytes that a pass may take: half of what the driver and PyTorch's cache have left."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + cached) // 2


def _that_fit(slots: int, each: int, device: torch.device) -> int:
    """Of a pass's slots, of ``each`` bytes, those that memory has room for.

    Room for little is not asked for, and while a graph is captured, sizes alone decide.
    """
    if slots * each <= LITTLE or torch.cuda.is_current_stream_capturing():
        return slots
    return min(slots, max(1, _free(device) // each))


def _passes(slots: int, most: int) -> Iterator[tuple[int, int]]:
    """First slot and number of slots."""
    for first in range(0, slots, most):
        yield first, min(most, slots - first)


def _batches(first: int, slots: int, count: int) -> Iterator[tuple[int, slice, slice]]:
    """Batch elements of slots; which rows of theirs, and which directions, those are."""
    for b in range(first // count, (first + slots - 1) // count + 1):
        low, high = max(first, b * count), min(first + slots, (b + 1) * count)
        yield b, slice(low - first, high - first), slice(low - b * count, high - b * count)


def _rows(points: Tensor, directions: Tensor, first: int, slots: int) -> Tensor:
    """Projections [slots, n] of a pass's slots."""
    n, d = points.shape[1:]
    directions = directions.contiguous()
    rows = directions.new_empty(slots, n)
    if d <= MOST_COORDINATES:
        backends.cuda_module().sliced_wasserstein_project(
            described(points),
            (directions.data_ptr(), len(directions)),
            (first, slots, len(directions)),
            rows.data_ptr(),
            place(rows),
        )
        return rows
    for b, here, some in _batches(first, slots, len(directions)):
        with torch.autocast("cuda", enabled=False):
            torch.mm(directions[some], points[b].to(directions.dtype).mT, out=rows[here])
    return rows
