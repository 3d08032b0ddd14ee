"""Group norms of a UNet or a VAE by ``group_norm_silu``, with the SiLU and the shift around them.

For the time of a call the parts concerned have a ``forward`` of ours, and none after it. A part
that has something of its own by then, a hook, another ``forward``, a LoRA's layer in the place of
a convolution, is called as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sdcore.graphs import variant
from sdcore.methods.cross_attention import turn
from sdcore.methods.lora import plain
from sdcore.ops import group_norm_silu
from sdcore.ops.dtypes import wide_of
from sdcore.patching import Method


class FastNorms(Method):
    """Group normalization of the UNet and of the VAE by ``sdcore.ops.group_norm_silu``.

    ResNet blocks have it as one with the SiLU after it and, the second, with what is added for the
    time and the bias of the convolution before it. ::

        with sdcore.patch(pipe, sdcore.FastNorms()):
            image = pipe(prompt).images[0]

    Also on a bare model, where its own calls are meant, a VAE's ``encode`` among them:
    ``sdcore.patch(vae, sdcore.FastNorms())``.

    Results differ by rounding alone. Norms with hooks, such as those of sequential offloading, and
    blocks that are normalized otherwise (spatial norms, scale and shift by the time) are left as
    they are; so is a model with gradient checkpointing. Weights, and LoRA on convolutions, may
    change between calls.

    Raises:
        TypeError: when it is put on, if there is no group norm.
    """

    def check(self, pipe: Any) -> None:
        models = [pipe] if isinstance(pipe, nn.Module) else [pipe.unet, pipe.vae]
        if not any(type(part) is nn.GroupNorm for model in models for part in model.modules()):
            raise TypeError(f"{type(pipe).__name__} has no group norm")

    def within(self, module: Any) -> contextlib.AbstractContextManager[None]:
        return replaced_forwards(module, lambda: _replaced(plain(module)))


# ---------------------------------------------------------------------------------------------
# A forward of ours, for a time and in one thread

_active: ContextVar[bool] = ContextVar("sdcore_forwards", default=False)
# Where a part keeps the forward of its own that it had, as what torch.compile returns has one.
_BEFORE = "_sdcore_forward_before"


@contextlib.contextmanager
def replaced_forwards(
    module: Any, parts: Callable[[], Iterable[tuple[nn.Module, Callable[..., Any]]]]
) -> Iterator[None]:
    """Within it these parts of ``module`` compute by functions of ours, made by :func:`ours`, in
    this thread. Threads that do so with one module take turns, in which ``parts`` is asked."""
    with turn(module), contextlib.ExitStack() as stack:
        for part, function in parts():
            # In the dictionary itself: nn.Module's setattr takes its time.
            own = vars(part)
            if "forward" in own:
                before = own["forward"]
                if is_ours(before):  # from further out
                    continue
                stack.callback(own.__setitem__, "forward", before)
                stack.callback(own.pop, _BEFORE, None)
                own[_BEFORE] = before
            else:
                stack.callback(own.pop, "forward", None)
            own["forward"] = MethodType(function, part)
        stack.callback(_active.reset, _active.set(True))
        # By name of whoever asks: a graph with other forwards in it is another graph.
        stack.callback(variant.reset, variant.set((variant.get(), parts.__qualname__)))
        yield


def ours(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as a forward that other threads see nothing of."""

    def forward(self: nn.Module, *args: Any, **options: Any) -> Any:
        # What torch.compile traces has this forward among its conditions.
        if torch.compiler.is_compiling() or _active.get():
            return function(self, *args, **options)
        before = vars(self).get(_BEFORE)
        if before is not None:
            return before(*args, **options)
        return type(self).forward(self, *args, **options)

    forward.__dict__[_BEFORE] = None
    return forward


def is_ours(forward: Any) -> bool:
    return hasattr(forward, _BEFORE)


def untouched(part: Any) -> bool:
    """Without hooks and without a forward of its own, but for one of ours."""
    own = vars(part)
    return not (
        ("forward" in own and not is_ours(own["forward"]))
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or own.get("_compiled_call_impl")
        or "_hf_hook" in own
    )


# ---------------------------------------------------------------------------------------------
# Parts


def normed(
    norm: nn.Module,
    x: Tensor,
    silu: bool,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Any:
    """``group_norm_silu`` with the weights of a norm that :func:`is_norm`."""
    weight, bias, shift = (
        # Under autocast x may be of half a type where weights are not, and the other way around.
        one if one is None or one.dtype in (x.dtype, wide_of(x.dtype)) else one.to(wide_of(x.dtype))
        for one in (norm.weight, norm.bias, shift)
    )
    return group_norm_silu(
        x, norm.num_groups, weight, bias, norm.eps, silu=silu, shift=shift, residual=residual
    )


def is_norm(part: Any) -> bool:
    return type(part) is nn.GroupNorm and untouched(part)


def convolved(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A convolution without its bias, and the bias, [C]; with it, and None, if it is not a plain
    one. PyTorch adds biases in a pass of their own over what cuDNN wrote."""
    if not is_conv(conv):
        return conv(x), None
    return conv._conv_forward(x, weight_for(x, conv.weight), None), conv.bias


def weight_for(x: Tensor, weight: Tensor) -> Tensor:
    """In x's memory format: PyTorch would copy it there for the convolution, and for its gradient
    once more."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return weight.contiguous(memory_format=torch.channels_last) if last else weight


def is_conv(part: Any) -> bool:
    return type(part) is nn.Conv2d and untouched(part)


def is_resnet(part: Any) -> bool:
    """A ResNet block of Diffusers' whose norms can be ours."""
    return (
        type(part).__name__ == "ResnetBlock2D"
        and untouched(part)
        and part.upsample is None
        and part.downsample is None
        and (part.time_emb_proj is None or part.time_embedding_norm == "default")
        and is_silu(part.nonlinearity)
        and is_norm(part.norm1)
        and is_norm(part.norm2)
    )


def _replaced(model: Any) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """All parts of a model that get a forward, with it."""
    found: list[tuple[nn.Module, Callable[..., Any]]] = []
    waiting = [model]
    while waiting:
        part = waiting.pop()
        # Layer norms alone, and most of a UNet's parts.
        if type(part).__name__ == "BasicTransformerBlock":
            continue
        own = vars(part)
        if own.get("gradient_checkpointing"):
            # Layers are computed again, in a thread of autograd's, and must be the same there.
            return []
        if is_resnet(part):
            found.append((part, _RESNET))
            continue
        parts = dict(own["_modules"])
        if is_norm(parts.get("conv_norm_out")) and is_silu(parts.get("conv_act")):
            found.append((parts.pop("conv_norm_out"), _NORM_SILU))
            found.append((parts.pop("conv_act"), _NOTHING))
        for inner in parts.values():
            if is_norm(inner):
                found.append((inner, _NORM))
            elif inner is not None:
                waiting.append(inner)
    return found


def is_silu(part: Any) -> bool:
    return type(part) is nn.SiLU and untouched(part)


def _norm(self: nn.GroupNorm, x: Tensor) -> Tensor:
    if x.ndim != 3 or x.is_contiguous():
        return normed(self, x, silu=False)
    # [B, C, N] of an attention, which has channels side by side.
    return normed(self, x.unsqueeze(3), silu=False).squeeze(3)


def _norm_silu(self: nn.GroupNorm, x: Tensor) -> Tensor:
    return normed(self, x, silu=True)


def _nothing(self: nn.Module, x: Tensor) -> Tensor:
    return x


def _resnet(
    self: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **options: Any
) -> Tensor:
    if args or options or (self.time_emb_proj is None and temb is not None):
        return type(self).forward(self, input_tensor, temb, *args, **options)
    h, bias = convolved(self.conv1, normed(self.norm1, input_tensor, silu=True))
    shift = None if bias is None else bias.expand(len(h), -1)
    if self.time_emb_proj is not None:
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        shift = temb if shift is None else temb + shift
    h = self.conv2(self.dropout(normed(self.norm2, h, silu=True, shift=shift)))
    x = input_tensor
    if self.conv_shortcut is not None:
        x = self.conv_shortcut(x.contiguous() if self.training else x)
    out = x + h
    return out if self.output_scale_factor == 1 else out / self.output_scale_factor


_RESNET, _NORM, _NORM_SILU, _NOTHING = map(ours, (_resnet, _norm, _norm_silu, _nothing))
