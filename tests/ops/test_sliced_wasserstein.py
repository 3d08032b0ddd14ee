from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sdcore
from sdcore.ops import random_rotations, sliced_wasserstein
from sdcore.ops.sliced_wasserstein import DTYPES, reference
from tests.platforms import Platform, platforms

# Coordinates that are multiples of 2^-7 in [0, 1] are exact in every dtype, and directions whose
# entries are multiples of 1/8 and add up to 1 make projections, bin widths and bin numbers exact
# in float32: then nothing but the sums can differ, and ties abound.
DYADIC_DIRECTIONS = (
    torch.tensor(
        [[8, 0, 0], [0, 8, 0], [4, 2, 2], [3, -4, 1], [-1, -1, 6], [-5, 2, -1], [2, 3, 3]],
        dtype=torch.float64,
    )
    / 8
)
ALL = platforms("reference", "cpp", "triton", "cuda")
SORTING = platforms("reference", "cpp", "cuda")
# The interpreter is slow: it runs a half of the largest test.
INTERPRETED = sdcore.backends.triton_interpreted()


def cases() -> list:
    """Every backend with the methods that it has."""
    found = [pytest.param(*p.values, "binned", id=f"{p.id}-binned", marks=p.marks) for p in ALL]
    return found + [
        pytest.param(*p.values, "exact", id=f"{p.id}-exact", marks=p.marks) for p in SORTING
    ]


def dyadic_points(*shape: int) -> Tensor:
    points = torch.randint(0, 129, shape).double() / 128
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=shape[-1])))
    count = min(len(corners), shape[-2])
    points[..., :count, :] = corners[:count]
    return points


def value_and_gradient(
    function: Callable[..., Tensor], x: Tensor, y: Tensor, cotangent: Tensor, **options: Any
) -> list[Tensor]:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    values = function(x, y, **options)
    gradients = torch.autograd.grad((values * cotangent.to(values)).sum(), (x, y))
    return [t.detach().cpu().double() for t in (values, *gradients)]


def per_direction(x: Tensor, y: Tensor, *, directions: Tensor, **options: Any) -> Tensor:
    return sliced_wasserstein(x, y, directions=directions, reduction="none", **options)


def specified(x: Tensor, y: Tensor, *, directions: Tensor, **options: Any) -> Tensor:
    return reference(x, y, directions, **options)


def assert_twice_as_good(
    ours: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype, rounding: float = 1e-13
) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus its epsilon.

    In float64 there is nothing more exact to compare with, and ``rounding`` takes epsilon's place.
    """
    error, allowed = (ours - exact).norm(), 2 * (plain - exact).norm()
    epsilon = rounding if dtype == torch.float64 else torch.finfo(dtype).eps
    allowed = allowed + epsilon * exact.norm()
    # Gradients of half-precision points are small: what cannot be represented is lost to all.
    allowed = allowed + torch.finfo(dtype).smallest_normal * math.sqrt(exact.numel())
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, of {exact.norm():.3g}"


def random_weights(*shape: int) -> Tensor:
    weights = torch.rand(shape, dtype=torch.float64)
    weights[..., 0] = 0  # a point that counts for nothing, at the corner of the range
    return weights + (torch.arange(shape[-1]) == shape[-1] - 1)


@pytest.mark.parametrize("weighted", ["", "xy"] if INTERPRETED else ["", "x", "y", "xy"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("platform, method", cases())
@pytest.mark.parametrize("n, m", [(300, 211)] if INTERPRETED else [(300, 300), (300, 211)])
def test_agrees_with_the_specification(
    n: int, m: int, platform: Platform, method: str, dtype: torch.dtype, p: int, weighted: str
) -> None:
    x, y = dyadic_points(2, n, 3), dyadic_points(2, m, 3)
    options: dict[str, Any] = {"p": p, "method": method}
    if method == "binned":
        options |= {"bins": 64}
    weights = {f"weights_{side}": random_weights(2, k) for side, k in (("x", n), ("y", m))}
    options |= {k: v for k, v in weights.items() if k[-1] in weighted}
    cotangent = torch.rand(2, len(DYADIC_DIRECTIONS), dtype=torch.float64)

    exact = value_and_gradient(specified, x, y, cotangent, directions=DYADIC_DIRECTIONS, **options)
    low = [t.to(dtype) for t in (x, y)]
    directions = DYADIC_DIRECTIONS.float() if dtype != torch.float64 else DYADIC_DIRECTIONS
    plain = value_and_gradient(specified, *low, cotangent, directions=directions, **options)
    here = {k: v.to(platform.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    with platform.forced():
        ours = value_and_gradient(
            per_direction,
            *(t.to(platform.device) for t in low),
            cotangent.to(platform.device),
            directions=directions.to(platform.device),
            **here,
        )
    # Triton's W_2 takes differences of cumulated moments, some hundred squared bins large.
    rounding = 1e-11 if platform.backend == "triton" and p == 2 else 1e-13
    for our, plainly, exactly in zip(ours, plain, exact, strict=True):
        assert_twice_as_good(our, plainly, exactly, dtype, rounding)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("platform, method", cases())
@pytest.mark.parametrize(
    "n, m, d, count, bins",
    [
        (1, 1, 1, 1, 2),
        (1, 5, 3, 2, 7),
        (17, 1, 2, 3, 100),
        (200, 199, 3, 33, 1500),
        (70, 90, 4, 9, 1000),
        (130, 140, 5, 5, 64),
        (65, 64, 40, 20, 33),
        (50, 60, 3, 2, 10000),
    ],
)
def test_agrees_at_odd_sizes(
    n: int, m: int, d: int, count: int, bins: int, platform: Platform, method: str, p: int
) -> None:
    """Random reals in float64: nothing lies on an edge, so agreement is to rounding."""
    x, y = torch.randn(3, n, d, dtype=torch.float64), torch.randn(3, m, d, dtype=torch.float64)
    directions = torch.randn(count, d, dtype=torch.float64)
    options: dict[str, Any] = {"p": p, "method": method}
    if method == "binned":
        options |= {"bins": bins}
    cotangent = torch.rand(3, count, dtype=torch.float64)
    expected = value_and_gradient(specified, x, y, cotangent, directions=directions, **options)
    x, y, directions = (t.to(platform.device) for t in (x, y, directions))
    with platform.forced():
        found = value_and_gradient(
            per_direction, x, y, cotangent.to(platform.device), directions=directions, **options
        )
    for ours, exact in zip(found, expected, strict=True):
        assert (ours - exact).norm() <= 1e-10 * exact.norm() + 1e-13


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("needed", ["x", "y", "xy"])
@pytest.mark.parametrize("platform, method", cases())
def test_reductions_and_needed_gradients(
    platform: Platform, method: str, needed: str, reduction: str
) -> None:
    x, y = torch.rand(2, 40, 3, dtype=torch.float64), torch.rand(2, 30, 3, dtype=torch.float64)
    directions = torch.randn(6, 3, dtype=torch.float64)

    def loss(function: Callable[[Tensor, Tensor], Tensor], device: str) -> list[Tensor]:
        points = {"x": x.to(device), "y": y.to(device)}
        for side in needed:
            points[side] = points[side].requires_grad_()
        values = function(points["x"], points["y"])
        total = (values * torch.arange(1, values.numel() + 1).to(values).view_as(values)).sum()
        gradients = torch.autograd.grad(total, [points[side] for side in needed])
        return [values.detach().cpu(), *(g.cpu() for g in gradients)]

    def expected(x: Tensor, y: Tensor) -> Tensor:
        values = reference(x, y, directions.to(x.device), method=method, bins=50)
        return values if reduction == "none" else getattr(values, reduction)(-1)

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return sliced_wasserstein(
            x, y, directions=directions.to(x.device), method=method, bins=50, reduction=reduction
        )

    with platform.forced():
        found = loss(ours, platform.device)
    for our, exact in zip(found, loss(expected, "cpu"), strict=True):
        torch.testing.assert_close(our, exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n, m, d", [(50, 50, 3), (80, 33, 2), (7, 120, 5)])
@pytest.mark.parametrize("platform", SORTING)
def test_equals_pot(platform: Platform, n: int, m: int, d: int, weighted: bool, p: int) -> None:
    ot = pytest.importorskip("ot", reason="needs POT")
    x, y = torch.randn(n, d, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64)
    weights = [torch.rand(k, dtype=torch.float64) if weighted else None for k in (n, m)]
    directions = random_rotations(4, d, dtype=torch.float64).flatten(0, 1)
    masses = [None if w is None else (w / w.sum()).numpy() for w in weights]
    theirs = ot.sliced_wasserstein_distance(
        x.numpy(), y.numpy(), *masses, projections=directions.T.numpy(), p=p
    )
    here = [None if t is None else t.to(platform.device) for t in (x, y, directions, *weights)]
    with platform.forced():
        ours = sliced_wasserstein(
            *here[:2], directions=here[2], weights_x=here[3], weights_y=here[4], p=p
        )
    assert ours.item() ** (1 / p) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("platform", platforms("cpp"))
def test_is_the_loss_of_sw_guidance(platform: Platform) -> None:
    """The docstring's relation: a sum over three rotated axes, a mean over rotations."""
    x, y = torch.rand(50, 3, dtype=torch.float64), torch.rand(50, 3, dtype=torch.float64)
    rotations = random_rotations(5, 3, dtype=torch.float64)
    theirs = torch.stack(
        [
            ((x @ r.T).sort(0).values - (y @ r.T).sort(0).values).abs().mean(0).sum()
            for r in rotations
        ]
    ).mean()
    with platform.forced():
        ours = 3 * sliced_wasserstein(x, y, directions=rotations.flatten(0, 1))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("platform", SORTING)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(platform: Platform, p: int, reduction: str) -> None:
    x = torch.randn(2, 6, 3, dtype=torch.float64, device=platform.device, requires_grad=True)
    y = torch.randn(2, 5, 3, dtype=torch.float64, device=platform.device, requires_grad=True)
    directions = torch.randn(4, 3, dtype=torch.float64, device=platform.device)
    weights = torch.rand(2, 5, dtype=torch.float64, device=platform.device)

    def op(x: Tensor, y: Tensor) -> Tensor:
        return sliced_wasserstein(
            x, y, p=p, directions=directions, weights_y=weights, reduction=reduction
        )

    with platform.forced():
        assert torch.autograd.gradcheck(op, (x, y))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("bins", [4, 64, 1024])
@pytest.mark.parametrize("platform", ALL)
def test_error_bound_of_binned(platform: Platform, bins: int, p: int) -> None:
    """The docstring's bounds, on data spread out, clustered and nearly equal."""
    spread = torch.rand(400, 3, dtype=torch.float64)
    clustered = spread**4
    nearly = spread + 0.003 * torch.randn(400, 3, dtype=torch.float64)
    directions = random_rotations(4, 3, dtype=torch.float64).flatten(0, 1)
    for x, y in ((spread, clustered), (clustered, nearly), (spread, nearly)):
        exact = reference(x[None], y[None], directions, p=p)[0]
        both = torch.cat([x, y]) @ directions.T
        width = (both.amax(0) - both.amin(0)) / bins
        here = [t.to(platform.device) for t in (x, y, directions)]
        with platform.forced():
            binned = per_direction(
                here[0], here[1], directions=here[2], method="binned", bins=bins, p=p
            ).cpu()
        bound = width if p == 1 else width * (2 * exact.sqrt() + width)
        assert ((binned - exact).abs() <= bound + 1e-12).all()


@pytest.mark.parametrize("platform", ALL)
def test_gradient_of_binned_w2_is_a_mean_over_the_bin(platform: Platform) -> None:
    """To within twice the bin width, per unit of weight: the docstring's bound."""
    bins, n = 32, 300
    x, y = torch.rand(1, n, 2, dtype=torch.float64), torch.rand(1, 200, 2, dtype=torch.float64) ** 3
    one = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    options: dict[str, Any] = {"p": 2, "directions": one}
    cotangent = torch.ones(1, 1)
    _, exact, _ = value_and_gradient(specified, x, y, cotangent, **options)
    options["directions"] = one.to(platform.device)
    with platform.forced():
        _, binned, _ = value_and_gradient(
            per_direction,
            x.to(platform.device),
            y.to(platform.device),
            cotangent.to(platform.device),
            method="binned",
            bins=bins,
            value_range=(0, 1),
            **options,
        )
    index = (x[0, :, 0] * bins).long()
    count = torch.zeros(bins, dtype=torch.float64).index_add(0, index, torch.ones(n).double())
    mean = torch.zeros(bins, dtype=torch.float64).index_add(0, index, exact[0, :, 0]) / count
    error = (binned[0, :, 0] - mean[index]).abs() * n
    assert error.max() <= 2 / bins
    assert error.max() > 2 / bins / 100


@pytest.mark.parametrize("platform", ALL)
def test_error_bound_of_binned_is_tight(platform: Platform) -> None:
    """Points just left and right of an edge are a bin apart."""
    x = torch.full((9, 1), 0.4999, dtype=torch.float64, device=platform.device)
    y = torch.full((9, 1), 0.5001, dtype=torch.float64, device=platform.device)
    one = torch.ones(1, 1, dtype=torch.float64, device=platform.device)
    with platform.forced():
        value = sliced_wasserstein(
            x, y, directions=one, method="binned", bins=4, value_range=(0, 1)
        )
    assert value.item() == 0.25


@pytest.mark.parametrize("platform, method", cases())
def test_ties_do_not_depend_on_order(platform: Platform, method: str) -> None:
    x, y = dyadic_points(1, 200, 3), dyadic_points(1, 150, 3)
    x[:, 50:100] = x[:, :50]
    directions = DYADIC_DIRECTIONS
    order_x, order_y = torch.randperm(200), torch.randperm(150)
    cotangent = torch.ones(1, len(directions), dtype=torch.float64)
    options = {"method": method, "directions": directions.to(platform.device)}

    def here(x: Tensor, y: Tensor) -> list[Tensor]:
        with platform.forced():
            return value_and_gradient(
                per_direction, x.to(platform.device), y.to(platform.device), cotangent, **options
            )

    value, grad_x, grad_y = here(x, y)
    mixed_value, mixed_x, mixed_y = here(x[:, order_x], y[:, order_y])
    torch.testing.assert_close(mixed_value, value, rtol=1e-13, atol=0)
    torch.testing.assert_close(mixed_x, grad_x[:, order_x], rtol=0, atol=1e-16)
    torch.testing.assert_close(mixed_y, grad_y[:, order_y], rtol=0, atol=1e-16)
    torch.testing.assert_close(grad_x[:, 50:100], grad_x[:, :50], rtol=0, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("platform", SORTING)
def test_equal_points_tie_wherever_they_stand(platform: Platform, dtype: torch.dtype) -> None:
    """An image of two colors has two gradients, in the last pixels as in the first."""
    n = 1003
    x = torch.rand(2, 3, dtype=dtype)[torch.arange(n) % 2].to(platform.device).requires_grad_()
    y = torch.rand(n, 3, dtype=dtype, device=platform.device)
    with platform.forced():
        value = sliced_wasserstein(x, y, directions=7)
        (gradient,) = torch.autograd.grad(value, x)
    even, odd = gradient[::2], gradient[1::2]
    torch.testing.assert_close(even, even[:1].expand_as(even), rtol=1e-5, atol=0)
    torch.testing.assert_close(odd, odd[:1].expand_as(odd), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bins", [256, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("platform", ALL)
def test_binned_counts_what_lies_on_an_edge_in_the_bin_above(
    platform: Platform, dtype: torch.dtype, bins: int
) -> None:
    """Grays of 8 bits, on directions of positive components: rounding must not send some down."""
    gray = (torch.arange(256.0) / 256)[:, None].expand(-1, 3)
    theta = torch.nn.functional.normalize(torch.rand(16, 3) + 0.1, dim=1)
    one = gray[100:101]
    with platform.forced():
        found = per_direction(
            *(t.to(platform.device, dtype) for t in (gray, one)),
            directions=theta.to(platform.device),
            method="binned",
            bins=bins,
            value_range=(0, 1),
        )
    # All are moved by half a bin, so that distances stay.
    expected = (gray - one).abs().mean() * theta.sum(1)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("platform", ALL)
def test_binned_histograms_add_up_alike_in_any_order(platform: Platform, weighted: bool) -> None:
    """Bit for bit: counts and fixed-point weights do not depend on where a point stands."""
    x, y = torch.rand(3000, 3), torch.rand(2000, 3)
    weights = torch.rand(3000, dtype=torch.float64)
    order = torch.randperm(3000)
    directions = torch.randn(5, 3, device=platform.device)

    def value(x: Tensor, weights: Tensor) -> Tensor:
        # Normalized here, for the sum that the op would divide by depends on the order.
        with platform.forced():
            return per_direction(
                x.to(platform.device),
                y.to(platform.device),
                directions=directions,
                method="binned",
                bins=100,
                weights_x=weights.to(platform.device) if weighted else None,
            )

    weights = (weights * 2**20).round()  # integers: their sum is exact in any order
    assert torch.equal(value(x, weights), value(x[order], weights[order]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", ["exact", "binned"])
def test_cpp_repeats_bit_for_bit(method: str, weighted: bool, dtype: torch.dtype) -> None:
    """Across runs, and across numbers of threads: 20,001 points are three blocks."""
    x, y = torch.rand(2, 20001, 3, dtype=dtype), torch.rand(2, 15000, 3, dtype=dtype)
    weights = torch.rand(2, 20001, dtype=torch.float64) if weighted else None
    directions = torch.randn(5, 3, dtype=dtype)
    cotangent = torch.rand(2, 5)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7, 2, 1):
            torch.set_num_threads(count)
            with sdcore.backend("cpp"):
                results.append(
                    value_and_gradient(
                        per_direction,
                        x,
                        y,
                        cotangent,
                        directions=directions,
                        method=method,
                        weights_x=weights,
                    )
                )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("platform, method", cases())
def test_strides_and_broadcasting(platform: Platform, method: str) -> None:
    """Planar images, slices and one palette for all images: as after .contiguous()."""
    images = torch.rand(2, 2, 3, 6, 7, dtype=torch.float64, device=platform.device)
    planar = images.flatten(-2).mT  # [2, 2, 42, 3], coordinates far apart
    palette = torch.rand(60, 3, dtype=torch.float64, device=platform.device)[::2]
    directions = torch.randn(8, 4, dtype=torch.float64, device=platform.device)[::2, :3]
    options: dict[str, Any] = {"directions": directions, "method": method}

    def gradients(x: Tensor, y: Tensor) -> list[Tensor]:
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        with platform.forced():
            values = sliced_wasserstein(x, y, **options)
            assert values.shape == (2, 2)
            return [values.detach(), *torch.autograd.grad(values.sum(), (x, y))]

    whole = palette.expand(2, 2, 30, 3).contiguous()
    ours, plain = gradients(planar, palette), gradients(planar.contiguous(), whole)
    plain[2] = plain[2].sum((0, 1))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("platform, method", cases())
def test_empty_batch(platform: Platform, method: str) -> None:
    x = torch.rand(0, 5, 3, device=platform.device, requires_grad=True)
    y = torch.rand(4, 3, device=platform.device, requires_grad=True)
    with platform.forced():
        values = sliced_wasserstein(x, y, method=method)
        values.sum().backward()
    assert values.shape == (0,) and x.grad is not None and x.grad.shape == x.shape
    assert y.grad is not None and (y.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("platform, method", cases())
def test_mixed_dtypes_and_autocast(platform: Platform, method: str, dtype: torch.dtype) -> None:
    """The result is float32, computed in float32, with or without autocast."""
    x, y = torch.rand(50, 3), torch.rand(40, 3)
    directions = torch.randn(7, 3, device=platform.device)
    x, y = x.to(platform.device, dtype).requires_grad_(), y.to(platform.device)
    with platform.forced():
        plain = sliced_wasserstein(x, y, directions=directions, method=method)
        gradient = torch.autograd.grad(plain, x)[0]
        with torch.autocast(platform.device, dtype):
            cast = sliced_wasserstein(x, y, directions=directions, method=method)
            cast_gradient = torch.autograd.grad(cast, x)[0]
    assert plain.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(plain, cast) and torch.equal(gradient, cast_gradient)


@pytest.mark.parametrize("platform, method", cases())
def test_points_outside_of_value_range_count_in_the_end_bins(
    platform: Platform, method: str
) -> None:
    if method == "exact":
        with pytest.raises(ValueError, match="value_range"), platform.forced():
            sliced_wasserstein(*torch.rand(2, 5, 3, device=platform.device), value_range=(0, 1))
        return
    directions = torch.eye(3, dtype=torch.float64, device=platform.device)
    x = torch.rand(2, 50, 3, dtype=torch.float64, device=platform.device) * 3 - 1
    y = torch.rand(2, 50, 3, dtype=torch.float64, device=platform.device)
    options: dict[str, Any] = {"directions": directions, "method": "binned", "bins": 16}
    cotangent = torch.ones(2, 3)
    with platform.forced():
        clamped, inside = (
            value_and_gradient(per_direction, points, y, cotangent, value_range=(0, 1), **options)
            for points in (x, x.clamp(0, 1))
        )
    for a, b in zip(clamped, inside, strict=True):
        assert torch.equal(a, b)
    assert (clamped[1].abs().sum(-1) > 0).any()


@pytest.mark.parametrize("platform, method", cases())
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("n, d", [(20, 3)] if INTERPRETED else [(20, 3), (513, 6)])
def test_non_finite_coordinates_give_nan(
    n: int, d: int, platform: Platform, method: str, side: str, bad: float
) -> None:
    points = {"x": torch.rand(3, n, d), "y": torch.rand(3, n + 10, d)}
    points[side][1, 7, 2] = bad
    directions = torch.randn(5, d)
    with platform.forced():
        value, *gradients = value_and_gradient(
            per_direction,
            points["x"].to(platform.device),
            points["y"].to(platform.device),
            torch.ones(3, 5),
            directions=directions.to(platform.device),
            method=method,
        )
    for result in (value, *gradients):
        assert result[1].isnan().all() and result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("platform, method", cases())
@pytest.mark.parametrize("kind", ["negative", "zero", "nan", "infinite"])
def test_weights_that_are_none(platform: Platform, method: str, kind: str) -> None:
    weights = torch.rand(2, 20)
    weights[1] = {"negative": -0.5, "zero": 0.0, "nan": math.nan, "infinite": math.inf}[kind]
    if kind == "negative":
        weights[1, 1:] = 1
    x, y = torch.rand(2, 20, 3), torch.rand(2, 20, 3)
    x, y, weights = (t.to(platform.device) for t in (x, y, weights))
    with platform.forced():
        if platform.device == "cpu":
            with pytest.raises(ValueError, match="weights_y must be non-negative"):
                sliced_wasserstein(x, y, weights_y=weights, method=method)
            return
        found = value_and_gradient(
            sliced_wasserstein, x, y, torch.ones(2), weights_y=weights, method=method
        )
    for result in found:
        assert result[1].isnan().all() and result[0].isfinite().all()


@pytest.mark.parametrize("platform, method", cases())
def test_second_derivative_raises(platform: Platform, method: str) -> None:
    x = torch.rand(2, 10, 3, device=platform.device, requires_grad=True)
    y = torch.rand(2, 10, 3, device=platform.device)
    for reduction in ("mean", "none"):
        with platform.forced():
            value = sliced_wasserstein(
                x, y, p=2, directions=3, method=method, bins=16, reduction=reduction
            ).sum()
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(gradient.square().sum(), x)


@pytest.mark.parametrize("method", ["exact", "binned"])
def test_double_precision_survives_a_small_range(method: str) -> None:
    """Points that differ far behind the decimal point still spread over the bins."""
    x = 0.5 + 1e-6 * torch.rand(500, 3)
    y = 0.5 + 1e-6 * torch.rand(500, 3) ** 2
    directions = random_rotations(3, 3).flatten(0, 1)
    exact = reference(x.double()[None], y.double()[None], directions.double())[0]
    ours = per_direction(x, y, directions=directions, method=method).double()
    assert ((ours - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("platform, method", cases())
def test_inference_mode_and_no_grad(platform: Platform, method: str) -> None:
    x, y = torch.rand(20, 3, device=platform.device), torch.rand(25, 3, device=platform.device)
    directions = torch.randn(4, 3, device=platform.device)
    with platform.forced():
        value = sliced_wasserstein(x, y, directions=directions, method=method)
        with torch.inference_mode():
            assert torch.equal(
                sliced_wasserstein(x, y, directions=directions, method=method), value
            )
        with torch.no_grad():
            inside = sliced_wasserstein(x.requires_grad_(), y, directions=directions, method=method)
    assert torch.equal(inside, value) and not inside.requires_grad


def test_directions_are_drawn_from_the_generator() -> None:
    x, y = torch.rand(20, 3), torch.rand(25, 3)
    first, again, other = (
        sliced_wasserstein(x, y, directions=5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    # Uniform on the sphere: the mean over directions of W_2^2 between two points at distance 1 is
    # 1/d.
    near = torch.zeros(1, 3), torch.tensor([[0.6, 0.0, 0.8]])
    drawn = sliced_wasserstein(
        *near, p=2, directions=200_000, generator=torch.Generator().manual_seed(3)
    )
    assert drawn.item() == pytest.approx(1 / 3, rel=0.01)


@pytest.mark.parametrize("platform, method", cases())
@pytest.mark.parametrize("p", [1, 2])
def test_opcheck(platform: Platform, method: str, p: int) -> None:
    x = torch.rand(2, 9, 3, device=platform.device)
    y = torch.rand(2, 7, 3, device=platform.device)
    directions = torch.randn(4, 3, device=platform.device)
    weights = torch.rand(2, 9, dtype=torch.float64, device=platform.device)
    weights /= weights.sum(1, keepdim=True)
    grad = torch.rand(2, 4, device=platform.device)
    grown = x.clone().requires_grad_(), y.clone().requires_grad_()
    ops = torch.ops.sdcore
    with platform.forced():
        if method == "binned":
            torch.library.opcheck(
                ops.sliced_wasserstein_binned,
                (*grown, directions, weights, None, p, 8, None, 0.5, None),
            )
            _, table, _, edges = ops.sliced_wasserstein_binned(
                x, y, directions, weights, None, p, 8, [0.0, 1.0], None, None
            )
            torch.library.opcheck(
                ops.sliced_wasserstein_binned_backward,
                (grad, x, directions, weights, table, edges, None, None),
            )
            return
        for scale in (0.5, None):
            torch.library.opcheck(
                ops.sliced_wasserstein_exact,
                (*grown, directions, weights, None, p, scale, True, True),
            )
        torch.library.opcheck(
            ops.sliced_wasserstein_exact_backward,
            (grad, x, y, directions, weights, None, p, True, False),
        )
        torch.library.opcheck(ops.sliced_wasserstein_exact_scale, (grad[:, 0], x, x.half()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("platform, method", cases())
def test_compiles_without_a_graph_break(platform: Platform, method: str, reduction: str) -> None:
    def loss(x: Tensor, y: Tensor, directions: Tensor, weights: Tensor) -> Tensor:
        values = sliced_wasserstein(
            x * 1.5,
            y,
            directions=directions,
            weights_y=weights,
            method=method,
            bins=64,
            reduction=reduction,
        )
        return values.sum() + sliced_wasserstein(x, y, directions=4, method=method).sum() * 0

    arguments = [torch.rand(2, 30, 3), torch.rand(2, 20, 3), torch.randn(5, 3), torch.rand(2, 20)]
    arguments = [t.to(platform.device) for t in arguments]
    arguments[0].requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with platform.forced():
        plain, ours = loss(*arguments), compiled(*arguments)
        gradients = [torch.autograd.grad(value, arguments[0])[0] for value in (plain, ours)]
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*gradients)


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 is set")
def test_compiles_with_inductor() -> None:
    x, y = torch.rand(30, 3, requires_grad=True), torch.rand(20, 3)
    directions = torch.randn(5, 3)

    def loss(x: Tensor) -> Tensor:
        return sliced_wasserstein(x.sigmoid(), y, directions=directions, method="binned")

    (expected,) = torch.autograd.grad(loss(x), x)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("d", [3, 6])
@pytest.mark.parametrize("platform", platforms("reference", "triton", "cuda"))
def test_against_a_histogram(platform: Platform, d: int, rows: int, weighted: bool, p: int) -> None:
    """Counting y once is the same as counting it in the call."""
    ops, box, bins = torch.ops.sdcore, [-0.5, 1.5], 40
    x = torch.rand(2, 50, d, dtype=torch.float64, device=platform.device)
    y = torch.rand(rows, 60, d, dtype=torch.float64, device=platform.device)
    directions = torch.randn(5, d, dtype=torch.float64, device=platform.device)
    wx, wy = (torch.rand(*t.shape[:2], device=platform.device).double() for t in (x, y))
    wx, wy = ((w / w.sum(1, keepdim=True) if weighted else None) for w in (wx, wy))
    grown = x.clone().requires_grad_(), x.clone().requires_grad_()
    with platform.forced():
        histogram = ops.sliced_wasserstein_histogram(y, directions, wy, bins, box)
        found = ops.sliced_wasserstein_binned_to(
            grown[0], histogram, directions, wx, p, box, 0.5, None
        )
        wy = wy if wy is None else wy.expand(2, -1)
        expected = ops.sliced_wasserstein_binned(
            grown[1], y.expand(2, -1, -1), directions, wx, wy, p, bins, box, 0.5, None
        )
        gradients = [
            torch.autograd.grad(values[0].sum(), points)[0]
            for values, points in ((found, grown[0]), (expected, grown[1]))
        ]
    assert histogram.shape == (rows, 5, bins) and histogram.dtype == torch.int64
    torch.testing.assert_close(found[0], expected[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found[2], expected[3])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weighted", ["", "x", "y", "xy"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("d", [3, 6])
@pytest.mark.parametrize("m", [50, 61])
@pytest.mark.parametrize("platform", platforms("reference", "cuda"))
def test_against_what_was_sorted(
    platform: Platform, m: int, d: int, rows: int, weighted: str, p: int
) -> None:
    """Sorting y once is the same as sorting it in the call."""
    ops = torch.ops.sdcore
    x = dyadic_points(2, 50, d).to(platform.device)
    y = dyadic_points(rows, m, d).to(platform.device)
    directions = torch.randint(-8, 9, (5, d), device=platform.device).double() / 8
    weights = [torch.rand(*t.shape[:2], device=platform.device).double() for t in (x, y)]
    wx, wy = (
        w / w.sum(1, keepdim=True) if side in weighted else None
        for side, w in zip("xy", weights, strict=True)
    )
    whole = None if wy is None else wy.expand(2, -1)
    grown = [x.clone().requires_grad_() for _ in range(2)]
    cotangent = torch.rand(2, 5, device=platform.device).double()
    with platform.forced():
        kept = ops.sliced_wasserstein_sort(y, directions, wy)
        for scale in (None, 0.5):
            found = ops.sliced_wasserstein_exact_to(grown[0], *kept, directions, wx, p, scale, True)
            expected = ops.sliced_wasserstein_exact(
                grown[1], y.expand(2, -1, -1), directions, wx, whole, p, scale, True, False
            )
            here = cotangent if scale is None else cotangent[:, 0]
            gradients = [
                torch.autograd.grad((values[0] * here).sum(), points)[0]
                for values, points in zip((found, expected), grown, strict=True)
            ]
            torch.testing.assert_close(found[0], expected[0], rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)
    assert kept[0].shape == (rows, 5, m) and (kept[0].diff(dim=-1) >= 0).all()
    assert kept[1].shape == ((rows, 5, m) if wy is not None else (0,))


@pytest.mark.parametrize("platform", platforms("cuda"))
def test_sorted_with_weights_that_are_none(platform: Platform) -> None:
    y, weights = torch.rand(2, 30, 3, device="cuda"), torch.full((2, 30), 1 / 30, device="cuda")
    weights[1] = math.nan
    x, directions = torch.rand(2, 20, 3, device="cuda"), torch.randn(4, 3, device="cuda")
    with platform.forced():
        kept = torch.ops.sdcore.sliced_wasserstein_sort(y, directions, weights.double())
        values, gradient = torch.ops.sdcore.sliced_wasserstein_exact_to(
            x, *kept, directions, None, 1, 1.0, True
        )
    for result in (values, gradient):
        assert result[0].isfinite().all() and result[1].isnan().all()


@pytest.mark.parametrize("platform", platforms("cuda"))
@pytest.mark.parametrize("p", [1, 2])
def test_exact_with_one_slot_to_a_pass(platform: Platform, p: int) -> None:
    """As many points leave it: then a key is a projection alone, and differences must fit."""
    x = torch.rand(2, 3000, 3, device="cuda") * 2e-3 + 1
    # What 25 bits hold; and not as many, which one block would sort.
    y, directions = -x[:, 1:].flip(1) - 0.75, torch.eye(3, device="cuda")
    module = sys.modules["sdcore.ops.sliced_wasserstein_cuda_exact"]
    results = []
    for keys in (module.KEYS_OF_A_PASS, 3000):
        with platform.forced(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "KEYS_OF_A_PASS", keys)
            cotangent = torch.ones(2, 3, device="cuda")
            results.append(
                value_and_gradient(per_direction, x, y, cotangent, directions=directions, p=p)
            )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("platform", platforms("cuda"))
@pytest.mark.parametrize(
    "n, dtype",
    [(4_300_000, torch.float32), (9_000_000, torch.float64), (17_000_000, torch.float32)],
)
def test_exact_of_very_many_points(platform: Platform, n: int, dtype: torch.dtype) -> None:
    """Slopes go back to points in larger buckets, and then in none."""
    x = torch.rand(n, 1, device="cuda", dtype=dtype, requires_grad=True)
    y = torch.rand(n, 1, device="cuda", dtype=dtype) * 0.8
    one = torch.ones(1, 1, device="cuda", dtype=dtype)
    with platform.forced():
        value = sliced_wasserstein(x, y, directions=one)
        (gradient,) = torch.autograd.grad(value, x)
    order = x.detach()[:, 0].argsort()
    gap = x.detach()[order, 0].double() - y[:, 0].sort().values.double()
    assert value.item() == pytest.approx(gap.abs().mean().item(), rel=1e-5)
    wrong = (gradient[order, 0] * n - gap.sign()).abs() > 1e-3
    assert wrong.double().mean() < 1e-2  # points that tie share what they meet


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck_of_what_was_sorted(weighted: bool, p: int) -> None:
    x, y = torch.rand(2, 9, 3, requires_grad=True), torch.rand(1, 7, 3)
    directions, ops = torch.randn(4, 3), torch.ops.sdcore
    weights = torch.full((1, 7), 1 / 7, dtype=torch.float64) if weighted else None
    torch.library.opcheck(ops.sliced_wasserstein_sort, (y, directions, weights))
    kept = ops.sliced_wasserstein_sort(y, directions, weights)
    for scale in (0.5, None):
        torch.library.opcheck(
            ops.sliced_wasserstein_exact_to, (x, *kept, directions, None, p, scale, True)
        )
    torch.library.opcheck(
        ops.sliced_wasserstein_exact_to_backward,
        (torch.rand(2, 4), x.detach(), *kept, directions, None, p),
    )


@pytest.mark.parametrize("platform", platforms("cuda"))
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("kind", ["random", "ties", "constant", "outlier", "nan", "nan among ties"])
@pytest.mark.parametrize("d", [3, 6])
@pytest.mark.parametrize("n", [1, 513, 1024, 1025, 4096, 4097, 16384, 16385])
def test_exact_of_sets_that_fit_a_block(
    platform: Platform, n: int, d: int, kind: str, p: int
) -> None:
    """As many points on both sides: a kernel of its own, up to a size; and what was sorted before
    is as if it were not."""
    x, y = torch.randn(2, n, d), torch.randn(2, n, d) * 1.5 + 0.3
    directions = torch.randn(5, d)
    if "ties" in kind:
        x, y = dyadic_points(2, n, d).float(), dyadic_points(2, n, d).float() * 0.5
        directions = torch.randint(-4, 5, (5, d)) / 4
    if kind == "constant":
        x[:] = 0.25
    if kind == "outlier":  # all but one of x within a hundredth of the range
        x *= 1e-2
        x[1, n - 1] = 10.0
    if "nan" in kind:
        x[1, n // 2, d - 1] = x[1, n - 1, 2] = math.nan
    cotangent = torch.rand(2, 5)

    def of_all(device: str, dtype: torch.dtype) -> list[Tensor]:
        points = [t.to(device, dtype) for t in (x, y, cotangent)]
        return value_and_gradient(per_direction, *points, directions=directions.to(points[0]), p=p)

    with platform.forced():
        found = of_all(platform.device, torch.float32)
        on_gpu = [t.to(platform.device) for t in (x, y, directions)]
        kept = torch.ops.sdcore.sliced_wasserstein_sort(*on_gpu[1:], None)
        points = on_gpu[0].requires_grad_()
        values, _ = torch.ops.sdcore.sliced_wasserstein_exact_to(
            points, *kept, on_gpu[2], None, p, None, True
        )
        gradient = torch.autograd.grad((values * cotangent.to(values)).sum(), points)[0]
    for one, other in ((values, found[0]), (gradient, found[1])):
        torch.testing.assert_close(
            one.detach().cpu().double(), other, rtol=1e-6, atol=1e-9, equal_nan=True
        )
    for ours, exact in zip(found, of_all("cpu", torch.float64), strict=True):
        if "nan" in kind:
            assert ours[1].isnan().all()
            ours, exact = ours[:1], exact[:1]
        # Fixed point follows the largest. Beside an outlier, 25 bits leave a sign or two of the
        # 80,000 undecided; a block has 27.
        gradients = 1e-2 if (kind, p) == ("outlier", 1) and n > 16384 else 2e-3
        error, limit = (ours - exact).norm(), 1e-6 if ours.dim() == 2 else gradients
        assert error <= limit * exact.norm(), (error, exact.norm(), ours.dim())


@pytest.mark.parametrize("rows", [1, 2])
def test_a_pass_has_its_rows_of_what_was_sorted(rows: int) -> None:
    """Also where one set is kept for all batch elements, and without a copy for each of them."""
    module = importlib.import_module("sdcore.ops.sliced_wasserstein_cuda_exact")
    kept = module.Kept(torch.rand(rows, 3, 4), torch.empty(0))
    x = module.Points(torch.rand(2, 4, 3), None)
    call = module._Call(
        x, kept, torch.rand(3, 3), 1, None, 1.0, (True, False), torch.empty(2, 3), []
    )
    whole = kept.values.expand(2, -1, -1).reshape(-1, 4)
    for first, slots in ((0, 6), (0, 2), (2, 3), (5, 1)):
        found = module._row_of_each(kept, call, first, slots)
        assert found.equal(whole[first : first + slots]) and found.is_contiguous()


@pytest.mark.parametrize("platform", platforms("cuda"))
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("kind", ["constant", "two colors", "few", "many", "huge", "infinite"])
def test_exact_on_a_gpu_at_its_corners(platform: Platform, kind: str, p: int) -> None:
    """Long ties, sizes far apart, more than a pass, and magnitudes at the ends of float32."""
    n, m = {"few": (5, 70_000), "many": (140_000, 3)}.get(kind, (70_000, 60_000))
    x, y = torch.rand(2, n, 3), torch.rand(2, m, 3) ** 2
    if kind == "constant":
        x[:] = 0.5
    if kind == "two colors":
        x = torch.where(x[..., :1] < 0.3, 0.25, 0.75).expand(2, n, 3).contiguous()
    if kind == "huge":
        x[0], y[0] = x[0] * 1e37, y[0] * 1e37
        x[1], y[1] = x[1] * 1e-37, y[1] * 1e-37
    if kind == "infinite":
        x[0, 7, 1] = math.inf
    directions = torch.randn(70, 3)
    options: dict[str, Any] = {"directions": directions.cuda(), "p": p}
    with platform.forced():
        ours = value_and_gradient(
            per_direction, x.cuda(), y.cuda(), torch.ones(2, 70, device="cuda"), **options
        )
    options["directions"] = directions.double()
    expected = value_and_gradient(
        per_direction, x.double(), y.double(), torch.ones(2, 70), **options
    )
    for our, exact in zip(ours, expected, strict=True):
        for b in range(2):
            if kind == "infinite" and b == 0:
                assert our[b].isnan().all()
            elif kind == "huge" and p == 2:
                continue  # squares of such numbers are beyond float32
            else:
                error = (our[b] - exact[b]).norm() / exact[b].norm()
                assert error < (1e-5 if our.dim() == 2 else 2e-3), (kind, b, error)


@pytest.mark.parametrize("platform", platforms("reference", "triton", "cuda"))
def test_a_histogram_of_what_is_not_finite(platform: Platform) -> None:
    y = torch.rand(2, 30, 3, device=platform.device)
    y[1, 3, 1] = math.inf
    x, directions = torch.rand(2, 20, 3).to(y), torch.randn(4, 3).to(y)
    with platform.forced():
        histogram = torch.ops.sdcore.sliced_wasserstein_histogram(
            y, directions, None, 16, [0.0, 1.0]
        )
        values, table, _ = torch.ops.sdcore.sliced_wasserstein_binned_to(
            x, histogram, directions, None, 1, [0.0, 1.0], None, None
        )
    assert (histogram[0].sum(-1) > 0).all() and (histogram[1] == -1).all()
    assert values[0].isfinite().all() and values[1].isnan().all()
    assert table[0].isfinite().all() and table[1].isnan().all()


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("platform", platforms("reference", "triton", "cuda"))
def test_histograms_of_an_empty_batch(platform: Platform, p: int) -> None:
    x, directions = torch.rand(0, 9, 3), torch.randn(4, 3)
    x, directions = x.to(platform.device), directions.to(platform.device)
    with platform.forced():
        histogram = torch.ops.sdcore.sliced_wasserstein_histogram(x, directions, None, 8, [0, 1])
        values, table, edges = torch.ops.sdcore.sliced_wasserstein_binned_to(
            x, histogram, directions, None, p, [0, 1], 1.0, None
        )
    assert histogram.shape == table.shape == (0, 4, 8)
    assert values.shape == (0,) and edges.shape == (0, 4, 2)


@pytest.mark.parametrize("p", [1, 2])
def test_opcheck_of_histograms(p: int) -> None:
    x, y = torch.rand(2, 9, 3, requires_grad=True), torch.rand(1, 7, 3)
    directions, ops = torch.randn(4, 3), torch.ops.sdcore
    weights = torch.full((1, 7), 1 / 7, dtype=torch.float64)
    torch.library.opcheck(ops.sliced_wasserstein_histogram, (y, directions, weights, 8, [0.0, 1.0]))
    histogram = ops.sliced_wasserstein_histogram(y, directions, weights, 8, [0.0, 1.0])
    for scale in (0.5, None):
        torch.library.opcheck(
            ops.sliced_wasserstein_binned_to,
            (x, histogram, directions, None, p, [0, 1.0], scale, None),
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "method, value_range", [("exact", None), ("binned", None), ("binned", (0.0, 1.0))]
)
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("platform", platforms("reference", "cpp", "cuda"))
def test_a_palette_is_its_weighted_colors(
    platform: Platform,
    dtype: torch.dtype,
    equal: bool,
    method: str,
    value_range: Any,
    reduction: str,
) -> None:
    colors, weights = dyadic_points(40, 3).float(), None if equal else torch.rand(40)
    palette = sdcore.Palette(colors, weights).to(platform.device)
    assert palette.has_equal_weights == equal
    x = dyadic_points(2, 60, 3).to(platform.device, dtype).requires_grad_()
    directions = DYADIC_DIRECTIONS.to(platform.device, torch.promote_types(dtype, torch.float32))
    options: dict[str, Any] = {
        "directions": directions,
        "method": method,
        "bins": 64,
        "reduction": reduction,
        "value_range": value_range,
    }
    with platform.forced():
        pairs = []
        for y, more in ((palette, {}), (palette.colors, {"weights_y": palette.weights})):
            value = sliced_wasserstein(x, y, **options, **more)
            pairs.append((value, torch.autograd.grad(value.sum(), x)[0]))
    for ours, expected in zip(*pairs, strict=True):
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_palette_has_weights_of_its_own() -> None:
    palette = sdcore.Palette.from_colors(["#ff8800", "#0022cc"])
    with pytest.raises(ValueError, match="weights_y is for y as a tensor"):
        sliced_wasserstein(torch.rand(5, 3), palette, weights_y=torch.ones(2))
    with pytest.raises(ValueError, match="dimension d of x, 4; got 3"):
        sliced_wasserstein(torch.rand(5, 4), palette)
    assert sliced_wasserstein(palette.colors, palette).item() == 0


@pytest.mark.gpu
def test_a_palette_follows_its_directions() -> None:
    """What is kept is for these directions as they are now, and for no other settings."""
    palette = sdcore.Palette(torch.rand(500, 3)).to("cuda")
    x, directions = torch.rand(3000, 3, device="cuda"), torch.randn(6, 3, device="cuda")

    def both(**changes: Any) -> None:
        options = {"directions": directions, "method": "binned", "value_range": (0, 1)} | changes
        ours = sliced_wasserstein(x, palette, **options)
        plain = {"weights_y": palette.weights} | options
        torch.testing.assert_close(ours, sliced_wasserstein(x, palette.colors, **plain))

    both()
    both()
    both(bins=100)
    both(value_range=(-1, 2))
    directions += 1
    both()
    both(directions=torch.randn(6, 3, device="cuda"))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        both()
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    fresh = directions.clone()
    with torch.cuda.graph(graph):
        captured = sliced_wasserstein(
            x, palette, directions=fresh, method="binned", value_range=(0, 1)
        )
    both(directions=fresh)
    fresh.neg_().mul_(2)
    graph.replay()
    expected = sliced_wasserstein(
        x, palette.colors, directions=fresh, weights_y=palette.weights, method="binned",
        value_range=(0, 1),
    )  # fmt: skip
    torch.testing.assert_close(captured, expected)


@pytest.mark.parametrize("platform", platforms("cuda"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_as_many_bins_as_fit(platform: Platform, dtype: torch.dtype) -> None:
    """The most bins that CUDA takes work, weighted and backward; one more is refused by name."""
    module = sys.modules["sdcore.ops.sliced_wasserstein_cuda"]
    most = module.most_bins(torch.cuda.current_device(), dtype == torch.float64)
    x = torch.rand(700, 3, dtype=dtype, device="cuda", requires_grad=True)
    y, directions = torch.rand(600, 3).to(x), torch.randn(2, 3).to(x)
    weights = torch.rand(700, device="cuda")
    results = []
    for backend in ("cuda", "reference"):
        with sdcore.backend(backend):
            value = sliced_wasserstein(
                x, y, directions=directions, weights_x=weights, method="binned", bins=most
            )
            results.append((value, torch.autograd.grad(value, x)[0]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=0)
    apart = (results[0][1] - results[1][1]).norm() / results[1][1].norm()
    assert apart < (0.05 if dtype == torch.float32 else 1e-9)  # projections on a bin's edge
    with platform.forced(), pytest.raises(sdcore.backends.BackendError, match=f"not {most + 1}"):
        sliced_wasserstein(x, y, directions=directions, method="binned", bins=most + 1)
    assert sliced_wasserstein(
        x, y, directions=directions, method="binned", bins=most + 1
    ).isfinite()


@pytest.mark.gpu
def test_a_graph_holds_what_the_palette_kept() -> None:
    palette = sdcore.Palette(torch.rand(500, 3)).to("cuda")
    x, directions = torch.rand(3000, 3, device="cuda"), torch.randn(6, 3, device="cuda")

    def value() -> Tensor:
        return sliced_wasserstein(
            x, palette, directions=directions, method="binned", value_range=(0, 1)
        )

    expected = value()
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules["sdcore.ops.sliced_wasserstein"]  # its name is the function's
        patch.setattr(module, "_histogram", None)  # so that counting again would fail
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = value()
    graph.replay()
    torch.testing.assert_close(captured, expected)


BOX = {"value_range": (0.0, 1.0)}


def good() -> dict[str, Any]:
    return {"x": torch.rand(2, 5, 3), "y": torch.rand(2, 4, 3)}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [[1.0]]}, TypeError, "x must be a tensor; got list"),
        ({"x": torch.zeros(5, 3, dtype=torch.int64)}, TypeError, "x must be of dtype.*int64"),
        ({"y": torch.zeros(5, 3, dtype=torch.complex64)}, TypeError, "y must be of dtype"),
        ({"y": torch.zeros(3)}, ValueError, r"y must be \[..., points, d\]; got shape \(3,\)"),
        ({"x": torch.zeros(0, 3)}, ValueError, r"x must hold at least one.*\(0, 3\)"),
        ({"y": torch.zeros(5, 0)}, ValueError, r"y must hold at least one.*\(5, 0\)"),
        ({"y": torch.zeros(2, 5, 4)}, ValueError, "dimension d of x, 3; got 4"),
        ({"y": torch.zeros(3, 5, 3)}, ValueError, "leading dimensions.*broadcast"),
        ({"y": torch.zeros(2, 5, 3, device="meta")}, ValueError, "y must be on the device of x"),
        ({"p": 3}, ValueError, "p must be 1 or 2; got 3"),
        ({"p": 1.5}, ValueError, "p must be 1 or 2; got 1.5"),
        ({"method": "fast"}, ValueError, "method must be one of.*'fast'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of.*'max'"),
        ({"bins": 1}, ValueError, "bins must be 2 to 1048576; got 1"),
        ({"bins": 1 << 21}, ValueError, "bins must be 2 to 1048576; got 2097152"),
        ({"bins": 10.0}, TypeError, "bins must be an int; got float"),
        ({"value_range": (1, 0)}, ValueError, r"low < high; got \(1, 0\)"),
        ({"value_range": (0, math.inf)}, ValueError, "value_range must be finite"),
        ({"value_range": (0, 1, 2)}, ValueError, r"value_range must be \(low, high\)"),
        ({"rescale": (0.5, 0.5)}, ValueError, "rescale is for .*binned.* with a value_range"),
        (BOX | {"rescale": 0.5}, ValueError, r"rescale must be \(a, b\); got 0.5"),
        (BOX | {"rescale": (1, 2, 3)}, ValueError, r"rescale must be \(a, b\)"),
        (BOX | {"rescale": ("1", 0)}, TypeError, "rescale must be two numbers"),
        (BOX | {"rescale": (math.nan, 0.5)}, ValueError, "rescale must be finite"),
        (BOX | {"rescale": (0, 0.5)}, ValueError, r"a that is not 0; got \(0, 0.5\)"),
        (
            {"rescale": (0.5, 0.5), "method": "exact"},
            ValueError,
            "rescale is for .*binned.* with a value_range",
        ),
        ({"directions": 0}, ValueError, "directions must be at least 1; got 0"),
        ({"directions": 2.0}, TypeError, "directions must be an int or a tensor.*float"),
        ({"directions": True}, TypeError, "directions must be an int or a tensor.*bool"),
        ({"directions": torch.zeros(4, 2)}, ValueError, r"directions must be \[L, 3\].*\(4, 2\)"),
        ({"directions": torch.zeros(0, 3)}, ValueError, r"directions must be \[L, 3\].*\(0, 3\)"),
        ({"directions": torch.zeros(4, 3).long()}, TypeError, "directions must be floating-point"),
        ({"directions": torch.zeros(4, 3, device="meta")}, ValueError, "directions must be on"),
        (
            {"directions": torch.zeros(4, 3), "generator": torch.Generator()},
            ValueError,
            "generator draws directions",
        ),
        ({"weights_x": [1.0]}, TypeError, "weights_x must be a tensor; got list"),
        ({"weights_x": torch.ones(2, 4)}, ValueError, r"weights_x must be \[..., 5\]"),
        ({"weights_y": torch.ones(3, 4)}, ValueError, r"weights_y must broadcast to \(2, 4\)"),
        ({"weights_y": torch.ones(2, 4).long()}, TypeError, "weights_y must be floating-point"),
        ({"weights_y": torch.ones(4, device="meta")}, ValueError, "weights_y must be on"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = good() | {"method": "binned"} | change
    with pytest.raises(error, match=message):
        sliced_wasserstein(arguments.pop("x"), arguments.pop("y"), **arguments)


def test_good_arguments_are_good() -> None:
    """What the bad ones start from."""
    arguments = good()
    assert sliced_wasserstein(**arguments, method="binned").shape == (2,)
    numpy_int = int(np.int64(3))
    assert sliced_wasserstein(**arguments, directions=numpy_int).isfinite().all()


GPU = [p for p in ALL if p.values[0].device == "cuda"]
ON_GPU = [p for p in cases() if p.values[0].device == "cuda"]
# Plain PyTorch's operators promise neither capture nor an order of sums, and hold all projections.
KERNELS = [p for p in ON_GPU if p.values[0].backend != "reference"]


@pytest.mark.parametrize("platform, method", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1, 2])
def test_in_a_cuda_graph(platform: Platform, method: str, dtype: torch.dtype, p: int) -> None:
    """Captured on one input, replayed on another; no host synchronization on the way."""
    x = torch.rand(2, 3000, 3, device="cuda").to(dtype).requires_grad_()
    y = torch.rand(2, 2000, 3, device="cuda").to(dtype)
    weights = torch.rand(2, 2000, device="cuda")
    directions = torch.randn(9, 3, device="cuda").to(torch.promote_types(dtype, torch.float32))

    def step() -> tuple[Tensor, Tensor]:
        value = sliced_wasserstein(
            x, y, directions=directions, weights_y=weights, method=method, p=p
        )
        return value, torch.autograd.grad(value.sum(), x)[0]

    with platform.forced():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            x.copy_(torch.rand(2, 3000, 3, device="cuda"))
        graph.replay()
        expected = step()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("platform, method", ON_GPU)
@pytest.mark.parametrize("p", [1, 2])
def test_does_not_synchronize(platform: Platform, method: str, p: int) -> None:
    x = torch.rand(2, 3000, 3, device="cuda", requires_grad=True)
    y, weights = torch.rand(2, 2000, 3, device="cuda"), torch.rand(2, 2000, device="cuda")

    def step(reduction: str) -> None:
        value = sliced_wasserstein(
            x, y, p=p, directions=9, weights_y=weights, method=method, reduction=reduction
        )
        value.sum().backward()

    with platform.forced():
        for reduction in ("mean", "none"):  # compiles, allocates
            step(reduction)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for reduction in ("mean", "none"):
                step(reduction)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("platform, method", KERNELS)
def test_repeats_bit_for_bit_on_a_gpu(platform: Platform, method: str, p: int) -> None:
    x, y = torch.rand(2, 100_000, 3, device="cuda"), torch.rand(2, 90_000, 3, device="cuda")
    weights = torch.rand(2, 100_000, device="cuda")
    directions = torch.randn(9, 3, device="cuda")
    results = []
    with platform.forced():
        for _ in range(5):
            results.append(
                value_and_gradient(
                    per_direction,
                    x,
                    y,
                    torch.ones(2, 9, device="cuda"),
                    directions=directions,
                    weights_x=weights,
                    method=method,
                    p=p,
                )
            )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("platform", platforms("triton", "cuda")[1:])
def test_memory_of_binned(platform: Platform) -> None:
    """Within a few times the points and L·bins; never L·n."""
    n, count, bins = 1_000_000, 128, 1024
    x = torch.rand(n, 3, device="cuda", requires_grad=True)
    y = torch.rand(n, 3, device="cuda")
    with platform.forced():
        sliced_wasserstein(x, y, directions=count, method="binned", bins=bins).backward()
        x.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        sliced_wasserstein(x, y, directions=count, method="binned", bins=bins).backward()
    used = torch.cuda.max_memory_allocated() - before
    assert used < 4 * (3 * n + 8 * count * bins) * 2 < 4 * count * n


@pytest.mark.parametrize("platform", platforms("cuda"))
@pytest.mark.parametrize("n, count", [(1_000_000, 512), (16_384, 4096)])
def test_memory_of_exact(platform: Platform, n: int, count: int) -> None:
    """A bounded number of directions at a time, fewer where memory is short; always the same."""
    x = torch.rand(n, 3, device="cuda", requires_grad=True)
    y = torch.rand(n, 3, device="cuda")
    directions = torch.randn(count, 3, device="cuda")
    module = sys.modules["sdcore.ops.sliced_wasserstein_cuda_exact"]
    results = []
    for free in (None, 200_000_000):
        with platform.forced(), pytest.MonkeyPatch.context() as patch:
            if free is not None:
                patch.setattr(module, "_free", lambda device, free=free: free)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            value = sliced_wasserstein(x, y, directions=directions)
            results.append((value, torch.autograd.grad(value, x)[0]))
        used = torch.cuda.max_memory_allocated() - before
        assert used < (1_200_000_000 if free is None else free + 10 * 12 * n)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("platform, method", ON_GPU)
def test_on_another_stream(platform: Platform, method: str) -> None:
    x, y = torch.rand(50_000, 3, device="cuda"), torch.rand(40_000, 3, device="cuda")
    directions = torch.randn(9, 3, device="cuda")
    stream = torch.cuda.Stream()
    with platform.forced():
        expected = sliced_wasserstein(x, y, directions=directions, method=method)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # work on the default stream would overtake this
            moved = x + 1
            found = sliced_wasserstein(moved, y + 1, directions=directions, method=method)
        stream.synchronize()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("platform, method", ON_GPU)
def test_on_the_second_device(platform: Platform, method: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, y = torch.rand(5000, 3), torch.rand(4000, 3)
    directions = torch.randn(9, 3)
    results = []
    for device in ("cuda:0", "cuda:1"):
        with platform.forced():
            results.append(
                value_and_gradient(
                    per_direction,
                    x.to(device),
                    y.to(device),
                    torch.ones(9, device=device),
                    directions=directions.to(device),
                    method=method,
                )
            )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.sanitize
@pytest.mark.parametrize("platform, method", ON_GPU)
@pytest.mark.parametrize("m, weighted", [(41, False), (41, True), (37, False)])
@pytest.mark.parametrize("d", [3, 6])
@pytest.mark.parametrize("p", [1, 2])
def test_small_shapes_for_the_sanitizer(
    platform: Platform, method: str, p: int, d: int, m: int, weighted: bool
) -> None:
    x = torch.rand(2, 37, d, device="cuda", requires_grad=True)
    y = torch.rand(2, m, d, device="cuda", requires_grad=m == 41)
    weights = torch.rand(2, m, device="cuda") if weighted else None
    with platform.forced():
        value = sliced_wasserstein(
            x, y, directions=5, weights_y=weights, method=method, bins=33, p=p
        )
        value.sum().backward()
        torch.cuda.synchronize()
    assert value.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.sanitize
@pytest.mark.parametrize("platform", platforms("cuda"))
def test_ties_for_the_sanitizer(platform: Platform) -> None:
    x = torch.ones(1, 600, 6, device="cuda", requires_grad=True)
    with platform.forced():
        sliced_wasserstein(x, torch.rand(1, 600, 6, device="cuda"), directions=3).sum().backward()
        torch.cuda.synchronize()
    assert x.grad is not None and x.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------
# Pictures as a decoder has them


def picture(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str) -> Tensor:
    """[B, 3, H, W], of multiples of 1/64, beyond [-1, 1] and at both ends of it: exact in every
    dtype, and what becomes of them, too."""
    values = torch.randint(-80, 81, shape).double() / 64
    values[:, :, 0, :2] = torch.tensor([-1.0, 1.0])
    values = values.to(device, dtype)
    if layout == "channels last":
        return values.contiguous(memory_format=torch.channels_last)
    return values.repeat(1, 1, 1, 2)[..., : shape[-1]] if layout == "cropped" else values


def composed(x: Tensor, rescale: tuple[float, float], box: tuple[float, float]) -> Tensor:
    a, b = rescale
    return (x.to(torch.promote_types(x.dtype, torch.float32)) * a + b).clamp(*box)


@pytest.mark.parametrize(
    "layout, weighted", [("contiguous", "y"), ("channels last", "xy"), ("cropped", "")]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1] if INTERPRETED else [1, 2])
@pytest.mark.parametrize("platform", ALL)
def test_rescaled_as_read(
    platform: Platform, p: int, dtype: torch.dtype, weighted: str, layout: str
) -> None:
    """As what is composed before the op, and by autograd: the numbers are such that nothing is
    rounded on the way to a bin."""
    image = picture((2, 3, 20, 15), dtype, layout, platform.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    colors = dyadic_points(50, 3).to(platform.device, wide)
    options: dict[str, Any] = {
        "p": p, "method": "binned", "bins": 64, "value_range": (0.0, 1.0), "reduction": "none",
        "directions": DYADIC_DIRECTIONS.to(platform.device, wide),
    }  # fmt: skip
    for side, size in (("x", 300), ("y", 50)):
        if side in weighted:
            options[f"weights_{side}"] = random_weights(size).to(platform.device)
    results = []
    with platform.forced():
        for rescale in ((0.5, 0.5), None):
            leaf = image.detach().requires_grad_()
            x = leaf.flatten(2).mT if rescale else composed(leaf, (0.5, 0.5), (0, 1)).flatten(2).mT
            value = sliced_wasserstein(x, colors, rescale=rescale, **options)
            weight = torch.arange(1.0, value.numel() + 1).reshape(value.shape).to(value)
            results.append((value, torch.autograd.grad((value * weight).sum(), leaf)[0]))
    (value, grad), (expected, wanted) = results
    assert value.dtype == wide and grad.dtype == dtype
    # Sums of fractions, in another order.
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad, wanted, rtol=2 * max(eps, 1e-6), atol=1e-6)
    outside = image.abs() > 1
    assert outside.any() and not grad[outside].any()
    assert (grad[:, :, 0, :2] != 0).any()  # on the ends it is no clamp


@pytest.mark.parametrize("platform", ALL)
def test_rescaled_at_odd_sizes(platform: Platform) -> None:
    """Any d, several tiles, other factors and ranges; a point may be rounded into another bin."""
    for n, d, rescale, box in (
        (1, 1, (2.0, -1.0), (-0.5, 0.5)),
        (4500, 2, (-0.3, 0.1), (-0.25, 0.35)),
        (700, 3, (0.5, 0.5), (0.0, 1.0)),
        (333, 4, (10.0, 0.7), (0.0, 1.0)),
        (60, 6, (0.5, 0.5), (0.1, 0.9)),
    ):
        x, y = torch.randn(2, n, d, device=platform.device), torch.rand(40, d)
        y, directions = y.to(platform.device), torch.randn(5, d, device=platform.device)
        options: dict[str, Any] = {
            "directions": directions, "method": "binned", "bins": 128, "value_range": box, "p": 2,
        }  # fmt: skip
        leaves = [x.detach().requires_grad_() for _ in range(2)]
        with platform.forced():
            ours = sliced_wasserstein(leaves[0], y, rescale=rescale, **options)
            plain = sliced_wasserstein(composed(leaves[1], rescale, box), y, **options)
            grads = [
                torch.autograd.grad(value.sum(), leaf)[0]
                for value, leaf in zip((ours, plain), leaves, strict=True)
            ]
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
        # Of a point in the next bin it differs by a bin's width, for each direction.
        scale = grads[1].abs().max()
        assert (grads[0] - grads[1]).norm() < 0.02 * grads[1].norm() + 1e-6
        assert (grads[0] - grads[1]).abs().max() < 0.2 * scale + 1e-6
        zero = composed(x, rescale, box) != composed(x, rescale, (-math.inf, math.inf))
        assert not grads[0][zero].any()


@pytest.mark.parametrize("platform", ALL)
def test_rescaled_is_the_specification(platform: Platform) -> None:
    x = dyadic_points(2, 100, 3) * 3 - 1.5
    y, cotangent = dyadic_points(2, 60, 3), torch.rand(2, 7, dtype=torch.float64)
    options: dict[str, Any] = {
        "method": "binned", "bins": 64, "value_range": (0.0, 1.0), "rescale": (0.5, 0.5),
    }  # fmt: skip
    exact = value_and_gradient(specified, x, y, cotangent, directions=DYADIC_DIRECTIONS, **options)
    with platform.forced():
        ours = value_and_gradient(
            per_direction,
            *(t.to(platform.device) for t in (x, y, cotangent)),
            directions=DYADIC_DIRECTIONS.to(platform.device),
            **options,
        )
    for our, exactly in zip(ours, exact, strict=True):
        torch.testing.assert_close(our, exactly, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("platform", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rescaled_what_is_not_finite(platform: Platform, bad: float) -> None:
    """As clamp has it: an infinity is moved to an end, a NaN stays and makes the value one."""
    x = torch.rand(2, 300, 3)
    x[1, 7, 2] = bad
    x, y = x.to(platform.device).requires_grad_(), torch.rand(40, 3, device=platform.device)
    with platform.forced():
        value = sliced_wasserstein(
            x, y, directions=5, method="binned", value_range=(0.0, 1.0), rescale=(2.0, -0.5)
        )
        (grad,) = torch.autograd.grad(value.sum(), x)
    assert value[0].isfinite() and value[1].isnan() == math.isnan(bad)
    assert grad[0].isfinite().all() and grad[1].isnan().any() == math.isnan(bad)
    assert grad[1, 7, 2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("platform", ALL)
def test_rescaled_against_a_palette(platform: Platform, equal: bool, dtype: torch.dtype) -> None:
    palette = sdcore.Palette(dyadic_points(40, 3).float(), None if equal else torch.rand(40))
    palette = palette.to(platform.device)
    image = picture((2, 3, 12, 10), dtype, "contiguous", platform.device)
    options: dict[str, Any] = {
        "directions": DYADIC_DIRECTIONS.to(platform.device, torch.float32), "method": "binned",
        "bins": 64, "value_range": (0.0, 1.0), "rescale": (0.5, 0.5),
    }  # fmt: skip
    weights = None if equal else palette.weights
    pairs = []
    with platform.forced():
        for y, more in ((palette, {}), (palette.colors, {"weights_y": weights})):
            leaf = image.detach().requires_grad_()
            value = sliced_wasserstein(leaf.flatten(2).mT, y, **options, **more)
            pairs.append((value, torch.autograd.grad(value.sum(), leaf)[0]))
    for ours, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("platform", ALL)
def test_opcheck_of_what_is_rescaled(platform: Platform) -> None:
    x = torch.randn(2, 9, 3, device=platform.device, dtype=torch.bfloat16)
    y, directions = torch.rand(2, 7, 3).to(platform.device), torch.randn(4, 3).to(platform.device)
    grown, rescale, ops = x.clone().requires_grad_(), [0.5, 0.5, 0.0, 1.0], torch.ops.sdcore
    with platform.forced():
        forward = (y, directions, None, None, 1, 8, [0.0, 1.0], None, rescale)
        torch.library.opcheck(ops.sliced_wasserstein_binned, (grown, *forward))
        _, table, _, edges = ops.sliced_wasserstein_binned(x, *forward)
        grad = torch.rand(2, 4, device=platform.device)
        torch.library.opcheck(
            ops.sliced_wasserstein_binned_backward,
            (grad, x, directions, None, table, edges, None, rescale),
        )


@pytest.mark.parametrize("platform", ALL)
def test_rescaled_compiles_without_a_graph_break(platform: Platform) -> None:
    if platform.backend == "triton" and platform.device == "cpu":
        pytest.skip("the interpreter runs Python")
    image = torch.randn(2, 3, 8, 8, device=platform.device).bfloat16().requires_grad_()
    colors, directions = torch.rand(20, 3).to(image.device), torch.randn(5, 3).to(image.device)

    def loss(image: Tensor) -> Tensor:
        return sliced_wasserstein(
            image.flatten(2).mT, colors, directions=directions, method="binned", bins=64,
            value_range=(0.0, 1.0), rescale=(0.5, 0.5),
        ).sum()  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with platform.forced():
        values = [loss(image), compiled(image)]
        results = [(value, *torch.autograd.grad(value, image)) for value in values]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [100, 1024])
def test_rescaled_on_a_gpu_makes_no_copy(
    name: str, dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the gradient, of the picture's dtype, lies as the picture does; small and large, where a
    thread has fewer and more points."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    colors, directions = torch.rand(5000, 3, device="cuda"), torch.randn(30, 3, device="cuda")
    weights = torch.rand(5000, device="cuda")
    options: dict[str, Any] = {
        "directions": directions, "weights_y": weights, "method": "binned",
        "value_range": (0.0, 1.0),
    }  # fmt: skip
    for layout in (torch.contiguous_format, torch.channels_last):
        image = torch.randn(1, 3, size, size, device="cuda").to(dtype, memory_format=layout)
        leaf = image.detach().requires_grad_()

        def work(leaf: Tensor = leaf) -> tuple[Tensor, Tensor]:
            x = leaf.flatten(2).mT
            value = sliced_wasserstein(x, colors, rescale=(0.5, 0.5), **options)
            return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

        with sdcore.backend(name):
            value, grad = work()
            # Of the one picture the first stride says nothing.
            assert grad.stride()[1:] == leaf.stride()[1:] and grad.dtype == dtype
            plain = image.detach().requires_grad_()
            wanted = sliced_wasserstein(
                composed(plain, (0.5, 0.5), (0, 1)).flatten(2).mT, colors, **options
            )
            torch.testing.assert_close(value, wanted.detach(), rtol=1e-4, atol=1e-6)
            wanted_grad = torch.autograd.grad(wanted.sum(), plain)[0]
            assert (grad - wanted_grad).float().norm() < 0.02 * wanted_grad.float().norm()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            used = torch.cuda.max_memory_allocated() - before
            # Less than one copy in float32; tables and histograms take a part of that.
            assert size < 1024 or used < grad.nbytes + 4 * leaf.numel()
