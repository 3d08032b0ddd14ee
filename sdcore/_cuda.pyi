from typing import TypedDict

class Device(TypedDict):
    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    shared_memory_per_block: int
    l2_bytes: int
    memory_bytes: int

version: str
architectures: list[int]

def devices() -> list[Device]: ...

# Addresses are those of device memory, a stream is its handle, 0 the default stream. Both calls
# only enqueue; the caller keeps the memory alive.

def shared_atomics(
    out: int,
    bins: int,
    updates_per_thread: int,
    blocks: int,
    threads: int,
    seed: int,
    device: int,
    stream: int,
) -> None: ...
def shared_gathers(
    table: int,
    bins: int,
    out: int,
    reads_per_thread: int,
    blocks: int,
    threads: int,
    seed: int,
    device: int,
    stream: int,
) -> None: ...

# The stages of sliced Wasserstein by binning; csrc/cuda/sliced_wasserstein.h says what they do.

Points = tuple[int, str, tuple[int, ...], tuple[int, ...]]  # address, dtype, shape, strides
Directions = tuple[int, int]  # address, count
Ends = tuple[str, int, float, float]  # "found" or "given", address; "box", 0, low, high
Histograms = tuple[int, int, int, int, int]  # masses, totals, bits, pitch, chunks
Side = tuple[Points, int, Histograms, int, int, int]  # weights; first chunk, chunks, group
Place = tuple[int, int]  # device, stream

sliced_wasserstein_part: int

def sliced_wasserstein_plan(
    n: int,
    others: int,
    dim: int,
    batch: int,
    directions: int,
    bins: int,
    weighted: bool,
    is_double: bool,
    device: int,
    /,
) -> tuple[int, int, int, int, int]: ...
def sliced_wasserstein_range(
    sides: list[Points], directions: Directions, extremes: int, place: Place, /
) -> None: ...
def sliced_wasserstein_histogram(
    sides: list[Side],
    directions: Directions,
    ends: Ends,
    bins: int,
    finished: int,
    place: Place,
    /,
) -> None: ...
def sliced_wasserstein_solve(
    x: Histograms,
    y: Histograms,
    one_y: bool,
    directions: Directions,
    dim: int,
    ends: Ends,
    batch: int,
    bins: int,
    p: int,
    values: int,
    scale: float | None,
    table_x: int,
    table_y: int,
    edges: int,
    costs: int,
    finished: int,
    moments: int,
    is_double: bool,
    place: Place,
    /,
) -> None: ...
def sliced_wasserstein_gather(
    grad: int,
    grad_stride: tuple[int, int],
    points: Points,
    directions: Directions,
    weights: int,
    mass: float,
    table: int,
    edges: int,
    bins: int,
    out: Points,
    place: Place,
    /,
) -> None: ...
