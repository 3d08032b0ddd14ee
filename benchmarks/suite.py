"""What each benchmark is asked for, and the command that each of them is.

A benchmark is a module ``bench_<op or method>`` with a function ``rows(asked)`` that measures and
yields rows, case by case: what was yielded is kept whatever comes after it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.ceilings import Ceilings
from benchmarks.measure import Row

SIZES = ("quick", "default", "full")
DTYPES = {measure.dtype_name(one): one for one in (torch.float32, torch.float16, torch.bfloat16)}


@dataclass
class Asked:
    device: str
    size: str = "default"  # one of SIZES
    dtype: torch.dtype | None = None  # None: the benchmark's own
    cases: str = ""  # only those whose names have this part
    options: dict[str, Any] = field(default_factory=dict)  # of one benchmark alone

    def __post_init__(self) -> None:
        self.ceilings = Ceilings(self.device)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def quick(self) -> bool:
        return self.size == "quick"

    @property
    def full(self) -> bool:
        return self.size == "full"

    @property
    def full_models(self) -> bool:
        """Whether models have the sizes of Stable Diffusion's, and not those of the embedded."""
        return self.on_gpu and not self.quick

    def peers(self, all: dict[str, Any]) -> dict[str, Any]:
        """Without those that have to be compiled for each case, where it has to be quick."""
        return {name: one for name, one in all.items() if not (self.quick and "compile" in name)}

    def dtypes(self, own: torch.dtype, *others: torch.dtype) -> list[torch.dtype]:
        """The one to measure: a benchmark's own, or that which is asked for, if it has it."""
        if self.dtype is None:
            return [own]
        return [self.dtype] if self.has(own, *others) else []

    def has(self, *dtypes: torch.dtype) -> bool:
        """Whether one of these is asked for; else a line says that there are no others."""
        if self.dtype is None or self.dtype in dtypes:
            return True
        known = ", ".join(map(measure.dtype_name, dtypes))
        measure.skipped(measure.dtype_name(self.dtype), f"only {known} is measured here")
        return False


Rows = Callable[[Asked], Iterator[Row]]


def shared_options(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="(%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="instead of the benchmarks' own")
    sizes = parser.add_mutually_exclusive_group()
    for size, help in (
        ("quick", "few small cases, and no peer that has to be compiled"),
        ("default", "what is told in the README, but for what takes long to compile"),
        ("full", "and what takes long"),
    ):
        sizes.add_argument(f"--{size}", dest="size", action="store_const", const=size, help=help)
    parser.set_defaults(size="default")


def asked_by(given: argparse.Namespace) -> Asked:
    options = vars(given)
    dtype = DTYPES.get(given.dtype or "")
    return Asked(given.device, given.size, dtype, options.get("cases", ""), options)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared_options(parser)
    parser.add_argument("--csv", type=Path, help="put the rows in there")
    parser.add_argument("--cases", default="", metavar="PART", help="those whose names have this")
    return parser


def main(rows: Rows, parser: argparse.ArgumentParser) -> None:
    """The command of one benchmark."""
    run(rows, parser.parse_args())


def run(rows: Rows, given: argparse.Namespace) -> None:
    asked = asked_by(given)
    found: list[Row] = []
    try:
        for row in collected(rows, asked, found):
            print(f"{row.case}, {row.implementation}: {row.milliseconds:.4g} ms", flush=True)
            if given.csv:
                measure.write([*asked.ceilings.rows, *found], given.csv)
    except measure.WrongError as error:
        raise SystemExit(str(error)) from None
    if not found:
        raise SystemExit("nothing of that name runs here")
    print(f"\n{found[0].device}; {found[0].versions}; {found[0].commit}\n")
    measure.print_table([*asked.ceilings.rows, *found])
    if given.csv:
        # Ratios to ways that came later are only in now.
        measure.write([*asked.ceilings.rows, *found], given.csv)
        print(f"\nwritten to {given.csv}")


def collected(rows: Rows, asked: Asked, found: list[Row]) -> Iterator[Row]:
    """The rows, finished, and put into ``found``; ceilings that were measured for them, too."""
    for row in rows(asked):
        for one in (*asked.ceilings.rows, row):
            if not one.device:
                measure.finished(one, asked.device)
        found.append(row)
        yield row
