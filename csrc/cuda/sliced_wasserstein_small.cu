// Sorting sets that fit one block's shared memory: a launch where the general way takes some ten,
// and no pass over memory. Of sets with as many points of equal weight, i meets i.
#include <cub/block/block_radix_rank.cuh>
#include <cub/block/block_reduce.cuh>

#include "chip.h"
#include "fixed.cuh"
#include "launch.cuh"
#include "search.cuh"
#include "sliced_wasserstein_exact.h"

namespace sdcore {
namespace {

// A block's threads, and points of a thread: of few points few threads, so that a multiprocessor
// has several blocks, and the digits' counters, of which each warp has its own, are fewer.
constexpr int kFewThreads = 128, kThreads = 512;
constexpr int kEach = 8, kMostEach = 32;
// Of a projection in fixed point, and of a digit: three passes.
constexpr int kBits = 27, kDigit = 9;

struct Digits {
  int shift;
  __device__ uint32_t Digit(uint32_t key) const { return key >> shift & ((1u << kDigit) - 1); }
};

template <int Threads, int Each>
struct Sorters {
  // Ranks by votes of a warp: equal digits keep their order.
  using Rank = cub::BlockRadixRankMatchEarlyCounts<Threads, kDigit, false>;
  using Reduce = cub::BlockReduce<double, Threads>;
  static constexpr int size = Threads * Each;
  union Scratch {
    typename Rank::TempStorage rank;
    typename Reduce::TempStorage reduce;
    float slopes[size];
  };
  uint32_t x[size], y[size];  // sorted
  uint16_t number[size];      // of each sorted x
  Scratch scratch;
};

// The place of a thread's element k, of which a warp has neighboring ones.
template <int Each>
__device__ __forceinline__ int place_of(int k) {
  return threadIdx.x / 32 * (32 * Each) + k * 32 + threadIdx.x % 32;
}

// Sorts the block's keys to `out`, and the places that they come from to `number`, by way of
// `spare`; null: not wanted.
template <int Threads, int Each>
__device__ void sort_block(uint32_t (&keys)[Each], uint32_t* out, uint16_t* number,
                           uint16_t* spare,
                           typename Sorters<Threads, Each>::Rank::TempStorage& scratch) {
  static_assert(kBits / kDigit % 2 == 1, "the last of the passes writes to `number`");
  uint16_t *from = spare, *to = number;
#pragma unroll 1
  for (int shift = 0; shift < kBits; shift += kDigit) {
    int rank[Each];
    typename Sorters<Threads, Each>::Rank(scratch).RankKeys(keys, rank, Digits{shift});
    // Its barriers are behind all reads of the pass before.
#pragma unroll
    for (int k = 0; k < Each; ++k) out[rank[k]] = keys[k];
    if (number) {
#pragma unroll
      for (int k = 0; k < Each; ++k) {
        const int here = place_of<Each>(k);
        to[rank[k]] = shift == 0 ? static_cast<uint16_t>(here) : from[here];
      }
      from = to;
      to = from == number ? spare : number;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < Each; ++k) keys[k] = out[place_of<Each>(k)];
  }
}

// The derivative to the points `from` to `to` - 1 of x, which tie and so move as one, in units of
// the grid.
template <typename Sorted>
__device__ float slope_of_ties(const Sorted& sorted, uint32_t from, uint32_t to, int p) {
  const uint32_t v = sorted.x[from];
  if (p == 1) {
    const uint32_t equal = first_where(from, to, [&](uint32_t k) { return sorted.y[k] >= v; });
    const uint32_t above = first_where(equal, to, [&](uint32_t k) { return sorted.y[k] > v; });
    const int sum = static_cast<int>(equal - from) - static_cast<int>(to - above);
    return static_cast<float>(sum) / static_cast<float>(to - from);
  }
  int64_t sum = 0;
  // All of a set may tie, and then a single thread reads it: not one word after the other.
#pragma unroll 16
  for (uint32_t k = from; k < to; ++k) sum += static_cast<int>(v - sorted.y[k]);
  return static_cast<float>(2 * static_cast<double>(sum) / (to - from));
}

template <int Threads, int Each>
__global__ void __launch_bounds__(Threads) small_kernel(const SmallArguments work) {
  using Sorted = Sorters<Threads, Each>;
  extern __shared__ __align__(16) unsigned char dynamic[];
  Sorted& sorted = *reinterpret_cast<Sorted*>(dynamic);
  __shared__ uint32_t largest;  // magnitude, as bits; more than those of infinity: NaN
  const int n = static_cast<int>(work.count), thread = threadIdx.x;
  const float* x = work.x + blockIdx.x * work.count;
  const float* y = work.y + blockIdx.x * work.count;
  if (thread == 0) largest = 0;
  __syncthreads();
  uint32_t most = 0;
#pragma unroll 8
  for (int i = thread; i < n; i += Threads) {
    most = max(most, max(__float_as_uint(fabsf(x[i])), __float_as_uint(fabsf(y[i]))));
  }
  most = __reduce_max_sync(0xffffffffu, most);
  if (thread % 32 == 0) atomicMax(&largest, most);
  __syncthreads();
  const float magnitude = __uint_as_float(largest);
  const bool poisoned = !isfinite(magnitude);
  const int exponent = poisoned ? 0 : grid_exponent(magnitude, kBits);
  const Quantizer<float> quantize(exponent);

  uint32_t keys[Each];
  const auto load = [&](const float* from) {
#pragma unroll
    for (int k = 0; k < Each; ++k) {
      const int i = place_of<Each>(k);
      const float value = i < n && !poisoned ? from[i] : 0.0f;
      // Where there is no point, behind all others.
      keys[k] = i < n ? static_cast<uint32_t>(quantize(value) + (1 << (kBits - 1)))
                      : (1u << kBits) - 1;
    }
  };
  load(x);
  // y is not there yet: its place is free.
  sort_block<Threads>(keys, sorted.x, sorted.number, reinterpret_cast<uint16_t*>(sorted.y),
                      sorted.scratch.rank);
  load(y);
  sort_block<Threads>(keys, sorted.y, nullptr, nullptr, sorted.scratch.rank);

  double cost = 0;
  float* slopes = sorted.scratch.slopes;
#pragma unroll 4
  for (int k = 0; k < Each; ++k) {
    const int i = k * Threads + thread;
    if (i >= n) break;
    const uint32_t v = sorted.x[i];
    const int gap = static_cast<int>(v - sorted.y[i]);
    cost += work.p == 1 ? fabs(static_cast<double>(gap)) : static_cast<double>(gap) * gap;
    const bool leads = i == 0 || sorted.x[i - 1] != v;
    if (!leads || !work.slopes) continue;
    if (i + 1 == n || sorted.x[i + 1] != v) {
      slopes[i] = static_cast<float>(work.p == 1 ? (gap > 0) - (gap < 0) : 2 * gap);
    } else {
      const uint32_t end = first_where(i + 1, n, [&](uint32_t j) { return sorted.x[j] != v; });
      slopes[i] = slope_of_ties(sorted, i, end, work.p);
    }
  }
  __syncthreads();
  if (work.slopes) {
    // A point's slope is that of the first of those that it ties with.
    float slope[Each];
#pragma unroll
    for (int k = 0; k < Each; ++k) {
      const int i = k * Threads + thread;
      if (i >= n) break;
      const uint32_t v = sorted.x[i];
      int first = i;
      if (i > 0 && sorted.x[i - 1] == v) {
        first = last_run(i - 1, [&](uint32_t j) { return sorted.x[j] == v; });
      }
      slope[k] = slopes[first];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < Each; ++k) {
      const int i = k * Threads + thread;
      if (i < n) slopes[sorted.number[i]] = slope[k];
    }
    __syncthreads();
    float* out = work.slopes + blockIdx.x * work.count;
    const float unit = work.p == 1 ? 1.0f : static_cast<float>(ldexp(1.0, exponent));
    for (int i = thread; i < n; i += Threads) out[i] = poisoned ? work.unknown : slopes[i] * unit;
    __syncthreads();
  }
  const double sum = typename Sorted::Reduce(sorted.scratch.reduce).Sum(cost);
  if (thread == 0) {
    const double mean = ldexp(sum / static_cast<double>(n), work.p * exponent);
    work.values[blockIdx.x] = poisoned ? NAN : static_cast<float>(mean);
  }
}

template <int Threads, int Each>
void launch_for(const SmallArguments& a, Place place) {
  constexpr int64_t bytes = sizeof(Sorters<Threads, Each>);
  allow_shared_memory(small_kernel<Threads, Each>, bytes);
  small_kernel<Threads, Each><<<grid(a.slots), Threads, bytes, stream_of(place)>>>(a);
  check(cudaGetLastError(), "the launch of small_kernel");
}

}  // namespace

int64_t most_small_points(int device) {
  const int room = chip(device).shared_per_block - 1024;
  if (room >= static_cast<int>(sizeof(Sorters<kThreads, kMostEach>))) return kThreads * kMostEach;
  if (room >= static_cast<int>(sizeof(Sorters<kThreads, kEach>))) return kThreads * kEach;
  return room >= static_cast<int>(sizeof(Sorters<kFewThreads, kEach>)) ? kFewThreads * kEach : 0;
}

void sliced_wasserstein_small(const SmallArguments& a, Place place) {
  const DeviceGuard guard(place.device);
  if (a.count <= kFewThreads * kEach) {
    launch_for<kFewThreads, kEach>(a, place);
  } else if (a.count <= kThreads * kEach) {
    launch_for<kThreads, kEach>(a, place);
  } else {
    launch_for<kThreads, kMostEach>(a, place);
  }
}

}  // namespace sdcore
