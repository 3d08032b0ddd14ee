"""Colors of a reference in what a pipeline generates, by gradients of a sliced Wasserstein loss."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcore import graphs
from sdcore.methods.fast_decoder import FastDecoder, is_offloaded
from sdcore.methods.lora import plain
from sdcore.ops import clean_latents, random_rotations, sliced_wasserstein
from sdcore.palette import Palette
from sdcore.patching import Call, Method, Run

# The latents that the published learning rate of 100 belongs to, 96 × 96: the loss is a mean over
# pixels, and so the gradient to one latent is as small as there are many.
PUBLISHED_RATE, PUBLISHED_LATENTS = 100.0, 96 * 96
UNET_GRADIENTS = ("full", "frozen")
LOSSES = ("binned", "exact")


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
        inner_steps: steps of gradient descent at each guided step.
        learning_rate: :math:`\eta`; None for 100 · (h · w) / 96² for latents of h × w, the
            published one at every size. It is for latents of unit variance.
        normalize_gradient: divides each picture's gradient by its standard deviation; a learning
            rate must then be given (the published one is 0.04).
        rotations: K.
        guided_fraction: the share of the run, from its beginning, that is guided.
        decode_scale: the size at which the clean latents are decoded, of their own, in (0, 1].
        unet_gradient: "full", or "frozen", which takes the predicted noise for constant: the UNet
            is then not differentiated.
        loss: "binned" or "exact", the ``method`` of ``sdcore.ops.sliced_wasserstein``.
        seed: of the rotations; None for one that is drawn when a run begins.
        graph: on a GPU capture an inner step as one CUDA graph, which serves all of them, unless
            another method lies between this one and the UNet. It keeps the memory that an inner
            step needs, until the method is removed.

    Works with Stable Diffusion 1, 2 and SDXL, from text, from images and with ControlNet, whose
    residuals are held at what they were for x; with models that predict noise, v or the sample.
    The UNet and the VAE are frozen for the run, and decoded by :class:`sdcore.FastDecoder` on a
    GPU. A VAE in float16 that overflows there (``force_upcast``) is copied to float32 for the run.

    ``losses`` has, for each guided step of the run that began last, so far, the means of L over
    pictures: one for each inner step, before its update.

    Raises:
        TypeError, ValueError: an argument that the above rules out. When a run begins: references
            that are not as many as pictures, models that are moved out of the GPU in turn
            (``enable_model_cpu_offload``), a scheduler of which no move of the sample is followed.
        FloatingPointError: a loss that is not finite, with the step.
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
        inner_steps: int = 8,
        learning_rate: float | None = None,
        normalize_gradient: bool = False,
        rotations: int = 10,
        guided_fraction: float = 0.93,
        decode_scale: float = 1.0,
        unet_gradient: str = "full",
        loss: str = "binned",
        seed: int | None = None,
        graph: bool = True,
    ) -> None:
        _check_options(inner_steps, rotations, guided_fraction, decode_scale, unet_gradient, loss)
        if learning_rate is not None and not _is_positive(learning_rate):
            raise ValueError(f"learning_rate must be positive and finite; got {learning_rate!r}")
        if normalize_gradient and learning_rate is None:
            raise ValueError("normalize_gradient needs a learning_rate; published is 0.04")
        self.palettes = _palettes(reference)
        self.inner_steps, self.rotations = int(inner_steps), int(rotations)
        self.learning_rate = None if learning_rate is None else float(learning_rate)
        self.normalize_gradient = bool(normalize_gradient)
        self.guided_fraction, self.decode_scale = float(guided_fraction), float(decode_scale)
        self.unet_gradient, self.loss = unet_gradient, loss
        self.seed, self.graph = seed, bool(graph)
        self.losses: list[list[float]] = []
        self._decoder, self._within_a_graph = FastDecoder(), FastDecoder(graph=False)
        self._graphs: WeakKeyDictionary[nn.Module, _Graphs] = WeakKeyDictionary()

    def begin(self, run: Run) -> None:
        state = run.of(self)
        pipe = run.pipe
        _check_not_offloaded(pipe)
        state.palettes = state.generator = None
        state.taken = self.losses = []
        state.vae = pipe.vae
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.get("force_upcast"):
            state.vae = copy.deepcopy(pipe.vae).float()
        state.frozen = contextlib.ExitStack()
        for part in (pipe.unet, state.vae):
            state.frozen.enter_context(frozen(part))

    def denoise(self, call: Call, proceed: Callable[[Call], Tensor]) -> Tensor:
        if call.progress >= self.guided_fraction:
            return proceed(call)
        state = call.run.of(self)
        if state.palettes is None:
            self._prepare(state, call)
        with torch.enable_grad():
            u = self._control(state, call, proceed)
        return proceed(call.moved(u))

    def end(self, run: Run, error: BaseException | None) -> None:
        getattr(run.of(self), "frozen", contextlib.ExitStack()).close()

    def removed(self, pipe: Any) -> None:
        self._decoder.removed(pipe)
        kept = self._graphs.pop(plain(pipe.unet), None)
        if kept is not None:
            kept.graphs.clear()

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
        state.generator = torch.Generator(device)
        state.generator.manual_seed(
            int(torch.randint(2**62, ())) if self.seed is None else self.seed
        )
        state.scaling = _scaling(state.vae, device)
        state.graphs = None
        if self.graph and device.type == "cuda" and call.run.innermost(self):
            state.graphs = self._graphs_of(call.run.pipe.unet, state.vae)

    def _graphs_of(self, unet: Any, vae: Any) -> _Graphs:
        unet = plain(unet)
        kept = self._graphs.get(unet)
        if kept is None or kept.vae() is not vae:
            kept = self._graphs[unet] = _Graphs(self, unet, vae)
        kept.graphs.state = kept.state()
        return kept

    def _control(
        self, state: SimpleNamespace, call: Call, proceed: Callable[[Call], Tensor]
    ) -> Tensor:
        """u, of the latents' shape."""
        alone = call.of_prompt()
        u = torch.zeros_like(call.latents, dtype=torch.float32)
        rate = self.learning_rate
        if rate is None:
            rate = PUBLISHED_RATE * math.prod(u.shape[2:]) / PUBLISHED_LATENTS
        rotations = random_rotations(
            self.inner_steps * self.rotations, 3, device=u.device, generator=state.generator
        )
        settings = {
            "alpha": call.alpha, "sigma": call.sigma, "palettes": state.palettes, "rate": rate,
            "kind": call.run.scheduler.config.prediction_type, "scaling": state.scaling,
        }  # fmt: skip
        graph = state.graphs is not None and graphs.fits(alone.options)
        losses = []
        for some in rotations.split(self.rotations):
            directions = some.flatten(0, 1)
            if graph:
                u, loss = state.graphs(alone, u, directions, settings)
            else:

                def ask(u: Tensor) -> tuple[Tensor, Tensor]:
                    moved = alone.moved(u)
                    return moved.sample, proceed(moved)

                fast = self._decoder if u.is_cuda else None
                u, loss = self._inner_step(ask, state.vae, fast, u, directions, **settings)
            losses.append(loss)
        state.taken.append(torch.stack(losses).tolist())
        if not all(map(math.isfinite, state.taken[-1])):
            raise FloatingPointError(
                f"the loss is not finite at step {call.index}: {state.taken[-1]}; a VAE in float16 "
                "may overflow: load it in bfloat16 or float32"
            )
        return u

    def _inner_step(
        self,
        ask: Callable[[Tensor], tuple[Tensor, Tensor]],
        vae: Any,
        fast: FastDecoder | None,
        u: Tensor,
        directions: Tensor,
        *,
        alpha: Tensor,
        sigma: Tensor,
        palettes: list[tuple[Tensor, Tensor | None]],
        rate: float,
        kind: str,
        scaling: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """u after it, and the mean of L before. ``ask`` gives the sample moved by u, and what the
        UNet says of it."""
        u = u.detach().requires_grad_()
        full = self.unet_gradient == "full"
        with torch.set_grad_enabled(full):
            x, said = ask(u)
        x, at = x[:, : said.shape[1]], u
        if not full:
            # Of a constant noise: the gradient to x is that to u.
            x = at = x.detach().float().requires_grad_()
            if kind != "epsilon":
                said, kind = _noise(kind, said.float(), x.detach(), alpha, sigma), "epsilon"
        scale, shift = (one.flatten().expand(x.shape[1]) for one in scaling)
        latents = clean_latents(
            x, said, alpha, sigma, prediction_type=kind, scale=scale, shift=shift,
            dtype=vae.dtype if self.decode_scale == 1 else torch.float32,
        )  # fmt: skip
        loss = _losses(self._decoded(vae, fast, latents), directions, palettes, self.loss)
        (grad,) = torch.autograd.grad(loss.sum(), at)
        if self.normalize_gradient:
            # One launch each, as the other is.
            moved = torch.addcdiv(u.detach(), grad, grad.std((1, 2, 3), keepdim=True), value=-rate)
        else:
            moved = torch.sub(u.detach(), grad, alpha=rate)
        return moved, loss.detach().mean()

    def _decoded(self, vae: Any, fast: FastDecoder | None, latents: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1], or somewhat beyond, of the VAE's dtype."""
        if self.decode_scale != 1:
            size = [max(1, round(self.decode_scale * side)) for side in latents.shape[2:]]
            latents = F.interpolate(latents, size=size, mode="bilinear", antialias=True)
        with contextlib.nullcontext() if fast is None else fast.within(vae):
            return vae.decode(latents.to(vae.dtype), return_dict=False)[0]


class _Graphs:
    """Of a UNet and a VAE, which they do not hold."""

    def __init__(self, method: ColorGuidance, unet: nn.Module, vae: nn.Module) -> None:
        self.unet, self.vae = weakref.ref(unet), weakref.ref(vae)

        def inner_step(
            given: dict[str, Any], u: Tensor, directions: Tensor, **settings: Any
        ) -> Any:
            def ask(u: Tensor) -> tuple[Tensor, Tensor]:
                sample = given["sample"]
                front = sample[:, : u.shape[1]] + u.to(sample.dtype)
                x = torch.cat([front, sample[:, u.shape[1] :]], 1)
                return x, self.unet()(**given | {"sample": x}, return_dict=False)[0]

            vae, fast = self.vae(), method._within_a_graph
            return method._inner_step(ask, vae, fast, u, directions, **settings)

        self.graphs = graphs.Graphs(inner_step, "an inner step of ColorGuidance")

    def state(self) -> Hashable:
        found = [graphs.module_state(part) for part in (self.unet(), self.vae())]
        return next((one for one in found if isinstance(one, str)), tuple(found))

    def __call__(
        self, call: Call, u: Tensor, directions: Tensor, settings: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        given = {
            "sample": call.sample,
            "timestep": torch.as_tensor(call.timestep, device=u.device),
            "encoder_hidden_states": call.encoder_hidden_states,
            **call.options,
        }
        return self.graphs(given, u.detach(), directions, **settings)


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
) -> Tensor:
    """L of each picture, as decoded: of [-1, 1]."""
    if method == "exact":
        pictures, options = (pictures.float() / 2 + 0.5).clamp(0, 1), {}
    else:  # the same, as it is read
        options = {"value_range": (0.0, 1.0), "rescale": (0.5, 0.5)}
    pixels = pictures.flatten(2).mT
    groups = [pixels] if len(palettes) == 1 else pixels.split(1)
    found = [
        sliced_wasserstein(
            some, colors, directions=directions, weights_y=weights, method=method, **options
        )
        for some, (colors, weights) in zip(groups, palettes, strict=True)
    ]  # fmt: skip
    return 3 * torch.cat(found)


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
                for one in kept.weights:
                    one.requires_grad_(True)
                del _frozen[inner]


# ---------------------------------------------------------------------------------------------
# Arguments


def _palettes(reference: Any) -> list[Palette]:
    """One, or one for each picture."""
    if isinstance(reference, (list, tuple)):
        if not reference:
            raise ValueError("reference must be one or more; got an empty list")
        if all(_is_reference(one) for one in reference):
            return [_palette(one) for one in reference]
        return [Palette.from_colors(reference)]
    return [_palette(reference)]


def _is_reference(one: Any) -> bool:
    """Of those that a list may have for each picture, what can't be a color."""
    if isinstance(one, (str, os.PathLike)):
        return os.path.exists(one)
    return not isinstance(one, (list, tuple))


def _palette(one: Any) -> Palette:
    return one if isinstance(one, Palette) else Palette.from_image(one)


def _check_options(
    inner_steps: Any,
    rotations: Any,
    guided_fraction: Any,
    decode_scale: Any,
    unet_gradient: Any,
    loss: Any,
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
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def _is_positive(value: Any) -> bool:
    return (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > 0
    )


def _check_not_offloaded(pipe: Any) -> None:
    for name in ("unet", "vae"):
        if any(map(is_offloaded, getattr(pipe, name).modules())):
            raise ValueError(
                f"ColorGuidance differentiates the UNet and the VAE together, and a hook of "
                f"accelerate moves the {name} out of the GPU; call pipe.remove_all_hooks() and "
                "pipe.to('cuda')"
            )
