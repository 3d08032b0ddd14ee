"""CUDA graphs of a callable: captured once for each kind of call, then replayed.

A UNet of a few hundred small kernels takes longer to launch than to run; a graph launches all of
them at once. It bakes in shapes, dtypes, Python's numbers and where weights are. So all of these
make up the key under which it is kept.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sdcore import backends

_log = logging.getLogger("sdcore")

# In which of several ways the modules in a function compute at this moment, to those who change it.
variant: ContextVar[Hashable] = ContextVar("sdcore_variant", default=None)

WAITED = "called a synchronizing CUDA operation"  # PyTorch's words
WARM_UP = 3  # calls before the capture: what is chosen or compiled at a first call is then done


class Graphs:
    """``function``, replayed from CUDA graphs where that is possible, else called.

    ``function`` takes tensors, numbers, strings and None, and tuples, lists and dictionaries of
    them, and returns tensors in such a structure. It may differentiate within. It must not wait for
    the GPU, and must read no other tensors than those that it is given and those that ``state``
    stands for. Results are new tensors, each call's own.

    It is called, and the reason logged once, where tensors are not on a GPU, where ``state`` says
    so, where it waits for the GPU, and where a capture fails. Threads and streams take turns.
    PyTorch forbids that other threads draw from its generator on the GPU while one captures.

    Args:
        function: what to capture.
        name: what it is called in messages.
        most: graphs to keep; the one that was not used for the longest time goes first.
        gradients: whether gradients to tensors among the arguments may be asked for, and then have
            a graph of their own. Nothing else that the function reads may need one, and it must
            draw no random numbers: what gradients need stays in the graphs' memory, and if another
            call came in between, the function is replayed for it again. Second derivatives raise,
            and so does a gradient after one of ``weights`` was changed in place. Where hooks on
            saved tensors are at work, as activation checkpointing has them, the function is called.
            Without ``gradients`` a function whose gradient is wanted is called.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, most: int = 8, *, gradients: bool = False
    ) -> None:
        self.function, self.name, self.most = function, name, most
        self.gradients = gradients
        #: The tensors that ``state`` stands for. A gradient that is still to be asked for keeps
        #: them alive.
        self.weights: Sequence[Tensor] = ()
        self.captures = 0
        self.replays = 0
        self._kept: OrderedDict[tuple, _Captured | None] = OrderedDict()
        self._state = _Hashed(None)
        self._said: set[str] = set()
        self._pool: Any = None
        # A capture differentiates, for which autograd has one thread on each GPU; so that thread
        # must never wait for a capture, and replays, which it makes, have a lock of their own.
        self._capturing = threading.Lock()
        self._replaying = threading.Lock()
        self._copied: torch.cuda.Event | None = None
        # Of the last replay: what it left in the memory that all graphs share.
        self._turn: object = None

    @property
    def state(self) -> Hashable:
        """What the function reads besides its arguments, such as ``module_state(unet)``; or, as a
        ``str``, why it can't be captured. To be set anew where it may have changed."""
        return self._state.value

    @state.setter
    def state(self, value: Hashable) -> None:
        new = _Hashed(value)
        # The very object in the keys, where it is there: then no call compares what is in it.
        with self._capturing:
            self._state = next((key[1] for key in self._kept if key[1] == new), new)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors: list[Tensor] = []
        layout = _layout((args, kwargs), tensors)
        reason = self._why_not(tensors)
        if reason is not None:
            self._say(reason)
            return self.function(*args, **kwargs)
        wanted = _wanted(tensors)
        with self._capturing:
            key = layout, wanted, self._state, _modes()
            graph = self._graph(key, args, kwargs, tensors)
        if graph is None:
            return self.function(*args, **kwargs)
        if any(wanted):
            return _filled(graph.out, iter(_Differentiable.apply(self, graph, *tensors)))
        with self._replaying:
            return self._replayed(graph, tensors)

    def _graph(self, key: tuple, args: Any, kwargs: Any, tensors: list[Tensor]) -> _Captured | None:
        """None if its capture failed."""
        if key not in self._kept:
            self._kept[key] = self._captured(args, kwargs, tensors)
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _replayed(self, graph: _Captured, tensors: Sequence[Tensor]) -> Any:
        with self._in_turn(tensors[0].device):
            torch._foreach_copy_(graph.inputs, list(tensors))
            graph.graph.replay()
            return _copied(graph.out)

    def _pulled(
        self, graph: _Captured, tensors: Sequence[Tensor], turn: object, grads: Sequence[Any]
    ) -> list[Tensor | None]:
        """Gradients to the inputs, after the replay that had this turn."""
        assert graph.backward is not None
        again = self._turn is not turn
        with self._in_turn(tensors[0].device):
            if again:
                torch._foreach_copy_(graph.inputs, list(tensors))
                graph.graph.replay()
            for kept, grad in zip(graph.grads, grads, strict=True):
                if kept is not None:
                    kept.zero_() if grad is None else kept.copy_(grad)
            graph.backward.replay()
            return [None if one is None else one.clone() for one in graph.found]

    @contextlib.contextmanager
    def _in_turn(self, device: torch.device) -> Iterator[None]:
        stream = torch.cuda.current_stream(device)
        if self._copied is not None:  # by whichever stream had the graphs before
            stream.wait_event(self._copied)
        self._turn = object()
        self.replays += 1
        yield
        self._copied = stream.record_event()

    def clear(self) -> None:
        """Drops all graphs, and gives their memory back."""
        with self._capturing, self._replaying:
            self._kept.clear()
            self._turn = None
            if self._pool is not None:
                self._pool = None
                torch.cuda.empty_cache()

    def _why_not(self, tensors: list[Tensor]) -> str | None:
        if isinstance(self.state, str):
            return self.state
        devices = {one.device for one in tensors}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            where = ", ".join(sorted(map(str, devices))) or "nowhere"
            return f"its tensors are not on one GPU, but on {where}"
        if torch.cuda.is_current_stream_capturing():
            return "it is within a capture already"
        if any(_wanted(tensors)):
            if not self.gradients:
                return "a gradient flows through its arguments"
            if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
                return "hooks on saved tensors are at work, as those of checkpointing"
        return None

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("%s runs without a CUDA graph: %s", self.name, reason)

    def _captured(self, args: Any, kwargs: Any, tensors: list[Tensor]) -> _Captured | None:
        device = tensors[0].device
        wanted = _wanted(tensors)
        inputs = [
            one.detach().clone().requires_grad_(needed)
            for one, needed in zip(tensors, wanted, strict=True)
        ]
        again = iter(inputs)
        args, kwargs = _filled((args, kwargs), again)
        side = torch.cuda.Stream(device)
        captured = _Captured(torch.cuda.CUDAGraph(), inputs)
        # One pool for all: results are copied out before another graph runs.
        self._pool = self._pool or torch.cuda.graph_pool_handle()

        def capture(graph: torch.cuda.CUDAGraph) -> Any:
            # Other threads may go on using the GPU.
            return torch.cuda.graph(
                graph, self._pool, stream=side, capture_error_mode="thread_local"
            )

        try:
            with torch.cuda.device(device), _casts_anew():
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP):
                        captured.pull(self.function(*args, **kwargs))
                    # In a capture, waiting is an error that harms more than the capture.
                    with _listening.waiting_is_an_error():
                        captured.pull(self.function(*args, **kwargs))
                    with capture(captured.graph):
                        out = self.function(*args, **kwargs)
                    if any(wanted):
                        captured.backward = torch.cuda.CUDAGraph()
                        captured.make_grads(out)
                        with capture(captured.backward):
                            captured.found = captured.pull(out)
                captured.out = _filled(out, (one.detach() for one in _tensors(out)))
                torch.cuda.current_stream().wait_stream(side)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._say(f"its capture failed: {str(error).splitlines()[0]}")
            return None
        self.captures += 1
        return captured


class _Hashed:
    """A value with its hash, which of a UNet's state takes milliseconds."""

    __slots__ = ("_hash", "value")

    def __init__(self, value: Hashable) -> None:
        self.value, self._hash = value, hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, _Hashed) and self._hash == other._hash and self.value == other.value
        )


class _Listening:
    """To what waits for the GPU, in threads that ask.

    PyTorch's mode is all threads' at once, so that as an error it would stop those that may well
    wait. It is asked to warn: of a warning it is known whose it is.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._heard: dict[int, list[str]] = {}  # by thread
        self._mode: Any = 0  # as it was
        self._show: Callable[..., Any] = warnings.showwarning

    @contextlib.contextmanager
    def waiting_is_an_error(self) -> Iterator[None]:
        here = threading.get_ident()
        with self._lock:
            if not self._heard:
                self._begin()
            outer, self._heard[here] = self._heard.get(here), []
        try:
            yield
        finally:
            with self._lock:
                heard = self._heard.pop(here)
                if outer is not None:
                    self._heard[here] = outer + heard
                if not self._heard:
                    self._end()
        if heard:
            raise RuntimeError(heard[0])

    # Not by warnings.catch_warnings, whose blocks in two threads undo each other.
    def _begin(self) -> None:
        # It stays: warnings of this kind are there for those alone who ask for them.
        warnings.filterwarnings("always", message=WAITED)
        if warnings.showwarning != self._hear:
            self._show, warnings.showwarning = warnings.showwarning, self._hear
        self._mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")

    def _end(self) -> None:
        torch.cuda.set_sync_debug_mode(self._mode)
        if warnings.showwarning == self._hear:
            warnings.showwarning = self._show

    def _hear(self, message: Warning | str, *where: Any, **more: Any) -> None:
        if str(message).startswith(WAITED):
            heard = self._heard.get(threading.get_ident())
            if heard is not None:
                heard.append(str(message))
                return
            if self._heard and self._mode == 0:  # nobody else asked for it
                return
        self._show(message, *where, **more)


_listening = _Listening()


@contextlib.contextmanager
def _casts_anew() -> Iterator[None]:
    """Autocast keeps the weights that it cast, and drops them at its end. A graph must cast."""
    enabled = torch.is_autocast_enabled("cuda")
    with torch.autocast(
        "cuda", torch.get_autocast_dtype("cuda"), enabled=enabled, cache_enabled=False
    ):
        torch.clear_autocast_cache()
        yield


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    out: Any = None
    backward: torch.cuda.CUDAGraph | None = None
    grads: list[Tensor | None] = field(default_factory=list)  # of what there is in out
    found: list[Tensor | None] = field(default_factory=list)  # of the inputs

    def make_grads(self, out: Any) -> None:
        self.grads = [torch.zeros_like(one) if one.requires_grad else None for one in _tensors(out)]

    def pull(self, out: Any) -> list[Tensor | None]:
        """Gradients of ``out`` to the inputs that want one."""
        leaves = [one for one in self.inputs if one.requires_grad]
        if not leaves:
            return []
        if not self.grads:
            self.make_grads(out)
        pairs = [
            (one, grad)
            for one, grad in zip(_tensors(out), self.grads, strict=True)
            if grad is not None
        ]
        ends, grads = zip(*pairs, strict=True) if pairs else ((), ())
        # As gradients are computed: outside of the autocast that the call was in.
        with torch.autocast("cuda", enabled=False):
            some = torch.autograd.grad(ends, leaves, grads, allow_unused=True) if pairs else ()
        found = iter(some)
        return [next(found, None) if one.requires_grad else None for one in self.inputs]


class _Differentiable(torch.autograd.Function):
    """A replay, and later that of its gradient."""

    @staticmethod
    def forward(ctx: Any, owner: Graphs, graph: _Captured, *tensors: Tensor) -> tuple[Tensor, ...]:
        with owner._replaying:
            out = _tensors(owner._replayed(graph, tensors))
            ctx.turn = owner._turn
        ctx.owner, ctx.graph = owner, graph
        # What the graph reads, alive wherever the modules may have gone since, and its version.
        ctx.weights = [(one.detach(), _version(one)) for one in owner.weights]
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(
            *(one for one, grad in zip(out, graph.grads, strict=True) if grad is None)
        )
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        for weight, version in ctx.weights:
            if _version(weight) != version:
                raise RuntimeError(
                    f"a weight {list(weight.shape)} of {ctx.owner.name} was changed in place "
                    "between a call and its gradient"
                )
        with torch.no_grad(), ctx.owner._replaying:
            found = ctx.owner._pulled(ctx.graph, tensors, ctx.turn, grads)
        if torch.is_grad_enabled():
            found = _Last.apply(ctx.owner.name, len(found), *found, *tensors)
        return None, None, *found


def _version(tensor: Tensor) -> int | None:
    """Of tensors made in inference mode nobody counts the changes."""
    return None if tensor.is_inference() else tensor._version


class _Last(torch.autograd.Function):
    """Gradients as they are, of which there are none: a second derivative raises."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Any) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tuple(None if one is None else one.clone() for one in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{ctx.name} has no second derivative in a CUDA graph")


def _layout(value: Any, tensors: list[Tensor]) -> Hashable:
    """What a graph of this call bakes in; the tensors are put on the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return "tensor", tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, dict):
        return "dict", tuple((key, _layout(one, tensors)) for key, one in value.items())
    if isinstance(value, (tuple, list)):
        return type(value).__name__, tuple(_layout(one, tensors) for one in value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return type(value).__name__, value
    raise TypeError(
        "arguments of a captured function must be tensors, numbers, strings, None, or tuples, "
        f"lists and dictionaries of them; got a {type(value).__name__}"
    )


def fits(value: Any) -> bool:
    """Whether a captured function may be given it."""
    try:
        _layout(value, [])
    except TypeError:
        return False
    return True


def kind_of(value: Any) -> Hashable:
    """Of what a captured function is given, what needs a graph of its own."""
    tensors: list[Tensor] = []
    return _layout(value, tensors), _wanted(tensors), _modes()


def _wanted(tensors: Sequence[Tensor]) -> tuple[bool, ...]:
    """Which of them a gradient is wanted to."""
    enabled = torch.is_grad_enabled()
    return tuple(enabled and one.requires_grad for one in tensors)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _layout(value, found)
    return found


def _filled(value: Any, tensors: Any) -> Any:
    """The same structure with other tensors."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: _filled(one, tensors) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(one, tensors) for one in value)
    return value


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_copied(one) for one in value)
    return value


def _precisions() -> Hashable:
    """Of float32's products and convolutions."""
    try:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:  # they were set by the newer names
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


def _modes() -> Hashable:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        _precisions(),
        torch.are_deterministic_algorithms_enabled(),
        backends.forced(),
        variant.get(),
    )


def module_state(module: nn.Module) -> Hashable:
    """What a graph with this module in it bakes in: where its weights are, which adapters are
    active and merged, and how strong; or, as a ``str``, why there can be no graph.

    It goes through all of the module's parts: ask once a run, not once a call.
    """
    where = []
    for name, part in module.named_modules():
        own = vars(part)
        for key, tensor in (*own["_parameters"].items(), *own["_buffers"].items()):
            if tensor is None:
                continue
            if tensor.device.type != "cuda":
                full = f"{name}.{key}" if name else key
                return f"{full} of {type(module).__name__} is on {tensor.device}"
            where.append((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()))
        hook = own.get("_hf_hook")
        if hook is not None and getattr(hook, "offload", True):
            return (
                f"a hook of accelerate is on {name or type(module).__name__}: it may be offloaded"
            )
    return tuple(where), settings(module)


# What PyTorch keeps in every module: its parameters, parts and hooks.
_EVERY_MODULES = frozenset(vars(nn.Module())) - {"training"}
_NUMBERS = frozenset({int, float, bool, str, type(None)})


def settings(module: nn.Module) -> Hashable:
    """What a module's parts hold besides tensors: numbers, such as those of PEFT's layers, of
    IP-Adapter's processors and of FreeU; processors; hooks; a ``forward`` in place of the class's.
    """
    return tuple(map(_settings, module.modules()))


def _settings(part: nn.Module) -> Hashable:
    own = vars(part)
    # Not by getattr, which in a module without one takes longer than all else here.
    processor = own.get("processor") or own["_modules"].get("processor")
    return (
        type(part),
        tuple(
            # As it is where that says all: the fewer tuples are made, the less often are all of
            # Python's objects gone through for garbage.
            (key, type(one), one if _says_all(one) else _plain(one))
            for key, one in own.items()
            if key not in _EVERY_MODULES
        ),
        _unbound(own.get("forward")),
        tuple(own["_forward_hooks"].values()),
        tuple(own["_forward_pre_hooks"].values()),
        processor,
        None if processor is None else _plain(vars(processor)),
    )


def _unbound(function: Any) -> Hashable:
    """Of a method, what does not hold its object: states are kept for long."""
    if isinstance(function, MethodType):
        return function.__func__, id(function.__self__)
    return function


def _says_all(value: Any) -> bool:
    kind = type(value)
    return kind in _NUMBERS or (kind is tuple and all(type(one) in _NUMBERS for one in value))


def _plain(value: Any) -> Hashable:
    """The numbers, strings and None in it, and in what it holds; of anything else, nothing."""
    if isinstance(value, dict):
        return tuple((str(key), _plain(one)) for key, one in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(_plain(one) for one in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    return None
