"""Cross-attention in which each pixel attends to the tokens that its mask lets it see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdcore import backends
from sdcore.masks import GateMask, Mask, RegionMask, TokenBits, opened, packed, unpacked
from sdcore.ops import registration
from sdcore.ops.dtypes import DTYPES, wide_of

MOST_COORDINATES = 256
CLAMP = 20.0  # of S - lse, where a gate is closed
PENALTY = 1e4  # of a closed gate, as the published code has it


def masked_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    scale: float | None = None,
    segments: Sequence[tuple[int, int]] | None = None,
    segment_weights: Tensor | None = None,
    return_token_probs: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention to a text's tokens, restricted by a mask that costs next to nothing.

    .. math::
        O_n = \sum_s w_{sn} \sum_{t \in s} P^s_{nt} V_t, \quad
        P^s_{nt} = \frac{G_{nt} \exp(S_{nt})}{\sum_{u \in s} G_{nu} \exp(S_{nu})}, \quad
        S_{nt} = \text{scale} \cdot Q_n \cdot K_t + \text{bias}_{nt}

    with G 1 where the mask lets pixel n attend to token t, and 0 elsewhere. Without ``segments``
    there is one, of all tokens, with weight 1.

    Args:
        q: [B, H, N, D], float16, bfloat16, float32 or float64, D up to 256.
        k: [B, H, T, D], of the same dtype. Its batch may also divide B: each row then serves as
            many consecutive rows of q, as pictures of one prompt lie in Diffusers.
        v: [B, H, T, DV], with the batch of k, DV up to 256. Views such as ``view`` and
            ``transpose`` give are taken as they are, while the last axis has stride 1.
        mask: None; a :class:`sdcore.masks.TokenBits`, :class:`~sdcore.masks.RegionMask` or
            :class:`~sdcore.masks.GateMask`, the same for all heads; or a tensor that is added to
            the scores, broadcastable to [B, H, N, T]. -inf closes. Batches of masks are B or 1.
        scale: default :math:`1/\sqrt D`.
        segments: ranges of tokens ``(start, end)``, each with a softmax of its own; tokens in none
            are not attended to. Attention Couple, regional prompts and IP-Adapter add up so.
        segment_weights: [B or 1, S, N], for S segments; default 1.
        return_token_probs: tokens, of which the probabilities P come back as well, the mean of the
            heads, each within its segment and not weighted: [B, N, number of tokens]. This costs
            another attention, of as many values.

    Returns:
        [B, H, N, DV], in memory as [B, N, H, DV], so that ``transpose(1, 2).flatten(2)`` is a view.
        With ``return_token_probs``, also the probabilities, of the dtype of q.

    A row that may attend to nothing, in a segment or altogether, gets zeros there. (PyTorch's
    ``scaled_dot_product_attention`` gives NaN on some of its paths.) NaN in a row of q stays in
    that row.

    Gradient:
        To q, k, v, an added mask, the ``segment_weights`` and a gate's phi, psi and bias (how, is
        said there), also through the probabilities. What needs none is not computed. A second
        derivative raises.

    Cost: O(B H N T D). On a GPU up to 320 tokens: nothing of [..., N, T] is ever in memory, but an
    added mask and its gradient; repeatable bit for bit on one machine. More tokens, float64, what a
    chip's shared memory has no room for, by a generous estimate, and other devices take plain
    PyTorch, which holds [B, H, N, T] or, on a CPU, [B, 1, N, T]. With 77 tokens of float16 or
    bfloat16 there is room for heads of 64 in 99 KB, of 128 in 163 KB and of 256 in 227 KB; of
    float32 for heads of 64 in 227 KB.

    Under autocast q, k, v and the gate's features are cast as PyTorch casts its own attention's.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, dtypes or devices that do not fit; the message names the argument.
        RuntimeError: a second derivative was asked for.

    Source of the gate: Chang, Chen, Cheng, Bogdan, *MaskAttn-SDXL*, 2025, arXiv:2509.15357.
    """
    q, k, v, mask = _autocast(q, k, v, mask)
    _check_tensors(q, k, v)
    _check_mask(mask, q, k)
    _check_weights(segments, segment_weights, q)
    count = k.shape[2]
    if segments is None:
        segments = [(0, count)]
    flat = _check_segments(segments, count)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    stated = _stated(mask, q, count)
    ste = mask.ste if isinstance(mask, GateMask) else ""
    out = _attention(q, k, v, *stated, segment_weights, scale, flat, ste)[0]
    if return_token_probs is None:
        return out
    chosen = _one_hot(_check_tokens(return_token_probs, count), q, k)
    return out, _attention(q, k, chosen, *stated, None, scale, flat, ste)[0].mean(1)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    scale: float | None = None,
    segments: Sequence[tuple[int, int]] | None = None,
    segment_weights: Tensor | None = None,
) -> Tensor:
    """The specification, differentiable by autograd."""
    k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    gates = torch.ones_like(scores)
    if isinstance(mask, Tensor):
        gates, scores = gates.masked_fill(mask == -math.inf, 0), scores + mask
    elif isinstance(mask, GateMask):
        z = mask.logits()
        p = z.sigmoid()
        gates = opened(z) + p - p.detach()
        gates = gates[:, None].to(scores.dtype)
        if mask.ste == "additive":
            scores = scores - PENALTY * (gates.detach() - gates)
            gates = gates.detach()
    elif mask is not None:
        gates = mask.dense(k.shape[2])[:, None].to(scores.dtype)
    out = torch.zeros(())
    for number, (start, end) in enumerate(segments or [(0, k.shape[2])]):
        s, g = (part.expand_as(scores)[..., start:end] for part in (scores, gates))
        closed = g < 0.5
        lse = s.masked_fill(closed, -math.inf).detach().logsumexp(-1, keepdim=True)
        lse = torch.where(lse == -math.inf, math.inf, lse)  # nothing to attend to
        # Where gates are closed, as it would be with them open, and bounded.
        powers = (s - lse).clamp(max=CLAMP).exp()
        total = (g * powers).sum(-1, keepdim=True)
        part = g * powers / torch.where(total == 0, 1, total) @ v[..., start:end, :]
        if segment_weights is not None:
            part = segment_weights[:, number, None, :, None].to(part.dtype) * part
        out = out + part
    return out


# ---------------------------------------------------------------------------------------------
# Arguments


def _autocast(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Mask | Tensor | None]:
    if isinstance(mask, GateMask):
        phi, psi = registration.autocast(mask.phi), registration.autocast(mask.psi)
        if phi is not mask.phi or psi is not mask.psi:
            mask = GateMask(phi, psi, mask.bias, mask.ste)
    return *(registration.autocast(one) for one in (q, k, v)), mask


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, given in (("q", q), ("k", k), ("v", v)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(given).__name__}")
        if given.ndim != 4:
            raise ValueError(
                f"{name} must have four axes, [batch, heads, rows, width]; got {list(given.shape)}"
            )
        if given.dtype not in DTYPES or given.dtype != q.dtype:
            raise ValueError(
                f"{name} must have one dtype with q, float16, bfloat16, float32 or float64; "
                f"got {given.dtype}" + ("" if name == "q" else f", and q {q.dtype}")
            )
        if given.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}; got {given.device}")
        if not 1 <= given.shape[-1] <= MOST_COORDINATES:
            raise ValueError(
                f"{name} must have 1 to {MOST_COORDINATES} coordinates; got {given.shape[-1]}"
            )
    if k.shape[:3] != v.shape[:3] or k.shape[2] < 1:
        raise ValueError(
            "k and v must have one batch, one number of heads and one of tokens, at least 1; got "
            f"{list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[1] != q.shape[1] or k.shape[3] != q.shape[3]:
        raise ValueError(
            "k must have as many heads and coordinates as q; got "
            f"{list(k.shape)} where q is {list(q.shape)}"
        )
    if len(q) % max(1, len(k)) or (len(k) == 0) != (len(q) == 0):
        raise ValueError(f"the batch of k and v must divide that of q; got {len(k)} and {len(q)}")


def _check_mask(mask: Any, q: Tensor, k: Tensor) -> None:
    batch, heads, n, _ = q.shape
    count = k.shape[2]
    if mask is None:
        return
    if isinstance(mask, Tensor):
        if mask.dtype == torch.bool:
            raise TypeError(
                "a mask of bool is given as TokenBits.from_bool(mask), [B, N, T]; a plain tensor "
                "is added to the scores"
            )
        if not mask.is_floating_point():
            raise TypeError(f"a tensor that is added must hold floats; got {mask.dtype}")
        wanted = (batch, heads, n, count)
        fits = mask.ndim <= 4 and all(
            size in (1, full) for size, full in zip(mask.shape[::-1], wanted[::-1], strict=False)
        )
        if not fits:
            raise ValueError(
                f"mask must be broadcastable to {list(wanted)}; got {list(mask.shape)}"
            )
        parts = {"mask": (mask, None, ())}
    elif isinstance(mask, TokenBits):
        parts = {"mask.words": (mask.words, n, (-(-count // 32),))}
    elif isinstance(mask, RegionMask):
        parts = {"mask.pixels": (mask.pixels, n, ()), "mask.tokens": (mask.tokens, count, ())}
    elif isinstance(mask, GateMask):
        parts = {"mask.phi": (mask.phi, n, ()), "mask.psi": (mask.psi, count, ())}
        if mask.phi.dtype != q.dtype:
            raise ValueError(f"mask.phi must have the dtype of q, {q.dtype}; got {mask.phi.dtype}")
        if mask.bias is not None and mask.bias.device != q.device:
            raise ValueError(f"mask.bias must be on {q.device}; got {mask.bias.device}")
    else:
        raise TypeError(
            "mask must be TokenBits, RegionMask, GateMask, a tensor or None; "
            f"got {type(mask).__name__}"
        )
    for name, (given, rows, rest) in parts.items():
        if given.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}; got {given.device}")
        if rows is None:
            continue
        fits = len(given) in (1, batch) and given.shape[1] == rows
        if not fits or (rest and given.shape[2:] != rest):
            wanted = ", ".join(map(str, (f"{batch} or 1", rows, *rest)))
            raise ValueError(f"{name} must be [{wanted}, …]; got {list(given.shape)}")


def _check_weights(segments: Any, weights: Tensor | None, q: Tensor) -> None:
    if weights is None:
        return
    if segments is None:
        raise ValueError("segment_weights are for segments, and none are given")
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError("segment_weights must be a tensor of floats")
    batch, _, n, _ = q.shape
    wanted = (len(segments), n)
    if weights.ndim != 3 or weights.shape[1:] != wanted or len(weights) not in (1, batch):
        raise ValueError(
            f"segment_weights must be [{batch} or 1, {wanted[0]}, {n}]; got {list(weights.shape)}"
        )
    if weights.device != q.device:
        raise ValueError(f"segment_weights must be on {q.device}; got {weights.device}")


def _check_segments(segments: Sequence[tuple[int, int]], count: int) -> list[int]:
    flat: list[int] = []
    for one in segments:
        start, end = one
        if not 0 <= start < end <= count:
            raise ValueError(
                f"segments must be ranges (start, end) within the {count} tokens; got {tuple(one)}"
            )
        flat += (int(start), int(end))
    if not flat:
        raise ValueError("segments must be one range of tokens at least; got none")
    return flat


def _check_tokens(tokens: Sequence[int], count: int) -> list[int]:
    found = [int(token) for token in tokens]
    if not 1 <= len(found) <= MOST_COORDINATES or any(not 0 <= one < count for one in found):
        raise ValueError(
            f"return_token_probs must be 1 to {MOST_COORDINATES} tokens from 0 to {count - 1}; "
            f"got {found}"
        )
    return found


def _one_hot(tokens: list[int], q: Tensor, k: Tensor) -> Tensor:
    """[batch of k, H, T, tokens]: values with which attention gives probabilities."""
    every = torch.arange(k.shape[2], device=q.device)
    columns = torch.stack([every == one for one in tokens], 1).to(q.dtype)
    return columns.expand(len(k), k.shape[1], -1, -1)


def _stated(mask: Mask | Tensor | None, q: Tensor, count: int) -> list[Tensor | None]:
    """bits, pixels, tokens, phi, psi, gate_bias and bias: what the mask is stated by."""
    found: list[Tensor | None] = [None] * 7
    if isinstance(mask, TokenBits):
        found[0] = mask.words
    elif isinstance(mask, RegionMask):
        found[1:3] = mask.pixels, mask.tokens
    elif isinstance(mask, GateMask):
        found[3:6] = mask.phi, mask.psi, mask.bias
    elif mask is not None:
        found[6] = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return found


# ---------------------------------------------------------------------------------------------
# The flat ops


def _output(like: Tensor, batch: int, heads: int, n: int, width: int) -> Tensor:
    """[B, H, N, D], in memory as [B, N, H, D]."""
    return like.new_empty(batch, n, heads, width).transpose(1, 2)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, heads, n, _ = q.shape
    gated = args[3] is not None
    words = (batch, n, -(-k.shape[2] // 32)) if gated else (0,)
    return (
        _output(q, batch, heads, n, v.shape[3]),
        q.new_empty(words, dtype=torch.int32),
    )


# Returns the output; and the bits [B, N, ceil(T / 32)] of the gates that were open, if there are.
_attention = registration.define(
    "masked_cross_attention(Tensor q, Tensor k, Tensor v, Tensor? bits, Tensor? pixels, "
    "Tensor? tokens, Tensor? phi, Tensor? psi, Tensor? gate_bias, Tensor? bias, Tensor? weights, "
    "float scale, int[] segments, str ste) -> (Tensor, Tensor)",
    _fake_attention,
)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    found = [
        _output(one, one.shape[0], one.shape[1], one.shape[2], one.shape[3])
        if needed
        else one.new_empty(0)
        for one, needed in zip((q, k, v), args[-3:], strict=True)
    ]
    return found[0], found[1], found[2]


# The gradients to q, k and v; empty where not needed. A gate comes as the bits that were open.
_backward = registration.define(
    "masked_cross_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bits, "
    "Tensor? pixels, Tensor? tokens, Tensor? bias, Tensor? weights, float scale, int[] segments, "
    "bool need_q, bool need_k, bool need_v) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _fake_scores_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (phi, psi, gate_bias, bias, weights), needs = args[3:8], args[-3:]

    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed:
            return q.new_empty(0)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    gate = [like(one, needs[0]) for one in (phi, psi, gate_bias)]
    return gate[0], gate[1], gate[2], like(bias, needs[1]), like(weights, needs[2])


# The gradients to phi, psi, the gate's bias, the bias and the weights; empty where not needed.
_scores_backward = registration.define(
    "masked_cross_attention_scores_backward(Tensor grad, Tensor q, Tensor k, Tensor v, "
    "Tensor? bits, Tensor? pixels, Tensor? tokens, Tensor? phi, Tensor? psi, Tensor? gate_bias, "
    "Tensor? bias, Tensor? weights, float scale, int[] segments, bool multiplicative, "
    "bool need_gate, bool need_bias, bool need_weights) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_scores_backward,
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale, ctx.segments, ctx.ste = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> Any:
    q, k, v, bits, pixels, tokens, phi, psi, gate_bias, bias, weights, gates = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if phi is not None:
        bits = gates
    found: list[Tensor | None] = [None] * 14
    if any(needs[:3]):
        parts = _backward(
            grad, q, k, v, bits, pixels, tokens, bias, weights, ctx.scale, ctx.segments, *needs[:3]
        )
        found[:3] = [part if needed else None for part, needed in zip(parts, needs, strict=False)]
    need_gate = any(needs[6:9])
    if need_gate or needs[9] or needs[10]:
        parts = _scores_backward(
            grad, q, k, v, bits, pixels, tokens, phi, psi, gate_bias, bias, weights, ctx.scale,
            ctx.segments, ctx.ste == "multiplicative", need_gate, needs[9], needs[10],
        )  # fmt: skip
        found[6:11] = [
            part if needed else None for part, needed in zip(parts, needs[6:11], strict=True)
        ]
    return tuple(found)


registration.gradient(_attention, _differentiate, _save)
registration.once_differentiable(_backward, "masked_cross_attention")
registration.once_differentiable(_scores_backward, "masked_cross_attention")


# ---------------------------------------------------------------------------------------------
# Plain PyTorch


def _laid_out(tensor: Tensor) -> Tensor:
    """As ``_output`` lies in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _shared(tensor: Tensor, batch: int) -> Tensor:
    """One row for each row of q."""
    if len(tensor) == batch:
        return tensor
    return tensor.repeat_interleave(batch // len(tensor), 0)


def _unshared(gradient: Tensor, like: Tensor) -> Tensor:
    """Added up over the rows of q that one row served."""
    return gradient.unflatten(0, (len(like), -1)).sum(1) if len(like) else gradient


def _dense(
    count: int, bits: Tensor | None, pixels: Tensor | None, tokens: Tensor | None
) -> Tensor | None:
    """[B or 1, 1, N, T], bool; None where all is open."""
    if bits is not None:
        return unpacked(bits, count)[:, None]
    if pixels is not None and tokens is not None:
        return RegionMask(pixels, tokens).dense(count)[:, None]
    return None


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.mT).to(wide_of(q.dtype)) * scale
    return scores if bias is None else scores + bias.to(scores.dtype)


def _softmax(scores: Tensor, may_attend: Tensor | None) -> Tensor:
    """Zeros in a row that may attend to nothing."""
    if may_attend is not None:
        scores = scores.masked_fill(~may_attend, -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


def _pairs(segments: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(segments[::2], segments[1::2], strict=True))


def _of(tensor: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if tensor is None else tensor[..., start:end]


def _weight(weights: Tensor | None, number: int, dtype: torch.dtype) -> Tensor | float:
    return 1.0 if weights is None else weights[:, number, None, :, None].to(dtype)


def _fast(q: Tensor, v: Tensor, weights: Tensor | None, segments: Sequence[int], n: int) -> bool:
    """Whether PyTorch's own attention for CPUs, several times faster, computes the same."""
    whole = weights is None and list(segments) == [0, n]
    return q.device.type == "cpu" and whole and q.shape[3] == v.shape[3] and q.numel() > 0


def _fast_attention(
    q: Tensor, k: Tensor, v: Tensor, may_attend: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output, log-sum-exp, what was added, and the rows that may attend to nothing. Those attend to
    everything there, and what they give is to be dropped."""
    q, k, v = (one if one.stride(-1) == 1 else one.contiguous() for one in (q, k, v))
    added, empty = bias, None
    if may_attend is not None:
        empty = ~may_attend.any(-1, keepdim=True)
        added = torch.zeros(may_attend.shape, dtype=q.dtype).masked_fill_(
            ~(may_attend | empty), -math.inf
        )
    elif bias is not None:
        empty = (bias == -math.inf).all(-1, keepdim=True)
        added = bias.to(q.dtype).masked_fill(empty, 0)
    if added is not None:
        added = added.expand(*q.shape[:3], k.shape[2])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=added, scale=scale
    )
    return out, lse, added, empty


def _fast_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    may_attend: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, added, empty = _fast_attention(q, k, v, may_attend, bias, scale)
    if empty is not None:
        grad = grad.masked_fill(empty, 0)
    grad, q, k, v = (one if one.stride(-1) == 1 else one.contiguous() for one in (grad, q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, attn_mask=added, scale=scale
    )


@backends.register("masked_cross_attention", "reference")
def _attention_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor | None,
    pixels: Tensor | None,
    tokens: Tensor | None,
    phi: Tensor | None,
    psi: Tensor | None,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    scale: float,
    segments: Sequence[int],
    ste: str,
) -> tuple[Tensor, Tensor]:
    count, batch = k.shape[2], len(q)
    gates = q.new_empty(0, dtype=torch.int32)
    if phi is not None and psi is not None:
        may_attend = GateMask(phi, psi, gate_bias).dense(count).expand(batch, -1, -1)
        gates = packed(may_attend)
        may_attend = may_attend[:, None]
    else:
        may_attend = _dense(count, bits, pixels, tokens)
    if _fast(q, v, weights, segments, count):
        keys, values = _shared(k, batch), _shared(v, batch)
        out, _, _, empty = _fast_attention(q, keys, values, may_attend, bias, scale)
        return _laid_out(out if empty is None else out.masked_fill(empty, 0)), gates
    scores = _scores(q, _shared(k, batch), bias, scale)
    total = torch.zeros_like(scores)
    for number, (start, end) in enumerate(_pairs(segments)):
        p = _softmax(scores[..., start:end], _of(may_attend, start, end))
        total[..., start:end] += p * _weight(weights, number, p.dtype)
    return _laid_out(total.to(q.dtype) @ _shared(v, batch)), gates


@backends.register("masked_cross_attention_backward", "reference")
def _backward_plain(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor | None,
    pixels: Tensor | None,
    tokens: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    scale: float,
    segments: Sequence[int],
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = _shared(k, len(q)), _shared(v, len(q))
    may_attend = _dense(k.shape[2], bits, pixels, tokens)
    none = q.new_empty(0)
    if _fast(q, v, weights, segments, k.shape[2]):
        dq, dk, dv = _fast_backward(grad, q, keys, values, may_attend, bias, scale)
        return (
            _laid_out(dq) if need_q else none,
            _laid_out(_unshared(dk, k)) if need_k else none,
            _laid_out(_unshared(dv, v)) if need_v else none,
        )
    scores = _scores(q, keys, bias, scale)
    outer = (grad @ values.mT).to(scores.dtype)
    total, slope = torch.zeros_like(scores), torch.zeros_like(scores)
    for number, (start, end) in enumerate(_pairs(segments)):
        p = _softmax(scores[..., start:end], _of(may_attend, start, end))
        weighted = p * _weight(weights, number, p.dtype)
        g = outer[..., start:end]
        total[..., start:end] += weighted
        slope[..., start:end] += weighted * (g - (p * g).sum(-1, keepdim=True))
    total, slope = total.to(q.dtype), slope.to(q.dtype)
    return (
        _laid_out(slope @ keys * scale) if need_q else none,
        _laid_out(_unshared(slope.mT @ q * scale, k)) if need_k else none,
        _laid_out(_unshared(total.mT @ grad, v)) if need_v else none,
    )


@backends.register("masked_cross_attention_scores_backward", "reference")
def _scores_backward_plain(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor | None,
    pixels: Tensor | None,
    tokens: Tensor | None,
    phi: Tensor | None,
    psi: Tensor | None,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    scale: float,
    segments: Sequence[int],
    multiplicative: bool,
    need_gate: bool,
    need_bias: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    may_attend = _dense(k.shape[2], bits, pixels, tokens)
    scores = _scores(q, _shared(k, len(q)), bias, scale)
    outer = (grad @ _shared(v, len(q)).mT).to(scores.dtype)
    slope, means = torch.zeros_like(scores), []
    for number, (start, end) in enumerate(_pairs(segments)):
        s, g = scores[..., start:end], outer[..., start:end]
        may = _of(may_attend, start, end)
        p = _softmax(s, may)
        mean = (p * g).sum(-1, keepdim=True)
        if need_gate and multiplicative:
            p = _bounded_powers(s, may)
        slope[..., start:end] += p * (g - mean) * _weight(weights, number, p.dtype)
        means.append(mean[..., 0].sum(1))
    none = q.new_empty(0)
    gate = (none, none, none)
    if need_gate and phi is not None and psi is not None:
        gate = _through_gate(slope.sum(1), phi, psi, gate_bias, multiplicative)
    return (
        *gate,
        _reduced(slope, bias) if need_bias else none,
        _reduced(torch.stack(means, 1), weights) if need_weights else none,
    )


def _bounded_powers(scores: Tensor, may_attend: Tensor | None) -> Tensor:
    """exp(S - lse), also where gates are closed; zeros where none is open."""
    inside = scores if may_attend is None else scores.masked_fill(~may_attend, -math.inf)
    lse = inside.logsumexp(-1, keepdim=True)
    return (scores - torch.where(lse == -math.inf, math.inf, lse)).clamp(max=CLAMP).exp()


def _through_gate(
    slope: Tensor, phi: Tensor, psi: Tensor, bias: Tensor | None, multiplicative: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to phi, psi and bias, by that to the gates (or to what is added for them)."""
    wide = slope.dtype
    p = GateMask(phi, psi, bias).logits().to(wide).sigmoid()
    slope = slope * p * (1 - p) * (1.0 if multiplicative else PENALTY)
    root = phi.shape[-1] ** -0.5
    return (
        _reduced(slope @ psi.to(wide) * root, phi),
        _reduced(slope.mT @ phi.to(wide) * root, psi),
        phi.new_empty(0) if bias is None else slope.sum().reshape(bias.shape).to(bias.dtype),
    )


def _reduced(gradient: Tensor, like: Tensor | None) -> Tensor:
    """Added up to the shape from which ``like`` was broadcast."""
    if like is None:
        return gradient.new_empty(0)
    return gradient.sum_to_size(like.shape).to(like.dtype).contiguous()


# ---------------------------------------------------------------------------------------------
# Triton


def _refuses(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> str | None:
    from sdcore.triton_kernels import masked_cross_attention as kernels

    return kernels.refuses(q, k.shape[2], v.shape[3])


def _refuses_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> str | None:
    return _refuses(q, k, v)


@backends.register("masked_cross_attention", "triton", _refuses)
def _attention_triton(*args: Any) -> tuple[Tensor, Tensor]:
    from sdcore.triton_kernels import masked_cross_attention as kernels

    return kernels.forward(*args[:-1])  # forward, all kinds of gates are alike


@backends.register("masked_cross_attention_backward", "triton", _refuses_backward)
def _backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from sdcore.triton_kernels import masked_cross_attention as kernels

    return kernels.backward(*args)


@backends.register("masked_cross_attention_scores_backward", "triton", _refuses_backward)
def _scores_backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from sdcore.triton_kernels import masked_cross_attention as kernels

    phi, psi, gate_bias, bias, weights = args[7:12]
    need_gate, need_bias, need_weights = args[-3:]
    dphi, dpsi, dshift, dbias, dweights = kernels.scores_backward(*args)
    none = dphi.new_empty(0)
    return (
        _reduced(dphi, phi) if need_gate else none,
        _reduced(dpsi.sum(0), psi) if need_gate else none,
        none if not need_gate or gate_bias is None
        else dshift.sum().reshape(gate_bias.shape).to(gate_bias.dtype),
        _reduced(dbias, bias) if need_bias else none,
        _reduced(dweights.sum(1), weights) if need_weights else none,
    )  # fmt: skip
