"""Speed of Delta Sampling's arithmetic: combination, guidance and a step of six predictions.

``python -m benchmarks.bench_delta_combine [--device cuda] [--dtype float16] [--quick] [--csv FILE]
[--cases PART]``

Latents of 1024 pixels, one picture and 64, in bfloat16: DDIM's next sample of guided epsilon
predictions, and of v predictions with a delta of epsilon predictions; guidance rescaled; and one
elementwise addition of two of the tensors, the least that a launch can do. Against the same formula
in plain PyTorch and as ``torch.compile`` makes it. On a GPU each once in a CUDA graph, with cold
inputs, and once called from Python, wall clock. Every row is checked against float64 in the run;
the share of the ceiling is that of the bandwidth of a copy, by bytes read and written once,
predictions twice where guidance is rescaled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, suite
from benchmarks.measure import Row
from benchmarks.suite import Asked
from sdcore.ops import delta_combine

SHAPES = ((1, 4, 128, 128), (64, 4, 128, 128))
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-5}
CALLS = 200  # from Python, of which the median counts
LEVELS = {"alpha": 0.8, "sigma": 0.6, "next_alpha": 0.9, "next_sigma": 0.436}
STRENGTH, GUIDANCE = 0.7, 5.0
V = ("v_prediction", "epsilon", "epsilon")
WORK: dict[str, dict[str, Any]] = {
    "epsilon": {},
    "v and epsilon": {"prediction_type": V},
    "epsilon, rescaled": {"guidance_rescale": 0.7},
}


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, ...]:
    """Predictions of both branches of three models, the sample, and its levels."""
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(rows: int) -> Tensor:
        size = (rows, *shape[1:])
        return torch.randn(size, generator=generator, device=device).to(dtype)

    levels = [torch.tensor(value, device=device) for value in LEVELS.values()]
    return (*(drawn(2 * shape[0]) for _ in range(3)), drawn(shape[0]), *levels)


def ours(options: dict[str, Any]) -> Callable[..., Tensor]:
    def call(target: Tensor, source: Tensor, adapted: Tensor, sample: Tensor, *levels: Tensor):
        return delta_combine(
            target, source, adapted, sample=sample, strength=STRENGTH, guidance_scale=GUIDANCE,
            output="next", **dict(zip(LEVELS, levels, strict=True)), **options,
        )  # fmt: skip

    return call


def plain(options: dict[str, Any]) -> Callable[..., Tensor]:
    """The formula as one writes it down for these cases, in float32 inside."""
    v = options.get("prediction_type") == V
    rescale = options.get("guidance_rescale", 0.0)

    def call(
        target: Tensor, source: Tensor, adapted: Tensor, sample: Tensor, *levels: Tensor
    ) -> Tensor:
        wide = torch.float64 if target.dtype == torch.float64 else torch.float32
        alpha, sigma, next_alpha, next_sigma = (one.to(wide) for one in levels)
        t, s, a, x = (one.to(wide) for one in (target, source, adapted, sample))
        t = t + STRENGTH * (a - s) * (1 / alpha if v else 1)  # alpha² + sigma² is 1
        u, c = t.chunk(2)
        p = u + GUIDANCE * (c - u)
        if rescale:
            axes = tuple(range(1, p.ndim))
            ratio = c.std(axes, keepdim=True) / p.std(axes, keepdim=True)
            p = p * (rescale * ratio + 1 - rescale)
        if v:
            clean, noise = alpha * x - sigma * p, alpha * p + sigma * x
        else:
            clean, noise = (x - sigma * p) / alpha, p
        return (next_alpha * clean + next_sigma * noise).to(sample.dtype)

    return call


def added(target: Tensor, source: Tensor, *_: Any) -> Tensor:
    """One row of each, so as many values as the result has."""
    half = len(target) // 2
    return target[:half] + source[:half]


def from_python(
    call: Callable[..., Any], given: list[tuple[Any, ...]], device: str
) -> tuple[float, float]:
    """Wall-clock milliseconds of calls, each waited for alone: median and spread."""
    taken = []
    for number in range(CALLS + 20):
        start = time.perf_counter()
        call(*given[number % len(given)])
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - start))
    return measure.of_samples(taken[20:])


def rows_of(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    asked: Asked,
) -> Iterator[Row]:
    device, values = asked.device, torch.Size(shape).numel()
    sets = measure.sets_for(8 * values * dtype.itemsize, device)
    given = [inputs(shape, dtype, device, n) for n in range(sets)]
    case = f"({', '.join(map(str, shape))})"
    timings = ("from Python", "graph") if asked.on_gpu else ("from Python",)
    addition = {
        how: timed(added, None, given, case, "an addition", how, asked, 3) for how in timings
    }
    yield from addition.values()
    for name, options in list(WORK.items())[: 1 if asked.quick else None]:
        # A rescaling reads predictions twice.
        count = 8 + (6 if "guidance_rescale" in options else 0)
        others = {
            "plain PyTorch": plain(options),
            "torch.compile": torch.compile(plain(options), dynamic=False),
        }
        ways = {"ours": ours(options), **asked.peers(others)}
        for how in timings:
            found: list[Row] = []
            for who, call in ways.items():
                try:
                    row = timed(call, options, given, case, name, how, asked, count, who)
                except Exception as problem:  # torch.compile may lack a compiler, and more
                    if who == "ours":
                        raise
                    measure.skipped(f"{case}, {name}: {who}", str(problem))
                    continue
                found.append(row)
            first, *others = found
            first.ratios = {
                other.implementation: other.milliseconds / first.milliseconds for other in others
            }
            first.ratios["an addition"] = addition[how].milliseconds / first.milliseconds
            yield from found


def timed(
    call: Callable[..., Tensor],
    options: dict[str, Any] | None,
    given: list[tuple[Tensor, ...]],
    case: str,
    name: str,
    how: str,
    asked: Asked,
    count: int,
    who: str = "an addition",
) -> Row:
    """Of one way. ``count``: how many times as many values as the sample's are read or written."""
    check, passed = checked(call, options, given[0])
    if not passed and who == "ours":
        raise measure.WrongError(f"{case}, {name}: {check}")
    sample = given[0][3]
    if how == "graph":
        taken = measure.milliseconds(call, given, asked.device)
    else:
        taken = *from_python(call, given, asked.device), how
    row = Row(
        "delta_combine", f"{case}, {name}, {how}", who, measure.dtype_name(sample.dtype), *taken,
        check, passed=passed,
    )  # fmt: skip
    if how == "from Python" and asked.on_gpu:
        return row  # most of it is the launch
    return row.against(asked.ceilings.copying(count * sample.numel() * sample.element_size()))


def checked(
    call: Callable[..., Tensor], options: dict[str, Any] | None, given: tuple[Tensor, ...]
) -> tuple[str, bool]:
    function = added if options is None else plain(options)
    exact = function(*(one.double() for one in given))
    off = float((call(*given).double() - exact).norm() / exact.norm())
    return f"float64, off by {off:.1e}", off < TOLERANCE[given[0].dtype]


def rows(asked: Asked) -> Iterator[Row]:
    shapes = SHAPES[: 1 if asked.quick else None]
    for dtype in asked.dtypes(torch.bfloat16, torch.float16, torch.float32):
        for shape in shapes:
            if asked.cases in str(shape):
                yield from rows_of(shape, dtype, asked)


if __name__ == "__main__":
    suite.main(rows, suite.parser_of(__doc__))
