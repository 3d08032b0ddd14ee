"""An image guided by the colors of a reference, from end to end.

``python -m benchmarks.bench_color_guidance [--device cuda] [--quick] [--csv FILE]
[--cases PART] [--ways PART;PART] [--upstream PATH]``

On a GPU models have the sizes of SDXL's, in bfloat16, for 768 pixels, with 30 steps of which 28 are
guided by 8 iterations; and of Stable Diffusion 1.5's, for 512 pixels, with 30 steps of which 29 are
guided by 10 iterations, in float32, as published, and in bfloat16. Weights are random; the VAE's
last layer is scaled so that pictures fill their range. On a CPU, and with --quick, the embedded
models, and few steps; --quick has one of them, and leaves out the vectorized sort, "fast" and what
an iteration consists of. Texts are random, and text encoders left out. All that is told is for one
image, with its decoding.

Ways:

- "published": ``benchmarks.baselines.sw_guidance``. Not a whole image is timed, but some guided
  steps, what follows each (prediction with guidance and the scheduler's step), some unguided steps
  and a decoding. The image's time is their sum, with each as often as there are of it.
- "upstream", with --upstream: the inner loop of the original code, imported from a checkout at
  PATH (``do_sw_guidance`` of the class in ``sw_guidance/sdxl_sw_pipeline.py``), of SDXL alone: that
  of Stable Diffusion 1.5 is no function. What follows it is as in "published". Both take each step
  in turns; the peak of memory is of both. The sample that it moves is compared with that of
  "published", with the same rotations and without a bootstrap.
- "vectorized sort, eager": the published loop, with the loss in one matrix product and one sort,
  weights frozen, and nothing done that has no effect. Timed in parts as well.
- "vectorized sort, torch.compile", with --full or where --ways asks for it, because it takes
  minutes: the same with UNet and decoder compiled, the latter for SD 1.5 at one size, the mean of
  the published ones.
- "ColorGuidance, quality" and "ColorGuidance, fast": calls of the patched pipeline, wall-clock,
  after a short one that captures graphs; "quality" with as many iterations as published.

For SD 1.5 the published loop decodes at random sizes, of three quarters of the pixels on average;
"quality" decodes at the whole size.

The check is of u after two iterations at one step, with given rotations and without a bootstrap:
"quality", with the exact loss and a constant rate, and the loops may be off from the published loop
in float32 (of float32: in float64) by at most twice what that loop in the models' dtype is off by,
plus epsilon, plus what one pixel makes that is as good as where it is wanted, so that rounding says
which way it is pulled. "fast" is another algorithm, and its result is not compared.

Share of the ceiling: products and convolutions of the way's own UNet calls and decodings, at the
rate of a plain matrix product of the same dtype in the same run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sdcore
from benchmarks import measure, suite
from benchmarks.baselines import sw_guidance
from benchmarks.baselines.sw_guidance import Texts
from benchmarks.bench_delta_sampling import SCALES, SD15
from benchmarks.bench_fast_decoder import VAE
from benchmarks.bench_patching import SDXL
from benchmarks.ceilings import Ceilings
from benchmarks.measure import Row, Work
from benchmarks.suite import Asked
from sdcore import embedded
from sdcore.embedded import models
from sdcore.methods.color_guidance import frozen
from sdcore.ops import random_rotations, sliced_wasserstein

CHECKED = 2  # iterations; later ones amplify the rounding of earlier ones
SEED = 0
ENOUGH = 5.0  # seconds, after which a whole image is not timed again
PUBLISHED, UPSTREAM = "published", "upstream"
EAGER, COMPILED = "vectorized sort, eager", "vectorized sort, torch.compile"
PRESETS = {"ColorGuidance, quality": "quality", "ColorGuidance, fast": "fast"}


@dataclass
class Case:
    name: str
    pipe: Any  # of which all weights want gradients
    texts: Texts
    latents: Tensor
    reference: Tensor  # [3, H, W] in [0, 1]
    steps: int
    guided: int
    scale: float  # of the pipeline's guidance
    published: dict[str, Any]  # options of the published loop
    ours: dict[str, Any]  # options of ColorGuidance
    apart: bool  # whether it predicts for the two prompts in two calls

    @property
    def is_xl(self) -> bool:
        return bool(self.texts.added)

    @property
    def inner_steps(self) -> int:
        return self.published["inner_steps"]

    @property
    def side(self) -> int:
        return self.latents.shape[-1]

    @functools.cached_property
    def pixels(self) -> Tensor:
        return self.reference.flatten(1).T.to(self.latents)


# ---------------------------------------------------------------------------------------------
# Models


def built(
    kind: Callable[..., nn.Module], config: Any, device: str, dtype: torch.dtype
) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(**config).eval()
    finally:
        torch.set_default_dtype(before)


def large(kind: str, device: str, dtype: torch.dtype) -> Any:
    """A pipeline of full size, without text encoders."""
    torch.manual_seed(0)
    unet = built(UNet2DConditionModel, SDXL if kind == "xl" else SD15, device, dtype)
    vae = built(AutoencoderKL, VAE | {"scaling_factor": SCALES[kind]}, device, dtype)
    with torch.no_grad():
        last = vae.decoder.conv_out
        last.bias.zero_()
        noise = torch.randn(1, 4, 32, 32, device=device).to(dtype)
        last.weight *= 0.5 / vae.decode(noise).sample.std()
    words = models.kept_vocabulary()
    # Both models' own, but for its kind.
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler}
    parts |= {"tokenizer": words, "text_encoder": None}
    if kind == "xl":
        return StableDiffusionXLPipeline(
            **parts, text_encoder_2=None, tokenizer_2=words, add_watermarker=False
        )
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def case_of(
    name: str,
    pipe: Any,
    side: int,
    pooled: int,
    guided: int,
    published: dict[str, Any],
    full: bool,
) -> Case:
    """``side``: pixels. ``pooled``: how wide the second text encoder's summary is. ``guided``: of
    30 steps if it is of full size."""
    pipe.set_progress_bar_config(disable=True)
    unet, is_xl = pipe.unet, pooled > 0
    made = {"device": unet.device, "dtype": unet.dtype}
    steps, guided = (30, guided) if full else (4, 3)
    torch.manual_seed(1)
    context, added = torch.randn(2, 77, unet.config.cross_attention_dim, **made), {}
    if is_xl:
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * 2, **made)
        added = {"text_embeds": torch.randn(2, pooled, **made), "time_ids": sizes}
    latents = torch.randn(1, 4, *[side // pipe.vae_scale_factor] * 2, **made)
    # Warm, and brighter from left to right.
    colors = torch.rand(3, side, side, generator=torch.Generator().manual_seed(2))
    warm = torch.tensor([1.0, 0.6, 0.3])[:, None, None]
    colors = 0.3 * colors + 0.7 * warm * torch.linspace(0, 1, side)
    if not full:
        published = published | {"inner_steps": 2}
        if "sides" in published:
            published["sides"] = (latents.shape[-1] * 3 // 4, latents.shape[-1])
    # The step's number is below it, whatever is rounded.
    ours: dict[str, Any] = {"guided_fraction": (guided - 0.5) / steps, "seed": SEED}
    ours["inner_steps"] = published["inner_steps"]
    if "normalize" in published:
        ours |= {"normalize_gradient": True, "learning_rate": published["learning_rate"]}
        ours["schedule"] = "constant"
    scale = 5.0 if is_xl else 8.0
    return Case(
        name, pipe, Texts(context, added), latents, colors.to(unet.device), steps, guided, scale,
        published, ours, apart=not is_xl,
    )  # fmt: skip


def cases(device: str, full: bool, wanted: str, dtype: str) -> Iterator[Case]:
    """``wanted``: a part of the name; ``dtype``: its end."""
    bf16, f32 = torch.bfloat16, torch.float32
    xl, sd = sw_guidance.SDXL, sw_guidance.SD15
    if full:
        kinds = {
            "SDXL, 768², bfloat16": (lambda: large("xl", device, bf16), 768, 1280, 28, xl),
            "SD 1.5, 512², float32": (lambda: large("sd", device, f32), 512, 0, 29, sd),
            "SD 1.5, 512², bfloat16": (lambda: large("sd", device, bf16), 512, 0, 29, sd),
        }
    else:
        small = functools.partial(embedded.load, device=device)
        width = models.TEXTS["xl"][1][0]
        kinds = {
            "embedded xl, 64², bfloat16": (lambda: small("xl", dtype=bf16), 64, width, 3, xl),
            "embedded v1, 64², float32": (lambda: small("v1", dtype=f32), 64, 0, 3, sd),
        }
    for name, (pipe, *rest) in kinds.items():
        if wanted in name and name.endswith(dtype):
            yield case_of(name, pipe(), *rest, full)


# ---------------------------------------------------------------------------------------------
# The loops


@contextlib.contextmanager
def frozen_models(case: Case) -> Iterator[Any]:
    with frozen(case.pipe.unet), frozen(case.pipe.vae):
        yield case.pipe


@contextlib.contextmanager
def compiled_models(case: Case) -> Iterator[Any]:
    torch._dynamo.reset()
    vae = case.pipe.vae
    decoder = vae.decoder
    with frozen_models(case):
        vae.decoder = torch.compile(decoder, dynamic=False)
        try:
            unet = torch.compile(case.pipe.unet, dynamic=False)
            yield SimpleNamespace(unet=unet, vae=vae, scheduler=case.pipe.scheduler)
        finally:
            vae.decoder = decoder


def vectorized(case: Case) -> dict[str, Any]:
    """Options of the loop, without what has no effect."""
    return case.published | {"loss": sw_guidance.vectorized_loss, "overhead": False}


def at_one_size(case: Case) -> dict[str, Any]:
    options = vectorized(case)
    if "sides" in options:
        low, high = options["sides"]
        middle = round(statistics.mean(side**2 for side in range(low, high)) ** 0.5)
        options["sides"] = middle, middle + 1
    return options


@dataclass
class Parts:
    """Milliseconds of the parts of an image."""

    guided: list[float]  # the inner loops of guided steps
    after: float  # prediction with guidance and the scheduler's step, after one
    plain: float  # the same without
    decoding: float

    def image(self, case: Case) -> tuple[float, float]:
        """And half the range of what was measured."""
        rest = case.guided * self.after + (case.steps - case.guided) * self.plain + self.decoding
        spread = case.guided * (max(self.guided) - min(self.guided)) / 2
        return case.guided * statistics.mean(self.guided) + rest, spread

    def __str__(self) -> str:
        loops = " and ".join(f"{one:.0f}" for one in self.guided)
        return (
            f"inner loop {loops}, step after it {self.after:.1f}, plain step {self.plain:.1f}, "
            f"decoding {self.decoding:.1f} ms"
        )


def synchronized() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = synchronized()
    found = call()
    return 1e3 * (synchronized() - start), found


def parts_of(
    case: Case, ways: dict[str, tuple[Any, Callable[..., Tensor]]], *, as_published: bool
) -> dict[str, Parts]:
    """Of each way: a pipeline, and a loop, which is the sample moved by its control, of the sample,
    its time step and the number of iterations. All ways take each step in turns, so that a host
    that slows down does so for all."""
    apart = case.apart and as_published
    guided, after, plain, decoding = ({name: [] for name in ways} for _ in range(4))

    def one_step(pipe: Any, x: Tensor, t: Tensor, after_a_guided: bool) -> tuple[float, Tensor]:
        guided = after_a_guided and as_published
        return timed(
            lambda: sw_guidance.step(pipe, x, t, case.texts, case.scale, guided=guided, apart=apart)
        )

    np.random.seed(SEED)
    torch.manual_seed(SEED)
    case.pipe.scheduler.set_timesteps(case.steps, device=case.latents.device)
    times, samples = case.pipe.scheduler.timesteps, dict.fromkeys(ways, case.latents)
    # The first of each warms up.
    for t, inner_steps in zip(times, (2, case.inner_steps, case.inner_steps), strict=False):
        for name, (pipe, loop) in ways.items():
            taken, moved = timed(functools.partial(loop, samples[name], t, inner_steps))
            guided[name].append(taken)
            taken, samples[name] = one_step(pipe, moved, t, True)
            after[name].append(taken)
    for _ in range(3):
        for name, (pipe, _) in ways.items():
            plain[name].append(one_step(pipe, samples[name], times[-1], False)[0])
    for _ in range(2):
        for name, (pipe, _) in ways.items():
            x = samples[name]
            decoding[name].append(timed(functools.partial(sw_guidance.decoded, pipe, x))[0])
    return {
        name: Parts(guided[name][1:], min(after[name][1:]), min(plain[name][1:]), decoding[name][1])
        for name in ways
    }


def loop_of(case: Case, pipe: Any, options: dict[str, Any]) -> Callable[..., Tensor]:
    def loop(x: Tensor, t: Tensor, inner_steps: int) -> Tensor:
        how = options | {"inner_steps": inner_steps}
        return x + sw_guidance.guided_step(pipe, x, t, case.texts, case.pixels, **how)

    return loop


# ---------------------------------------------------------------------------------------------
# The original code


def original(case: Case, path: Path) -> tuple[Any, Any]:
    """Its module, and its pipeline of the case's models. The package that the module lies in can't
    be imported: another module in it has an import that only works from its own folder."""
    file = path / "sw_guidance" / "sdxl_sw_pipeline.py"
    spec = importlib.util.spec_from_file_location("upstream_sw_guidance", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pipe = module.SWStableDiffusionXLPipeline(**case.pipe.components, add_watermarker=False)
    pipe._cross_attention_kwargs, pipe.sw_debug = None, False  # which its __call__ sets
    return module, pipe


def original_loop(case: Case, pipe: Any) -> Callable[..., Tensor]:
    def loop(x: Tensor, t: Tensor, inner_steps: int) -> Tensor:
        return pipe.do_sw_guidance(
            x.device, inner_steps, case.published["learning_rate"], x, t, case.texts.context,
            dict(case.texts.added), case.pixels.T,
        )  # fmt: skip

    return loop


def original_differs(case: Case, module: Any, pipe: Any) -> float:
    """The moved sample's distance from that of the published loop in our words, over that of the
    move, with the same rotations, and pixels taken in order for the bootstrap's."""
    rotations = given_rotations(case)
    t = checked_time(case)
    in_order = mock.patch.object(
        np.random, "randint", lambda low, high, size: np.arange(size) % high
    )
    # There columns are the directions.
    turned = mock.patch.object(
        module, "rand_rotation_matrix", side_effect=[one.T.cpu().numpy() for one in rotations]
    )
    with in_order, turned:
        theirs = original_loop(case, pipe)(case.latents, t, CHECKED)
    ours = case.latents + control(case, case.pipe, sw_guidance.published_loss)
    return float((theirs - ours).float().norm() / (ours - case.latents).float().norm())


# ---------------------------------------------------------------------------------------------
# The check


def given_rotations(case: Case) -> Tensor:
    """Those that ColorGuidance draws."""
    generator = torch.Generator(case.latents.device).manual_seed(SEED)
    count = CHECKED * sw_guidance.ROTATIONS
    return random_rotations(count, 3, generator, device=case.latents.device)


def checked_time(case: Case) -> Tensor:
    """The first of two steps: amid the noise."""
    case.pipe.scheduler.set_timesteps(2, device=case.latents.device)
    return case.pipe.scheduler.timesteps[0]


def control(case: Case, pipe: Any, loss: Callable[..., Tensor]) -> Tensor:
    """u of a loop, in the dtype of the pipe's UNet."""
    drawn = iter(given_rotations(case).split(sw_guidance.ROTATIONS))
    more = {"resample": False} if loss is sw_guidance.published_loss else {}
    dtype = next(pipe.unet.parameters()).dtype

    def with_given(pixels: Tensor, reference: Tensor) -> Tensor:
        return loss(pixels, reference, next(drawn), **more)

    options = case.published | {"inner_steps": CHECKED, "overhead": False, "sides": None}
    added = {name: one.to(dtype) for name, one in case.texts.added.items()}
    texts = Texts(case.texts.context.to(dtype), added)
    x, reference = case.latents.to(dtype), case.pixels.to(dtype)
    t = checked_time(case)
    return sw_guidance.guided_step(pipe, x, t, texts, reference, loss=with_given, **options)


class Kept(sdcore.ColorGuidance):
    """Keeps the first step's u."""

    def _control(self, *args: Any) -> Tensor:
        self.u = super()._control(*args)
        return self.u


def our_control(case: Case) -> Tensor:
    options = case.ours | {
        "learning_rate": case.published["learning_rate"],
        "schedule": "constant",
        "inner_steps": CHECKED,
        "rotations": sw_guidance.ROTATIONS,
        "guided_fraction": 0.25,
    }
    method = Kept(case.reference, preset="quality", loss="exact", **options)
    with sdcore.patch(case.pipe, method):
        called(case, 2)
    return method.u


def exact(case: Case) -> Tensor:
    """u of the published loop in a wider dtype."""
    wider = torch.float64 if case.latents.dtype == torch.float32 else torch.float32
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        unet, vae = (
            # Diffusers' own `to` warns of layers that must stay in float32. There are none.
            nn.Module.to(copy.deepcopy(part), wider).requires_grad_(False)
            for part in (case.pipe.unet, case.pipe.vae)
        )
        wide = SimpleNamespace(unet=unet, vae=vae, scheduler=case.pipe.scheduler)
        return control(case, wide, sw_guidance.published_loss)
    finally:
        torch.backends.cudnn.allow_tf32 = before


class Check:
    def __init__(self, case: Case) -> None:
        self.case, self.wanted = case, exact(case)
        self.published = self.off(control(case, case.pipe, sw_guidance.published_loss))
        # Each pixel is pulled one way or the other along each direction, all equally hard.
        pulls = 3 * sw_guidance.ROTATIONS * len(case.pixels)
        self.allowed = 2 * self.published + torch.finfo(case.latents.dtype).eps + 2 / pulls**0.5

    def off(self, u: Tensor) -> float:
        return float((u.to(self.wanted) - self.wanted).norm() / self.wanted.norm())

    def __call__(self, u: Tensor) -> str:
        off = self.off(u)
        if not off <= self.allowed:
            raise measure.WrongError(
                f"{self.case.name}: off by {off:.2e}, allowed {self.allowed:.2e}"
            )
        what = str(self.wanted.dtype).removeprefix("torch.")
        return f"{what}, off by {off:.1e} (published {self.published:.1e})"


# ---------------------------------------------------------------------------------------------
# Ours


def called(case: Case, steps: int) -> Tensor:
    texts, added = case.texts, case.texts.added
    options = {"negative_prompt_embeds": texts.context[:1], "prompt_embeds": texts.context[1:]}
    if case.is_xl:
        negative, pooled = added["text_embeds"].split(1)
        options |= {"negative_pooled_prompt_embeds": negative, "pooled_prompt_embeds": pooled}
    side = case.reference.shape[-1]
    return case.pipe(
        **options, num_inference_steps=steps, guidance_scale=case.scale, latents=case.latents,
        height=side, width=side, output_type="pt",
    ).images  # fmt: skip


def end_to_end(case: Case, preset: str) -> tuple[tuple[float, float], str]:
    """Milliseconds of an image, and their spread; and how the last one's are split."""
    # "fast" has its own; where there are fewer than published, half of them.
    own = None if case.inner_steps >= 8 else case.inner_steps // 2
    options = case.ours | ({"inner_steps": own} if preset == "fast" else {})
    method = sdcore.ColorGuidance(case.reference, preset=preset, **options)
    with sdcore.patch(case.pipe, method):
        called(case, 2)
        taken = [timed(lambda: called(case, case.steps))[0]]
        while sum(taken) < 1e3 * ENOUGH and len(taken) < 3:
            taken.append(timed(lambda: called(case, case.steps))[0])
    told = method.report()
    assert told is not None
    split = ", ".join(f"{name} {1e3 * taken:.0f}" for name, taken in told["seconds"].items())
    return measure.of_samples(taken), f"{split} ms"


def alone(case: Case) -> dict[str, tuple[float, float, str]]:
    """What an iteration of "quality" consists of, each timed with its gradient; on a GPU in a graph
    of its own."""
    pipe, x, asked = case.pipe, case.latents, case.texts.row(1)
    device, side = x.device, case.reference.shape[-1]
    t = torch.full((1,), 500.0, device=device)
    points = torch.rand(1, side**2, 3, device=device)
    palette = sdcore.Palette.from_image(case.reference)
    colors = palette.colors.to(device)
    weights = None if palette.has_equal_weights else palette.weights.to(device)
    directions = random_rotations(sw_guidance.ROTATIONS, 3, device=device).flatten(0, 1)

    def unet(x: Tensor) -> Tensor:
        return sw_guidance.predicted(pipe, x, t, asked)

    def decoder(x: Tensor) -> Tensor:
        return pipe.vae.decode(x, return_dict=False)[0]

    def loss(x: Tensor) -> Tensor:
        return sliced_wasserstein(
            x, colors, directions=directions, weights_y=weights, method="binned",
            value_range=(0.0, 1.0),
        )  # fmt: skip

    def pulled(part: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(part(x), x, grad)[0]

    found = {}
    with (
        frozen_models(case),
        as_on_a_gpu(pipe),
    ):
        for name, part, given, grad in (
            ("UNet", unet, x, torch.randn_like(x)),
            ("decoder", decoder, x, torch.randn(1, 3, side, side, device=device).to(x)),
            ("loss", loss, points, torch.ones(1, device=device)),
        ):
            call = functools.partial(pulled, part, given, grad)
            found[name] = measure.milliseconds(call, [()], device.type)
    return found


@contextlib.contextmanager
def as_on_a_gpu(pipe: Any) -> Iterator[None]:
    """UNet and VAE as ColorGuidance has them there; elsewhere as they are."""
    unet = pipe.unet
    if next(unet.parameters()).device.type != "cuda":
        yield
        return
    unet.to(memory_format=torch.channels_last)
    try:
        with (
            sdcore.patch(pipe.vae, sdcore.FastDecoder(graph=False)),
            sdcore.patch(unet, sdcore.FastNorms(), sdcore.FastGEGLU()),
        ):
            yield
    finally:
        unet.to(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------
# The ceiling


def operations(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def work_of(case: Case, options: dict[str, Any], ceilings: Ceilings) -> Work:
    """The products and convolutions of an image, of a loop that decodes at the sizes in
    ``options``."""
    pipe, x, t = case.pipe, case.latents, checked_time(case)
    with frozen_models(case):
        loop = loop_of(case, pipe, options)
        one = operations(lambda: loop(x, t, 1))
        step = operations(lambda: sw_guidance.step(pipe, x, t, case.texts))
        last = operations(lambda: sw_guidance.decoded(pipe, x))
    total = case.guided * case.inner_steps * one + case.steps * step + last
    print(
        f"{case.name}: {one / 1e12:.2f} TFLOP an iteration, {step / 1e12:.2f} a step besides, "
        f"{last / 1e12:.2f} the last decoding"
    )
    # In TF32 where convolutions are.
    return ceilings.multiplying(total, x.dtype, torch.backends.cudnn.allow_tf32)


# ---------------------------------------------------------------------------------------------
# Rows


def released() -> None:
    """All memory that the last way has left, so that the next one's peak is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> str:
    if not torch.cuda.is_available():
        return ""
    return f"; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def measured(case: Case, asked: Asked) -> Iterator[Row]:
    """One row after the other. Ratios to ways that come later are filled in then."""
    path: Path | None = asked.options.get("upstream")
    found: dict[str, Row] = {}

    def row(
        name: str, taken: tuple[float, float], how: str, check: str, passed: bool | None, work: Work
    ) -> Row:
        found[name] = Row(
            "color_guidance",
            f"an image, {case.name}, {case.steps} steps, {case.guided} guided",
            name, str(case.latents.dtype).removeprefix("torch."), *taken, how, check + peak(),
            passed=passed,
        ).against(work)  # fmt: skip
        for one in PRESETS:
            if one in found:
                found[one].ratios = {
                    other: theirs.milliseconds / found[one].milliseconds
                    for other, theirs in found.items()
                    if other not in PRESETS
                }
        return found[name]

    def of_parts(name: str, parts: Parts, check: str, passed: bool | None, work: Work) -> Row:
        per = statistics.mean(parts.guided) / case.inner_steps
        said = f"{check}; {case.inner_steps} iterations of {per:.1f} ms: {parts}"
        return row(name, parts.image(case), "sum of parts", said, passed, work)

    wanted = asked.options.get("ways", "")
    names = [PUBLISHED, "ColorGuidance, quality"] if asked.quick else [PUBLISHED, EAGER, *PRESETS]
    if asked.full or wanted:
        names.append(COMPILED)
    if path is not None and case.is_xl:
        names.insert(1, UPSTREAM)
    names = [name for name in names if any(part in name for part in wanted.split(";"))]
    if not names:
        return
    check = Check(case)

    def of_published() -> Iterator[Row]:
        """In our words, and the original code."""
        ways, said = {}, {}
        if PUBLISHED in names:
            ways[PUBLISHED] = case.pipe, loop_of(case, case.pipe, case.published)
            what = f"the peer, off by {check.published:.1e} from {check.wanted.dtype}"
            said[PUBLISHED] = what.replace("torch.", "")
        if UPSTREAM in names:
            module, theirs = original(case, path)
            off = original_differs(case, module, theirs)
            ways[UPSTREAM] = theirs, original_loop(case, theirs)
            said[UPSTREAM] = f"differs from published by {off:.1e}"
        released()
        for name, parts in parts_of(case, ways, as_published=True).items():
            yield of_parts(name, parts, said[name], None, looped)

    looped = whole = work_of(case, at_one_size(case), asked.ceilings)
    if "sides" in case.published:
        whole = work_of(case, at_one_size(case) | {"sides": None}, asked.ceilings)
    yield from of_published()
    for name in names:
        if name in (PUBLISHED, UPSTREAM):
            continue
        released()
        if name in PRESETS:
            quality = PRESETS[name] == "quality"
            verdict = check(our_control(case)) if quality else "another algorithm"
            released()
            taken, split = end_to_end(case, PRESETS[name])
            said = f"{verdict}; {split}"
            passed, work = (True, whole) if quality else (None, Work())
            yield row(name, taken, "end to end", said, passed, work)
            if quality and not asked.quick:
                yield from part_rows(case, taken[0])
        else:
            models_of, options = {
                EAGER: (frozen_models, vectorized(case)),
                COMPILED: (compiled_models, at_one_size(case)),
            }[name]
            with models_of(case) as pipe:
                try:
                    verdict = check(control(case, pipe, sw_guidance.vectorized_loss))
                except measure.WrongError as error:
                    # As with a decoder that Inductor compiles for a CPU, PyTorch 2.13: its gradient
                    # is 0. No time is told then.
                    print(f"{name}: no row. {error}")
                    continue
                released()
                ways = {name: (pipe, loop_of(case, pipe, options))}
                parts = parts_of(case, ways, as_published=False)
            yield of_parts(name, parts[name], verdict, True, looped)


def part_rows(case: Case, image: float) -> Iterator[Row]:
    found = alone(case)
    count = case.guided * case.inner_steps
    rest = image - count * sum(taken for taken, _, _ in found.values())
    for name, taken in found.items():
        share, other = (100 * one / image for one in (count * taken[0], rest))
        yield Row(
            "color_guidance", f"in an iteration, {case.name}", f"ColorGuidance, quality: {name}",
            str(case.latents.dtype).removeprefix("torch."), *taken,
            f"with its gradient; {count} are {share:.0f} % of an image; neither UNet, decoder nor "
            f"loss of any iteration {other:.0f} %",
        )  # fmt: skip


def rows(asked: Asked) -> Iterator[Row]:
    if not asked.has(torch.bfloat16, torch.float32):
        return
    named = f", {measure.dtype_name(asked.dtype)}" if asked.dtype else ""
    if asked.quick and not named:
        # A CPU takes a minute for an image in bfloat16.
        named = ", bfloat16" if asked.on_gpu else ", float32"
    for case in cases(asked.device, asked.full_models, asked.cases, named):
        yield from measured(case, asked)
        released()


def main() -> None:
    parser = suite.parser_of(__doc__)
    parser.add_argument("--ways", default="", help="those whose name holds one of these")
    parser.add_argument("--upstream", type=Path, help="a checkout of alobashev/sw-guidance")
    suite.main(rows, parser)


if __name__ == "__main__":
    main()
