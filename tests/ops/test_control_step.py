from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import sdcore
from sdcore.ops import control_step
from sdcore.ops.control_step import reference
from tests.platforms import Platform, assert_as_good, assert_replays, platforms

ALL = platforms("reference", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def some(shape: tuple[int, ...], more: int = 0) -> dict[str, Any]:
    """In float64, of numbers that every dtype holds; a sample with more channels."""
    generator = torch.Generator().manual_seed(shape[0])
    wider = (shape[0], shape[1] + more, *shape[2:])
    given: dict[str, Any] = {
        name: torch.randint(-31, 32, size, generator=generator).double() / 16
        for name, size in (("control", shape), ("gradient", shape), ("sample", wider))
    }
    given["factor"] = torch.linspace(0.5, 3, shape[0])
    return given | {"learning_rate": torch.tensor(0.3)}


def there(given: dict[str, Any], device: str, *dtypes: torch.dtype) -> dict[str, Any]:
    kinds = {"control": torch.float32, "gradient": dtypes[0], "sample": dtypes[-1]}
    return {
        name: one.to(device, kinds.get(name)) if isinstance(one, Tensor) else one
        for name, one in given.items()
    }


def specified(given: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    parts = [given[name].to(dtype) for name in ("control", "gradient", "sample")]
    rate = given["learning_rate"]
    rate = rate.to(dtype) if isinstance(rate, Tensor) else rate
    if given["factor"] is not None:
        rate = rate * given["factor"].to(dtype).reshape(-1, *(1,) * (parts[0].ndim - 1))
    return reference(*parts, rate)


def agrees(platform: Platform, given: dict[str, Any], *dtypes: torch.dtype) -> None:
    given = there(given, "cpu", *dtypes)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    with platform.forced():
        ours = control_step(**there(given, platform.device, *dtypes))
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtypes[-1]
    for our, plain, exact in zip(
        ours, specified(given, wide), specified(given, torch.float64), strict=True
    ):
        slack = 8 if exact.numel() < 8 else 1  # of few, plain PyTorch may round none
        assert_as_good(our, plain.to(our.dtype), exact, our.dtype, slack)
    channels = given["control"].shape[1]
    assert torch.equal(ours[1][:, channels:].cpu(), given["sample"][:, channels:])


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)), ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_agrees_with_the_specification(platform: Platform, dtypes: tuple[torch.dtype, ...]) -> None:
    if platform.backend == "triton" and torch.float64 in dtypes:
        pytest.skip("not supported there")
    one = {"factor": torch.tensor(1.5).expand(2)}  # of all samples
    others = (5, {"factor": None}), (1, {"learning_rate": 0.7}), (1, one | {"learning_rate": 0.7})
    for more, change in ((0, {}), *others):
        agrees(platform, some((2, 4, 5, 7), more) | change, *dtypes)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4, 1, 1), (3, 5), (1, 4, 33, 31), (2, 3, 2, 9, 8)])
@pytest.mark.parametrize("platform", ALL)
def test_shapes(platform: Platform, shape: tuple[int, ...]) -> None:
    for more in (0, 1, 5):
        agrees(platform, some(shape, more), torch.float32)


@pytest.mark.parametrize("name", ["control", "gradient", "sample"])
@pytest.mark.parametrize("platform", ALL)
def test_any_layout(platform: Platform, name: str) -> None:
    """As contiguous ones, bit for bit; and the results lie as what they follow."""
    given = there(some((2, 3, 6, 5), 2), platform.device, torch.float32)
    wide = torch.nn.functional.pad(given[name], (2, 3))
    with platform.forced():
        wanted = control_step(**given)
        for one in (
            given[name].contiguous(memory_format=torch.channels_last),
            given[name].mT.contiguous().mT,
            wide[..., 2:-3],
            torch.cat([given[name], given[name]], 1)[:, : given[name].shape[1]],
        ):
            ours = control_step(**given | {name: one})
            assert all(map(torch.equal, ours, wanted))
            for out, like in zip(ours, ("control", "sample"), strict=True):
                if name == like and one.is_contiguous(memory_format=torch.channels_last):
                    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("platform", ALL)
def test_nothing_is_no_error(platform: Platform) -> None:
    for shape in ((0, 4, 6, 7), (2, 4, 0, 7), (2, 0, 3, 3)):
        given = there(some(shape, 2), platform.device, torch.float32)
        with platform.forced():
            stepped, moved = control_step(**given)
        assert stepped.shape == shape and moved.shape == given["sample"].shape
        assert torch.equal(moved[:, shape[1] :], given["sample"][:, shape[1] :])


@pytest.mark.parametrize("name", ["control", "gradient", "sample"])
@pytest.mark.parametrize("platform", ALL)
def test_a_derivative_raises(platform: Platform, name: str) -> None:
    given = there(some((2, 4, 3, 3)), platform.device, torch.float32)
    given[name].requires_grad_()
    with platform.forced():
        stepped, moved = control_step(**given)
        for out in (stepped, moved):
            with pytest.raises(RuntimeError, match="control_step has no derivative"):
                torch.autograd.grad(out.sum(), given[name], retain_graph=True)


def test_opcheck() -> None:
    given = there(some((2, 3, 4, 5), 1), "cpu", torch.bfloat16)
    tensors = [given[name] for name in ("control", "gradient", "sample")]
    for others in ((None, None, 0.5), (given["factor"], given["learning_rate"], 1.0)):
        torch.library.opcheck(torch.ops.sdcore.control_step, (*tensors, *others))


@pytest.mark.parametrize("platform", ALL)
def test_compiles_without_a_break(platform: Platform) -> None:
    if platform.backend == "triton" and platform.device == "cpu":
        pytest.skip("the interpreter runs Python")
    given = there(some((2, 4, 6, 7), 2), platform.device, torch.float16)
    compiled = torch.compile(control_step, fullgraph=True, backend="aot_eager")
    with platform.forced():
        assert all(map(torch.equal, compiled(**given), control_step(**given)))


BAD = [
    ({"control": 3}, TypeError, "control must be a tensor; got int"),
    ({"control": torch.zeros(2, 4, 6, 7).half()}, ValueError, "control must be of float32"),
    ({"gradient": torch.zeros(2, 4, 6, 7).int()}, ValueError, "gradient must be of float16"),
    ({"gradient": torch.zeros(2, 4, 6)}, ValueError, "gradient must have the shape of control"),
    ({"gradient": torch.zeros(2, 4, 6, 7, device="meta")}, ValueError, "on control's device, cpu"),
    ({"sample": torch.zeros(2, 3, 6, 7)}, ValueError, "sample must have the shape of control"),
    ({"sample": torch.zeros(4, 4, 6, 7)}, ValueError, "sample must have the shape of control"),
    ({"sample": torch.zeros(2, 4)}, ValueError, "sample must have the shape of control"),
    ({"learning_rate": "0.1"}, TypeError, "learning_rate must be a number or a tensor; got str"),
    ({"learning_rate": torch.ones(2)}, ValueError, "learning_rate must be one"),
    ({"learning_rate": torch.tensor(1)}, TypeError, "learning_rate must hold floats"),
    ({"factor": 2.0}, TypeError, "factor must be a tensor; got float"),
    ({"factor": torch.ones(3)}, ValueError, "factor must have a number for each of 2 samples"),
    ({"factor": torch.ones(2, device="meta")}, ValueError, "factor must be on control's device"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = there(some((2, 4, 6, 7)), "cpu", torch.float32)
    control_step(**given)
    with pytest.raises(error, match=message):
        control_step(**given | change)


@pytest.mark.gpu
def test_float64_on_a_gpu_takes_plain_pytorch() -> None:
    given = there(some((2, 4, 6, 7)), "cuda", torch.float64)
    control_step(**given)
    with sdcore.backend("triton"), pytest.raises(sdcore.backends.BackendError, match="no float64"):
        control_step(**given)


@pytest.mark.gpu
def test_repeats_and_replays() -> None:
    given = there(some((2, 4, 64, 64), 5), "cuda", torch.float16)
    assert_replays(lambda: list(control_step(**given)))
