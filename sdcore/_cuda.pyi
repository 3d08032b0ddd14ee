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
