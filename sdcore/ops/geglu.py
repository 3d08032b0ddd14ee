"""A gated linear unit with GELU, as the feed-forwards of UNets have it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdcore import backends
from sdcore.ops import registration
from sdcore.ops.dtypes import DTYPES, wide_of


def geglu(x: Tensor) -> Tensor:
    r"""The first half of each row times GELU of the second, in one launch.

    .. math:: y = v \cdot g \, \Phi(g), \qquad (v, g) = x, \qquad
        \Phi(g) = \frac{1 + \operatorname{erf}(g / \sqrt 2)}{2}

    Args:
        x: [..., 2n] float16, bfloat16, float32 or float64, both halves of a row side by side. Rows
            whose leading axes make no more than two steps in memory are read as they lie; what lies
            otherwise, and rows with gaps in them, are copied.

    Returns:
        y, [..., n], of x's dtype, contiguous; under autocast, too.

    Arithmetic is in float32, in float64 for float64, and y is rounded once. GELU is the exact one,
    as in Diffusers' ``GEGLU``, and not its approximation by tanh.

    Gradient:
        To x, in one launch, from x alone, of which nothing is computed before. A second derivative
        raises.

    Cost: each value is read once, and written once. Plain PyTorch takes over for float64 on a GPU.
    Results repeat bit for bit.

    Raises:
        TypeError: x is no tensor.
        ValueError: it has no axes, another dtype, or a last axis of an odd size.
        RuntimeError: a second derivative was asked for.

    Source: Shazeer, *GLU Variants Improve Transformer*, 2020, arXiv:2002.05202, and Hendrycks,
    Gimpel, 2016, arXiv:1606.08415.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}")
    if x.ndim == 0:
        raise ValueError("x must be [..., 2n]; got a tensor without axes")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be of float16, bfloat16, float32 or float64; got {x.dtype}")
    if x.shape[-1] % 2:
        raise ValueError(f"x must be [..., 2n], of an even last size; got {list(x.shape)}")
    return _geglu(x)


def reference(x: Tensor) -> Tensor:
    """The specification, differentiable by autograd."""
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


# ---------------------------------------------------------------------------------------------
# The flat ops


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


_geglu = registration.define("geglu(Tensor x) -> Tensor", _fake)


def _fake_backward(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_backward = registration.define("geglu_backward(Tensor grad, Tensor x) -> Tensor", _fake_backward)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Tensor:
    return _backward(grad, *ctx.saved_tensors)


registration.gradient(_geglu, _differentiate, _save)
registration.once_differentiable(_backward, "geglu")


# ---------------------------------------------------------------------------------------------
# Plain PyTorch


@backends.register("geglu", "reference")
def _plain(x: Tensor) -> Tensor:
    return reference(x.to(wide_of(x.dtype))).to(x.dtype).contiguous()


@backends.register("geglu_backward", "reference")
def _plain_backward(grad: Tensor, x: Tensor) -> Tensor:
    wide = wide_of(x.dtype)
    of_out, (value, gate) = grad.to(wide), x.to(wide).chunk(2, -1)
    found = _fake_backward(grad, x)
    to_value, to_gate = found.chunk(2, -1)
    to_value.copy_(of_out * F.gelu(gate))
    to_gate.copy_(torch.ops.aten.gelu_backward(of_out * value, gate))
    return found


# ---------------------------------------------------------------------------------------------
# Triton


def _refuses(*args: Any) -> str | None:
    from sdcore.triton_kernels import geglu as kernels

    return kernels.refuses(args[0])


@backends.register("geglu", "triton", _refuses)
def _triton(x: Tensor) -> Tensor:
    from sdcore.triton_kernels import geglu as kernels

    out = _fake(x)
    kernels.forward(x, out)
    return out


@backends.register("geglu_backward", "triton", _refuses)
def _backward_triton(grad: Tensor, x: Tensor) -> Tensor:
    from sdcore.triton_kernels import geglu as kernels

    out = _fake_backward(grad, x)
    kernels.backward(grad, x, out)
    return out
