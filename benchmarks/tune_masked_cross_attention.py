"""Times of the tiles that masked cross-attention may be given, to choose among them.

``python -m benchmarks.tune_masked_cross_attention [--cases PART] [--masks none bits ...]``

A line for each case, mask and tile: microseconds of the forward, or with gradients, in a CUDA
graph; ``checked`` against float64 as the benchmark does. The tile in use comes first.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks import measure
from benchmarks.bench_masked_cross_attention import (
    CASES,
    Case,
    Masks,
    bound,
    called,
    error,
    exact,
    ours,
)
from benchmarks.ceilings import Ceilings
from sdcore.triton_kernels import masked_cross_attention as kernels

# Rows, warps, stages, programs of a multiprocessor; with gradients, whether sums are transposed.
FORWARD = ((64, 4, 1, 4), (64, 4, 1, 6), (128, 8, 1, 2))
BACKWARD = (
    (64, 4, 2, 2, True),
    (64, 4, 3, 2, True),
    (64, 8, 2, 1, True),
    (64, 8, 3, 1, True),
    (128, 8, 2, 1, True),
    (128, 8, 3, 1, True),
)


def tiles(backward: bool) -> Iterator[tuple[str, Any]]:
    """Its name, and what to put in the place of the function that chooses."""
    name = "backward_tile" if backward else "forward_tile"
    yield "in use", getattr(kernels, name)
    for numbers in BACKWARD if backward else FORWARD:
        yield str(numbers), functools.partial(_tile, numbers)


def _tile(numbers: Sequence[Any], _like: Any, tokens: int, *_others: Any) -> Any:
    rows, *rest = numbers
    return kernels.Tile(rows, *kernels.token_tiles(tokens), *rest)


def lines(case: Case, masks: Sequence[str], backward: bool) -> Iterator[str]:
    given, inputs = Masks.of(case, "cuda"), case.inputs("cuda", backward)
    what = "forward and backward" if backward else "forward"
    for name, function, mask in ours(given):
        form = name.removeprefix("ours, ")
        if form not in masks:
            continue
        call = called(function, backward)
        wanted = exact(inputs[0], mask, backward)
        for tile, choose in tiles(backward):
            part = "backward_tile" if backward else "forward_tile"
            with mock.patch.object(kernels, part, choose):
                try:
                    off = error(call(*inputs[0]), wanted)
                    taken, spread, _ = measure.milliseconds(call, inputs, "cuda")
                except RuntimeError as problem:
                    yield f"{case}, {what}, {form}, {tile}: {str(problem).splitlines()[0][:80]}"
                    continue
            good = "checked" if off <= bound(mask) else f"WRONG by {off:.2g}"
            numbers = f"{1e3 * taken:8.1f} ± {1e3 * spread:.1f} µs"
            yield f"{case}, {what:20} {form:8} {tile:22} {numbers}  {good}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="", help="only those whose names have this part")
    parser.add_argument("--masks", nargs="+", default=["no mask", "bits", "regions", "gate"])
    given = parser.parse_args()
    print(torch.cuda.get_device_name(), f"copy {Ceilings('cuda').copy / 1e12:.2f} TB/s")
    for case in CASES["cuda"]:
        if given.cases in str(case):
            for backward in (False, True):
                for line in lines(case, given.masks, backward):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
