"""Clean latents of what a diffusion model predicts, as the VAE takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdcore import backends
from sdcore.ops import registration
from sdcore.ops.dtypes import DTYPES, wide_of
from sdcore.ops.layouts import dense_like, joint

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # as the flat op numbers them


def clean_latents(
    sample: Tensor,
    prediction: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    prediction_type: str = "epsilon",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""The clean latents that a prediction p means, scaled for the VAE, in one launch.

    .. math::
        \text{out} = \text{scale} \cdot x_0 + \text{shift}, \qquad
        x_0 = (x - \sigma p) / \alpha, \quad \alpha x - \sigma p, \quad p

    for ``"epsilon"``, ``"v_prediction"`` and ``"sample"``, where x is :math:`\alpha` clean latents
    and :math:`\sigma` noise; for ``"v_prediction"`` :math:`\alpha^2 + \sigma^2 = 1`.

    Args:
        sample: x, [B, C, h, w], or with any axes after the channels; float16, bfloat16, float32 or
            float64, of any strides, such as the first channels of more.
        prediction: p, of that shape, of any of these dtypes, of any strides.
        alpha: a number, or one for each of B, as a tensor of floats on the device. It is not read
            by the host, so that one CUDA graph serves all timesteps.
        sigma: likewise.
        prediction_type: what p is.
        scale: [C], float32, on the device; None: 1. By it and ``shift`` latents of unit variance
            become the VAE's: 1 / ``scaling_factor``, or ``latents_std`` / ``scaling_factor`` and
            ``latents_mean``.
        shift: [C], float32; None: 0.
        dtype: of what is returned; None: that of ``prediction``.

    Returns:
        [B, C, h, w], contiguous. Arithmetic is in float32, in float64 if an input is, and rounded
        once. Autocast changes nothing.

    Gradient:
        To ``sample`` (not for ``"sample"``, which does not use it) and ``prediction``, in one
        launch, in their dtypes; none to the rest, which are constants here. A second derivative
        raises.

    Cost: each value is read once, O(B · C · h · w). Plain PyTorch takes over for float64 on a GPU.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, dtypes or devices that do not fit, or an unknown prediction type; the
            message names the argument.
        RuntimeError: a second derivative was asked for.
    """
    _check_latents(sample, prediction)
    levels = [_level(name, one, sample) for name, one in (("alpha", alpha), ("sigma", sigma))]
    for name, one in (("scale", scale), ("shift", shift)):
        _check_channels(name, one, sample)
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; got {prediction_type!r}"
        )
    dtype = prediction.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float16, bfloat16, float32 or float64; got {dtype}")
    kind = PREDICTION_TYPES.index(prediction_type)
    return _clean(sample, prediction, *levels, scale, shift, kind, dtype)


def reference(
    sample: Tensor,
    prediction: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    prediction_type: str,
) -> Tensor:
    """The specification, differentiable by autograd. Levels, scale and shift are broadcastable."""
    clean = prediction
    if prediction_type == "epsilon":
        clean = (sample - sigma * prediction) / alpha
    elif prediction_type == "v_prediction":
        clean = alpha * sample - sigma * prediction
    if scale is not None:
        clean = scale * clean
    return clean if shift is None else clean + shift


# ---------------------------------------------------------------------------------------------
# Arguments


def _check_latents(sample: Tensor, prediction: Tensor) -> None:
    for name, one in (("sample", sample), ("prediction", prediction)):
        if not isinstance(one, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(one).__name__}")
        if one.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be of float16, bfloat16, float32 or float64; got {one.dtype}"
            )
    if sample.ndim < 2:
        raise ValueError(f"sample must be [batch, channels, …]; got {list(sample.shape)}")
    if prediction.shape != sample.shape:
        raise ValueError(
            f"prediction must have the shape of sample, {list(sample.shape)}; "
            f"got {list(prediction.shape)}"
        )
    _check_device("prediction", prediction, sample)


def _check_device(name: str, given: Tensor, sample: Tensor) -> None:
    if given.device != sample.device:
        raise ValueError(f"{name} must be on sample's device, {sample.device}; got {given.device}")


def _level(name: str, given: Tensor, sample: Tensor) -> Tensor:
    """[B]; with stride 0 if one for all."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(given).__name__}")
    if not given.is_floating_point():
        raise TypeError(f"{name} must hold floats; got {given.dtype}")
    _check_device(name, given, sample)
    if given.ndim > 1 or given.numel() not in (1, len(sample)):
        raise ValueError(
            f"{name} must be one number or one for each of {len(sample)} samples; "
            f"got {list(given.shape)}"
        )
    return given.detach().reshape(-1).expand(len(sample))


def _check_channels(name: str, given: Tensor | None, sample: Tensor) -> None:
    if given is None:
        return
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor or None; got {type(given).__name__}")
    if given.dtype != torch.float32:
        raise ValueError(f"{name} must be of float32; got {given.dtype}")
    _check_device(name, given, sample)
    if given.shape != sample.shape[1:2]:
        raise ValueError(
            f"{name} must have a number for each of {sample.shape[1]} channels; "
            f"got {list(given.shape)}"
        )


# ---------------------------------------------------------------------------------------------
# The flat ops


def _output(
    sample: Tensor,
    prediction: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(sample.shape, dtype=dtype, device=sample.device)


_clean = registration.define(
    "clean_latents(Tensor sample, Tensor prediction, Tensor alpha, Tensor sigma, Tensor? scale, "
    "Tensor? shift, int kind, ScalarType dtype) -> Tensor",
    _output,
)


def _fake_backward(
    grad: Tensor,
    sample: Tensor,
    prediction: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    scale: Tensor | None,
    kind: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    return [
        dense_like(one, len(one)) if needed else grad.new_empty(0)
        for one, needed in zip((sample, prediction), needs, strict=True)
    ]


# The gradients to sample and prediction; empty where not needed.
_backward = registration.define(
    "clean_latents_backward(Tensor grad, Tensor sample, Tensor prediction, Tensor alpha, "
    "Tensor sigma, Tensor? scale, int kind, bool[] needs) -> Tensor[]",
    _fake_backward,
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, _, ctx.kind, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    needs = list(ctx.needs_input_grad[:2])
    needs[0] = needs[0] and PREDICTION_TYPES[ctx.kind] != "sample"
    parts = _backward(grad, *ctx.saved_tensors, ctx.kind, needs)
    found = [part if needed else None for part, needed in zip(parts, needs, strict=True)]
    return (*found, *(None,) * 6)


registration.gradient(_clean, _differentiate, _save)
registration.once_differentiable(_backward, "clean_latents")


# ---------------------------------------------------------------------------------------------
# Plain PyTorch


def _wide(*tensors: Tensor) -> torch.dtype:
    if any(one.dtype == torch.float64 for one in tensors):
        return torch.float64
    return wide_of(tensors[0].dtype)


def _beside(numbers: Tensor | None, like: Tensor, axis: int) -> Tensor | None:
    """Along an axis of ``like``, in its dtype."""
    if numbers is None:
        return None
    return numbers.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1 - axis))


@backends.register("clean_latents", "reference")
def _clean_plain(*args: Any) -> Tensor:
    sample, prediction, alpha, sigma, scale, shift, kind, _ = args
    wide = _wide(sample, prediction)
    sample, prediction = sample.to(wide), prediction.to(wide)
    levels = [_beside(one, sample, 0) for one in (alpha, sigma)]
    channels = [_beside(one, sample, 1) for one in (scale, shift)]
    found = reference(sample, prediction, *levels, *channels, PREDICTION_TYPES[kind])
    return _output(*args).copy_(found)


@backends.register("clean_latents_backward", "reference")
def _backward_plain(*args: Any) -> list[Tensor]:
    grad, sample, prediction, alpha, sigma, scale, kind, needs = args
    wide = grad.to(_wide(sample, prediction, grad))
    a, s = (_beside(one, wide, 0) for one in (alpha, sigma))
    of_clean = wide if scale is None else _beside(scale, wide, 1) * wide
    if kind == 0:
        of_clean = of_clean / a
    to_sample = of_clean if kind == 0 else a * of_clean
    to_prediction = of_clean if kind == 2 else -s * of_clean
    return [
        out.copy_(found) if needed else out
        for out, found, needed in zip(
            _fake_backward(*args), (to_sample, to_prediction), needs, strict=True
        )
    ]


# ---------------------------------------------------------------------------------------------
# Triton


def _places(*tensors: Tensor | None) -> tuple[tuple[int, ...], ...]:
    """How samples lie in the tensors, going through channel after channel."""
    shape = next(one.shape for one in tensors if one is not None)
    return joint([*tensors, torch.empty(shape, device="meta")])


def _refuses(*args: Any) -> str | None:
    from sdcore.triton_kernels import samples

    if args[7] == torch.float64:
        return "it gives no float64"
    return samples.refuses(*args[:2])


def _refuses_backward(*args: Any) -> str | None:
    from sdcore.triton_kernels import samples

    return samples.refuses(*args[:3])


@backends.register("clean_latents", "triton", _refuses)
def _clean_triton(*args: Any) -> Tensor:
    from sdcore.triton_kernels import clean_latents as kernels

    sample, prediction, *numbers, kind, _ = args
    out = _output(*args)
    kernels.clean(sample, prediction, out, *numbers, kind, _places(sample, prediction, out))
    return out


@backends.register("clean_latents_backward", "triton", _refuses_backward)
def _backward_triton(*args: Any) -> list[Tensor]:
    from sdcore.triton_kernels import clean_latents as kernels

    grad, _, _, *numbers, kind, needs = args
    found = _fake_backward(*args)
    wanted = [one if needed else None for one, needed in zip(found, needs, strict=True)]
    kernels.backward(grad, *wanted, *numbers, kind, _places(grad, *wanted))
    return found
