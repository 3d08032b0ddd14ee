"""Attention of wide heads, as the decoders of latents have one: too wide for flash attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sdcore import backends
from sdcore.ops import registration
from sdcore.ops.dtypes import DTYPES, wide_of

# Probabilities in memory at a time, and to be kept for the gradient: 512 MB of a half type, what
# 16,384 tokens have.
MOST = 2**28


def wide_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    r"""Attention whose heads are too wide for the fused kernels: softmax of scaled products.

    .. math:: O = \operatorname{softmax}(s \, Q K^\top) \, V

    By plain products, of blocks of queries; the fused kernels of PyTorch hold a query, its output
    and their tiles in registers, for which heads of more than 256 leave no room.

    Args:
        q: Q, […, N, D] float16, bfloat16, float32 or float64, of any strides.
        k: K, […, T, D], with q's leading axes.
        v: V, […, T, E].
        scale: s; default :math:`D^{-1/2}`.

    Returns:
        [..., N, E], of q's dtype.

    Scores, their softmax and all sums are in float32 (float64 for float64); probabilities are
    rounded to q's dtype before they meet V.

    Gradient:
        To q, k and v. A second derivative raises.

    Cost: O(N · T · (D + E)) time. Memory beside inputs and outputs: probabilities, 2²⁸ at a time
    (or those of one query), and for the gradient as many gradients to scores; plain PyTorch has
    both in float32, too. For the gradient probabilities are kept where there are no more than that,
    and computed again where there are. Results repeat bit for bit.

    Under autocast q, k and v are cast as PyTorch casts its own attention's.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: shapes, dtypes or devices that do not fit; no tokens; the message names it.
        RuntimeError: a second derivative was asked for.
    """
    q, k, v = (registration.autocast(one) for one in (q, k, v))
    _check(q, k, v)
    leading, (n, d), e = q.shape[:-2], q.shape[-2:], v.shape[-1]
    batch = math.prod(leading)
    parts = [one.reshape(batch, *one.shape[-2:]) for one in (q, k, v)]
    factor = d**-0.5 if scale is None else float(scale)
    kept = (
        torch.is_grad_enabled()
        and any(one.requires_grad for one in parts)
        and batch * n * k.shape[-2] <= MOST
    )
    out, _ = _attention(*parts, factor, kept)
    return out.reshape(*leading, n, e)


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The specification, differentiable by autograd."""
    return (scale * q @ k.mT).softmax(-1) @ v


# ---------------------------------------------------------------------------------------------
# Arguments


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, one in (("q", q), ("k", k), ("v", v)):
        if not isinstance(one, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(one).__name__}")
        if one.ndim < 2:
            raise ValueError(f"{name} must be [..., tokens, width]; got {list(one.shape)}")
        if q.dtype not in DTYPES or one.dtype != q.dtype:
            wanted = "float16, bfloat16, float32 or float64" if name == "q" else f"q's {q.dtype}"
            raise ValueError(f"{name} must be of {wanted}; got {one.dtype}")
        if one.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}; got {one.device}")
    if k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must be [..., T, D] as q is {list(q.shape)}; got {list(k.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must be [..., T, E] as k is {list(k.shape)}; got {list(v.shape)}")
    if k.shape[-2] == 0 or q.shape[-1] == 0:
        raise ValueError(f"k must have tokens, and a width; got {list(k.shape)}")


# ---------------------------------------------------------------------------------------------
# The flat ops


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, kept: bool) -> tuple[Tensor, Tensor]:
    batch, n = q.shape[:2]
    kept_shape = (batch, n, k.shape[1]) if kept else (0,)
    return q.new_empty((batch, n, v.shape[2])), q.new_empty(kept_shape)


# The output; and the probabilities, if they are to be kept.
_attention = registration.define(
    "wide_attention(Tensor q, Tensor k, Tensor v, float scale, bool kept) -> (Tensor, Tensor)",
    _fake,
)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, p: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in (q, k, v))


_backward = registration.define(
    "wide_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor p, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Any) -> Any:
    if grad is None:
        return None, None, None, None, None
    return (*_backward(grad, *ctx.saved_tensors, ctx.scale), None, None)


registration.gradient(_attention, _differentiate, _save)
registration.once_differentiable(_backward, "wide_attention")


# ---------------------------------------------------------------------------------------------
# By blocks of queries. What is not a plain product is a function: ``probabilities(q, k, scale, p)``
# writes the softmax to p, and ``pulls(grad, v, p, off, scale)`` gives the gradient to the scores'
# products, where off [batch, n, 1] is the sum over all tokens of p times its gradient.


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Of queries, so that there are no more than MOST scores at once."""
    batch, n = q.shape[:2]
    rows = max(1, MOST // max(1, batch * k.shape[1]))
    rows = rows if rows >= n or rows < 128 else rows // 128 * 128
    for first in range(0, n, rows):
        yield slice(first, min(n, first + rows))


def _forward(
    probabilities: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, kept: bool
) -> tuple[Tensor, Tensor]:
    out, p = _fake(q, k, v, scale, kept)
    with torch.autocast(q.device.type, enabled=False):
        for rows in _blocks(q, k):
            block = q[:, rows]
            some = p[:, rows] if kept else q.new_empty((*block.shape[:2], k.shape[1]))
            probabilities(block, k, scale, some)
            torch.bmm(some, v, out=out[:, rows])
    return out, p


def _backward_of(
    probabilities: Any,
    pulls: Any,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    p: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    to_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    to_k = to_v = None
    wide, blocks = wide_of(q.dtype), list(_blocks(q, k))
    kind = q.dtype if len(blocks) == 1 else wide  # of the sums of several
    with torch.autocast(q.device.type, enabled=False):
        for rows in blocks:
            block, of_block = q[:, rows], grad[:, rows]
            some = p[:, rows] if p.numel() else q.new_empty((*block.shape[:2], k.shape[1]))
            if not p.numel():
                probabilities(block, k, scale, some)
            off = (of_block.to(wide) * out[:, rows].to(wide)).sum(-1, keepdim=True)
            to_v = _added(to_v, some, of_block, kind)
            scores = pulls(of_block, v, some, off, scale)
            torch.bmm(scores, k, out=to_q[:, rows])
            to_k = _added(to_k, scores, block, kind)
    if to_k is None or to_v is None:  # no queries
        return to_q, torch.zeros_like(k), torch.zeros_like(v)
    return to_q, to_k.to(k.dtype), to_v.to(v.dtype)


def _added(total: Tensor | None, scores: Tensor, values: Tensor, kind: torch.dtype) -> Tensor:
    """Plus scoresᵀ · values."""
    product = torch.bmm(scores.mT, values)
    return product.to(kind) if total is None else total.add_(product)


# ---------------------------------------------------------------------------------------------
# Plain PyTorch


def _plain_probabilities(q: Tensor, k: Tensor, scale: float, p: Tensor) -> None:
    wide = wide_of(q.dtype)
    p.copy_((scale * torch.bmm(q.to(wide), k.mT.to(wide))).softmax(-1))


def _plain_pulls(grad: Tensor, v: Tensor, p: Tensor, off: Tensor, scale: float) -> Tensor:
    of_p = torch.bmm(grad.to(off.dtype), v.mT.to(off.dtype))
    return (scale * p.to(off.dtype) * (of_p - off)).to(p.dtype)


@backends.register("wide_attention", "reference")
def _plain(*args: Any) -> tuple[Tensor, Tensor]:
    return _forward(_plain_probabilities, *args)


@backends.register("wide_attention_backward", "reference")
def _plain_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_of(_plain_probabilities, _plain_pulls, *args)


# ---------------------------------------------------------------------------------------------
# Triton


def _refuses(*args: Any) -> str | None:
    from sdcore.triton_kernels import wide_attention as kernels

    return kernels.refuses(args[0])


@backends.register("wide_attention", "triton", _refuses)
def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from sdcore.triton_kernels import wide_attention as kernels

    return _forward(kernels.probabilities, *args)


@backends.register("wide_attention_backward", "triton", _refuses)
def _triton_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from sdcore.triton_kernels import wide_attention as kernels

    return _backward_of(kernels.probabilities, kernels.pulls, *args)
