"""What this machine can run, what it cannot and why, and which backend an op call takes.

An op is implemented up to four times: ``reference`` (plain PyTorch, any device), ``cpp``
(``sdcore._cpu``, CPU tensors), ``triton`` (``sdcore.triton_kernels``, GPU tensors) and
``cuda`` (``sdcore._cuda``, NVIDIA GPU tensors). A call takes the best one that accepts its
arguments; ``backend(name)`` or the variable ``SDCORE_BACKEND`` asks for one by name, and then
that one runs or the call fails with the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAMES = ("reference", "cpp", "triton", "cuda")
# Best first. On a CPU, Triton exists only as its interpreter, a debugging aid that is slower
# than plain PyTorch: it runs there when asked for by name and never by itself.
ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
OTHER_DEVICES = ("reference",)

logger = logging.getLogger("sdcore")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run the call."""


@dataclass(frozen=True)
class Implementation:
    """One backend's code for one op; ``refuses`` says why it can't take the arguments."""

    run: Callable[..., Any]
    refuses: Callable[..., str | None]


_implementations: dict[str, dict[str, Implementation]] = {}
# Process-wide, like torch's own backend flags: the backward of CUDA tensors runs in threads of
# autograd's own, which a thread-local or context-local choice would not reach.
_forced: str | None = os.environ.get("SDCORE_BACKEND") or None
_logged: set[tuple[str, str, str]] = set()


def register(
    op: str, name: str, refuses: Callable[..., str | None] = lambda *args: None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function is backend ``name``'s implementation of the flat op ``op``."""

    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(op, {})[name] = Implementation(run, refuses)
        return run

    return add


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for every op call inside the block, backward passes included.

    Args:
        name: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    The choice holds for the whole process, all threads, while the block is open. A backward
    pass that runs after the block takes the default backend again.

    Raises:
        ValueError: an unknown name.
        BackendError: that backend cannot run on this machine at all; the message says why. A
            backend that can run here but not for a given op, device or arguments raises the
            same error from the op call.
    """
    global _forced
    _check_name(name)
    if reason := unavailable(name):
        raise BackendError(f"backend {name!r} cannot run here: {reason}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def forced() -> str | None:
    """The backend that was asked for, if one was."""
    return _forced


def run(op: str, *args: Any) -> Any:
    """Run the flat op ``op`` on the backend that its arguments and the caller's wish select."""
    return choose(op, *args).run(*args)


def choose(op: str, *args: Any) -> Implementation:
    """The implementation that ``run`` takes. The device is that of the first argument."""
    device = args[0].device.type
    if _forced is not None:
        _check_name(_forced)
        if reason := _refusal(op, _forced, device, args):
            raise BackendError(
                f"backend {_forced!r} was asked for and cannot run {op} here: {reason}"
            )
        return _implementations[op][_forced]
    for name in ORDER.get(device, OTHER_DEVICES):
        if name not in _implementations[op]:
            continue
        reason = _refusal(op, name, device, args)
        if reason is None:
            return _implementations[op][name]
        _log_once(op, name, reason)
    raise BackendError(f"no backend can run {op} on {device}")


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}; got {name!r}")


def _refusal(op: str, name: str, device: str, args: tuple[Any, ...]) -> str | None:
    if name not in _implementations[op]:
        return f"{op} has no {name} implementation"
    return (
        unavailable(name)
        or unsuitable_device(name, device)
        or _implementations[op][name].refuses(*args)
    )


def _log_once(op: str, name: str, reason: str) -> None:
    if (op, name, reason) not in _logged:
        _logged.add((op, name, reason))
        logger.warning("%s: not using the %s backend: %s", op, name, reason)


def unsuitable_device(name: str, device: str) -> str | None:
    """Why backend ``name`` cannot take tensors of this device type; None if it can."""
    if name == "cpp" and device != "cpu":
        return f"it takes CPU tensors, and these are on {device}"
    if name == "cuda" and device != "cuda":
        return f"it takes CUDA tensors, and these are on {device}"
    if name == "triton" and device != "cuda" and not triton_interpreted():
        return f"it takes GPU tensors, and these are on {device} (TRITON_INTERPRET=1 is not set)"
    return None


def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def unavailable(name: str) -> str | None:
    """Why backend ``name`` cannot run on this machine; None if it can."""
    if name == "cpp":
        return _load("_cpu")[1]
    if name == "cuda":
        return _load("_cuda")[1] or _no_gpu_for_cuda()
    if name == "triton":
        return _no_triton()
    return None


def cpu_module() -> ModuleType:
    """``sdcore._cpu``; only called by implementations, which run only where it loads."""
    return _loaded("_cpu")


def cuda_module() -> ModuleType:
    """``sdcore._cuda``; importing it needs no GPU."""
    return _loaded("_cuda")


def _loaded(name: str) -> ModuleType:
    module, reason = _load(name)
    if module is None:
        raise BackendError(reason)
    return module


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """A compiled module, or why there is none. A broken one is a reason, never an ImportError."""
    from sdcore import __version__

    if importlib.util.find_spec(f"sdcore.{name}") is None:
        built = build_report().get(name.removeprefix("_"), {})
        return None, built.get("reason") or f"sdcore.{name} is not built"
    try:
        module = importlib.import_module(f"sdcore.{name}")
    except (ImportError, OSError) as error:
        return None, f"sdcore.{name} does not load: {error}"
    if (version := getattr(module, "version", "unknown")) != __version__:
        return None, f"sdcore.{name} was built from sdcore {version}, this is {__version__}"
    return module, None


def build_report() -> dict[str, dict[str, Any]]:
    """What the build wrote down: which modules it made, with what, and why not the others."""
    path = Path(__file__).with_name("_build.json")
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _no_gpu_for_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU here"
    if torch.version.hip:
        return "this PyTorch is a ROCm build, and the module is CUDA"
    major, minor = torch.cuda.get_device_capability()
    built = cuda_module().architectures
    # Machine code runs on the same major version at an equal or higher minor one; PTX of the
    # newest architecture runs on everything after it.
    if any(arch // 10 == major and arch % 10 <= minor for arch in built):
        return None
    if major * 10 + minor >= max(built):
        return None
    names = ", ".join(f"sm_{arch}" for arch in built)
    return f"compiled for {names}, and this GPU is sm_{major}{minor}"


def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if importlib.util.find_spec("sdcore.triton_kernels") is None:
        return "sdcore.triton_kernels is missing: install the package (pip install .)"
    if not torch.cuda.is_available() and not triton_interpreted():
        return "PyTorch finds no GPU here, and TRITON_INTERPRET=1 is not set"
    return None


def has(op: str, name: str) -> bool:
    """Whether backend ``name`` implements the flat op ``op``, here or elsewhere."""
    return name in _implementations[op]


def table() -> dict[str, dict[str, str | None]]:
    """For each flat op and backend, why it cannot run on this machine; None where it can."""
    return {
        op: {
            name: unavailable(name) if name in found else f"{op} has no {name} implementation"
            for name in NAMES
        }
        for op, found in _implementations.items()
    }


def default(op: str, device: str) -> str | None:
    """The backend that a call of ``op`` takes on this device type, if it accepts the arguments."""
    order = (_forced,) if _forced else ORDER.get(device, OTHER_DEVICES)
    for name in order:
        if name in _implementations[op] and not (
            unavailable(name) or unsuitable_device(name, device)
        ):
            return name
    return None
