"""Cross-attention to 77 tokens under a mask, against what else there is.

``python -m benchmarks.bench_masked_cross_attention [--device cuda] [--dtype float16]
[--quick] [--csv FILE] [--cases PART]``

Forward alone, and forward with the gradients to q, k and v, of inputs as a UNet's linear layers
leave them, [B, N, H, D]. Peers: PyTorch's ``scaled_dot_product_attention`` as it chooses and with
cuDNN, without a mask and with one of the inputs' dtype or of bool; FlexAttention, compiled, with
the same mask as a ``score_mod``; ``xformers`` where it is installed. Masks hold the same in each:
tokens that a pixel may attend to, by regions. Ours: without a mask, as bits, as regions, as a
learned gate of 128 features, which is computed in it, and added to the scores. With --quick ours
are without a mask and as bits, and FlexAttention is left out.

Share of the ceiling: the time in which a copy moves q and the output (with gradients also q again,
the gradient to the output and that to q), over the time taken.

"faster than" compares with SDPA's fastest way with a mask, with its fastest without, and with ours
without a mask.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import measure, suite
from benchmarks.measure import Row
from benchmarks.suite import Asked
from sdcore.masks import GateMask, Mask, RegionMask, TokenBits
from sdcore.ops import masked_cross_attention
from sdcore.ops.masked_cross_attention import reference

TOKENS, REGIONS, FEATURES = 77, 4, 128
# Of outputs and gradients: bfloat16's epsilon is 0.008, and float32's products may be in TF32.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 0.001}
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    n: int
    d: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"({self.batch}, {self.heads}, {self.n}, {self.d}), {TOKENS} tokens"

    @property
    def bytes(self) -> int:
        """Of q, and of the output."""
        return self.batch * self.heads * self.n * self.d * self.dtype.itemsize

    def inputs(self, device: str, backward: bool) -> list[tuple[Tensor, ...]]:
        """(q, k, v, the gradient to the output), several times over where that makes them cold."""
        generator = torch.Generator(device).manual_seed(0)

        def some(rows: int) -> Tensor:
            shape = (self.batch, rows, self.heads, self.d)
            made = torch.randn(shape, device=device, generator=generator).to(self.dtype)
            return made.transpose(1, 2).requires_grad_(backward)

        return [
            (some(self.n), some(TOKENS), some(TOKENS), some(self.n).detach())
            for _ in range(measure.sets_for(2 * self.bytes, device))
        ]


CASES = {
    "cuda": [
        Case(2, 10, 4096, 64),
        Case(2, 20, 1024, 64),
        Case(2, 8, 4096, 40),
        Case(16, 10, 4096, 64),
    ],
    "cpu": [Case(2, 8, 1024, 40, torch.float32), Case(2, 8, 4096, 40, torch.float32)],
}


@dataclass(frozen=True)
class Masks:
    """One mask in all its forms, and a gate that is about as often open."""

    regions: RegionMask
    bits: TokenBits
    gate: GateMask
    added: Tensor  # [B, 1, N, T]
    allowed: Tensor  # the same, bool

    @classmethod
    def of(cls, case: Case, device: str) -> Masks:
        generator = torch.Generator(device).manual_seed(1)
        pixels = torch.rand(case.batch, case.n, REGIONS, device=device, generator=generator) < 0.5
        tokens = torch.rand(case.batch, TOKENS, REGIONS, device=device, generator=generator) < 0.3
        tokens[:, 0], pixels[..., 0] = True, True  # each pixel has something to attend to
        regions = RegionMask.from_members(pixels, tokens)
        allowed = regions.dense(TOKENS)
        added = torch.zeros(allowed.shape, device=device, dtype=case.dtype)
        added = added.masked_fill(~allowed, float("-inf"))
        phi, psi = (
            torch.randn(case.batch, rows, FEATURES, device=device, generator=generator)
            for rows in (case.n, TOKENS)
        )
        gate = GateMask(
            phi.to(case.dtype), psi.to(case.dtype), torch.zeros(1, device=device), "multiplicative"
        )
        bits = TokenBits.from_bool(allowed)
        return cls(regions, bits, gate, added[:, None], allowed[:, None])


def peers(case: Case, masks: Masks, asked: Asked) -> Iterator[tuple[str, Function, Any]]:
    """Name, function of (q, k, v), and the mask by which to check it."""
    forms = {"no mask": None, "mask of its dtype": masks.added, "mask of bool": masks.allowed}
    for form, mask in forms.items():
        yield f"SDPA, {form}", functools.partial(_sdpa, mask), mask
        if asked.on_gpu:
            cudnn = functools.partial(_with, SDPBackend.CUDNN_ATTENTION, mask)
            yield f"SDPA with cuDNN, {form}", cudnn, mask
    if asked.on_gpu and not asked.quick:
        torch._dynamo.reset()  # after eight kinds of calls it would compile no more
        yield "FlexAttention, score_mod", _flex(masks.allowed), masks.allowed
    if asked.on_gpu:
        # Its masks must lie at multiples of eight numbers.
        padded = torch.nn.functional.pad(masks.added, (0, -TOKENS % 8))[..., :TOKENS]
        yield "xformers, mask of its dtype", functools.partial(_xformers, padded), masks.added


def ours(masks: Masks, quick: bool) -> Iterator[tuple[str, Function, Any]]:
    forms: dict[str, Mask | Tensor | None] = {
        "no mask": None,
        "bits": masks.bits,
        "regions": masks.regions,
        "gate": masks.gate,
        "added": masks.added,
    }
    for form, mask in list(forms.items())[: 2 if quick else None]:
        yield f"ours, {form}", functools.partial(masked_cross_attention, mask=mask), mask


def _sdpa(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _with(backend: Any, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return _sdpa(mask, q, k, v)


def _flex(allowed: Tensor) -> Function:
    from torch.nn.attention.flex_attention import flex_attention

    def score_mod(score: Tensor, b: Tensor, h: Tensor, n: Tensor, t: Tensor) -> Tensor:
        return torch.where(allowed[b, 0, n, t], score, -float("inf"))

    return torch.compile(functools.partial(flex_attention, score_mod=score_mod), dynamic=False)


def _xformers(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    heads = q.shape[1]
    bias = mask.expand(-1, heads, -1, -1)
    found = memory_efficient_attention(*(one.transpose(1, 2) for one in (q, k, v)), attn_bias=bias)
    return found.transpose(1, 2)


def called(function: Function, backward: bool) -> Function:
    def forward_only(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        return [function(q, k, v)]

    def both(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        out = function(q, k, v)
        return [out, *torch.autograd.grad(out, (q, k, v), grad)]

    return both if backward else forward_only


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    pairs = zip(found, (one.detach() for one in wanted), strict=True)
    return measure.worst(
        float((one.detach().double() - right).norm() / right.norm()) for one, right in pairs
    )


def bound(mask: Any, dtype: torch.dtype) -> float:
    """Of the error. A gate near its threshold may open in one rounding and not in another."""
    return 0.1 if isinstance(mask, GateMask) else TOLERANCE[dtype]


def exact(inputs: tuple[Tensor, ...], mask: Any, backward: bool) -> list[Tensor]:
    """By the specification, in float64."""
    q, k, v, grad = (one.detach().double() for one in inputs)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = TokenBits.from_bool(mask[:, 0])
    elif isinstance(mask, Tensor):
        mask = mask.double()
    elif isinstance(mask, GateMask):
        # What is open is decided in the dtype that is measured.
        mask = TokenBits.from_bool(mask.dense(TOKENS))
    q, k, v = (one.requires_grad_(backward) for one in (q, k, v))
    return called(functools.partial(reference, mask=mask), backward)(q, k, v, grad)


def rows_of(case: Case, backward: bool, asked: Asked) -> list[Row]:
    masks, inputs = Masks.of(case, asked.device), case.inputs(asked.device, backward)
    work = asked.ceilings.copying((5 if backward else 2) * case.bytes)
    rows = []
    for name, function, mask in (*ours(masks, asked.quick), *peers(case, masks, asked)):
        call = called(function, backward)
        try:
            off = error(call(*inputs[0]), exact(inputs[0], mask, backward))
            passed = off <= bound(mask, case.dtype)
            if not passed and name.startswith("ours"):
                raise measure.WrongError(
                    f"{case}: {name} is off by {off:.3g}, more than {bound(mask, case.dtype)}"
                )
            taken = measure.milliseconds(call, inputs, asked.device)
        except (RuntimeError, ImportError, ValueError) as problem:
            if name.startswith("ours"):
                raise
            measure.skipped(f"{case}: {name}", str(problem))
            continue
        rows.append(
            Row(
                "masked_cross_attention",
                f"{case}, {'forward and backward' if backward else 'forward'}",
                name,
                str(case.dtype).removeprefix("torch."),
                *taken,
                f"float64, off by {off:.1e}",
                passed=passed,
            ).against(work)
        )
    _compare(rows)
    return rows


def _compare(rows: list[Row]) -> None:
    def fastest(start: str, part: str) -> float | None:
        times = [
            row.milliseconds
            for row in rows
            if row.implementation.startswith(start) and part in row.implementation
        ]
        return min(times, default=None)

    against = {
        "SDPA masked": fastest("SDPA", "mask of"),
        "SDPA": fastest("SDPA", "no mask"),
        "ours, no mask": fastest("ours", "no mask"),
    }
    for row in rows:
        if row.implementation.startswith("ours"):
            row.ratios = {
                name: time / row.milliseconds for name, time in against.items() if time is not None
            }


def rows(asked: Asked) -> Iterator[Row]:
    if not asked.has(torch.float32, torch.float16, torch.bfloat16):
        return
    for case in CASES[asked.device][: 1 if asked.quick else None]:
        if asked.cases not in str(case):
            continue
        case = dataclasses.replace(case, dtype=asked.dtype or case.dtype)
        for backward in (False, True):
            yield from rows_of(case, backward, asked)


if __name__ == "__main__":
    suite.main(rows, suite.parser_of(__doc__))
