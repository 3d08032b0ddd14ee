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
Rescale = tuple[float, float, float, float] | None  # factor, offset, low, high
# weights; first chunk, chunks, group
Side = tuple[Points, Rescale, int, Histograms, int, int, int]
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
    rescale: Rescale,
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

# Radix sort; csrc/cuda/sort.h. Two buffers each of keys and of 32-bit payload (0: none).

Buffers = tuple[int, int]

def radix_sort_workspace(
    count: int, key_bytes: int, with_payload: bool, bits: int, device: int, /
) -> int: ...
def radix_sort(
    keys: Buffers,
    payload: Buffers,
    key_bytes: int,
    count: int,
    bits: int,
    workspace: int,
    bytes: int,
    place: Place,
    /,
) -> int: ...

# The stages of sliced Wasserstein by sorting; csrc/cuda/sliced_wasserstein_exact.h.

Pass = tuple[int, int, int]  # first, slots, directions
Kept = tuple[int, int, int, bool]  # values, levels, count, one
Bucketed = tuple[int, int, int, int]  # slopes, places, bits, count
Sorted = tuple[int, Kept, int, Bucketed, int, int]  # keys, kept, number, bucketed, cursors, moments

def sliced_wasserstein_grid(
    extremes: int,
    kept: Kept,
    weights: tuple[int, int],
    count: tuple[int, int],
    batch: int,
    directions: int,
    bits: int,
    exponents: int,
    poison: int,
    is_double: bool,
    place: Place,
    /,
) -> None: ...
def sliced_wasserstein_keys(
    points: Points,
    directions: Directions,
    pass_: Pass,
    bits: int,
    exponents: int,
    poison: int,
    keys: int,
    number: int,
    place: Place,
    /,
) -> None: ...
def sliced_wasserstein_project(
    points: Points, directions: Directions, pass_: Pass, out: int, place: Place, /
) -> None: ...
def sliced_wasserstein_prefix_chunks(count: int, /) -> int: ...
def sliced_wasserstein_levels(
    number: int, weights: int, count: int, pass_: Pass, levels: int, totals: int, place: Place, /
) -> None: ...
def sliced_wasserstein_transport_blocks(n: int, m: int, is_double: bool, /) -> int: ...
def sliced_wasserstein_transport(
    x: Sorted,
    y: Sorted,
    pass_: Pass,
    bits: int,
    exponents: int,
    poison: int,
    p: int,
    costs: int,
    totals: int,
    values: int,
    is_double: bool,
    place: Place,
    /,
) -> None: ...
def sliced_wasserstein_bucket_bits(count: int, is_double: bool, /) -> int: ...
def sliced_wasserstein_can_pull_buckets(bits: int, /) -> bool: ...
def sliced_wasserstein_unpack(
    from_: Bucketed, slots: int, out: int, finite: bool, is_double: bool, place: Place, /
) -> None: ...
def sliced_wasserstein_pull(
    from_: Bucketed,
    directions: Directions,
    dim: int,
    pass_: Pass,
    grad: int,
    scale: float,
    weights: int,
    out: int,
    is_double: bool,
    place: Place,
    /,
) -> None: ...
def sliced_wasserstein_most_small_points(device: int, /) -> int: ...
def sliced_wasserstein_small(
    x: int, y: int, slots: int, count: int, p: int, values: int, slopes: int, place: Place, /
) -> None: ...
