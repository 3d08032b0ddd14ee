"""What methods put in the place of a UNet's cross-attention, for the time of one call of the UNet.

Processors are put on and taken off again around each call, so that whatever else is done to the
UNet between calls, by LoRA, IP-Adapter or the user, is met as it is then.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sdcore.masks import Mask
from sdcore.ops import masked_cross_attention

# Processors of Diffusers that compute nothing but attention, each in its own way.
PLAIN = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")

# Of which a pipeline can have one.
CLAIM = "masks the cross-attention"


@dataclass(frozen=True)
class Layer:
    """A cross-attention at work."""

    name: str  # such as "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    hidden_states: Tensor  # [B, N, C]: what its queries are made from
    text: Tensor  # [B, T, E]: what its keys and values are made from


@dataclass(frozen=True)
class Wanted:
    """What a method wants of a cross-attention."""

    mask: Mask | Tensor | None
    #: More text, [B, T', E], after the layer's own, with the segments and their weights [B, S, N]
    #: of ``masked_cross_attention``; the mask is for all tokens.
    more: Tensor | None = None
    segments: Sequence[tuple[int, int]] | None = None
    weights: Tensor | None = None
    #: Tokens whose probabilities, the mean of the heads, ``tell`` is to get: [B, N, tokens].
    tokens: Sequence[int] = ()
    tell: Callable[[Tensor], None] | None = None


def layers(unet: Any) -> dict[str, nn.Module]:
    """A UNet's cross-attentions by name, in the order in which they lie in it; also of what
    ``torch.compile`` returned."""
    parts = getattr(unet, "_orig_mod", unet).named_modules()
    return {
        name: part
        for name, part in parts
        if name.rpartition(".")[2] == "attn2" and hasattr(part, "to_q")
    }


def check_processor(name: str, attention: Any) -> None:
    """Raises a TypeError if masks can't be put on this attention."""
    processor = type(attention.processor).__name__
    if isinstance(attention.processor, Masked):
        raise TypeError("two methods that mask the cross-attention can't be on one pipeline")
    if processor.startswith("Fused"):
        raise TypeError(f"{name} has fused projections; call pipe.unfuse_qkv_projections() first")
    if processor not in PLAIN:
        other = "an IP-Adapter" if "IPAdapter" in processor else f"a {processor}"
        raise TypeError(f"{name} has {other}, with which a mask can't be combined")


_active: ContextVar[Any] = ContextVar("sdcore_masked", default=None)
_turns: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_turns_lock = threading.Lock()


def turn(unet: Any) -> threading.RLock:
    """Of threads that put something on its parts for the time of a call."""
    with _turns_lock:
        return _turns.setdefault(getattr(unet, "_orig_mod", unet), threading.RLock())


@contextlib.contextmanager
def masked(
    unet: Any,
    names: Iterable[str],
    wanted: Callable[[Layer], Wanted | None],
    *,
    all_threads: bool = False,
) -> Iterator[None]:
    """Within it these cross-attentions ask ``wanted`` at each of their calls, and attend so; None
    leaves a call as it is. Calls of the UNet in other threads stay as they are too, unless
    ``all_threads``: gradient checkpointing computes layers again in a thread of autograd's. Threads
    that mask one UNet take turns.

    Raises:
        TypeError: a processor that computes something else than plain attention.
    """
    key = object()
    with turn(unet), contextlib.ExitStack() as stack:
        parts = layers(unet)
        chosen = {name: parts[name] for name in names}
        for name, attention in chosen.items():
            check_processor(name, attention)
        stack.callback(_active.reset, _active.set(key))
        for name, attention in chosen.items():
            stack.callback(setattr, attention, "processor", attention.processor)
            attention.processor = Masked(
                name, attention.processor, wanted, None if all_threads else key
            )
        yield


class Masked:
    """A processor of Diffusers' ``Attention``; ``inner`` is what it stands in for."""

    def __init__(
        self, name: str, inner: Any, wanted: Callable[[Layer], Wanted | None], key: object | None
    ) -> None:
        self.name, self.inner, self.wanted, self.key = name, inner, wanted, key

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        wanted = None
        here = self.key is None or _active.get() is self.key
        if here and encoder_hidden_states is not None:
            wanted = self.wanted(Layer(self.name, hidden_states, encoder_hidden_states))
        if wanted is None:
            return self.inner(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **options
            )
        if attention_mask is not None:
            raise ValueError(f"{self.name} got an attention_mask, and has a mask already")
        return _attend(attn, hidden_states, encoder_hidden_states, temb, wanted)


def _attend(attn: Any, given: Tensor, text: Tensor, temb: Tensor | None, wanted: Wanted) -> Tensor:
    """As Diffusers' AttnProcessor2_0, with a mask."""
    states = given if attn.spatial_norm is None else attn.spatial_norm(given, temb)
    if attn.group_norm is not None:
        states = attn.group_norm(states.mT).mT
    if wanted.more is not None:
        text = torch.cat([text, wanted.more.to(text.dtype)], 1)
    if attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    query, key, value = attn.to_q(states), attn.to_k(text), attn.to_v(text)
    query, key, value = (
        part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value)
    )
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    mask = wanted.mask
    if isinstance(mask, Tensor):
        mask = mask.to(query.dtype)
    parts = {"segments": wanted.segments, "segment_weights": wanted.weights}
    if wanted.tell is None:
        out = masked_cross_attention(query, key, value, mask, **parts)
    else:
        out, found = masked_cross_attention(
            query, key, value, mask, return_token_probs=wanted.tokens, **parts
        )
        wanted.tell(found)
    assert isinstance(out, Tensor)
    out = out.transpose(1, 2).flatten(2).to(query.dtype)
    for part in attn.to_out:
        out = part(out)
    if attn.residual_connection:
        out = out + given
    return out / attn.rescale_output_factor


def side_of(count: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of the layer with ``count`` pixels in a UNet that is given latents of this
    height and width, of which each level halves them, rounding up.

    Raises:
        ValueError: no level has so many.
    """
    h, w = height, width
    while h * w > count:
        h, w = -(-h // 2), -(-w // 2)
    if h * w != count:
        raise ValueError(
            f"latents of {height} × {width} have no level with {count} pixels, which this UNet's "
            "cross-attention was given"
        )
    return h, w
