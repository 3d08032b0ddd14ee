"""Registering flat ops with PyTorch.

``Library.define`` with ``impl`` adds 3 µs to a call, ``torch.library.custom_op`` 16 (torch 2.13,
one tensor in and two out, no gradient). One kernel serves all devices: ``backends.run`` picks the
implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdcore import backends

LIBRARY = torch.library.Library("sdcore", "DEF")
# Asked once: torch.compile of PyTorch 2.11 can't trace the question.
_CASTING = frozenset(
    one for one in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(one)
)


def define(
    schema: str, fake: Callable[..., Any], kernel: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Register the flat op ``schema``; ``fake`` gives its outputs' shapes, dtypes and strides.

    Without ``kernel``, the implementations are those registered with ``backends``.
    """
    name = schema.split("(")[0]

    def run(*args: Any) -> Any:
        return backends.run(name, *args)

    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel or run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sdcore::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.sdcore, name).default


def gradient(
    op: Callable[..., Any], backward: Callable[..., Any], save: Callable[..., Any]
) -> None:
    """Register ``backward(ctx, *grads)`` for ``op``, with ``save(ctx, inputs, output)``."""
    torch.library.register_autograd(op, backward, setup_context=save, lib=LIBRARY)


def once_differentiable(op: Callable[..., Any], name: str) -> None:
    """``op`` is the backward of the public op ``name``: a second derivative raises."""

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    def backward(ctx: Any, *grads: Any) -> Any:
        raise no_second_derivative(name)

    gradient(op, backward, save)


def no_second_derivative(name: str) -> RuntimeError:
    """The error of every op whose gradient is not differentiable."""
    return RuntimeError(
        f"sdcore.ops.{name} has no second derivative: its gradient is not differentiable"
    )


def autocast(tensor: Any) -> Any:
    """Cast as autocast casts what is multiplied, if it is on for the tensor's device; float64 and
    what is no tensor of floats stay."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return tensor
    device = tensor.device.type
    if device not in _CASTING or not torch.is_autocast_enabled(device):
        return tensor
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(device))
