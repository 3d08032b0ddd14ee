"""What ``sdcore info`` tells: versions, devices, compiled modules, and the backends of each op."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import sdcore
from sdcore import backends

PACKAGES = ("triton", "numpy", "diffusers", "transformers")


def collect() -> dict[str, Any]:
    """Plain values that JSON can hold. Where something is broken, {"error": what it said}."""
    return {
        "versions": {
            "sdcore": sdcore.__version__,
            "python": platform.python_version(),
            # The wheel's version lacks what torch was built for: "+cpu", "+cu130".
            "torch": str(torch.__version__),
            **{name: _version(name) for name in PACKAGES},
            "cuda_of_torch": torch.version.cuda,
            "rocm_of_torch": torch.version.hip,
            "platform": platform.platform(),
        },
        "devices": {"cpu": _cpu(), "gpus": _told(_gpus)},
        "modules": _told(lambda: dict(backends.build_report())),
        "backends": {name: _told(partial(_available, name)) for name in backends.NAMES},
        "forced_backend": os.environ.get("SDCORE_BACKEND") or None,
        "ops": _told(_ops),
    }


def describe(facts: dict[str, Any]) -> str:
    """What ``collect`` found, as text for a reader."""
    return "\n".join(
        [
            "Versions",
            *_aligned(
                {
                    name.replace("_of_torch", " of torch"): version or "not installed"
                    for name, version in facts["versions"].items()
                    if version or not name.endswith("_of_torch")
                }
            ),
            "",
            "Devices",
            *_aligned(dict(_device_rows(facts["devices"]))),
            "",
            "Compiled modules",
            *_aligned(dict(_module_rows(facts["modules"]))),
            "",
            "Backends",
            *_aligned({name: _backend_row(found) for name, found in facts["backends"].items()}),
            *_forced_rows(facts["forced_backend"]),
            "",
            "Ops",
            *_op_rows(facts["ops"], facts["backends"]),
        ]
    )


def _told(ask: Callable[[], Any]) -> Any:
    # This is where a user looks when something is broken, in whatever way: anything may raise.
    try:
        return ask()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # Linux on x86 alone gives a model name there.
    return {"name": name, "threads": torch.get_num_threads()}


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": found.name,
                "compute_capability": f"{found.major}.{found.minor}",
                "memory_bytes": found.total_memory,
            }
        )
    return gpus


def _available(backend: str) -> dict[str, Any]:
    reason = backends.unavailable(backend)
    return {"available": reason is None, "reason": reason}


def _ops() -> dict[str, Any]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        op: {
            "default": {device: backends.default(op, device) for device in devices},
            "implementations": {
                name: {"available": reason is None, "reason": reason}
                for name, reason in row.items()
            },
        }
        for op, row in backends.table().items()
    }


def _aligned(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f"  {name:<{width}}  {value}" for name, value in rows.items()]


def _device_rows(devices: dict[str, Any]) -> Iterator[tuple[str, str]]:
    cpu, gpus = devices["cpu"], devices["gpus"]
    yield "cpu", f"{cpu['name']}, {cpu['threads']} threads"
    if "error" in gpus:
        yield "cuda", gpus["error"]
    elif not gpus:
        yield "cuda", "PyTorch finds no GPU"
    else:
        for index, gpu in enumerate(gpus):
            memory = f"{gpu['memory_bytes'] / 2**30:.1f} GiB"
            capability = f"compute capability {gpu['compute_capability']}"
            yield f"cuda:{index}", f"{gpu['name']}, {capability}, {memory}"


def _module_rows(modules: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if not modules:
        yield "sdcore/_build.json", "missing: nothing tells how the modules were built"
    for kind, found in modules.items():
        if not isinstance(found, dict):
            yield kind, str(found)
            continue
        facts = dict(found)
        state = "built" if facts.pop("built", False) else "not built"
        reason = facts.pop("reason", None)
        told = [f"{key} {_words(value)}" for key, value in facts.items()]
        yield f"sdcore._{kind}", ": ".join(filter(None, [state, reason or ", ".join(told)]))


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _backend_row(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"broken: {found['error']}"
    return "available" if found["available"] else f"not here: {found['reason']}"


def _forced_rows(name: str | None) -> list[str]:
    return [f"  SDCORE_BACKEND={name} is set: a call takes that one or fails"] if name else []


def _op_rows(ops: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    """For each op what a call takes, what else runs here, and reasons that are the op's alone.

    A backward that fares as its forward does shares its rows.
    """
    if "error" in ops:
        return [f"  {ops['error']}"]
    paired = {op for op in ops if _nameless(op, ops) == _nameless(f"{op}_backward", ops)}
    lines = []
    for op, found in ops.items():
        if op.removesuffix("_backward") in paired - {op}:
            continue
        rows = found["implementations"].items()
        here = ", ".join(name for name, row in rows if row["available"])
        takes = ", ".join(f"{name or 'none'} on {at}" for at, name in found["default"].items())
        lines.append(f"  {op}{', and its backward' if op in paired else ''}")
        lines.append(f"    takes {takes}; available: {here}")
        for name, row in rows:
            if row["reason"] and row["reason"] != machine[name].get("reason"):
                lines.append(f"    {name}: {row['reason']}")
    return lines


def _nameless(op: str, ops: dict[str, Any]) -> str | None:
    """All that is known of an op but its name, to compare two; None if there is no such op."""
    return repr(ops[op]).replace(op, "") if op in ops else None
