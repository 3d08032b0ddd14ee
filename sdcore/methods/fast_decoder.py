"""The VAE's decoder at the speed of its convolutions.

The same sums as Diffusers' own code makes, in another order. Channels lie side by side. A ResNet
block's result is not added up at once but handed on as what it is the sum of: a convolution's
output, its bias, and what went past the block. The next norm reads them and writes their sum. An
upsampled picture is never written: its convolution is a transposed one of the picture before.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcore import graphs
from sdcore.methods.cross_attention import PLAIN, turn
from sdcore.methods.fast_norms import (
    convolved,
    is_conv,
    is_norm,
    is_resnet,
    is_silu,
    normed,
    ours,
    replaced_forwards,
    untouched,
    weight_for,
)
from sdcore.methods.lora import plain
from sdcore.ops import wide_attention
from sdcore.ops.dtypes import wide_of
from sdcore.patching import Method

HALF = (torch.float16, torch.bfloat16)
# Heads wider than this PyTorch's fast kernels refuse.
WIDE = 256
# Kinds of calls that a decoder is remembered to have had.
KINDS = 64


class FastDecoder(Method):
    """The VAE's decoder, several times as fast.

    It has its norms by ``sdcore.ops.group_norm_silu``, together with biases and residuals; its one
    wide head by ``sdcore.ops.wide_attention``; all with channels side by side in memory, and
    upsampling within the convolution that follows. ::

        with sdcore.patch(pipe, sdcore.FastDecoder()):
            image = pipe(prompt).images[0]

    Also on a bare VAE, also to differentiate: ``sdcore.patch(vae, sdcore.FastDecoder())``.

    Args:
        graph: from the second call of a kind on (of a size, dtype and mode), decode by a CUDA
            graph. Where a gradient to the latents is wanted, and the VAE's weights are frozen
            (``vae.requires_grad_(False)``), it has one as well; a second derivative then raises.
            Graphs keep the memory that a call needs until the method is removed. There are none
            for a decoder of which a part has a hook or a forward of its own, nor for a VAE that is
            offloaded.

    Results differ by rounding alone. In half precision the convolutions after upsampling have sums
    of up to four of their weights, rounded once more. Parts of the decoder that have hooks or a
    forward of their own, or a LoRA, are called as they are; with gradient checkpointing, or latents
    beside the sample, the decoder is, and so it is where ``vae.decode`` itself was replaced, by
    ``torch.compile``, say. Slices and tiles are decoded one by one. A decoder under
    ``torch.compile`` is replaced for the time of the call.

    Raises:
        TypeError: when it is put on, if the VAE's decoder is not that of ``AutoencoderKL``.
    """

    def __init__(self, *, graph: bool = True) -> None:
        self.graph = bool(graph)
        self._graphs: weakref.WeakKeyDictionary[nn.Module, _Graphs] = weakref.WeakKeyDictionary()
        self._forward = ours(torch.compiler.disable(self._forward_of))

    def check(self, pipe: Any) -> None:
        vae = pipe if isinstance(pipe, nn.Module) else pipe.vae
        decoder = plain(getattr(vae, "decoder", None))
        if not _is_decoder(decoder):
            raise TypeError(
                "FastDecoder knows the decoder of AutoencoderKL; "
                f"got the {type(decoder).__name__} of a {type(vae).__name__}"
            )

    @contextlib.contextmanager
    def within(self, module: Any) -> Iterator[None]:
        outer = getattr(module, "decoder", None)
        decoder = plain(outer)
        # Of a UNet there is none; and a compiled decode has the decoder's own code in it.
        if not _is_decoder(decoder) or "decode" in vars(module):
            yield
            return

        def parts() -> list[tuple[nn.Module, Callable[..., Any]]]:
            kept = self._graphs.get(decoder)
            if kept is not None:
                kept.state_known = False
            if outer is decoder and "forward" in vars(outer):  # accelerate's, say
                return []
            return [(outer, self._forward)]

        with turn(module), _not_compiled(outer), replaced_forwards(module, parts):
            token = _offloaded.set(is_offloaded(module))
            try:
                yield
            finally:
                _offloaded.reset(token)

    def _forward_of(
        self, module: nn.Module, sample: Tensor, latent_embeds: Tensor | None = None
    ) -> Tensor:
        """A decoder's forward."""
        decoder = plain(module)
        checkpoints = torch.is_grad_enabled() and decoder.gradient_checkpointing
        if latent_embeds is not None or checkpoints:
            return type(decoder).forward(decoder, sample, latent_embeds)
        graph = self.graph and sample.device.type == "cuda" and not _offloaded.get()
        if not graph or _trains(decoder):
            return decoded(decoder, sample)
        kept = self._graphs.get(decoder)
        if kept is None:
            kept = self._graphs[decoder] = _Graphs(decoder)
        return kept(decoder, sample)

    def removed(self, pipe: Any) -> None:
        decoder = plain(getattr(getattr(pipe, "vae", pipe), "decoder", None))
        if decoder in self._graphs:
            self._graphs.pop(decoder).graphs.clear()


# Whether the VAE at work may be moved out of the GPU after its call.
_offloaded: ContextVar[bool] = ContextVar("sdcore_offloaded", default=False)


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate's takes it out of the GPU after a call, or when another's
    comes."""
    hook = vars(module).get("_hf_hook")
    return hook is not None and (
        type(hook).__name__ == "CpuOffload" or getattr(hook, "offload", False)
    )


def _is_decoder(decoder: Any) -> bool:
    return type(decoder).__name__ == "Decoder" and type(decoder.conv_norm_out) is nn.GroupNorm


class _Graphs:
    """A decoder's, which do not hold it."""

    def __init__(self, decoder: nn.Module) -> None:
        there = weakref.ref(decoder)
        self.graphs = graphs.Graphs(
            lambda sample: decoded(there(), sample), "the VAE's decoder", gradients=True
        )
        self.state_known = False
        self._seen: dict[Hashable, None] = {}

    def __call__(self, decoder: nn.Module, sample: Tensor) -> Tensor:
        kind = graphs.kind_of(sample)
        if kind not in self._seen:
            self._seen[kind] = None
            while len(self._seen) > KINDS:
                del self._seen[next(iter(self._seen))]
            return decoded(decoder, sample)
        if not self.state_known:  # once for all tiles
            self._learn(decoder)
        return self.graphs(sample)

    def _learn(self, decoder: nn.Module) -> None:
        parts = list(decoder.modules())[1:]
        if all(map(untouched, parts)):
            self.graphs.state = graphs.module_state(decoder)
            self.graphs.weights = [*decoder.parameters(), *decoder.buffers()]
        else:
            self.graphs.state = "a part of it has a hook or a forward of its own"
        self.state_known = True


@contextlib.contextmanager
def _not_compiled(module: Any) -> Iterator[None]:
    """Without what its ``compile()`` put on it, which would be called in place of its forward."""
    compiled = vars(module).get("_compiled_call_impl")
    if compiled is None:
        yield
        return
    vars(module)["_compiled_call_impl"] = None
    try:
        yield
    finally:
        vars(module)["_compiled_call_impl"] = compiled


def _trains(decoder: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(one.requires_grad for one in decoder.parameters())


# ---------------------------------------------------------------------------------------------
# The decoder


@dataclass(frozen=True)
class _Sum:
    """x + shift + residual, of which nobody has made the sum yet. A shift without a residual may
    stay for long: it is then in none of the sums, and rounded with none."""

    x: Tensor
    shift: Tensor | None = None  # [C]
    residual: Tensor | None = None

    def made(self) -> Tensor:
        total = self.x if self.residual is None else self.x + self.residual
        if self.shift is None:
            return total
        return total + self.shift.to(total.dtype)[:, None, None]


def decoded(decoder: Any, sample: Tensor) -> Tensor:
    """What Diffusers' ``Decoder`` gives, contiguous."""
    sample = sample.contiguous(memory_format=torch.channels_last)
    total = _mid_block(decoder.mid_block, _Sum(*convolved(decoder.conv_in, sample)))
    for block in decoder.up_blocks:
        total = _up_block(block, total)
    out, _ = _normed(decoder.conv_norm_out, total, decoder.conv_act)
    return decoder.conv_out(out).contiguous()


def _mid_block(block: Any, total: _Sum) -> _Sum:
    if type(block).__name__ != "UNetMidBlock2D" or not untouched(block):
        return _Sum(block(total.made()))
    total = _resnet(block.resnets[0], total)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            total = _attention(attention, total)
        total = _resnet(resnet, total)
    return total


def _up_block(block: Any, total: _Sum) -> _Sum:
    if type(block).__name__ != "UpDecoderBlock2D" or not untouched(block):
        return _Sum(block(total.made()))
    for resnet in block.resnets:
        total = _resnet(resnet, total)
    for upsampler in block.upsamplers or ():
        total = _upsampler(upsampler, total)
    return total


def _normed(norm: nn.Module, total: _Sum, act: nn.Module | None) -> tuple[Tensor, _Sum]:
    """The norm of a sum, with SiLU if ``act`` is one; and the sum, without a residual."""
    if not is_norm(norm):
        total = _Sum(total.made())
        out = norm(total.x)
        return (out if act is None else act(out)), total
    silu = is_silu(act)
    shift = None if total.shift is None else total.shift.expand(len(total.x), -1)
    out = normed(norm, total.x, silu, shift, total.residual)
    if total.residual is not None:
        out, made = out
        total = _Sum(made)
    return (out if silu or act is None else act(out)), total


def _resnet(block: Any, total: _Sum) -> _Sum:
    if not is_resnet(block) or block.output_scale_factor != 1 or block.time_emb_proj is not None:
        return _Sum(block(total.made(), None))
    out, total = _normed(block.norm1, total, block.nonlinearity)
    out, _ = _normed(block.norm2, _Sum(*convolved(block.conv1, out)), block.nonlinearity)
    out, bias = convolved(block.conv2, block.dropout(out))
    past, shift = total.x, total.shift
    if block.conv_shortcut is not None:
        past, shift = _pixelwise(block.conv_shortcut, total)
    return _Sum(out, _added(bias, shift), past)


def _pixelwise(conv: Any, total: _Sum) -> tuple[Tensor, Tensor | None]:
    """A convolution of single pixels, of a sum without a residual: of x; and of its shift."""
    if not is_conv(conv) or conv.kernel_size != (1, 1):
        return conv(total.made()), None
    past, bias = convolved(conv, total.x)
    if total.shift is None:
        return past, bias
    # As a sum, since autocast would multiply in half precision.
    weight = conv.weight[:, :, 0, 0]
    return past, _added((weight.to(wide_of(weight.dtype)) * total.shift).sum(1), bias)


def _added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first.to(wide_of(first.dtype)) + second


def _attention(block: Any, total: _Sum) -> _Sum:
    if not _is_attention(block):
        return _Sum(block(total.made()))
    out, total = _normed(block.group_norm, total, None)
    height, width = out.shape[2:]
    tokens = out.flatten(2).mT
    q, k, v = (
        part(tokens).unflatten(2, (block.heads, -1)).transpose(1, 2)
        for part in (block.to_q, block.to_k, block.to_v)
    )
    # In float32 neither is faster (14.0 and 14.4 ms of 16,384 tokens, H100), and ours needs memory.
    wide = q.shape[-1] > WIDE and q.device.type == "cuda" and q.dtype in HALF
    out = wide_attention(q, k, v) if wide else F.scaled_dot_product_attention(q, k, v)
    out = out.transpose(1, 2).flatten(2)
    for part in block.to_out:
        out = part(out)
    return _Sum(out.mT.unflatten(2, (height, width)), total.shift, total.x)


def _is_attention(block: Any) -> bool:
    return (
        type(block).__name__ == "Attention"
        and untouched(block)
        and type(block.processor).__name__ in PLAIN
        and block.spatial_norm is None
        and block.norm_q is None
        and block.norm_k is None
        and block.group_norm is not None
        and block.residual_connection
        and block.rescale_output_factor == 1
    )


def _upsampler(block: Any, total: _Sum) -> _Sum:
    made = total.made()
    conv = getattr(block, "conv", None)
    if (
        type(block).__name__ != "Upsample2D"
        or not untouched(block)
        or not is_conv(conv)
        or not _is_of_3_by_3(conv)
        or block.norm is not None
        or not block.interpolate
        or made.dtype not in HALF  # there is no fast one of TF32 for all sizes
        or 4 * made.numel() >= 2**31
    ):
        return _Sum(block(made))
    kernel = weight_for(made, folded(conv.weight).to(made.dtype))
    return _Sum(F.conv_transpose2d(made, kernel, stride=2, padding=1), conv.bias)


def _is_of_3_by_3(conv: Any) -> bool:
    return (
        (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def folded(weight: Tensor) -> Tensor:
    """[in, out, 4, 4]: the kernel with which a transposed convolution of stride 2, padded by 1, is
    the convolution by ``weight`` [out, in, 3, 3], padded by 1, of the picture upsampled to twice
    its size by repetition. Pixel n of that is pixel n // 2, so along each axis a pixel of the
    result meets one pixel with the first or last of three weights, and another with the sum of the
    other two.
    """
    wide = weight.to(wide_of(weight.dtype))
    for axis in (2, 3):
        first, middle, last = wide.unbind(axis)
        wide = torch.stack((last, middle + last, first + middle, first), axis)
    return wide.transpose(0, 1).to(weight.dtype)
