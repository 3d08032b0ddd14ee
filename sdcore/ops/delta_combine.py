"""Delta Sampling's arithmetic: what two models differ by, added to a third one's prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdcore import backends
from sdcore.ops import registration
from sdcore.ops.dtypes import DTYPES, wide_of
from sdcore.ops.layouts import dense_like, joint
from sdcore.ops.pointers import address

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # as the flat op numbers them
OUTPUTS = ("prediction", "x0", "next")
NAMES = (
    "target", "target (unconditional)", "source", "source (unconditional)", "adapted",
    "adapted (unconditional)", "sample", "source_sample",
)  # fmt: skip

# A prediction of both branches in one tensor, or (unconditional, conditional).
Prediction = Tensor | tuple[Tensor | None, Tensor]


def delta_combine(
    target: Prediction,
    source: Prediction | None = None,
    adapted: Prediction | None = None,
    *,
    sample: Tensor | None = None,
    alpha: Tensor | float | None = None,
    sigma: Tensor | float | None = None,
    strength: Tensor | float = 1.0,
    prediction_type: str | Sequence[str] = "epsilon",
    scales: tuple[float, float] = (1.0, 1.0),
    source_sample: Tensor | None = None,
    guidance_scale: Tensor | float | None = None,
    guidance_rescale: float = 0.0,
    output: str = "prediction",
    next_alpha: Tensor | float | None = None,
    next_sigma: Tensor | float | None = None,
) -> Tensor:
    r"""Delta Sampling's combination, guidance and step, in one launch.

    With :math:`x_t = \alpha x_0 + \sigma \epsilon` and :math:`T_0, S_0, A_0` the clean latents that
    target, source and adapted model predict, each in its latent space of scale :math:`s`,

    .. math::
        T_0' = T_0 + \lambda \frac{s_T}{s_S} (A_0 - S_0), \qquad
        p = p_u + g \, (p_c - p_u), \qquad x' = \alpha' p_0 + \sigma' p_\epsilon

    for the conditional and the unconditional branch; :math:`p` is :math:`T'` in the target's own
    prediction type. The last is DDIM's step without noise, and Euler's where alpha is 1.

    Args:
        target: what the target predicts: [B, …] float16, bfloat16, float32 or float64; both
            branches as one tensor [2B, …], the unconditional one first, as pipelines have them, or
            as a pair (unconditional, conditional).
        source: what the source model predicts, likewise; of one branch if its pair has None for
            the unconditional one, which then gets no delta. Without source and adapted there is
            none anywhere.
        adapted: what the adapted model predicts, with the branches of ``source``.
        sample: :math:`x_t` of the target, [B, …]. Needed where prediction types differ or
            ``output`` is no prediction.
        alpha: share of the clean latents in ``sample``, a number or a tensor of one or B; so one
            CUDA graph serves all timesteps. alpha² + sigma² need not be 1: for a sample as Euler
            holds it, alpha is 1 and sigma is Euler's. Needed as ``sample`` is.
        sigma: share of the noise, likewise.
        strength: :math:`\lambda`, a number or a tensor of one or B.
        prediction_type: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``, of all or, as three, of
            target, source and adapted.
        scales: latent scales :math:`(s_T, s_S)`: the ``scaling_factor`` of the autoencoders of the
            target, and of source and adapted.
        source_sample: :math:`x_t` as source and adapted saw it, with the same alpha and sigma.
            It counts where these two predict different things; default ``sample``, if the scales
            are equal.
        guidance_scale: :math:`g` of classifier-free guidance, a number or a tensor of one or B.
            Without it, branches stay apart.
        guidance_rescale: :math:`\varphi` in [0, 1]: the guided prediction is scaled toward the
            standard deviation, over all but the batch, of the conditional one (Lin et al., 2023,
            arXiv:2305.08891, eq. 16), here of the combined ones. It takes a second launch.
        output: ``"prediction"``: :math:`p`, or without guidance :math:`T'` of each branch;
            ``"x0"``: :math:`p_0`; ``"next"``: :math:`x'`.
        next_alpha: :math:`\alpha'`, as ``alpha``, for ``output="next"``.
        next_sigma: :math:`\sigma'`.

    Returns:
        [B, …], or [2B, …] for two branches without guidance; a prediction of the dtype and
        memory format of ``target``, otherwise of ``sample``. Of any memory layout nothing is
        copied.

    Arithmetic is in float32 whatever the dtype, in float64 for float64. Where ``strength`` is 0,
    or source and adapted are alike, finite predictions leave the target's as it is, bit for bit.

    Gradient:
        To predictions and samples, one launch. To strength, guidance and noise levels, and through
        a rescaling, by plain PyTorch. A second derivative raises, but of plain PyTorch.

    Cost: each value is read once, O(B · …). A number in place of a tensor for a noise level costs
    another launch, which fills one. Plain PyTorch takes over for float64 on a GPU.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, dtypes or devices that do not fit, an unknown prediction type or output,
            or something missing; the message names it.
        RuntimeError: a second derivative was asked for.

    Source: Gao, Pan, Yao, Xie, Wei, *Delta Sampling: Data-Free Knowledge Transfer Across Diffusion
    Models*, 2025, arXiv:2512.03056.
    """
    parts = _branches(target, source, adapted, sample, guidance_scale)
    types = _types(prediction_type)
    like = parts[0]
    _check_tensors(parts, sample, source_sample)
    _check_choices(output, guidance_rescale, guidance_scale, parts, scales)
    delta = parts[2] is not None
    mixed = delta and len(set(types)) > 1
    moves = delta and types[1] != types[2]
    if moves and source_sample is None:
        if scales[0] != scales[1]:
            raise ValueError(
                "source_sample is needed: source and adapted predict different things, in a latent "
                f"space of another scale {scales[1]:g} than the target's, {scales[0]:g}"
            )
        source_sample = sample
    wanted = {
        "sample": (sample, output != "prediction" or (moves and source_sample is None)),
        "alpha": (alpha, output != "prediction" or mixed),
        "sigma": (sigma, output != "prediction" or mixed),
        "next_alpha": (next_alpha, output == "next"),
        "next_sigma": (next_sigma, output == "next"),
    }
    for name, (given, needed) in wanted.items():
        if needed and given is None:
            raise ValueError(f"{name} is needed for output={output!r} of {', '.join(types)}")
    samples = sample if wanted["sample"][1] else None, source_sample if moves else None
    levels = [
        _level(name, given, like) if needed else None
        for name, (given, needed) in wanted.items()
        if name != "sample"
    ]
    number, strengths = _factor("strength", strength, like)
    guidance, guidances = _factor("guidance_scale", guidance_scale, like)
    arguments = (
        *parts, *samples, *levels, strengths, guidances, number * scales[0] / scales[1], guidance,
        float(guidance_rescale), [PREDICTION_TYPES.index(one) for one in types],
        guidance_scale is not None, OUTPUTS.index(output),
    )  # fmt: skip
    scalars = [one for one in (*levels, strengths, guidances) if one is not None]
    rescaled = guidance_rescale != 0 and _any_requires_grad([*parts, *samples])
    if torch.is_grad_enabled() and (rescaled or _any_requires_grad(scalars)):
        return _plain(*arguments)
    return _combine(*arguments)


def reference(
    target: Sequence[Tensor | None],
    source: Sequence[Tensor | None],
    adapted: Sequence[Tensor | None],
    sample: Tensor | None,
    source_sample: Tensor | None,
    level: tuple[Tensor, Tensor],
    next_level: tuple[Tensor, Tensor],
    strength: Tensor,
    types: Sequence[str],
    guidance: Tensor | None,
    rescale: float,
    output: str,
) -> Tensor:
    """The specification, differentiable by autograd. Levels, strength (with the ratio of scales in
    it) and guidance are broadcastable to the predictions, which are (conditional, unconditional).
    """
    (x_t, p_t), (x_s, p_s), (x_a, p_a) = (clean_terms(one, *level) for one in types)

    def combined(t: Tensor | None, s: Tensor | None, a: Tensor | None) -> Tensor | None:
        if t is None or s is None or a is None:
            return t
        if len(set(types)) == 1:
            return t + strength * (a - s)
        moved = p_a * a - p_s * s
        if types[1] != types[2]:
            moved = moved + (x_a - x_s) * source_sample
        return t + strength * moved / p_t

    cond, uncond = (combined(*legs) for legs in zip(target, source, adapted, strict=True))

    def finished(p: Tensor) -> Tensor:
        if output == "prediction":
            return p
        clean = x_t * sample + p_t * p
        if output == "x0":
            return clean
        noise = p if types[0] == "epsilon" else (sample - level[0] * clean) / level[1]
        return next_level[0] * clean + next_level[1] * noise

    if guidance is None:
        return torch.cat([finished(one) for one in (uncond, cond) if one is not None])
    p = uncond + guidance * (cond - uncond)
    if rescale:
        axes = tuple(range(1, p.ndim))
        ratio = cond.std(axes, keepdim=True) / p.std(axes, keepdim=True)
        p = p * (rescale * ratio + 1 - rescale)
    return finished(p)


def clean_terms(kind: str, alpha: Tensor, sigma: Tensor) -> tuple[Any, Any]:
    """(X, P): the clean latents are X · sample + P · prediction."""
    if kind == "epsilon":
        return 1 / alpha, -sigma / alpha
    if kind == "v_prediction":
        square = alpha * alpha + sigma * sigma
        return alpha / square, -sigma / square.sqrt()
    return torch.zeros_like(alpha), torch.ones_like(alpha)


# ---------------------------------------------------------------------------------------------
# Arguments


def _branches(
    target: Any, source: Any, adapted: Any, sample: Tensor | None, guidance_scale: Any
) -> list[Tensor | None]:
    """Conditional and unconditional, of target, source and adapted."""
    if (source is None) != (adapted is None):
        raise ValueError("source and adapted come together: the delta is what they differ by")
    named = {"target": target, "source": source, "adapted": adapted}
    for name, given in named.items():
        pair = isinstance(given, (tuple, list)) and len(given) == 2
        alone = isinstance(given, Tensor) or (given is None and name != "target")
        if not (alone or (pair and isinstance(given[1], Tensor))):
            raise TypeError(
                f"{name} must be a tensor, or a pair (unconditional, conditional) of them; "
                f"got {type(given).__name__}"
            )
    for name, given in (*named.items(), ("sample", sample)):
        if any(isinstance(one, Tensor) and one.ndim == 0 for one in _members(given)):
            raise ValueError(f"{name} must be [batch, …]; got a tensor without axes")
    if isinstance(sample, Tensor):
        rows = sample.shape[0]
    elif isinstance(target, Tensor):
        rows = target.shape[0] // (1 if guidance_scale is None else 2)
    else:
        rows = target[1].shape[0]
    found: list[Tensor | None] = []
    for given in named.values():
        if isinstance(given, Tensor):
            if given.shape[0] != 2 * rows:
                given = None, given
            elif rows == 0:
                given = given, given
            else:
                given = given.chunk(2)
        found += [None, None] if given is None else [given[1], given[0]]
    if found[3] is not None and found[1] is None:
        raise ValueError("source has an unconditional branch, and target has none")
    if (found[3] is None) != (found[5] is None):
        raise ValueError("source and adapted must have the same branches")
    return found


def _members(given: Any) -> Sequence[Any]:
    return given if isinstance(given, (tuple, list)) else (given,)


def _types(given: str | Sequence[str]) -> tuple[str, str, str]:
    types = (given,) * 3 if isinstance(given, str) else tuple(given)
    if len(types) != 3 or any(one not in PREDICTION_TYPES for one in types):
        raise ValueError(
            f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, or three of them, of "
            f"target, source and adapted; got {given!r}"
        )
    return types


def _check_tensors(
    parts: list[Tensor | None], sample: Tensor | None, source_sample: Tensor | None
) -> None:
    like = parts[0]
    for name, given in zip(NAMES, (*parts, sample, source_sample), strict=True):
        if given is None:
            continue
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(given).__name__}")
        if given.shape != like.shape:
            raise ValueError(
                f"{name} must have the shape of a branch of target, {list(like.shape)}; "
                f"got {list(given.shape)}"
            )
        if given.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be of float16, bfloat16, float32 or float64; got {given.dtype}"
            )
        if given.device != like.device:
            raise ValueError(
                f"{name} must be on target's device, {like.device}; got {given.device}"
            )
        if (given.dtype == torch.float64) != (like.dtype == torch.float64):
            raise ValueError(
                f"float64 is not mixed with others: {name} is {given.dtype}, target {like.dtype}"
            )


def _check_choices(
    output: str,
    rescale: float,
    guidance_scale: Any,
    parts: list[Tensor | None],
    scales: tuple[float, float],
) -> None:
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}; got {output!r}")
    if guidance_scale is not None and parts[1] is None:
        raise ValueError("guidance_scale needs both branches of target: [2B, …] or a pair")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale must be from 0 to 1; got {rescale}")
    if rescale and guidance_scale is None:
        raise ValueError("guidance_rescale needs a guidance_scale")
    if len(scales) != 2 or not all(one > 0 for one in scales):
        raise ValueError(f"scales must be two numbers above 0; got {scales}")


def _level(name: str, given: Tensor | float, like: Tensor) -> Tensor:
    """[B]; with stride 0 if one for all."""
    if not isinstance(given, Tensor):
        given = torch.full((), float(given), dtype=wide_of(like.dtype), device=like.device)
    return _per_sample(name, given, like)


def _factor(name: str, given: Tensor | float | None, like: Tensor) -> tuple[float, Tensor | None]:
    """A number, and by what it is multiplied in each sample."""
    if isinstance(given, Tensor):
        return 1.0, _per_sample(name, given, like)
    return (1.0 if given is None else float(given)), None


def _per_sample(name: str, given: Tensor, like: Tensor) -> Tensor:
    if not given.is_floating_point():
        raise TypeError(f"{name} must hold floats; got {given.dtype}")
    if given.device != like.device:
        raise ValueError(f"{name} must be on target's device, {like.device}; got {given.device}")
    if given.numel() not in (1, like.shape[0]):
        raise ValueError(
            f"{name} must be one number or one for each of {len(like)} samples; "
            f"got {list(given.shape)}"
        )
    return given.reshape(-1).expand(like.shape[0])


def _any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    return any(one is not None and one.requires_grad for one in tensors)


# ---------------------------------------------------------------------------------------------
# The flat ops


def _output(args: Sequence[Any]) -> Tensor:
    """What the flat op returns, unwritten."""
    target, target_u, sample, (guided, output) = args[0], args[1], args[6], args[-2:]
    like = target if output == 0 else sample
    both = target_u is not None and not guided
    return dense_like(like, len(target) * (2 if both else 1))


def _fake(*args: Any) -> Tensor:
    return _output(args)


_combine = registration.define(
    "delta_combine(Tensor target, Tensor? target_u, Tensor? source, Tensor? source_u, "
    "Tensor? adapted, Tensor? adapted_u, Tensor? sample, Tensor? source_sample, Tensor? alpha, "
    "Tensor? sigma, Tensor? next_alpha, Tensor? next_sigma, Tensor? strengths, Tensor? guidances, "
    "float strength, float guidance, float rescale, int[] types, bool guided, int output) "
    "-> Tensor",
    _fake,
)


def _fake_backward(grad: Tensor, *args: Any) -> list[Tensor]:
    needs = args[-1]
    return [
        dense_like(one, len(one)) if needed else grad.new_empty(0)
        for one, needed in zip(args[:8], needs, strict=True)
    ]


# The gradients to predictions and samples; empty where not needed.
_backward = registration.define(
    "delta_combine_backward(Tensor grad, Tensor target, Tensor? target_u, Tensor? source, "
    "Tensor? source_u, Tensor? adapted, Tensor? adapted_u, Tensor? sample, Tensor? source_sample, "
    "Tensor? alpha, Tensor? sigma, Tensor? next_alpha, Tensor? next_sigma, Tensor? strengths, "
    "Tensor? guidances, float strength, float guidance, int[] types, bool guided, int output, "
    "bool[] needs) -> Tensor[]",
    _fake_backward,
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.others = inputs[14:]
    ctx.save_for_backward(*inputs[:14])


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    strength, guidance, _, types, guided, output = ctx.others
    needs = list(ctx.needs_input_grad[:8])
    parts = _backward(grad, *ctx.saved_tensors, strength, guidance, types, guided, output, needs)
    found = [part if needed else None for part, needed in zip(parts, needs, strict=True)]
    return (*found, *(None,) * 12)


registration.gradient(_combine, _differentiate, _save)
registration.once_differentiable(_backward, "delta_combine")


# ---------------------------------------------------------------------------------------------
# Plain PyTorch


@backends.register("delta_combine", "reference")
def _combine_plain(*args: Any) -> Tensor:
    out = _output(args)
    return out.copy_(_plain(*args))


def _plain(*args: Any) -> Tensor:
    """The specification on the flat op's arguments."""
    *tensors, strength, guidance, rescale, types, guided, output = args
    wide = wide_of(tensors[0].dtype)
    parts = [None if one is None else one.to(wide) for one in tensors[:8]]
    scalars = [_beside(one, parts[0]) for one in tensors[8:]]
    levels = [torch.ones((), dtype=wide) if one is None else one for one in scalars[:4]]
    strengths, guidances = (1.0 if one is None else one for one in scalars[4:])
    found = reference(
        parts[0:2], parts[2:4], parts[4:6], parts[6], parts[7],
        (levels[0], levels[1]), (levels[2], levels[3]), strength * strengths,
        [PREDICTION_TYPES[one] for one in types], guidance * guidances if guided else None,
        rescale, OUTPUTS[output],
    )  # fmt: skip
    return found.to((tensors[0] if output == 0 else tensors[6]).dtype)


def _beside(scalars: Tensor | None, like: Tensor) -> Tensor | None:
    """[B, 1, …]"""
    if scalars is None:
        return None
    return scalars.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


@backends.register("delta_combine_backward", "reference")
def _backward_plain(grad: Tensor, *args: Any) -> list[Tensor]:
    *tensors, strength, guidance, types, guided, output, needs = args
    g = grad.to(wide_of(grad.dtype))
    parts, scalars = tensors[:8], [_beside(one, g) for one in tensors[8:]]
    strengths, guidances = (1.0 if one is None else one for one in scalars[4:])
    to_target, to_source, to_adapted, to_state, to_p, to_sample = slopes(
        types, output, *scalars[:4], strength * strengths
    )
    both = parts[3] is not None  # have a delta
    if guided:
        w = guidance * guidances
        sides = [w * to_p * g, (1 - w) * to_p * g]
        of_sample = to_sample * g
        of_state = to_state * ((1.0 if both else w) * to_p * g)  # their sum would cancel
    elif parts[1] is not None:
        halves = g.unflatten(0, (2, -1))
        sides = list(to_p * halves)[::-1]
        of_sample = (to_sample * halves).sum(0)
        of_state = to_state * (sides[0] + sides[1] if both else sides[0])
    else:
        sides = [to_p * g, None]
        of_sample, of_state = to_sample * g, to_state * sides[0]
    found = [
        *(None if side is None else factor * side
          for factor in (to_target, to_source, to_adapted) for side in sides),
        of_sample, of_state,
    ]  # fmt: skip
    return [
        dense_like(one, len(one)).copy_(value) if needed else grad.new_empty(0)
        for one, value, needed in zip(parts, found, needs, strict=True)
    ]


def slopes(
    types: Sequence[int],
    output: int,
    alpha: Tensor | None,
    sigma: Tensor | None,
    next_alpha: Tensor | None,
    next_sigma: Tensor | None,
    strength: Tensor | float,
) -> tuple[Any, ...]:
    """A branch is target + to_source · source + to_adapted · adapted + to_state · source_sample,
    with to_target 1; and what comes out of it to_p · (the branches, guided) + to_sample · sample.
    """
    kinds = [PREDICTION_TYPES[one] for one in types]
    to_source, to_adapted, to_state = -strength, strength, 0.0
    to_p, to_sample = 1.0, 0.0
    if alpha is not None and sigma is not None:
        (x_t, p_t), (x_s, p_s), (x_a, p_a) = (clean_terms(one, alpha, sigma) for one in kinds)
        if len(set(kinds)) > 1:
            to_source, to_adapted = -strength * p_s / p_t, strength * p_a / p_t
            to_state = strength * (x_a - x_s) / p_t
        if output > 0:
            to_p, to_sample = p_t, x_t
        if output == 2:
            n_x, n_p = noise_terms(kinds[0], alpha, sigma)
            to_p = next_alpha * to_p + next_sigma * n_p
            to_sample = next_alpha * to_sample + next_sigma * n_x
    return 1.0, to_source, to_adapted, to_state, to_p, to_sample


def noise_terms(kind: str, alpha: Tensor, sigma: Tensor) -> tuple[Any, Any]:
    """(X, P): the noise is X · sample + P · prediction."""
    if kind == "epsilon":
        return 0.0, 1.0
    x, p = clean_terms(kind, alpha, sigma)
    return (1 - alpha * x) / sigma, -alpha * p / sigma


# ---------------------------------------------------------------------------------------------
# Triton


def _refuses(*args: Any) -> str | None:
    from sdcore.triton_kernels import samples

    return samples.refuses(*args[:8])


def _refuses_backward(*args: Any) -> str | None:
    from sdcore.triton_kernels import samples

    return samples.refuses(*args[:9])


def _halves(whole: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:
    """Of the conditional branch, and of the unconditional one if it is there."""
    return (whole, None) if len(whole) == rows else (whole[rows:], whole[:rows])


def _wanted(parts: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    return [
        dense_like(one, len(one)) if needed else None
        for one, needed in zip(parts, needs, strict=True)
    ]


@backends.register("delta_combine", "triton", _refuses)
def _combine_triton(*args: Any) -> Tensor:
    from sdcore.triton_kernels import delta_combine as kernels

    out = _output(args)
    halves = _halves(out, len(args[0]))
    kernels.combine(halves, args[:8], args[8:14], joint([*args[:8], halves[0]]), *args[14:])
    return out


@backends.register("delta_combine_backward", "triton", _refuses_backward)
def _backward_triton(grad: Tensor, *args: Any) -> list[Tensor]:
    from sdcore.triton_kernels import delta_combine as kernels

    *others, needs = args[8:]
    found, halves = _wanted(args[:8], needs), _halves(grad, len(args[0]))
    places = joint([*found, halves[0]])
    kernels.backward(halves, found, others[:6], places, *others[6:], args[3] is not None)
    return [grad.new_empty(0) if one is None else one for one in found]


# ---------------------------------------------------------------------------------------------
# C++


def _call_cpp(
    function: str,
    parts: Sequence[Tensor | None],
    halves: tuple[Tensor, Tensor | None],
    scalars: Sequence[Tensor | None],
    strength: float,
    guidance: float,
    rescale: float,
    types: Sequence[int],
    guided: bool,
    output: int,
    delta_u: bool,
) -> None:
    out = halves[0]
    if out.numel() == 0:
        return
    every = [*parts, *halves]
    sizes, *places = joint([*every, out]) or ((out[0].numel(),), *((1,),) * len(every))
    described = [
        (address(one), str((out if one is None else one).dtype).removeprefix("torch."),
         0 if one is None else one.stride(0), strides)
        for one, strides in zip(every, places, strict=False)
    ]  # fmt: skip
    doubles = [None if one is None else one.double() for one in scalars]  # held while it runs
    numbers = [(address(one), 0 if one is None else one.stride(0)) for one in doubles]
    getattr(backends.cpu_module(), function)(
        described[:8], *described[8:], len(out), sizes, numbers, strength, guidance, rescale,
        types, guided, output, delta_u, torch.get_num_threads(),
    )  # fmt: skip


@backends.register("delta_combine", "cpp")
def _combine_cpp(*args: Any) -> Tensor:
    out = _output(args)
    halves = _halves(out, len(args[0]))
    _call_cpp("delta_combine", args[:8], halves, args[8:14], *args[14:], False)
    return out


@backends.register("delta_combine_backward", "cpp")
def _backward_cpp(grad: Tensor, *args: Any) -> list[Tensor]:
    strength, guidance, types, guided, output, needs = args[14:]
    found, halves = _wanted(args[:8], needs), _halves(grad, len(args[0]))
    _call_cpp(
        "delta_combine_backward", found, halves, args[8:14], strength, guidance, 0.0, types,
        guided, output, args[3] is not None,
    )  # fmt: skip
    return [grad.new_empty(0) if one is None else one for one in found]
