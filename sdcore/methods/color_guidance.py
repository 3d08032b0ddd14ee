"""Colors of a reference in what a pipeline generates, by gradients of a sliced Wasserstein loss."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcore import graphs
from sdcore.methods.cross_attention import turn
from sdcore.methods.fast_decoder import FastDecoder, is_offloaded
from sdcore.methods.fast_geglu import FastGEGLU
from sdcore.methods.fast_norms import FastNorms
from sdcore.methods.lora import plain
from sdcore.ops import clean_latents, control_step, random_rotations, sliced_wasserstein
from sdcore.palette import Palette
from sdcore.patching import Call, Method, Run

# Published learning rates, and how many latents each belongs to: the loss is a mean over pixels,
# and so the gradient to one latent is as small as there are many. Of SDXL, and of Stable Diffusion
# 1.5, for which 130 to 150 are published, with what has a VAE like it.
RATES = {"SDXL": (100.0, 96 * 96), "SD": (140.0, 64 * 64)}
UNET_GRADIENTS = ("full", "frozen")
LOSSES = ("binned", "exact", "published")
SCHEDULES = ("constant", "alpha")
KINDS = ("epsilon", "v_prediction", "sample")  # of what UNets predict
PRESETS: dict[str, dict[str, Any]] = {
    "quality": {
        "inner_steps": 8, "rotations": 10, "guided_fraction": 0.93, "decode_scale": 1.0,
        "unet_gradient": "full", "loss": "binned", "schedule": "alpha",
    },
}  # fmt: skip
# Without the UNet's gradient an inner step's parts take two thirds of their time on a GPU, and
# colors come nearer in half as many steps: benchmarks/notes/color_guidance.md.
PRESETS["fast"] = PRESETS["quality"] | {"unet_gradient": "frozen", "inner_steps": 4}
# Of the published rate, with the schedule "alpha". Of the embedded models' pictures more keep their
# content with it than with the constant rate that brings colors as near.
ALPHA_RATE = 8 / 3
# By which the distance that is reported is measured.
REPORTED_ROTATIONS = 100


class ColorGuidance(Method):
    r"""Moves what is generated to the colors of a reference: SW-Guidance.

    At each guided step, with x the sample as the UNet takes it and u = 0 at first,

    .. math::
        u \leftarrow u - \eta \nabla_u L\big(\operatorname{decode}(\hat x_0(x + u))\big), \qquad
        L(I) = \frac1K \sum_{k=1}^{K} \sum_{a=1}^{3}
               W_1\big(I \, \theta_{ka}, \; R \, \theta_{ka}\big)

    ``inner_steps`` times, where :math:`\hat x_0` is the clean image that the UNet predicts for the
    prompt, without guidance, decoded and clamped to [0, 1]; :math:`\theta_{ka}` are the axes of K
    random rotations of RGB, drawn anew each time; and R are the reference's colors. The pipeline's
    own prediction and the scheduler's step then start from x + u. ::

        guidance = sdcore.ColorGuidance("sunset.jpg")
        with sdcore.patch(pipe, guidance):
            image = pipe("a lighthouse in the fog").images[0]
        print(guidance.losses[-1])

    Args:
        reference: an image (a path, one of Pillow's, an array or a tensor, as
            ``Palette.from_image`` takes them), a :class:`sdcore.Palette`, or a list of colors, as
            ``Palette.from_colors`` takes them; or a list of images and palettes, one for each
            picture of the call.
        preset: where the arguments that are None come from: "quality" for the published settings
            but for the schedule (8 inner steps, 10 rotations, 0.93 of the run guided, decoded at
            full size, through the UNet, "binned", "alpha"), or "fast": with 4 inner steps, and the
            UNet's gradient "frozen".
        inner_steps: steps of gradient descent at each guided step.
        learning_rate: :math:`\eta`, for latents of unit variance; None for what is published, at
            the size that it is published for, and for latents of h × w in proportion: with SDXL
            100 · (h · w) / 96², with Stable Diffusion 1 and 2 140 · (h · w) / 64², the middle of
            what is published for 1.5; with the schedule "alpha" 8/3 of that, calibrated on the
            embedded models. A higher one brings colors nearer and costs content.
        normalize_gradient: divides each picture's gradient by its standard deviation; a learning
            rate must then be given (the published one is 0.04).
        rotations: K.
        guided_fraction: the share of the run, from its beginning, that is guided.
        decode_scale: the size at which the clean latents are decoded, of their own, in (0, 1].
        unet_gradient: "full", or "frozen", which takes the predicted noise for constant: the UNet
            is then not differentiated.
        loss: "binned" or "exact", the ``method`` of ``sdcore.ops.sliced_wasserstein``; or
            "published", for comparison: exact, between as many pixels as there are, drawn with
            replacement anew for each axis, and as many colors of the reference.
        schedule: "constant", as published, or "alpha": at each step :math:`\eta` times the
            :math:`\alpha` of x = :math:`\alpha` · (clean latents) + :math:`\sigma` · (noise),
            :math:`\alpha^2 + \sigma^2 = 1`. With a frozen UNet that is the descent by the
            gradient to the clean latents. Steps are then small while the picture's content forms.
        seed: of the rotations; None for that of the (first) ``generator`` that the pipeline is
            called with, or else ``torch.initial_seed()``.
        graph: on a GPU capture an inner step as one CUDA graph, which serves all of them, and the
            pipeline's own calls of the UNet as another; neither if another method is around these
            calls, too, or the loss is "published". They keep the memory that an inner step needs,
            and the UNet's convolutions their weights channels-last, until the method is removed.

    Works with Stable Diffusion 1, 2 and SDXL, from text, from images and with ControlNet, whose
    residuals are held at what they were for x; with models that predict noise, v or the sample.
    The UNet and the VAE are frozen for the run. On a GPU :class:`sdcore.FastDecoder` decodes, and
    in graphs :class:`sdcore.FastNorms` and :class:`sdcore.FastGEGLU` are at work. A VAE in float16
    that overflows there (``force_upcast``) is copied to float32, until the method is removed.
    Weights, adapters and what else changes a model are looked at when a run begins.

    ``losses`` has, for each guided step of the run that began last, so far, the means of L over
    pictures, which is three times a sliced W1: one for each inner step, before its update.
    :meth:`report`, or that of what ``sdcore.patch`` returned, has more.

    Raises:
        TypeError, ValueError: an argument that the above rules out. When a run begins: models whose
            weights are moved or cast between calls (``enable_model_cpu_offload``, layerwise
            casting), were loaded within ``torch.inference_mode``, or checkpoint gradients where
            other methods are around the UNet; a scheduler of which no move of the sample is
            followed. At its first step: references that are not as many as pictures.
        FloatingPointError: a loss or a gradient that is not finite, with the step.
        RuntimeError: ``torch.inference_mode``.

    Source: Lobashev, Larchenko, Guskov, *Color Conditional Generation with Sliced Wasserstein
    Guidance*, 2025.
    """

    moves_sample = True
    needs_gradients = True

    def __init__(
        self,
        reference: Any,
        *,
        preset: str = "quality",
        inner_steps: int | None = None,
        learning_rate: float | None = None,
        normalize_gradient: bool = False,
        rotations: int | None = None,
        guided_fraction: float | None = None,
        decode_scale: float | None = None,
        unet_gradient: str | None = None,
        loss: str | None = None,
        schedule: str | None = None,
        seed: int | None = None,
        graph: bool = True,
    ) -> None:
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
        given = {
            "inner_steps": inner_steps, "rotations": rotations, "guided_fraction": guided_fraction,
            "decode_scale": decode_scale, "unet_gradient": unet_gradient, "loss": loss,
            "schedule": schedule,
        }  # fmt: skip
        chosen = PRESETS[preset] | {key: one for key, one in given.items() if one is not None}
        _check_options(**chosen)
        if learning_rate is not None and not _is_positive(learning_rate):
            raise ValueError(f"learning_rate must be positive and finite; got {learning_rate!r}")
        if normalize_gradient and learning_rate is None:
            raise ValueError("normalize_gradient needs a learning_rate; published is 0.04")
        _check_seed(seed)
        self.palettes = _palettes(reference)
        self.inner_steps, self.rotations = int(chosen["inner_steps"]), int(chosen["rotations"])
        self.learning_rate = None if learning_rate is None else float(learning_rate)
        self.normalize_gradient = bool(normalize_gradient)
        self.guided_fraction = float(chosen["guided_fraction"])
        self.decode_scale = float(chosen["decode_scale"])
        self.unet_gradient, self.loss = chosen["unet_gradient"], chosen["loss"]
        self.schedule = chosen["schedule"]
        self.seed, self.graph = seed, bool(graph)
        self.losses: list[list[float]] = []
        self._last: _Told | None = None
        self._decoder, self._within_a_graph = FastDecoder(graph=graph), FastDecoder(graph=False)
        self._norms, self._gates = FastNorms(), FastGEGLU()
        self._graphs: WeakKeyDictionary[nn.Module, _Graphs] = WeakKeyDictionary()
        # Copies of VAEs in float32, and of which weights.
        self._copies: WeakKeyDictionary[nn.Module, tuple[Any, nn.Module]] = WeakKeyDictionary()
        # Each pipeline's models that there are graphs and copies of: it may have others by the end.
        self._models: WeakKeyDictionary[Any, WeakSet[nn.Module]] = WeakKeyDictionary()

    def begin(self, run: Run) -> None:
        state, pipe = run.of(self), run.pipe
        # A method further out may have changed what the UNet does, and change it again in the run.
        others = (type(one) for one in run.methods if one is not self)
        alone = all(one.denoise is Method.denoise for one in others)
        _check_models(pipe, alone)
        state.palettes = state.generator = state.graphs = None
        state.frozen = contextlib.ExitStack()
        # Of the run what report() tells, and none of its models.
        state.told = self._last = _Told(_Clock(plain(pipe.unet).device))
        self.losses = state.told.losses
        state.vae = pipe.vae
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.get("force_upcast"):
            state.vae = self._upcast(pipe)
        for part in (pipe.unet, state.vae):
            state.frozen.enter_context(frozen(part))
        if (
            self.graph
            and self.loss != "published"
            and alone
            and plain(pipe.unet).device.type == "cuda"
        ):
            state.graphs = self._graphs_of(pipe, state.vae)

    def denoise(self, call: Call, proceed: Callable[[Call], Tensor]) -> Tensor:
        state = call.run.of(self)
        if state.palettes is None:
            self._prepare(state, call)
        if call.progress < self.guided_fraction:
            with torch.enable_grad(), state.told.clock.part("guidance"):
                u = self._control(state, call, proceed)
            call = call.moved(u)
        with state.told.clock.part("prediction"):
            if state.graphs is not None and graphs.fits(call.options):
                return state.graphs.predicted(call)
            return proceed(call)

    def decode(self, run: Run, latents: Tensor, proceed: Callable[[Tensor], Tensor]) -> Tensor:
        state, vae = run.of(self), run.pipe.vae
        fast = self._decoder.within(vae) if latents.is_cuda else contextlib.nullcontext()
        with state.told.clock.part("decoding"), fast:
            pictures = proceed(latents)
        if state.palettes is not None and len(state.palettes) in (1, len(pictures)):
            state.told.distances = _distances(pictures, state.palettes)
        return pictures

    def end(self, run: Run, error: BaseException | None) -> None:
        state = run.of(self)
        if hasattr(state, "told"):
            state.frozen.close()
            state.told.clock.stop()

    def removed(self, pipe: Any) -> None:
        self._decoder.removed(pipe)
        for model in self._models.pop(pipe, ()):
            if model in self._copies:
                self._decoder.removed(self._copies.pop(model)[1])
            if model in self._graphs:
                self._graphs.pop(model).clear()

    def report(self) -> dict[str, Any] | None:
        """Of the run that began last; None before the first.

        Returns:
            ``timesteps`` of the guided steps; their ``losses``, as above; ``distances``, of each
            picture that was decoded its sliced W1 to its reference, by 300 directions; and
            ``seconds``: of the inner steps ("guidance"), of the pipeline's own calls of the UNet
            ("prediction"), of its "decoding", and the "total". On a GPU this waits for it.
        """
        told = self._last
        if told is None:
            return None
        return {
            "timesteps": [float(torch.as_tensor(one).flatten()[0]) for one in told.timesteps],
            "losses": [list(some) for some in told.losses],
            "distances": None if told.distances is None else told.distances.tolist(),
            "seconds": told.clock.seconds(),
        }

    def _prepare(self, state: SimpleNamespace, call: Call) -> None:
        """At the first step: what depends on where the latents are, and on how many."""
        device, pictures = call.sample.device, len(call.latents)
        if len(self.palettes) not in (1, pictures):
            raise ValueError(
                f"reference must be one, or one for each picture; got {len(self.palettes)} for "
                f"{pictures} pictures"
            )
        state.palettes = [
            (one.colors.to(device), None if one.has_equal_weights else one.weights.to(device))
            for one in self.palettes
        ]
        if call.latents.ndim != 4 or call.latents.shape[2:] != call.sample.shape[2:]:
            raise ValueError(
                "ColorGuidance guides pictures whole; got latents of "
                f"{list(call.latents.shape)} for a sample of {list(call.sample.shape)}"
            )
        kind = call.run.scheduler.config.prediction_type
        if kind not in KINDS:
            raise ValueError(f"prediction_type must be one of {', '.join(KINDS)}; got {kind!r}")
        state.generator = torch.Generator(device)
        state.generator.manual_seed(_seed(call.run) if self.seed is None else self.seed)
        state.scaling = _scaling(state.vae, device)

    def _upcast(self, pipe: Any) -> Any:
        """A copy in float32, always the same one: graphs have its addresses."""
        vae = pipe.vae
        self._models.setdefault(pipe, WeakSet()).add(vae)
        weights = vae.state_dict()
        key = tuple((one.data_ptr(), one._version) for one in weights.values())
        before, found = self._copies.get(vae, (None, None))
        if found is None or found.state_dict().keys() != weights.keys():
            found = copy.deepcopy(vae).float()
            vars(found).pop("decode", None)  # what replaced it is the original's own
        elif before != key:
            # Diffusers itself casts the VAE to float32 and back whenever it decodes.
            with torch.no_grad():
                for name, one in found.state_dict().items():
                    one.copy_(weights[name])
        self._copies[vae] = key, found
        return found

    def _graphs_of(self, pipe: Any, vae: Any) -> _Graphs:
        unet = plain(pipe.unet)
        self._models.setdefault(pipe, WeakSet()).add(unet)
        kept = self._graphs.get(unet)
        if kept is None or kept.vae() is not vae:
            if kept is not None:
                kept.clear()
            kept = self._graphs[unet] = _Graphs(self, unet, vae)
        kept.begin()
        return kept

    def _control(
        self, state: SimpleNamespace, call: Call, proceed: Callable[[Call], Tensor]
    ) -> Tensor:
        """u, of the latents' shape."""
        alone = call.of_prompt()
        u = torch.zeros_like(call.latents, dtype=torch.float32)
        rotations = random_rotations(
            self.inner_steps * self.rotations, 3, device=u.device, generator=state.generator
        )
        settings = {
            "alpha": call.alpha, "sigma": call.sigma, "palettes": state.palettes,
            "rate": self._rate(call), "kind": call.run.scheduler.config.prediction_type,
            "scaling": state.scaling, "unet_gradient": self.unet_gradient,
            "decode_scale": self.decode_scale, "loss": self.loss,
            "normalize_gradient": self.normalize_gradient, "schedule": self.schedule,
        }  # fmt: skip
        graph = state.graphs is not None and graphs.fits(alone.options)
        generator = state.generator if self.loss == "published" else None

        def ask(x: Tensor) -> Tensor:
            return proceed(replace(alone, sample=x, shift=u))

        x, losses = alone.sample, []
        for some in rotations.split(self.rotations):
            directions = some.flatten(0, 1)
            if graph:
                u, x, loss = state.graphs.moved_on(alone, u, x, directions, settings)
            else:
                fast = self._decoder if u.is_cuda else None
                u, x, loss = _inner_step(
                    ask, state.vae, fast, u, x, alone.sample, directions, generator=generator,
                    **settings,
                )  # fmt: skip
            losses.append(loss)
        self._check_finite(state, call, losses, u)
        return u

    def _rate(self, call: Call) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        rate = published_rate(call.run.pipe.unet, call.latents.shape[2:])
        return ALPHA_RATE * rate if self.schedule == "alpha" else rate

    @staticmethod
    def _check_finite(state: SimpleNamespace, call: Call, losses: list[Tensor], u: Tensor) -> None:
        """Asked once a step, since the host waits for it."""
        *values, last = torch.stack([*losses, u.sum()]).tolist()
        state.told.timesteps.append(call.timestep)
        state.told.losses.append(values)
        if all(map(math.isfinite, (*values, last))):
            return
        why = ""
        if float(call.alpha) == 0:
            why = "; the sample is noise alone there (zero terminal SNR)"
        elif torch.float16 in (state.vae.dtype, call.sample.dtype):
            why = "; float16 may overflow: load the model in bfloat16 or float32"
        what = "gradient" if all(map(math.isfinite, values)) else "loss"
        raise FloatingPointError(f"the {what} is not finite at step {call.index}: {values}{why}")


def _inner_step(
    ask: Callable[[Tensor], Tensor],
    vae: Any,
    fast: FastDecoder | None,
    u: Tensor,
    x: Tensor,
    sample: Tensor,
    directions: Tensor,
    *,
    alpha: Tensor,
    sigma: Tensor,
    palettes: list[tuple[Tensor, Tensor | None]],
    rate: float,
    kind: str,
    scaling: tuple[Tensor, Tensor],
    unet_gradient: str,
    decode_scale: float,
    loss: str,
    normalize_gradient: bool,
    schedule: str,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """u and x, the sample moved by it, after the step; and the mean of L before. ``ask`` gives what
    the UNet says of x."""
    full, channels = unet_gradient == "full", u.shape[1]
    x = x.detach().requires_grad_(full)
    with torch.set_grad_enabled(full):
        said = ask(x)
    at, front = x, x[:, :channels]
    if not full:
        # Of a constant noise.
        at = front = front.float().requires_grad_()
        if kind != "epsilon":
            said, kind = _noise(kind, said.float(), front.detach(), alpha, sigma), "epsilon"
    scale, shift = (one.flatten().expand(channels) for one in scaling)
    latents = clean_latents(
        front, said, alpha, sigma, prediction_type=kind, scale=scale, shift=shift,
        dtype=vae.dtype if decode_scale == 1 else torch.float32,
    )  # fmt: skip
    pictures = _decoded(vae, fast, latents, decode_scale)
    found = _losses(pictures, directions, palettes, loss, generator)
    # Of a mean over pixels: float16 would lose gradients as small as that.
    larger = 2.0 ** max(0, round(math.log2(pictures[0, 0].numel() / 64)))
    grad = torch.autograd.grad(larger * found.sum(), at)[0][:, :channels]
    # Read as it lies: no launch of its own.
    factor = alpha.expand(len(u)) if schedule == "alpha" else None
    if normalize_gradient:
        # Of no gradient at all there is nothing to divide.
        spread = grad.float().std((1, 2, 3)).clamp(min=1e-30)
        factor = (1 if factor is None else factor) / spread
    else:
        rate /= larger
    u, x = control_step(u, grad, sample, rate, factor=factor)
    return u, x, found.detach().mean()


class _Graphs:
    """Of a UNet and a VAE, which they do not hold."""

    def __init__(self, method: ColorGuidance, unet: nn.Module, vae: nn.Module) -> None:
        self.unet, self.vae = weakref.ref(unet), weakref.ref(vae)
        norms, gates = method._norms, method._gates

        def said(given: dict[str, Any]) -> Tensor:
            unet, options = self.unet(), dict(given)
            # As pipelines call it: hooks find the sample among the positional arguments.
            first = options.pop("sample"), options.pop("timestep")
            with norms.within(unet), gates.within(unet):
                return unet(*first, **options, return_dict=False)[0]

        def inner_step(
            given: dict[str, Any], u: Tensor, x: Tensor, directions: Tensor, **settings: Any
        ) -> Any:
            def ask(x: Tensor) -> Tensor:
                return said(given | {"sample": x})

            vae, fast = self.vae(), method._within_a_graph
            return _inner_step(ask, vae, fast, u, x, given["sample"], directions, **settings)

        self.inner = graphs.Graphs(inner_step, "an inner step of ColorGuidance")
        self.prediction = graphs.Graphs(said, "the UNet within ColorGuidance")
        self.turned: list[weakref.ref[Tensor]] = []

    def begin(self) -> None:
        """At a run's beginning, when nothing of it was captured yet."""
        self._turn_weights()
        of_unet, of_vae = (graphs.module_state(part) for part in (self.unet(), self.vae()))
        self.prediction.state = of_unet
        why_not = (one for one in (of_unet, of_vae) if isinstance(one, str))
        self.inner.state = next(why_not, (of_unet, of_vae))

    def _turn_weights(self) -> None:
        """cuDNN's kernels for half types take channels-last: convolutions that are not would be
        copied before and after each, and their weights each time."""
        for part in self.unet().modules():
            if type(part) is nn.Conv2d and part.weight.is_cuda:
                weight = part.weight
                turned = weight.detach().contiguous(memory_format=torch.channels_last)
                if turned.stride() != weight.stride():
                    weight.data = turned
                    self.turned.append(weakref.ref(weight))

    def clear(self) -> None:
        self.inner.clear()
        self.prediction.clear()
        for weight in (found for one in self.turned if (found := one()) is not None):
            weight.data = weight.detach().contiguous()
        self.turned.clear()

    def moved_on(
        self, call: Call, u: Tensor, x: Tensor, directions: Tensor, settings: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """An inner step: u, the sample moved by it, and the loss before."""
        # The UNet's turn first, as wherever its forwards are replaced, and then the graph's.
        with turn(self.unet()):
            return self.inner(self._given(call), u, x, directions, **settings)

    def predicted(self, call: Call) -> Tensor:
        """What the UNet says to the call that is passed on."""
        call.passed()
        with turn(self.unet()):
            return self.prediction(self._given(call))

    def _given(self, call: Call) -> dict[str, Any]:
        return {
            "sample": call.sample,
            "timestep": torch.as_tensor(call.timestep, device=call.sample.device),
            "encoder_hidden_states": call.encoder_hidden_states,
            **call.options,
        }


@dataclass
class _Told:
    """Of one run, what is reported."""

    clock: _Clock
    timesteps: list[Any] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    distances: Tensor | None = None


class _Clock:
    """Of the parts of a run: on a GPU by events, which nothing waits for until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._now()
        self._ended: Any = None
        self._taken: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = self._now()
        yield
        self._taken.append((name, before, self._now()))

    def stop(self) -> None:
        self._ended = self._now()

    def seconds(self) -> dict[str, float]:
        found = dict.fromkeys(("guidance", "prediction", "decoding"), 0.0)
        for name, before, after in self._taken:
            found[name] += self._between(before, after)
        ended = self._now() if self._ended is None else self._ended
        return found | {"total": self._between(self._began, ended)}

    def _now(self) -> Any:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        return time.perf_counter()

    @staticmethod
    def _between(before: Any, after: Any) -> float:
        if isinstance(before, float):
            return after - before
        after.synchronize()
        return before.elapsed_time(after) / 1e3


def published_rate(unet: Any, size: Sequence[int]) -> float:
    """The learning rate for latents of this height and width."""
    is_xl = unet.config.get("addition_embed_type") == "text_time"
    rate, latents = RATES["SDXL" if is_xl else "SD"]
    return rate * math.prod(size) / latents


def _seed(run: Run) -> int:
    """Of the generator that the pipeline was given, or of PyTorch's; nothing is drawn."""
    given = run.arguments.get("generator")
    first = given[0] if isinstance(given, (list, tuple)) and given else given
    return first.initial_seed() if isinstance(first, torch.Generator) else torch.initial_seed()


def _scaling(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """What latents of unit variance are multiplied by, and what is added, for the decoder."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = [0.0], [1.0]
    mean, std = (
        torch.tensor(one, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)
        for one in (mean, std)
    )
    return std / config.scaling_factor, mean


def _losses(
    pictures: Tensor,
    directions: Tensor,
    palettes: list[tuple[Tensor, Tensor | None]],
    method: str,
    generator: torch.Generator | None = None,
) -> Tensor:
    """L of each picture, as decoded: of [-1, 1]. With a generator, the published one's."""
    if method == "binned":  # the same, as it is read
        options: dict[str, Any] = {"value_range": (0.0, 1.0), "rescale": (0.5, 0.5)}
    else:
        pictures, options = (pictures.float() / 2 + 0.5).clamp(0, 1), {}
    pixels = pictures.flatten(2).mT
    groups = [pixels] if len(palettes) == 1 else pixels.split(1)
    found = []
    for some, (colors, weights) in zip(groups, palettes, strict=True):
        if method == "published":
            found.append(_bootstrapped(some, colors, weights, directions, generator))
            continue
        found.append(
            sliced_wasserstein(
                some, colors, directions=directions, weights_y=weights, method=method, **options
            )
        )
    return 3 * torch.cat(found)


def _distances(pictures: Tensor, palettes: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Sliced W1 of each picture, by directions that are always the same."""
    generator = torch.Generator(pictures.device).manual_seed(0)
    rotations = random_rotations(REPORTED_ROTATIONS, 3, generator, device=pictures.device)
    return _losses(pictures, rotations.flatten(0, 1), palettes, "binned") / 3


def _bootstrapped(
    pixels: Tensor,
    colors: Tensor,
    weights: Tensor | None,
    directions: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Mean over directions of W_1 between pixels [B, n, 3] and colors, of each as many drawn with
    replacement as there are pixels."""
    drawn = (pixels.shape[1], len(directions))
    chosen = torch.randint(drawn[0], drawn, device=pixels.device, generator=generator)
    x = (pixels @ directions.mT).gather(1, chosen.expand(len(pixels), -1, -1))
    if weights is None:
        taken = torch.randint(len(colors), drawn, device=pixels.device, generator=generator)
    else:
        shares = weights.double().cumsum(0)
        at = torch.rand(drawn, device=pixels.device, dtype=torch.float64, generator=generator)
        taken = torch.searchsorted(shares, at * shares[-1]).clamp_(max=len(colors) - 1)
    y = (colors.to(pixels.dtype) @ directions.mT).gather(0, taken)
    return (x.sort(1).values - y.sort(0).values).abs().mean((1, 2))


def _decoded(vae: Any, fast: FastDecoder | None, latents: Tensor, scale: float) -> Tensor:
    """[B, 3, H, W] in [-1, 1], or somewhat beyond, of the VAE's dtype."""
    if scale != 1:
        size = [max(1, round(scale * side)) for side in latents.shape[2:]]
        latents = F.interpolate(latents, size=size, mode="bilinear", antialias=True)
    with contextlib.nullcontext() if fast is None else fast.within(vae):
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]


def _noise(kind: str, said: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise in x."""
    if kind == "epsilon":
        return said
    return alpha * said + sigma * x if kind == "v_prediction" else (x - alpha * said) / sigma


# ---------------------------------------------------------------------------------------------
# Weights that want no gradient, for a time

_frozen: WeakKeyDictionary[nn.Module, SimpleNamespace] = WeakKeyDictionary()
_frozen_lock = threading.Lock()


@contextlib.contextmanager
def frozen(module: Any) -> Iterator[None]:
    """Within it, of however many threads, no weight of the module wants a gradient; after the last
    of them, those that did want one again."""
    inner = plain(module)
    with _frozen_lock:
        kept = _frozen.setdefault(inner, SimpleNamespace(count=0, weights=[]))
        if kept.count == 0:
            kept.weights = [one for one in inner.parameters() if one.requires_grad]
            for one in kept.weights:
                one.requires_grad_(False)
        kept.count += 1
    try:
        yield
    finally:
        with _frozen_lock:
            kept.count -= 1
            if kept.count == 0:
                del _frozen[inner]
                for one in kept.weights:
                    one.requires_grad_(True)


# ---------------------------------------------------------------------------------------------
# Arguments


def _palettes(reference: Any) -> list[Palette]:
    """One, or one for each picture."""
    if not isinstance(reference, (list, tuple)):
        return [_palette(reference)]
    if not reference:
        raise ValueError("reference must be one or more; got an empty list")
    if all(map(_is_color, reference)):
        return [_in_range(Palette.from_colors(reference))]
    if any(isinstance(one, (list, tuple)) for one in reference):
        raise TypeError(
            "reference must be one list of colors, or a list of images and palettes; colors for "
            "one picture of several go into sdcore.Palette.from_colors"
        )
    return [_palette(one) for one in reference]


def _is_color(one: Any) -> bool:
    """A row of three numbers, or a string that Palette.from_colors knows."""
    if isinstance(one, (str, os.PathLike)):
        try:
            Palette.from_colors([one])
        except (TypeError, ValueError):
            return False
        return True
    if isinstance(one, (list, tuple)):
        return all(isinstance(channel, Real) for channel in one)
    return getattr(one, "ndim", None) == 1


def _palette(one: Any) -> Palette:
    if isinstance(one, Palette):
        return _in_range(one)
    if getattr(one, "ndim", None) == 2 and one.shape[1] == 3:
        raise ValueError(
            f"reference {list(one.shape)} could be a gray picture or a list of colors: pass it as "
            "[height, width, 1], or as a list of its rows"
        )
    if isinstance(one, str) and not os.path.exists(one) and _is_color(one):
        raise ValueError(f"reference must be a list of colors: pass [{one!r}]")
    return Palette.from_image(one)


def _in_range(palette: Palette) -> Palette:
    low, high = palette.colors.aminmax()
    if low < 0 or high > 1:
        raise ValueError(
            f"reference must have colors in [0, 1]; got a palette of {low:.3g} to {high:.3g}"
        )
    return palette


def _check_options(
    inner_steps: Any,
    rotations: Any,
    guided_fraction: Any,
    decode_scale: Any,
    unet_gradient: Any,
    loss: Any,
    schedule: Any,
) -> None:
    for name, count in (("inner_steps", inner_steps), ("rotations", rotations)):
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name} must be an int of 1 or more; got {count!r}")
    for name, share in (("guided_fraction", guided_fraction), ("decode_scale", decode_scale)):
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
            raise ValueError(f"{name} must be in (0, 1]; got {share!r}")
    for name, value, known in (
        ("unet_gradient", unet_gradient, UNET_GRADIENTS),
        ("loss", loss, LOSSES),
        ("schedule", schedule, SCHEDULES),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def _check_seed(seed: Any) -> None:
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an int or None; got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be in [-2**63, 2**64); got {seed}")


def _is_positive(value: Any) -> bool:
    return (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > 0
    )


def _check_models(pipe: Any, alone: bool) -> None:
    for name in ("unet", "vae"):
        model = getattr(pipe, name)
        if model is None:
            raise TypeError(f"ColorGuidance needs a {name}; this {type(pipe).__name__} has none")
        if any(is_offloaded(part) or "_diffusers_hook" in vars(part) for part in model.modules()):
            raise ValueError(
                f"ColorGuidance differentiates the UNet and the VAE together, and a hook moves or "
                f"casts weights of the {name} between calls; call pipe.remove_all_hooks() and "
                "pipe.to('cuda'), and don't enable group offloading or layerwise casting"
            )
        if any(one.is_inference() for one in model.parameters()):
            raise ValueError(
                f"the {name} was loaded within torch.inference_mode, and can't be differentiated"
            )
        if not alone and getattr(model, "is_gradient_checkpointing", False):
            raise ValueError(
                f"the {name} checkpoints gradients, and would be asked again where other methods "
                "no longer act on it; call disable_gradient_checkpointing()"
            )
