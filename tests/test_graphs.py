"""Callables that are captured, and those that can't be."""

from __future__ import annotations

import gc
import logging
import math
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import sdcore
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


def test_what_settings_tell_apart(tokens: Any) -> None:
    peft = pytest.importorskip("peft")
    from diffusers.models import attention_processor

    from tests import pipelines

    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    unet = pipe.unet
    states = [graphs.settings(unet)]

    def changed() -> bool:
        states.append(graphs.settings(unet))
        hash(states[-1])
        return states[-1] not in states[:-1]

    assert not changed()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), "a")
    assert changed()
    unet.set_adapters(["a"], [0.5])
    assert changed()
    unet.fuse_lora()
    assert changed()
    unet.disable_adapters()
    assert changed()
    unet.train()
    assert changed()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert changed()
    unet.set_attn_processor(attention_processor.AttnProcessor())
    assert changed()
    hook = unet.mid_block.register_forward_hook(lambda *_: None)
    assert changed()
    hook.remove()
    assert not changed()
    unet.mid_block.forward = lambda *_: None
    assert changed()
    unet.conv_in.some = [[0.7, 0.3]]
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
def test_a_gradient_has_a_graph_of_its_own() -> None:
    weight = torch.randn(50, device="cuda")

    def function(x: Tensor, y: Tensor, power: int) -> dict[str, Any]:
        return {"out": (weight * x**power + y).sin(), "more": (x * y, y.detach() + 1)}

    captured = graphs.Graphs(function, "function", gradients=True)
    for _ in range(3):
        x, y = (torch.randn(50, device="cuda", requires_grad=True) for _ in range(2))
        found, wanted = captured(x, y, power=3), function(x, y, 3)
        assert not found["more"][1].requires_grad
        for ends in (["out"], ["out", "more"]):
            pairs = []
            for one in (found, wanted):
                parts = [one["out"], one["more"][0]][: len(ends)]
                pairs.append(
                    torch.autograd.grad(sum(map(torch.sum, parts)), (x, y), retain_graph=True)
                )
            for a, b in zip(*pairs, strict=True):
                torch.testing.assert_close(a, b)
    assert captured.captures == 1
    frozen = captured(x, y.detach(), power=3)
    (grad,) = torch.autograd.grad(frozen["out"].sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted["out"].sum(), x)[0])
    with torch.no_grad():
        assert not captured(x, y, power=3)["out"].requires_grad
    assert captured.captures == 3


@gpu
def test_gradients_after_other_calls() -> None:
    """What a gradient needs lies in the graphs' memory, where another call may have been."""
    captured = graphs.Graphs(lambda x: (x**2).exp(), "function", gradients=True)
    given = [torch.randn(size, device="cuda", requires_grad=True) for size in (40, 40, 7000, 40)]
    outs = [captured(x) for x in given]
    for x, out in zip(given, outs, strict=True):
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        torch.testing.assert_close(grad.detach(), 2 * x.detach() * (x.detach() ** 2).exp())
        with pytest.raises(RuntimeError, match="function has no second derivative"):
            (out.detach().sum() + grad.square().sum()).backward()
    assert captured.captures == 2


@gpu
def test_a_gradient_keeps_weights_and_sees_their_changes() -> None:
    weight = torch.randn(1000, device="cuda")
    captured = graphs.Graphs(lambda x: (weight * x).sin(), "function", gradients=True)
    x = torch.randn(1000, device="cuda", requires_grad=True)
    captured.weights = (weight,)
    out, wanted = captured(x), weight * (weight * x).cos()
    weight.data = torch.zeros(1000)  # as to("cpu") does it: the graph's memory would be given back
    torch.full((1000,), math.nan, device="cuda")
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, wanted)
    there = torch.randn(1000, device="cuda")
    captured = graphs.Graphs(lambda x: (there * x).sin(), "function", gradients=True)
    captured.weights = (there,)
    out = captured(x)
    there += 1
    with pytest.raises(RuntimeError, match=r"a weight \[1000\] of function was changed in place"):
        out.sum().backward()


@gpu
def test_checkpointing_and_two_threads_with_gradients() -> None:
    """Neither waits for the other, nor minds that it waits for the GPU; and what is checkpointed is
    called."""
    captured = graphs.Graphs(lambda x: (x**2).exp(), "function", gradients=True)
    wrong: list[int] = []
    right: list[int] = []

    def work(first: int) -> None:
        for size in range(first, first + 40, 2):
            # Not drawn there, which PyTorch forbids while any thread captures.
            x = torch.randn(size).cuda().requires_grad_()
            captured(x).sum().backward()
            same = torch.allclose(x.grad, 2 * x * (x**2).exp(), rtol=1e-4)
            (right if same else wrong).append(size)

    threads = [threading.Thread(target=work, args=(first,)) for first in (100, 101)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert (len(right), wrong) == (40, [])
    replays = captured.replays
    x = torch.randn(100, device="cuda", requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(captured, x, use_reentrant=False)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (2 * x * (x**2).exp()).detach())
    assert captured.replays == replays


@gpu
def test_random_numbers_differ_from_replay_to_replay() -> None:
    captured = graphs.Graphs(lambda x: x + torch.randn_like(x), "noise")
    x = torch.zeros(1000, device="cuda")
    assert not captured(x).equal(captured(x))
    assert captured.captures == 1


def test_waiting_is_heard_where_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other threads it is none, and nothing stays as it was set, also where a block of another
    thread's that catches warnings ends in between."""
    mode = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda new: mode.__setitem__(0, new))
    listening = graphs._Listening()

    def wait() -> None:
        assert mode == ["warn"]
        warnings.warn(graphs.WAITED, stacklevel=1)

    with warnings.catch_warnings(record=True) as others:
        shows = warnings.showwarning
        with pytest.raises(RuntimeError, match=graphs.WAITED), listening.waiting_is_an_error():
            wait()
        with listening.waiting_is_an_error():
            other = threading.Thread(target=wait)
            other.start()
            other.join()
        with pytest.raises(RuntimeError, match=graphs.WAITED), listening.waiting_is_an_error():
            wait()
            with listening.waiting_is_an_error():
                pass
        assert (mode, warnings.showwarning, others) == ([0], shows, [])
        with warnings.catch_warnings():
            listens = listening.waiting_is_an_error()
            listens.__enter__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
        listens.__exit__(None, None, None)
        assert (mode, warnings.showwarning) == ([0], shows)
        warnings.warn("something else", stacklevel=1)
        assert [str(one.message) for one in others] == ["something else"]


def test_what_a_process_has_set_is_in_the_key() -> None:
    before = graphs._modes()
    with sdcore.backend("reference"):
        assert graphs._modes() != before
    assert graphs._modes() == before
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = not allowed
    try:
        assert graphs._modes() != before
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


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
    # And nothing was harmed.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.cuda.empty_cache()
    after = graphs.Graphs(affine, "affine")
    assert after(call(x, x))[0].equal(2 * x)
    assert after.captures == 1
    assert torch.randn(3, device="cuda").isfinite().all()


@gpu
def test_weights_under_autocast() -> None:
    """Autocast drops the weights that it cast when it ends."""
    layer = nn.Linear(256, 256).cuda().requires_grad_(False)
    captured = graphs.Graphs(layer, "layer")
    for _ in range(3):
        x = torch.randn(8, 256, device="cuda")
        with torch.autocast("cuda"):
            layer(x)
            found, wanted = captured(x), layer(x)
        assert found.equal(wanted)
        [torch.full((256, 256), float("nan"), device="cuda") for _ in range(8)]
    assert captured.captures == 1


@gpu
def test_two_threads_and_two_streams() -> None:
    captured = graphs.Graphs(lambda x: (2 * x).cumsum(0), "sum")
    captured(torch.ones(100_000, device="cuda"))
    wrong = []

    def work(value: float) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                x = torch.full((100_000,), value, device="cuda")
                if captured(x)[:3].tolist() != [2 * value, 4 * value, 6 * value]:
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 5.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert captured.replays == 101
    assert not wrong


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
