"""Guidance by the colors of a reference: the published mathematics, and what a run leaves."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers

import sdcore
from sdcore import images
from sdcore.embedded import load
from sdcore.images import ImageError
from sdcore.methods import color_guidance
from sdcore.methods.color_guidance import ColorGuidance, frozen
from sdcore.ops import clean_latents, random_rotations, sliced_wasserstein
from tests import pipelines

PALETTE = sdcore.Palette.from_colors(["#ff8800", "#220044", "#88ccee"], [3, 1, 2])
FEW = {"inner_steps": 2, "rotations": 3, "seed": 0}


def off(images: Tensor, palette: sdcore.Palette = PALETTE) -> Tensor:
    """Of each picture."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(64, 3, generator=generator), dim=1)
    return sliced_wasserstein(images.flatten(2).mT, palette, directions=directions)


class Kept(sdcore.Method):
    """Each call of the UNet, as it comes in further out than the guidance, and as it gets there."""

    repeatable = True

    def __init__(self) -> None:
        self.samples: list[Tensor] = []
        self.latents: list[Tensor] = []

    def denoise(self, call, proceed):
        self.samples.append(call.sample.detach().clone())
        self.latents.append(call.latents.detach().clone())
        return proceed(call)


# ---------------------------------------------------------------------------------------------
# The mathematics


def published(
    pipe: Any, x: Tensor, text: Tensor, t: Tensor, reference: Tensor, rate: float, steps: int
) -> Tensor:
    """u after the published inner loop in plain PyTorch, without its bootstrap: pictures and
    reference have as many pixels, and are sorted along each axis of each rotation."""
    products = pipe.scheduler.alphas_cumprod[t.long()]
    alpha, sigma = products.sqrt(), (1 - products).sqrt()
    generator = torch.Generator().manual_seed(FEW["seed"])
    u = torch.zeros_like(x)
    drawn = random_rotations(steps * FEW["rotations"], 3, generator=generator)
    for rotations in drawn.split(FEW["rotations"]):
        u = u.detach().requires_grad_()
        said = pipe.unet(x + u, t, text).sample
        if pipe.scheduler.config.prediction_type == "epsilon":
            clean = (x + u - sigma * said) / alpha
        else:
            clean = alpha * (x + u) - sigma * said
        image = pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample
        pixels = (image / 2 + 0.5).clamp(0, 1).flatten(2)[0].T
        loss = torch.zeros(())
        for rotation in rotations:
            ours, theirs = (pixels @ rotation.T).sort(0)[0], (reference @ rotation.T).sort(0)[0]
            loss = loss + (ours - theirs).abs().mean(0).sum() / len(rotations)
        u = u.detach() - rate * torch.autograd.grad(loss, u)[0]
    return u


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_is_the_published_algorithm(tokens: Any, prediction: str) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type=prediction
    )
    reference = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(4))
    outer, inner = Kept(), Kept()
    guidance = ColorGuidance(
        reference, **FEW, loss="exact", schedule="constant", learning_rate=30.0,
        guided_fraction=0.3,
    )  # fmt: skip
    with sdcore.patch(pipe, inner, guidance, outer):
        pipelines.images(pipe, "text-to-image", guidance_scale=3.0)
    x = outer.samples[0][1:]
    text = pipe.encode_prompt(pipelines.options("text-to-image")["prompt"], "cpu", 1, False)[0]
    time = pipe.scheduler.timesteps[0]
    points = sdcore.Palette.from_image(reference).colors
    assert len(points) == 64 * 64
    u = published(pipe, x, text, time, points, 30.0, FEW["inner_steps"])
    assert u.std() > 1e-3
    # Of the guidance's own calls, of the prompt alone, and of the pipeline's.
    assert [len(one) for one in inner.samples] == [1, 1, 2, 2, 2]
    for row in inner.samples[2]:
        torch.testing.assert_close(row - x[0], u[0], rtol=1e-3, atol=1e-3 * float(u.std()))
    assert inner.samples[3].equal(outer.samples[1])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_and_what_it_lies_on(kind: str) -> None:
    clean, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    alpha, sigma = torch.tensor(0.6).double(), torch.tensor(0.8).double()
    x = alpha * clean + sigma * noise
    said = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}[kind]
    found = (
        clean_latents(x, said, alpha, sigma, prediction_type=kind),
        color_guidance._noise(kind, said, x, alpha, sigma),
    )
    for a, b in zip(found, (clean, noise), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("seed", [0, 1])
def test_of_the_unets_gradient_and_without(tokens: Any, seed: int) -> None:
    """A frozen UNet's u is the gradient through the decoder alone, over alpha."""
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    taken: list[Tensor] = []
    options = {"inner_steps": 1, "rotations": 3, "seed": seed, "guided_fraction": 0.3}
    for way in color_guidance.UNET_GRADIENTS:
        inner = Kept()
        guidance = ColorGuidance(PALETTE, **options, unet_gradient=way)
        with sdcore.patch(pipe, inner, guidance):
            pipelines.images(pipe, "text-to-image")
        taken.append(inner.samples[1][:1] - inner.samples[0][:1])
    full, alone = taken
    assert not torch.allclose(full, alone, rtol=0.1)
    # The same direction: predicted noise is small beside x at the first step of random weights.
    assert torch.cosine_similarity(full.flatten(), alone.flatten(), 0) > 0.5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unet_gradient": "frozen"},
        {"loss": "exact"},
        {"loss": "published"},
        {"normalize_gradient": True, "learning_rate": 0.04},
    ],
    ids=str,
)
def test_pictures_come_nearer_to_the_palette(tokens: Any, options: dict[str, Any]) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    before = pipelines.images(pipe, "text-to-image")
    # Of so many rotations that the loss is the distance, and not which of them were drawn.
    options = {"rotations": 32, "seed": 0, "learning_rate": 100.0} | options
    guidance = ColorGuidance(PALETTE, **options)
    with sdcore.patch(pipe, guidance):
        found = pipelines.images(pipe, "text-to-image")
        again = pipelines.images(pipe, "text-to-image")
    assert off(found) < off(before)
    assert found.equal(again)
    assert [len(one) for one in guidance.losses] == [8] * pipelines.STEPS
    assert guidance.losses[0][-1] < guidance.losses[0][0]


def test_decoded_at_half_the_size() -> None:
    """By a trained decoder: of another size, one of random weights shows something else."""
    pipe = load("v2")
    pipe.set_progress_bar_config(disable=True)
    seen: list[tuple[int, ...]] = []
    real = pipe.vae.decoder.conv_in.register_forward_hook(
        lambda module, given, out: seen.append(tuple(given[0].shape[2:]))
    )
    options = {"prompt": "a red circle", "num_inference_steps": 4, "output_type": "pt"}

    def made() -> Tensor:
        return pipe(**options, generator=torch.Generator().manual_seed(0)).images

    before = made()
    with sdcore.patch(pipe, ColorGuidance(PALETTE, **FEW, decode_scale=0.5)):
        found = made()
    real.remove()
    assert off(found) < 0.9 * off(before)
    height, width = seen[0]
    assert seen == [seen[0], *[(height // 2, width // 2)] * 8, seen[0]]


@pytest.mark.parametrize(
    ("family", "kind"), [("SD", "inpainting"), ("SDXL", "ControlNet"), ("SDXL", "text-to-image")]
)
@pytest.mark.parametrize("unet_gradient", color_guidance.UNET_GRADIENTS)
def test_what_a_graph_captures_is_the_same(
    tokens: Any, family: str, kind: str, unet_gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU it is called in place of the graph."""
    pipe = pipelines.pipeline(family, kind, tokens)
    # A small rate: norms and gates are rounded otherwise there, and the gradient is of signs.
    options = {**FEW, "unet_gradient": unet_gradient, "learning_rate": 2.0}
    with sdcore.patch(pipe, ColorGuidance([PALETTE, PALETTE], **options)):
        wanted = pipelines.images(pipe, kind, num_images_per_prompt=2)
    calls = {"moved_on": 0, "predicted": 0}

    def count(name: str) -> Any:
        real = getattr(color_guidance._Graphs, name)

        def counted(self, *args):
            calls[name] += 1
            return real(self, *args)

        return counted

    for name in calls:
        monkeypatch.setattr(color_guidance._Graphs, name, count(name))

    def prepare(self, state, call):
        before(self, state, call)
        state.graphs = self._graphs_of(call.run.pipe, state.vae)

    before = ColorGuidance._prepare
    monkeypatch.setattr(ColorGuidance, "_prepare", prepare)
    guidance = ColorGuidance([PALETTE, PALETTE], **options)
    asked: list[tuple[Any, ...]] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: asked.append(args[:2]))
    with sdcore.patch(pipe, guidance):
        found = pipelines.images(pipe, kind, num_images_per_prompt=2)
        assert len(guidance._graphs) == 1
        hook.remove()
    steps = len(guidance.losses)
    assert set(map(len, asked)) == {2}
    assert calls == {"moved_on": FEW["inner_steps"] * steps, "predicted": steps}
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert not guidance._graphs


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "schedule"), [("SD", "constant"), ("SDXL", "alpha")])
def test_graphs_on_a_gpu(
    tokens: Any, family: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pipe = pipelines.pipeline(family, "text-to-image", tokens).to("cuda")
    strides = [weight.stride() for weight in pipe.unet.parameters()]
    found = []
    for graph in (False, True):
        guidance = ColorGuidance(PALETTE, **FEW, schedule=schedule, graph=graph)
        with sdcore.patch(pipe, guidance) as handle:
            found.append(pipelines.images(pipe, "text-to-image"))
            if graph:
                (kept,) = guidance._graphs.values()
                assert (kept.inner.captures, kept.prediction.captures) == (1, 1)
                assert kept.inner.replays == FEW["inner_steps"] * pipelines.STEPS
                assert kept.prediction.replays == pipelines.STEPS
                assert [weight.stride() for weight in pipe.unet.parameters()] != strides
            *parts, total = handle.report()["ColorGuidance"]["seconds"].values()
            assert parts[0] > parts[1] > 0
            assert sum(parts) <= total
    assert [weight.stride() for weight in pipe.unet.parameters()] == strides
    torch.testing.assert_close(*found, rtol=0, atol=5e-3)


def test_report(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    guidance = ColorGuidance(PALETTE, **FEW)
    assert guidance.report() is None
    with sdcore.patch(pipe, guidance) as handle:
        assert handle.report() == {}
        images = pipelines.images(pipe, "text-to-image")
        told = handle.report()["ColorGuidance"]
        pipelines.images(pipe, "text-to-image", output_type="latent")
        assert handle.report()["ColorGuidance"]["distances"] is None
    assert told["timesteps"] == [float(one) for one in pipe.scheduler.timesteps]
    assert [len(some) for some in told["losses"]] == [FEW["inner_steps"]] * pipelines.STEPS
    # By other directions, and of pixels rounded to 8 bits or not.
    assert told["distances"] == pytest.approx(off(images).tolist(), rel=0.1)
    *parts, total = told["seconds"].values()
    assert all(one > 0 for one in parts)
    assert sum(parts) <= total
    assert json.loads(json.dumps(told)) == told


def test_presets() -> None:
    quality, fast = (ColorGuidance(PALETTE, preset=name) for name in ("quality", "fast"))
    assert vars(ColorGuidance(PALETTE)).keys() == vars(quality).keys()
    assert (quality.unet_gradient, quality.inner_steps) == ("full", 8)
    assert (fast.unet_gradient, fast.inner_steps) == ("frozen", 4)
    assert quality.schedule == fast.schedule == "alpha"
    assert ColorGuidance(PALETTE, preset="fast", unet_gradient="full").unet_gradient == "full"
    with pytest.raises(ValueError, match="preset must be one of quality, fast; got 'best'"):
        ColorGuidance(PALETTE, preset="best")


@pytest.mark.parametrize("given", [None, 30.0])
def test_schedule(tokens: Any, given: float | None) -> None:
    """With "alpha" the rate of each step is that times its alpha, and 8/3 of the published one
    where none is given: the same as a constant one of that size."""
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    outer, inner = Kept(), Kept()
    guidance = ColorGuidance(PALETTE, **FEW, learning_rate=given)
    with sdcore.patch(pipe, inner, guidance, outer):
        pipelines.images(pipe, "text-to-image", guidance_scale=1.0)
    moved = inner.samples[FEW["inner_steps"] :: FEW["inner_steps"] + 1]
    assert len(moved) == len(outer.samples) == pipelines.STEPS
    alphas = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps.long()].sqrt()
    assert alphas[-1] > 1.5 * alphas[0]
    rate = given or 8 / 3 * 140 * outer.samples[0][0, 0].numel() / 64**2
    constant, first = {"schedule": "constant", "learning_rate": float(rate * alphas[0])}, Kept()
    with sdcore.patch(pipe, first, ColorGuidance(PALETTE, **FEW, **constant)):
        pipelines.images(pipe, "text-to-image", guidance_scale=1.0)
    u, wanted = (one - outer.samples[0] for one in (moved[0], first.samples[FEW["inner_steps"]]))
    assert wanted.std() > 1e-4
    torch.testing.assert_close(u, wanted, rtol=1e-2, atol=1e-2 * float(wanted.std()))


@pytest.mark.parametrize("weights", [None, [3, 1, 2]])
def test_published_loss_is_the_exact_one_with_noise(weights: list[int] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 40, 40, generator=generator, requires_grad=True)
    palette = sdcore.Palette.from_colors(["#ff8800", "#220044", "#88ccee"], weights)
    palettes = [(palette.colors, None if weights is None else palette.weights)]
    directions = random_rotations(10, 3, generator=generator).flatten(0, 1)
    drawn = [
        color_guidance._losses(pictures, directions, palettes, "published", generator)
        for _ in range(3)
    ]
    exact = color_guidance._losses(pictures, directions, palettes, "exact")
    assert not drawn[0].equal(drawn[1])
    for one in drawn:
        torch.testing.assert_close(one, exact, rtol=0.02, atol=0)
    grads = [torch.autograd.grad(one.sum(), pictures)[0] for one in (*drawn, exact)]
    towards = [float(torch.cosine_similarity(one, grads[-1], 1).mean()) for one in grads[:-1]]
    assert all(0.5 < one < 1 - 1e-3 for one in towards)


# ---------------------------------------------------------------------------------------------
# In a pipeline


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("SD", "ControlNet"),
        ("SDXL", "text-to-image"),
        ("SDXL", "ControlNet"),
        ("SD", "image-to-image"),
        ("SD", "inpainting"),
    ],
)
def test_pipelines_of_every_kind(tokens: Any, family: str, kind: str) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    before, was = pipelines.images(pipe, kind), pipelines.trace(pipe)
    with sdcore.patch(pipe, ColorGuidance(PALETTE, **FEW)):
        found = pipelines.images(pipe, kind)
    assert off(found) < off(before)
    assert pipelines.trace(pipe) == was
    assert pipelines.images(pipe, kind).equal(before)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),
        ("DDPMScheduler", {}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("LMSDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "sample"}),
        ("DEISMultistepScheduler", {}),
        ("LCMScheduler", {}),
        ("TCDScheduler", {}),
    ],
)
def test_schedulers(tokens: Any, name: str, options: dict[str, Any]) -> None:
    """Guidance of the first step alone is a run from latents that were moved."""
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    inner, outer = Kept(), Kept()
    guidance = ColorGuidance(
        PALETTE, inner_steps=1, rotations=3, seed=0, guided_fraction=0.2, learning_rate=300.0
    )
    with sdcore.patch(pipe, inner, guidance, outer):
        found = pipelines.images(pipe, "text-to-image", latents=start.clone())
    plain = pipelines.images(pipe, "text-to-image", latents=start.clone())
    # Of what the UNet takes, into what the scheduler holds, of which it scales what it is given.
    u = (inner.samples[1] - outer.samples[0])[:1]
    scale = (outer.latents[0] / outer.samples[0][:1]).mean() / pipe.scheduler.init_noise_sigma
    moved = pipelines.images(pipe, "text-to-image", latents=start + scale * u)
    torch.testing.assert_close(found, moved, rtol=0, atol=1e-4)
    assert not torch.allclose(found, plain, rtol=0, atol=1e-3)


def test_schedulers_that_lose_the_move_are_refused(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    with (
        sdcore.patch(pipe, ColorGuidance(PALETTE)),
        pytest.raises(ValueError, match="steps of PNDMScheduler do not follow"),
    ):
        pipelines.images(pipe, "text-to-image")


def test_a_palette_for_each_picture(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    second = sdcore.Palette.from_colors(["#00ff00"])
    one = pipelines.images(pipe, "text-to-image", num_images_per_prompt=2)
    with sdcore.patch(pipe, ColorGuidance([PALETTE, second], **FEW)):
        two = pipelines.images(pipe, "text-to-image", num_images_per_prompt=2)
        with pytest.raises(ValueError, match="one for each picture; got 2 for 3 pictures"):
            pipelines.images(pipe, "text-to-image", num_images_per_prompt=3)
    assert off(two[:1]) < off(one[:1])
    assert off(two[1:], second) < off(one[1:], second)
    # The first is as it is alone: pictures don't share a gradient.
    with sdcore.patch(pipe, ColorGuidance(PALETTE, **FEW)):
        both = pipelines.images(pipe, "text-to-image", num_images_per_prompt=2)
    torch.testing.assert_close(both[0], two[0], rtol=0, atol=1e-4)


def test_a_part_of_the_run(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    guidance = ColorGuidance(PALETTE, **FEW, guided_fraction=0.6)
    with sdcore.patch(pipe, guidance):
        pipelines.images(pipe, "text-to-image", num_inference_steps=5)
    assert len(guidance.losses) == 3


def test_with_other_methods(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    region = sdcore.Region("a red circle", box=(0, 0, 0.5, 1))
    others = [sdcore.RegionAttention(region), sdcore.FastNorms(), sdcore.Observe()]
    before = pipelines.images(pipe, "text-to-image")
    with sdcore.patch(pipe, *others[:2], ColorGuidance(PALETTE, **FEW), others[2]):
        assert off(pipelines.images(pipe, "text-to-image")) < off(before)
    assert len(others[2].records) == pipelines.STEPS


def test_with_what_another_model_adds(tokens: Any) -> None:
    pipe, adapted = (pipelines.pipeline("SD", "text-to-image", tokens) for _ in range(2))
    with torch.no_grad():
        adapted.unet.conv_out.bias += 0.2
    delta = sdcore.DeltaSampling(pipe, adapted, strength=0.5)
    with sdcore.patch(pipe, delta):
        before = pipelines.images(pipe, "text-to-image")
    with sdcore.patch(pipe, delta, ColorGuidance(PALETTE, **FEW)):
        found = pipelines.images(pipe, "text-to-image")
    assert off(found) < off(before)
    with pytest.raises(ValueError, match="DeltaSampling must lie further in than ColorGuidance"):
        sdcore.patch(pipe, ColorGuidance(PALETTE, **FEW), delta)
    assert not torch.allclose(before, pipelines.images(pipe, "text-to-image"), atol=1e-3)


def test_weights_are_frozen_for_the_run_alone(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    kept = pipe.vae.decoder.conv_in.bias.requires_grad_(False)
    seen: list[bool] = []

    class Look(sdcore.Method):
        def denoise(self, call, proceed):
            weights = (*call.run.pipe.unet.parameters(), *call.run.pipe.vae.parameters())
            seen.append(any(one.requires_grad for one in weights))
            return proceed(call)

    with sdcore.patch(pipe, ColorGuidance(PALETTE, **FEW), Look()):
        pipelines.images(pipe, "text-to-image")
        with pytest.raises(RuntimeError, match="no more"):
            pipelines.images(pipe, "text-to-image", callback_on_step_end=stop)
    assert not any(seen) and len(seen) > pipelines.STEPS
    assert all(one.requires_grad for one in pipe.unet.parameters())
    assert not kept.requires_grad
    assert sum(not one.requires_grad for one in pipe.vae.parameters()) == 1
    assert all(one.grad is None for one in pipe.unet.parameters())


def stop(*_: Any) -> Any:
    raise RuntimeError("no more")


def test_frozen_by_several() -> None:
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    inside, leave = threading.Barrier(2), threading.Event()

    def work() -> None:
        with frozen(module):
            inside.wait()
            leave.wait()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    inside.wait()
    with frozen(module), frozen(module):
        assert not module.weight.requires_grad
    assert not module.weight.requires_grad
    leave.set()
    thread.join(60)
    assert module.weight.requires_grad
    assert not module.bias.requires_grad


def test_a_vae_that_must_be_upcast(tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decoder in float16 would overflow: a copy of it decodes, the same one in the next run,
    whatever stands in its ``decode``; and it stays what it is."""
    pipe = pipelines.pipeline("SDXL", "text-to-image", tokens)
    pipe.vae.half().register_to_config(force_upcast=True)
    before = {name: weight.data_ptr() for name, weight in pipe.vae.state_dict().items()}
    used: list[tuple[Any, torch.dtype]] = []
    real = diffusers.AutoencoderKL.decode

    def decode(self, z, *args, **options):
        used.append((self, z.dtype))
        return real(self, z, *args, **options)

    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", decode)
    pipe.vae.decode = decode.__get__(pipe.vae)
    guidance = ColorGuidance(PALETTE, **FEW)
    with sdcore.patch(pipe, guidance):
        pipelines.images(pipe, "text-to-image", output_type="latent")
        assert {name: one.data_ptr() for name, one in pipe.vae.state_dict().items()} == before
        # Diffusers casts the VAE itself to float32 and back: the weights have other addresses then.
        pipelines.images(pipe, "text-to-image")
        pipelines.images(pipe, "text-to-image")
    inner = pipelines.STEPS * FEW["inner_steps"]
    assert len(used) == 3 * inner + 2
    copied, last = used[0][0], [used[2 * inner], used[-1]]
    assert all(one is pipe.vae for one, _ in last)
    assert copied is not pipe.vae
    assert sum(one is copied for one, _ in used) == 3 * inner
    assert {dtype for _, dtype in used} == {torch.float32}
    assert pipe.vae.dtype == torch.float16
    assert not guidance._copies


def test_nothing_of_the_models_is_kept(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    guidance = ColorGuidance(PALETTE, **FEW)
    with sdcore.patch(pipe, guidance):
        pipelines.images(pipe, "text-to-image")
    there = [weakref.ref(model) for model in (pipe.unet, pipe.vae)]
    del pipe
    gc.collect()
    assert [one() for one in there] == [None, None]
    assert guidance.report()["distances"]


class Enlarging(torch.nn.Module):
    """A decoder, to pictures of 64 times the side."""

    dtype = torch.float32

    def decode(self, z: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (torch.nn.functional.interpolate(z[:, :3], scale_factor=64.0),)


def step_of(dtype: torch.dtype, level: float = 0.1, **options: Any) -> tuple[Tensor, ...]:
    vae = Enlarging()
    vae.dtype = dtype
    x = level * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    directions = random_rotations(4, 3, generator=torch.Generator().manual_seed(1)).flatten(0, 1)
    half = torch.tensor(0.5).sqrt()
    settings = {
        "alpha": half, "sigma": half, "palettes": [(PALETTE.colors, PALETTE.weights)],
        "rate": 100.0, "kind": "epsilon", "loss": "exact", "unet_gradient": "full",
        "scaling": (torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)),
        "decode_scale": 1.0, "normalize_gradient": False, "schedule": "constant",
    }  # fmt: skip
    x = x.to(dtype)
    return color_guidance._inner_step(
        lambda x: 0.5 * x, vae, None, torch.zeros(2, 4, 16, 16), x, x, directions,
        **settings | options,
    )  # fmt: skip


def test_gradients_of_large_pictures_in_half_precision() -> None:
    """Of pictures of 1024², whose pixels have gradients that float16 has no numbers for."""
    wanted, half = step_of(torch.float32)[0], step_of(torch.float16)[0]
    assert float((half - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("normalize", [False, True])
def test_a_step_by_alpha(normalize: bool) -> None:
    options = {"rate": 0.04 if normalize else 100.0, "normalize_gradient": normalize}
    constant, by_alpha = (
        step_of(torch.float32, schedule=one, **options)[0] for one in ("constant", "alpha")
    )
    assert constant.std() > 0
    torch.testing.assert_close(by_alpha, constant * 0.5**0.5)


def test_a_gradient_of_nothing_is_not_normalized() -> None:
    u, x, _ = step_of(torch.float32, level=1e4, normalize_gradient=True)
    assert u.eq(0).all() and x.isfinite().all()


def test_means_and_deviations_of_latents(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    seen: list[Tensor] = []
    real = pipe.vae.decode

    def decode(z, *args, **options):
        seen.append(z.detach())
        return real(z, *args, **options)

    pipe.vae.decode = decode
    for mean, std in ((None, None), ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])):
        pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
        with sdcore.patch(pipe, ColorGuidance(PALETTE, inner_steps=1, seed=0)):
            pipelines.images(pipe, "text-to-image", output_type="latent", num_inference_steps=1)
    first, second = seen
    scaled = first * torch.tensor([1.0, 2, 3, 4])[:, None, None]
    wanted = scaled + torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None]
    torch.testing.assert_close(second, wanted)


@pytest.mark.parametrize(("family", "published"), [("SD", 140 / 64**2), ("SDXL", 100 / 96**2)])
def test_the_rate_belongs_to_a_family_and_a_size(
    tokens: Any, family: str, published: float
) -> None:
    pipe = pipelines.pipeline(family, "text-to-image", tokens)
    taken = []
    for rate in (None, published * 16 * 16):
        guidance = ColorGuidance(PALETTE, **FEW, schedule="constant", learning_rate=rate)
        with sdcore.patch(pipe, guidance):
            taken.append(pipelines.images(pipe, "text-to-image"))
    assert taken[0].equal(taken[1])


def test_seeds(tokens: Any) -> None:
    """Without one it is that of the call's generator; and PyTorch's own is not drawn from."""
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    taken = []
    for seed in (None, 1, 2):  # the generator's is 1
        before = torch.get_rng_state()
        with sdcore.patch(pipe, ColorGuidance(PALETTE, **FEW | {"seed": seed})):
            taken.append(pipelines.images(pipe, "text-to-image"))
        assert torch.get_rng_state().equal(before)
    assert taken[0].equal(taken[1])
    assert not taken[0].equal(taken[2])


# ---------------------------------------------------------------------------------------------
# Bad input


BAD = [
    ({"inner_steps": 0}, "inner_steps must be an int of 1 or more; got 0"),
    ({"rotations": 2.5}, "rotations must be an int of 1 or more; got 2.5"),
    ({"guided_fraction": 0}, r"guided_fraction must be in \(0, 1\]; got 0"),
    ({"decode_scale": 1.5}, r"decode_scale must be in \(0, 1\]; got 1.5"),
    ({"unet_gradient": "none"}, "unet_gradient must be one of full, frozen; got 'none'"),
    ({"loss": "sorted"}, "loss must be one of binned, exact, published; got 'sorted'"),
    ({"schedule": "linear"}, "schedule must be one of constant, alpha; got 'linear'"),
    ({"seed": 2**64}, r"seed must be in \[-2\*\*63, 2\*\*64\); got 18446744073709551616"),
    ({"learning_rate": -1.0}, "learning_rate must be positive and finite; got -1.0"),
    ({"normalize_gradient": True}, "normalize_gradient needs a learning_rate"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ColorGuidance(PALETTE, **options)


def test_references(tmp_path: Any) -> None:
    picture = torch.rand(3, 8, 8)
    assert [len(one) for one in ColorGuidance(picture).palettes] == [64]
    assert [len(one) for one in ColorGuidance(["red", (0, 255, 0)]).palettes] == [2]
    assert [len(one) for one in ColorGuidance([picture, PALETTE]).palettes] == [64, 3]
    assert [len(one) for one in ColorGuidance(list(torch.rand(5, 3))).palettes] == [5]
    images.write(torch.zeros(4, 4, 3), tmp_path / "there.png")
    there = str(tmp_path / "there.png")
    assert [len(one) for one in ColorGuidance([there, PALETTE]).palettes] == [1, 3]
    wrong: list[tuple[Any, type[Exception], str]] = [
        ([], ValueError, "got an empty list"),
        (tmp_path / "nowhere.png", ImageError, r"nowhere\.png"),
        ([there, "nowhere.png"], ImageError, r"nowhere\.png"),
        (["nocolor"], ImageError, "nocolor"),
        ("#ff8800", ValueError, r"pass \['#ff8800'\]"),
        ([["red"], ["green"]], TypeError, "colors for one picture of several"),
        (torch.rand(5, 3), ValueError, "could be a gray picture or a list of colors"),
        (sdcore.Palette(torch.rand(5, 3) * 255), ValueError, r"colors in \[0, 1\]"),
    ]
    for reference, error, message in wrong:
        with pytest.raises(error, match=message):
            ColorGuidance(reference)
    with pytest.raises(TypeError, match="seed must be an int or None; got str"):
        ColorGuidance(PALETTE, seed="a")


def refused(pipe: Any, message: str, *methods: sdcore.Method, error: Any = ValueError) -> None:
    with (
        sdcore.patch(pipe, *methods, ColorGuidance(PALETTE, inner_steps=1, seed=0)),
        pytest.raises(error, match=message),
    ):
        pipelines.images(pipe, "text-to-image")
    assert all(one.requires_grad for one in pipe.unet.parameters())


def test_models_whose_weights_come_and_go_are_refused(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    accelerate.cpu_offload_with_hook(pipe.unet, execution_device="cpu")
    refused(pipe, "a hook moves or casts weights of the unet")
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    pipe.vae.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    refused(pipe, "a hook moves or casts weights of the vae")


def test_models_that_cant_be_differentiated_are_refused(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    pipe.unet.enable_gradient_checkpointing()
    region = sdcore.RegionAttention(sdcore.Region("a red circle", box=(0, 0, 0.5, 1)))
    refused(pipe, "the unet checkpoints gradients", region)
    pipe.unet.disable_gradient_checkpointing()
    with torch.inference_mode():
        pipe.vae = type(pipe.vae).from_config(pipe.vae.config)
    refused(pipe, "the vae was loaded within torch.inference_mode")


def test_what_there_must_be(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    vae, pipe.vae = pipe.vae, None
    with pytest.raises(TypeError, match="it has no vae"):
        sdcore.patch(pipe, ColorGuidance(PALETTE))
    pipe.vae = vae
    with sdcore.patch(pipe, ColorGuidance(PALETTE)):
        pipe.vae = None
        with pytest.raises(TypeError, match="ColorGuidance needs a vae"):
            pipelines.images(pipe, "text-to-image")
        pipe.unet = None
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, prediction_type="flow_prediction"
    )
    refused(pipe, "prediction_type must be one of epsilon, v_prediction, sample; got 'flow_")


def test_what_must_lie_further_in(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    was = pipelines.trace(pipe)
    region = sdcore.RegionAttention(sdcore.Region("a red circle", box=(0, 0, 0.5, 1)))
    with pytest.raises(ValueError, match="RegionAttention must lie further in than ColorGuidance"):
        sdcore.patch(pipe, ColorGuidance(PALETTE), region)
    assert pipelines.trace(pipe) == was


def test_a_gradient_that_is_not_finite_is_named(
    tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    real = color_guidance.control_step

    def step(u, grad, sample, rate, factor):
        return real(u, grad / 0, sample, rate, factor=factor)

    monkeypatch.setattr(color_guidance, "control_step", step)
    refused(pipe, "the gradient is not finite at step 0", error=FloatingPointError)


def test_a_loss_that_is_not_finite_is_named(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    with (
        sdcore.patch(pipe, ColorGuidance(PALETTE, **FEW)),
        pytest.raises(FloatingPointError, match=r"the loss is not finite at step 0: \[nan"),
    ):
        pipelines.images(pipe, "text-to-image")
