// Sorting sets that fit one block's shared memory: a launch where the general way takes some ten, and
// no pass over memory. Of sets with as many points of equal weight, i meets i.
#include <cub/block/block_radix_rank.cuh>
#include <cub/block/block_reduce.cuh>

#include "chip.h"
#include "fixed.cuh"
#include "launch.cuh"
#include "ordered.cuh"
#include "search.cuh"
#include "sliced_wasserstein_exact.h"

namespace sdcore {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kFewEach = 8, kMostEach = 32;  // points of a thread
constexpr int kBits = 27;                    // of a projection in fixed point
constexpr int kDigit = 9;                    // three passes
constexpr uint32_t kCrowded = 64;            // keys of a bucket that are too many to be compared

struct Digits {
  int shift;
  __device__ uint32_t Digit(uint32_t key) const { return key >> shift & ((1u << kDigit) - 1); }
};

template <int Each>
struct Sorters {
  // Ranks by votes of a warp: equal digits keep their order.
  using Rank = cub::BlockRadixRankMatchEarlyCounts<kThreads, kDigit, false>;
  using Reduce = cub::BlockReduce<double, kThreads>;
  static constexpr int size = kThreads * Each;
  union Scratch {
    uint32_t count[size];
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

// Counts become the sums of those before. Returns the largest count.
template <int Each>
__device__ uint32_t sum_counts(uint32_t* count) {
  constexpr int chunks = Each / 4;
  __shared__ uint32_t totals[kWarps], largest;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint4* mine = reinterpret_cast<uint4*>(count) + warp * (chunks * 32) + lane;
  uint32_t sum[chunks], most = 0;
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const uint4 v = mine[c * 32];
    sum[c] = v.x + v.y + v.z + v.w;
    most = max(most, max(max(v.x, v.y), max(v.z, v.w)));
  }
  for (int step = 1; step < 32; step *= 2) {
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const uint32_t before = __shfl_up_sync(0xffffffffu, sum[c], step);
      if (lane >= step) sum[c] += before;
    }
  }
  uint32_t total = 0;
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const uint32_t all = __shfl_sync(0xffffffffu, sum[c], 31);
    sum[c] += total;
    total += all;
  }
  most = __reduce_max_sync(0xffffffffu, most);
  if (lane == 0) {
    totals[warp] = total;
    atomicMax(&largest, most);
  }
  __syncthreads();
  const uint32_t base = __reduce_add_sync(0xffffffffu, lane < warp ? totals[lane] : 0);
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const uint4 v = mine[c * 32];
    const uint32_t end = base + sum[c], w = end - v.w, z = w - v.z, y = z - v.y;
    mine[c * 32] = make_uint4(y - v.x, y, z, w);
  }
  const uint32_t found = largest;
  __syncthreads();
  return found;
}

// Sorts the block's first n keys, which are from `low` to `high`, to `out`, and the places that they
// come from to `number`, unless it is null. As many buckets as keys, evenly from `low` to `high`;
// within its bucket a key counts those before it. False, with nothing done, if one is crowded: many
// keys tie, or nearly.
template <int Each>
__device__ bool sort_by_buckets(const uint32_t (&keys)[Each], int n, uint32_t low, uint32_t high,
                                uint32_t* out, uint16_t* number, uint32_t* count) {
  constexpr int size = kThreads * Each;
  const float scale = static_cast<float>(size) / static_cast<float>(high - low + 1);
  const auto bucket_of = [&](uint32_t key) {  // in the order of the keys, also where this rounds
    return min(static_cast<int>(static_cast<float>(key - low) * scale), size - 1);
  };
  uint32_t place[Each];
#pragma unroll
  for (int k = 0; k < Each; ++k) count[k * kThreads + threadIdx.x] = 0;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < Each; ++k) {
    if (place_of<Each>(k) < n) place[k] = atomicAdd(&count[bucket_of(keys[k])], 1u);
  }
  __syncthreads();
  if (sum_counts<Each>(count) > kCrowded) return false;
#pragma unroll
  for (int k = 0; k < Each; ++k) {
    if (place_of<Each>(k) >= n) continue;
    place[k] += count[bucket_of(keys[k])];
    out[place[k]] = keys[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < Each; ++k) {
    if (place_of<Each>(k) >= n) continue;
    const int bucket = bucket_of(keys[k]);
    const uint32_t first = count[bucket];
    const uint32_t end = bucket + 1 < size ? count[bucket + 1] : static_cast<uint32_t>(n);
    uint32_t rank = first;
    for (uint32_t j = first; j < end; ++j) {
      const uint32_t other = out[j];
      rank += other < keys[k] || (other == keys[k] && j < place[k]);
    }
    place[k] = rank;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < Each; ++k) {
    const int here = place_of<Each>(k);
    if (here >= n) continue;
    out[place[k]] = keys[k];
    if (number) number[place[k]] = static_cast<uint16_t>(here);
  }
  __syncthreads();
  return true;
}

// The same for any keys, digit by digit, by way of `spare`.
template <int Each>
__device__ void sort_by_digits(uint32_t (&keys)[Each], uint32_t* out, uint16_t* number,
                               uint16_t* spare,
                               typename Sorters<Each>::Rank::TempStorage& scratch) {
  static_assert(kBits / kDigit % 2 == 1, "the last of the passes writes to `number`");
  uint16_t *from = spare, *to = number;
#pragma unroll 1
  for (int shift = 0; shift < kBits; shift += kDigit) {
    int rank[Each];
    typename Sorters<Each>::Rank(scratch).RankKeys(keys, rank, Digits{shift});
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

// The derivative to the points `from` to `to` - 1 of x, which tie and so move as one, in units of the
// grid.
template <int Each>
__device__ float slope_of_ties(const Sorters<Each>& sorted, uint32_t from, uint32_t to, int p) {
  const uint32_t v = sorted.x[from];
  if (p == 1) {
    const uint32_t equal = first_where(from, to, [&](uint32_t k) { return sorted.y[k] >= v; });
    const uint32_t above = first_where(equal, to, [&](uint32_t k) { return sorted.y[k] > v; });
    const int sum = static_cast<int>(equal - from) - static_cast<int>(to - above);
    return static_cast<float>(sum) / static_cast<float>(to - from);
  }
  int64_t sum = 0;
  for (uint32_t k = from; k < to; ++k) sum += static_cast<int>(v - sorted.y[k]);
  return static_cast<float>(2 * static_cast<double>(sum) / (to - from));
}

struct Extent {
  float low, high;  // not numbers, or infinite, if one of the values is
  __device__ bool has_bad() const { return !isfinite(low) || !isfinite(high); }
  __device__ float magnitude() const { return fmaxf(fabsf(low), fabsf(high)); }
};

// The smallest and the largest value, for all threads of the block.
__device__ Extent extent_of(const float* values, int n) {
  __shared__ uint32_t ends[2];
  if (threadIdx.x < 2) ends[threadIdx.x] = 0;
  __syncthreads();
  uint32_t low = 0, high = 0;  // the first is that of the complements
#pragma unroll 8
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const uint32_t value = ordered(values[i]);  // NaN is beyond infinity, on either side
    low = max(low, ~value);
    high = max(high, value);
  }
  low = warp_max(low);
  high = warp_max(high);
  if (threadIdx.x % 32 == 0) {
    atomicMax(&ends[0], low);
    atomicMax(&ends[1], high);
  }
  __syncthreads();
  const Extent extent{unordered(~ends[0]), unordered(ends[1])};
  __syncthreads();
  return extent;
}

template <int Each>
__global__ void __launch_bounds__(kThreads, 1) small_kernel(const SmallArguments work) {
  using Sorted = Sorters<Each>;
  extern __shared__ __align__(16) unsigned char dynamic[];
  Sorted& sorted = *reinterpret_cast<Sorted*>(dynamic);
  const int n = static_cast<int>(work.count), thread = threadIdx.x;
  const float* x = work.x + blockIdx.x * work.count;
  const float* y = work.y + blockIdx.x * work.count;
  const Extent extent_x = extent_of(x, n), extent_y = extent_of(y, n);
  const float magnitude = fmaxf(extent_x.magnitude(), extent_y.magnitude());
  const bool poisoned = extent_x.has_bad() || extent_y.has_bad();
  const int exponent = poisoned ? 0 : grid_exponent(magnitude, kBits);
  const Quantizer<float> quantize(exponent);
  const auto key_of = [&](float value) {
    return static_cast<uint32_t>(quantize(value) + (1 << (kBits - 1)));
  };
  uint32_t keys[Each];
  const auto sort = [&](const float* from, const Extent& extent, uint32_t* out, uint16_t* number,
                        uint16_t* spare) {
#pragma unroll
    for (int k = 0; k < Each; ++k) {
      const int i = place_of<Each>(k);
      // Where there is no point, behind all others.
      keys[k] = i < n ? key_of(poisoned ? 0.0f : from[i]) : (1u << kBits) - 1;
    }
    const uint32_t low = key_of(poisoned ? 0.0f : extent.low);
    const uint32_t high = key_of(poisoned ? 0.0f : extent.high);
    if (!sort_by_buckets<Each>(keys, n, low, high, out, number, sorted.scratch.count)) {
      sort_by_digits<Each>(keys, out, number, spare, sorted.scratch.rank);
    }
  };
  // y is not there yet: its place is free.
  sort(x, extent_x, sorted.x, sorted.number, reinterpret_cast<uint16_t*>(sorted.y));
  sort(y, extent_y, sorted.y, nullptr, nullptr);

  double cost = 0;
  float* slopes = sorted.scratch.slopes;
#pragma unroll 4
  for (int k = 0; k < Each; ++k) {
    const int i = k * kThreads + thread;
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
      const int i = k * kThreads + thread;
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
      const int i = k * kThreads + thread;
      if (i < n) slopes[sorted.number[i]] = slope[k];
    }
    __syncthreads();
    float* out = work.slopes + blockIdx.x * work.count;
    const float unit = work.p == 1 ? 1.0f : static_cast<float>(ldexp(1.0, exponent));
    for (int i = thread; i < n; i += kThreads) out[i] = poisoned ? 0.0f : slopes[i] * unit;
    __syncthreads();
  }
  const double sum = typename Sorted::Reduce(sorted.scratch.reduce).Sum(cost);
  if (thread == 0) {
    const double mean = ldexp(sum / static_cast<double>(n), work.p * exponent);
    work.values[blockIdx.x] = poisoned ? NAN : static_cast<float>(mean);
  }
}

template <int Each>
void launch_for(const SmallArguments& a, Place place) {
  constexpr int64_t bytes = sizeof(Sorters<Each>);
  allow_shared_memory(small_kernel<Each>, bytes);
  small_kernel<Each><<<grid(a.slots), kThreads, bytes, stream_of(place)>>>(a);
  check(cudaGetLastError(), "the launch of small_kernel");
}

}  // namespace

int64_t most_small_points(int device) {
  const int room = chip(device).shared_per_block - 1024;
  if (room >= static_cast<int>(sizeof(Sorters<kMostEach>))) return kThreads * kMostEach;
  return room >= static_cast<int>(sizeof(Sorters<kFewEach>)) ? kThreads * kFewEach : 0;
}

void sliced_wasserstein_small(const SmallArguments& a, Place place) {
  const DeviceGuard guard(place.device);
  if (a.count <= kThreads * kFewEach) {
    launch_for<kFewEach>(a, place);
  } else {
    launch_for<kMostEach>(a, place);
  }
}

}  // namespace sdcore
