"""Sliced Wasserstein distance between point sets, with gradient.

From top to bottom: the public function; the reference, which is the specification; the flat ops
and their gradients; the implementations (plain PyTorch, C++, Triton, CUDA).

Both methods solve, for each direction, a one-dimensional transport problem. ``exact`` sorts the
projections. ``binned`` snaps them to the centers of equal bins first: a histogram then replaces
the sort, and the gradient of a point is a table entry that its bin selects.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sdcore import backends
from sdcore.ops import registration
from sdcore.ops import sliced_wasserstein_cuda as cuda
from sdcore.ops import sliced_wasserstein_cuda_exact as cuda_exact
from sdcore.ops.pointers import address, described
from sdcore.ops.random_rotations import random_directions, resolve_device
from sdcore.palette import Palette

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
METHODS = ("exact", "binned")
REDUCTIONS = ("mean", "sum", "none")
# A float32 bin index resolves a sixteenth of a bin up to here.
MOST_BINS = 1 << 20
# Bins begin lower by so many times the rounding of their range. Grays of 8 bits, say, lie on edges
# of the bins of (0, 1), and rounding would decide which of them go down: of a photo, 40 % of its
# pixels at once.
EDGE_ROUNDINGS = 8
# Point counts and bin counts are 32-bit in the kernels, which look a tile ahead.
MOST_POINTS = (1 << 31) - (1 << 16)


def sliced_wasserstein(
    x: Tensor,
    y: Tensor | Palette,
    *,
    p: int = 1,
    directions: int | Tensor = 64,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    method: str = "exact",
    bins: int = 4096,
    value_range: tuple[float, float] | None = None,
    rescale: tuple[float, float] | None = None,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Sliced Wasserstein distance :math:`SW_p^p` between two weighted point sets.

    .. math::
        SW_p^p = \frac1L \sum_{l=1}^{L} \int_0^1
                 \left| F_{X\theta_l}^{-1}(u) - F_{Y\theta_l}^{-1}(u) \right|^p du

    where :math:`F_{X\theta}^{-1}` is the quantile function of the projections ``x @ theta``.

    Args:
        x: [..., n, d], float32, float64, float16 or bfloat16, any strides.
        y: [..., m, d]; n and m may differ; leading dimensions broadcast with those of x. Two
            dtypes are promoted as PyTorch promotes them. Arithmetic and result are float32
            (float64 if an input is). Or a :class:`sdcore.Palette` on the device of x, whose
            colors and weights are then those of y. On a GPU, ``binned`` with a ``value_range``
            keeps the palette's histograms, and ``exact`` its sorted projections, L numbers a
            color, for as long as the same tensor of directions comes, unchanged: a call then
            costs what its x costs. A CUDA graph that is captured after such a call holds what
            was kept, and its replays do not see later directions.
        p: 1 or 2.
        directions: how many to draw, uniformly on the sphere, from ``generator``; or a tensor
            [L, d], taken as it is: unit rows give the distance above, others scale it.
        weights_x, weights_y: [..., n] and [..., m], non-negative, normalized here to sum to one;
            None means equal weights. Zero-weight points count for nothing, except that ``binned``
            without ``value_range`` spans them with its bins.
        method: ``"exact"`` sorts; on an NVIDIA GPU projections in fixed point, of at least 25
            bits, a sign and the 24 of a float32 number for the largest (54 of float64 points).
            ``"binned"`` moves every projection to the center of one of ``bins`` equal bins.
        bins: for ``binned``, 2 to 1,048,576.
        value_range: for ``binned``, (low, high) that all coordinates lie in, (0, 1) for colors.
            It saves a pass over the data. Each direction's bins then span the projection of that
            box, and a projection outside of it counts in the nearest end bin, in value and
            gradient. None: bins span the projections found.
        rescale: for ``binned`` with a ``value_range``, (a, b): x, and x alone, is taken as
            clamp(a · x + b, low, high), in float32, rounded once on a GPU and after each operation
            elsewhere, which is the same where a is a power of two. So a decoder's picture of
            [−1, 1] goes in as it is, [B, 3, H, W].flatten(2).mT of any of the dtypes, with
            (0.5, 0.5), and no copy of it is made. The gradient has the factor a, and is zero where
            clamp moved a coordinate.
        reduction: over directions: ``"mean"``, ``"sum"``, or ``"none"`` for [..., L].
        generator: random source for directions, on the device of x.

    Returns:
        [...] (or [..., L]): the p-th power of the distance, per batch element, in the units of
        the coordinates to the power p. ``ot.sliced_wasserstein_distance`` of POT, given
        ``projections=directions.T`` and the same p, is this to the power 1/p. The loss of
        SW-Guidance (Lobashev, Larchenko, Guskov, 2025), a sum over three rotated axes and a mean
        over rotations, is 3 times this with p = 1 and
        ``directions=random_rotations(K, 3).flatten(0, 1)``.

    Gradient:
        To x and y; none to directions or weights, which are constants here. Points that tie on
        a projection share its subgradient by weight, so the gradient does not depend on the
        order of the points; where x and y meet, sign(0) = 0. A second derivative raises.

    Error of ``binned``, for a direction with bins of width w that cover the data: a projection
    moves by at most w/2, so :math:`|W_p - \hat W_p| \le w`, and
    :math:`|W_p^p - \hat W_p^p| \le w` for p = 1 and :math:`\le w (2 W_2 + w)` for p = 2 (plus
    rounding). w is the projected range over ``bins``. Points of one bin get one gradient. For
    p = 2 it is the mean of their exact gradients to within 2w, per unit of weight. For p = 1
    there is no such bound: a gradient is a sign, and where a point is closer than w to its
    partner the sign is a guess. It is good while the sets are apart and rough near convergence.

    Cost: ``exact`` O(L (n + m)) after sorting, memory O((n + m) d) plus a bounded number of
    directions at a time (the reference backend: all L at once). ``binned`` O(L (n + m) d + L
    bins), memory O((n + m) d + L bins). Neither copies to the host or synchronizes.

    Repeatable bit for bit on one backend and machine, since weighted histograms add in fixed
    point; the reference backend on a GPU is not, because PyTorch's scatter_add there is not.

    Raises:
        TypeError: an argument of the wrong type, or points of another dtype.
        ValueError: shapes, devices or options that do not fit; the message names the argument.
            Negative, non-finite or all-zero weights raise it too for CPU tensors. On a GPU, where
            looking would stop the stream, they make the value and gradients NaN.
        RuntimeError: a second derivative was asked for.

    A NaN or an infinity among the coordinates makes the value NaN on every direction whose
    projections it reaches, and with it the gradients of that batch element; but ``rescale`` clamps
    infinities as it does other numbers.
    """
    palette, given, taken = None, directions, None
    if isinstance(y, Palette):
        if weights_y is not None:
            raise ValueError("weights_y is for y as a tensor; a palette has weights of its own")
        palette, y = y, y.colors
        weights_y = None if palette.has_equal_weights else palette.weights
    _check_points(x, y)
    _check_options(p, method, bins, value_range, rescale, reduction)
    batch = _broadcast_batch(x, y)
    directions = _directions(directions, x, generator)
    if rescale is not None and value_range is not None:
        taken = [float(number) for number in (*rescale, *value_range)]
        if x.shape[-1] > cuda.MOST_COORDINATES:
            # A matrix product makes their projections, and takes points as they are.
            x, taken = rescaled(x, taken), None
    if palette is not None and isinstance(given, Tensor) and x.is_cuda:
        # Nothing is kept where it would be traced; and on a CPU y costs little next to x.
        keeps = method == "exact" or value_range is not None
        keeps = keeps and directions.dtype == compute_dtype(x.dtype)
        if keeps and not torch.compiler.is_compiling():
            return _against_kept(
                x, palette, given, weights_x, p, bins, value_range, taken, reduction
            )
    dtype = torch.promote_types(x.dtype, y.dtype)
    weights_x = _normalized_weights("weights_x", weights_x, x, batch)
    weights_y = _normalized_weights("weights_y", weights_y, y, batch)
    if taken is None or dtype == torch.float64:  # else x is converted as it is read
        x, y = x.to(dtype), y.to(dtype)
    x = x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:])
    y = y.expand(*batch, *y.shape[-2:]).reshape(-1, *y.shape[-2:])
    directions = directions.to(compute_dtype(dtype))

    scale = _scale_of(reduction, directions)
    if method == "binned":
        values = _binned(
            x, y, directions, weights_x, weights_y, p, bins, value_range, scale, taken
        )[0]
    else:
        track = torch.is_grad_enabled()
        need_x, need_y = track and x.requires_grad, track and y.requires_grad
        values = _exact(x, y, directions, weights_x, weights_y, p, scale, need_x, need_y)[0]
    return values.reshape(*batch, -1) if scale is None else values.reshape(batch)


def _against_kept(
    x: Tensor,
    palette: Palette,
    directions: Tensor,
    weights_x: Tensor | None,
    p: int,
    bins: int,
    value_range: tuple[float, float] | None,
    taken: list[float] | None,
    reduction: str,
) -> Tensor:
    """Against what the palette keeps: histograms in a ``value_range``, else sorted projections."""
    batch = x.shape[:-2]
    weights_x = _normalized_weights("weights_x", weights_x, x, batch)
    x = x.reshape(-1, *x.shape[-2:])
    plain = directions.detach()
    weights = None if palette.has_equal_weights else palette.weights[None]
    scale = _scale_of(reduction, directions)

    def colors() -> Tensor:
        return palette.colors[None].to(plain.dtype)

    if value_range is None:
        kept = palette.kept(directions, "sorted", lambda: _sort(colors(), plain, weights))
        need_x = torch.is_grad_enabled() and x.requires_grad
        values = _exact_to(x, *kept, plain, weights_x, p, scale, need_x)[0]
    else:
        box = tuple(value_range)
        (histogram,) = palette.kept(
            directions, (bins, box), lambda: (_histogram(colors(), plain, weights, bins, box),)
        )
        values = _binned_to(x, histogram, plain, weights_x, p, box, scale, taken)[0]
    return values.reshape(*batch, -1) if scale is None else values.reshape(batch)


def _scale_of(reduction: str, directions: Tensor) -> float | None:
    """What the sum over directions is multiplied by; None if there is no sum."""
    return {"mean": 1 / directions.shape[0], "sum": 1.0, "none": None}[reduction]


def reference(
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    *,
    p: int = 1,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    method: str = "exact",
    bins: int = 4096,
    value_range: tuple[float, float] | None = None,
    rescale: tuple[float, float] | None = None,
) -> Tensor:
    """The specification: W_p^p per direction, [B, L], differentiable by autograd.

    x [B, n, d], y [B, m, d], directions [L, d], weights [B, n] and [B, m].
    """
    if rescale is not None and value_range is not None:
        x = rescaled(x, (*rescale, *value_range))
    px, py = project(x, directions), project(y, directions)
    if method == "binned":
        low, high = bounds(px, py, directions, value_range)
        px, py = snap(px, low, high, bins), snap(py, low, high, bins)
    px, mass_x = sort_with_mass(px, weights_x)
    py, mass_y = sort_with_mass(py, weights_y)
    i, j, mass = couple(mass_x, mass_y)
    px, py = tie_average(px, mass_x), tie_average(py, mass_y)
    cost = (px.gather(-1, i) - py.gather(-1, j)).abs() ** p * mass
    return cost.sum(-1) * nan_unless_finite(px, py, mass_x, mass_y)


def rescaled(points: Tensor, rescale: Sequence[float]) -> Tensor:
    """By (a, b, low, high), in float32 or float64."""
    a, b, low, high = rescale
    return (a * points.to(compute_dtype(points.dtype)) + b).clamp(low, high)


def project(points: Tensor, directions: Tensor) -> Tensor:
    """[B, n, d] and [L, d] to [B, L, n], in float32 or float64."""
    dtype = compute_dtype(points.dtype)
    points, directions = points.to(dtype), directions.to(dtype)
    if points.shape[-1] > cuda.MOST_COORDINATES:
        return directions @ points.mT
    # A matrix product may round the last columns otherwise than the first (MKL's does): equal
    # points, of which colors have many, would not tie.
    terms = (points[:, None, :, k] * directions[:, k, None] for k in range(points.shape[-1]))
    return functools.reduce(torch.add, terms)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bounds(
    px: Tensor, py: Tensor, directions: Tensor, value_range: tuple[float, float] | None
) -> tuple[Tensor, Tensor]:
    """Where each direction's bins begin and end: [B, L, 1] each."""
    if value_range is None:
        both = torch.cat([px, py], -1)
        return both.amin(-1, keepdim=True), both.amax(-1, keepdim=True)
    ends = torch.stack([directions * end for end in value_range], -1)
    low, high = ends.amin(-1).sum(-1), ends.amax(-1).sum(-1)
    shape = (px.shape[0], -1, 1)
    return low[:, None].expand(shape), high[:, None].expand(shape)


def bin_index(projections: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """The bin of each projection, 0 to bins − 1; outside of the bounds the nearest. One on an edge,
    but for rounding, is in the bin above."""
    scale = torch.where(high > low, bins / (high - low), 0)
    above = EDGE_ROUNDINGS * torch.finfo(low.dtype).eps * bins
    return ((projections - low) * scale + above).nan_to_num(0).clamp(0, bins - 1).long()


def bin_centers(index: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    return low + (index + 0.5) * ((high - low) / bins)


def snap(projections: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Projections moved to their bins' centers; the gradient passes straight through."""
    fixed = projections.detach()
    center = bin_centers(bin_index(fixed, low, high, bins), low, high, bins).detach()
    return center + (projections - fixed)  # NaN where a projection is not finite


def sort_with_mass(projections: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sorted projections [B, L, n] and the weight of each, in float64."""
    values, order = projections.sort(-1)
    if weights is None:
        return values, torch.ones_like(values, dtype=torch.float64)
    mass = weights.double()[:, None, :].expand(projections.shape)
    return values, mass.gather(-1, order)


def couple(mass_x: Tensor, mass_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The monotone coupling of two sorted sets: pieces of mass that go from i to j.

    Three tensors [B, L, n + m]. The pieces are those into which all cumulated masses of both
    sets cut the interval from 0 to 1.
    """
    level_x, level_y = (m.cumsum(-1) for m in (mass_x, mass_y))
    level_x, level_y = level_x / level_x[..., -1:], level_y / level_y[..., -1:]
    levels = torch.cat([level_x, level_y], -1).sort(-1).values
    mass = levels.diff(dim=-1, prepend=torch.zeros_like(levels[..., :1]))
    i = torch.searchsorted(level_x, levels).clamp(max=level_x.shape[-1] - 1)
    j = torch.searchsorted(level_y, levels).clamp(max=level_y.shape[-1] - 1)
    return i, j, mass


def tie_average(values: Tensor, mass: Tensor) -> Tensor:
    """Sorted values, unchanged; equal ones share the gradient that reaches any, by mass."""
    group = tie_groups(values)
    zeros = torch.zeros_like(mass)
    total = zeros.scatter_add(-1, group, values * mass)
    mean = (total / zeros.scatter_add(-1, group, mass).clamp(min=1e-300)).gather(-1, group)
    return values.detach() + (mean - mean.detach()).to(values.dtype)


def tie_groups(values: Tensor) -> Tensor:
    """Sorted values numbered so that equal ones have equal numbers."""
    starts = torch.nn.functional.pad(values[..., 1:] != values[..., :-1], (1, 0))
    return starts.cumsum(-1)


def nan_unless_finite(*tensors: Tensor) -> Tensor:
    """[B, L]: one where every entry along the last dimension is finite, else NaN."""
    finite = torch.stack([tensor.isfinite().all(-1) for tensor in tensors]).all(0)
    return torch.where(finite, 1.0, math.nan).to(tensors[0].dtype)


def _check_points(x: Tensor, y: Tensor) -> None:
    for name, points in (("x", x), ("y", y)):
        if not isinstance(points, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(points).__name__}")
        if points.dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{name} must be of dtype {allowed}; got {points.dtype}")
        if points.dim() < 2:
            raise ValueError(f"{name} must be [..., points, d]; got shape {tuple(points.shape)}")
        if points.shape[-2] == 0 or points.shape[-1] == 0:
            raise ValueError(
                f"{name} must hold at least one point of at least one dimension; "
                f"got shape {tuple(points.shape)}"
            )
        if points.shape[-2] > MOST_POINTS:
            raise ValueError(
                f"{name} must have at most {MOST_POINTS} points; got {points.shape[-2]}"
            )
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y must have the dimension d of x, {x.shape[-1]}; got {y.shape[-1]}")
    _check_device("y", y, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}; got {tensor.device}")


def _check_options(
    p: int,
    method: str,
    bins: int,
    value_range: tuple[float, float] | None,
    rescale: tuple[float, float] | None,
    reduction: str,
) -> None:
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2; got {p!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}; got {method!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}; got {reduction!r}")
    if isinstance(bins, bool) or not isinstance(bins, int):
        raise TypeError(f"bins must be an int; got {type(bins).__name__}")
    if not 2 <= bins <= MOST_BINS:
        raise ValueError(f"bins must be 2 to {MOST_BINS}; got {bins}")
    if rescale is not None:
        if method != "binned" or value_range is None:
            raise ValueError('rescale is for method="binned" with a value_range')
        if not isinstance(rescale, (tuple, list)) or len(rescale) != 2:
            raise ValueError(f"rescale must be (a, b); got {rescale!r}")
        if not all(isinstance(number, Real) for number in rescale):
            raise TypeError(f"rescale must be two numbers; got {rescale!r}")
        if not all(map(math.isfinite, rescale)) or rescale[0] == 0:
            raise ValueError(f"rescale must be finite, with a that is not 0; got {rescale!r}")
    if value_range is None:
        return
    if method != "binned":
        raise ValueError('value_range is for method="binned"; "exact" has no bins')
    if len(value_range) != 2:
        raise ValueError(f"value_range must be (low, high); got {value_range!r}")
    low, high = value_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"value_range must be finite with low < high; got {value_range!r}")


def _broadcast_batch(x: Tensor, y: Tensor) -> torch.Size:
    try:
        return torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"leading dimensions of x and y must broadcast; "
            f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        ) from None


def _directions(directions: int | Tensor, x: Tensor, generator: torch.Generator | None) -> Tensor:
    d = x.shape[-1]
    if isinstance(directions, Tensor):
        if generator is not None:
            raise ValueError("generator draws directions; give it or a tensor of directions")
        if not directions.is_floating_point():
            raise TypeError(f"directions must be floating-point; got {directions.dtype}")
        if directions.dim() != 2 or directions.shape[0] == 0 or directions.shape[1] != d:
            raise ValueError(
                f"directions must be [L, {d}] with L at least 1; got {tuple(directions.shape)}"
            )
        _check_device("directions", directions, x)
        return directions.detach()
    if isinstance(directions, bool) or not isinstance(directions, int):
        raise TypeError(
            f"directions must be an int or a tensor [L, d]; got {type(directions).__name__}"
        )
    if directions < 1:
        raise ValueError(f"directions must be at least 1; got {directions}")
    device = resolve_device(generator, x.device)
    return random_directions((directions, d), generator, device, compute_dtype(x.dtype))


def _normalized_weights(
    name: str, weights: Tensor | None, points: Tensor, batch: torch.Size
) -> Tensor | None:
    """[B, n], summing to one per row; NaN throughout a row whose weights are no weights."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(weights).__name__}")
    if not weights.is_floating_point():
        raise TypeError(f"{name} must be floating-point; got {weights.dtype}")
    _check_device(name, weights, points)
    n = points.shape[-2]
    if weights.dim() == 0 or weights.shape[-1] != n:
        raise ValueError(f"{name} must be [..., {n}]; got shape {tuple(weights.shape)}")
    try:
        weights = weights.detach().expand(*batch, n).reshape(-1, n)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to {(*batch, n)}; got shape {tuple(weights.shape)}"
        ) from None
    weights = weights.double()
    total = weights.sum(-1, keepdim=True)
    valid = (weights >= 0).all(-1, keepdim=True) & (total > 0) & total.isfinite()
    return torch.where(valid, weights / total, math.nan)


# The flat ops. x [B, n, d] and y [B, m, d] have one dtype and any strides; directions [L, d] are
# float32 or float64 (the compute dtype); weights are float64 [B, n], normalized or NaN. With
# `scale`, values are summed over directions and scaled, [B]; without, they are [B, L]. With
# `rescale`, (a, b, low, high), x has up to four coordinates and is taken as clamp(a x + b, low,
# high), and x and y may differ in dtype, but not if one is float64.


def _fake_binned(
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
    bins: int,
    value_range: list[float] | None,
    scale: float | None,
    rescale: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (x.shape[0], directions.shape[0])
    return (
        directions.new_empty(shape if scale is None else shape[:1]),
        directions.new_empty(*shape, bins),
        directions.new_empty(*shape, bins),
        directions.new_empty(*shape, 2),
    )


# Returns the values; for x and for y the table [B, L, bins] of the derivative of the value
# to a projection in that bin, per unit of weight; and the bounds [B, L, 2] of the bins. Every
# backend fills these alike, so any backend's backward can read any other's tables.
_binned = registration.define(
    "sliced_wasserstein_binned(Tensor x, Tensor y, Tensor directions, Tensor? weights_x, "
    "Tensor? weights_y, int p, int bins, float[]? value_range, float? scale, float[]? rescale) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_binned,
)


def _fake_binned_backward(
    grad: Tensor,
    points: Tensor,
    directions: Tensor,
    weights: Tensor | None,
    table: Tensor,
    edges: Tensor,
    scale: float | None,
    rescale: list[float] | None,
) -> Tensor:
    return torch.empty_like(points)


# The gradient to one side's points, given that of the values and that side's table.
_binned_backward = registration.define(
    "sliced_wasserstein_binned_backward(Tensor grad, Tensor points, Tensor directions, "
    "Tensor? weights, Tensor table, Tensor edges, float? scale, float[]? rescale) -> Tensor",
    _fake_binned_backward,
)


def _save_binned(ctx: Any, inputs: Any, output: Any) -> None:
    x, y, directions, weights_x, weights_y, *_, ctx.scale, ctx.rescale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, y, directions, weights_x, weights_y, *output[1:])


def _differentiate_binned(ctx: Any, grad: Tensor, *_: Any) -> Any:
    x, y, directions, weights_x, weights_y, table_x, table_y, edges = ctx.saved_tensors
    grad_x = grad_y = None
    if ctx.needs_input_grad[0]:
        side = x, directions, weights_x, table_x, edges
        grad_x = _binned_backward(grad, *side, ctx.scale, ctx.rescale)
    if ctx.needs_input_grad[1]:
        side = y, directions, weights_y, table_y, edges
        grad_y = _binned_backward(grad, *side, ctx.scale, None)
    return (grad_x, grad_y, *(None,) * 8)


registration.gradient(_binned, _differentiate_binned, _save_binned)
registration.once_differentiable(_binned_backward, "sliced_wasserstein")


def _fake_histogram(
    points: Tensor,
    directions: Tensor,
    weights: Tensor | None,
    bins: int,
    value_range: list[float],
) -> Tensor:
    shape = (points.shape[0], directions.shape[0], bins)
    return directions.new_empty(shape, dtype=torch.int64)


# The mass of points in each bin, [B, L, bins], in any unit; -1 throughout where a projection is
# not finite or a weight NaN.
_histogram = registration.define(
    "sliced_wasserstein_histogram(Tensor points, Tensor directions, Tensor? weights, int bins, "
    "float[] value_range) -> Tensor",
    _fake_histogram,
)


def _fake_binned_to(
    x: Tensor,
    histogram_y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    p: int,
    value_range: list[float],
    scale: float | None,
    rescale: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], directions.shape[0])
    return (
        directions.new_empty(shape if scale is None else shape[:1]),
        directions.new_empty(*shape, histogram_y.shape[-1]),
        directions.new_empty(*shape, 2),
    )


# sliced_wasserstein_binned against such a histogram, [B or 1, L, bins], of y.
_binned_to = registration.define(
    "sliced_wasserstein_binned_to(Tensor x, Tensor histogram_y, Tensor directions, "
    "Tensor? weights_x, int p, float[] value_range, float? scale, float[]? rescale) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_binned_to,
)


def _save_binned_to(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, directions, weights_x, *_, ctx.scale, ctx.rescale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, directions, weights_x, *output[1:])


def _differentiate_binned_to(ctx: Any, grad: Tensor, *_: Any) -> Any:
    x, directions, weights_x, table, edges = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        side = x, directions, weights_x, table, edges
        grad_x = _binned_backward(grad, *side, ctx.scale, ctx.rescale)
    return (grad_x, *(None,) * 7)


registration.gradient(_binned_to, _differentiate_binned_to, _save_binned_to)


def _fake_exact(
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
    scale: float | None,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    reduce = scale is not None
    shape = (x.shape[0],) if reduce else (x.shape[0], directions.shape[0])
    return (
        directions.new_empty(shape),
        directions.new_empty(x.shape if reduce and need_x else (0,)),
        directions.new_empty(y.shape if reduce and need_y else (0,)),
    )


# With `scale`, the sorting that the value took also gives the gradients (float32 or float64,
# [B, n, d]) where they are needed, empty where not. Without, the gradient would take memory L·n:
# the backward sorts again instead.
_exact = registration.define(
    "sliced_wasserstein_exact(Tensor x, Tensor y, Tensor directions, Tensor? weights_x, "
    "Tensor? weights_y, int p, float? scale, bool need_x, bool need_y) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_exact,
)


def _fake_exact_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    return (
        directions.new_empty(x.shape if need_x else (0,)),
        directions.new_empty(y.shape if need_y else (0,)),
    )


# The gradients to x and y, empty where not needed, given that of the values [B, L].
_exact_backward = registration.define(
    "sliced_wasserstein_exact_backward(Tensor grad, Tensor x, Tensor y, Tensor directions, "
    "Tensor? weights_x, Tensor? weights_y, int p, bool need_x, bool need_y) -> (Tensor, Tensor)",
    _fake_exact_backward,
)


def _scale(grad: Tensor, gradient: Tensor, points: Tensor) -> Tensor:
    return (grad[:, None, None] * gradient).to(points.dtype)


# The gradient to one side's points, from that of the reduced values [B] and what the forward kept.
# An op, though a product, for `gradient` depends on the points: to autograd it would be constant.
_exact_scale = registration.define(
    "sliced_wasserstein_exact_scale(Tensor grad, Tensor gradient, Tensor points) -> Tensor",
    _scale,
    _scale,
)


def _save_exact(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.p, ctx.scale, need_x, need_y = inputs
    reduce = ctx.scale is not None
    ctx.kept = reduce and need_x, reduce and need_y
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate_exact(ctx: Any, grad: Tensor, *_: Any) -> Any:
    x, y, directions, weights_x, weights_y, *kept = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    grads: list[Tensor | None] = [None, None]
    if all(have for have, need in zip(ctx.kept, needed, strict=True) if need):
        for side, points in enumerate((x, y)):
            if needed[side]:
                grads[side] = _exact_scale(grad, kept[side], points)
    else:
        grad = _per_direction(grad, ctx.scale, directions)
        found = _exact_backward(grad, x, y, directions, weights_x, weights_y, ctx.p, *needed)
        grads = [found[side].to(x.dtype) if needed[side] else None for side in (0, 1)]
    return *grads, None, None, None, None, None, None, None


def _per_direction(grad: Tensor, scale: float | None, directions: Tensor) -> Tensor:
    """The gradient of each direction's value, [B, L], from that of the values as returned."""
    return grad if scale is None else (grad * scale)[:, None].expand(-1, directions.shape[0])


def _reduced(values: Tensor, scale: float | None) -> Tensor:
    return values if scale is None else values.sum(-1) * scale


registration.gradient(_exact, _differentiate_exact, _save_exact)
registration.once_differentiable(_exact_backward, "sliced_wasserstein")
registration.once_differentiable(_exact_scale, "sliced_wasserstein")


def _fake_sort(points: Tensor, directions: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (points.shape[0], directions.shape[0], points.shape[1])
    levels = (0,) if weights is None else shape
    return directions.new_empty(shape), directions.new_empty(levels, dtype=torch.float64)


# Projections in order, [B, L, m], and the sums of their weights up to each, float64, the last
# being 1; empty if weights are equal.
_sort = registration.define(
    "sliced_wasserstein_sort(Tensor points, Tensor directions, Tensor? weights) "
    "-> (Tensor, Tensor)",
    _fake_sort,
)


def _fake_exact_to(
    x: Tensor,
    sorted_y: Tensor,
    levels_y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    p: int,
    scale: float | None,
    need_x: bool,
) -> tuple[Tensor, Tensor]:
    reduce = scale is not None
    shape = (x.shape[0],) if reduce else (x.shape[0], directions.shape[0])
    return (
        directions.new_empty(shape),
        directions.new_empty(x.shape if reduce and need_x else (0,)),
    )


# sliced_wasserstein_exact against what `_sort` made of y, [B or 1, L, m].
_exact_to = registration.define(
    "sliced_wasserstein_exact_to(Tensor x, Tensor sorted_y, Tensor levels_y, Tensor directions, "
    "Tensor? weights_x, int p, float? scale, bool need_x) -> (Tensor, Tensor)",
    _fake_exact_to,
)


def _fake_exact_to_backward(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
    return grad.new_empty(x.shape)


# The gradient to x, given that of the values [B, L].
_exact_to_backward = registration.define(
    "sliced_wasserstein_exact_to_backward(Tensor grad, Tensor x, Tensor sorted_y, "
    "Tensor levels_y, Tensor directions, Tensor? weights_x, int p) -> Tensor",
    _fake_exact_to_backward,
)


def _save_exact_to(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.p, ctx.scale, need_x = inputs
    ctx.kept = ctx.scale is not None and need_x
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _differentiate_exact_to(ctx: Any, grad: Tensor, *_: Any) -> Any:
    x, sorted_y, levels_y, directions, weights_x, kept = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0] and ctx.kept:
        grad_x = _exact_scale(grad, kept, x)
    elif ctx.needs_input_grad[0]:
        grad = _per_direction(grad, ctx.scale, directions)
        found = _exact_to_backward(grad, x, sorted_y, levels_y, directions, weights_x, ctx.p)
        grad_x = found.to(x.dtype)
    return grad_x, None, None, None, None, None, None, None


registration.gradient(_exact_to, _differentiate_exact_to, _save_exact_to)
registration.once_differentiable(_exact_to_backward, "sliced_wasserstein")


# Plain PyTorch. Gradients are written out, since autograd does not record inside a flat op; the
# specification above, differentiated by autograd, checks them. Autocast would project in half
# precision.


def _transport(
    x: Tensor, mass_x: Tensor, y: Tensor, mass_y: Tensor, p: int
) -> tuple[Tensor, Tensor, Tensor]:
    """W_p^p of sorted values with masses, and its derivatives to each value of x and y."""
    i, j, mass = couple(mass_x, mass_y)
    gap = x.gather(-1, i) - y.gather(-1, j)
    slope = (p * gap.sign() * gap.abs() ** (p - 1)).double() * mass
    values = (gap.abs().double() ** p * mass).sum(-1)
    slope_x = torch.zeros_like(mass_x).scatter_add(-1, i, slope)
    slope_y = torch.zeros_like(mass_y).scatter_add(-1, j, -slope)
    poison = nan_unless_finite(x, y, mass_x, mass_y)
    values = values.to(x.dtype) * poison
    return values, slope_x.to(x.dtype) * poison[..., None], slope_y.to(x.dtype) * poison[..., None]


def _share_by_mass(slope: Tensor, values: Tensor, mass: Tensor) -> Tensor:
    """Each sorted point's part, by mass, of the slopes of the points that it ties with."""
    group = tie_groups(values)
    zeros = torch.zeros_like(mass)
    total = zeros.scatter_add(-1, group, slope.double())
    per_mass = total / zeros.scatter_add(-1, group, mass).clamp(min=1e-300)
    return (per_mass.gather(-1, group) * mass).to(slope.dtype)


def _check_weights(*weights: Tensor | None) -> None:
    """On a CPU looking costs nothing: name the weights that were found bad, and marked NaN."""
    for name, rows in zip(("weights_x", "weights_y"), weights, strict=True):
        if rows is not None and rows.device.type == "cpu" and rows[:, 0].isnan().any():
            raise ValueError(f"{name} must be non-negative, finite and not all zero")


@backends.register("sliced_wasserstein_binned", "reference")
def _binned_plain(
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
    bins: int,
    value_range: list[float] | None,
    scale: float | None,
    rescale: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_weights(weights_x, weights_y)
    if rescale is not None:
        x = rescaled(x, rescale)
    with torch.autocast(x.device.type, enabled=False):
        px, py = project(x, directions), project(y, directions)
    low, high = bounds(px, py, directions, value_range)
    mass_x = _mass_of_bins(px, weights_x, low, high, bins)
    mass_y = _mass_of_bins(py, weights_y, low, high, bins)
    values, *tables = _between_histograms(mass_x, mass_y, low, high, p)
    return _reduced(values, scale), *tables, torch.cat([low, high], -1)


def _between_histograms(
    mass_x: Tensor, mass_y: Tensor, low: Tensor, high: Tensor, p: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values [B, L] and both tables, of masses [B, L, bins]; NaN where a mass is."""
    bins = mass_x.shape[-1]
    centers = bin_centers(torch.arange(bins, device=low.device), low, high, bins)
    values, slope_x, slope_y = _transport(centers, mass_x, centers, mass_y, p)
    poison = nan_unless_finite(mass_x, mass_y).to(values.dtype)
    tables = [
        torch.where(mass > 0, slope * mass.sum(-1, keepdim=True) / mass, 0).to(slope.dtype)
        * poison[..., None]
        for slope, mass in ((slope_x, mass_x), (slope_y, mass_y))
    ]
    return values * poison, *tables


def _mass_of_bins(
    projections: Tensor, weights: Tensor | None, low: Tensor, high: Tensor, bins: int
) -> Tensor:
    """[B, L, bins], float64; NaN throughout where a projection is not finite or a weight NaN."""
    index = bin_index(projections, low, high, bins)
    mass = torch.ones_like(projections, dtype=torch.float64)
    if weights is not None:
        # Integers add up alike in any order; float64 holds those below 2^53 exactly.
        mass = (weights * 2.0**52).round()[:, None, :].expand(projections.shape)
    masses = mass.new_zeros(*projections.shape[:2], bins).scatter_add(-1, index, mass)
    return masses * nan_unless_finite(projections, mass).double()[..., None]


@backends.register("sliced_wasserstein_histogram", "reference")
def _histogram_plain(
    points: Tensor,
    directions: Tensor,
    weights: Tensor | None,
    bins: int,
    value_range: list[float],
) -> Tensor:
    with torch.autocast(points.device.type, enabled=False):
        projections = project(points, directions)
    low, high = bounds(projections, projections, directions, value_range)
    masses = _mass_of_bins(projections, weights, low, high, bins)
    return masses.nan_to_num(nan=-1).long()


@backends.register("sliced_wasserstein_binned_to", "reference")
def _binned_to_plain(
    x: Tensor,
    histogram_y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    p: int,
    value_range: list[float],
    scale: float | None,
    rescale: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_weights(weights_x, None)
    if rescale is not None:
        x = rescaled(x, rescale)
    with torch.autocast(x.device.type, enabled=False):
        px = project(x, directions)
    low, high = bounds(px, px, directions, value_range)
    mass_x = _mass_of_bins(px, weights_x, low, high, histogram_y.shape[-1])
    mass_y = histogram_y.double().expand(mass_x.shape)
    mass_y = torch.where(mass_y < 0, math.nan, mass_y)
    values, table, _ = _between_histograms(mass_x, mass_y, low, high, p)
    return _reduced(values, scale), table, torch.cat([low, high], -1)


@backends.register("sliced_wasserstein_binned_backward", "reference")
def _binned_backward_plain(
    grad: Tensor,
    points: Tensor,
    directions: Tensor,
    weights: Tensor | None,
    table: Tensor,
    edges: Tensor,
    scale: float | None,
    rescale: list[float] | None,
) -> Tensor:
    side = directions, weights, table, edges, scale
    if rescale is not None:
        found = _binned_backward_plain(grad, rescaled(points, rescale), *side, None)
        return _through_rescaled(found, points, rescale)
    grad = _per_direction(grad, scale, directions)
    with torch.autocast(points.device.type, enabled=False):
        projections = project(points, directions)
        index = bin_index(projections, edges[..., :1], edges[..., 1:], table.shape[-1])
        slope = table.gather(-1, index) * grad[..., None]
        return _pull_back(slope * _mass(points, weights), directions, points)


def _through_rescaled(grad: Tensor, points: Tensor, rescale: Sequence[float]) -> Tensor:
    """The gradient to points, from that to what they are taken as."""
    a, b, low, high = rescale
    place = a * points.to(grad.dtype) + b
    return torch.empty_like(points).copy_(
        torch.where((place >= low) & (place <= high), a * grad, 0)
    )


def _mass(points: Tensor, weights: Tensor | None) -> Tensor | float:
    if weights is None:
        return 1 / points.shape[1]
    return weights[:, None, :].to(compute_dtype(points.dtype))


def _pull_back(slope: Tensor, directions: Tensor, points: Tensor) -> Tensor:
    """From derivatives to projections, [B, L, n], to those to points, shaped like ``points``."""
    grad = slope.mT @ directions
    return torch.empty_like(points).copy_(grad)


@backends.register("sliced_wasserstein_exact", "reference")
def _exact_plain(
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
    scale: float | None,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    values, slope_x, slope_y = _exact_slopes(x, y, directions, weights_x, weights_y, p)
    none = directions.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):
        grad_x = (slope_x * scale).mT @ directions if scale is not None and need_x else none
        grad_y = (slope_y * scale).mT @ directions if scale is not None and need_y else none.clone()
    return _reduced(values, scale), grad_x, grad_y


@backends.register("sliced_wasserstein_exact_backward", "reference")
def _exact_backward_plain(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    _, slope_x, slope_y = _exact_slopes(x, y, directions, weights_x, weights_y, p)
    none = directions.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):
        grad_x = (slope_x * grad[..., None]).mT @ directions if need_x else none
        grad_y = (slope_y * grad[..., None]).mT @ directions if need_y else none.clone()
    return grad_x, grad_y


def _exact_slopes(
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """W_p^p [B, L] and its derivatives to the projections, [B, L, n] and [B, L, m]."""
    _check_weights(weights_x, weights_y)
    with torch.autocast(x.device.type, enabled=False):
        px, py = project(x, directions), project(y, directions)
    sorted_x, mass_x = sort_with_mass(px, weights_x)
    sorted_y, mass_y = sort_with_mass(py, weights_y)
    values, slope_x, slope_y = _transport(sorted_x, mass_x, sorted_y, mass_y, p)
    slope_x = _unsorted(_share_by_mass(slope_x, sorted_x, mass_x), px)
    slope_y = _unsorted(_share_by_mass(slope_y, sorted_y, mass_y), py)
    return values, slope_x, slope_y


def _unsorted(sorted_slopes: Tensor, projections: Tensor) -> Tensor:
    order = projections.argsort(-1)
    return torch.empty_like(sorted_slopes).scatter_(-1, order, sorted_slopes)


@backends.register("sliced_wasserstein_sort", "reference")
def _sort_plain(
    points: Tensor, directions: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check_weights(None, weights)
    with torch.autocast(points.device.type, enabled=False):
        projections = project(points, directions)
    values, mass = sort_with_mass(projections, weights)
    if weights is None:
        return values, mass.new_empty(0)
    levels = mass.cumsum(-1)
    return values, levels / levels[..., -1:]


@backends.register("sliced_wasserstein_exact_to", "reference")
def _exact_to_plain(
    x: Tensor,
    sorted_y: Tensor,
    levels_y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    p: int,
    scale: float | None,
    need_x: bool,
) -> tuple[Tensor, Tensor]:
    values, slope = _exact_slopes_to(x, sorted_y, levels_y, directions, weights_x, p)
    if scale is None or not need_x:
        return _reduced(values, scale), directions.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):
        return _reduced(values, scale), (slope * scale).mT @ directions


@backends.register("sliced_wasserstein_exact_to_backward", "reference")
def _exact_to_backward_plain(
    grad: Tensor,
    x: Tensor,
    sorted_y: Tensor,
    levels_y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    p: int,
) -> Tensor:
    _, slope = _exact_slopes_to(x, sorted_y, levels_y, directions, weights_x, p)
    with torch.autocast(x.device.type, enabled=False):
        return (slope * grad[..., None]).mT @ directions


def _exact_slopes_to(
    x: Tensor,
    sorted_y: Tensor,
    levels_y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    p: int,
) -> tuple[Tensor, Tensor]:
    _check_weights(weights_x, None)
    with torch.autocast(x.device.type, enabled=False):
        px = project(x, directions)
    sorted_x, mass_x = sort_with_mass(px, weights_x)
    mass_y = torch.ones_like(sorted_y, dtype=torch.float64)
    if levels_y.numel():
        mass_y = levels_y.diff(dim=-1, prepend=torch.zeros_like(levels_y[..., :1]))
    shape = (x.shape[0], *sorted_y.shape[1:])
    sorted_y, mass_y = sorted_y.expand(shape), mass_y.expand(shape)
    values, slope, _ = _transport(sorted_x, mass_x, sorted_y, mass_y, p)
    return values, _unsorted(_share_by_mass(slope, sorted_x, mass_x), px)


# C++. `sdcore._cpu` takes addresses: the tensors must outlive the call, hence the local names.


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@backends.register("sliced_wasserstein_binned", "cpp")
def _binned_cpp(
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
    bins: int,
    value_range: list[float] | None,
    scale: float | None,
    rescale: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_weights(weights_x, weights_y)
    if rescale is not None:
        x = rescaled(x, rescale)
        y = y.to(x.dtype)
    outputs = _fake_binned(x, y, directions, weights_x, weights_y, p, bins, value_range, None, None)
    directions = directions.contiguous()
    weights_x, weights_y = _contiguous(weights_x), _contiguous(weights_y)
    if x.shape[0]:
        backends.cpu_module().sliced_wasserstein_binned(
            described(x),
            described(y),
            directions.data_ptr(),
            directions.shape[0],
            address(weights_x),
            address(weights_y),
            p,
            bins,
            None if value_range is None else tuple(value_range),
            *(output.data_ptr() for output in outputs),
            torch.get_num_threads(),
        )
    return _reduced(outputs[0], scale), *outputs[1:]


@backends.register("sliced_wasserstein_binned_backward", "cpp")
def _binned_backward_cpp(
    grad: Tensor,
    points: Tensor,
    directions: Tensor,
    weights: Tensor | None,
    table: Tensor,
    edges: Tensor,
    scale: float | None,
    rescale: list[float] | None,
) -> Tensor:
    side = directions, weights, table, edges, scale
    if rescale is not None:
        found = _binned_backward_cpp(grad, rescaled(points, rescale), *side, None)
        return _through_rescaled(found, points, rescale)
    out = torch.empty_like(points)
    grad = _per_direction(grad, scale, directions).contiguous()
    directions = directions.contiguous()
    table, edges, weights = table.contiguous(), edges.contiguous(), _contiguous(weights)
    if points.shape[0]:
        backends.cpu_module().sliced_wasserstein_binned_backward(
            grad.data_ptr(),
            described(points),
            directions.data_ptr(),
            directions.shape[0],
            address(weights),
            table.data_ptr(),
            edges.data_ptr(),
            table.shape[-1],
            described(out),
            torch.get_num_threads(),
        )
    return out


@backends.register("sliced_wasserstein_exact", "cpp")
def _exact_cpp(
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
    scale: float | None,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = None
    if scale is None:
        need_x = need_y = False
    else:
        grad = directions.new_full((x.shape[0], directions.shape[0]), scale)
    values, grad_x, grad_y = _sort_cpp(
        grad, x, y, directions, weights_x, weights_y, p, need_x, need_y
    )
    return _reduced(values, scale), grad_x, grad_y


@backends.register("sliced_wasserstein_exact_backward", "cpp")
def _exact_backward_cpp(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    _, grad_x, grad_y = _sort_cpp(
        grad.contiguous(), x, y, directions, weights_x, weights_y, p, need_x, need_y
    )
    return grad_x, grad_y


def _sort_cpp(
    grad: Tensor | None,
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values [B, L], and the gradients of their sum weighted by ``grad`` (None: by one)."""
    _check_weights(weights_x, weights_y)
    values = directions.new_empty(x.shape[0], directions.shape[0])
    grad_x = directions.new_empty(x.shape if need_x else (0,))
    grad_y = directions.new_empty(y.shape if need_y else (0,))
    directions = directions.contiguous()
    weights_x, weights_y = _contiguous(weights_x), _contiguous(weights_y)
    if x.shape[0]:
        backends.cpu_module().sliced_wasserstein_exact(
            described(x),
            described(y),
            directions.data_ptr(),
            directions.shape[0],
            address(weights_x),
            address(weights_y),
            p,
            address(grad),
            values.data_ptr(),
            grad_x.data_ptr(),
            grad_y.data_ptr(),
            torch.get_num_threads(),
        )
    return values, grad_x, grad_y


# Triton. The import waits for a call: Triton may not be installed.


@backends.register("sliced_wasserstein_binned", "triton")
def _binned_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sdcore.triton_kernels import sliced_wasserstein as kernels

    *others, scale, rescale = args
    _check_weights(args[3], args[4])
    values, table_x, table_y, edges = kernels.binned(*others, rescale)
    return _reduced(values, scale), table_x, table_y, edges


@backends.register("sliced_wasserstein_histogram", "triton")
def _histogram_triton(*args: Any) -> Tensor:
    from sdcore.triton_kernels import sliced_wasserstein as kernels

    return kernels.histogram(*args)


@backends.register("sliced_wasserstein_binned_to", "triton")
def _binned_to_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from sdcore.triton_kernels import sliced_wasserstein as kernels

    *others, scale, rescale = args
    _check_weights(args[3], None)
    values, table, edges = kernels.binned_to(*others, rescale)
    return _reduced(values, scale), table, edges


@backends.register("sliced_wasserstein_binned_backward", "triton")
def _binned_backward_triton(grad: Tensor, points: Tensor, directions: Tensor, *args: Any) -> Tensor:
    from sdcore.triton_kernels import sliced_wasserstein as kernels

    *others, scale, rescale = args
    return kernels.binned_backward(
        _per_direction(grad, scale, directions), points, directions, *others, rescale
    )


# CUDA.


def _refuses_binned(x: Tensor, *args: Any) -> str | None:
    return cuda.refuses_bins(args[5], x)


def _refuses_tables(grad: Tensor, points: Tensor, *args: Any) -> str | None:
    return cuda.refuses_bins(args[2].shape[-1], points)


def _refuses_histogram(points: Tensor, *args: Any) -> str | None:
    return cuda.refuses_bins(args[2], points)


def _refuses_binned_to(x: Tensor, histogram_y: Tensor, *args: Any) -> str | None:
    return cuda.refuses_bins(histogram_y.shape[-1], x)


backends.register("sliced_wasserstein_binned", "cuda", _refuses_binned)(cuda.binned)
backends.register("sliced_wasserstein_binned_to", "cuda", _refuses_binned_to)(cuda.binned_to)
backends.register("sliced_wasserstein_histogram", "cuda", _refuses_histogram)(cuda.histogram)
backends.register("sliced_wasserstein_binned_backward", "cuda", _refuses_tables)(cuda.gather)


@backends.register("sliced_wasserstein_exact", "cuda")
def _exact_cuda(
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
    scale: float | None,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    reduce = scale is not None
    values, grad_x, grad_y = cuda_exact.exact(
        cuda_exact.Points(x, weights_x),
        cuda_exact.Points(y, weights_y),
        directions,
        p,
        None,
        1.0 if scale is None else scale,
        reduce and need_x,
        reduce and need_y,
    )
    return _reduced(values, scale), grad_x, grad_y


@backends.register("sliced_wasserstein_exact_backward", "cuda")
def _exact_backward_cuda(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    p: int,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    sides = cuda_exact.Points(x, weights_x), cuda_exact.Points(y, weights_y)
    return cuda_exact.exact(*sides, directions, p, grad, 1.0, need_x, need_y)[1:]


backends.register("sliced_wasserstein_sort", "cuda")(cuda_exact.sort)


@backends.register("sliced_wasserstein_exact_to", "cuda")
def _exact_to_cuda(
    x: Tensor,
    sorted_y: Tensor,
    levels_y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    p: int,
    scale: float | None,
    need_x: bool,
) -> tuple[Tensor, Tensor]:
    values, grad_x, _ = cuda_exact.exact(
        cuda_exact.Points(x, weights_x),
        cuda_exact.Kept(sorted_y.contiguous(), levels_y.contiguous()),
        directions,
        p,
        None,
        1.0 if scale is None else scale,
        scale is not None and need_x,
        False,
    )
    return _reduced(values, scale), grad_x


@backends.register("sliced_wasserstein_exact_to_backward", "cuda")
def _exact_to_backward_cuda(
    grad: Tensor,
    x: Tensor,
    sorted_y: Tensor,
    levels_y: Tensor,
    directions: Tensor,
    weights_x: Tensor | None,
    p: int,
) -> Tensor:
    side = cuda_exact.Points(x, weights_x)
    kept = cuda_exact.Kept(sorted_y.contiguous(), levels_y.contiguous())
    return cuda_exact.exact(side, kept, directions, p, grad, 1.0, True, False)[1]
