from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sdcore
from sdcore.ops import clean_latents
from sdcore.ops.clean_latents import reference
from tests.platforms import Platform, assert_as_good, assert_replays, platforms

ALL = platforms("reference", "triton")
PLAIN = platforms("reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TYPES = ("epsilon", "v_prediction", "sample")


def supported(platform: Platform, *dtypes: torch.dtype) -> bool:
    return platform.backend != "triton" or torch.float64 not in dtypes


def some(shape: tuple[int, ...], each: bool = False, channels: bool = True) -> dict[str, Any]:
    """In float64, of numbers that every dtype holds; levels of each sample or of all."""
    generator = torch.Generator().manual_seed(shape[0])
    given: dict[str, Any] = {
        name: torch.randint(-31, 32, shape, generator=generator).double() / 16
        for name in ("sample", "prediction")
    }
    for name, pair in (("alpha", (0.8, 0.25)), ("sigma", (0.6, 0.96))):
        level = torch.tensor(pair, dtype=torch.float64).repeat(shape[0])
        given[name] = level[: shape[0]] if each else torch.tensor(pair[0], dtype=torch.float64)
    if channels:
        given["scale"] = torch.linspace(0.5, 5, shape[1])
        given["shift"] = torch.linspace(-1, 1, shape[1])
    return given


def there(given: dict[str, Any], device: str, *dtypes: torch.dtype) -> dict[str, Any]:
    """On the device; the sample and the prediction in these dtypes, levels in float32."""
    kinds = {"sample": dtypes[0], "prediction": dtypes[-1], "alpha": torch.float32}
    kinds["sigma"] = torch.float32
    return {
        name: one.to(device, kinds.get(name)) if isinstance(one, Tensor) else one
        for name, one in given.items()
    }


def specified(given: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The specification, in this dtype."""
    given = {name: one.to(dtype) if isinstance(one, Tensor) else one for name, one in given.items()}
    axes = (1,) * (given["sample"].ndim - 2)
    levels = [given[name].reshape(-1, 1, *axes) for name in ("alpha", "sigma")]
    channels = [
        None if given.get(name) is None else given[name].reshape(1, -1, *axes)
        for name in ("scale", "shift")
    ]
    kind = given.get("prediction_type", "epsilon")
    return reference(given["sample"], given["prediction"], *levels, *channels, kind)


def agrees(platform: Platform, given: dict[str, Any], *dtypes: torch.dtype) -> None:
    """Value and gradients, with the result in the dtype of the prediction."""
    given = there(given, "cpu", *dtypes)
    names = ["sample", "prediction"]
    if given.get("prediction_type") == "sample":
        names = ["prediction"]
    ours = there(given, platform.device, *dtypes)
    double = torch.float64 in dtypes
    results = []
    for inputs, function in (
        (ours, lambda given: clean_latents(**given)),
        (given, lambda given: specified(given, torch.float64 if double else torch.float32)),
        (given, lambda given: specified(given, torch.float64)),
    ):
        leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names}
        with platform.forced():
            out = function(inputs | leaves)
            grad = torch.arange(out.numel(), dtype=torch.float64).reshape(out.shape) % 7 - 3
            grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out))
        results.append([out, *grads])
    for our, plain, exact in zip(*results, strict=True):
        exact = exact.detach().double()
        slack = 8 if exact.numel() < 8 else 1  # of few, plain PyTorch may round none
        assert_as_good(our, plain.to(our.dtype), exact, our.dtype, slack)
    assert results[0][0].dtype == dtypes[-1] and results[0][0].is_contiguous()
    for name, grad in zip(names, results[0][1:], strict=True):
        assert grad.dtype == given[name].dtype


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)), ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_agrees_with_the_specification(
    platform: Platform, dtypes: tuple[torch.dtype, ...], kind: str
) -> None:
    if not supported(platform, *dtypes):
        pytest.skip("not supported there")
    for each, channels in ((True, True), (False, False)):
        given = some((2, 4, 5, 7), each, channels) | {"prediction_type": kind}
        agrees(platform, given, *dtypes)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4, 1, 1), (3, 5), (1, 4, 33, 31), (2, 3, 2, 9, 8)])
@pytest.mark.parametrize("platform", ALL)
def test_shapes(platform: Platform, shape: tuple[int, ...]) -> None:
    for kind in TYPES:
        agrees(platform, some(shape, each=True) | {"prediction_type": kind}, torch.float32)


@pytest.mark.parametrize("platform", ALL)
def test_scale_and_shift_come_alone(platform: Platform) -> None:
    given = some((2, 3, 4, 4))
    for name in ("scale", "shift"):
        agrees(platform, given | {name: None}, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_dtype_of_the_result(platform: Platform, dtype: torch.dtype) -> None:
    """Rounded once, from what is computed in float32."""
    if not supported(platform, dtype):
        pytest.skip("not supported there")
    if platform.backend == "triton" and platform.device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts digits off")
    given = there(some((2, 4, 5, 7)), platform.device, torch.float16)
    with platform.forced():
        wide, ours = (
            clean_latents(**given, dtype=torch.float32),
            clean_latents(**given, dtype=dtype),
        )
    assert ours.dtype == dtype and torch.equal(ours, wide.to(dtype))


def laid_out(tensor: Tensor, how: str) -> Tensor:
    """The same values, lying otherwise."""
    if how == "channels last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if how == "first channels":
        return torch.cat([tensor, torch.full_like(tensor, math.nan)], 1)[:, : tensor.shape[1]]
    if how == "transposed":
        return tensor.mT.contiguous().mT
    if how == "expanded":
        return tensor[:1, :, :1].expand(tensor.shape)
    return tensor


@pytest.mark.parametrize("how", ["channels last", "first channels", "transposed", "expanded"])
@pytest.mark.parametrize("platform", ALL)
def test_any_layout(platform: Platform, how: str) -> None:
    """Of each input, and of the gradient: as contiguous ones, bit for bit."""
    given = there(some((2, 3, 6, 5), each=True), platform.device, torch.float32)
    for name in ("sample", "prediction", "grad"):
        results = []
        for dense in (False, True):
            inputs = {one: given[one] for one in ("sample", "prediction")}
            inputs["grad"] = torch.arange(180.0, device=platform.device).view(2, 3, 6, 5)
            inputs[name] = laid_out(inputs[name], how)
            if dense:
                inputs[name] = inputs[name].contiguous()
            grad = inputs.pop("grad")
            leaves = [one.detach().requires_grad_() for one in inputs.values()]
            with platform.forced():
                out = clean_latents(*leaves, **{k: v for k, v in given.items() if k not in inputs})
                results.append([out, *torch.autograd.grad(out, leaves, grad)])
        assert results[0][0].is_contiguous()
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("platform", ALL)
def test_gradient_of_what_needs_one(platform: Platform) -> None:
    given = there(some((2, 4, 6, 6), each=True), platform.device, torch.float32)
    given |= {name: given[name].requires_grad_() for name in ("sample", "prediction")}
    with platform.forced():
        together = torch.autograd.grad(
            clean_latents(**given).sum(), [given["sample"], given["prediction"]]
        )
        for name, other, wanted in zip(
            ("sample", "prediction"), ("prediction", "sample"), together, strict=True
        ):
            out = clean_latents(**given | {other: given[other].detach()})
            assert torch.equal(torch.autograd.grad(out.sum(), given[name])[0], wanted)
        levels = {name: given[name].clone().requires_grad_() for name in ("alpha", "sigma")}
        constant = given | {name: given[name].detach() for name in ("sample", "prediction")}
        assert not clean_latents(**constant | levels).requires_grad


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("platform", PLAIN)
def test_gradcheck(platform: Platform, kind: str) -> None:
    given = some((2, 3, 2, 2), each=True)
    given = {name: one.to(platform.device) for name, one in given.items()}
    names = ["sample", "prediction"] if kind != "sample" else ["prediction"]

    def value(*inputs: Tensor) -> Tensor:
        return clean_latents(**given | dict(zip(names, inputs, strict=True)), prediction_type=kind)

    with platform.forced():
        assert torch.autograd.gradcheck(value, [given[name].requires_grad_() for name in names])


@pytest.mark.parametrize("platform", ALL)
def test_a_second_derivative_raises(platform: Platform) -> None:
    given = there(some((2, 4, 3, 3)), platform.device, torch.float32)
    given["prediction"].requires_grad_()
    with platform.forced():
        weight = torch.ones(2, 4, 3, 3, device=platform.device, requires_grad=True)
        out = (clean_latents(**given) * weight).sum()
        (grad,) = torch.autograd.grad(out, given["prediction"], create_graph=True)
        with pytest.raises(RuntimeError, match="clean_latents has no second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize("platform", ALL)
def test_nothing_is_no_error(platform: Platform) -> None:
    for shape in ((0, 4, 6, 7), (2, 0, 6, 7), (2, 4, 0, 7)):
        given = there(some(shape), platform.device, torch.float32)
        given["sample"].requires_grad_()
        with platform.forced():
            out = clean_latents(**given)
            out.sum().backward()
        assert out.shape == given["sample"].grad.shape == shape


@pytest.mark.parametrize("platform", ALL)
def test_nan_stays_where_it_is(platform: Platform) -> None:
    given = there(some((2, 4, 6, 7)), platform.device, torch.float32)
    given["sample"][0, 1, 0, 0] = math.nan
    with platform.forced():
        out = clean_latents(**given)
        assert out.isnan().sum() == 1 and out[0, 1, 0, 0].isnan()
        assert clean_latents(**given, prediction_type="sample").isfinite().all()


@pytest.mark.parametrize("platform", ALL)
def test_autocast_changes_nothing(platform: Platform) -> None:
    given = there(some((2, 4, 6, 7)), platform.device, torch.float32)
    with platform.forced():
        wanted = clean_latents(**given)
        with torch.autocast(platform.device, torch.bfloat16):
            assert torch.equal(clean_latents(**given), wanted)


def test_opcheck() -> None:
    given = there(some((2, 3, 4, 5), each=True), "cpu", torch.float32, torch.bfloat16)
    tensors = [given["sample"].requires_grad_(), given["prediction"].requires_grad_()]
    others = [given[name] for name in ("alpha", "sigma", "scale", "shift")]
    op = torch.ops.sdcore.clean_latents
    for kind in range(3):
        torch.library.opcheck(op, (*tensors, *others, kind, torch.float16))
        torch.library.opcheck(op, (*tensors, *others[:2], None, None, kind, torch.float32))
        plain = [one.detach() for one in tensors]
        torch.library.opcheck(
            torch.ops.sdcore.clean_latents_backward,
            (torch.randn(2, 3, 4, 5), *plain, *others[:3], kind, [kind < 2, True]),
        )


@pytest.mark.parametrize("platform", ALL)
def test_compiles_without_a_break(platform: Platform) -> None:
    if platform.backend == "triton" and platform.device == "cpu":
        pytest.skip("the interpreter runs Python")
    given = there(some((2, 4, 6, 7), each=True), platform.device, torch.float16)

    def value(sample: Tensor, prediction: Tensor) -> Tensor:
        rest = {k: v for k, v in given.items() if k not in ("sample", "prediction")}
        return clean_latents(sample, prediction, **rest, dtype=torch.float32) * 2

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    last = given["prediction"].contiguous(memory_format=torch.channels_last)
    with platform.forced():
        for prediction in (given["prediction"], last):
            leaves = [given["sample"].requires_grad_(), prediction.requires_grad_()]
            results = []
            for function in (compiled, value):
                out = function(*leaves)
                results.append([out, *torch.autograd.grad(out.sum(), leaves)])
            for one, other in zip(*results, strict=True):
                assert torch.equal(one, other) and one.stride() == other.stride()


BAD = [
    ({"sample": 3}, TypeError, "sample must be a tensor; got int"),
    ({"prediction": None}, TypeError, "prediction must be a tensor; got NoneType"),
    ({"sample": torch.zeros(2, 4, 6, 7).int()}, ValueError, "sample must be of float16"),
    ({"prediction": torch.zeros(2, 3, 6, 7)}, ValueError, "prediction must have the shape of"),
    ({"sample": torch.zeros(7), "prediction": torch.zeros(7)}, ValueError, "sample must be .batch"),
    ({"prediction": torch.zeros(2, 4, 6, 7, device="meta")}, ValueError, "on sample's device, cpu"),
    ({"alpha": 0.5}, TypeError, "alpha must be a tensor; got float"),
    ({"alpha": torch.ones(2).int()}, TypeError, "alpha must hold floats"),
    ({"sigma": torch.ones(3)}, ValueError, "sigma must be one number or one for each of 2"),
    ({"sigma": torch.ones(2, 1)}, ValueError, "sigma must be one number or one for each of 2"),
    ({"sigma": torch.ones(2, device="meta")}, ValueError, "sigma must be on sample's device"),
    ({"scale": 0.18215}, TypeError, "scale must be a tensor or None; got float"),
    ({"scale": torch.ones(4).half()}, ValueError, "scale must be of float32"),
    ({"scale": torch.ones(3)}, ValueError, "scale must have a number for each of 4 channels"),
    ({"shift": torch.ones(1, 4, 1, 1)}, ValueError, "shift must have a number for each of 4"),
    ({"shift": torch.ones(4, device="meta")}, ValueError, "shift must be on sample's device"),
    ({"prediction_type": "flow"}, ValueError, "prediction_type must be one of epsilon.*'flow'"),
    ({"dtype": torch.int32}, ValueError, "dtype must be float16"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = there(some((2, 4, 6, 7)), "cpu", torch.float32)
    clean_latents(**given)
    with pytest.raises(error, match=message):
        clean_latents(**given | change)


@pytest.mark.gpu
def test_float64_on_a_gpu_takes_plain_pytorch() -> None:
    given = there(some((2, 4, 6, 7)), "cuda", torch.float64)
    torch.testing.assert_close(clean_latents(**given), specified(given, torch.float64))
    with sdcore.backend("triton"), pytest.raises(sdcore.backends.BackendError, match="no float64"):
        clean_latents(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TYPES)
def test_repeats_and_replays(kind: str) -> None:
    given = there(some((2, 4, 64, 64), each=True), "cuda", torch.float16)
    grad = torch.randn(2, 4, 64, 64, device="cuda").half()

    def work() -> list[Tensor]:
        leaf = given["prediction"].detach().requires_grad_()
        out = clean_latents(**given | {"prediction": leaf}, prediction_type=kind)
        return [out.detach(), *torch.autograd.grad(out, leaf, grad)]

    assert_replays(work)


@pytest.mark.gpu
def test_one_launch_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests have empty memory filled, in a launch of its own.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    given = there(some((1, 4, 128, 128)), "cuda", torch.float16)
    leaves = [given[name].requires_grad_() for name in ("sample", "prediction")]
    out = clean_latents(**given, dtype=torch.bfloat16)
    grad = torch.ones_like(out)

    def launches(work: Any) -> list[str]:
        for _ in range(2):
            work()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        return [one.name for one in profile.events() if one.device_type == cuda]

    assert launches(lambda: clean_latents(**given, dtype=torch.bfloat16)) == ["_clean"]
    back = launches(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    assert back == ["_clean_backward"]
