// Sorting sets that fit one block's shared memory: a launch where the general way takes some ten, and
// no pass over memory. Of sets with as many points of equal weight, i meets i.
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>

#include "chip.h"
#include "launch.cuh"
#include "ordered.cuh"
#include "search.cuh"
#include "sliced_wasserstein_exact.h"

namespace sdcore {
namespace {

constexpr int kThreads = 512;
constexpr int kMostEach = 32;
// Of a digit. Per pass each number is ranked and moved, which 5 bits do in 7 passes.
constexpr int kDigit = 5;

template <int Each>
struct Sorters {
  using Pairs = cub::BlockRadixSort<uint32_t, kThreads, Each, uint16_t, kDigit>;
  using Keys = cub::BlockRadixSort<uint32_t, kThreads, Each, cub::NullType, kDigit>;
  using Reduce = cub::BlockReduce<double, kThreads>;
  static constexpr int size = kThreads * Each;
  union Scratch {
    typename Pairs::TempStorage pairs;
    typename Keys::TempStorage keys;
    typename Reduce::TempStorage reduce;
    float slopes[size];
  };
  uint32_t x[size], y[size];  // numbers in their order, sorted
  Scratch scratch;
};

// The derivative to the points `from` to `to` - 1 of x, which tie and so move as one.
template <int Each>
__device__ float slope_of_ties(const Sorters<Each>& sorted, uint32_t from, uint32_t to, int p) {
  const uint32_t v = sorted.x[from];
  if (p == 1) {
    const uint32_t equal = first_where(from, to, [&](uint32_t k) { return sorted.y[k] >= v; });
    const uint32_t above = first_where(equal, to, [&](uint32_t k) { return sorted.y[k] > v; });
    const int sum = static_cast<int>(equal - from) - static_cast<int>(to - above);
    return static_cast<float>(sum) / static_cast<float>(to - from);
  }
  double sum = 0;
  for (uint32_t k = from; k < to; ++k) sum += unordered(v) - unordered(sorted.y[k]);
  return static_cast<float>(2 * sum / (to - from));
}

template <int Each>
__global__ void __launch_bounds__(kThreads, 1) small_kernel(const SmallArguments work) {
  using Sorted = Sorters<Each>;
  extern __shared__ __align__(16) unsigned char dynamic[];
  Sorted& sorted = *reinterpret_cast<Sorted*>(dynamic);
  __shared__ int bad;
  const int n = static_cast<int>(work.count), thread = threadIdx.x;
  const float* x = work.x + blockIdx.x * work.count;
  const float* y = work.y + blockIdx.x * work.count;
  if (thread == 0) bad = 0;
  __syncthreads();

  uint32_t keys[Each];
  const auto load = [&](const float* from) {
#pragma unroll
    for (int k = 0; k < Each; ++k) {
      const int i = k * kThreads + thread;
      const float value = i < n ? from[i] : 0.0f;
      // Behind all others, where there is no point. -0 and 0 tie.
      keys[k] = i < n ? ordered(value + 0.0f) : 0xffffffffu;
      if (!isfinite(value)) bad = 1;
    }
  };
  const auto keep = [&](uint32_t* to) {
#pragma unroll
    for (int k = 0; k < Each; ++k) to[k * kThreads + thread] = keys[k];
  };
  load(y);
  typename Sorted::Keys(sorted.scratch.keys).SortBlockedToStriped(keys);
  keep(sorted.y);
  load(x);
  uint16_t number[Each];
#pragma unroll
  for (int k = 0; k < Each; ++k) number[k] = static_cast<uint16_t>(k * kThreads + thread);
  __syncthreads();
  typename Sorted::Pairs(sorted.scratch.pairs).SortBlockedToStriped(keys, number);
  keep(sorted.x);
  __syncthreads();

  double cost = 0;
  const bool poisoned = bad != 0;
  float* slopes = sorted.scratch.slopes;
#pragma unroll 4
  for (int k = 0; k < Each; ++k) {
    const int i = k * kThreads + thread;
    if (i >= n) break;
    const uint32_t v = sorted.x[i];
    const float gap = unordered(v) - unordered(sorted.y[i]);
    cost += work.p == 1 ? fabs(static_cast<double>(gap)) : static_cast<double>(gap) * gap;
    const bool leads = i == 0 || sorted.x[i - 1] != v;
    if (!leads || !work.slopes) continue;
    if (i + 1 == n || sorted.x[i + 1] != v) {
      slopes[i] = work.p == 1 ? static_cast<float>((gap > 0) - (gap < 0)) : 2 * gap;
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
      if (k * kThreads + thread < n) slopes[number[k]] = slope[k];
    }
    __syncthreads();
    float* out = work.slopes + blockIdx.x * work.count;
    // Where there is NaN, padding may have been sorted in its place, and slopes be anything.
    for (int i = thread; i < n; i += kThreads) out[i] = poisoned ? 0.0f : slopes[i];
    __syncthreads();
  }
  const double sum = typename Sorted::Reduce(sorted.scratch.reduce).Sum(cost);
  if (thread == 0) {
    work.values[blockIdx.x] = poisoned ? NAN : static_cast<float>(sum / static_cast<double>(n));
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
  return room >= static_cast<int>(sizeof(Sorters<8>)) ? kThreads * 8 : 0;
}

void sliced_wasserstein_small(const SmallArguments& a, Place place) {
  const DeviceGuard guard(place.device);
  if (a.count <= kThreads * 8) {
    launch_for<8>(a, place);
  } else {
    launch_for<kMostEach>(a, place);
  }
}

}  // namespace sdcore
