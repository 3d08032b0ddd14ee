from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sdcore
from sdcore.masks import GateMask, RegionMask, TokenBits
from sdcore.ops import masked_cross_attention
from sdcore.ops.masked_cross_attention import reference
from tests.platforms import Platform, assert_replays, platforms

ALL = platforms("reference", "triton")
PLAIN = [p for p in ALL if p.id.endswith("reference")]
INTERPRETED = sdcore.backends.triton_interpreted()
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32, torch.float64)
MASKS = ("none", "bits", "regions", "multiplicative", "additive", "bias")
WIDTHS = (32, 40, 64, 80, 128, 160)
# The interpreter is slow, and wrong about products of bfloat16: a GPU tests the rest.
CASES = [
    (heads, n, tokens, d, dtype)
    for heads, n, tokens in ((2, 67, 77),)
    for d in WIDTHS
    for dtype in DTYPES
] + [
    (3, 130, 9, 16, torch.float32),
    (4, 33, 96, 40, torch.float16),
    (1, 1, 1, 1, torch.float32),
    (2, 50, 154, 64, torch.float16),
    (1, 35, 231, 40, torch.float32),
    (1, 17, 308, 64, torch.float16),
    (1, 20, 40, 256, torch.float32),
]


def supported(platform: Platform, dtype: torch.dtype, tokens: int = 77, d: int = 16) -> bool:
    if platform.backend != "triton":
        return True
    if platform.device != "cuda":
        return dtype not in (torch.float64, torch.bfloat16)
    from sdcore.triton_kernels import masked_cross_attention as kernels

    # What a chip has no room for in shared memory; the tuned widths must be taken.
    refused = kernels.refuses(torch.empty(1, 1, 1, d, dtype=dtype, device="cuda"), tokens, d)
    assert refused is None or dtype in (torch.float32, torch.float64) or d > 64 or tokens > 96
    return refused is None


def some_mask(kind: str, batch: int, heads: int, n: int, tokens: int) -> Any:
    """In float64, of numbers that every dtype holds, and with a gate's logits far from zero."""
    if kind == "none":
        return None
    if kind == "bias":
        bias = torch.randint(-8, 9, (batch, 1, n, tokens)).double() / 4
        return bias.masked_fill(torch.rand_like(bias) < 0.2, -math.inf)
    may_attend = torch.rand(batch, n, tokens) < 0.3
    may_attend[:, :: max(2, n // 4)] = False  # rows without any
    if kind == "bits":
        return TokenBits.from_bool(may_attend)
    if kind == "regions":
        return RegionMask(
            torch.randint(0, 8, (batch, n), dtype=torch.int32),
            torch.randint(0, 8, (1, tokens), dtype=torch.int32),
        )
    # Sums of odd numbers of odd halves are never zero.
    phi, psi = (
        torch.randint(0, 2, (size, rows, 33)).double() - 0.5
        for size, rows in ((batch, n), (1, tokens))
    )
    phi[:, : n // 3] = -psi[:, :1].sign() / 2
    return GateMask(phi, psi, torch.full((1,), -0.25, dtype=torch.float64), kind)


def moved(mask: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(mask, Tensor):
        return mask.to(device, dtype)
    if isinstance(mask, TokenBits):
        return TokenBits(mask.words.to(device))
    if isinstance(mask, RegionMask):
        return RegionMask(mask.pixels.to(device), mask.tokens.to(device))
    if isinstance(mask, GateMask):
        parts = (part.to(device, dtype) for part in (mask.phi, mask.psi, mask.bias))
        return GateMask(*parts, mask.ste)
    return mask


def leaves(mask: Any) -> list[Tensor]:
    """What of a mask has a gradient."""
    if isinstance(mask, GateMask):
        return [mask.phi, mask.psi, mask.bias]
    return [mask] if isinstance(mask, Tensor) else []


def value_and_gradients(
    function: Callable[..., Tensor], points: list[Tensor], mask: Any, grad: Tensor, **options: Any
) -> list[Tensor]:
    inputs = [one.detach().requires_grad_() for one in points]
    if isinstance(mask, Tensor):
        mask = mask.detach().requires_grad_()
    elif isinstance(mask, GateMask):
        mask = GateMask(*(one.detach().requires_grad_() for one in leaves(mask)), mask.ste)
    weights = options.get("segment_weights")
    if weights is not None:
        options["segment_weights"] = weights = weights.detach().requires_grad_()
    out = function(*inputs, mask, **options)
    wanted = [*inputs, *leaves(mask), *([] if weights is None else [weights])]
    found = torch.autograd.grad(out, wanted, grad.to(out))
    return [one.detach().cpu().double() for one in (out, *found)]


def assert_as_good(
    ours: list[Tensor], plain: list[Tensor], exact: list[Tensor], dtype: torch.dtype, times: float
) -> None:
    """At most so many times the error of plain PyTorch in the same dtype, plus its epsilon."""
    epsilon = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    for number, (one, other, right) in enumerate(zip(ours, plain, exact, strict=True)):
        error, allowed = (
            (one - right).norm(),
            times * (other - right).norm() + epsilon * right.norm(),
        )
        allowed += torch.finfo(dtype).smallest_normal * math.sqrt(right.numel())
        if right.numel() == 1 and number:  # the gate's bias: a sum of much that cancels, psi's not
            allowed += 8 * epsilon * exact[number - 1].norm()
        assert error <= allowed, f"{number}: {error:.3g}, allowed {allowed:.3g}, {right.norm():.3g}"


def compare(
    platform: Platform, points: list[Tensor], mask: Any, dtype: torch.dtype, **options: Any
) -> None:
    """``points`` in float64, of numbers that ``dtype`` holds."""
    q, _, v = points
    grad = torch.randint(-8, 9, (*q.shape[:3], v.shape[3])).double() / 8
    exact = value_and_gradients(reference, points, mask, grad, **options)
    given = {key: one.to(dtype) if isinstance(one, Tensor) else one for key, one in options.items()}
    low = [one.to(dtype) for one in points]
    plain = value_and_gradients(reference, low, moved(mask, "cpu", dtype), grad, **given)
    there = {
        key: one.to(platform.device) if isinstance(one, Tensor) else one
        for key, one in given.items()
    }
    with platform.forced():
        ours = value_and_gradients(
            masked_cross_attention,
            [one.to(platform.device) for one in low],
            moved(mask, platform.device, dtype),
            grad.to(platform.device),
            **there,
        )
    # On a CPU it is PyTorch's own fused attention, whose error is up to 2.4 times that of the
    # formula written out.
    assert_as_good(ours, plain, exact, dtype, 3 if platform == Platform("cpu", "reference") else 2)


def some_points(batch: int, heads: int, n: int, tokens: int, d: int, width: int) -> list[Tensor]:
    """As a linear layer's output lies in memory, and of numbers that every dtype holds."""
    shapes = ((batch, n, d), (batch, tokens, d), (batch, tokens, width))
    return [
        (torch.randn(b, rows, heads, columns) * 16).round().double().transpose(1, 2) / 16
        for b, rows, columns in shapes
    ]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_agrees_with_the_specification(
    platform: Platform, case: tuple[int, int, int, int, torch.dtype], kind: str
) -> None:
    heads, n, tokens, d, dtype = case
    if not supported(platform, dtype, tokens, d):
        pytest.skip("not supported there")
    if INTERPRETED and d in (32, 80, 128) and tokens == 77:
        pytest.skip("the interpreter is slow")
    batch = 1 if INTERPRETED else 2
    mask = some_mask(kind, batch, heads, n, tokens)
    compare(platform, some_points(batch, heads, n, tokens, d, d), mask, dtype)


@pytest.mark.parametrize("kind", ["none", "bits", "multiplicative", "additive", "bias"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_segments(platform: Platform, dtype: torch.dtype, weighted: bool, kind: str) -> None:
    if not supported(platform, dtype):
        pytest.skip("not supported there")
    segments = [(0, 70), (70, 75), (10, 20)]
    options: dict[str, Any] = {"segments": segments}
    if weighted:
        options["segment_weights"] = torch.randint(0, 5, (1, 3, 37)).double() / 4
    points = some_points(2, 2, 37, 77, 32, 48)
    compare(platform, points, some_mask(kind, 2, 2, 37, 77), dtype, **options)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("kind", ["none", "bits", "bias"])
@pytest.mark.parametrize("platform", ALL)
def test_scales_that_are_not_positive(platform: Platform, kind: str, scale: float) -> None:
    points = some_points(1, 2, 33, 20, 16, 16)
    compare(platform, points, some_mask(kind, 1, 2, 33, 20), torch.float32, scale=scale)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_regions_of_any_integers(platform: Platform, dtype: torch.dtype) -> None:
    most = 40 if dtype == torch.int64 else 7
    pixels, tokens = (torch.randint(0, 1 << most, (1, rows)).to(dtype) for rows in (33, 20))
    mask = RegionMask(pixels, tokens & (1 << (most - 1) | 3))
    compare(platform, some_points(1, 2, 33, 20, 16, 16), mask, torch.float32)


@pytest.mark.parametrize("platform", ALL)
def test_bits_beyond_the_tokens_count_for_nothing(platform: Platform) -> None:
    mask = some_mask("bits", 1, 2, 33, 20)
    mask = TokenBits(mask.words | -(1 << 20))
    compare(platform, some_points(1, 2, 33, 20, 16, 16), mask, torch.float32)


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("platform", ALL)
def test_text_that_pictures_share(platform: Platform, shared: int) -> None:
    q, k, v = some_points(4, 2, 40, 20, 32, 32)
    mask = some_mask("bits", 4, 2, 40, 20)
    compare(platform, [q, k[:shared], v[:shared]], mask, torch.float32)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 20), (2, 3, 1, 20), (1, 3, 33, 20), (2, 1, 33, 1), (33, 20), (20,)], ids=str
)
@pytest.mark.parametrize("platform", ALL)
def test_an_added_mask_of_any_shape(platform: Platform, shape: tuple[int, ...]) -> None:
    bias = torch.randint(-8, 9, shape).double() / 4
    compare(platform, some_points(2, 3, 33, 20, 16, 16), bias, torch.float32, scale=0.3)


@pytest.mark.parametrize("platform", ALL)
def test_each_gradient_alone(platform: Platform) -> None:
    points = [one.float().to(platform.device) for one in some_points(1, 2, 40, 20, 16, 16)]
    mask = moved(some_mask("multiplicative", 1, 2, 40, 20), platform.device, torch.float32)
    grad = torch.randn(1, 2, 40, 16, device=platform.device)
    every = [*points, *leaves(mask)]
    with platform.forced():
        inputs = [one.detach().requires_grad_() for one in every]
        out = masked_cross_attention(*inputs[:3], GateMask(*inputs[3:]))
        wanted = torch.autograd.grad(out, inputs, grad)
        for number in range(len(every)):
            inputs = [one.detach().requires_grad_(i == number) for i, one in enumerate(every)]
            out = masked_cross_attention(*inputs[:3], GateMask(*inputs[3:]))
            out.backward(grad)
            assert [one.grad is not None for one in inputs] == [
                i == number for i in range(len(every))
            ]
            assert inputs[number].grad.equal(wanted[number])


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("platform", ALL)
def test_probabilities_of_tokens(platform: Platform, kind: str) -> None:
    points = [one.float().to(platform.device) for one in some_points(2, 3, 33, 20, 16, 16)]
    mask = moved(some_mask(kind, 2, 3, 33, 20), platform.device, torch.float32)
    tokens, segments = [3, 19, 3], [(0, 12), (12, 20)]
    q, k, v = (one.requires_grad_() for one in points)
    with platform.forced():
        out, found = masked_cross_attention(
            q, k, v, mask, segments=segments, return_token_probs=tokens
        )
        plain = masked_cross_attention(q, k, v, mask, segments=segments)
        slope = torch.autograd.grad(found.square().sum(), (q, k))
    assert out.equal(plain)
    assert found.shape == (2, 33, 3)
    chosen = torch.eye(20, device=q.device)[:, tokens].expand(2, 3, -1, -1)
    wanted = reference(q, k, chosen, mask, segments=segments).mean(1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    for ours, right in zip(slope, torch.autograd.grad(wanted.square().sum(), (q, k)), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_with_all_open_it_is_pytorchs_attention(platform: Platform, dtype: torch.dtype) -> None:
    q, k, v = (one.to(platform.device, dtype) for one in some_points(2, 2, 50, 77, 40, 40))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    every = torch.ones(1, 50, 77, dtype=torch.bool, device=q.device)
    with platform.forced():
        for mask in (None, TokenBits.from_bool(every)):
            found = masked_cross_attention(q, k, v, mask)
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("ste", ["multiplicative", "additive"])
def test_the_gradient_of_a_gate_is_what_its_definition_gives(ste: str) -> None:
    """By the formulas of the paper's published code, written out: a gate, straight through."""
    q, k, v = some_points(1, 2, 9, 6, 8, 8)
    mask = some_mask(ste, 1, 2, 9, 6)
    phi, psi, bias = (one.requires_grad_() for one in leaves(mask))
    grad = torch.randn(1, 2, 9, 8).double()
    out = masked_cross_attention(q, k, v, GateMask(phi, psi, bias, ste))
    ours = torch.autograd.grad(out, (phi, psi, bias), grad)

    p = torch.sigmoid(phi @ psi.mT / phi.shape[-1] ** 0.5 + bias)
    hard = (p > 0.5).double()
    hard = torch.where(
        hard.sum(-1, keepdim=True) == 0,
        torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).double(),
        hard,
    )
    gate = (hard - p.detach() + p)[:, None]
    s = q @ k.mT / q.shape[-1] ** 0.5
    if ste == "additive":
        weights = (s + (1 - gate) * -1e4).softmax(-1)
    else:
        weights = gate * s.exp()
        weights = weights / weights.sum(-1, keepdim=True)
    wanted = torch.autograd.grad(weights @ v, (phi, psi, bias), grad)
    for one, right in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("platform", ALL)
def test_a_closed_gate_far_above_the_open_ones_counts_up_to_a_bound(platform: Platform) -> None:
    q = torch.full((1, 1, 4, 16), 4.0)
    k = torch.zeros(1, 1, 3, 16)
    k[:, :, 2] = 4.0  # 64 above the others, and closed
    v = torch.arange(48.0).view(1, 1, 3, 16)
    phi, psi = torch.ones(1, 4, 4), torch.tensor([1.0, 1.0, -0.01])[None, :, None].expand(1, 3, 4)
    inputs = [one.to(platform.device) for one in (q, k, v)]
    gates = [one.to(platform.device).contiguous().requires_grad_() for one in (phi, psi)]
    with platform.forced():
        masked_cross_attention(*inputs, GateMask(*gates)).sum().backward()
    slope = gates[1].grad[0, 2].sum().cpu()
    p = torch.tensor(-0.02).sigmoid()
    outer, mean = v[0, 0].sum(-1), v[0, 0, :2].sum(-1).mean()
    # Four rows, each by sqrt(R) = 2 from each of the four features.
    wanted = 4 * 4 / 2 * math.exp(20) * (outer[2] - mean) * p * (1 - p)
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v = (one.requires_grad_() for one in some_points(1, 2, 5, 7, 4, 3))
    bias = (torch.randint(-4, 5, (1, 1, 5, 7)).double() / 4).requires_grad_()
    weights = torch.rand(1, 2, 5).double().requires_grad_()

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
        return masked_cross_attention(
            q, k, v, bias, segments=[(0, 4), (4, 7)], segment_weights=weights
        )

    assert torch.autograd.gradcheck(function, (q, k, v, bias, weights))
    bits = some_mask("bits", 1, 2, 5, 7)
    assert torch.autograd.gradcheck(lambda *a: masked_cross_attention(*a, bits), (q, k, v))
    assert torch.autograd.gradcheck(lambda *a: reference(*a, bits), (q, k, v))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("platform", PLAIN)
def test_opcheck(platform: Platform, kind: str) -> None:
    points = [one.float().to(platform.device) for one in some_points(2, 2, 9, 7, 4, 3)]
    mask = moved(some_mask(kind, 2, 2, 9, 7), platform.device, torch.float32)
    stated = sdcore.ops.masked_cross_attention.__globals__["_stated"](mask, points[0], 7)
    inputs = [one.requires_grad_() for one in points]
    ste = mask.ste if isinstance(mask, GateMask) else ""
    with platform.forced():
        torch.library.opcheck(
            torch.ops.sdcore.masked_cross_attention.default,
            (*inputs, *stated, None, 0.5, [0, 4, 4, 7], ste),
        )


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("platform", PLAIN)
def test_compiles_as_one_graph(platform: Platform, kind: str) -> None:
    points = [one.float().to(platform.device) for one in some_points(2, 2, 9, 7, 4, 4)]
    mask = moved(some_mask(kind, 2, 2, 9, 7), platform.device, torch.float32)
    q, k, v = (one.requires_grad_() for one in points)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, probs = masked_cross_attention(q, k, v, mask, return_token_probs=[1, 2])
        return out.sum() + probs.square().sum()

    with platform.forced():
        wanted = torch.autograd.grad(function(q, k, v), (q, k, v))
        compiled = torch.compile(function, fullgraph=True)
        found = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for ours, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("platform", ALL)
def test_nan_stays_in_its_row(platform: Platform) -> None:
    q, k, v = (one.float().to(platform.device) for one in some_points(1, 2, 40, 20, 16, 16))
    mask = moved(some_mask("bits", 1, 2, 40, 20), platform.device, torch.float32)
    with platform.forced():
        before = masked_cross_attention(q, k, v, mask)
        q[0, 1, 5] = math.nan
        after = masked_cross_attention(q, k, v, mask)
    assert after[0, 1, 5].isnan().all()
    before[0, 1, 5] = after[0, 1, 5] = 0
    assert after.equal(before)


@pytest.mark.parametrize("platform", ALL)
def test_strided_and_empty_inputs(platform: Platform) -> None:
    q, k, v = (one.float().to(platform.device) for one in some_points(2, 2, 20, 10, 16, 16))
    fused = torch.randn(2, 20, 3 * 32, device=platform.device)
    cut = fused[..., 32:64].unflatten(-1, (2, 16)).transpose(1, 2)
    with platform.forced():
        wanted = masked_cross_attention(cut.contiguous(), k.contiguous(), v)
        torch.testing.assert_close(masked_cross_attention(cut, k, v), wanted)
        turned = cut.mT.contiguous().mT  # coordinates that do not lie next to each other
        torch.testing.assert_close(masked_cross_attention(turned, k, v), wanted)
        empty = q[:, :, :0].requires_grad_()
        masked_cross_attention(empty, k, v).sum().backward()
        assert masked_cross_attention(empty, k, v).shape == (2, 2, 0, 16)
        assert masked_cross_attention(q[:0], k[:0], v[:0]).shape == (0, 2, 20, 16)
        # No pixels: the words' features have a gradient, and it is zero.
        psi = torch.ones(2, 10, 4, device=platform.device, requires_grad=True)
        gate = GateMask(torch.ones(2, 0, 4, device=platform.device), psi)
        masked_cross_attention(empty, k, v, gate).sum().backward()
        assert psi.grad is not None and not psi.grad.any()


@pytest.mark.parametrize("platform", ALL)
def test_heads_of_any_width_in_rows_of_another(platform: Platform) -> None:
    """Of which q's begin at multiples of 16 bytes, and its gradient's do not."""
    points = some_points(1, 2, 20, 10, 24, 24)
    padded = [one.to(platform.device).float()[..., :20] for one in points]
    inputs = [one.detach().requires_grad_() for one in padded]
    plain = [one.detach().clone().requires_grad_() for one in padded]
    with platform.forced():
        masked_cross_attention(*inputs).square().sum().backward()
    reference(*plain).square().sum().backward()
    for one, other in zip(inputs, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("platform", PLAIN)
def test_autocast(platform: Platform) -> None:
    q, k, v = (one.float().to(platform.device) for one in some_points(1, 2, 20, 10, 16, 16))
    mask = moved(some_mask("multiplicative", 1, 2, 20, 10), platform.device, torch.float32)
    with platform.forced(), torch.autocast(platform.device, torch.bfloat16):
        found = masked_cross_attention(q, k.bfloat16(), v, mask)
    low = moved(mask, platform.device, torch.bfloat16)
    with platform.forced():
        wanted = masked_cross_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), low)
    assert found.dtype == torch.bfloat16 and found.equal(wanted)


def test_a_second_derivative_raises() -> None:
    q, k, v = (one.requires_grad_() for one in some_points(1, 1, 4, 3, 4, 4))
    (slope,) = torch.autograd.grad(
        masked_cross_attention(q, k, v).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        slope.sum().backward()


def arguments(**changes: Any) -> tuple[list[Any], dict[str, Any]]:
    q, k, v = (one.float() for one in some_points(2, 2, 6, 7, 4, 4))
    found: dict[str, Any] = {"q": q, "k": k, "v": v, "mask": None} | changes
    return [found.pop(name) for name in ("q", "k", "v", "mask")], found


BAD = {
    "q must be a tensor": {"q": [1.0]},
    "k must have four axes": {"k": torch.zeros(2, 7, 4)},
    "v must have one dtype": {"v": torch.zeros(2, 2, 7, 4).double()},
    "q must have 1 to 256 coordinates; got 300": {
        "q": torch.zeros(2, 2, 6, 300),
        "k": torch.zeros(2, 2, 7, 300),
    },
    "k and v must have one batch": {"v": torch.zeros(2, 2, 8, 4)},
    "as many heads and coordinates": {
        "k": torch.zeros(2, 3, 7, 4),
        "v": torch.zeros(2, 3, 7, 4),
    },
    "must divide that of q": {"k": torch.zeros(3, 2, 7, 4), "v": torch.zeros(3, 2, 7, 4)},
    "TokenBits.from_bool": {"mask": torch.ones(2, 6, 7, dtype=torch.bool)},
    "must hold floats": {"mask": torch.ones(7, dtype=torch.int32)},
    "must be broadcastable": {"mask": torch.zeros(2, 2, 5, 7)},
    "mask must be TokenBits": {"mask": "left"},
    "mask.words must be": {"mask": TokenBits(torch.zeros(2, 6, 2, dtype=torch.int32))},
    "mask.pixels must be": {"mask": RegionMask(torch.zeros(2, 5).int(), torch.zeros(2, 7).int())},
    "mask.tokens must be": {"mask": RegionMask(torch.zeros(2, 6).int(), torch.zeros(2, 8).int())},
    "mask.psi must be": {"mask": GateMask(torch.zeros(2, 6, 3), torch.zeros(3, 7, 3))},
    "mask.phi must have the dtype": {
        "mask": GateMask(torch.zeros(2, 6, 3).half(), torch.zeros(2, 7, 3).half())
    },
    "are for segments": {"segment_weights": torch.ones(1, 1, 6)},
    "ranges .start, end. within the 7 tokens": {"segments": [(0, 8)]},
    "one range of tokens at least": {"segments": []},
    "segment_weights must be .2 or 1, 1, 6.": {
        "segments": [(0, 7)],
        "segment_weights": torch.ones(2, 2, 6),
    },
    "tokens from 0 to 6": {"return_token_probs": [7]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message: str) -> None:
    positional, options = arguments(**BAD[message])
    with pytest.raises((TypeError, ValueError), match=message):
        masked_cross_attention(*positional, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MASKS)
def test_nothing_waits_and_graphs_replay(kind: str) -> None:
    points = [one.to("cuda", torch.bfloat16) for one in some_points(2, 4, 256, 77, 64, 64)]
    mask = moved(some_mask(kind, 2, 4, 256, 77), "cuda", torch.bfloat16)
    grad = torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16)
    inputs = [one.detach().requires_grad_() for one in (*points, *leaves(mask))]

    def function() -> list[Tensor]:
        if isinstance(mask, GateMask):
            here: Any = GateMask(*inputs[3:], mask.ste)
        else:
            here = inputs[3] if kind == "bias" else mask
        out = masked_cross_attention(*inputs[:3], here)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    with sdcore.backend("triton"):
        assert_replays(function)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bits", "regions", "multiplicative"])
def test_nothing_as_large_as_pixels_times_tokens_is_in_memory(kind: str) -> None:
    n = 16384
    points = [one.to("cuda", torch.bfloat16) for one in some_points(1, 2, n, 77, 64, 64)]
    mask = moved(some_mask(kind, 1, 2, n, 77), "cuda", torch.bfloat16)
    inputs = [one.detach().requires_grad_() for one in (*points, *leaves(mask))]
    here = GateMask(*inputs[3:]) if isinstance(mask, GateMask) else mask
    grad = torch.randn(1, 2, n, 64, device="cuda", dtype=torch.bfloat16)
    with sdcore.backend("triton"):
        for _ in range(2):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            out = masked_cross_attention(*inputs[:3], here)
            forward = torch.cuda.max_memory_allocated() - before
            torch.autograd.grad(out, inputs, grad)
            both = torch.cuda.max_memory_allocated() - before
    bits, row = n * 12, 2 * n * 64 * 2
    assert forward <= row + bits + 2**20
    # Gradients, and the sums that programs leave of those to the text: at most 20 MiB.
    features = 2 * n * 33 * 2 if kind == "multiplicative" else 0
    assert both <= 3 * row + bits + features + 20 * 2**20


@pytest.mark.sanitize
@pytest.mark.gpu
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("tokens", [5, 77])
def test_small_shapes(kind: str, tokens: int) -> None:
    mask = some_mask(kind, 2, 2, 35, tokens)
    compare(Platform("cuda", "triton"), some_points(2, 2, 35, tokens, 40, 40), mask, torch.float16)
