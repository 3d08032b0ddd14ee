"""Group normalization with SiLU, a shift before it and a residual, as ResNet blocks have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdcore import backends
from sdcore.ops import registration
from sdcore.ops.dtypes import DTYPES, wide_of
from sdcore.ops.pointers import address


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Group normalization, and SiLU of it.

    .. math::
        s = x + \delta + r, \qquad
        y = \operatorname{silu}\left(w \frac{s - \mu}{\sqrt{\sigma^2 + \epsilon}} + b\right), \qquad
        \operatorname{silu}(z) = \frac{z}{1 + e^{-z}}

    with the mean and the (biased) variance of each group of channels of each sample of s.

    Args:
        x: [B, C, …] float16, bfloat16, float32 or float64; contiguous, or channels last. What lies
            otherwise is copied.
        num_groups: into how many groups C is divided.
        weight: w, [C], of x's dtype or float32 (float64 with float64); default 1.
        bias: b, likewise; default 0.
        eps: :math:`\epsilon`.
        silu: without it y is what SiLU would be taken of.
        shift: :math:`\delta`, [B, C], likewise: what a ResNet block adds for the time, say, or the
            bias of a convolution before it.
        residual: r, as x: what a block before it adds to its result, say.

    Returns:
        y, of x's shape, dtype and memory format. With ``residual`` (y, s), where s is rounded once,
        to x's dtype, and y is that of what was rounded.

    Statistics and arithmetic are in float32, in float64 for float64: the mean, and then the squares
    about it, so that a mean of thousands of deviations costs no more digits than x's own. Without
    spatial extent, or without samples, y is empty.

    Gradient:
        To x, weight, bias, shift and residual, each skipped when not needed; y is computed again
        from x, of which nothing but the statistics are kept. A second derivative raises.

    Cost: on a GPU x is read twice and y written once; for the gradient to x both x and that to y
    are read twice. Results repeat bit for bit.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, dtypes or devices that do not fit, groups that do not divide C, one
            value alone for each group in all samples; the message names it.
        RuntimeError: a second derivative was asked for.

    Source: Wu, He, *Group Normalization*, 2018, arXiv:1803.08494; Elfwing, Uchibe, Doya, 2017,
    arXiv:1702.03118.
    """
    _check(x, num_groups, weight, bias, shift, residual)
    if not _channels_last(x):
        x = x.contiguous()
    if residual is not None:
        residual = _as(residual, x)
    vectors = [None if one is None else one.contiguous() for one in (weight, bias, shift)]
    out, total, _, _ = _group_norm(x, residual, *vectors, num_groups, float(eps), silu)
    return out if residual is None else (out, total)


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = True,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification: y and s, differentiable by autograd."""
    total = x if shift is None else x + shift.reshape(*shift.shape, *(1,) * (x.ndim - 2))
    total = total if residual is None else total + residual
    z = F.group_norm(total, num_groups, weight, bias, eps)
    return F.silu(z) if silu else z, total


# ---------------------------------------------------------------------------------------------
# Arguments


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
) -> None:
    named = {"x": x, "weight": weight, "bias": bias, "shift": shift, "residual": residual}
    for name, one in named.items():
        if not isinstance(one, Tensor) and (one is not None or name == "x"):
            raise TypeError(f"{name} must be a tensor; got {type(one).__name__}")
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"num_groups must be an int; got {num_groups!r}")
    if x.ndim < 2:
        raise ValueError(f"x must be [B, C, …]; got {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be of float16, bfloat16, float32 or float64; got {x.dtype}")
    batch, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide {channels} channels; got {num_groups}")
    if batch == 1 and x.numel() == num_groups:  # as PyTorch has it
        raise ValueError(
            "x must have more than one value for each group: of one alone the norm is zero; got "
            f"{list(x.shape)} in {num_groups} groups"
        )
    shapes = {
        "weight": (channels,), "bias": (channels,), "shift": (batch, channels),
        "residual": tuple(x.shape),
    }  # fmt: skip
    for name, shape in shapes.items():
        one = named[name]
        if one is None:
            continue
        if tuple(one.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}; got {list(one.shape)}")
        if one.device != x.device:
            raise ValueError(f"{name} must be on x's device, {x.device}; got {one.device}")
        allowed = {x.dtype} if name == "residual" else {x.dtype, wide_of(x.dtype)}
        if one.dtype not in allowed:
            raise ValueError(
                f"{name} must be of {' or '.join(sorted(map(str, allowed)))}; got {one.dtype}"
            )


def _channels_last(x: Tensor) -> bool:
    """Whether channels lie side by side, pixel by pixel. Without extent both layouts are one."""
    return x.ndim in (4, 5) and not x.is_contiguous() and x.is_contiguous(memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def _as(one: Tensor, x: Tensor) -> Tensor:
    """In x's memory format."""
    return one.contiguous(memory_format=_format_of(x))


def _format_of(x: Tensor) -> torch.memory_format:
    return _format(x) if _channels_last(x) else torch.contiguous_format


def _like(x: Tensor) -> Tensor:
    """With that format's own strides. Those of x may be others where an axis has one place, and
    PyTorch's convolutions then take it for contiguous."""
    return torch.empty_like(x, memory_format=_format_of(x))


# ---------------------------------------------------------------------------------------------
# The flat ops


def _statistics(x: Tensor, groups: int) -> Tensor:
    return x.new_empty((x.shape[0], groups), dtype=wide_of(x.dtype))


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else _like(x)
    return _like(x), total, _statistics(x, groups), _statistics(x, groups)


# y, s (empty without a residual), and of the groups [B, groups] the means, of what values are off
# the group's first one, and 1 / sqrt(variance + eps).
_group_norm = registration.define(
    "group_norm_silu(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? shift, "
    "int groups, float eps, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def _fake_backward(
    grad: Tensor,
    more: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    parts = (x, weight, bias, shift)
    return [
        _like(one) if one is not None and needed else x.new_empty(0)
        for one, needed in zip(parts, needs, strict=True)
    ]


# Gradients to x (and the residual), weight, bias and shift, empty where not needed. Where there was
# a residual, x is s, with the shift in it and none beside it, and more is the gradient to s.
_backward = registration.define(
    "group_norm_silu_backward(Tensor grad, Tensor? more, Tensor x, Tensor? weight, Tensor? bias, "
    "Tensor? shift, Tensor mean, Tensor rstd, int groups, bool silu, bool[] needs) -> Tensor[]",
    _fake_backward,
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, weight, bias, shift, groups, _, silu = inputs
    _, total, mean, rstd = output
    ctx.has_residual, ctx.others = residual is not None, (groups, silu)
    ctx.shift_dtype = None if shift is None else shift.dtype
    if residual is not None:
        x, shift = total, None
    ctx.save_for_backward(x, weight, bias, shift, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, more: Tensor | None, *_: Any) -> Any:
    x, weight, bias, shift, mean, rstd = ctx.saved_tensors
    to_x, to_residual, to_weight, to_bias, to_shift, *_ = ctx.needs_input_grad
    of_sum = to_x or to_residual or (to_shift and ctx.has_residual)
    if grad is None:  # only s was used
        found = [more if of_sum else None, None, None, None]
    else:
        more = None if more is None or not ctx.has_residual else _as(more, x)
        needs = [of_sum, to_weight, to_bias, to_shift and not ctx.has_residual]
        given = weight, bias, shift, mean, rstd, *ctx.others
        parts = _backward(_as(grad, x), more, x, *given, needs)
        found = [part if needed else None for part, needed in zip(parts, needs, strict=True)]
    to_all, *vectors = found
    if to_shift and ctx.has_residual and to_all is not None:
        pixels = tuple(range(2, x.ndim))
        sums = to_all.sum(pixels, dtype=wide_of(x.dtype)) if pixels else to_all
        vectors[2] = sums.to(ctx.shift_dtype)
    return (
        to_all if to_x else None, to_all if to_residual else None, *vectors, None, None, None,
    )  # fmt: skip


registration.gradient(_group_norm, _differentiate, _save)
registration.once_differentiable(_backward, "group_norm_silu")


# ---------------------------------------------------------------------------------------------
# Plain PyTorch


def _origin(x: Tensor, groups: int) -> Tensor:
    """The first value of each channel's group, [B, C, 1, …]."""
    width = x.shape[1] // groups
    first = x[:, ::width].reshape(len(x), groups, -1)[:, :, :1].to(wide_of(x.dtype))
    first = first.repeat_interleave(width, 1)
    return first.reshape(*x.shape[:2], *(1,) * (x.ndim - 2))


@backends.register("group_norm_silu", "reference")
def _plain(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual, weight, bias, shift, groups, eps, silu = args
    out, total, mean, rstd = _fake(*args)
    wide = wide_of(x.dtype)
    if shift is not None:
        shift = shift.to(wide).reshape(*shift.shape, *(1,) * (x.ndim - 2))
    if residual is not None:
        x = total.copy_(x.to(wide) + (0 if shift is None else shift) + residual.to(wide))
        shift = None
    if x.numel() == 0:
        return out, total, mean.zero_(), rstd.zero_()
    # Contiguous, since PyTorch's sums are of other digits for channels last.
    h = (x.to(wide) - _origin(x, groups)).contiguous()
    if shift is not None:
        h = h + shift
    batch, channels = x.shape[:2]
    vectors = [None if one is None else one.to(wide) for one in (weight, bias)]
    z, means, rstds = torch.ops.aten.native_group_norm(
        h, *vectors, batch, channels, h.numel() // (batch * channels), groups, eps
    )
    mean.copy_(means.reshape(mean.shape))
    rstd.copy_(rstds.reshape(rstd.shape))
    out.copy_(F.silu(z) if silu else z)
    return out, total, mean, rstd


@backends.register("group_norm_silu_backward", "reference")
def _plain_backward(*args: Any) -> list[Tensor]:
    grad, more, x, weight, bias, shift, mean, rstd, groups, silu, _ = args
    found = _fake_backward(*args)
    if x.numel() == 0:
        return [one.zero_() for one in found]
    wide = wide_of(x.dtype)
    batch, channels = x.shape[:2]

    def parted(whole: Tensor) -> Tensor:
        return whole.to(wide).reshape(batch, groups, channels // groups, -1)

    def vector(one: Tensor | None, default: float) -> Tensor:
        """[1 or B, groups, channels of a group, 1]"""
        if one is None:
            return grad.new_full((), default, dtype=wide)
        return one.to(wide).reshape(-1, groups, channels // groups, 1)

    w, b, d = vector(weight, 1), vector(bias, 0), vector(shift, 0)
    m, r = (one.reshape(batch, groups, 1, 1) for one in (mean, rstd))
    h = (parted(x) - parted(_origin(x, groups)) + d - m) * r
    dz = parted(grad)
    if silu:
        z = w * h + b
        s = z.sigmoid()
        dz = dz * s * (1 + z * (1 - s))
    to_h = w * dz
    dx = r * (to_h - to_h.mean((2, 3), keepdim=True) - h * (to_h * h).mean((2, 3), keepdim=True))
    values = [
        lambda: dx.reshape(x.shape) + (0 if more is None else more.to(wide)),
        lambda: (dz * h).sum((0, 3)).reshape(-1),
        lambda: dz.sum((0, 3)).reshape(-1),
        lambda: dx.sum(3).reshape(batch, channels),
    ]
    for one, value in zip(found, values, strict=True):
        if one.numel():
            one.copy_(value())
    return found


# ---------------------------------------------------------------------------------------------
# Triton


def _refuses(*args: Any) -> str | None:
    from sdcore.triton_kernels import group_norm_silu as kernels

    return kernels.refuses(args[0])


@backends.register("group_norm_silu", "triton", _refuses)
def _triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sdcore.triton_kernels import group_norm_silu as kernels

    found = _fake(*args)
    kernels.forward(*found, _channels_last(args[0]), *args)
    return found


@backends.register("group_norm_silu_backward", "triton", _refuses)
def _backward_triton(*args: Any) -> list[Tensor]:
    from sdcore.triton_kernels import group_norm_silu as kernels

    found = _fake_backward(*args)
    kernels.backward(found, _channels_last(args[2]), *args[:-1])
    return found


# ---------------------------------------------------------------------------------------------
# C++


def _described(
    x: Tensor, vectors: Sequence[Tensor | None], groups: int, eps: float, silu: bool, *whole: Any
) -> tuple[Any, ...]:
    """What both C++ functions are told; ``whole``: residual, total and out. Vectors, and groups'
    means and deviations, are doubles."""
    sizes = [*x.shape[:2], x.numel() // (x.shape[0] * x.shape[1]), groups]
    tensors = [address(one) for one in (x, *whole, *vectors)]
    name = str(x.dtype).removeprefix("torch.")
    return name, sizes, _channels_last(x), silu, eps, tensors, torch.get_num_threads()


def _doubles(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if one is None else one.double().contiguous() for one in vectors]


@backends.register("group_norm_silu", "cpp")
def _cpp(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual, weight, bias, shift, groups, eps, silu = args
    out, total, mean, rstd = _fake(*args)
    if x.numel() == 0:
        return out, total, mean.zero_(), rstd.zero_()
    found = [torch.empty_like(one, dtype=torch.float64) for one in (mean, rstd)]
    vectors = [*_doubles(weight, bias, shift), *found]
    whole = residual, None if residual is None else total, out
    backends.cpu_module().group_norm_silu(*_described(x, vectors, groups, eps, silu, *whole))
    return out, total, mean.copy_(found[0]), rstd.copy_(found[1])


@backends.register("group_norm_silu_backward", "cpp")
def _backward_cpp(*args: Any) -> list[Tensor]:
    grad, more, x, weight, bias, shift, mean, rstd, groups, silu, needs = args
    found = _fake_backward(*args)
    if x.numel() == 0:
        return [one.zero_() for one in found]
    vectors = _doubles(weight, bias, shift, mean, rstd)
    each = [
        x.new_empty(x.shape[:2], dtype=torch.float64) if one.numel() else None for one in found[1:]
    ]
    to_x = found[0] if needs[0] else None
    backends.cpu_module().group_norm_silu_backward(
        *_described(x, vectors, groups, 0.0, silu, None, None, None),
        [address(one) for one in (grad, more, to_x, *each)],
    )
    for one, of_samples in zip(found[1:], each, strict=True):
        if of_samples is not None:
            one.copy_(of_samples if one.ndim == 2 else of_samples.sum(0))
    return found
