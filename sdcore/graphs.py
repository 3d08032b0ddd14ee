"""CUDA graphs of a callable: captured once for each kind of call, then replayed.

A UNet of a few hundred small kernels takes longer to launch than to run; a graph launches all of
them at once. It bakes in shapes, dtypes, Python's numbers and where weights are. So all of these
make up the key under which it is kept.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_log = logging.getLogger("sdcore")

WARM_UP = 3  # calls before the capture: what is chosen or compiled at a first call is then done


class Graphs:
    """``function``, replayed from CUDA graphs where that is possible, else called.

    ``function`` takes tensors, numbers, strings and None, and tuples, lists and dictionaries of
    them, and returns tensors in such a structure. It may differentiate within. It must not wait for
    the GPU, and must read no other tensors than those that it is given and those that ``state``
    stands for. Results are new tensors, each call's own.

    It is called, and the reason logged once, where tensors are not on a GPU, where ``state`` says
    so, and where a capture fails, as it does if ``function`` waits for the GPU.

    Args:
        function: what to capture.
        name: what it is called in messages.
        most: graphs to keep; the one that was not used for the longest time goes first.
    """

    def __init__(self, function: Callable[..., Any], name: str, most: int = 8) -> None:
        self.function, self.name, self.most = function, name, most
        #: What the function reads besides its arguments, such as ``module_state(unet)``; or, as a
        #: ``str``, why it can't be captured. To be set anew where it may have changed.
        self.state: Hashable = None
        self.captures = 0
        self.replays = 0
        self._kept: OrderedDict[Hashable, _Captured | None] = OrderedDict()
        self._said: set[str] = set()
        self._pool: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors: list[Tensor] = []
        layout = _layout((args, kwargs), tensors)
        reason = self._why_not(tensors)
        if reason is not None:
            self._say(reason)
            return self.function(*args, **kwargs)
        key = layout, self.state, _modes()
        if key not in self._kept:
            self._kept[key] = self._captured(args, kwargs, tensors)
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        graph = self._kept[key]
        if graph is None:  # its capture failed
            return self.function(*args, **kwargs)
        self.replays += 1
        return graph.replay(tensors)

    def clear(self) -> None:
        """Drops all graphs, and gives their memory back."""
        self._kept.clear()
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
        if any(one.requires_grad for one in tensors) and torch.is_grad_enabled():
            return "a gradient flows through its arguments"
        return None

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("%s runs without a CUDA graph: %s", self.name, reason)

    def _captured(self, args: Any, kwargs: Any, tensors: list[Tensor]) -> _Captured | None:
        device = tensors[0].device
        inputs = [one.clone() for one in tensors]
        again = iter(inputs)
        args, kwargs = _filled((args, kwargs), again)
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self.function(*args, **kwargs)
            torch.cuda.current_stream().wait_stream(side)
            # One pool for all: results are copied out, so that no graph's memory is in use when
            # another runs.
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may go on using the GPU.
                with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                    out = self.function(*args, **kwargs)
            except RuntimeError as error:
                torch.cuda.synchronize()
                self._say(f"its capture failed: {str(error).splitlines()[0]}")
                return None
        self.captures += 1
        return _Captured(graph, inputs, out)


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    out: Any

    def replay(self, tensors: list[Tensor]) -> Any:
        torch._foreach_copy_(self.inputs, tensors)
        self.graph.replay()
        return _copied(self.out)


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


def _modes() -> Hashable:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
    )


def module_state(module: nn.Module) -> Hashable:
    """What a graph with this module in it bakes in: where its weights are, which adapters are
    active and merged, and how strong; or, as a ``str``, why there can be no graph.

    It goes through all of the module's parts: ask once a run, not once a call.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if tensor.device.type != "cuda":
            return f"{name} of {type(module).__name__} is on {tensor.device}"
    for name, part in module.named_modules():
        hook = getattr(part, "_hf_hook", None)
        if hook is not None and getattr(hook, "offload", True):
            return (
                f"a hook of accelerate is on {name or type(module).__name__}: it may be offloaded"
            )
    return tuple(tensor.data_ptr() for _, tensor in tensors), adapter_state(module)


def adapter_state(module: nn.Module) -> Hashable:
    """The numbers of PEFT's layers and IP-Adapter's processors, and which parts train."""
    return tuple(
        (part.training, _adapters(part), _adapters(getattr(part, "processor", None)))
        for part in module.modules()
    )


def _adapters(part: Any) -> Hashable:
    found: list[Hashable] = []
    for name in ("scaling", "scale", "active_adapters", "merged_adapters", "disable_adapters"):
        value = getattr(part, name, None)
        if isinstance(value, dict):
            value = tuple(sorted(value.items()))
        elif isinstance(value, list):
            value = tuple(value)
        if isinstance(value, (bool, int, float, str, tuple)):
            found.append((name, value))
    return (type(part), *found) if found else None
