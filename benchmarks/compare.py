"""What became slower or faster from one benchmark's CSV to another, beyond noise.

``python -m benchmarks.compare BEFORE.csv AFTER.csv [--tolerance 0.03]``

Rows of one op, case, implementation, dtype, way of timing and device are set beside each other. A
time has changed where the two medians are apart by more than three standard deviations of both
together, taken from their spreads (half the range of the middle half, 0.674 deviations of a normal
distribution), and by more than the tolerance: a machine is not the same from day to day. A time
that was taken once has no spread, and is allowed a standard deviation of a tenth. Ends with 1 if
anything became slower.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure

KEY = ("op", "case", "implementation", "dtype", "timing", "device")
DEVIATIONS, QUARTILE, UNKNOWN = 3.0, 0.674, 0.1
Key = tuple[str, ...]


@dataclass(frozen=True)
class Change:
    key: Key
    before: float  # milliseconds
    after: float
    noise: float  # one standard deviation of their difference

    @property
    def ratio(self) -> float:
        return self.after / self.before

    def verdict(self, tolerance: float) -> str:
        gap = self.after - self.before
        if abs(gap) <= max(DEVIATIONS * self.noise, tolerance * self.before):
            return "same"
        return "slower" if gap > 0 else "faster"


def read(path: Path) -> dict[Key, tuple[float, float]]:
    """Median and spread of each row.

    Raises:
        ValueError: the file is no benchmark's, or has a row twice; it says which.
        OSError: it can't be read.
    """
    found: dict[Key, tuple[float, float]] = {}
    for row in measure.read(path):
        key = tuple(getattr(row, name) for name in KEY)
        if key in found:
            raise ValueError(f"{path} has two rows of {', '.join(key)}")
        if not math.isnan(row.milliseconds):  # as of what is compared for its accuracy alone
            found[key] = row.milliseconds, row.spread
    return found


def changes(before: Path, after: Path) -> tuple[list[Change], list[str]]:
    """Of the rows that both have; and what is in one of them alone.

    Raises:
        ValueError: no row is in both, or as :func:`read`.
    """
    first, second = read(before), read(after)
    common = [key for key in first if key in second]
    if not common:
        raise ValueError(f"{before} and {after} have no row in common: {', '.join(KEY)} differ")
    found = []
    for key in common:
        noise = math.hypot(_deviation(*first[key]), _deviation(*second[key]))
        found.append(Change(key, first[key][0], second[key][0], noise))
    return found, [*_alone(before, first, second), *_alone(after, second, first)]


def _deviation(milliseconds: float, spread: float) -> float:
    return UNKNOWN * milliseconds if math.isnan(spread) else spread / QUARTILE


def _alone(path: Path, here: Collection[Key], there: Collection[Key]) -> Iterator[str]:
    """Of each op the rows that the other file lacks: how many, and the first of them."""
    ops: dict[str, list[Key]] = {}
    for key in here:
        if key not in there:
            ops.setdefault(key[0], []).append(key)
    for op, keys in ops.items():
        more = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
        yield f"only in {path}: {op}: {', '.join(keys[0][1:])}{more}"


def print_changes(found: Sequence[Change], tolerance: float) -> None:
    """Those that changed the most first; of those that did not, how many there are."""
    told = [one for one in found if one.verdict(tolerance) != "same"]
    told.sort(key=lambda one: -one.ratio)
    if told:
        head = ("", "case", "implementation", "dtype", "before, ms", "after, ms", "ratio")
        lines = [
            (
                one.verdict(tolerance), one.key[1], one.key[2], one.key[3],
                f"{one.before:.4g}", f"{one.after:.4g}", f"{one.ratio:.3f}",
            )
            for one in told
        ]  # fmt: skip
        measure.print_lines(head, lines)
    print(f"{len(found) - len(told)} of {len(found)} are the same within noise")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.03, help="(%(default)s)")
    given = parser.parse_args(arguments)
    try:
        found, alone = changes(given.before, given.after)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for line in alone:
        print(line)
    print_changes(found, given.tolerance)
    return int(any(one.verdict(given.tolerance) == "slower" for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
