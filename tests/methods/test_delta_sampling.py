from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sdcore
from sdcore import Control, DeltaSampling, LoRA, embedded
from sdcore.embedded import FOLDER
from sdcore.methods import delta_sampling
from tests.pipelines import outline

INK = FOLDER / "v1-ink" / "pytorch_lora_weights.safetensors"
SIDE, STEPS, SCALE = 64, 4, 4.0
SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "PNDMScheduler",
)
PROMPTS = ["a red circle left of a blue square", "a green star"]


def loaded(*names: str, **options: Any) -> dict[str, Any]:
    found = {name: embedded.load(name, **options) for name in names}
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return loaded("v1", "v2", "xl", "v1-edge")


@pytest.fixture(scope="module")
def in_double() -> dict[str, Any]:
    return loaded("v1", "v2", "xl", dtype=torch.float64)


def with_parts(pipe: Any, **parts: Any) -> Any:
    """Another pipeline of the same modules."""
    other = copy.copy(pipe)
    for name, part in parts.items():
        setattr(other, name, part)
    return other


def scheduled(pipe: Any, name: str = "DDIMScheduler", **more: Any) -> Any:
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **more)
    return with_parts(pipe, scheduler=scheduler)


def images(pipe: Any, **more: Any) -> Tensor:
    options = {
        "prompt": PROMPTS, "num_inference_steps": STEPS, "guidance_scale": SCALE, "height": SIDE,
        "width": SIDE, "generator": torch.Generator().manual_seed(0), "output_type": "latent",
    }  # fmt: skip
    return pipe(**options | more).images


def carried(pipe: Any, *given: Any, **more: Any) -> Tensor:
    options = more.pop("options", {})
    with sdcore.patch(pipe, DeltaSampling(*given, **more)):
        return images(pipe, **options)


def changed(pipe: Any, by: float = 0.02) -> Any:
    """The same pipeline with another UNet: a fine-tune."""
    unet = copy.deepcopy(pipe.unet)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += by * parameter.abs().mean() * torch.randn_like(parameter)
    return with_parts(pipe, unet=unet)


# ---------------------------------------------------------------------------------------------
# What must hold


@pytest.mark.parametrize("target", ["v1", "v2"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_strength_or_difference_the_target_stays(
    models: dict[str, Any], name: str, target: str
) -> None:
    """Bit for bit, also where the legs predict other things than the target."""
    pipe, source = scheduled(models[target], name), models["v1" if target == "v2" else "v2"]
    plain = images(pipe)
    adapted = changed(source)
    assert torch.equal(carried(pipe, source, adapted, strength=0), plain)
    assert torch.equal(carried(pipe, source, source), plain)
    assert torch.equal(carried(pipe, source, with_parts(source).unet, strength=1.7), plain)
    assert not torch.equal(carried(pipe, source, adapted), plain)
    assert torch.equal(images(pipe), plain)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_from_the_target_itself_it_is_the_adapted_model(models: dict[str, Any], name: str) -> None:
    for base in ("v1", "v2"):
        pipe = scheduled(models[base], name)
        adapted = changed(pipe)
        torch.testing.assert_close(
            carried(pipe, pipe, adapted), images(adapted), rtol=1e-3, atol=1e-3
        )


def clean(kind: str, prediction: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    if kind == "epsilon":
        return (x - sigma * prediction) / alpha
    return alpha * x - sigma * prediction


def said(kind: str, x0: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (x - alpha * x0) / sigma if kind == "epsilon" else (alpha * x - x0) / sigma


def noise_of(pipe: Any) -> Tensor:
    side = SIDE // pipe.vae_scale_factor
    return torch.randn(2, pipe.unet.config.in_channels, side, side, dtype=torch.float64)


@torch.no_grad()
def released(target: Any, source: Any, adapted: Any, noise: Tensor, strength: float) -> Tensor:
    """As published: clean latents of guided predictions, in the autoencoders' units, from a state
    of its own in each latent space, each stepped on by a scheduler of its own."""
    pipes = (target, source, adapted)
    scales = [pipe.vae.config.scaling_factor for pipe in pipes]
    kinds = [pipe.scheduler.config.prediction_type for pipe in pipes]
    steppers = [copy.deepcopy(target.scheduler) for _ in range(2)]
    texts = []
    for pipe in pipes:
        found = pipe.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        added = None
        if len(found) > 2:
            ids = torch.tensor([(SIDE, SIDE, 0, 0, SIDE, SIDE)] * 4).double()
            added = {"text_embeds": torch.cat([found[3], found[2]]), "time_ids": ids}
        texts.append((torch.cat([found[1], found[0]]), added))
    for stepper in steppers:
        stepper.set_timesteps(STEPS)
    states = [noise * steppers[0].init_noise_sigma for _ in range(2)]
    table = source.scheduler.alphas_cumprod
    for number, t in enumerate(steppers[0].timesteps):
        inputs = [
            stepper.scale_model_input(state, t)
            for stepper, state in zip(steppers, states, strict=True)
        ]
        if hasattr(steppers[0], "sigmas") and len(steppers[0].sigmas) == STEPS + 1:
            s = steppers[0].sigmas[number]
            alpha, sigma = 1 / (1 + s * s).sqrt(), s / (1 + s * s).sqrt()
        else:
            product = steppers[0].alphas_cumprod[t]
            alpha, sigma = product.sqrt(), (1 - product).sqrt()
        level = ((1 - table) / table).log() / 2
        nearest = (level - (sigma / alpha).log()).abs().argmin()
        found = []
        for which, pipe in enumerate(pipes):
            x = inputs[min(which, 1)]
            context, added = texts[which]
            same = torch.equal(pipe.scheduler.alphas_cumprod, target.scheduler.alphas_cumprod)
            out = pipe.unet(
                torch.cat([x, x]), t if same else nearest, encoder_hidden_states=context,
                added_cond_kwargs=added,
            ).sample  # fmt: skip
            u, c = out.chunk(2)
            x0 = clean(kinds[which], u + SCALE * (c - u), x, alpha, sigma)
            found.append(x0 / scales[which])
        z = found[0] + strength * (found[2] - found[1])
        states = [
            stepper.step(said(kinds[0], z * scale, x, alpha, sigma), t, state).prev_sample
            for stepper, state, x, scale in zip(steppers, states, inputs, scales, strict=False)
        ]
    return states[0]


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
@pytest.mark.parametrize(
    ("target", "source"), [("v1", "v2"), ("v2", "v1"), ("v1", "xl"), ("xl", "v2")]
)
def test_is_the_released_formulation(
    in_double: dict[str, Any], target: str, source: str, name: str
) -> None:
    """Also with latents of another scale, for which that keeps a second state. In float64, as the
    models enlarge roundings; noise levels have those of float32."""
    pipe = scheduled(in_double[target], name)
    adapted, noise = changed(in_double[source]), noise_of(pipe)
    wanted = released(pipe, in_double[source], adapted, noise, 0.8)
    options = {"latents": noise}
    ours = carried(pipe, in_double[source], adapted, strength=0.8, options=options)
    assert (ours - images(pipe, latents=noise)).abs().max() > 1e-2
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# What adapted may be


def test_a_lora(models: dict[str, Any]) -> None:
    """By file, folder, state dict and as a loaded pipeline; its scale is that of its layers."""
    pipe, source = models["v2"], models["v1"]
    before = {name: one.clone() for name, one in source.unet.state_dict().items()}
    ink = embedded.load("v1-ink")
    wanted = carried(pipe, source, ink)
    for given in (INK, str(INK.parent), LoRA(load_file(INK)), [LoRA(INK)]):
        torch.testing.assert_close(carried(pipe, source, given), wanted, rtol=1e-3, atol=1e-3)
    ink.set_adapters(ink.get_active_adapters(), 0.5)
    torch.testing.assert_close(
        carried(pipe, source, LoRA(INK, scale=0.5)), carried(pipe, source, ink),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip
    after = source.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(one, after[name]) for name, one in before.items())


def text_lora(pipe: Any, folder: Any) -> None:
    """A LoRA of the text encoder and the UNet."""
    from peft import LoraConfig, get_peft_model_state_dict

    states = {}
    for name, targets in (("unet", ["to_q"]), ("text_encoder", ["q_proj"])):
        part = copy.deepcopy(getattr(pipe, name))
        part.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        states[name] = get_peft_model_state_dict(part)
    pipe.save_lora_weights(
        folder, unet_lora_layers=states["unet"], text_encoder_lora_layers=states["text_encoder"]
    )


def test_a_lora_of_the_text_encoder(
    models: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Transformers 5.24 asks for a PEFT newer than the newest, 0.21.2.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    pipe, source = models["v2"], models["v1"]
    text_lora(source, tmp_path)
    loaded = embedded.load("v1")
    loaded.load_lora_weights(tmp_path)
    before = images(source)
    torch.testing.assert_close(
        carried(pipe, source, LoRA(tmp_path)), carried(pipe, source, loaded), rtol=1e-3, atol=1e-3
    )
    assert torch.equal(images(source), before)


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "apart"])
def test_a_control(models: dict[str, Any], shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its own base it is the ControlNet's pipeline; and computing the first layers once changes
    nothing."""
    edge = models["v1-edge"]
    control = Control(edge.controlnet, outline(), scale=0.8)
    if not shares:
        monkeypatch.setattr(delta_sampling, "_shareable", lambda unet: False)
    wanted = images(edge, image=outline(), controlnet_conditioning_scale=0.8)
    torch.testing.assert_close(
        carried(models["v1"], models["v1"], control), wanted, rtol=1e-3, atol=1e-3
    )
    other = carried(models["v2"], models["v1"], control)
    assert not torch.equal(other, images(models["v2"]))
    late = carried(models["v2"], models["v1"], Control(edge.controlnet, outline(), start=0.5))
    assert not torch.equal(late, other)


def test_the_first_layers_are_computed_once(models: dict[str, Any]) -> None:
    unet = models["v1"].unet
    counts = {"first": 0, "last": 0}
    hooks = [
        part.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
        for name, part in (("first", unet.down_blocks[0]), ("last", unet.up_blocks[-1]))
    ]
    control = Control(models["v1-edge"].controlnet, outline())
    keys = list(dict(unet.named_modules()))
    try:
        together = carried(models["v2"], models["v1"], control)
        assert counts == {"first": STEPS, "last": 2 * STEPS}
        carried(models["v2"], models["v1"], control, adapted_prompt="a yellow ring")
        assert counts["first"] == 3 * STEPS
    finally:
        for hook in hooks:
            hook.remove()
    assert list(dict(unet.named_modules())) == keys
    apart = [models["v1"], Control(models["v1-edge"].controlnet, outline())]
    assert torch.equal(carried(models["v2"], *apart), together)


def test_a_lora_and_a_control(models: dict[str, Any]) -> None:
    edge = with_parts(models["v1-edge"])
    ink = embedded.load("v1-ink")
    edge.unet = ink.unet
    several = [LoRA(INK), Control(edge.controlnet, outline())]
    torch.testing.assert_close(
        carried(models["v1"], models["v1"], several), images(edge, image=outline()),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip


def test_folders(models: dict[str, Any]) -> None:
    control = Control(str(FOLDER / "v1-edge"), outline())
    wanted = carried(models["v2"], models["v1"], Control(models["v1-edge"].controlnet, outline()))
    assert torch.equal(carried(models["v2"], str(FOLDER / "v1"), control), wanted)


# ---------------------------------------------------------------------------------------------
# How it is used


def test_prompts_of_its_own(models: dict[str, Any]) -> None:
    pipe, source = models["v2"], models["v1"]
    adapted = changed(source)
    plain = carried(pipe, source, adapted)
    same = carried(pipe, source, adapted, prompt=PROMPTS, adapted_prompt=tuple(PROMPTS))
    assert torch.equal(same, plain)
    assert not torch.equal(carried(pipe, source, source, adapted_prompt="a ring"), images(pipe))
    found = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    embeds = {"prompt": None, "prompt_embeds": found[0], "negative_prompt_embeds": found[1]}
    assert torch.equal(carried(pipe, source, adapted, prompt=PROMPTS, options=embeds), plain)
    with pytest.raises(ValueError, match="give DeltaSampling\\(prompt"):
        carried(pipe, source, adapted, options=embeds)
    with pytest.raises(ValueError, match="one for each picture; got 3 for 2"):
        carried(pipe, source, adapted, prompt=["a", "b", "c"])
    assert type(pipe) is diffusers.StableDiffusionPipeline


def test_pictures_of_a_prompt_and_no_guidance(models: dict[str, Any]) -> None:
    pipe, source = scheduled(models["v1"]), models["v2"]
    adapted = changed(source)
    for options in ({"num_images_per_prompt": 2}, {"guidance_scale": 1.0},
                    {"negative_prompt": ["a star", "a ring"]}):  # fmt: skip
        own = carried(pipe, pipe, changed(pipe), options=options)
        torch.testing.assert_close(own, images(changed(pipe), **options), rtol=1e-3, atol=1e-3)
        assert len(carried(pipe, source, adapted, options=options)) == len(own)


def test_guidance_that_ends_in_mid_run(models: dict[str, Any]) -> None:
    from diffusers.callbacks import SDCFGCutoffCallback

    pipe = scheduled(models["v1"])
    callback = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5)}
    callback |= {"prompt": PROMPTS[0]}  # it knows of one
    own = carried(pipe, pipe, changed(pipe), options=callback)
    torch.testing.assert_close(own, images(changed(pipe), **callback), rtol=1e-3, atol=1e-3)
    carried(pipe, models["xl"], changed(models["xl"]), options=callback)


@pytest.mark.parametrize("kind", ["image-to-image", "inpainting"])
def test_begun_from_a_picture(models: dict[str, Any], kind: str) -> None:
    name = {"image-to-image": "Img2Img", "inpainting": "Inpaint"}[kind]
    build = getattr(diffusers, f"StableDiffusion{name}Pipeline")
    pipe = build(**models["v1"].components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    options = {"image": outline(), "strength": 0.7, "height": None, "width": None}
    if kind == "inpainting":
        options |= {"mask_image": torch.ones(1, 1, SIDE, SIDE), "height": SIDE, "width": SIDE}
    else:
        del options["height"], options["width"]

    def run(one: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return one(PROMPTS[0], num_inference_steps=5, generator=generator, output_type="latent",
                   **options).images  # fmt: skip

    adapted = changed(pipe)
    with sdcore.patch(pipe, DeltaSampling(pipe, adapted)):
        torch.testing.assert_close(run(pipe), run(adapted), rtol=1e-3, atol=1e-3)
    with (
        sdcore.patch(pipe, DeltaSampling(models["xl"], changed(models["xl"]))),
        pytest.raises(ValueError, match=r"latents of different scales, and .* from a picture"),
    ):
        run(pipe)


def test_models_of_another_dtype(models: dict[str, Any]) -> None:
    old = embedded.load("v1", dtype=torch.float16)
    wanted = carried(models["v2"], models["v1"], INK)
    found = carried(models["v2"], old, INK)
    assert found.dtype == torch.float32
    plain = images(models["v2"])
    assert (found - wanted).norm() < 0.2 * (plain - wanted).norm()
    control = Control(embedded.load("v1-edge", dtype=torch.float16).controlnet, outline())
    carried(models["v2"], old, control)


def test_strength_by_progress_and_a_part_of_the_run(models: dict[str, Any]) -> None:
    pipe, source = models["v1"], models["v2"]
    adapted = changed(source)
    seen = []

    def half(progress: float) -> float:
        seen.append(progress)
        return 1.0 if progress < 0.5 else 0.0

    first = carried(pipe, source, adapted, strength=half)
    assert seen == [0, 0.25, 0.5, 0.75]
    assert torch.equal(carried(pipe, source, adapted, end=0.5), first)
    assert torch.equal(carried(pipe, source, adapted, start=0.5, end=0.5), images(pipe))
    late = carried(pipe, models["xl"], changed(models["xl"]), start=0.5)
    assert not torch.equal(late, images(pipe))


def calls_of(unet: nn.Module, work: Any) -> list[int]:
    """Rows of each call."""
    rows: list[int] = []
    hook = unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        work()
    finally:
        hook.remove()
    return rows


def test_faster_with_another_result(models: dict[str, Any]) -> None:
    pipe, source = models["v1"], models["v2"]
    adapted = changed(source)
    whole = carried(pipe, source, adapted)
    for options, wanted in (
        ({"refresh_every": 2}, [4, 4]),
        ({"guidance_scale": 1}, [2] * STEPS),
        ({"refresh_every": 3, "guidance_scale": 1}, [2, 2]),
        ({"guidance_scale": 2.0}, [4] * STEPS),
        ({}, [4] * STEPS),
    ):
        rows = calls_of(
            source.unet, lambda options=options: carried(pipe, source, adapted, **options)
        )
        assert rows == wanted
    plain = images(pipe)
    for options in ({"refresh_every": 2}, {"guidance_scale": 1}, {"guidance_scale": 2.0}):
        near = carried(pipe, source, adapted, **options)
        assert not torch.equal(near, whole)
        assert (near - whole).norm() < (plain - whole).norm()


@pytest.mark.parametrize("target", ["v1", "v2", "xl"])
def test_a_guidance_of_its_own(models: dict[str, Any], target: str) -> None:
    pipe, source = models[target], models["v2"]
    adapted = changed(source)
    plain = images(pipe)
    for scale, same in (
        (SCALE, {}),
        # One prompt for both branches leaves guidance nothing to do.
        (1, {"prompt": PROMPTS, "negative_prompt": PROMPTS}),
        (1.0, {"guidance_scale": 1}),
    ):
        found = carried(pipe, source, adapted, guidance_scale=scale)
        wanted = carried(pipe, source, adapted, **same)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        assert (found - plain).abs().max() > 0.01
    unguided = {"options": {"guidance_scale": 1.0}}
    found = carried(pipe, source, adapted, guidance_scale=3.0, **unguided)
    assert torch.equal(found, carried(pipe, source, adapted, **unguided))


def test_a_guidance_of_its_own_in_float64(in_double: dict[str, Any]) -> None:
    pipe, source = in_double["v1"], in_double["v2"]
    given = pipe, source, changed(source)
    torch.testing.assert_close(
        carried(*given, guidance_scale=SCALE), carried(*given), rtol=1e-8, atol=1e-8
    )


def test_with_other_methods(models: dict[str, Any]) -> None:
    """Within and around it; and two of it."""
    pipe, source = scheduled(models["v1"]), models["v2"]
    adapted = changed(source)
    alone = carried(pipe, source, adapted)
    observe = sdcore.Observe()
    for methods in ((observe, DeltaSampling(source, adapted)),
                    (DeltaSampling(source, adapted), observe)):  # fmt: skip
        with sdcore.patch(pipe, *methods):
            assert torch.equal(images(pipe), alone)
        assert len(observe.records) == STEPS
    two = DeltaSampling(source, adapted, strength=0.5), DeltaSampling(source, adapted, strength=0.5)
    with sdcore.patch(pipe, *two):
        torch.testing.assert_close(images(pipe), alone, rtol=1e-3, atol=1e-3)


class Moved(sdcore.Method):
    """Moves the sample by a constant."""

    moves_sample = True

    def denoise(self, call: Any, proceed: Any) -> Tensor:
        return proceed(call.moved(torch.full_like(call.latents, 0.05)))


def test_a_move_from_outside_reaches_all_models_and_the_scheduler(models: dict[str, Any]) -> None:
    pipe = scheduled(models["v1"])
    adapted = changed(pipe)
    with sdcore.patch(adapted, Moved()):
        wanted = images(adapted)
    with sdcore.patch(pipe, DeltaSampling(pipe, adapted), Moved()):
        torch.testing.assert_close(images(pipe), wanted, rtol=1e-3, atol=1e-3)


def test_removal_frees_what_it_made(models: dict[str, Any]) -> None:
    pipe, source = models["v2"], models["v1"]
    method = DeltaSampling(source, INK)
    modules = dict(pipe.unet.named_modules())
    handle = sdcore.patch(pipe, method)
    copied = weakref.ref(method._on[pipe].adapted.unet)
    assert copied() is not source.unet
    images(pipe)
    handle.remove()
    gc.collect()
    assert copied() is None and not method._on
    assert dict(pipe.unet.named_modules()) == modules
    with sdcore.patch(pipe, method):
        images(pipe)


def test_one_method_on_two_pipelines(models: dict[str, Any]) -> None:
    adapted = changed(models["v1"])
    method = DeltaSampling(models["v1"], adapted)
    others = [scheduled(models["v2"]), scheduled(models["xl"])]
    wanted = [carried(one, models["v1"], adapted) for one in others]
    with sdcore.patch(others[0], method), sdcore.patch(others[1], method):
        for one, right in zip(others, wanted, strict=True):
            assert torch.equal(images(one), right)


# ---------------------------------------------------------------------------------------------
# Bad input


def test_wrong_arguments(models: dict[str, Any]) -> None:
    v1 = models["v1"]
    for given, options, error, message in (
        ((v1, 3), {}, TypeError, "adapted must be a pipeline, a UNet, a LoRA"),
        ((v1, []), {}, ValueError, "adapted must be something"),
        ((v1, [v1, LoRA(INK)]), {}, TypeError, "one pipeline or UNet, or LoRAs and Controls"),
        ((v1, v1), {"strength": "1"}, TypeError, "strength must be a number or a function"),
        ((v1, v1), {"guidance_scale": "1"}, TypeError, "guidance_scale must be a number"),
        ((v1, v1), {"guidance_scale": True}, TypeError, "guidance_scale must be a number"),
        ((v1, v1), {"start": 0.5, "end": 0.2}, ValueError, "0 ≤ start ≤ end ≤ 1"),
        ((v1, v1), {"refresh_every": 0}, ValueError, "refresh_every must be at least 1"),
        ((v1, v1), {"refresh_every": 1.5}, TypeError, "refresh_every must be an int"),
        ((v1, v1), {"source_scale": 0.0}, ValueError, "source_scale must be above 0"),
    ):
        with pytest.raises(error, match=message):
            DeltaSampling(*given, **options)


def refused(pipe: Any, error: type[Exception], message: str, *given: Any, **options: Any) -> None:
    with pytest.raises(error, match=message):
        sdcore.patch(pipe, DeltaSampling(*given, **options))
    assert type(pipe).__qualname__ and "_sdcore_patches" not in vars(pipe)


def with_config(part: Any, **changes: Any) -> Any:
    other = copy.deepcopy(part)
    other.register_to_config(**changes)
    return other


def test_models_that_do_not_fit(models: dict[str, Any]) -> None:
    v1, v2 = models["v1"], models["v2"]
    other = with_parts(v1, unet=with_config(v1.unet, in_channels=7))
    refused(v2, ValueError, "source must take latents of .* channels", other, other)
    flow = with_parts(v1, scheduler=with_config(v1.scheduler, prediction_type="flow"))
    refused(v2, ValueError, "source must predict one of .*'flow'", flow, v1)
    refused(v2, ValueError, "adapted must predict one of", v1, flow)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.register_to_config(prediction_type="epsilon")
    refused(v2, ValueError, "without alphas_cumprod", with_parts(v1, scheduler=flow), v1)
    meta = with_parts(v1, unet=copy.deepcopy(v1.unet).to("meta"))
    refused(v2, ValueError, "source must be on the pipeline's device, cpu; it is on meta", meta, v1)
    refused(v2, TypeError, "which needs its image", v1, models["v1-edge"])
    refused(v2, TypeError, "source must be a pipeline", v1.unet, v1)
    refused(v2, TypeError, "the model of a Control must be", v1, Control(3, outline()))
    bare = with_parts(v1, vae=None)
    refused(v2, ValueError, "give source_scale", bare, v1)
    scale = v1.vae.config.scaling_factor
    with sdcore.patch(v2, DeltaSampling(bare, v1, source_scale=scale)):
        images(v2)


def test_a_lora_that_does_not_fit(models: dict[str, Any]) -> None:
    state = load_file(INK)
    refused(models["v2"], ValueError, "does not fit the source: unet.", models["v2"], INK)
    key = next(iter(state))
    wrong = {key.replace("down_blocks", "side_blocks"): state[key]}
    refused(models["v2"], ValueError, "side_blocks.* does not have", models["v1"], LoRA(wrong))
    refused(
        models["v2"], ValueError, "no LoRA's; they are unet.x", models["v1"],
        LoRA({"unet.x": torch.zeros(1)}),
    )  # fmt: skip
    refused(models["v2"], ValueError, "the source has LoRAs loaded", embedded.load("v1-ink"), INK)


def test_what_a_run_refuses(models: dict[str, Any]) -> None:
    pipe, xl = models["v2"], models["xl"]
    method = DeltaSampling(models["v1"], models["v1"])
    with sdcore.patch(pipe, method), pytest.raises(ValueError, match="guidance_rescale"):
        images(pipe, guidance_rescale=0.7)
    ancestral = scheduled(pipe, "EulerAncestralDiscreteScheduler")
    with pytest.raises(ValueError, match="different scales, and EulerAncestral"):
        carried(ancestral, xl, xl)
    with pytest.raises(ValueError, match="different scales, and eta"):
        carried(pipe, xl, xl, options={"eta": 0.5})
    sde = scheduled(pipe, "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
    with pytest.raises(ValueError, match="different scales, and DPMSolver"):
        carried(sde, xl, xl)
    several = Control(models["v1-edge"].controlnet, outline().expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match="one for each of 2 pictures; got 3"):
        carried(pipe, models["v1"], several)
    assert type(pipe) is diffusers.StableDiffusionPipeline


def test_a_prediction_that_is_not_finite_is_named(models: dict[str, Any]) -> None:
    adapted = changed(models["v1"])
    calls = []

    def spoil(module: Any, args: Any, out: Any) -> Any:
        calls.append(1)
        return tuple(one * float("nan") for one in out) if len(calls) == 3 else out

    adapted.unet.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match="the adapted model at step 2 is not finite"):
        carried(models["v2"], models["v1"], adapted)


# ---------------------------------------------------------------------------------------------
# On a GPU


@pytest.fixture(scope="module")
def there() -> dict[str, Any]:
    return loaded("v1", "v2", "xl", "v1-edge", device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["v2", "xl", "v1"])
@pytest.mark.parametrize("what", ["LoRA", "Control", "UNet"])
def test_graphs_give_the_same(there: dict[str, Any], target: str, what: str) -> None:
    pipe, source = there[target], there["v1"]
    given = {
        "LoRA": lambda: INK,
        "Control": lambda: Control(there["v1-edge"].controlnet, outline(), end=0.7),
        "UNet": lambda: changed(source).unet,
    }[what]()
    wanted = carried(pipe, source, given, graphs=False)
    method = DeltaSampling(source, given)
    with sdcore.patch(pipe, method):
        for _ in range(2):
            torch.testing.assert_close(images(pipe), wanted, rtol=2e-3, atol=2e-3)
        graphs = method._on[pipe].graphs
        assert graphs.captures == (2 if what == "Control" else 1)
        assert graphs.replays == 2 * STEPS
        single = images(pipe, prompt=PROMPTS[0])
    assert single.isfinite().all() and not graphs._kept


@pytest.mark.gpu
def test_graphs_beside_an_inner_method(there: dict[str, Any]) -> None:
    pipe, source = there["v2"], there["v1"]
    observe, method = sdcore.Observe(), DeltaSampling(source, INK)
    wanted = carried(pipe, source, INK)
    with sdcore.patch(pipe, observe, method):
        torch.testing.assert_close(images(pipe), wanted, rtol=2e-3, atol=2e-3)
        assert method._on[pipe].graphs.replays == STEPS
    assert len(observe.records) == STEPS


@pytest.mark.gpu
def test_it_follows_the_pipeline_to_another_device(there: dict[str, Any]) -> None:
    pipe, source = embedded.load("v2"), embedded.load("v1")
    pipe.set_progress_bar_config(disable=True)
    wanted = {"cpu": carried(pipe, source, INK), "cuda": carried(there["v2"], there["v1"], INK)}
    with sdcore.patch(pipe, DeltaSampling(source, INK)):
        for device in ("cuda", "cpu"):
            pipe.to(device)
            torch.testing.assert_close(images(pipe), wanted[device], rtol=2e-3, atol=2e-3)
            assert source.unet.device.type == device


@pytest.mark.gpu
def test_offloaded(there: dict[str, Any]) -> None:
    wanted = carried(there["v2"], there["v1"], INK, graphs=False)
    pipe, source = embedded.load("v2"), embedded.load("v1")
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload()
    source.enable_model_cpu_offload()
    torch.testing.assert_close(carried(pipe, source, INK), wanted, rtol=2e-3, atol=2e-3)
    assert source.unet.device.type == "cpu"
