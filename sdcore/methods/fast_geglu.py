"""The gated feed-forwards of a UNet by ``geglu``: one kernel after each projection, and one for its
gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sdcore.methods.fast_norms import ours, replaced_forwards, untouched
from sdcore.methods.lora import plain
from sdcore.ops import geglu
from sdcore.patching import Method


class FastGEGLU(Method):
    """The GELU gates of the UNet's feed-forwards by ``sdcore.ops.geglu``.

    In place of PyTorch's two launches and, for the gradient, four, each is one. ::

        with sdcore.patch(pipe, sdcore.FastGEGLU(), sdcore.FastNorms()):
            image = pipe(prompt).images[0]

    Also on a bare model that has such feed-forwards, where its own calls are meant:
    ``sdcore.patch(unet, sdcore.FastGEGLU())``.

    Results differ by rounding alone. The projection before is called as it is, with its hooks and
    its LoRA. Diffusers' ``GEGLU`` alone is meant: subclasses of it, and parts with hooks of their
    own, are left as they are; so is a model with gradient checkpointing.

    Raises:
        TypeError: when it is put on, if there is no GEGLU.
    """

    def check(self, pipe: Any) -> None:
        model = pipe if isinstance(pipe, nn.Module) else pipe.unet
        if not any(is_geglu(part) for part in model.modules()):
            raise TypeError(f"{type(pipe).__name__} has no GEGLU")

    def within(self, module: Any) -> contextlib.AbstractContextManager[None]:
        return replaced_forwards(module, lambda: _replaced(plain(module)))


def is_geglu(part: Any) -> bool:
    kind = type(part)
    return kind.__name__ == "GEGLU" and kind.__module__ == "diffusers.models.activations"


# Where there is none: half of a UNet's parts are within these two.
WITHOUT = frozenset({"Attention", "ResnetBlock2D"})


def _replaced(model: Any) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """All parts of a model that get a forward, with it. Asked at each call: of the 1930 parts of
    SDXL's UNet it looks into 264."""
    found: list[tuple[nn.Module, Callable[..., Any]]] = []
    waiting = [vars(model)]
    while waiting:
        own = waiting.pop()
        if own.get("gradient_checkpointing"):
            # Layers are computed again, in a thread of autograd's, and must be the same there.
            return []
        for part in own["_modules"].values():
            if part is None or type(part).__name__ in WITHOUT:
                continue
            inner = vars(part)
            if not inner["_modules"]:
                continue
            if not is_geglu(part):
                waiting.append(inner)
            elif untouched(part):
                found.append((part, _GEGLU))
    return found


def _geglu(self: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
    if args or options:
        return type(self).forward(self, hidden_states, *args, **options)
    return geglu(self.proj(hidden_states))


_GEGLU = ours(_geglu)
