from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sdcore
from sdcore.ops import group_norm_silu
from sdcore.ops.group_norm_silu import reference
from tests.platforms import Platform, assert_as_good, assert_replays, platforms

ALL = platforms("reference", "cpp", "triton")
PLAIN = platforms("reference", "cpp")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = ("x", "weight", "bias", "shift", "residual")
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def some(
    shape: tuple[int, ...], names: str = "x weight bias shift residual", seed: int = 0
) -> dict[str, Tensor]:
    """In float64."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels = shape[:2]
    shapes = {"weight": (channels,), "bias": (channels,), "shift": (batch, channels)}
    found = {}
    for name in names.split():
        size = shapes.get(name, shape)
        found[name] = torch.randn(size, generator=generator, dtype=torch.float64)
    found["x"] = 1.5 * found["x"] - 0.5
    return found


def cast(
    given: dict[str, Tensor],
    dtype: torch.dtype,
    device: str = "cpu",
    last: bool = False,
    vectors: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Leaves; weight, bias and shift of ``vectors``."""
    found = {}
    for name, one in given.items():
        whole = name in ("x", "residual")
        one = one.to(device, dtype if whole else vectors or dtype)
        if last and whole:
            one = one.contiguous(memory_format=FORMATS[one.ndim])
        found[name] = one.detach().requires_grad_()
    return found


def agrees(
    platform: Platform,
    given: dict[str, Tensor],
    groups: int,
    dtype: torch.dtype,
    silu: bool = True,
    last: bool = False,
    wrt: tuple[str, ...] = NAMES,
) -> None:
    """Values and gradients, with plain PyTorch's and with those of float64."""
    # The interpreter adds up thousands of values one by one, a GPU in pairs.
    slack = 4 if (platform.backend, platform.device) == ("triton", "cpu") else 1
    given = {name: one.to(dtype).double() for name, one in given.items()}
    exact_in, plain_in = cast(given, torch.float64), cast(given, dtype)
    ours_in = cast(given, dtype, platform.device, last)

    def specified(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        weight = leaves.get("weight")
        if weight is None and "bias" in leaves:  # PyTorch can't differentiate a bias alone
            weight = torch.ones_like(leaves["bias"])
        y, s = reference(
            leaves["x"], groups, weight, leaves.get("bias"), 1e-5, silu,
            leaves.get("shift"), leaves.get("residual"),
        )  # fmt: skip
        return (y, s) if "residual" in leaves else (y,)

    with platform.forced():
        ours = group_norm_silu(num_groups=groups, silu=silu, **ours_in)
    ours = ours if isinstance(ours, tuple) else (ours,)
    exact, plain = specified(exact_in), specified(plain_in)
    if "residual" in given:  # what was rounded is what is normalized
        assert_as_good(ours[1], plain[1], exact[1], dtype, slack)
        exact, plain = (from_sum(leaves, ours[1], specified) for leaves in (exact_in, plain_in))
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.shape == ours_in["x"].shape
        assert a.stride() == ours_in["x"].stride()
        assert_as_good(a, b, c, dtype, slack)
    generator = torch.Generator().manual_seed(9)
    grads = [torch.randn(one.shape, generator=generator).to(dtype) for one in exact]
    names = [name for name in given if name in wrt]
    found = []
    for values, leaves in ((ours, ours_in), (plain, plain_in), (exact, exact_in)):
        like = values[0]
        cotangents = [one.to(like.device, like.dtype) for one in grads]
        with platform.forced():
            found.append(
                torch.autograd.grad(
                    values, [leaves[name] for name in names], cotangents, allow_unused=True
                )
            )
    if "residual" in given:
        found[1:] = [of_parts(names, grads, given) for grads in found[1:]]
    for a, b, c in zip(*found, strict=True):
        assert_as_good(a, b, c, dtype, slack)


def from_sum(
    leaves: dict[str, Tensor], total: Tensor, specified: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor, Tensor]:
    """y and s of the sum as it was rounded, which takes the place of x among the leaves."""
    leaves["x"] = total.detach().to(leaves["x"]).contiguous().requires_grad_()
    y = specified({name: leaves[name] for name in leaves if name not in ("residual", "shift")})[0]
    return y, leaves["x"].clone()


def of_parts(
    names: list[str], grads: tuple[Tensor, ...], given: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """Gradients to all parts of the sum, from that to the sum, which stands at x."""
    found = dict(zip(names, grads, strict=True))
    found["residual"] = of_sum = found["x"]
    if "shift" in found:
        channels = of_sum.reshape(*of_sum.shape[:2], -1)
        found["shift"] = channels.sum(2, dtype=torch.promote_types(of_sum.dtype, torch.float32))
        found["shift"] = found["shift"].to(of_sum.dtype)
    return tuple(found[name] for name in names)


def supported(platform: Platform, dtype: torch.dtype) -> bool:
    return platform.backend != "triton" or dtype != torch.float64


@pytest.fixture(params=["whole", "parts"])
def split(request: pytest.FixtureRequest, platform: Platform, monkeypatch: Any) -> None:
    """Triton has a launch for whole groups, if they are small, and three for parts of them."""
    if request.param == "parts":
        if platform.backend != "triton":
            pytest.skip("there is one way")
        monkeypatch.setattr("sdcore.triton_kernels.group_norm_silu.WHOLE", 0)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "norm"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_agrees_with_the_specification(
    platform: Platform, dtype: torch.dtype, last: bool, silu: bool
) -> None:
    if not supported(platform, dtype):
        pytest.skip("not supported there")
    for number, names in enumerate(
        ("x weight bias shift residual", "x weight bias", "x bias shift", "x weight residual", "x")
    ):
        given = some((2, 12, 7, 9), names, number)
        agrees(platform, given, (3, 1, 6, 4, 6)[number], dtype, silu, last)


SHAPES = [
    ((1, 96, 40, 33), 32),  # several parts of pixels
    ((3, 10, 1, 1), 2),
    ((3, 4, 1, 1), 4),  # each is its own mean
    ((2, 6, 1, 5), 6),
    ((1, 130, 9, 3), 13),  # groups of no power of two, over tiles of channels
    ((2, 4, 3, 2, 5), 2),
    ((2, 8, 70), 4),
    ((4, 12), 3),
    ((1, 4, 83, 101), 1),
    ((1, 80, 11, 17), 2),  # groups of several tiles, and not all of the last
    ((1, 1026, 3), 1),  # more channels than a whole group may have
]


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_shapes(platform: Platform, shape: tuple[int, ...], groups: int, last: bool) -> None:
    if last and len(shape) not in FORMATS:
        pytest.skip("no such format")
    agrees(platform, some(shape), groups, torch.float32, last=last)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_a_mean_far_from_zero(platform: Platform, dtype: torch.dtype, last: bool) -> None:
    """A mean of a hundred, deviations of a hundredth. PyTorch takes a mean of float32, whose last
    digit is a thousandth of the deviations; here nothing is lost."""
    given = some((2, 16, 40, 40), "x")
    given["x"] = (100 + 0.01 * given["x"]).to(dtype).double()
    agrees(platform, given, 4, dtype, last=last)
    leaves = cast(given, dtype, platform.device, last)
    exact = reference(given["x"], 4)[0]
    with platform.forced():
        off = group_norm_silu(leaves["x"], 4).cpu().double() - exact
    assert off.norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("platform", ALL)
def test_weights_of_float32(platform: Platform) -> None:
    given = some((2, 12, 5, 7))
    low = cast(given, torch.bfloat16, platform.device, vectors=torch.float32)
    with platform.forced():
        y, s = group_norm_silu(num_groups=3, **low)
        grads = torch.autograd.grad((y, s), list(low.values()), (y.detach(), s.detach()))
    assert {one.dtype for one in (y, s)} == {torch.bfloat16}
    for one, grad in zip(low.values(), grads, strict=True):
        assert grad.dtype == one.dtype
    wide = {name: one.detach().cpu().double() for name, one in low.items()}
    exact = reference(s.detach().cpu().double(), 3, wide["weight"], wide["bias"])[0]
    # The interpreter cuts digits of bfloat16 off, a GPU rounds.
    torch.testing.assert_close(y.cpu().double(), exact, rtol=8e-3, atol=1e-3)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("platform", ALL)
@pytest.mark.parametrize("wrt", [*NAMES, "x weight", "bias shift"])
def test_gradients_that_are_not_needed(platform: Platform, wrt: str) -> None:
    given = cast(some((2, 6, 5, 4)), torch.float32, platform.device)
    with platform.forced():
        whole = group_norm_silu(num_groups=2, **given)
        grads = [torch.ones_like(one) for one in whole]
        every = torch.autograd.grad(whole, list(given.values()), grads)
        wanted = dict(zip(given, every, strict=True))
        for name, one in given.items():
            one.requires_grad_(name in wrt.split())
        some_of = {name: given[name] for name in wrt.split()}
        parts = group_norm_silu(num_groups=2, **given)
        pairs = [pair for pair in zip(parts, grads, strict=True) if pair[0].requires_grad]
        found = torch.autograd.grad(
            [one for one, _ in pairs], list(some_of.values()), [grad for _, grad in pairs]
        )
    for name, grad in zip(some_of, found, strict=True):
        torch.testing.assert_close(grad, wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("platform", ALL)
def test_of_one_result_alone(platform: Platform) -> None:
    """The sum is another's input as well, or nobody's."""
    given = cast(some((2, 6, 5, 4), "x residual"), torch.float32, platform.device)
    leaves = [given["x"], given["residual"]]
    with platform.forced():
        y, s = group_norm_silu(num_groups=2, **given)
        of_y = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
        of_s = torch.autograd.grad(s, leaves, torch.ones_like(s), retain_graph=True)
        both = torch.autograd.grad((y, s), leaves, [torch.ones_like(y)] * 2)
    for one, other, together in zip(of_y, of_s, both, strict=True):
        assert torch.equal(other, torch.ones_like(other))
        torch.testing.assert_close(one + other, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ALL)
def test_layouts(platform: Platform) -> None:
    """What lies otherwise is copied, a residual too; y is as x is."""
    given = cast(some((2, 8, 6, 5)), torch.float32, platform.device)
    given = {name: one.detach() for name, one in given.items()}
    with platform.forced():
        wanted = group_norm_silu(num_groups=4, **given)
        cropped = torch.full((2, 8, 6, 9), math.nan, device=platform.device)
        cropped[..., 2:-2] = given["x"]
        last = given["x"].contiguous(memory_format=torch.channels_last)
        turned = given["x"].mT.contiguous().mT
        shift = given["shift"].T.contiguous().T
        every = given["weight"].repeat_interleave(2)[::2]
        for x, is_last in ((cropped[..., 2:-2], False), (turned, False), (last, True)):
            more = given | {"x": x, "shift": shift, "weight": every}
            found = group_norm_silu(num_groups=4, **more)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
                form = torch.channels_last if is_last else torch.contiguous_format
                assert a.is_contiguous(memory_format=form)


@pytest.mark.parametrize("platform", ALL)
def test_one_sample_of_an_odd_stride(platform: Platform) -> None:
    """It lies channels last, and must be seen to do so by PyTorch, which looks at that stride."""
    x = torch.randn(1, 6, 5, 8, device=platform.device).permute(0, 3, 1, 2)
    odd = x.as_strided(x.shape, (8, *x.stride()[1:]))
    with platform.forced():
        found = group_norm_silu(odd, 4, residual=odd)
    for one in found:
        assert one.stride() == x.stride()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 0)])
@pytest.mark.parametrize("platform", ALL)
def test_nothing_there(platform: Platform, shape: tuple[int, ...]) -> None:
    given = cast(some(shape), torch.float32, platform.device)
    with platform.forced():
        y, s = group_norm_silu(num_groups=2, **given)
        grads = torch.autograd.grad((y, s), list(given.values()), (y.detach(), s.detach()))
    assert y.shape == s.shape == shape
    for one, grad in zip(given.values(), grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(one))


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("platform", ALL)
def test_values_that_are_not_finite(platform: Platform, last: bool) -> None:
    """They spoil their own group, as in PyTorch, and no other."""
    given = some((2, 8, 6, 5), "x weight bias")
    for value in (math.nan, math.inf, -math.inf):
        for place in (0, 17):  # a group's first value is one that all others are compared with
            given["x"][1].reshape(4, -1)[2, place] = value
            leaves = cast(given, torch.float32, platform.device, last)
            with platform.forced():
                y = group_norm_silu(num_groups=4, **leaves).reshape(2, 4, -1).cpu()
            bad = y.isnan().all(2)
            assert torch.equal(bad.nonzero(), torch.tensor([[1, 2]]))
            assert y[~bad].isfinite().all()


@pytest.mark.parametrize("platform", ALL)
def test_float16_that_overflows(platform: Platform) -> None:
    given = some((1, 8, 16, 16), "x")
    given["x"] = (60000 * given["x"].sign()).half().double()
    agrees(platform, given, 2, torch.float16)
    big = {"x": given["x"].half(), "weight": torch.full((8,), 65504.0).half()}
    big = {name: one.to(platform.device) for name, one in big.items()}
    big["bias"] = torch.full_like(big["weight"], 60000.0)
    with platform.forced():
        y = group_norm_silu(num_groups=2, **big)
    assert torch.equal(y.isinf().cpu(), given["x"] > 0)


@pytest.mark.parametrize("platform", PLAIN)
def test_gradcheck(platform: Platform) -> None:
    given = cast(some((2, 4, 3, 2)), torch.float64, platform.device)

    def call(*leaves: Tensor) -> Any:
        return group_norm_silu(num_groups=2, **dict(zip(given, leaves, strict=True)))

    with platform.forced():
        assert torch.autograd.gradcheck(call, list(given.values()))


@pytest.mark.parametrize("platform", ALL)
def test_a_second_derivative_raises(platform: Platform) -> None:
    given = cast(some((2, 4, 3, 2), "x weight"), torch.float32, platform.device)
    with platform.forced():
        y = group_norm_silu(num_groups=2, **given)
        (grad,) = torch.autograd.grad(y.sum(), given["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize("platform", PLAIN)
def test_opcheck(platform: Platform) -> None:
    op = torch.ops.sdcore.group_norm_silu.default
    for last in (False, True):
        given = cast(some((2, 4, 3, 2)), torch.float32, platform.device, last)
        args = [given[name] for name in ("x", "residual", "weight", "bias", "shift")]
        with platform.forced():
            torch.library.opcheck(op, (*args, 2, 1e-5, True))
            torch.library.opcheck(op, (args[0], None, None, None, None, 2, 1e-5, False))


@pytest.mark.parametrize("platform", platforms("reference", "cpp") + platforms("triton")[1:])
def test_compiles_without_a_break(platform: Platform) -> None:
    given = cast(some((2, 8, 6, 5)), torch.float32, platform.device)

    def call(**leaves: Tensor) -> Tensor:
        y, s = group_norm_silu(num_groups=4, **leaves)
        return (y * s).sum()

    with platform.forced():
        wanted = torch.autograd.grad(call(**given), list(given.values()))
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(**given), list(given.values()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ALL)
def test_under_autocast(platform: Platform) -> None:
    """It is of x's dtype there as well, and its weights may be of float32."""
    given = cast(some((2, 8, 6, 5)), torch.bfloat16, platform.device, vectors=torch.float32)
    with platform.forced():
        wanted = group_norm_silu(num_groups=4, **given)
        with torch.autocast(platform.device, torch.bfloat16):
            found = group_norm_silu(num_groups=4, **given)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("side", [60, 170], ids=["whole", "parts"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_nothing_waits_and_graphs_replay(last: bool, side: int) -> None:
    given = cast(some((2, 64, side, side - 4)), torch.bfloat16, "cuda", last)

    def call() -> list[Tensor]:
        y, s = group_norm_silu(num_groups=32, **given)
        ones = torch.ones_like(y)
        grads = torch.autograd.grad((y, s), list(given.values()), (ones, ones))
        return [y.detach(), s.detach(), *grads]

    assert_replays(call)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_more_than_fits_32_bits(last: bool) -> None:
    """Of 2^31 values and more, the last group."""
    torch.manual_seed(0)
    x = torch.randn((2, 16, 8192, 8200), device="cuda", dtype=torch.float16)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = group_norm_silu(x, 8)
    part = x[1:, -2:, :64, :].float()
    h = (part - x[1:, -2:].float().mean()) / x[1:, -2:].float().std()
    torch.testing.assert_close(
        y[1:, -2:, :64].float(), torch.nn.functional.silu(h), rtol=2e-3, atol=2e-3
    )


X = torch.zeros(2, 8, 4, 4)
BAD = [
    ((3, 2), {}, TypeError, "x must be a tensor; got int"),
    ((X, 2, 3), {}, TypeError, "weight must be a tensor; got int"),
    ((X, 2.0), {}, TypeError, "num_groups must be an int"),
    ((X, 3), {}, ValueError, "num_groups must divide 8 channels; got 3"),
    ((X, 0), {}, ValueError, "num_groups must divide 8 channels; got 0"),
    ((X[0, 0, 0], 1), {}, ValueError, r"x must be \[B, C, …\]; got \[4\]"),
    ((X.int(), 2), {}, ValueError, "x must be of float16.*got torch.int32"),
    ((torch.zeros(1, 8, 1, 1), 8), {}, ValueError, "more than one value for each group"),
    ((X, 2, X[0, 0]), {}, ValueError, r"weight must be \[8\]; got \[4, 4\]"),
    ((X, 2, None, torch.zeros(1)), {}, ValueError, r"bias must be \[8\]; got \[1\]"),
    ((X, 2), {"shift": torch.zeros(8)}, ValueError, r"shift must be \[2, 8\]; got \[8\]"),
    ((X, 2), {"residual": X[:1]}, ValueError, r"residual must be \[2, 8, 4, 4\]"),
    ((X, 2), {"residual": X.half()}, ValueError, "residual must be of torch.float32; got"),
    ((X, 2, torch.zeros(8).half()), {}, ValueError, "weight must be of torch.float32; got"),
    ((X.half(), 2, torch.zeros(8).bfloat16()), {}, ValueError, "weight must be of .* or .*; got"),
    ((X, 2, torch.zeros(8, device="meta")), {}, ValueError, "weight must be on x's device, cpu"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=[b[-1] for b in BAD])
def test_bad_input(
    args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        group_norm_silu(*args, **options)


@pytest.mark.parametrize("platform", platforms("triton"))
def test_float64_is_refused_by_name(platform: Platform) -> None:
    x = X.double().to(platform.device)
    with platform.forced(), pytest.raises(sdcore.backends.BackendError, match="no float64"):
        group_norm_silu(x, 2)
