"""Methods on pipelines: what they see, in which order, and that they leave nothing behind."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import accelerate
import diffusers
from accelerate.hooks import remove_hook_from_module
from diffusers import callbacks

import sdcore
from sdcore import Method, patching
from tests import pipelines
from tests.pipelines import trace

EVERY = [(family, kind) for family in pipelines.FAMILIES for kind in pipelines.KINDS]
OTHERS = [
    (family, kind) for family in pipelines.FAMILIES for kind in ("image-to-image", "inpainting")
]


class NoOp(Method):
    """Takes every part, and passes on what it is given."""

    def begin(self, run):
        pass

    def denoise(self, call, proceed):
        return proceed(call)

    def step(self, step, proceed):
        return proceed(step)

    def decode(self, run, latents, proceed):
        return proceed(latents)

    def end(self, run, error):
        pass


class Log(Method):
    """Writes down which part was reached."""

    repeatable = True

    def __init__(self, name: str = "", lines: list[str] | None = None) -> None:
        self.name, self.lines = name, [] if lines is None else lines

    def begin(self, run):
        self.lines.append(f"{self.name}begin")

    def denoise(self, call, proceed):
        self.lines.append(f"{self.name}denoise")
        out = proceed(call)
        self.lines.append(f"{self.name}denoised")
        return out

    def step(self, step, proceed):
        self.lines.append(f"{self.name}step")
        return proceed(step)

    def decode(self, run, latents, proceed):
        self.lines.append(f"{self.name}decode")
        return proceed(latents)

    def end(self, run, error):
        self.lines.append(f"{self.name}end" + (f" {type(error).__name__}" if error else ""))

    def removed(self, pipe):
        self.lines.append(f"{self.name}removed")


class See(Method):
    """Keeps calls and steps."""

    def __init__(self, look: Callable[[Any], Any] = lambda call: call) -> None:
        self.calls, self.steps, self.look = [], [], look

    def denoise(self, call, proceed):
        self.calls.append(self.look(call))
        return proceed(call)

    def step(self, step, proceed):
        self.steps.append(step)
        return proceed(step)


class Add(Method):
    """Adds a constant to the sample before each step."""

    moves_sample = True

    def __init__(self, value: float) -> None:
        self.value = value

    def denoise(self, call, proceed):
        return proceed(call.moved(torch.full_like(call.latents, self.value)))


# ---------------------------------------------------------------------------------------------
# Nothing stays behind


def leaves_no_trace(
    pipe: Any,
    kind: str,
    put_on: Callable[[Any], Any] | None = None,
    take_off: Callable[[Any], Any] | None = None,
    **more: Any,
) -> None:
    """``put_on`` and ``take_off`` happen while a method that does nothing is on."""
    before = pipelines.images(pipe, kind, **more)
    was = trace(pipe)
    handle = sdcore.patch(pipe, NoOp())
    assert type(pipe) is not was["class"]
    assert pipelines.images(pipe, kind, **more).equal(before)
    if put_on is not None:
        put_on(pipe)
        with_it = pipelines.images(pipe, kind, **more)
        if take_off is not None:
            take_off(pipe)
            assert pipelines.images(pipe, kind, **more).equal(before)
    handle.remove()
    if put_on is None or take_off is not None:
        assert trace(pipe) == was
        assert pipelines.images(pipe, kind, **more).equal(before)
    else:
        assert type(pipe) is was["class"]
        assert pipelines.images(pipe, kind, **more).equal(with_it)
    assert patching._patches(pipe) is None


@pytest.mark.parametrize(("family", "kind"), [*EVERY, *OTHERS])
def test_a_plain_pipeline(tokens: Any, family: str, kind: str) -> None:
    leaves_no_trace(pipelines.pipeline(family, kind, tokens), kind)


@pytest.mark.parametrize(("family", "kind"), EVERY)
@pytest.mark.parametrize(
    "more",
    [
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"guess_mode": True},
        {"num_images_per_prompt": 2},
        {"output_type": "latent"},
        {"return_dict": False},
        {"eta": 0.5},
        {"controlnet_conditioning_scale": 0.3, "control_guidance_end": 0.5},
    ],
    ids=lambda more: ", ".join(more),
)
def test_options_of_a_call(tokens: Any, family: str, kind: str, more: dict[str, Any]) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    if not set(more) <= set(inspect.signature(type(pipe).__call__).parameters):
        pytest.skip(f"{type(pipe).__name__} has no such option")
    if more == {"return_dict": False}:
        call = type(pipe).__call__
        generator = torch.Generator().manual_seed(1)
        options = pipelines.options(kind) | more
        before = call(pipe, **options, generator=generator)[0]
        with sdcore.patch(pipe, NoOp()):
            found = pipe(**options, generator=generator.manual_seed(1))
        assert isinstance(found, tuple)
        assert found[0].equal(before)
    else:
        leaves_no_trace(pipe, kind, **more)


def lora_weights(pipe: Any, folder: Any) -> Any:
    """A LoRA in Diffusers' format, of which no weight is zero."""
    from peft import LoraConfig, get_peft_model_state_dict

    unet = copy.deepcopy(pipe.unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))
    generator = torch.Generator().manual_seed(2)
    layers = {
        key: torch.randn(value.shape, generator=generator)
        for key, value in get_peft_model_state_dict(unet).items()
    }
    saver = (
        diffusers.StableDiffusionXLPipeline
        if "XL" in type(pipe).__name__
        else (diffusers.StableDiffusionPipeline)
    )
    saver.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


@pytest.mark.parametrize(("family", "kind"), EVERY)
@pytest.mark.parametrize("how", ["loaded", "loaded and fused"])
def test_lora_after_patching(tokens: Any, tmp_path: Any, family: str, kind: str, how: str) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    weights = lora_weights(pipe, tmp_path)
    plain = pipelines.images(pipe, kind)
    with sdcore.patch(pipe, NoOp()):
        pipe.load_lora_weights(weights)
        if how == "loaded and fused":
            pipe.fuse_lora()
        patched = pipelines.images(pipe, kind)
    assert not patched.equal(plain)
    assert pipelines.images(pipe, kind).equal(patched)
    if how == "loaded and fused":
        pipe.unfuse_lora()
    with sdcore.patch(pipe, NoOp()):
        pipe.unload_lora_weights()
        assert pipelines.images(pipe, kind).allclose(plain, atol=1e-4)
    leaves_no_trace(pipe, kind)


def ip_adapter(pipe: Any) -> list[dict[str, Any]]:
    """In the format of published ones, without an encoder of pictures."""
    generator = torch.Generator().manual_seed(3)
    width = pipe.unet.config.cross_attention_dim

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    keys, number = {}, 1
    for name in pipe.unet.attn_processors:
        if "attn2" in name:
            module = pipe.unet.get_submodule(name.removesuffix(".processor"))
            for part in ("to_k_ip", "to_v_ip"):
                keys[f"{number}.{part}.weight"] = random(module.to_k.out_features, width)
        number += 2 if "attn2" in name else 0
    projection = {
        "proj.weight": random(4 * width, 16),
        "proj.bias": random(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return [{"image_proj": projection, "ip_adapter": keys}]


@pytest.mark.parametrize(("family", "kind"), EVERY)
@pytest.mark.parametrize("when", ["before", "after"])
def test_ip_adapter(tokens: Any, family: str, kind: str, when: str) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    plain = pipelines.images(pipe, kind)
    more = {"ip_adapter_image_embeds": [torch.ones(2, 1, 16)]}
    if when == "before":
        pipe.unet._load_ip_adapter_weights(ip_adapter(pipe))
        assert not pipelines.images(pipe, kind, **more).equal(plain)
        leaves_no_trace(pipe, kind, **more)
        return
    with sdcore.patch(pipe, NoOp()):
        pipe.unet._load_ip_adapter_weights(ip_adapter(pipe))
        patched = pipelines.images(pipe, kind, **more)
    assert not patched.equal(plain)
    assert pipelines.images(pipe, kind, **more).equal(patched)


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_a_new_scheduler_after_patching(tokens: Any, family: str, kind: str) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    old = pipe.scheduler

    def put_on(pipe: Any) -> None:
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(old.config)

    def take_off(pipe: Any) -> None:
        pipe.scheduler = old

    leaves_no_trace(pipe, kind, put_on, take_off)


@pytest.mark.parametrize(("family", "kind"), EVERY)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["torch.compile(unet)", "unet.compile()"])
def test_compiled_unet(tokens: Any, family: str, kind: str, when: str, how: str) -> None:
    torch._dynamo.reset()
    pipe = pipelines.pipeline(family, kind, tokens)

    def put_on(pipe: Any) -> None:
        if how == "unet.compile()":
            pipe.unet.compile(backend="eager")
        else:
            pipe.unet = torch.compile(pipe.unet, backend="eager")

    if when == "before":
        put_on(pipe)
        leaves_no_trace(pipe, kind)
    else:
        leaves_no_trace(pipe, kind, put_on)
    compiled = how == "torch.compile(unet)"
    assert isinstance(pipe.unet, torch._dynamo.OptimizedModule) == compiled


@pytest.mark.parametrize(("family", "kind"), EVERY)
@pytest.mark.parametrize("how", ["sequential", "whole"])
@pytest.mark.parametrize("order", ["hook, patch", "patch, hook"])
@pytest.mark.parametrize("removed_first", ["hook", "patch"])
def test_hooks_of_accelerate(
    tokens: Any, family: str, kind: str, how: str, order: str, removed_first: str
) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    before = pipelines.images(pipe, kind)
    was = trace(pipe)

    def offload() -> Any:
        if how == "sequential":
            accelerate.cpu_offload(pipe.unet, execution_device="cpu")
        else:
            accelerate.cpu_offload_with_hook(pipe.unet, execution_device="cpu")

    fired = []

    def on() -> None:
        assert hasattr(pipe.unet, "_hf_hook")
        forward = pipe.unet._hf_hook.pre_forward
        pipe.unet._hf_hook.pre_forward = lambda *a, **k: (fired.append(1), forward(*a, **k))[1]

    if order == "hook, patch":
        offload()
    handle = sdcore.patch(pipe, NoOp())
    if order == "patch, hook":
        offload()
    on()
    assert pipelines.images(pipe, kind).equal(before)
    assert len(fired) == pipelines.STEPS
    if removed_first == "patch":
        handle.remove()
        assert pipelines.images(pipe, kind).equal(before)
        assert len(fired) == 2 * pipelines.STEPS
    remove_hook_from_module(pipe.unet, recurse=True)
    assert pipelines.images(pipe, kind).equal(before)
    handle.remove()
    assert pipelines.images(pipe, kind).equal(before)
    now = trace(pipe)
    for one in (was, now):  # what accelerate itself leaves: forward, bound anew
        for name, value in one.items():
            if isinstance(name, tuple) and name[1] == "modules":
                one[name] = [(*line[:6], *line[7:-1]) for line in value]
    assert now == was


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "kind"), EVERY)
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloading(tokens: Any, family: str, kind: str, how: str, when: str) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    if when == "before":
        getattr(pipe, how)()
        before = pipelines.images(pipe, kind)
        with sdcore.patch(pipe, NoOp()):
            assert pipelines.images(pipe, kind).equal(before)
    else:
        with sdcore.patch(pipe, NoOp()):
            getattr(pipe, how)()
            before = pipelines.images(pipe, kind)
            assert pipelines.images(pipe, kind).equal(before)
    assert pipelines.images(pipe, kind).equal(before)
    pipe.remove_all_hooks()


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_vae_in_slices_and_tiles(tokens: Any, family: str, kind: str) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)

    def put_on(pipe: Any) -> None:
        pipe.vae.enable_slicing()
        pipe.vae.enable_tiling()

    def take_off(pipe: Any) -> None:
        pipe.vae.disable_slicing()
        pipe.vae.disable_tiling()

    take_off(pipe)
    leaves_no_trace(pipe, kind, put_on, take_off)


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_to_another_dtype(tokens: Any, family: str, kind: str) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    leaves_no_trace(pipe, kind, lambda pipe: pipe.to(torch.float64))
    assert pipe.unet.dtype == torch.float64


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_a_callback_of_the_users_own(tokens: Any, family: str, kind: str) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    log = Log()
    seen = []

    def callback(given: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert given is pipe
        assert type(given.unet) is diffusers.UNet2DConditionModel
        seen.append((index, int(timestep)))
        if log.lines:  # what it calls of its own is not the pipeline's
            calls = log.lines.count("denoise")
            width = given.unet.config.cross_attention_dim
            options = {}
            if family == "SDXL":
                size = models_projection(given)
                options["added_cond_kwargs"] = {
                    "text_embeds": torch.zeros(1, size),
                    "time_ids": torch.zeros(1, 6),
                }
            given.unet(tensors["latents"], timestep, torch.zeros(1, 4, width), **options)
            assert log.lines.count("denoise") == calls
        return {"latents": tensors["latents"] * 1.1}

    more = {"callback_on_step_end": callback}
    before = pipelines.images(pipe, kind, **more)
    first, seen[:] = list(seen), []
    with sdcore.patch(pipe, log):
        assert pipelines.images(pipe, kind, **more).equal(before)
    assert seen == first
    assert len(seen) == pipelines.STEPS
    leaves_no_trace(pipe, kind, **more)


def models_projection(pipe: Any) -> int:
    return pipe.text_encoder_2.config.projection_dim


class ControlNetCutoff(callbacks.SDCFGCutoffCallback):
    tensor_inputs = ["prompt_embeds", "image"]  # noqa: RUF012

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == self.config.cutoff_step_index:
            callback_kwargs["image"] = callback_kwargs["image"][-1:]
        return super().callback_fn(pipeline, step_index, timestep, callback_kwargs)


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_a_callback_that_ends_guidance(tokens: Any, family: str, kind: str) -> None:
    """The batch goes from two rows to one in mid-run: by position, the prompt's would then count as
    the negative prompt's."""
    cutoff = {
        ("SD", "text-to-image"): callbacks.SDCFGCutoffCallback,
        ("SD", "ControlNet"): ControlNetCutoff,  # Diffusers has none
        ("SDXL", "text-to-image"): callbacks.SDXLCFGCutoffCallback,
        ("SDXL", "ControlNet"): callbacks.SDXLControlnetCFGCutoffCallback,
    }[family, kind](cutoff_step_ratio=None, cutoff_step_index=0)
    pipe = pipelines.pipeline(family, kind, tokens)
    more = {"callback_on_step_end": cutoff}
    leaves_no_trace(pipe, kind, **more)
    see = See(lambda call: (len(call.sample), call.unconditional, call.conditional))
    with sdcore.patch(pipe, see):
        pipelines.images(pipe, kind, **more)
    assert see.calls == [
        (2, slice(0, 1), slice(1, 2)),
        *[(1, None, slice(0, 1))] * (pipelines.STEPS - 1),
    ]


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_prompt_embeds_and_no_text_encoder(tokens: Any, family: str, kind: str) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    names = ["prompt_embeds", "negative_prompt_embeds"]
    if family == "SDXL":
        names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    with torch.no_grad():
        found = pipe.encode_prompt(
            prompt="a star",
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
    more = dict(zip(names, found, strict=False)) | {"prompt": None, "negative_prompt": None}
    for name in ("text_encoder", "text_encoder_2"):
        if hasattr(pipe, name):
            setattr(pipe, name, None)
    leaves_no_trace(pipe, kind, **more)


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_copies_pickles_and_files_are_unpatched(
    tokens: Any, tmp_path: Any, family: str, kind: str
) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    was = dict(pipe.config)
    # Before the first run: Transformers puts hooks on SDXL's text encoders then, which can't be
    # pickled.
    with sdcore.patch(pipe, NoOp()):
        pipe.save_pretrained(tmp_path)
        pickled = pickle.dumps(pipe)
        assert b"sdcore" not in pickled
        others = [
            copy.copy(pipe),
            copy.deepcopy(pipe),
            pickle.loads(pickled),
            type(pipe).from_pretrained(tmp_path),
        ]
        assert dict(pipe.config) | was == dict(pipe.config)  # saving adds the class's name
    # Also before it: a tokenizer's file says how it was called last.
    unpatched = tmp_path / "again"
    files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    pipe.save_pretrained(unpatched)
    before = pipelines.images(pipe, kind)
    for other in others:
        assert type(other) is type(pipe)
        assert patching._patches(other) is None
        other.set_progress_bar_config(disable=True)
        assert pipelines.images(other, kind).equal(before)
    assert {path.relative_to(unpatched) for path in unpatched.rglob("*")} == files
    for path in unpatched.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(unpatched)).read_bytes()


# ---------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(("family", "kind"), EVERY)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["unet", "scheduler", "callback", "method"])
def test_an_error_in_mid_run(
    tokens: Any, monkeypatch: Any, family: str, kind: str, error: type, where: str
) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    before = pipelines.images(pipe, kind)
    was = trace(pipe)
    log = Log()
    calls = []

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error("in mid-run")
        return {}

    class Fail(Method):
        def denoise(self, call, proceed):
            fail()
            return proceed(call)

    handle = sdcore.patch(pipe, log, Fail()) if where == "method" else sdcore.patch(pipe, log)
    with monkeypatch.context() as patched, pytest.raises(error, match="in mid-run"):
        more = {}
        if where == "unet":
            remove = pipe.unet.register_forward_pre_hook(lambda *_: fail() or None)
        elif where == "scheduler":
            real = pipe.scheduler.step
            patched.setattr(
                pipe.scheduler, "step", lambda *a, eta=0.0, **k: fail() or real(*a, eta=eta, **k)
            )
        elif where == "callback":
            more["callback_on_step_end"] = fail
        pipelines.images(pipe, kind, **more)
    if where == "unet":
        remove.remove()
    assert log.lines[-1] == f"end {error.__name__}"
    assert pipelines.images(pipe, kind).equal(before)
    assert log.lines[-1] == "end"
    handle.remove()
    assert log.lines[-1] == "removed"
    if where == "scheduler":
        vars(pipe.scheduler).pop("step", None)
    assert trace(pipe) == was
    assert pipelines.images(pipe, kind).equal(before)


def test_an_error_at_begin(tokens: Any) -> None:
    """What had begun ends; nothing else does."""
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    lines: list[str] = []

    class Fail(Log):
        def begin(self, run):
            raise RuntimeError("at begin")

    sdcore.patch(pipe, Log("a ", lines), Fail("b ", lines), Log("c ", lines))
    with pytest.raises(RuntimeError, match="at begin"):
        pipelines.images(pipe, "text-to-image")
    assert lines == ["a begin", "b end RuntimeError", "a end RuntimeError"]
    sdcore.unpatch(pipe)


def test_errors_at_the_end_are_all_raised_and_all_ends_reached(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    lines: list[str] = []

    class Fail(Log):
        def end(self, run, error):
            raise RuntimeError("at the end")

    sdcore.patch(pipe, Log("a ", lines), Fail("b ", lines))
    with pytest.raises(RuntimeError, match="at the end"):
        pipelines.images(pipe, "text-to-image")
    assert lines[-1] == "a end RuntimeError"
    sdcore.unpatch(pipe)


def test_inference_mode(tokens: Any) -> None:
    class Gradient(Method):
        needs_gradients = True

        def denoise(self, call, proceed):
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                (x * x).sum().backward()
            assert x.grad is not None
            return proceed(call)

    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    before = pipelines.images(pipe, "text-to-image")
    with torch.inference_mode(), sdcore.patch(pipe, NoOp()):
        assert pipelines.images(pipe, "text-to-image").equal(before)
    with sdcore.patch(pipe, Gradient()):
        assert pipelines.images(pipe, "text-to-image").equal(before)
        with (
            torch.inference_mode(),
            pytest.raises(RuntimeError, match=r"Gradient needs gradients, which torch\.inference"),
        ):
            pipelines.images(pipe, "text-to-image")


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ((), ValueError, "at least one method"),
        ((NoOp,), TypeError, r"got the class NoOp; give an object: NoOp\(…\)"),
        (("NoOp",), TypeError, "methods must be objects of sdcore.Method; got 'NoOp'"),
        ((NoOp(), NoOp()), ValueError, "a NoOp is on it already; remove it first"),
    ],
)
def test_what_is_no_method(tokens: Any, methods: tuple, error: type, message: str) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    was = trace(pipe)
    with pytest.raises(error, match=message):
        sdcore.patch(pipe, *methods)
    assert trace(pipe) == was


def test_the_same_method_twice(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    log = Log()
    sdcore.patch(pipe, log)
    with pytest.raises(ValueError, match="this Log is on it already"):
        sdcore.patch(pipe, log)
    sdcore.patch(pipe, Log())  # it is repeatable
    with sdcore.patch(pipe, NoOp()), pytest.raises(ValueError, match="a NoOp is on it"):
        sdcore.patch(pipe, NoOp())
    sdcore.patch(pipe, NoOp())
    sdcore.unpatch(pipe)
    sdcore.unpatch(pipe)


def test_a_method_that_refuses_leaves_the_pipeline_as_it_was(tokens: Any) -> None:
    class Refuse(Method):
        def check(self, pipe):
            raise TypeError("not this one")

    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    was = trace(pipe)
    with pytest.raises(TypeError, match="not this one"):
        sdcore.patch(pipe, NoOp(), Refuse())
    assert trace(pipe) == was
    assert patching._patches(pipe) is None


def test_what_is_no_pipeline_of_ours(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    with pytest.raises(TypeError, match="DDIMScheduler can't be patched: it has no unet"):
        sdcore.patch(pipe.scheduler, NoOp())
    with pytest.raises(TypeError, match="NoOp works on pipelines, and not on a bare UNet2D"):
        sdcore.patch(pipe.unet, NoOp())
    with pytest.raises(TypeError, match="neither a pipeline nor a model of Diffusers"):
        sdcore.patch(nn.Linear(2, 2), NoOp())
    with pytest.raises(TypeError, match="no unet, no do_classifier_free_guidance"):
        sdcore.patch(diffusers.FluxPipeline(pipe.scheduler, pipe.vae, *[None] * 5), NoOp())
    pag = diffusers.StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(TypeError, match="with pag_scale its UNet gets three rows"):
        sdcore.patch(pag, NoOp())
    flow = pipelines.pipeline("SD", "text-to-image", tokens)
    flow.unet = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="no encoder_hidden_states among the arguments of unet"):
        sdcore.patch(flow, NoOp())


# ---------------------------------------------------------------------------------------------
# Order, and who sees what


def test_the_last_lies_around_the_others(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    lines: list[str] = []
    first = sdcore.patch(pipe, Log("a ", lines), Log("b ", lines))
    sdcore.patch(pipe, Log("c ", lines))
    pipelines.images(pipe, "text-to-image")
    calls = [f"{name} denoise" for name in "cba"] + [f"{name} denoised" for name in "abc"]
    steps = [f"{name} step" for name in "cba"]
    assert lines == [
        *(f"{name} begin" for name in "abc"),
        *(calls + steps) * pipelines.STEPS,
        *(f"{name} decode" for name in "cba"),
        *(f"{name} end" for name in "cba"),
    ]
    lines.clear()
    first.remove()
    first.remove()
    assert lines == ["b removed", "a removed"]
    pipelines.images(pipe, "text-to-image")
    assert {line[0] for line in lines[2:]} == {"c"}
    sdcore.unpatch(pipe)
    assert type(pipe) is diffusers.StableDiffusionPipeline


def test_removal_in_mid_run_waits_for_its_end(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    log = Log()
    handle = sdcore.patch(pipe, log)

    def callback(given: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        handle.remove()
        return {}

    pipelines.images(pipe, "text-to-image", callback_on_step_end=callback)
    assert log.lines.count("denoise") == pipelines.STEPS
    assert log.lines[-2:] == ["end", "removed"]
    assert type(pipe) is diffusers.StableDiffusionPipeline
    pipelines.images(pipe, "text-to-image")
    assert log.lines[-1] == "removed"


def test_a_method_that_is_put_on_again_in_mid_run(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    log = Log()
    handles = [sdcore.patch(pipe, log)]

    def callback(given: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 0:
            handles[0].remove()
            handles.append(sdcore.patch(pipe, log))
        return {}

    pipelines.images(pipe, "text-to-image", callback_on_step_end=callback)
    assert log.lines[-1] == "end"
    handles[0].remove()  # an old handle does nothing to what came after
    assert patching._patches(pipe) is not None
    handles[1].remove()
    assert log.lines[-1] == "removed"
    assert type(pipe) is diffusers.StableDiffusionPipeline


def test_what_is_called_a_callback_in_the_users_own_dictionary_stays(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    given = {"callback": print}
    with sdcore.patch(pipe, Log()):
        pipelines.images(pipe, "text-to-image", cross_attention_kwargs=given)
    assert given == {"callback": print}


def test_callbacks_of_the_old_kind(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    log = Log()

    def callback(index: int, timestep: Any, latents: Tensor) -> None:
        assert type(pipe.unet) is diffusers.UNet2DConditionModel
        pipe.vae.decode(latents)

    with sdcore.patch(pipe, log), pytest.warns(FutureWarning, match="callback"):
        pipelines.images(pipe, "text-to-image", callback=callback, callback_steps=1)
    assert log.lines.count("decode") == 1


def test_a_pipeline_that_holds_itself_is_copied(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    pipe.helper = pipe.encode_prompt
    with sdcore.patch(pipe, NoOp()):
        other = copy.deepcopy(pipe)
    assert other.helper.__self__ is other
    assert type(other) is diffusers.StableDiffusionPipeline


def test_siblings_direct_calls_and_other_threads_see_nothing(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    before = pipelines.images(pipe, "text-to-image")
    log = Log()
    sdcore.patch(pipe, log)
    siblings = [
        diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe),
        diffusers.AutoPipelineForImage2Image.from_pipe(pipe),
        type(pipe).from_pipe(pipe),
    ]
    width = pipe.unet.config.cross_attention_dim
    sample = torch.zeros(1, 4, 16, 16)
    with torch.no_grad():
        pipe.unet(sample, 0, torch.zeros(1, 3, width))
        pipe.scheduler.set_timesteps(2)
        pipe.scheduler.step(sample, pipe.scheduler.timesteps[0], sample)
        pipe.vae.decode(sample)
    for sibling in siblings:
        assert sibling.unet is pipe.unet
        sibling.set_progress_bar_config(disable=True)
    pipelines.images(siblings[0], "image-to-image")
    pipelines.images(siblings[1], "image-to-image")
    assert type(siblings[2]) is diffusers.StableDiffusionPipeline
    assert pipelines.images(siblings[2], "text-to-image").equal(before)
    assert log.lines == []

    seen = []

    class Thread(Method):
        """While the pipeline is within a run, another thread uses its UNet."""

        def denoise(self, call, proceed):
            return proceed(call)

    def elsewhere() -> None:
        seen.append(type(pipe.unet))
        with torch.no_grad():
            pipe.unet(sample, 0, torch.zeros(1, 3, width))

    def callback(given: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return {}

    hook = pipe.unet.register_forward_pre_hook(
        lambda *_: seen.append(threading.current_thread() is threading.main_thread())
    )
    pipelines.images(pipe, "text-to-image", callback_on_step_end=callback)
    hook.remove()
    assert seen.count(diffusers.UNet2DConditionModel) == pipelines.STEPS
    assert seen.count(False) == pipelines.STEPS
    assert log.lines.count("denoise") == pipelines.STEPS
    sdcore.unpatch(pipe)


def test_two_threads_run_one_pipeline(tokens: Any) -> None:
    """Each run has its own state. Their schedulers would get in each other's way, so that they
    take turns: one waits within its run for the other's."""
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    runs, counts = [], []

    class Nested(Method):
        def denoise(self, call, proceed):
            state = call.run.of(self)
            state.calls = getattr(state, "calls", 0) + 1
            if call.index == pipelines.STEPS - 1 and not runs:
                runs.append(call.run)
                thread = threading.Thread(target=pipelines.images, args=(pipe, "text-to-image"))
                thread.start()
                thread.join()
            elif call.index == pipelines.STEPS - 1:
                runs.append(call.run)
            counts.append(state.calls - call.index)
            return proceed(call)

    with sdcore.patch(pipe, Nested()):
        pipe.scheduler.set_timesteps(pipelines.STEPS)
        pipelines.images(pipe, "text-to-image")
    assert len(runs) == 2
    assert runs[0] is not runs[1]
    assert counts == [1] * (2 * pipelines.STEPS)


def test_a_pipeline_within_a_pipeline(tokens: Any) -> None:
    inner = pipelines.pipeline("SD", "text-to-image", tokens)
    outer = pipelines.pipeline("SD", "text-to-image", tokens)
    lines: list[str] = []

    class Nest(Method):
        def decode(self, run, latents, proceed):
            lines.append("outer")
            pipelines.images(inner, "text-to-image")
            return proceed(latents)

    with sdcore.patch(inner, Log("inner ", lines)), sdcore.patch(outer, Nest()):
        pipelines.images(outer, "text-to-image")
    assert lines[0] == "outer"
    assert lines.count("inner denoise") == pipelines.STEPS


def test_nothing_holds_a_pipeline(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    see = See()  # which keeps calls, and with them their runs
    handle = sdcore.patch(pipe, see)
    pipelines.images(pipe, "text-to-image")
    there = weakref.ref(pipe)
    del pipe, handle, see
    gc.collect()
    assert there() is None


# ---------------------------------------------------------------------------------------------
# What a method is given


@pytest.mark.parametrize(("family", "kind"), [*EVERY, *OTHERS])
def test_a_call(tokens: Any, family: str, kind: str) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    see = See(lambda call: (call, call.latents, call.alpha, call.sigma, call.progress, call.index))
    with sdcore.patch(pipe, see):
        pipelines.images(pipe, kind, num_images_per_prompt=2)
    assert see.calls[0][0].run.arguments["negative_prompt"] == "a star"
    products = pipe.scheduler.alphas_cumprod
    for number, (call, latents, alpha, sigma, progress, index) in enumerate(see.calls):
        assert len(call.sample) == 4
        assert latents.equal(call.sample[:2])
        assert latents.equal(call.sample[2:])  # both prompts see the same latents
        assert latents.equal(see.steps[number].sample)
        assert call.unconditional == slice(0, 2)
        assert call.conditional == slice(2, 4)
        assert alpha.square().item() == pytest.approx(products[call.timestep].item(), rel=1e-5)
        assert sigma.square().item() == pytest.approx(1 - products[call.timestep].item(), rel=1e-5)
        assert index == number
        assert progress == pytest.approx(number / len(see.calls))
        residuals = "down_block_additional_residuals" in call.options
        assert residuals == (kind == "ControlNet")
        assert ("text_embeds" in (call.options.get("added_cond_kwargs") or {})) == (
            family == "SDXL"
        )


def test_noise_levels_at_the_edges(tokens: Any) -> None:
    """No signal at the first step; another timestep than the step's; before and after its step."""
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    config = pipe.scheduler.config
    levels: list[tuple[float, ...]] = []

    class Level(Method):
        def denoise(self, call, proceed):
            other = replace(call, timestep=torch.tensor(10))
            levels.append((call.sigma.item(), other.sigma.item(), call.sigma.item()))
            assert other.alpha.square().item() == pytest.approx(
                call.run.scheduler.alphas_cumprod[10].item(), rel=1e-4
            )
            return proceed(call)

        def step(self, step, proceed):
            before = step.run.noise_level(step.timestep)
            out = proceed(step)
            assert step.run.noise_level(step.timestep) == before
            return out

    for kind in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler):
        options = {"timestep_spacing": "trailing"}
        if kind is diffusers.DDIMScheduler:
            options["rescale_betas_zero_snr"] = True
        pipe.scheduler = kind.from_config(config, **options)
        levels.clear()
        with sdcore.patch(pipe, Level()):
            pipelines.images(pipe, "text-to-image")
        first = [one[0] for one in levels]
        assert first == sorted(first, reverse=True) and len(set(first)) == pipelines.STEPS
        assert all(one[0] == one[2] != one[1] for one in levels)
        if kind is diffusers.DDIMScheduler:
            assert first[0] == 1
    for scheduler in (
        diffusers.EDMEulerScheduler(),
        diffusers.DPMSolverMultistepScheduler.from_config(config, use_flow_sigmas=True),
    ):
        pipe.scheduler = scheduler
        with (
            sdcore.patch(pipe, Level()),
            pytest.raises(
                ValueError, match=r"the noise level is not known: .* has (sigma_d|use_f)"
            ),
        ):
            pipelines.images(pipe, "text-to-image")


SCHEDULERS = sorted(patching.FOLLOWS_SAMPLE)
OTHER_SCHEDULERS = [
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverSinglestepScheduler",
]
# As Stable Diffusion has it: with three steps it has no others.
MORE = {"PNDMScheduler": {"skip_prk_steps": True}}


@pytest.mark.parametrize("name", [*SCHEDULERS, *OTHER_SCHEDULERS])
@pytest.mark.parametrize("karras", [False, True])
def test_noise_level(tokens: Any, name: str, karras: bool) -> None:
    """By noising latents as the scheduler does: what its step would take for clean ones."""
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    kind = getattr(diffusers, name)
    options = MORE.get(name, {})
    if karras:
        if "use_karras_sigmas" not in inspect.signature(kind).parameters:
            pytest.skip(f"{name} has no such option")
        options = options | {"use_karras_sigmas": True}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    levels = []

    class Level(Method):
        def denoise(self, call, proceed):
            scheduler = call.run.scheduler
            clean = torch.full_like(call.latents, 2.0)
            noise = torch.full_like(clean, 3.0)
            at = torch.as_tensor(call.timestep).reshape(1)
            # A fresh one, which does not know of the run, takes the timestep for what it is.
            fresh = kind.from_config(scheduler.config)
            fresh.set_timesteps(pipelines.STEPS)
            noisy = fresh.add_noise(clean, noise, at)
            if scheduler.scale_model_input(noisy, call.timestep) is not noisy:
                noisy = noisy * call.alpha
            expected = 2 * call.alpha + 3 * call.sigma
            levels.append(
                (expected.item(), noisy.mean().item(), (call.alpha**2 + call.sigma**2).item())
            )
            return proceed(call)

    with sdcore.patch(pipe, Level()):
        pipelines.images(pipe, "text-to-image")
    assert levels
    interpolated = name.startswith("KDPM2")  # between two steps it has no level of add_noise
    for found, wanted, one in levels:
        assert one == pytest.approx(1, abs=1e-5)
        if not interpolated:
            assert found == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_a_moved_sample(tokens: Any, family: str, kind: str, name: str) -> None:
    """The denoiser and the scheduler's step get the same sample, moved."""
    pipe = pipelines.pipeline(family, kind, tokens)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    plain = pipelines.images(pipe, kind, output_type="latent")
    given = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    see = See(lambda call: (call.latents, call.sample))
    outer = See(lambda call: (call.latents, call.sample, call.alpha))
    outer_class = type("Outer", (See,), {})
    outer = outer_class(outer.look)
    with sdcore.patch(pipe, see, Add(0.25), outer):
        moved = pipelines.images(pipe, kind, output_type="latent")
    hook.remove()
    assert not moved.allclose(plain, atol=1e-3)
    assert len(given) == len(see.calls) == len(outer.calls) > 0
    exploding = name.startswith(("Euler", "LMS"))
    for number, (latents, sample, alpha) in enumerate(outer.calls):
        assert see.calls[number][1].equal(given[number])
        assert given[number].allclose(sample + 0.25, atol=1e-6)
        by = 0.25 / alpha if exploding else 0.25
        assert see.steps[number].sample.allclose(latents + by, rtol=1e-5, atol=1e-5)
        # Scaled, what the scheduler steps from is what the UNet was given.
        scaled = see.steps[number].sample * (alpha if exploding else 1)
        assert scaled.allclose(given[number][: len(scaled)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*SCHEDULERS, *OTHER_SCHEDULERS])
def test_which_schedulers_follow_a_move(tokens: Any, name: str) -> None:
    """Measured: at each call, how far the step's result moves with its sample. Those that lose a
    part of it are refused by name."""
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    kind = getattr(diffusers, name)
    scheduler = kind.from_config(pipe.scheduler.config, **MORE.get(name, {}))
    scheduler.set_timesteps(8)
    follows, sigmas = [], getattr(scheduler, "sigmas", None)
    seeded = "generator" in inspect.signature(scheduler.step).parameters
    for timestep in scheduler.timesteps:
        results = []
        for by in (0.0, 0.5):
            trial = copy.deepcopy(scheduler)
            options = {"generator": torch.Generator().manual_seed(0)} if seeded else {}
            sample = torch.full((1, 4, 2, 2), 2.0)
            trial.scale_model_input(sample, timestep)
            results.append(
                trial.step(
                    torch.full_like(sample, 0.3), timestep, sample + by, **options
                ).prev_sample
            )
        sample = torch.full((1, 4, 2, 2), 2.0)
        scheduler.scale_model_input(sample, timestep)
        scheduler.step(torch.full_like(sample, 0.3), timestep, sample, **options)
        follows.append((results[1] - results[0]).mean().item() / 0.5)
    # Without noise a step's derivative to its sample is alpha_next / alpha, at least 1; or exactly
    # 1 for exploding variance.
    full = min(follows) > 0.999
    assert full == (name in patching.FOLLOWS_SAMPLE), (follows, sigmas)
    pipe.scheduler = scheduler
    with sdcore.patch(pipe, Add(0.1)):
        if full:
            pipelines.images(pipe, "text-to-image")
        else:
            with pytest.raises(ValueError, match=f"Add moves the sample, which steps of {name}"):
                pipelines.images(pipe, "text-to-image")
    with sdcore.patch(pipe, NoOp()):  # moving nothing, all will do
        pipelines.images(pipe, "text-to-image")


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_a_call_of_the_prompt_alone(tokens: Any, family: str, kind: str) -> None:
    """Of all that has rows, the prompt's; and of nothing else."""
    pipe = pipelines.pipeline(family, kind, tokens)
    seen: list[Any] = []

    class Look(Method):
        def denoise(self, call, proceed):
            alone = call.of_prompt()
            seen.append((call, alone))
            both, one = proceed(call), proceed(alone)
            torch.testing.assert_close(one, both[call.conditional], rtol=1e-4, atol=1e-5)
            assert alone.of_prompt() is alone
            assert alone.latents.equal(call.latents)
            assert alone.moved(torch.zeros_like(call.latents)).prompt_alone
            return both

    with sdcore.patch(pipe, Look()):
        pipelines.images(pipe, kind, num_images_per_prompt=3)
    assert len(seen) == pipelines.STEPS
    for call, alone in seen:
        assert (call.unconditional, alone.unconditional) == (slice(0, 3), None)
        assert alone.conditional == slice(0, 3)
        assert alone.sample.equal(call.sample[3:])
        assert alone.encoder_hidden_states.equal(call.encoder_hidden_states[3:])
        assert alone.timestep is call.timestep
        assert alone.options.keys() == call.options.keys()


def test_a_move_of_another_shape(tokens: Any) -> None:
    class Wrong(Method):
        moves_sample = True

        def denoise(self, call, proceed):
            return proceed(call.moved(torch.zeros(2, 4, 16, 16)))

    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    with (
        sdcore.patch(pipe, Wrong()),
        pytest.raises(ValueError, match=r"by must have the latents' shape \(1, 4, 16, 16\)"),
    ):
        pipelines.images(pipe, "text-to-image")


def test_moves_add_up_and_the_last_call_counts(tokens: Any) -> None:
    class Twice(Method):
        moves_sample = True

        def denoise(self, call, proceed):
            by = torch.full_like(call.latents, 0.5)
            proceed(call.moved(by))  # tried, and not used
            return proceed(call.moved(by / 2).moved(-by))

    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    see = See(lambda call: call.latents)
    with sdcore.patch(pipe, see, Twice()):
        pipelines.images(pipe, "text-to-image")
    assert len(see.calls) == 2 * pipelines.STEPS
    for latents, step in zip(see.calls[1::2], see.steps, strict=True):
        assert step.sample.allclose(latents - 0.25, atol=1e-6)


def test_a_method_changes_what_passes_through(tokens: Any) -> None:
    """Prediction, next sample and picture are what the methods make of them."""

    class Change(Method):
        def denoise(self, call, proceed):
            return 0 * proceed(call)

        def step(self, step, proceed):
            assert not step.model_output.any()
            return proceed(step) + 1

        def decode(self, run, latents, proceed):
            return torch.ones_like(proceed(latents))

    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    see = See(lambda call: call.latents)
    with sdcore.patch(pipe, see, Change()):
        pictures = pipelines.images(pipe, "text-to-image")
    assert pictures.equal(torch.ones_like(pictures))
    alphas = pipe.scheduler.alphas_cumprod
    # Of training's timesteps; DDIM steps so far, wherever the next one is after rounding.
    far = pipe.scheduler.config.num_train_timesteps // pipe.scheduler.num_inference_steps
    for before, after in zip(see.steps, see.steps[1:], strict=False):
        ratio = alphas[before.timestep - far] / alphas[before.timestep]
        assert after.sample.allclose(before.sample * ratio.sqrt() + 1, atol=1e-4)
