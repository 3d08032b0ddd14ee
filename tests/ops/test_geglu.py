from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sdcore
from sdcore.ops import geglu
from sdcore.ops.geglu import reference
from tests.platforms import Platform, assert_as_good, assert_replays, platforms

ALL = platforms("reference", "triton")
PLAIN = platforms("reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # PyTorch's own vectors and what is left over differ by a bit


def some(*shape: int, seed: int = 0) -> Tensor:
    """In float64, of both tails of the normal distribution, too."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


def leaf(x: Tensor, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return x.to(device, dtype).detach().requires_grad_()


def agrees(platform: Platform, x: Tensor, dtype: torch.dtype) -> None:
    """Value and gradient, with plain PyTorch's and with those of float64."""
    x = x.to(dtype).double()
    ours, plain, exact = leaf(x, dtype, platform.device), leaf(x, dtype), leaf(x, torch.float64)
    values = reference(plain), reference(exact)
    grad = torch.randn(values[1].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with platform.forced():
        found = geglu(ours)
        (to_ours,) = torch.autograd.grad(found, ours, grad.to(found.device))
    assert found.shape == values[1].shape and found.is_contiguous()
    assert to_ours.shape == x.shape and to_ours.is_contiguous()
    assert_as_good(found, *values, dtype)
    (to_plain,) = torch.autograd.grad(values[0], plain, grad)
    (to_exact,) = torch.autograd.grad(values[1], exact, grad.double())
    assert_as_good(to_ours, to_plain, to_exact, dtype)


SHAPES = [
    (2, 9, 2 * 640),
    (3, 2 * 513),  # a tile, and one value more
    (7, 2 * 5),  # several rows in one tile
    (1030, 2),
    (2, 3, 5, 2 * 7),
    (1, 1, 2),
    (34,),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_agrees_with_the_specification(
    platform: Platform, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if platform.backend == "triton" and dtype == torch.float64:
        pytest.skip("not supported there")
    agrees(platform, some(*shape), dtype)


def test_is_that_of_diffusers() -> None:
    activations = pytest.importorskip("diffusers.models.activations")
    layer, x = activations.GEGLU(8, 20).double(), some(3, 8)
    torch.testing.assert_close(geglu(layer.proj(x)), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("platform", ALL)
def test_far_from_zero(platform: Platform) -> None:
    """Where gelu is its input, or zero, and its slope one or zero."""
    gates = torch.tensor([-1e4, -20.0, 0.0, 20.0, 1e4], device=platform.device)
    x = torch.cat([torch.full_like(gates, 3.0), gates]).requires_grad_()
    with platform.forced():
        y = geglu(x)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.tolist() == [0, 0, 0, 60, 3e4]
    assert grad.tolist() == [0, 0, 0, 20, 1e4, 0, 0, 1.5, 3, 3]


@pytest.mark.parametrize("platform", ALL)
def test_half_types_are_rounded_once(platform: Platform) -> None:
    x = some(40, 60).half()
    wanted = reference(x.float()).half()
    with platform.forced():
        found = geglu(x.to(platform.device)).cpu()
    off = (found.float() - wanted.float()).abs()
    # Float32 itself is rounded, and may fall on the other side of a half.
    assert (off > 0).double().mean() < 1e-2
    # And where a gate is far below zero, 1 + erf has few of its digits left.
    half, values, gates = torch.finfo(torch.half), *x.float().chunk(2, -1)
    allowed = 2 * half.eps * wanted.float().abs().clamp(min=half.smallest_normal)
    lost = 4 * torch.finfo(torch.float).eps * (values * gates).abs()
    assert (off <= allowed + lost).all()


@pytest.mark.parametrize("platform", ALL)
def test_rows_of_any_strides(platform: Platform) -> None:
    x = some(4, 6, 3, 20).to(platform.device, torch.float32)
    wide = torch.full((4, 8, 3, 30), math.nan, device=platform.device)
    wide[:, 1:7, :, 5:25] = x
    spread = torch.full((4, 6, 3, 40), math.nan, device=platform.device)
    spread[..., ::2] = x
    laid = {
        "cut": wide[:, 1:7, :, 5:25],
        "every second": x.repeat_interleave(2, 2)[:, :, ::2],
        "turned": x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "in three steps": x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
        "gaps in rows": spread[..., ::2],
        "rows across": x.mT.contiguous().mT,
    }
    grad = some(4, 6, 3, 10, seed=1).to(x)
    with platform.forced():
        wanted = geglu(x)
        (to_x,) = torch.autograd.grad(geglu(x.requires_grad_()), x, grad)
        for name, one in laid.items():
            assert one.equal(x), name
            one = one.detach().requires_grad_()
            found = geglu(one)
            assert found.is_contiguous(), name
            torch.testing.assert_close(found, wanted, **CLOSE)
            for of_out in (grad, grad.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)):
                (to_one,) = torch.autograd.grad(geglu(one), one, of_out)
                torch.testing.assert_close(to_one, to_x, **CLOSE)
        # A sum's gradient is one number, seen everywhere.
        (found,) = torch.autograd.grad(geglu(x).sum(), x)
        (wanted,) = torch.autograd.grad(geglu(x), x, torch.ones_like(grad))
        torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("platform", ALL)
def test_one_row_for_all(platform: Platform) -> None:
    row = some(1, 20).to(platform.device, torch.float32)
    with platform.forced():
        wanted = geglu(row).expand(5, 10)
        torch.testing.assert_close(geglu(row.expand(5, 20)), wanted, **CLOSE)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 6), (0,)], ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_nothing_there(platform: Platform, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=platform.device).requires_grad_()
    with platform.forced():
        y = geglu(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == (*shape[:-1], shape[-1] // 2)
    assert grad.shape == shape


@pytest.mark.parametrize("platform", ALL)
def test_nan_stays_where_it_is(platform: Platform) -> None:
    x = some(3, 20).to(platform.device, torch.float32)
    x[0, 4] = x[1, 15] = math.nan
    x.requires_grad_()
    with platform.forced():
        y = geglu(x)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.isnan().nonzero().tolist() == [[0, 4], [1, 5]]
    # A value's own slope is that of the gate alone.
    assert grad.isnan().nonzero().tolist() == [[0, 14], [1, 5], [1, 15]]


@pytest.mark.parametrize("platform", ALL)
def test_repeats_bit_for_bit(platform: Platform) -> None:
    x = leaf(some(5, 2 * 700), torch.float32, platform.device)
    with platform.forced():
        found = [(y := geglu(x), *torch.autograd.grad(y.sum(), x)) for _ in range(2)]
    for a, b in zip(*found, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("platform", PLAIN)
def test_gradcheck(platform: Platform) -> None:
    x = leaf(some(2, 3, 8), torch.float64, platform.device)
    with platform.forced():
        assert torch.autograd.gradcheck(geglu, x)


@pytest.mark.parametrize("platform", ALL)
def test_a_second_derivative_raises(platform: Platform) -> None:
    x = leaf(some(3, 8), torch.float32, platform.device)
    with platform.forced():
        (grad,) = torch.autograd.grad(geglu(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize("platform", PLAIN)
def test_opcheck(platform: Platform) -> None:
    x = leaf(some(2, 6, 8), torch.float32, platform.device)
    with platform.forced():
        for one in (x, x[:, 1:4], x.transpose(0, 1)):
            torch.library.opcheck(torch.ops.sdcore.geglu.default, (one.detach().requires_grad_(),))
        args = torch.ones_like(x[..., :4]).detach(), x.detach()
        torch.library.opcheck(torch.ops.sdcore.geglu_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("platform", PLAIN + platforms("triton")[1:])
def test_compiles_without_a_break(platform: Platform, dynamic: bool) -> None:
    def call(x: Tensor) -> Tensor:
        return geglu(2 * x) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5):
        x = leaf(some(rows, 20), torch.float32, platform.device)
        with platform.forced():
            wanted, found = call(x), compiled(x)
            grads = [torch.autograd.grad(one.square().sum(), x)[0] for one in (wanted, found)]
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ALL)
def test_under_autocast(platform: Platform) -> None:
    """It is of x's dtype there as well, as PyTorch's own operations are."""
    for dtype in (torch.float32, torch.float16):
        x = leaf(some(3, 20), dtype, platform.device)
        with platform.forced():
            wanted = geglu(x)
            with torch.autocast(platform.device, torch.bfloat16):
                found = geglu(x)
        assert found.dtype == dtype and found.equal(wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_nothing_waits_and_graphs_replay(dtype: torch.dtype) -> None:
    x = leaf(some(2, 500, 2 * 1280), dtype, "cuda")

    def call() -> list[Tensor]:
        y = geglu(x)
        return [y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))]

    assert_replays(call)


@pytest.mark.gpu
def test_one_launch_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests have empty memory filled, in a launch of its own.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x = leaf(some(2, 500, 2 * 1280), torch.bfloat16, "cuda")
    grad = torch.ones(2, 500, 1280, device="cuda", dtype=torch.bfloat16)
    torch.autograd.grad(geglu(x), x, grad)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(geglu(x), x, grad)
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    names = [one.name for one in profile.events() if one.device_type == cuda]
    assert names == ["_geglu", "_geglu_backward"]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2**20 + 2, 2**11), (1, 2**31 + 2**12)], ids=str)
def test_more_than_fits_32_bits(shape: tuple[int, int]) -> None:
    """Of 2^31 values and more, the last ones of the last row, against these alone."""
    x = torch.randn(shape, device="cuda", dtype=torch.float16).requires_grad_()
    y = geglu(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))

    def last(whole: Tensor) -> Tensor:
        return torch.cat([one[-1, -1000:] for one in whole.detach().chunk(2, -1)])

    part = last(x).requires_grad_()
    wanted = geglu(part)
    assert y[-1, -1000:].equal(wanted)
    assert last(grad).equal(torch.autograd.grad(wanted, part, torch.ones_like(wanted))[0])


X = torch.zeros(2, 8)
BAD = [
    (3, TypeError, "x must be a tensor; got int"),
    (torch.tensor(1.0), ValueError, r"x must be \[..., 2n\]; got a tensor without axes"),
    (X.int(), ValueError, "x must be of float16.*got torch.int32"),
    (X[:, :7], ValueError, r"x must be \[..., 2n\], of an even last size; got \[2, 7\]"),
]


@pytest.mark.parametrize(("x", "error", "message"), BAD, ids=[b[-1] for b in BAD])
def test_bad_input(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        geglu(x)


@pytest.mark.parametrize("platform", platforms("triton"))
def test_float64_is_refused_by_name(platform: Platform) -> None:
    x = X.double().to(platform.device)
    with platform.forced(), pytest.raises(sdcore.backends.BackendError, match="no float64"):
        geglu(x)
