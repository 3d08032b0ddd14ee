"""What :func:`sdcore.ops.masked_cross_attention` takes as its mask: which token a pixel attends to.

Each of them stays as small as it is stated: none is ever spread out to a number for each pixel and
token on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 32
STE = ("multiplicative", "additive")
INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class TokenBits:
    """A bit for each pixel and token: 12 bytes a pixel for 77 tokens, shared by all heads.

    Args:
        words: [B or 1, N, ceil(T / 32)], int32. Bit t % 32 of word t // 32 says whether the pixel
            attends to token t. Bits beyond T count for nothing.
    """

    words: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.words, Tensor):
            raise TypeError(f"words must be a tensor; got {type(self.words).__name__}")
        if self.words.dtype != torch.int32 or self.words.ndim != 3:
            raise ValueError(
                f"words must be int32 [B, N, ceil(T / {WORD})]; got {_described(self.words)}"
            )

    @classmethod
    def from_bool(cls, may_attend: Tensor) -> TokenBits:
        """From a tensor [B or 1, N, T] of bool: True where the pixel attends to the token."""
        if may_attend.dtype != torch.bool or may_attend.ndim != 3:
            raise ValueError(f"may_attend must be bool [B, N, T]; got {_described(may_attend)}")
        return cls(packed(may_attend))

    def dense(self, tokens: int) -> Tensor:
        """[B or 1, N, tokens], bool."""
        return unpacked(self.words, tokens)


@dataclass(frozen=True, eq=False)
class RegionMask:
    """A pixel attends to a token if they share a region.

    Args:
        pixels: [B or 1, N], integers: the set of regions that the pixel lies in, a bit for each.
        tokens: [B or 1, T], of the same dtype: the set of regions that the token belongs to.
            int64 holds 64 regions, int32 32 of them.
    """

    pixels: Tensor
    tokens: Tensor

    def __post_init__(self) -> None:
        for name, given in (("pixels", self.pixels), ("tokens", self.tokens)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name} must be a tensor; got {type(given).__name__}")
            if given.dtype not in INTEGERS or given.ndim != 2:
                raise ValueError(f"{name} must be integers with two axes; got {_described(given)}")
        if self.pixels.dtype != self.tokens.dtype:
            raise ValueError(
                "pixels and tokens must have one dtype; got "
                f"{self.pixels.dtype} and {self.tokens.dtype}"
            )

    @classmethod
    def from_members(cls, pixels: Tensor, tokens: Tensor) -> RegionMask:
        """From two tensors of bool: [B or 1, N, R] and [B or 1, T, R], which region has which."""
        for name, given in (("pixels", pixels), ("tokens", tokens)):
            if given.dtype != torch.bool or given.ndim != 3:
                raise ValueError(f"{name} must be bool with three axes; got {_described(given)}")
        regions = pixels.shape[-1]
        if tokens.shape[-1] != regions:
            raise ValueError(
                f"pixels and tokens must have as many regions; got {regions} and {tokens.shape[-1]}"
            )
        if regions > 64:
            raise ValueError(f"there may be 64 regions at most; got {regions}")
        dtype = torch.int32 if regions <= 32 else torch.int64
        # The last bit is the sign: a shift of one, and sums that run over.
        bits = torch.ones((), dtype=dtype, device=pixels.device) << torch.arange(
            regions, dtype=dtype, device=pixels.device
        )
        return cls(*((given * bits).sum(-1, dtype=dtype) for given in (pixels, tokens)))

    def dense(self, tokens: int) -> Tensor:
        """[B or 1, N, tokens], bool."""
        return (self.pixels[:, :, None] & self.tokens[:, None, :tokens]) != 0


@dataclass(frozen=True, eq=False)
class GateMask:
    r"""A learned gate, as MaskAttn-SDXL has it: open where z > 0, with

    .. math:: z_{nt} = \varphi_n \cdot \psi_t / \sqrt R + \text{bias}

    A pixel at which all tokens are closed attends to the one of largest z (the first of them).

    Args:
        phi: [B or 1, N, R], features of the pixels; R from 1 to 256.
        psi: [B or 1, T, R], features of the tokens, of the same dtype.
        bias: a tensor of one number; None for 0.
        ste: how the gradient comes through the threshold. Forward, both are the same. With p =
            sigmoid(z), the gate's gradient is given to p ("straight through"), and

            - ``"multiplicative"``: the gate multiplies exp(S), S the scaled product of query and
              key. Its gradient is the sum over heads of exp(S - lse)(dP - delta), also where it is
              closed, so that it may open again; S - lse counts up to 20 there.
            - ``"additive"``: (1 - gate) · (-10000) is added to S, as the published code does. A
              closed gate then has no gradient, and an open one 10,000 times the other's.

    Source: Chang, Chen, Cheng, Bogdan, *MaskAttn-SDXL*, 2025, arXiv:2509.15357.
    """

    phi: Tensor
    psi: Tensor
    bias: Tensor | None = None
    ste: str = "multiplicative"

    def __post_init__(self) -> None:
        for name, given in (("phi", self.phi), ("psi", self.psi)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name} must be a tensor; got {type(given).__name__}")
            if given.ndim != 3 or not given.is_floating_point():
                raise ValueError(f"{name} must be floats with three axes; got {_described(given)}")
        if self.phi.shape[-1] != self.psi.shape[-1] or self.phi.dtype != self.psi.dtype:
            raise ValueError(
                "phi and psi must have as many features and one dtype; got "
                f"{_described(self.phi)} and {_described(self.psi)}"
            )
        if not 1 <= self.phi.shape[-1] <= 256:
            raise ValueError(f"there may be 1 to 256 features; got {self.phi.shape[-1]}")
        if self.bias is not None and (not isinstance(self.bias, Tensor) or self.bias.numel() != 1):
            raise ValueError("bias must be a tensor of one number, or None")
        if self.ste not in STE:
            raise ValueError(f"ste must be one of {', '.join(STE)}; got {self.ste!r}")

    def logits(self) -> Tensor:
        """z [B or 1, N, T]."""
        z = self.phi @ self.psi.mT / math.sqrt(self.phi.shape[-1])
        return z if self.bias is None else z + self.bias.to(z.dtype)

    def dense(self, tokens: int) -> Tensor:
        """[B or 1, N, tokens], bool."""
        return opened(self.logits().detach()[..., :tokens])


Mask = TokenBits | RegionMask | GateMask


def opened(z: Tensor) -> Tensor:
    """Where gates with these logits are open: at least one of a row."""
    gates = z > 0
    best = torch.nn.functional.one_hot(z.argmax(-1), z.shape[-1]).bool()
    return gates | (best & ~gates.any(-1, keepdim=True))


def packed(may_attend: Tensor) -> Tensor:
    """[..., T] of bool to [..., ceil(T / 32)] of int32: token t is bit t % 32 of word t // 32."""
    tokens = may_attend.shape[-1]
    filled = torch.nn.functional.pad(may_attend, (0, -tokens % WORD)).unflatten(-1, (-1, WORD))
    bits = torch.arange(WORD, device=may_attend.device)
    # As 64 bits, of which the lower half is the word: the last bit is its sign.
    return (filled.long() << bits).sum(-1).to(torch.int32)


def unpacked(words: Tensor, tokens: int) -> Tensor:
    """The reverse of :func:`packed`: [..., tokens], bool."""
    bits = torch.arange(WORD, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> bits) & 1).bool().flatten(-2)[..., :tokens]


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
