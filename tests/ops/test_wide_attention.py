from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from sdcore.ops import wide_attention
from sdcore.ops.wide_attention import reference
from tests.platforms import Platform, assert_as_good, assert_replays, platforms

ALL = platforms("reference", "triton")
PLAIN = platforms("reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
op = sys.modules["sdcore.ops.wide_attention"]


def some(n: int, tokens: int, d: int, e: int, batch: tuple[int, ...] = (2,)) -> list[Tensor]:
    """q, k and v in float64, with scores of some units."""
    generator = torch.Generator().manual_seed(n)
    sizes = (n, d), (tokens, d), (tokens, e)
    return [
        torch.randn(*batch, *size, generator=generator, dtype=torch.float64) * (1.5 if i < 2 else 1)
        for i, size in enumerate(sizes)
    ]


def leaves(given: list[Tensor], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    return [one.to(device, dtype).detach().requires_grad_() for one in given]


def agrees(
    platform: Platform, given: list[Tensor], dtype: torch.dtype, scale: float | None = None
) -> None:
    given = [one.to(dtype).double() for one in given]
    factor = given[0].shape[-1] ** -0.5 if scale is None else scale
    low, same, high = (
        leaves(given, dtype, platform.device),
        leaves(given, dtype),
        leaves(given, torch.float64),
    )
    with platform.forced():
        out = wide_attention(*low, scale=scale)
    wanted = [reference(*inputs, factor) for inputs in (same, high)]
    assert out.dtype == dtype
    slack = 4 if dtype == torch.float64 else 1  # sums of products, in another order
    assert_as_good(out, *wanted, dtype, slack)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with platform.forced():
        ours = torch.autograd.grad(out, low, grad.to(out.device))
    plain = torch.autograd.grad(wanted[0], same, grad)
    exact = torch.autograd.grad(wanted[1], high, grad.double())
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_as_good(a, b, c, dtype, slack)


def supported(platform: Platform, dtype: torch.dtype) -> bool:
    if platform.backend != "triton":
        return True
    # The interpreter multiplies matrices of bfloat16 wrongly.
    return dtype != torch.float64 and (dtype != torch.bfloat16 or platform.device == "cuda")


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_agrees_with_the_specification(
    platform: Platform, dtype: torch.dtype, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not supported(platform, dtype):
        pytest.skip("not supported there")
    if blocks > 1:  # nothing is kept then, and all is computed in parts
        monkeypatch.setattr(op, "MOST", 2 * 128 * 150)
    agrees(platform, some(300 if blocks > 1 else 150, 150, 72, 40), dtype)


SHAPES = [
    ((1, 2, 1, 1), (64,)),  # the rule of errors is one of many numbers
    ((5, 130, 8, 3), (1,)),
    ((129, 2, 33, 16), (3,)),
    ((20, 30, 16, 16), (2, 3)),
    ((7, 9, 4, 4), ()),
]


@pytest.mark.parametrize(("sizes", "batch"), SHAPES, ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_shapes(platform: Platform, sizes: tuple[int, ...], batch: tuple[int, ...]) -> None:
    agrees(platform, some(*sizes, batch), torch.float32, scale=0.3)


@pytest.mark.parametrize("platform", ALL)
def test_one_token_takes_all(platform: Platform) -> None:
    q, k, v = leaves(some(5, 1, 8, 3), torch.float32, platform.device)
    with platform.forced():
        out = wide_attention(q, k, v)
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert torch.equal(out, v.expand_as(out))
    for grad, wanted in zip(grads, (0.0, 0.0, 5.0), strict=True):
        torch.testing.assert_close(grad, torch.full_like(grad, wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("platform", ALL)
def test_scores_of_any_size(platform: Platform) -> None:
    """Far beyond what an exponential can hold: those of one row differ by thousands."""
    q, k, v = (one.float() for one in some(40, 300, 16, 8))
    given = [30 * q, 30 * k, v]
    agrees(platform, given, torch.float32)
    low = leaves(given, torch.float32, platform.device)
    with platform.forced():
        assert wide_attention(*low).isfinite().all()


@pytest.mark.parametrize("platform", ALL)
def test_strides(platform: Platform) -> None:
    """As a decoder has them, [batch, width, tokens]; and no copy of what is cut out."""
    given = some(30, 40, 16, 16)
    low = [one.to(platform.device, torch.float32) for one in given]
    turned = [one.mT.contiguous().mT for one in low]
    wide = [torch.nn.functional.pad(one, (3, 5))[..., 3:-5] for one in low]
    with platform.forced():
        wanted = wide_attention(*low)
        for others in (turned, wide):
            torch.testing.assert_close(wide_attention(*others), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ALL)
def test_nothing_there(platform: Platform) -> None:
    for n, batch in ((0, 2), (3, 0)):
        given = leaves(some(n, 4, 8, 5, (batch,)), torch.float32, platform.device)
        with platform.forced():
            out = wide_attention(*given)
            grads = torch.autograd.grad(out.sum(), given)
        assert out.shape == (batch, n, 5)
        for one, grad in zip(given, grads, strict=True):
            assert torch.equal(grad, torch.zeros_like(one))


@pytest.mark.parametrize("platform", PLAIN)
def test_gradcheck(platform: Platform) -> None:
    given = leaves(some(3, 4, 5, 2), torch.float64, platform.device)
    with platform.forced():
        assert torch.autograd.gradcheck(wide_attention, given)


@pytest.mark.parametrize("platform", ALL)
def test_a_second_derivative_raises(platform: Platform) -> None:
    given = leaves(some(3, 4, 5, 2), torch.float32, platform.device)
    with platform.forced():
        (grad,) = torch.autograd.grad(wide_attention(*given).sum(), given[0], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize("platform", PLAIN)
def test_opcheck(platform: Platform) -> None:
    given = leaves(some(3, 4, 5, 2), torch.float32, platform.device)
    with platform.forced():
        for kept in (True, False):
            torch.library.opcheck(torch.ops.sdcore.wide_attention.default, (*given, 0.4, kept))


@pytest.mark.parametrize("platform", PLAIN + platforms("triton")[1:])
def test_compiles_without_a_break(platform: Platform) -> None:
    given = leaves(some(30, 40, 16, 8), torch.float32, platform.device)
    with platform.forced():
        wanted = torch.autograd.grad(wide_attention(*given).square().sum(), given)
        compiled = torch.compile(wide_attention, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*given).square().sum(), given)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ALL)
def test_under_autocast(platform: Platform) -> None:
    """Inputs are cast, and nothing in between, where scores are of float32."""
    dtype = torch.float16 if platform.backend == "triton" else torch.bfloat16
    given = leaves(some(30, 40, 16, 8), torch.float32, platform.device)
    with platform.forced():
        low = [one.to(dtype) for one in given]
        wanted = wide_attention(*low)
        grads = torch.autograd.grad(wanted, given, torch.ones_like(wanted))
        with torch.autocast(platform.device, dtype):
            found = wide_attention(*given)
            again = torch.autograd.grad(found, given, torch.ones_like(found))
    assert torch.equal(found, wanted)
    for a, b in zip(again, grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("platform", ALL)
def test_without_a_gradient_nothing_is_kept(platform: Platform) -> None:
    given = leaves(some(30, 40, 16, 8), torch.float32, platform.device)
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with platform.forced(), torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        wide_attention(*given)
        assert (2, 30, 40) in kept
        kept.clear()
        with torch.no_grad():
            wide_attention(*given)
        wide_attention(*(one.detach() for one in given))
    assert not kept


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [9216, 65536])
def test_memory_is_bounded(tokens: int) -> None:
    q, k, v = (
        torch.randn(1, tokens, 512, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    wide_attention(q, k, v).sum().backward()
    # Probabilities, the gradient to scores, and the sums that are kept wide.
    most = 2 * 2 * op.MOST + 16 * q.numel() * 4
    assert torch.cuda.max_memory_allocated() - before < most


@pytest.mark.gpu
def test_nothing_waits_and_graphs_replay() -> None:
    given = leaves(some(1000, 1100, 512, 512), torch.bfloat16, "cuda")

    def call() -> list[Tensor]:
        out = wide_attention(*given)
        return [out.detach(), *torch.autograd.grad(out, given, torch.ones_like(out))]

    assert_replays(call)


X = torch.zeros(2, 4, 8)
BAD = [
    ((3, X, X), TypeError, "q must be a tensor; got int"),
    ((X, X, None), TypeError, "v must be a tensor; got NoneType"),
    ((X[0, 0], X, X), ValueError, r"q must be \[..., tokens, width\]; got \[8\]"),
    ((X.int(), X, X), ValueError, "q must be of float16, .* got torch.int32"),
    ((X, X.half(), X), ValueError, "k must be of q's torch.float32; got torch.float16"),
    ((X, X.to("meta"), X), ValueError, "k must be on q's device, cpu; got meta"),
    ((X, X[:1], X), ValueError, r"k must be .* as q is \[2, 4, 8\]; got \[1, 4, 8\]"),
    ((X, X[..., :4], X), ValueError, r"k must be .* as q is \[2, 4, 8\]; got \[2, 4, 4\]"),
    ((X, X, X[:, :3]), ValueError, r"v must be .* as k is \[2, 4, 8\]; got \[2, 3, 8\]"),
    ((X, X[:, :0], X[:, :0]), ValueError, r"k must have tokens, and a width; got \[2, 0, 8\]"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD, ids=[b[-1] for b in BAD])
def test_bad_input(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wide_attention(*args)
