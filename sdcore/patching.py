"""Puts methods on a Diffusers pipeline, and takes them off again without a trace.

``patch(pipe, method, …)`` gives the pipeline a class of its own that differs from its class in one
thing: while the pipeline is called, what it reads as its ``unet``, ``scheduler`` and ``vae`` are
stand-ins that lead through the methods. No module gets a hook or a wrapper that outlasts a call.
Hence other pipelines with the same modules, calls of the UNet from elsewhere and other threads see
nothing, and neither accelerate's hooks, nor LoRA, nor ``torch.compile`` can come in between. Some
methods also go on a bare UNet or VAE, whose class is then the one that changes.

A method is a subclass of :class:`Method`. Methods lie around each other in the order in which they
were put on: the last sees a call first, and its result last.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# Schedulers whose step follows the sample it is given in full, at every call. PNDM, Heun, KDPM2 and
# the single-step DPM++ go on, at some calls, from a sample that they kept; UniPC and SA-Solver
# correct theirs from the last one.
FOLLOWS_SAMPLE = frozenset(
    {
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DEISMultistepScheduler",
        "LCMScheduler",
        "TCDScheduler",
    }
)


class Method:
    """What a method may do. Each part but ``check`` does nothing unless it is overridden.

    An object holds settings alone and may be on several pipelines; what belongs to one run is kept
    in ``run.of(self)``. All parts see the pipeline's own ``unet``, ``scheduler`` and ``vae``, and
    ``denoise``, ``step`` and ``decode`` run under the ``no_grad`` of the pipeline's call.
    """

    #: It passes on calls that were :meth:`Call.moved`. Runs with a scheduler that would lose the
    #: move are then refused.
    moves_sample = False
    #: It differentiates. Runs within ``torch.inference_mode``, which rules that out, are refused.
    needs_gradients = False
    #: It asks other models about the sample as it comes in, or knows its rows. One that moves the
    #: sample must then lie further out.
    inside_moves = False
    #: Whether a pipeline may have several of this class.
    repeatable = False
    #: What only one of a pipeline's methods can do, such as "masks the cross-attention"; two that
    #: claim the same are refused.
    claims: str | None = None

    def check(self, pipe: Any) -> None:
        """When it is put on: raises if it can't work with this pipeline, or bare module."""

    def begin(self, run: Run) -> None:
        """When the pipeline is called, before it does anything."""

    def denoise(self, call: Call, proceed: Callable[[Call], Tensor]) -> Tensor:
        """Around each call of the UNet. ``proceed`` asks the methods further in, and then the UNet;
        it may be called any number of times."""
        return proceed(call)

    def step(self, step: Step, proceed: Callable[[Step], Tensor]) -> Tensor:
        """Around each step of the scheduler. ``proceed`` gives the next sample."""
        return proceed(step)

    def within(self, module: Any) -> contextlib.AbstractContextManager[None]:
        """Around each call of the UNet, and each of the VAE's ``encode`` and ``decode``: a context
        in which the module itself computes in another way, whichever method calls it. A method
        that has it also goes on bare modules: it is then the only part around calls, and ``check``
        and ``removed`` are told the module."""
        raise TypeError(
            f"{type(self).__name__} works on pipelines, and not on a bare {type(module).__name__}"
        )

    def decode(self, run: Run, latents: Tensor, proceed: Callable[[Tensor], Tensor]) -> Tensor:
        """Around the VAE's decoder: latents as the decoder takes them, to pictures."""
        return proceed(latents)

    def end(self, run: Run, error: BaseException | None) -> None:
        """After a run, also one that ended by ``error``, such as a KeyboardInterrupt, and also if
        only ``begin`` was reached. The methods end in reverse order."""

    def removed(self, pipe: Any) -> None:
        """When it was taken off, and no run is left that has it."""

    def report(self) -> dict[str, Any] | None:
        """What there is to tell of the run that began last: numbers, strings, and lists and
        dictionaries of them."""
        return None


# ---------------------------------------------------------------------------------------------
# What methods are given


class Run:
    """One call of a patched pipeline."""

    def __init__(self, pipe: Any, methods: tuple[Method, ...], arguments: dict[str, Any]) -> None:
        self.pipe = pipe
        self.methods = methods
        #: What the pipeline was called with, by name.
        self.arguments = arguments
        #: Steps of the scheduler that are done.
        self.steps_done = 0
        self._states = {id(method): SimpleNamespace() for method in methods}
        self._table: tuple[Any, Tensor] | None = None
        self._latents: Tensor | None = None
        self._timestep: Tensor | float = 0
        self._exploding = False
        self._shift: Tensor | None = None
        self._index: int | None = None
        self._level: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def of(self, method: Method) -> SimpleNamespace:
        """What ``method`` keeps for this run."""
        return self._states[id(method)]

    def innermost(self, method: Method) -> bool:
        """Whether no other method's ``denoise`` lies between this one and the UNet."""
        for one in self.methods:
            if one is method:
                return True
            if type(one).denoise is not Method.denoise:
                return False
        return False

    @property
    def scheduler(self) -> Any:
        return self.pipe.scheduler

    @property
    def guided(self) -> bool:
        """Whether the pipeline, at this moment, guides by a negative prompt."""
        return bool(self.pipe.do_classifier_free_guidance)

    @property
    def progress(self) -> float:
        """The share of the scheduler's steps, from the first that was made, that are done: in
        [0, 1)."""
        if self.steps_done == 0:
            return 0.0
        return self.steps_done / max(1, len(self.scheduler.timesteps) - self._first)

    @functools.cached_property
    def _first(self) -> int:
        """The number of the run's first step: 0, unless it began from a picture."""
        known = getattr(self.scheduler, "begin_index", None)
        if known is not None:
            return known
        # DDIM and DDPM don't know it. This waits for the GPU, once a run.
        there = (self.scheduler.timesteps == self._timestep).nonzero()
        return max(0, int(there[0]) - self.steps_done) if len(there) else 0

    def noise_level(self, timestep: Tensor | float) -> tuple[Tensor, Tensor]:
        """(alpha, sigma): the UNet's input is alpha · (clean latents) + sigma · (noise), with
        alpha² + sigma² = 1; alpha may be 0. Scalars of float32 on the latents' device. Nothing
        waits for it, but at the first step where the scheduler does not yet know which it is.

        For the timestep of this step from the scheduler's ``sigmas`` (s), where it has one for each
        timestep: 1 / √(1 + s²) and s / √(1 + s²). Else by its ``alphas_cumprod``; between two
        timesteps by the logarithm of s.

        Raises:
            ValueError: the scheduler scales otherwise, as those of EDM and of flow matching do.
        """
        scheduler = self.scheduler
        self._check_scaling()
        device = self._device(timestep)
        sigmas, timesteps = getattr(scheduler, "sigmas", None), scheduler.timesteps
        now = timestep is self._timestep
        if now and sigmas is not None and len(sigmas) == len(timesteps) + 1:
            if self._index is None:
                self._index = scheduler.index_for_timestep(timestep)
            s = self._on(device, sigmas)[self._index]
            alpha = (1 + s * s).rsqrt()
            return alpha, s * alpha
        products = self._on(device, scheduler.alphas_cumprod)
        at = torch.as_tensor(timestep, device=device).float().flatten()[:1]
        first, second = (
            products.index_select(0, part.long().clamp(0, len(products) - 1))[0]
            for part in (at.floor(), at.ceil())
        )
        between = (at - at.floor())[0]
        # ln(s²) of two neighbors, of which the first is infinite where no signal is left.
        low, high = ((1 - part).log() - part.log() for part in (first, second))
        ratio = torch.where(between == 0, low, low.lerp(high, between))
        return (-ratio).sigmoid().sqrt(), ratio.sigmoid().sqrt()

    def _check_scaling(self) -> None:
        config, name = self.scheduler.config, type(self.scheduler).__name__
        other = next((key for key in ("sigma_data", "use_flow_sigmas") if config.get(key)), None)
        if other is None and not hasattr(self.scheduler, "alphas_cumprod"):
            other = "no alphas_cumprod"
        if other is not None:
            raise ValueError(
                f"the noise level is not known: {name} has {other}, and so does not mix clean "
                "latents and noise with alpha² + sigma² = 1"
            )

    def _device(self, timestep: Tensor | float) -> torch.device:
        if self._latents is not None:
            return self._latents.device
        return timestep.device if isinstance(timestep, Tensor) else torch.device("cpu")

    def _on(self, device: torch.device, table: Tensor) -> Tensor:
        """A scheduler's table in float32 on the device, copied there once."""
        if self._table is None or self._table[0] is not table or self._table[1].device != device:
            self._table = table, table.to(device, torch.float32)
        return self._table[1]

    def _enter(self, timestep: Tensor | float) -> None:
        """At a call of the UNet: which of the scheduler's steps it belongs to, if that is known."""
        self._timestep = timestep
        known = getattr(self.scheduler, "step_index", None)
        self._index = getattr(self.scheduler, "begin_index", None) if known is None else known


@dataclass(frozen=True)
class Call:
    """One call of the UNet. ``dataclasses.replace`` gives a changed one."""

    run: Run
    #: [rows, channels, height, width], as the UNet takes it: scaled, and with the mask and the
    #: masked picture behind the latents where a UNet for inpainting has them.
    sample: Tensor
    timestep: Tensor | float
    encoder_hidden_states: Tensor | None
    #: All other keyword arguments: ControlNet's residuals, micro-conditioning, added tokens.
    options: dict[str, Any]
    #: How far it was moved.
    shift: Tensor | None = None
    #: Whether it has the rows of the prompt and no others: see :meth:`of_prompt`.
    prompt_alone: bool = False

    @property
    def index(self) -> int:
        """Steps of the scheduler that were done before."""
        return self.run.steps_done

    @property
    def progress(self) -> float:
        return self.run.progress

    @property
    def alpha(self) -> Tensor:
        """The share of the clean latents: see :meth:`Run.noise_level`."""
        return self._level()[0]

    @property
    def sigma(self) -> Tensor:
        """The share of the noise: see :meth:`Run.noise_level`."""
        return self._level()[1]

    def _level(self) -> tuple[Tensor, Tensor]:
        known = self.run._level
        if known is None or known[0] is not self.timestep:
            known = self.run._level = self.timestep, self.run.noise_level(self.timestep)
        return known[1]

    @property
    def unconditional(self) -> slice | None:
        """The rows of the negative prompt; None if the pipeline does not guide at this moment."""
        return slice(0, self._half()) if self._guided else None

    @property
    def conditional(self) -> slice:
        """The rows of the prompt."""
        rows = len(self.sample)
        return slice(self._half(), rows) if self._guided else slice(0, rows)

    @property
    def _guided(self) -> bool:
        return self.run.guided and not self.prompt_alone

    def _half(self) -> int:
        rows = len(self.sample)
        if rows % 2:
            raise RuntimeError(
                f"{type(self.run.pipe).__name__} guides by a negative prompt, and yet calls its "
                f"UNet with {rows} rows, which is no even number"
            )
        return rows // 2

    @property
    def latents(self) -> Tensor:
        """[B, C, h, w]: the sample that the scheduler will be given, without its scaling and
        without moves. One row for each picture, also under guidance."""
        if self.run._latents is None:
            raise RuntimeError(
                "the pipeline called its UNet without scheduler.scale_model_input before; so its "
                "unscaled sample is not known"
            )
        return self.run._latents[: len(self.sample[self.conditional])]

    def of_prompt(self) -> Call:
        """The call with the rows of the prompt alone, as a pipeline that does not guide would make
        it: of all tensors among the options that have a row for each of the sample's, these."""
        if not self._guided:
            return self
        rows, count = self.conditional, len(self.sample)

        def of(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[rows] if value.ndim and len(value) == count else value
            if isinstance(value, dict):
                return {name: of(one) for name, one in value.items()}
            return type(value)(map(of, value)) if isinstance(value, (tuple, list)) else value

        parts = of((self.sample, self.timestep, self.encoder_hidden_states, self.options))
        sample, timestep, text, options = parts
        return replace(
            self, sample=sample, timestep=timestep, encoder_hidden_states=text, options=options,
            prompt_alone=True,
        )  # fmt: skip

    def moved(self, by: Tensor) -> Call:
        """The call with its sample moved by ``by`` [B, C, h, w], in the space of the UNet's input,
        in the rows of both prompts. If it is the last that is passed on in this step, the scheduler
        steps from the moved sample as well: where it holds samples of exploding variance, as
        Euler's does, from ``latents`` + ``by`` / alpha.

        A ControlNet has then seen the sample before the move.
        """
        wanted = tuple(self.latents.shape)
        if tuple(by.shape) != wanted:
            raise ValueError(f"by must have the latents' shape {wanted}; got {tuple(by.shape)}")
        channels = wanted[1]
        there = by.to(self.sample.dtype).repeat(len(self.sample) // len(by), 1, 1, 1)
        front = self.sample[:, :channels] + there
        sample = torch.cat([front, self.sample[:, channels:]], 1)
        return replace(self, sample=sample, shift=by if self.shift is None else self.shift + by)

    def passed(self) -> dict[str, Any]:
        """What the UNet is to be called with, by name; this call then counts as the one that was
        passed on. For a method that is :meth:`Run.innermost` and calls the UNet itself."""
        self.run._shift = self.shift
        return {
            "sample": self.sample,
            "timestep": self.timestep,
            "encoder_hidden_states": self.encoder_hidden_states,
            **self.options,
        }


@dataclass(frozen=True)
class Step:
    """One step of the scheduler."""

    run: Run
    model_output: Tensor  # after guidance
    timestep: Tensor | float
    sample: Tensor  # with moves
    options: dict[str, Any] = field(default_factory=dict)  # such as eta and generator


# ---------------------------------------------------------------------------------------------
# On and off


class Handle:
    """What :func:`patch` put on. Also a context manager, which removes it at its end."""

    def __init__(self, pipe: Any, methods: tuple[Method, ...]) -> None:
        self.pipe = pipe
        self.methods = methods
        self._removed = False

    def remove(self) -> None:
        """Takes these methods off. Runs that are under way keep them until they end. Without
        effect if that was done before."""
        if not self._removed:
            self._removed = True
            _remove(self.pipe, self.methods)

    def report(self) -> dict[str, Any]:
        """What the methods tell of the run that began last, by their class's name, of those that
        tell something, which is ColorGuidance."""
        told = {type(method).__name__: method.report() for method in self.methods}
        return {name: one for name, one in told.items() if one is not None}

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        names = ", ".join(type(method).__name__ for method in self.methods)
        return f"<{names} on {type(self.pipe).__name__}>"


def patch(pipe: Any, *methods: Method) -> Handle:
    """Puts methods on a Diffusers pipeline, or a bare model, around those that are on already.

    ``patch(pipe, a, b)`` is ``patch(pipe, a)`` and then ``patch(pipe, b)``: b lies around a. They
    may be removed in any order. ::

        with sdcore.patch(pipe, method):
            image = pipe(prompt).images[0]

    Args:
        pipe: with a UNet, a scheduler and a VAE: Stable Diffusion 1 and 2 and SDXL, from text, from
            images, for inpainting, with ControlNet. Or a model of Diffusers alone, for the methods
            that say so; its own calls are then meant, from wherever they come.
        methods: one or more objects of subclasses of :class:`Method`.

    Raises:
        TypeError: the pipeline lacks something, something is no method, or a method works on
            pipelines alone; it says which.
        ValueError: no methods; one of a class that is on already; two that claim the same, such as
            to mask the cross-attention; or one that must lie further in than another.
        Whatever a method's ``check`` raises. The pipeline is then as it was.
    """
    if not methods:
        raise ValueError("patch needs at least one method")
    for method in methods:
        if isinstance(method, type) and issubclass(method, Method):
            raise TypeError(
                f"got the class {method.__name__}; give an object: {method.__name__}(…)"
            )
        if not isinstance(method, Method):
            raise TypeError(f"methods must be objects of sdcore.Method; got {method!r}")
    if isinstance(pipe, nn.Module):
        _check_module(pipe, methods)
    else:
        _check_pipeline(pipe)
    on = _patches(pipe)
    _check_new(methods, on.methods if on else ())
    for method in methods:
        method.check(pipe)
    with _lock:
        on = _patches(pipe)
        _check_new(methods, on.methods if on else ())
        if on is None:
            on = vars(pipe)[_KEY] = _Patches(type(pipe))
            pipe.__class__ = _patched_class(type(pipe))
        on.methods += methods
        on.leaving = _without(on.leaving, methods)
    return Handle(pipe, methods)


def unpatch(pipe: Any) -> None:
    """Takes all methods off the pipeline, or the bare model. Without effect if there are none."""
    on = _patches(pipe)
    if on is not None:
        _remove(pipe, on.methods)


@dataclass
class _Patches:
    original: type
    methods: tuple[Method, ...] = ()
    leaving: tuple[Method, ...] = ()  # taken off, but in runs that are under way
    running: int = 0


_lock = threading.RLock()
# Where a patched pipeline keeps its methods: with it, and so no longer than it.
_KEY = "_sdcore_patches"
# The run that the pipeline's own code is in at this moment; None while methods are at work.
_current: ContextVar[Run | None] = ContextVar("sdcore_run", default=None)


def _patches(pipe: Any) -> _Patches | None:
    return getattr(pipe, "__dict__", {}).get(_KEY)


def _without(some: tuple[Method, ...], others: tuple[Method, ...]) -> tuple[Method, ...]:
    return tuple(one for one in some if not any(one is other for other in others))


def _check_new(methods: tuple[Method, ...], present: tuple[Method, ...]) -> None:
    for number, method in enumerate(methods):
        name = type(method).__name__
        there = present + methods[:number]
        if any(one is method for one in there):
            raise ValueError(f"this {name} is on it already")
        if not method.repeatable and any(type(one) is type(method) for one in there):
            raise ValueError(f"a {name} is on it already; remove it first")
        for one in there:
            if method.inside_moves and one.moves_sample:
                raise ValueError(
                    f"{name} must lie further in than {type(one).__name__}, which moves the "
                    "sample: put it on before"
                )
            if method.claims is not None and one.claims == method.claims:
                raise ValueError(
                    f"a {type(one).__name__} is on it, which {one.claims} as {name} does; only one "
                    "of them can"
                )


def _check_pipeline(pipe: Any) -> None:
    name = type(pipe).__name__
    lacks = [part for part in ("unet", "scheduler", "vae") if getattr(pipe, part, None) is None]
    if not lacks:
        calls = {
            "unet": (_forward(pipe.unet), ("sample", "timestep", "encoder_hidden_states")),
            "scheduler.step": (pipe.scheduler.step, ("model_output", "timestep", "sample")),
        }
        for part, (function, names) in calls.items():
            known = inspect.signature(function).parameters
            lacks += [f"{one} among the arguments of {part}" for one in names if one not in known]
        if not hasattr(pipe.vae, "decode"):
            lacks.append("vae.decode")
    if not hasattr(type(pipe), "do_classifier_free_guidance"):
        lacks.append("do_classifier_free_guidance")
    if lacks:
        raise TypeError(
            f"{name} can't be patched: it has no {', no '.join(lacks)}. "
            "Supported are Diffusers' pipelines of Stable Diffusion 1, 2 and XL with a UNet"
        )
    for extra in ("pag_scale", "image_guidance_scale"):
        if hasattr(type(pipe), extra) or extra in inspect.signature(type(pipe).__call__).parameters:
            raise TypeError(
                f"{name} can't be patched: with {extra} its UNet gets three rows for each picture, "
                "of which only the negative prompt's and the prompt's are known here"
            )


def _check_module(module: nn.Module, methods: tuple[Method, ...]) -> None:
    inner = getattr(module, "_orig_mod", None)
    if inner is not None:
        raise TypeError(
            f"what torch.compile returned can't be patched; patch the {type(inner).__name__} "
            "itself, and compile it by its own compile(), before or after"
        )
    if not hasattr(module, "config"):
        raise TypeError(
            f"{type(module).__name__} can't be patched: it is neither a pipeline nor a model of "
            "Diffusers"
        )
    own = [name for name in _entries(type(module)) if name in vars(module)]
    if own:
        raise TypeError(
            f"this {type(module).__name__} can't be patched: it has a {own[0]} of its own in place "
            "of its class's, by torch.compile, say; patch it before"
        )
    for method in methods:
        if type(method).within is Method.within:
            method.within(module)


def _forward(unet: Any) -> Callable[..., Any]:
    """Also of what ``torch.compile`` returned."""
    return getattr(unet, "_orig_mod", unet).forward


def _remove(pipe: Any, methods: tuple[Method, ...]) -> None:
    with _lock:
        on = _patches(pipe)
        if on is None:
            return
        rest = _without(on.methods, methods)
        on.leaving += _without(on.methods, rest)
        on.methods = rest
    _settle(pipe, on)


def _settle(pipe: Any, on: _Patches, ended: int = 0) -> None:
    """When no run is under way: gives back the class, and tells methods that they are off."""
    with _lock:
        on.running -= ended
        if on.running:
            return
        gone, on.leaving = on.leaving, ()
        if not on.methods and _patches(pipe) is on:
            del vars(pipe)[_KEY]
            # Someone else's subclass of ours stays: without the key it does nothing.
            if type(pipe) is _patched_class(on.original):
                pipe.__class__ = on.original
    with contextlib.ExitStack() as stack:  # not under the lock: they may take their time
        for method in gone:
            stack.callback(method.removed, pipe)


# ---------------------------------------------------------------------------------------------
# The class of a patched pipeline


@functools.cache
def _patched_class(original: type) -> type:
    """A subclass of the same name. Its own instances are of ``original``: ``from_pipe`` and
    ``from_pretrained`` by way of a patched pipeline give ordinary ones."""

    def __new__(cls, *args, **kwargs):
        return original(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        # As one without methods: copies and pickles hold no trace of them.
        own = original.__getstate__(self) if isinstance(self, nn.Module) else vars(self)
        state = {name: value for name, value in own.items() if name != _KEY}
        return copyreg._reconstructor, (original, object, None), state

    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__new__": __new__,
        "__reduce_ex__": __reduce_ex__,
    }
    names |= _of_module(original) if issubclass(original, nn.Module) else _of_pipeline(original)
    return type(original)(original.__name__, (original,), names)


@contextlib.contextmanager
def _under_way(target: Any) -> Iterator[tuple[Method, ...] | None]:
    """Of a call: the methods, which stay until it ends; None if there are none any more."""
    methods = None
    with _lock:
        on = _patches(target)
        if on is not None:
            on.running += 1
            methods = on.methods
    try:
        yield methods
    finally:
        if on is not None:
            _settle(target, on, ended=1)


def _of_pipeline(original: Any) -> dict[str, Any]:
    @functools.wraps(original.__call__)
    def __call__(self, *args, **kwargs):
        with _under_way(self) as methods:
            if methods is None:
                return original.__call__(self, *args, **kwargs)
            return _run(original, self, methods, args, kwargs)

    def components(self):
        # Offloading puts hooks on what it finds here, and must find the modules themselves.
        with _outside():
            return original.components.fget(self)

    return {
        "__call__": __call__,
        "components": property(components),
        "unet": _Component("unet", _UNet),
        "scheduler": _Component("scheduler", _Scheduler),
        "vae": _Component("vae", _VAE),
    }


def _of_module(original: Any) -> dict[str, Any]:
    return {name: _around_module(getattr(original, name)) for name in _entries(original)}


def _entries(model: type) -> list[str]:
    """By what a model is called. A VAE calls its own ``encode`` and ``decode``."""
    return [name for name in ("encode", "decode") if hasattr(model, name)] or ["__call__"]


def _around_module(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self, *args, **kwargs):
        with _under_way(self) as methods, _within(methods or (), self):
            return function(self, *args, **kwargs)

    # torch.compile begins with what is called in it.
    return torch.compiler.disable(call, recursive=False)


@contextlib.contextmanager
def _within(methods: tuple[Method, ...], module: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for method in methods:
            if type(method).within is not Method.within:
                stack.enter_context(method.within(module))
        yield


class _Component:
    """A pipeline's attribute: a stand-in within a run, else what the pipeline holds."""

    def __init__(self, name: str, stand_in: type[_StandIn]) -> None:
        self.name, self.stand_in = name, stand_in

    def __get__(self, pipe: Any, owner: type) -> Any:
        if pipe is None:
            return self
        try:
            value = pipe.__dict__[self.name]
        except KeyError:
            raise AttributeError(self.name) from None
        run = _current.get()
        if run is None or run.pipe is not pipe or value is None:
            return value
        return self.stand_in(value, run)

    def __set__(self, pipe: Any, value: Any) -> None:
        if type(value) is self.stand_in:
            value = object.__getattribute__(value, "_target")
        pipe.__dict__[self.name] = value

    def __delete__(self, pipe: Any) -> None:
        del pipe.__dict__[self.name]


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Where the pipeline's attributes are themselves."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def _run(original: type, pipe: Any, methods: tuple[Method, ...], args: tuple, kwargs: dict) -> Any:
    signature = inspect.signature(original.__call__)
    bound = signature.bind(pipe, *args, **kwargs)
    arguments = dict(list(bound.arguments.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    run = Run(pipe, methods, arguments)
    _check_run(run)
    with contextlib.ExitStack() as ends, _outside():
        for method in methods:
            ends.push(functools.partial(_end, method, run))
            method.begin(run)
        token = _current.set(run)
        try:
            return original.__call__(*_with_callbacks_outside(bound).args, **bound.kwargs)
        finally:
            _current.reset(token)


def _end(method: Method, run: Run, kind: Any, error: BaseException | None, trace: Any) -> None:
    method.end(run, error)


def _check_run(run: Run) -> None:
    scheduler = run.scheduler
    known = {one.__name__ for one in type(scheduler).__mro__}
    for method in run.methods:
        name = type(method).__name__
        if method.moves_sample and not known & FOLLOWS_SAMPLE:
            raise ValueError(
                f"{name} moves the sample, which steps of {type(scheduler).__name__} do not follow "
                f"in full; use one of {', '.join(sorted(FOLLOWS_SAMPLE))}"
            )
        if method.needs_gradients and torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{name} needs gradients, which torch.inference_mode rules out; "
                "call the pipeline without it, or under torch.no_grad"
            )


def _with_callbacks_outside(bound: inspect.BoundArguments) -> inspect.BoundArguments:
    """What the user's callbacks ask of the pipeline goes past the methods."""
    kinds = bound.signature.parameters
    others = (
        given
        for name, given in bound.arguments.items()
        if kinds[name].kind is kinds[name].VAR_KEYWORD
    )
    for given in (bound.arguments, *others):
        for name in ("callback_on_step_end", "callback"):
            callback = given.get(name)
            if callback is None or not callable(callback):
                continue
            given[name] = functools.partial(_outside_call, callback)
            # Diffusers asks its own kinds of callbacks which tensors they want.
            if hasattr(callback, "tensor_inputs"):
                given["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
    return bound


def _outside_call(callback: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with _outside():
        return callback(*args, **options)


# ---------------------------------------------------------------------------------------------
# Stand-ins


class _StandIn:
    """Passes for its target in all but some calls."""

    __slots__ = ("_run", "_target")

    def __init__(self, target: Any, run: Run) -> None:
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_run", run)

    @property
    def __class__(self) -> type:
        return type(self._target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._target, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._target, name)

    def __dir__(self) -> list[str]:
        return dir(self._target)

    def __repr__(self) -> str:
        return repr(self._target)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._target.__reduce_ex__(protocol)


class _UNet(_StandIn):
    __slots__ = ()

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        unet, run = self._target, self._run
        if args:
            options |= _named(_forward(unet), args, after=3)
            return_dict = options.pop("return_dict", return_dict)

        def model(call: Call) -> Tensor:
            given = call.passed()
            # As pipelines call it: hooks find the sample among the positional arguments.
            return unet(given.pop("sample"), given.pop("timestep"), **given, return_dict=False)[0]

        run._enter(timestep)
        call = Call(run, sample, timestep, encoder_hidden_states, options)
        with _outside(), _within(run.methods, unet):
            out = _around(run, "denoise", model)(call)
        if not return_dict:
            return (out,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=out)


class _Scheduler(_StandIn):
    __slots__ = ()

    @property
    def scale_model_input(self) -> Callable[..., Tensor]:
        scheduler, run = self._target, self._run

        @functools.wraps(scheduler.scale_model_input)
        def scale_model_input(sample: Tensor, *args: Any, **options: Any) -> Tensor:
            scaled = scheduler.scale_model_input(sample, *args, **options)
            if run._latents is None:  # a ControlNet's input may follow, of fewer rows
                run._latents = sample
            run._exploding = scaled is not sample
            return scaled

        return scale_model_input

    @property
    def step(self) -> Callable[..., Any]:
        scheduler, run = self._target, self._run

        # With its own signature: pipelines look for eta and generator in it.
        @functools.wraps(scheduler.step)
        def step(
            model_output: Tensor,
            timestep: Tensor | float,
            sample: Tensor,
            *args: Any,
            return_dict: bool = True,
            **options: Any,
        ) -> Any:
            if args:
                options |= _named(scheduler.step, args, after=3)
                return_dict = options.pop("return_dict", return_dict)
            rest: list[Any] = []

            def real(step: Step) -> Tensor:
                out = scheduler.step(
                    step.model_output, step.timestep, step.sample, **step.options, return_dict=False
                )
                rest[:] = out[1:]
                return out[0]

            with _outside():
                moved = _from_moved(run, timestep, sample)
                out = _around(run, "step", real)(Step(run, model_output, timestep, moved, options))
            run.steps_done += 1
            run._latents = run._shift = run._level = None
            if not return_dict:
                return (out, *rest)
            from diffusers.schedulers.scheduling_utils import SchedulerOutput

            return SchedulerOutput(prev_sample=out)

        return step


class _VAE(_StandIn):
    __slots__ = ()

    @property
    def encode(self) -> Callable[..., Any]:
        vae, run = self._target, self._run

        @functools.wraps(vae.encode)
        def encode(*args: Any, **options: Any) -> Any:
            with _outside(), _within(run.methods, vae):
                return vae.encode(*args, **options)

        return encode

    @property
    def decode(self) -> Callable[..., Any]:
        vae, run = self._target, self._run

        @functools.wraps(vae.decode)
        def decode(z: Tensor, return_dict: bool = True, **options: Any) -> Any:
            def real(latents: Tensor) -> Tensor:
                return vae.decode(latents, return_dict=False, **options)[0]

            with _outside(), _within(run.methods, vae):
                out = _around(run, "decode", real, run)(z)
            if not return_dict:
                return (out,)
            from diffusers.models.autoencoders.vae import DecoderOutput

            return DecoderOutput(sample=out)

        return decode


def _named(function: Callable[..., Any], args: tuple, after: int) -> dict[str, Any]:
    """Positional arguments by their names, as methods know them."""
    return dict(zip(list(inspect.signature(function).parameters)[after:], args, strict=False))


def _around(
    run: Run, part: str, inner: Callable[[Any], Tensor], *first: Any
) -> Callable[[Any], Tensor]:
    """``inner``, and around it this part of the methods that have it, which are given ``first``
    before all else."""
    for method in run.methods:
        if getattr(type(method), part) is not getattr(Method, part):
            inner = functools.partial(
                _call, functools.partial(getattr(method, part), *first), inner
            )
    return inner


def _call(part: Callable[..., Tensor], inner: Callable[[Any], Tensor], value: Any) -> Tensor:
    return part(value, inner)


def _from_moved(run: Run, timestep: Tensor | float, sample: Tensor) -> Tensor:
    if run._shift is None:
        return sample
    shift = run._shift
    if run._exploding:
        shift = shift / run.noise_level(timestep)[0]
    return sample + shift.to(sample.dtype)
