// The ceilings of histogramming: how many random updates, and random reads, of a table in shared
// memory a GPU can do in a second. Benchmarks run these beside the kernels that they measure.
#pragma once

#include <cstdint>

namespace sdcore {

// blocks x threads x updates_per_thread increments of pseudo-random counters. Each block counts
// in shared memory and then adds its counts to out, uint32 [bins].
void shared_atomics(std::uintptr_t out, std::int64_t bins, std::int64_t updates_per_thread,
                    std::int64_t blocks, std::int64_t threads, std::uint64_t seed, int device,
                    std::uintptr_t stream);

// blocks x threads x reads_per_thread pseudo-random reads of table, float32 [bins], from a copy
// that each block keeps in shared memory. out, float32 [blocks * threads], is each thread's sum.
void shared_gathers(std::uintptr_t table, std::int64_t bins, std::uintptr_t out,
                    std::int64_t reads_per_thread, std::int64_t blocks, std::int64_t threads,
                    std::uint64_t seed, int device, std::uintptr_t stream);

}  // namespace sdcore
