"""Attention of one head of 512, as the decoders of Stable Diffusion have it.

``python -m benchmarks.bench_wide_attention [--device cuda] [--dtype float16] [--quick] [--csv FILE]
[--cases PART]``

Forward alone, and forward with the gradients to q, k and v; peak memory beside the inputs. Peers:
PyTorch's ``scaled_dot_product_attention`` as it chooses and with each of its backends that takes
such heads, and plain products with a softmax between, of all queries at once, where these fit.
Every row is checked against float64 for the first queries: outputs, and gradients to them; of up to
16,384 tokens also gradients to keys and values.

Share of the ceiling: that of a plain matrix product in the same run, counting two products forward
and five more with gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import measure, suite
from benchmarks.measure import Row
from benchmarks.suite import Asked
from sdcore.ops import wide_attention
from sdcore.ops.wide_attention import reference

WIDTH = 512
TOKENS, ON_A_CPU = (9216, 16384, 65536), (1024,)
CHECKED = 256  # queries
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.003, torch.float32: 1e-5}
BACKENDS = {
    "SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, math": SDPBackend.MATH,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
}
MOST = 2**29  # scores of the peers that hold all of them at once
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


def of_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return fused(q, k, v)


def ways(tokens: int) -> dict[str, Function]:
    found: dict[str, Function] = {"ours": wide_attention, "SDPA": fused}
    found |= {name: functools.partial(of_backend, one) for name, one in BACKENDS.items()}
    found["plain products"] = plain
    if tokens**2 > MOST:
        del found["plain products"], found["SDPA, math"]
    return found


def called(function: Function, backward: bool) -> Callable[..., list[Tensor]]:
    def forward_only(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [function(q, k, v)]

    def both(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        q, k, v = (one.detach().requires_grad_() for one in (q, k, v))
        out = function(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]

    return both if backward else forward_only


def checked(call: Callable[..., list[Tensor]], given: tuple[Tensor, ...]) -> tuple[str, bool]:
    """What was compared, with the peak of memory; and whether it was right."""
    found = call(*given)
    memory = peak(call, given)
    q, k, v, grad = (one.double() for one in given)
    whole = k.shape[1] <= 2**14
    rows = slice(None) if whole and len(found) > 1 else slice(CHECKED)
    exact = called(lambda q, k, v: reference(q, k, v, WIDTH**-0.5), len(found) > 1)(
        q[:, rows], k, v, grad[:, rows]
    )
    pairs = [
        (a[:, rows] if i < 2 else a, b) for i, (a, b) in enumerate(zip(found, exact, strict=True))
    ]
    off = measure.worst(
        float((a.double() - b).norm() / b.norm()) for a, b in (pairs if whole else pairs[:2])
    )
    return f"float64, off by {off:.1e}{memory}", off < TOLERANCE[given[0].dtype]


def peak(function: Callable[..., list[Tensor]], given: tuple[Tensor, ...]) -> str:
    """Memory beside what was there."""
    if not given[0].is_cuda:
        return ""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function(*given)
    torch.cuda.synchronize()
    return f", {(torch.cuda.max_memory_allocated() - before) / 1e9:.2f} GB"


def inputs(
    batch: int, tokens: int, dtype: torch.dtype, device: str
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(q, k, v, the gradient to the output), twice."""
    torch.manual_seed(0)

    def one() -> Tensor:
        return torch.randn(batch, tokens, WIDTH, device=device).to(dtype)

    return [(one(), one(), one(), one()) for _ in range(2)]


def measured(tokens: int, dtype: torch.dtype, asked: Asked) -> Iterator[Row]:
    given = inputs(1, tokens, dtype, asked.device)
    for backward in (False, True):
        case = f"{tokens} tokens, {WIDTH} wide" + (", with gradients" if backward else "")
        calls = {name: called(one, backward) for name, one in ways(tokens).items()}
        check = functools.partial(checked, given=given[0])
        work = asked.ceilings.multiplying((14 if backward else 4) * tokens**2 * WIDTH, dtype)
        yield from measure.compared("wide_attention", case, dtype, calls, given, check, work)


def rows(asked: Asked) -> Iterator[Row]:
    own = torch.bfloat16 if asked.on_gpu else torch.float32
    tokens = TOKENS[: 1 if asked.quick else None] if asked.on_gpu else ON_A_CPU
    for dtype in asked.dtypes(own, torch.float32, torch.float16, torch.bfloat16):
        for count in tokens:
            if asked.cases in str(count):
                yield from measured(count, dtype, asked)


if __name__ == "__main__":
    suite.main(rows, suite.parser_of(__doc__))
