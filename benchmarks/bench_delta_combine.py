"""Speed of Delta Sampling's arithmetic: combination, guidance and a step of six predictions.

``python -m benchmarks.bench_delta_combine [--device cuda] [--csv FILE]``

Latents of 1024 pixels, one picture and 64, in bfloat16: DDIM's next sample of guided epsilon
predictions, and of v predictions with a delta of epsilon predictions; guidance rescaled; and one
elementwise addition of two of the tensors, the least that a launch can do. Against the same formula
in plain PyTorch and as ``torch.compile`` makes it. On a GPU each once in a CUDA graph, with cold
inputs, and once called from Python, wall clock. Every row is checked against float64 in the run;
the share of the ceiling is that of the bandwidth of a copy, by bytes read and written once,
predictions twice where guidance is rescaled.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Row
from sdcore.ops import delta_combine

SHAPES = ((1, 4, 128, 128), (64, 4, 128, 128))
DTYPE = torch.bfloat16
CALLS = 200  # from Python, of which the median counts
LEVELS = {"alpha": 0.8, "sigma": 0.6, "next_alpha": 0.9, "next_sigma": 0.436}
STRENGTH, GUIDANCE = 0.7, 5.0
V = ("v_prediction", "epsilon", "epsilon")
WORK: dict[str, dict[str, Any]] = {
    "epsilon": {},
    "v and epsilon": {"prediction_type": V},
    "epsilon, rescaled": {"guidance_rescale": 0.7},
}


def inputs(shape: tuple[int, ...], device: str, seed: int) -> tuple[Tensor, ...]:
    """Predictions of both branches of three models, the sample, and its levels."""
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(rows: int) -> Tensor:
        size = (rows, *shape[1:])
        return torch.randn(size, generator=generator, device=device).to(DTYPE)

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


def from_python(call: Callable[..., Any], given: list[tuple[Any, ...]], device: str) -> float:
    """Median wall-clock milliseconds of calls, each waited for alone."""
    taken = []
    for number in range(CALLS + 20):
        start = time.perf_counter()
        call(*given[number % len(given)])
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken[20:])


def rows_of(shape: tuple[int, ...], device: str, ceiling: float) -> list[Row]:
    values = torch.Size(shape).numel()
    size = torch.finfo(DTYPE).bits // 8
    given = [inputs(shape, device, n) for n in range(measure.sets_for(8 * values * size, device))]
    case = f"({', '.join(map(str, shape))})"
    ways: list[tuple[str, str, Callable[..., Tensor], int]] = [("an addition", "", added, 3)]
    for name, options in WORK.items():
        # A rescaling reads predictions twice.
        count = 8 + (6 if "guidance_rescale" in options else 0)
        ways.append((name, "ours", ours(options), count))
        ways.append((name, "plain PyTorch", plain(options), count))
        compiled = torch.compile(plain(options), dynamic=False)
        ways.append((name, "torch.compile", compiled, count))
    rows: list[Row] = []
    times: dict[tuple[str, str, str], float] = {}
    for name, who, call, count in ways:
        check = checked(call, WORK.get(name), given[0])
        timings = [("from Python", from_python(call, given, device), 0.0)]
        if device == "cuda":
            taken, spread, _ = measure.milliseconds(call, given, device)
            timings.append(("graph", taken, spread))
        for how, taken, spread in timings:
            times[name, who, how] = taken
            share = count * values * size / (taken * 1e-3) / ceiling if how == "graph" else 0
            rows.append(
                Row(
                    "delta_combine", f"{case}, {name}, {how}", who or name, "bfloat16", taken,
                    spread, how, check, f"{100 * share:.0f} %" if share else "",
                    device=device,
                )
            )  # fmt: skip
    for row in rows:
        name, how = row.case.removeprefix(f"{case}, ").rsplit(", ", 1)
        row.ratios = {
            other: times[name, other, how] / row.milliseconds
            for other in ("plain PyTorch", "torch.compile")
            if row.implementation == "ours"
        }
        if row.implementation == "ours":
            row.ratios["an addition"] = times["an addition", "", how] / row.milliseconds
    return rows


def checked(
    call: Callable[..., Tensor], options: dict[str, Any] | None, given: tuple[Tensor, ...]
) -> str:
    function = added if options is None else plain(options)
    exact = function(*(one.double() for one in given))
    off = float((call(*given).double() - exact).norm() / exact.norm())
    if not off < 2**-8:
        raise SystemExit(f"off by {off:.2g} from float64")
    return f"float64, off by {off:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    ceiling = measure.copy_bandwidth() if given.device == "cuda" else 1.0
    if given.device == "cuda":
        print(f"copy {ceiling / 1e12:.2f} TB/s")
    rows = [row for shape in SHAPES for row in rows_of(shape, given.device, ceiling)]
    measure.report(rows, given.csv)


if __name__ == "__main__":
    main()
