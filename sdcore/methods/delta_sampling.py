"""Delta Sampling: what a LoRA, a ControlNet or a fine-tune does to one base, carried to another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sdcore.graphs import Graphs, fits, module_state
from sdcore.methods.lora import LoRA, plain, text_encoders, with_loras
from sdcore.ops import delta_combine
from sdcore.ops.delta_combine import PREDICTION_TYPES, Prediction
from sdcore.ops.dtypes import wide_of
from sdcore.patching import Call, Method, Run

# Whose steps add noise of their own, which the state in another latent space would have to know.
STOCHASTIC = (
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "LCMScheduler",
    "TCDScheduler",
)


@dataclass(frozen=True)
class Control:
    """A ControlNet for :class:`DeltaSampling`, on top of its source.

    Args:
        model: a ``ControlNetModel``, or a folder or repository id.
        image: what it is shown: as ControlNet pipelines take it, one for all pictures or one each.
        scale: as ``controlnet_conditioning_scale``.
        start, end: the part of the run in which it acts, shares of its steps.
    """

    model: Any
    image: Any
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


class DeltaSampling(Method):
    r"""Adds what two models differ by to a third one's prediction (Gao, Pan, Yao, Xie, Wei, 2025,
    arXiv:2512.03056).

    .. math:: T_0' = T_0 + \lambda \frac{s_T}{s_S} (A_0 - S_0)

    on clean latents of the patched pipeline (target), a source and an adapted model, for each
    branch, in latent spaces of scale s; see :func:`sdcore.ops.delta_combine`. Guidance, scheduler
    and all else stay the pipeline's. ::

        ink = sdcore.DeltaSampling(old_base, sdcore.LoRA("ink.safetensors"))
        with sdcore.patch(new_base, ink):
            image = new_base("a lighthouse in the fog").images[0]

    Args:
        source: the base that the adapted model comes from: a pipeline of Stable Diffusion 1, 2 or
            XL (one without VAE will do, with ``source_scale``), or a folder or repository id.
        adapted: a pipeline; a UNet, with the source's text encoders; a :class:`LoRA`, or its file
            or repository id; a :class:`Control`; or a list of LoRAs and Controls.
        strength: :math:`\lambda`, a number, or a function of the run's progress in [0, 1).
        start, end: the part of the run in which the delta is added, shares of its steps.
        prompt, negative_prompt: what source and adapted model are told; default what the pipeline
            was called with, without which (``prompt_embeds``) they must be given. Each model
            encodes them with its own text encoders, once a run.
        adapted_prompt, adapted_negative_prompt: what the adapted model is told, if not the same.
        guidance_scale: the scale at which source and adapted model are guided where the pipeline
            is; default the pipeline's. Another result: a delta that the pipeline's guidance does
            not amplify. At 1 they compute half, without negative prompts.
        refresh_every: source and adapted compute at each k-th step, between which the delta to the
            target's prediction stays. Another result.
        source_scale: the scaling factor of the source's latents; default its VAE's.
        graphs: on a GPU, replay the models from CUDA graphs, side by side.

    Strength 0 leaves the pipeline's results as they are, bit for bit, and so does an adapted model
    that is the source. A source and a Control alone share what they compute before the ControlNet
    comes in. Each model is asked at the timestep of its own schedule whose noise level, ln(σ/α), is
    nearest to the target's.

    With latents of another scale, source and adapted see the state that the target's would be in
    their space. It is known for deterministic schedulers from pure noise; others, image-to-image
    and inpainting are then refused. ``guidance_rescale`` is refused: as published each model's
    guided prediction is rescaled, here it would be their sum.

    The source's own modules are used, not copied, and are moved to the pipeline's device when it
    runs, if it was moved since; a LoRA is fused into a copy of the UNet (and of the text encoders
    that it changes). ``remove`` frees the copies and the graphs. Offloaded pipelines work, without
    graphs, and what is copied stays on the device.

    Raises:
        TypeError: an argument of the wrong type; an unsupported pipeline.
        ValueError: when it is put on: models of another number of channels or another size of
            latents, on another device, with an unknown prediction type, or without alphas_cumprod;
            a LoRA that does not fit the source, by the first key that does not; when it runs: no
            prompt; ``guidance_rescale``; a state in another latent space that is not known.
        FloatingPointError: at a run's end: a prediction was not finite; which model's, and at
            which step.
    """

    repeatable = True
    inside_moves = True

    def __init__(
        self,
        source: Any,
        adapted: Any,
        *,
        strength: float | Callable[[float], float] = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        adapted_prompt: str | Sequence[str] | None = None,
        adapted_negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        refresh_every: int = 1,
        source_scale: float | None = None,
        graphs: bool = True,
    ) -> None:
        if not callable(strength) and not isinstance(strength, (int, float)):
            raise TypeError(
                f"strength must be a number or a function of the progress; got {strength!r}"
            )
        _check_part(start, end)
        if isinstance(refresh_every, bool) or not isinstance(refresh_every, int):
            raise TypeError(f"refresh_every must be an int; got {refresh_every!r}")
        if refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1; got {refresh_every}")
        number = isinstance(guidance_scale, (int, float)) and not isinstance(guidance_scale, bool)
        if guidance_scale is not None and not number:
            raise TypeError(f"guidance_scale must be a number; got {guidance_scale!r}")
        if source_scale is not None and not source_scale > 0:
            raise ValueError(f"source_scale must be above 0; got {source_scale}")
        self.source = source
        self.loras, self.controls, self.adapted = _sorted(adapted)
        self.strength, self.span = strength, (start, end)
        self.prompts = (prompt, negative_prompt)
        self.adapted_prompts = (adapted_prompt, adapted_negative_prompt)
        self.guidance_scale, self.refresh_every = guidance_scale, refresh_every
        self.source_scale, self.graphs = source_scale, graphs
        self._on: WeakKeyDictionary[Any, _Models] = WeakKeyDictionary()

    def check(self, pipe: Any) -> None:
        self._on[pipe] = _Models(self, pipe)

    def begin(self, run: Run) -> None:
        if (run.arguments.get("guidance_rescale") or 0) > 0:
            raise ValueError(
                "guidance_rescale can't be combined with DeltaSampling: as published it rescales "
                "each model's guided prediction, and in the pipeline it would rescale their sum"
            )
        models, state = self._on[run.pipe], run.of(self)
        state.contexts = state.kept = state.first = None
        state.finite = []
        if models.ratio != 1:
            _check_known_state(run)
        models.follow(run.pipe)

    def denoise(self, call: Call, proceed: Callable[[Call], Tensor]) -> Tensor:
        state, models = call.run.of(self), self._on[call.run.pipe]
        if models.ratio != 1 and state.first is None:
            state.first = call.sample[:, : call.latents.shape[1]], call.sigma
        strength = self.strength(call.progress) if callable(self.strength) else self.strength
        if strength == 0 or not self.span[0] <= call.progress < self.span[1]:
            return proceed(call)
        if state.kept is not None and call.index % self.refresh_every:
            out = proceed(call)
            return out + strength * _of_rows(state.kept, out)
        asked = models.asked(self, call, state)
        alone = call.run.innermost(self)
        target, source, adapted = models.predict(call, proceed, alone, asked)
        # Summed in one launch each; looked at when the run is over, so that nothing waits.
        for name, one in (("source", source), ("adapted model", adapted), ("target", target)):
            state.finite.append((name, call.index, one.sum(dtype=torch.float32)))
        legs = (_branches(one, call, self.guidance_scale) for one in (source, adapted))
        out = models.combine(call, target, *legs, asked, strength)
        if self.refresh_every > 1:
            state.kept = (out - target) / strength
        return out

    def end(self, run: Run, error: BaseException | None) -> None:
        models, state = self._on.get(run.pipe), run.of(self)
        if models is not None:
            models.rest()
        if error is None and getattr(state, "finite", None):
            _check_finite(state.finite)

    def removed(self, pipe: Any) -> None:
        models = self._on.pop(pipe, None)
        if models is not None and models.graphs is not None:
            models.graphs.clear()


# ---------------------------------------------------------------------------------------------
# What it is given


def _check_part(start: float, end: float) -> None:
    if not 0 <= start <= end <= 1:
        raise ValueError(f"start and end must be 0 ≤ start ≤ end ≤ 1; got {start} and {end}")


def _sorted(adapted: Any) -> tuple[list[LoRA], list[Control], Any]:
    """LoRAs, Controls, and a pipeline or UNet, if it is one."""
    several = list(adapted) if isinstance(adapted, (list, tuple)) else [adapted]
    if not several:
        raise ValueError("adapted must be something; got an empty list")
    several = [LoRA(one) if isinstance(one, (str, Path, Mapping)) else one for one in several]
    loras = [one for one in several if isinstance(one, LoRA)]
    controls = [one for one in several if isinstance(one, Control)]
    for one in controls:
        _check_part(one.start, one.end)
    others = [one for one in several if not isinstance(one, (LoRA, Control))]
    if len(others) > 1 or (others and len(several) > 1):
        raise TypeError("adapted must be one pipeline or UNet, or LoRAs and Controls alone")
    if others and not (hasattr(others[0], "unet") or isinstance(others[0], nn.Module)):
        raise TypeError(
            "adapted must be a pipeline, a UNet, a LoRA, a Control or a list of the last two; "
            f"got {others[0]!r}"
        )
    return loras, controls, others[0] if others else None


def _pipeline(source: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, bool]:
    """And whether it is this method's own."""
    if hasattr(source, "unet") and hasattr(source, "encode_prompt"):
        return source, False
    if isinstance(source, (str, Path)):
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(source, torch_dtype=dtype).to(device), True
    raise TypeError(
        "source must be a pipeline with a UNet and encode_prompt, a folder or a repository id; "
        f"got {type(source).__name__}"
    )


# ---------------------------------------------------------------------------------------------
# The models


@dataclass
class _Leg:
    """Source, or adapted model."""

    pipe: Any  # whose prompt encoders are used
    unet: Any
    prediction: str
    scheduler: Any
    controls: list[Control] = field(default_factory=list)
    levels: Tensor | None = None  # ln(σ/α) of each timestep; None if they are the target's


@dataclass
class _Asked:
    """What source and adapted are asked at one call."""

    sample: Tensor  # in the source's latent space
    timesteps: tuple[Tensor, Tensor]
    contexts: tuple[Tensor, Tensor]
    added: tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]
    images: list[Tensor]  # of the controls
    scales: list[float]
    shared: bool  # what source and adapted compute before the controls come in


class _Models:
    """The models beside one patched pipeline, and their graphs."""

    def __init__(self, method: DeltaSampling, pipe: Any) -> None:
        unet = plain(pipe.unet)
        dtype, device = unet.dtype, pipe._execution_device
        source, own = _pipeline(method.source, dtype, device)
        self.owned: list[nn.Module] = list(_modules(source)) if own else []
        self.source = _leg("source", source)
        self.adapted = self._adapted(method, source, dtype, device)
        self.prediction = _prediction("the pipeline", pipe.scheduler)
        self.ratio = _scaling(source, method.source_scale) / pipe.vae.config.scaling_factor
        for name, leg in (("source", self.source), ("adapted", self.adapted)):
            _check_fits(name, leg, pipe)
            leg.levels = _log_ratios(name, leg.scheduler, pipe.scheduler)
        self.graphs = Graphs(self._at_once, "DeltaSampling") if method.graphs else None
        self.unet = pipe.unet
        self._streams: list[torch.cuda.Stream] = []

    def _adapted(
        self, method: DeltaSampling, source: Any, dtype: torch.dtype, device: torch.device
    ) -> _Leg:
        if method.adapted is not None:
            given = method.adapted
            is_pipe = hasattr(given, "unet")
            if is_pipe and getattr(given, "controlnet", None) is not None:
                raise TypeError(
                    "adapted is a pipeline with a ControlNet, which needs its image: give "
                    "sdcore.Control(pipeline.controlnet, image)"
                )
            if is_pipe:
                return _leg("adapted", given)
            return replace(self.source, unet=given)
        leg = self.source
        if method.loras:
            pipe = with_loras(source, method.loras)
            self.owned.append(pipe.unet)
            leg = _leg("adapted", pipe)
        controls = []
        for one in method.controls:
            model = one.model
            if isinstance(model, (str, Path)):
                from diffusers import ControlNetModel

                model = ControlNetModel.from_pretrained(model, torch_dtype=dtype).to(device)
                self.owned.append(model)
            if not isinstance(model, nn.Module):
                raise TypeError(
                    "the model of a Control must be a ControlNetModel, a folder or a repository "
                    f"id; got {type(model).__name__}"
                )
            controls.append(replace(one, model=model))
        return replace(leg, controls=controls)

    def modules(self) -> list[nn.Module]:
        found = [self.source.unet, self.adapted.unet]
        found += [one.model for one in self.adapted.controls]
        for leg in (self.source, self.adapted):
            found += text_encoders(leg.pipe).values()
        return list({id(one): one for one in [*found, *self.owned]}.values())

    def follow(self, pipe: Any) -> None:
        """At a run's begin: moves to the pipeline's device what is elsewhere and not offloaded."""
        self.unet, device = pipe.unet, pipe._execution_device
        for one in self.modules():
            first = next(one.parameters(), None)
            if first is not None and first.device != device and not hasattr(one, "_hf_hook"):
                one.to(device)
        if self.graphs is not None and device.type == "cuda":
            self.graphs.state = self._baked_in()

    def rest(self) -> None:
        for leg in (self.source, self.adapted):
            if getattr(leg.pipe, "_all_hooks", None):
                leg.pipe.maybe_free_model_hooks()

    def _baked_in(self) -> Any:
        """The state of the graphs."""
        controls = (one.model for one in self.adapted.controls)
        found = [
            module_state(plain(one))
            for one in (self.unet, self.source.unet, self.adapted.unet, *controls)
        ]
        return next((one for one in found if isinstance(one, str)), tuple(found))

    # -----------------------------------------------------------------------------------------
    # What they are asked

    def asked(self, method: DeltaSampling, call: Call, state: SimpleNamespace) -> _Asked:
        if state.contexts is None:
            first = self._encoded(method, call, self.source, (None, None))
            same = self.adapted.pipe is self.source.pipe and method.adapted_prompts == (None, None)
            second = first
            if not same:
                second = self._encoded(method, call, self.adapted, method.adapted_prompts)
            state.contexts, pictures = (first, second), len(first[0]) // 2
            state.images = [_shown(one, call, pictures) for one in self.adapted.controls]
        rows = call.conditional if method.guidance_scale == 1 else slice(0, len(call.sample))
        # Of what is kept for a run, negative prompts come first: a call's rows are the last ones.
        count = rows.stop - rows.start
        legs = (self.source, self.adapted)
        return _Asked(
            self._state(call, state)[rows],
            tuple(_timestep(leg, call) for leg in legs),
            tuple(context[-count:] for context, _ in state.contexts),
            tuple(_added(pooled, call, rows) for _, pooled in state.contexts),
            [image[-count:] for image in state.images],
            [
                one.scale if one.start <= call.progress < one.end else 0.0
                for one in self.adapted.controls
            ],
            state.contexts[0] is state.contexts[1]
            and self.adapted.unet is self.source.unet
            and _shareable(self.source.unet),
        )

    def _encoded(
        self, method: DeltaSampling, call: Call, leg: _Leg, own: tuple[Any, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Of negative and positive prompts [2 B, tokens, width]; and, of SDXL, pooled."""
        asked = (call.run.arguments.get(name) for name in ("prompt", "negative_prompt"))
        positive, negative = (
            next((one for one in some if one is not None), None)
            for some in zip(own, method.prompts, asked, strict=True)
        )
        if positive is None:
            raise ValueError(
                "the pipeline was called without a prompt in words, which source and adapted model "
                "could encode; give DeltaSampling(prompt=…)"
            )
        pictures = call.conditional.stop - call.conditional.start
        prompts = 1 if isinstance(positive, str) else len(positive)
        if pictures % prompts:
            raise ValueError(
                f"prompt must be one, or one for each picture; got {prompts} for {pictures}"
            )
        found = leg.pipe.encode_prompt(
            positive if isinstance(positive, str) else list(positive),
            device=call.sample.device,
            num_images_per_prompt=pictures // prompts,
            do_classifier_free_guidance=True,
            negative_prompt=list(negative) if isinstance(negative, tuple) else negative,
        )
        dtype = plain(leg.unet).dtype
        context = torch.cat([found[1], found[0]]).to(dtype)
        return context, torch.cat([found[3], found[2]]).to(dtype) if len(found) > 2 else None

    def _state(self, call: Call, state: SimpleNamespace) -> Tensor:
        """The sample as source and adapted would have it: the same noise, and clean latents times
        the ratio of the scales."""
        channels = call.latents.shape[1]
        expected = plain(self.source.unet).config.in_channels
        if expected != channels:  # of inpainting: with what lies behind the latents
            return call.sample
        sample = call.sample[:, :channels]
        if self.ratio == 1:
            return sample
        # After guidance ended in mid-run, the rows are the prompts'.
        noise, sigma = state.first[0][-len(sample) :], state.first[1]
        share = ((1 - self.ratio) * call.sigma / sigma).to(sample.dtype)
        return self.ratio * sample + share * noise

    # -----------------------------------------------------------------------------------------
    # What they say

    def predict(
        self, call: Call, proceed: Callable[[Call], Tensor], alone: bool, asked: _Asked
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of target, source and adapted model. With ``alone`` the target is the UNet."""
        target = None
        if alone and fits(call.options):
            target = call.passed()
            target["timestep"] = torch.as_tensor(call.timestep, device=call.sample.device)
        found = self._run(target, asked)
        return found if target is not None else (proceed(call), *found)

    def _run(self, target: dict[str, Any] | None, asked: _Asked) -> tuple[Tensor, ...]:
        graphs = self.graphs if asked.sample.is_cuda else None
        run = graphs or self._at_once
        return run(
            target, asked.sample, asked.timesteps, asked.contexts, asked.added, asked.images,
            asked.scales, asked.shared,
        )  # fmt: skip

    def _at_once(
        self,
        target: dict[str, Any] | None,
        sample: Tensor,
        timesteps: Sequence[Tensor],
        contexts: Sequence[Tensor],
        added: Sequence[dict[str, Tensor] | None],
        images: Sequence[Tensor],
        scales: Sequence[float],
        shared: bool,
    ) -> tuple[Tensor, ...]:
        """Predictions of the target, if it is given, source and adapted model; on a GPU side by
        side, as small ones leave room there."""
        first, second = self.source.unet, self.adapted.unet
        if shared:
            first = second = _once(first)
        inputs = [  # contexts are of their model's dtype, which need not be the target's
            {"sample": sample.to(context.dtype), "timestep": t, "encoder_hidden_states": context,
             "added_cond_kwargs": more}
            for t, context, more in zip(timesteps, contexts, added, strict=True)
        ]  # fmt: skip
        beside, also = self._side_streams(sample.device)
        with _on(beside):
            with _on(also):
                residuals = _controlled(self.adapted.controls, inputs[1], images, scales)
                if not shared:
                    adapted = _say(second, inputs[1] | residuals)
            source = _say(first, inputs[0])
            _join(also)
            if shared:
                adapted = _say(second, inputs[1] | residuals)
        found = () if target is None else (_say(self.unet, target),)
        _join(beside)
        return (*found, source, adapted)

    def _side_streams(self, device: torch.device) -> list[torch.cuda.Stream | None]:
        """None where the models are not put into a graph: starting kernels is the limit there."""
        if device.type != "cuda" or self.graphs is None:
            return [None, None]
        if not self._streams or self._streams[0].device != device:
            self._streams = [torch.cuda.Stream(device) for _ in range(2)]
        return list(self._streams)

    def combine(
        self,
        call: Call,
        target: Tensor,
        source: Prediction,
        adapted: Prediction,
        asked: _Asked,
        strength: float,
    ) -> Tensor:
        types = (self.prediction, self.source.prediction, self.adapted.prediction)
        mixed = len(set(types)) > 1
        channels = target.shape[1]
        sample = call.sample[:, :channels].to(target.dtype) if mixed else None
        state = asked.sample[:, :channels] if mixed else None
        if isinstance(source, tuple):
            target = tuple(target.chunk(2))
            if mixed:  # of both branches they are the same
                count = len(source[0])
                sample, state = sample[-count:], state[-count:]
        return delta_combine(
            target,
            source,
            adapted,
            sample=sample,
            source_sample=state,
            alpha=call.alpha if mixed else None,
            sigma=call.sigma if mixed else None,
            strength=float(strength),
            prediction_type=types,
            scales=(1.0, self.ratio),
        )


# ---------------------------------------------------------------------------------------------
# What models are


def _leg(name: str, pipe: Any) -> _Leg:
    return _Leg(pipe, pipe.unet, _prediction(name, pipe.scheduler), pipe.scheduler)


def _modules(pipe: Any) -> list[nn.Module]:
    return [one for one in pipe.components.values() if isinstance(one, nn.Module)]


def _prediction(name: str, scheduler: Any) -> str:
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(
            f"{name} must predict one of {', '.join(PREDICTION_TYPES)}; its scheduler says {kind!r}"
        )
    return kind


def _scaling(source: Any, given: float | None) -> float:
    if given is not None:
        return given
    if getattr(source, "vae", None) is None:
        raise ValueError(
            "the source has no VAE, which would tell its latents' scale: give source_scale"
        )
    return source.vae.config.scaling_factor


def _check_fits(name: str, leg: _Leg, pipe: Any) -> None:
    channels = pipe.vae.config.latent_channels
    found = plain(leg.unet).config.in_channels
    if found not in (channels, plain(pipe.unet).config.in_channels):
        raise ValueError(
            f"{name} must take latents of {channels} channels, as the pipeline's are; its UNet "
            f"takes {found}"
        )
    if getattr(leg.pipe, "vae", None) is not None:
        size, wanted = leg.pipe.vae_scale_factor, pipe.vae_scale_factor
        if size != wanted:
            raise ValueError(
                f"{name} must have latents of the pipeline's size, a {wanted}th of a picture's; "
                f"its VAE makes a {size}th"
            )
    parameters = [next(one.parameters()) for one in (leg.unet, *(c.model for c in leg.controls))]
    for one in parameters:
        hooked = hasattr(leg.unet, "_hf_hook") or hasattr(pipe.unet, "_hf_hook")
        if one.device != pipe._execution_device and not hooked:
            raise ValueError(
                f"{name} must be on the pipeline's device, {pipe._execution_device}; it is on "
                f"{one.device}"
            )


def _log_ratios(name: str, scheduler: Any, other: Any) -> Tensor | None:
    """ln(σ/α) of each timestep; None if it is the other scheduler's."""
    found, theirs = (getattr(one, "alphas_cumprod", None) for one in (scheduler, other))
    if found is None:
        raise ValueError(
            f"{name} has a {type(scheduler).__name__} without alphas_cumprod, so that it is not "
            "known which noise its timesteps mean"
        )
    if theirs is not None and torch.equal(found.cpu(), theirs.cpu()):
        return None
    return ((1 - found).log() - found.log()).float() / 2


def _timestep(leg: _Leg, call: Call) -> Tensor:
    device = call.sample.device
    if leg.levels is None:
        return torch.as_tensor(call.timestep, device=device)
    leg.levels = leg.levels.to(device)
    wanted = call.sigma.log() - call.alpha.clamp(min=1e-6).log()
    return (leg.levels - wanted).abs().argmin()


def _check_known_state(run: Run) -> None:
    """With latents of another scale."""
    scheduler = run.scheduler
    reason = None
    if hasattr(type(run.pipe), "get_timesteps"):
        reason = f"{type(run.pipe).__name__} begins from a picture"
    elif any(one.__name__ in STOCHASTIC for one in type(scheduler).__mro__) or (
        str(scheduler.config.get("algorithm_type", "")).startswith("sde")
    ):
        reason = f"{type(scheduler).__name__} adds noise at each step"
    elif (run.arguments.get("eta") or 0) > 0:
        reason = "eta adds noise at each step"
    if reason is not None:
        raise ValueError(
            f"source and pipeline have latents of different scales, and {reason}: the state that "
            "the source would be in is known for deterministic schedulers from pure noise alone"
        )


def _added(pooled: Tensor | None, call: Call, rows: slice) -> dict[str, Tensor] | None:
    """SDXL's micro-conditioning: the target's own, or that of an uncropped picture."""
    if pooled is None:
        return None
    given = (call.options.get("added_cond_kwargs") or {}).get("time_ids")
    if given is None:
        factor = call.run.pipe.vae_scale_factor
        height, width = (factor * side for side in call.sample.shape[-2:])
        given = pooled.new_tensor([(height, width, 0, 0, height, width)])
        given = given.expand(len(call.sample), -1)
    return {
        "text_embeds": pooled[rows.start - rows.stop :],
        "time_ids": given[rows].to(pooled.dtype),
    }


def _branches(found: Tensor, call: Call, scale: float | None) -> Prediction:
    """What is guided by ``scale``, for both branches; or as it is."""
    if scale is None or call.unconditional is None:
        return found
    guided = found
    if scale != 1:
        unconditional, conditional = found.to(wide_of(found.dtype)).chunk(2)
        guided = torch.lerp(unconditional, conditional, scale)
    return guided, guided


def _of_rows(kept: Tensor, like: Tensor) -> Tensor:
    """Where guidance ended in mid-run, the prompt's."""
    return kept[-len(like) :]


def _check_finite(sums: Sequence[tuple[str, int, Tensor]]) -> None:
    finite = torch.stack([value for *_, value in sums]).isfinite().tolist()
    for (name, index, _), good in zip(sums, finite, strict=True):
        if not good:
            raise FloatingPointError(
                f"the prediction of the {name} at step {index} is not finite (NaN or infinite)"
            )


# ---------------------------------------------------------------------------------------------
# Asking models


def _say(unet: Any, inputs: dict[str, Any]) -> Tensor:
    rest = dict(inputs)
    return unet(rest.pop("sample"), rest.pop("timestep"), **rest, return_dict=False)[0]


def _shown(control: Control, call: Call, pictures: int) -> Tensor:
    """What a ControlNet is shown, for the rows of both prompts."""
    from diffusers.image_processor import VaeImageProcessor

    factor = call.run.pipe.vae_scale_factor
    processor = VaeImageProcessor(factor, do_convert_rgb=True, do_normalize=False)
    height, width = (factor * side for side in call.sample.shape[-2:])
    image = processor.preprocess(control.image, height=height, width=width)
    if len(image) not in (1, pictures):
        raise ValueError(
            f"the image of a Control must be one, or one for each of {pictures} pictures; got "
            f"{len(image)}"
        )
    like = next(control.model.parameters())
    image = image.to(call.sample.device, like.dtype)
    return image.repeat_interleave(pictures // len(image), 0).repeat(2, 1, 1, 1)


def _controlled(
    controls: Sequence[Control],
    inputs: dict[str, Any],
    images: Sequence[Tensor],
    scales: Sequence[float],
) -> dict[str, Any]:
    """The residuals of all ControlNets together, as a UNet takes them."""
    down: list[Tensor] = []
    middle: Tensor | None = None
    for control, image, scale in zip(controls, images, scales, strict=True):
        if scale == 0:
            continue
        own, last = control.model(
            **inputs, controlnet_cond=image, conditioning_scale=scale, return_dict=False
        )
        down = [a + b for a, b in zip(down, own, strict=True)] if down else list(own)
        middle = last if middle is None else middle + last
    if middle is None:
        return {}
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


@contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """On a stream beside the current one, which has waited for it."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


def _join(stream: torch.cuda.Stream | None) -> None:
    if stream is not None:
        torch.cuda.current_stream(stream.device).wait_stream(stream)


def _shareable(unet: Any) -> bool:
    """Whether a view of it is what it is: hooks and compilation hold on to the module itself."""
    return isinstance(unet, nn.Module) and "forward" not in vars(unet) and unet is plain(unet)


def _once(unet: nn.Module) -> nn.Module:
    """A view of the UNet, to be called with inputs that differ in a ControlNet's residuals alone:
    its first layers, up to where these come in, are computed once."""
    view = copy.copy(unet)
    parts = dict(unet._modules)
    parts["conv_in"] = _Once(unet.conv_in)
    parts["down_blocks"] = nn.ModuleList(map(_Once, unet.down_blocks))
    if unet.mid_block is not None:
        parts["mid_block"] = _Once(unet.mid_block)
    vars(view)["_modules"] = parts
    return view


class _Once(nn.Module):
    """A part that remembers what it gave."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        vars(self)["part"] = part  # not as a module: nothing of the UNet's is to change
        self.given: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["part"], name)

    def forward(self, *args: Any, **options: Any) -> Any:
        if self.given is None:
            self.given = vars(self)["part"](*args, **options)
        return self.given
