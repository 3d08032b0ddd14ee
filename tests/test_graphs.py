"""Callables that are captured, and those that can't be."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdcore import graphs

gpu = pytest.mark.gpu


def affine(given: dict[str, Any], scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    x, (y, power) = given["x"], given["rest"]
    return scale * x + y, {"power": x**power}


def call(x: Tensor, y: Tensor, power: int = 2) -> dict[str, Any]:
    return {"x": x, "rest": (y, power)}


def test_without_a_gpu_it_is_called(caplog: pytest.LogCaptureFixture) -> None:
    captured = graphs.Graphs(affine, "affine")
    x, y = torch.randn(3), torch.randn(3)
    with caplog.at_level(logging.WARNING, "sdcore"):
        for _ in range(3):
            out, more = captured(call(x, y), scale=2.0)
    assert out.equal(2 * x + y)
    assert more["power"].equal(x**2)
    assert [record.message for record in caplog.records] == [
        "affine runs without a CUDA graph: its tensors are not on one GPU, but on cpu"
    ]
    assert captured.captures == captured.replays == 0
    captured.state = "the weather is bad"
    with caplog.at_level(logging.WARNING, "sdcore"):
        captured(call(x, y))
    assert "the weather is bad" in caplog.records[-1].message
    captured.clear()


def test_an_argument_that_can_not_be_a_key() -> None:
    captured = graphs.Graphs(affine, "affine")
    with pytest.raises(TypeError, match=r"must be tensors, numbers.*got a Generator"):
        captured(torch.Generator())


def test_layouts_tell_calls_apart() -> None:
    """By all that a graph bakes in, and by nothing else."""
    x = torch.zeros(2, 3)
    different = [
        ((x, 1), {}),
        ((x, 1.0), {}),
        ((x, True), {}),
        ((x, "1"), {}),
        ((x, None), {}),
        ((x, (1,)), {}),
        ((x, [1]), {}),
        ((x,), {"a": 1}),
        ((x,), {"b": 1}),
        ((x.double(), 1), {}),
        ((x.mT, 1), {}),
        ((x.mT.contiguous(), 1), {}),
        ((x, x), {}),
    ]
    assert len({graphs._layout(one, []) for one in different}) == len(different)
    tensors: list[Tensor] = []
    assert graphs._layout(((torch.ones(2, 3), 1), {}), tensors) == graphs._layout(different[0], [])
    assert tensors[0].equal(torch.ones(2, 3))


def test_adapters_are_part_of_the_state(tmp_path: Any) -> None:
    pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    from tests import pipelines

    unet = pipelines.pipeline("SD", "text-to-image", pipelines.words(tmp_path)).unet
    states = [graphs.adapter_state(unet)]

    def changed() -> bool:
        states.append(graphs.adapter_state(unet))
        return states[-1] not in states[:-1]

    assert not changed()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), "a")
    assert changed()
    unet.set_adapters(["a"], [0.5])
    assert changed()
    unet.fuse_lora()
    assert changed()
    unet.unfuse_lora()
    assert not changed()  # as before it was fused
    unet.disable_adapters()
    assert changed()
    unet.train()
    assert changed()


def test_a_module_that_is_not_on_a_gpu_says_so() -> None:
    assert graphs.module_state(nn.Linear(2, 2)) == "weight of Linear is on cpu"


@gpu
def test_a_replay_is_what_the_call_would_give() -> None:
    captured = graphs.Graphs(affine, "affine")
    results = []
    for seed in range(4):
        torch.manual_seed(seed)
        x, y = torch.randn(2, 1000, device="cuda").unbind()
        results.append((captured(call(x, y), scale=2.0), affine(call(x, y), scale=2.0)))
    for (out, more), (wanted, more_wanted) in results:  # each call's own
        assert out.equal(wanted)
        assert more["power"].equal(more_wanted["power"])
    assert (captured.captures, captured.replays) == (1, 4)


@gpu
@pytest.mark.parametrize("what", ["number", "shape", "dtype", "state", "strides", "autocast"])
def test_what_makes_a_new_graph(what: str) -> None:
    captured = graphs.Graphs(affine, "affine")
    x, y = torch.randn(2, 8, 8, device="cuda").unbind()
    captured(call(x, y))
    if what == "number":
        found = captured(call(x, y, 3))
        assert found[1]["power"].equal(x**3)
    elif what == "shape":
        assert captured(call(x[:4], y[:4]))[0].equal((x + y)[:4])
    elif what == "dtype":
        assert captured(call(x.half(), y.half()))[0].dtype == torch.half
    elif what == "state":
        captured.state = "another", 1
        captured(call(x, y))
    elif what == "strides":
        assert captured(call(x.mT, y.mT))[0].equal((x + y).mT)
    else:
        with torch.autocast("cuda"):
            captured(call(x, y))
    assert captured.captures == 2
    captured.state = None
    captured(call(x, y))
    assert captured.captures == 2


@gpu
def test_a_gradient_within() -> None:
    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad((x**3).sum(), x)[0]

    captured = graphs.Graphs(gradient, "gradient")
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(100, device="cuda")
            assert captured(x).allclose(3 * x**2, rtol=1e-5)
    assert captured.captures == 1


@gpu
def test_random_numbers_differ_from_replay_to_replay() -> None:
    captured = graphs.Graphs(lambda x: x + torch.randn_like(x), "noise")
    x = torch.zeros(1000, device="cuda")
    assert not captured(x).equal(captured(x))


@gpu
def test_what_waits_for_the_gpu_is_called(caplog: pytest.LogCaptureFixture) -> None:
    captured = graphs.Graphs(lambda x: x * x.sum().item(), "waiting")
    x = torch.randn(10, device="cuda")
    with caplog.at_level(logging.WARNING, "sdcore"):
        for _ in range(3):
            assert captured(x).allclose(x * x.sum(), rtol=1e-5)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "waiting runs without a CUDA graph"
    ]
    assert captured.captures == 0
    # What comes after a failed capture works.
    after = graphs.Graphs(affine, "affine")
    assert after(call(x, x))[0].equal(2 * x)
    assert torch.randn(3, device="cuda").isfinite().all()


@gpu
def test_memory_is_given_back() -> None:
    def large(x: Tensor) -> Tensor:
        return (x[:, None] * x).sum(1)

    large(torch.ones(2, device="cuda"))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    captured = graphs.Graphs(large, "large", most=2)
    for size in (4000, 5000, 6000):
        captured(torch.ones(size, device="cuda"))
    assert len(captured._kept) == 2
    assert torch.cuda.memory_reserved() - before > 4 * 5000**2
    captured.clear()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 2**22


@gpu
def test_a_modules_state() -> None:
    module = nn.Linear(2, 2).cuda()
    state = graphs.module_state(module)
    assert state == graphs.module_state(module)
    module.weight = nn.Parameter(module.weight.detach().clone())
    assert graphs.module_state(module) != state
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload_with_hook(module, execution_device="cuda")
    assert "is on cpu" in str(graphs.module_state(module))
