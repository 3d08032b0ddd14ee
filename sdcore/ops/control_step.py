"""A step of gradient descent on what is added to a sample, and the sum."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sdcore import backends
from sdcore.ops import registration
from sdcore.ops.dtypes import DTYPES
from sdcore.ops.layouts import dense_like, joint


def control_step(
    control: Tensor,
    gradient: Tensor,
    sample: Tensor,
    learning_rate: Tensor | float,
    *,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One step of gradient descent on a control u of a sample x, and the sample so moved, in one
    launch.

    .. math:: u' = u - \eta \, f \, g, \qquad x' = x + u'

    Args:
        control: u, [B, C, h, w], or with any axes after the channels; float32, of any strides.
        gradient: g, of that shape, float16, bfloat16, float32 or float64, of any strides.
        sample: x, [B, C or more, h, w], of any of these dtypes, of any strides. Channels beyond C,
            as inpainting has them, are copied.
        learning_rate: :math:`\eta`, a number or a tensor of one on the device, which the host does
            not read.
        factor: f, [B], floats on the device, such as what normalizes each picture's gradient;
            None: 1.

    Returns:
        u', float32, and x', of the dtype of ``sample``; both with the memory format of what they
        follow. Arithmetic is in float32 (float64 if an input is), and the sum of x and the u' that
        is not rounded yet is rounded once.

    Gradient:
        None: a derivative raises.

    Cost: each value is read once. Plain PyTorch takes over for float64 on a GPU.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, dtypes or devices that do not fit; the message names the argument.
        RuntimeError: a derivative was asked for.
    """
    _check(control, gradient, sample)
    rate, by = None, 1.0
    if isinstance(learning_rate, Tensor):
        _check_floats("learning_rate", learning_rate, control)
        if learning_rate.numel() != 1:
            raise ValueError(f"learning_rate must be one; got {list(learning_rate.shape)}")
        rate = learning_rate
    elif isinstance(learning_rate, Real) and not isinstance(learning_rate, bool):
        by = float(learning_rate)
    else:
        raise TypeError(
            f"learning_rate must be a number or a tensor; got {type(learning_rate).__name__}"
        )
    if factor is not None:
        _check_floats("factor", factor, control)
        if factor.shape != control.shape[:1]:
            raise ValueError(
                f"factor must have a number for each of {len(control)} samples; "
                f"got {list(factor.shape)}"
            )
    stepped, moved = _step(control, gradient, sample, factor, rate, by)
    return stepped, moved


def reference(
    control: Tensor, gradient: Tensor, sample: Tensor, rate: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The specification; the rate, with the factor in it, is broadcastable."""
    stepped = control - rate * gradient
    channels = control.shape[1]
    return stepped, torch.cat([sample[:, :channels] + stepped, sample[:, channels:]], 1)


# ---------------------------------------------------------------------------------------------
# Arguments


def _check(control: Tensor, gradient: Tensor, sample: Tensor) -> None:
    for name, one in (("control", control), ("gradient", gradient), ("sample", sample)):
        if not isinstance(one, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(one).__name__}")
        if one.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be of float16, bfloat16, float32 or float64; got {one.dtype}"
            )
        _check_device(name, one, control)
    if control.dtype != torch.float32:
        raise ValueError(f"control must be of float32; got {control.dtype}")
    shape = list(control.shape)
    if control.ndim < 2:
        raise ValueError(f"control must be [batch, channels, …]; got {shape}")
    if gradient.shape != control.shape:
        raise ValueError(
            f"gradient must have the shape of control, {shape}; got {list(gradient.shape)}"
        )
    fits = sample.ndim == control.ndim and sample.shape[1] >= control.shape[1]
    if not fits or list(sample.shape[:1] + sample.shape[2:]) != shape[:1] + shape[2:]:
        raise ValueError(
            f"sample must have the shape of control, {shape}, or more channels; "
            f"got {list(sample.shape)}"
        )


def _check_floats(name: str, given: Tensor, control: Tensor) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(given).__name__}")
    if not given.is_floating_point():
        raise TypeError(f"{name} must hold floats; got {given.dtype}")
    _check_device(name, given, control)


def _check_device(name: str, given: Tensor, control: Tensor) -> None:
    if given.device != control.device:
        raise ValueError(
            f"{name} must be on control's device, {control.device}; got {given.device}"
        )


# ---------------------------------------------------------------------------------------------
# The flat op


def _outputs(
    control: Tensor,
    gradient: Tensor,
    sample: Tensor,
    factor: Tensor | None,
    rate: Tensor | None,
    by: float,
) -> tuple[Tensor, Tensor]:
    return dense_like(control, len(control)), dense_like(sample, len(sample))


# The learning rate is ``rate`` (None: 1) times ``by``.
_step = registration.define(
    "control_step(Tensor control, Tensor gradient, Tensor sample, Tensor? factor, Tensor? rate, "
    "float by) -> (Tensor, Tensor)",
    _outputs,
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    return None


def _differentiate(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("sdcore.ops.control_step has no derivative: it is a step, not a loss")


registration.gradient(_step, _differentiate, _save)


# ---------------------------------------------------------------------------------------------
# Plain PyTorch


@backends.register("control_step", "reference")
def _step_plain(*args: Any) -> tuple[Tensor, Tensor]:
    control, gradient, sample, factor, rate, by = args
    double = torch.float64 in (gradient.dtype, sample.dtype)
    wide = torch.float64 if double else torch.float32
    if rate is not None:
        by = by * rate.to(wide).reshape(())
    if factor is not None:
        by = by * factor.to(wide).reshape(-1, *(1,) * (control.ndim - 1))
    found = reference(control.to(wide), gradient.to(wide), sample.to(wide), by)
    stepped, moved = (out.copy_(one) for out, one in zip(_outputs(*args), found, strict=True))
    return stepped, moved


# ---------------------------------------------------------------------------------------------
# Triton


def _refuses(*args: Any) -> str | None:
    from sdcore.triton_kernels import samples

    return samples.refuses(*args[:3])


@backends.register("control_step", "triton", _refuses)
def _step_triton(*args: Any) -> tuple[Tensor, Tensor]:
    from sdcore.triton_kernels import control_step as kernels

    control, gradient, sample, factor, rate, by = args
    stepped, moved = _outputs(*args)
    places = [
        joint([*some, torch.empty(some[0].shape, device="meta")])
        for some in ((control, gradient, stepped), (sample, moved))
    ]
    kernels.step(control, gradient, stepped, sample, moved, factor, rate, by, tuple(places))
    return stepped, moved
