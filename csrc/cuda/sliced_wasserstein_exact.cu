#include "sliced_wasserstein_exact.h"

#include <algorithm>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <type_traits>

#include "chip.h"
#include "fixed.cuh"
#include "launch.cuh"
#include "ordered.cuh"
#include "points.cuh"
#include "search.cuh"

namespace sdcore {
namespace {

constexpr int kThreads = 256;
constexpr int kKeysPoints = 8;     // of a thread, in registers while the directions come by
constexpr int kProjectBlocks = 4;  // of a multiprocessor, if there are directions for as many
constexpr int kTransportThreads = 256;
constexpr int kTransportBlocks = 4;  // of a multiprocessor, which wait at different times
// Sorted points of a block: many, so that those of a bucket make runs worth writing, and few enough
// of each thread that all their loads can be on their way together.
template <typename Real>
constexpr int kTransportTile = 16384 / sizeof(Real);
// Slopes in the order of sorted points go back to the order of points in two steps: into buckets of
// points with neighboring numbers, in runs, and within each bucket in shared memory. Writing each
// to its place at once takes 0.5 ms for 33 million, a memory transaction for each.
constexpr int kBucketBits = 12;
constexpr int kMostBucketBytes = 1 << 16;  // in shared memory
constexpr int kMostBuckets = 1024;
constexpr int kFewTies = 8;  // are looked at one by one
constexpr int kPullFew = 64;    // points of a block
constexpr int kPullAhead = 32;  // slots, whose loads are on their way together
constexpr int kPullThreads = 512;
constexpr int kPullEach = (1 << kBucketBits) / kPullThreads;
constexpr int kPrefixEach = 8;
constexpr int kPrefixChunk = kThreads * kPrefixEach;

using Mass = unsigned long long;

__device__ __forceinline__ float real_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ double real_of(unsigned long long bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}

template <typename Real>
__global__ void grid_kernel(GridArguments work) {
  const int64_t slot = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (slot >= work.batch * work.directions) return;
  const int64_t b = slot / work.directions, l = slot % work.directions;
  const auto* found = static_cast<const Ordered<Real>*>(work.extremes) + 2 * slot;
  Real largest = fmax(fabs(unordered(~found[0])), fabs(unordered(found[1])));
  bool bad = false;
  if (work.kept.values) {
    const int64_t row = work.kept.one ? l : slot, n = work.kept.count;
    const Real* values = static_cast<const Real*>(work.kept.values) + row * n;
    const Real low = values[0], high = values[n - 1];  // sorting puts NaN last
    bad = !isfinite(low) || !isfinite(high);
    largest = fmax(largest, fmax(fabs(low), fabs(high)));
    if (work.kept.levels) bad |= isnan(work.kept.levels[row * n + n - 1]);
  }
  for (int side = 0; side < 2; ++side) {
    if (work.weights[side]) bad |= isnan(work.weights[side][b * work.count[side]]);
  }
  work.exponents[slot] = grid_exponent(largest, work.bits);
  work.poison[slot] = bad;
}

// Calls `emit` with row, point and projection of all points of a pass. A block projects its tile of
// points along all directions of its group: the more groups, the more blocks.
template <typename Real, int D>
struct Projecting {
  Points points;
  const Real* directions;
  Pass pass;
  int64_t first_batch, tiles, groups;

  template <typename Begin, typename Emit>
  __device__ __forceinline__ void run(Begin&& begin, Emit&& emit) const {
    constexpr int P = kKeysPoints;
    const int64_t b = first_batch + blockIdx.x / (tiles * groups);
    const int64_t group = blockIdx.x / tiles % groups;
    const int64_t at = blockIdx.x % tiles * (P * kThreads) + threadIdx.x;
    Real x[P][D];
    load<Real, D, P>(points, b, at, kThreads, x);
    const int64_t first = max(pass.first, b * pass.directions);
    const int64_t end = min(pass.first + pass.slots, (b + 1) * pass.directions);
    const int64_t from = first + (end - first) * group / groups;
    const int64_t to = first + (end - first) * (group + 1) / groups;
    for (int64_t slot = from; slot < to; ++slot) {
      Real theta[D];
#pragma unroll
      for (int k = 0; k < D; ++k) {
        theta[k] = __ldg(directions + (slot - b * pass.directions) * D + k);
      }
      begin(slot);
#pragma unroll
      for (int j = 0; j < P; ++j) {
        const int64_t i = at + j * kThreads;
        Real value = x[j][0] * theta[0];  // as the range was found
#pragma unroll
        for (int k = 1; k < D; ++k) value = fma(x[j][k], theta[k], value);
        if (i < points.count) emit(slot - pass.first, i, value);
      }
    }
  }
};

template <typename Real, int D>
__global__ void __launch_bounds__(kThreads)
    keys_kernel(Projecting<Real, D> projecting, int bits, const int* exponents, int* poison,
                Key<Real>* keys, uint32_t* number) {
  Quantizer<Real> quantize(0);
  int64_t current = 0;
  const Key<Real> half = Key<Real>(1) << (bits - 1);
  projecting.run(
      [&](int64_t slot) {
        current = slot;
        quantize = Quantizer<Real>(exponents[slot]);
      },
      [&](int64_t row, int64_t i, Real value) {
        const bool bad = !isfinite(value);
        if (bad) poison[current] = 1;
        const Key<Real> code = bad ? half : static_cast<Key<Real>>(quantize(value)) + half;
        const int64_t to = row * projecting.points.count + i;
        keys[to] = static_cast<Key<Real>>(row) << bits | code;
        if (number) number[to] = static_cast<uint32_t>(i);
      });
}

template <typename Real, int D>
__global__ void __launch_bounds__(kThreads)
    project_kernel(Projecting<Real, D> projecting, Real* out) {
  projecting.run([](int64_t) {},
                 [&](int64_t row, int64_t i, Real value) {
                   out[row * projecting.points.count + i] = value;
                 });
}

// Prefix sums of rows, in three launches: totals of chunks, their sums, and the sums of all. Whole
// numbers and doubles are added in one order, whatever the timing.
template <typename T, typename Source>
__global__ void __launch_bounds__(kThreads)
    chunk_totals_kernel(Source source, int64_t count, int64_t chunks, T* totals) {
  __shared__ typename cub::BlockReduce<T, kThreads>::TempStorage scratch;
  const int64_t row = blockIdx.x / chunks, first = blockIdx.x % chunks * kPrefixChunk;
  T sum = 0;
  for (int j = 0; j < kPrefixEach; ++j) {
    const int64_t i = first + threadIdx.x * kPrefixEach + j;
    if (i < count) sum += source(row, i);
  }
  const T total = cub::BlockReduce<T, kThreads>(scratch).Sum(sum);
  if (threadIdx.x == 0) totals[row * chunks + blockIdx.x % chunks] = total;
}

// Totals become the sums of those before.
template <typename T>
__global__ void __launch_bounds__(kThreads) chunk_sums_kernel(int64_t chunks, T* totals) {
  __shared__ typename cub::BlockScan<T, kThreads>::TempStorage scratch;
  T* row = totals + blockIdx.x * chunks;
  T before = 0;
  for (int64_t first = 0; first < chunks; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    T sum, all;
    cub::BlockScan<T, kThreads>(scratch).ExclusiveSum(i < chunks ? row[i] : T(0), sum, all);
    if (i < chunks) row[i] = before + sum;
    before += all;
    __syncthreads();
  }
}

template <typename T, typename Source>
__global__ void __launch_bounds__(kThreads)
    prefix_kernel(Source source, T* out, int64_t count, int64_t chunks, const T* totals) {
  __shared__ typename cub::BlockScan<T, kThreads>::TempStorage scratch;
  const int64_t row = blockIdx.x / chunks, first = blockIdx.x % chunks * kPrefixChunk;
  T each[kPrefixEach];
  for (int j = 0; j < kPrefixEach; ++j) {
    const int64_t i = first + threadIdx.x * kPrefixEach + j;
    each[j] = i < count ? source(row, i) : T(0);
  }
  cub::BlockScan<T, kThreads>(scratch).InclusiveSum(each, each);
  const T before = totals[row * chunks + blockIdx.x % chunks];
  for (int j = 0; j < kPrefixEach; ++j) {
    const int64_t i = first + threadIdx.x * kPrefixEach + j;
    if (i < count) out[row * count + i] = before + each[j];
  }
}

template <typename T, typename Source>
void prefix(Source source, T* out, int64_t rows, int64_t count, void* totals,
            cudaStream_t stream) {
  const int64_t chunks = ceil_div(count, kPrefixChunk);
  T* sums = static_cast<T*>(totals);
  chunk_totals_kernel<T><<<grid(rows * chunks), kThreads, 0, stream>>>(source, count, chunks, sums);
  check(cudaGetLastError(), "the launch of chunk_totals_kernel");
  chunk_sums_kernel<T><<<grid(rows), kThreads, 0, stream>>>(chunks, sums);
  check(cudaGetLastError(), "the launch of chunk_sums_kernel");
  prefix_kernel<T>
      <<<grid(rows * chunks), kThreads, 0, stream>>>(source, out, count, chunks, sums);
  check(cudaGetLastError(), "the launch of prefix_kernel");
}

// Sorted weights in fixed point, and their sums.
struct WeightSource {
  const uint32_t* number;
  const double* weights;
  int64_t count;
  Pass pass;
  __device__ Mass operator()(int64_t row, int64_t i) const {
    const int64_t b = (pass.first + row) / pass.directions;
    return __double2ull_rn(weights[b * count + number[row * count + i]] * kWeightUnit);
  }
};

// In place, from whole numbers to shares of the row's last.
__global__ void __launch_bounds__(kThreads) normalize_kernel(int64_t count, Mass* sums) {
  const int64_t tiles = (count + kThreads - 1) / kThreads;
  const int64_t row = blockIdx.x / tiles, i = blockIdx.x % tiles * kThreads + threadIdx.x;
  // The last is 1 and is not written here: other blocks read it.
  if (i >= count - 1) return;
  const double total = static_cast<double>(sums[row * count + count - 1]);
  sums[row * count + i] =
      __double_as_longlong(static_cast<double>(sums[row * count + i]) / total);
}
// NaN where the weights are none, which then fill their row.
__global__ void finish_levels_kernel(const double* weights, int64_t count, Pass pass,
                                     double* levels) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (row >= pass.slots) return;
  const int64_t b = (pass.first + row) / pass.directions;
  levels[row * count + count - 1] = isnan(weights[b * count]) ? NAN : 1;
}

// How the mass of both sides is spread: as many points of equal weight, so that i meets i; points of
// equal weight; by weights.
enum class Spread { alike, equal, weighted };

// One side of one slot. Levels, where mass begins and ends, are doubles up to 1 if either side has
// weights; else whole numbers up to n m, the points of a side being as wide as the other has
// points.
template <typename Real, bool Weighted>
struct View {
  using Level = std::conditional_t<Weighted, double, int64_t>;
  const Key<Real>* sorted;  // keys; of a kept set the values, as bits
  const double* levels;
  const double* moments;
  uint32_t count;
  bool kept;
  int bits;
  Quantizer<Real> quantize;
  int64_t wide;  // a point's width, in whole numbers

  __device__ View(const SortedSide& side, const TransportArguments& work, int64_t row, int64_t wide)
      : kept(!side.keys),
        bits(work.bits),
        quantize(work.exponents[work.pass.first + row]),
        wide(wide) {
    const int64_t slot = work.pass.first + row, n = side.count;
    const int64_t at = kept ? (side.kept.one ? slot % work.pass.directions : slot) * n : row * n;
    sorted = static_cast<const Key<Real>*>(kept ? side.kept.values : side.keys) + at;
    levels = side.kept.levels ? side.kept.levels + at : nullptr;
    moments = side.moments ? side.moments + row * n : nullptr;
    count = static_cast<uint32_t>(n);
  }
  __device__ Code<Real> code_of(Key<Real> entry) const {
    if (kept) return quantize(real_of(entry));
    const Key<Real> one = 1;
    return static_cast<Code<Real>>(entry & ((one << bits) - 1)) -
           static_cast<Code<Real>>(one << (bits - 1));
  }
  __device__ Code<Real> code(uint32_t i) const { return code_of(sorted[i]); }
  // Where the mass of point i begins; of `count`, the end of all.
  __device__ Level begin(uint32_t i) const {
    if constexpr (Weighted) {
      if (levels) return i > 0 ? levels[i - 1] : 0;
      return static_cast<double>(i) / static_cast<double>(count);
    } else {
      return static_cast<int64_t>(i) * wide;
    }
  }
  // The point whose mass is at u; of those from `low` to `high`, which it is among.
  __device__ uint32_t at(Level u, uint32_t low, uint32_t high) const {
    if constexpr (Weighted) {
      if (!levels) {
        low = static_cast<uint32_t>(u * count);
        low = min(max(low, 1u) - 1, count - 1);  // rounding: it may be a neighbor
        high = min(low + 2, count - 1);
      }
      while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (begin(middle + 1) > u) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      return low;
    } else {
      return min(static_cast<uint32_t>(u / wide), count - 1);
    }
  }
  // Sum of mass times code below u, which is in point j, in units of a whole number's width.
  __device__ double moment(Level u, uint32_t j) const {
    const double rest = static_cast<double>(u - begin(j)) * static_cast<double>(code(j));
    return (j > 0 ? moments[j - 1] : 0) + rest;
  }
};

// Where a tile's points are on the other side.
struct Bracket {
  uint32_t low, high;
};

template <typename Real, Spread kSpread>
struct Problem {
  using Side = View<Real, kSpread == Spread::weighted>;
  using Level = typename Side::Level;
  static constexpr bool alike = kSpread == Spread::alike;
  const Side &mine, &other;
  int p;
  bool first;  // of pieces that begin where points of both sides do, this side has them

  // The cost of the piece of mass that begins where point i does, in point j of the other side, and
  // ends with i or j.
  __device__ double piece(Code<Real> v, uint32_t i, uint32_t j) const {
    const Level begin = mine.begin(i), end = mine.begin(i + 1);
    if (!(end > begin) || (!first && other.begin(j) == begin)) return 0;
    const Level stop = min(end, other.begin(j + 1));
    const double gap = fabs(static_cast<double>(v - other.code(j)));
    return (p == 1 ? gap : gap * gap) * fmax(0.0, static_cast<double>(stop - begin));
  }

  // The derivative per unit of mass, in units of the grid, to points `from` to `to` - 1, which tie
  // at v and so move as one. `bracket` holds the partners of point `known`, and of those after it.
  __device__ double slope(Code<Real> v, uint32_t from, uint32_t to, const Bracket& bracket,
                          uint32_t known) const {
    if (alike && to - from <= kFewTies) return slope_of_few(v, from, to);
    const Level begin = mine.begin(from), end = mine.begin(to);
    if (!(end > begin)) return 0;
    uint32_t j = from, last = to - 1;
    if (!alike) {
      j = from >= known ? other.at(begin, bracket.low, bracket.high)
                        : other.at(begin, 0, other.count - 1);
      last = first_where(j, other.count - 1, [&](uint32_t k) { return other.begin(k + 1) >= end; });
    }
    return p == 1 ? slope_1(v, begin, end, j, last) : slope_2(v, begin, end, j, last);
  }

  // Of points that each meet one.
  __device__ double slope_of_few(Code<Real> v, uint32_t from, uint32_t to) const {
    double sum = 0;
    for (uint32_t k = from; k < to; ++k) {
      const Code<Real> gap = v - other.code(k);
      sum += p == 1 ? (gap > 0) - (gap < 0) : 2 * static_cast<double>(gap);
    }
    return sum / (to - from);
  }

  // Mass that is met by points below pulls with +1, by points above with -1.
  __device__ double slope_1(Code<Real> v, Level begin, Level end, uint32_t j, uint32_t last) const {
    const uint32_t equal =
        first_where(j, last + 1, [&](uint32_t k) { return other.code(k) >= v; });
    const uint32_t above =
        first_where(equal, last + 1, [&](uint32_t k) { return other.code(k) > v; });
    const Level below = equal == j ? begin : min(other.begin(equal), end);
    const Level rest = above == j ? begin : min(other.begin(above), end);
    const Level sum = (below - begin) - (end - rest);
    return static_cast<double>(sum) / static_cast<double>(end - begin);
  }

  __device__ double slope_2(Code<Real> v, Level begin, Level end, uint32_t j, uint32_t last) const {
    if (j == last) return 2 * static_cast<double>(v - other.code(j));
    const double partners = other.moment(end, last) - other.moment(begin, j);
    return 2 * (static_cast<double>(v) - partners / static_cast<double>(end - begin));
  }
};

// Moments up to each sorted point.
template <typename Real, bool Weighted>
struct MomentSource {
  SortedSide side;
  TransportArguments work;
  int64_t wide;
  __device__ double operator()(int64_t row, int64_t i) const {
    const View<Real, Weighted> view(side, work, row, wide);
    const uint32_t at = static_cast<uint32_t>(i);
    return static_cast<double>(view.begin(at + 1) - view.begin(at)) *
           static_cast<double>(view.code(at));
  }
};

// Which points of a tile begin a group of ties, by 32-bit words, and the last such point up to each
// word, the first from each word on; -1 if there is none.
template <int Words>
struct Heads {
  uint32_t word[Words];
  int last[Words], next[Words];

  // All of one warp, when the words are there.
  __device__ void find_last() {
    constexpr int each = Words / 32;
    const int lane = threadIdx.x % 32;
    int found = -1;
    for (int w = lane * each; w < (lane + 1) * each; ++w) {
      if (word[w]) found = w * 32 + 31 - __clz(word[w]);
      last[w] = found;
    }
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, found, step);
      if (lane >= step) found = max(found, before);
    }
    const int before = __shfl_up_sync(0xffffffffu, found, 1);
    for (int w = lane * each; lane > 0 && w < (lane + 1) * each && last[w] < 0; ++w) {
      last[w] = before;
    }
  }
  __device__ void find_next() {
    constexpr int each = Words / 32;
    const int lane = threadIdx.x % 32;
    int found = -1;
    for (int w = (lane + 1) * each - 1; w >= lane * each; --w) {
      if (word[w]) found = w * 32 + __ffs(word[w]) - 1;
      next[w] = found;
    }
    for (int step = 1; step < 32; step *= 2) {
      const int after = __shfl_down_sync(0xffffffffu, found, step);
      if (lane + step < 32 && found < 0) found = after;
    }
    const int after = __shfl_down_sync(0xffffffffu, found, 1);
    for (int w = (lane + 1) * each - 1; lane < 31 && w >= lane * each && next[w] < 0; --w) {
      next[w] = after;
    }
  }
  __device__ bool is_head(int e) const { return word[e / 32] >> (e % 32) & 1; }
  // Whether point e is a group of its own; `last`: whether the tile's last point ends one.
  __device__ bool is_alone(int e, int points, bool last) const {
    return is_head(e) && (e + 1 < points ? is_head(e + 1) : last);
  }
  // The head at or before point e of the tile, and the one after it; -1 if outside of the tile.
  __device__ int at_or_before(int e) const {
    const uint32_t here = word[e / 32] & (0xffffffffu >> (31 - e % 32));
    if (here) return e / 32 * 32 + 31 - __clz(here);
    return e < 32 ? -1 : last[e / 32 - 1];
  }
  __device__ int after(int e) const {
    const uint32_t here = word[e / 32] & ~(0xffffffffu >> (31 - e % 32));
    if (here) return e / 32 * 32 + __ffs(here) - 1;
    return e / 32 == Words - 1 ? -1 : next[e / 32 + 1];
  }
};

// A tile's slopes on their way to the buckets of their points: in shared memory they are brought
// together by bucket, and each run goes where the bucket's cursor was.
template <int Each>
struct Staging {
  static constexpr int some = kMostBuckets / kTransportThreads;
  using Scan = cub::BlockScan<uint32_t, kTransportThreads>;
  uint32_t buckets;
  // In shared memory. Of the tile's points by bucket, how many; then how many are in those before.
  uint32_t* count;
  uint32_t* target;  // where in its bucket a run goes, less what is before it

  // Of a thread's buckets.
  struct Claim {
    uint32_t before[some], taken[some];
  };

  __device__ void clear() {
    for (uint32_t i = threadIdx.x; i < buckets; i += kTransportThreads) count[i] = 0;
  }
  // Behind a barrier: each point's place among those of its bucket, in any order.
  __device__ void rank(const uint32_t* number, int points, int bits, uint32_t (&out)[Each]) {
#pragma unroll
    for (int k = 0; k < Each; ++k) {
      const int e = k * kTransportThreads + threadIdx.x;
      if (e < points) out[k] = atomicAdd(&count[number[e] >> bits], 1u);
    }
  }
  // Behind another.
  __device__ Claim claim(uint32_t* cursors) {
    __shared__ typename Scan::TempStorage scratch;
    Claim claim;
    uint32_t mine[some];
#pragma unroll
    for (int j = 0; j < some; ++j) {
      const uint32_t i = threadIdx.x * some + j;
      mine[j] = i < buckets ? count[i] : 0;
      claim.taken[j] = mine[j] ? atomicAdd(cursors + i, mine[j]) : 0;
    }
    Scan(scratch).ExclusiveSum(mine, claim.before);
#pragma unroll
    for (int j = 0; j < some; ++j) {
      const uint32_t i = threadIdx.x * some + j;
      if (i < buckets) count[i] = claim.before[j];
    }
    return claim;
  }
  // What cursors had takes long to come: it is put down late.
  __device__ void settle(const Claim& claim) {
#pragma unroll
    for (int j = 0; j < some; ++j) {
      const uint32_t i = threadIdx.x * some + j;
      if (i < buckets) target[i] = claim.taken[j] - claim.before[j];
    }
  }
};

// Runs of slopes, in shared memory with the numbers of their points, to memory.
template <typename Real, int Each>
__device__ void write_runs(const SortedSide& side, int64_t row, const Staging<Each>& staging,
                           const uint32_t* numbers, const Real* slopes, int points) {
  const int bits = side.bucket_bits;
  Real* out = static_cast<Real*>(side.slopes) + row * side.count;
  uint16_t* places = side.places + row * side.count;
#pragma unroll
  for (int k = 0; k < Each; ++k) {
    const int e = k * kTransportThreads + threadIdx.x;
    if (e >= points) break;
    const uint32_t point = numbers[e], bucket = point >> bits;
    const uint32_t in_bucket = staging.target[bucket] + static_cast<uint32_t>(e);
    const int64_t to = (static_cast<int64_t>(bucket) << bits) + in_bucket;
    out[to] = slopes[e];
    places[to] = static_cast<uint16_t>(point & ((1u << bits) - 1));
  }
}

template <typename Real, Spread kSpread>
__global__ void __launch_bounds__(kTransportThreads, kTransportBlocks)
    transport_kernel(const __grid_constant__ TransportArguments work, int64_t tiles_x,
                     int64_t tiles_y) {
  constexpr bool alike = kSpread == Spread::alike;
  using Side = View<Real, kSpread == Spread::weighted>;
  constexpr int size = kTransportTile<Real>, each = size / kTransportThreads;
  extern __shared__ __align__(16) unsigned char dynamic[];
  Code<Real>* codes = reinterpret_cast<Code<Real>*>(dynamic);
  Real* slopes = reinterpret_cast<Real*>(codes + size);
  uint32_t* number = reinterpret_cast<uint32_t*>(slopes + size);
  __shared__ Heads<size / 32> heads;
  __shared__ Bracket bracket;
  __shared__ uint32_t tile_from, tile_to;  // the ends of the first and the last group
  __shared__ double costs[kTransportThreads / 32];

  const int64_t tiles = tiles_x + tiles_y, row = blockIdx.x / tiles;
  int64_t tile = blockIdx.x % tiles;
  const bool first = tile < tiles_x;
  if (!first) tile -= tiles_x;
  const SortedSide &side = first ? work.x : work.y, &partners = first ? work.y : work.x;
  const Side mine(side, work, row, partners.count), other(partners, work, row, side.count);
  const bool bad = work.poison[work.pass.first + row] != 0;
  const Problem<Real, kSpread> problem{mine, other, work.p, first};
  const uint32_t begin = static_cast<uint32_t>(tile * size);
  const int points = static_cast<int>(min(static_cast<int64_t>(size), side.count - tile * size));
  const bool wanted = side.slopes != nullptr;
  const int bits = side.bucket_bits;  // 0: too many points for buckets
  const uint32_t buckets = bits ? ((mine.count - 1) >> bits) + 1 : 0;
  Staging<each> staging{buckets, number + size, number + size + buckets};

  // All that a tile reads is on its way before the first is used.
  const auto at = [&](int k) { return k * kTransportThreads + static_cast<int>(threadIdx.x); };
  Key<Real> key[each], met[each];
  uint32_t found[each];
#pragma unroll
  for (int k = 0; k < each; ++k) key[k] = mine.sorted[begin + min(at(k), points - 1)];
  if (alike) {
#pragma unroll
    for (int k = 0; k < each; ++k) met[k] = other.sorted[begin + min(at(k), points - 1)];
  }
  if (wanted) {
    const uint32_t* from = side.number + row * side.count + begin;
#pragma unroll
    for (int k = 0; k < each; ++k) found[k] = from[min(at(k), points - 1)];
  }
  Code<Real> next_code = 0, previous_code = 0;
  if (wanted && threadIdx.x == 96 && begin + points < mine.count) {
    next_code = mine.code(begin + points);
  }
  if (wanted && threadIdx.x == 0 && begin > 0) previous_code = mine.code(begin - 1);
  if (threadIdx.x == 0) bracket = {0, other.count - 1};
  if (wanted) staging.clear();
  double cost = 0;
#pragma unroll
  for (int k = 0; k < each; ++k) {
    const Code<Real> code = mine.code_of(key[k]);
    codes[at(k)] = code;
    if (alike) {
      const Code<Real> gap = code - other.code_of(met[k]);
      const double distance = fabs(static_cast<double>(gap));
      if (at(k) < points) cost += work.p == 1 ? distance : distance * distance;
      // That of a point that ties with no other.
      slopes[at(k)] = static_cast<Real>(work.p == 1 ? (gap > 0) - (gap < 0)
                                                    : 2 * static_cast<double>(gap));
    }
    if (wanted) number[at(k)] = found[k];
  }
  __syncthreads();

  if (kSpread == Spread::weighted && other.levels) {
    if (threadIdx.x == 0) bracket.low = other.at(mine.begin(begin), 0, other.count - 1);
    if (threadIdx.x == 32) bracket.high = other.at(mine.begin(begin + points), 0, other.count - 1);
  }
  uint32_t rank[each];
  if (wanted) {
#pragma unroll
    for (int k = 0; k < each; ++k) {
      const int e = at(k);
      bool head = false;
      if (e < points) {
        head = e > 0 ? codes[e] != codes[e - 1] : begin == 0 || previous_code != codes[0];
      }
      const uint32_t word = __ballot_sync(0xffffffffu, head);
      if (threadIdx.x % 32 == 0) heads.word[e / 32] = word;
    }
    if (bits) staging.rank(number, points, bits, rank);
  }
  __syncthreads();

  if (alike) {
    cost = first ? cost * static_cast<double>(mine.wide) : 0;
  } else {
#pragma unroll 1
    for (int e = threadIdx.x; e < points; e += kTransportThreads) {
      const uint32_t i = begin + e;
      cost += problem.piece(codes[e], i, other.at(mine.begin(i), bracket.low, bracket.high));
    }
  }
  for (int step = 16; step > 0; step /= 2) cost += __shfl_down_sync(0xffffffffu, cost, step);
  if (threadIdx.x % 32 == 0) costs[threadIdx.x / 32] = cost;
  typename Staging<each>::Claim claim;
  if (wanted) {
    if (threadIdx.x < 32) heads.find_last();
    if (threadIdx.x / 32 == 1) heads.find_next();
    if (threadIdx.x == 64) {
      const Code<Real> v = codes[0];
      tile_from = begin;
      if (!heads.is_head(0)) {
        tile_from = last_run(begin - 1, [&](uint32_t k) { return mine.code(k) == v; });
      }
    }
    if (threadIdx.x == 96) {
      const Code<Real> v = codes[points - 1];
      tile_to = begin + points;
      if (tile_to < mine.count && next_code == v) {
        tile_to = first_where(tile_to, mine.count, [&](uint32_t k) { return mine.code(k) != v; });
      }
    }
    if (bits) claim = staging.claim(side.cursors + row * buckets);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (double part : costs) sum += part;
    work.costs[blockIdx.x] = bad ? NAN : sum;
  }
  if (!wanted) return;

  // The first of each group of ties, in this tile, finds the slope of all; of points that meet one
  // to one and tie with no other, nearly all of most data, it is known.
  const auto is_known = [&](int e) {
    return alike && heads.is_alone(e, points, tile_to == begin + points);
  };
  unsigned leads = 0;
#pragma unroll
  for (int k = 0; k < each; ++k) {
    const int e = at(k);
    if (e < points && !is_known(e) && (e == 0 || heads.is_head(e))) leads |= 1u << k;
  }
  for (; leads; leads &= leads - 1) {
    const int e = at(__ffs(leads) - 1);
    const int next = heads.after(e);
    const uint32_t from = e == 0 ? tile_from : begin + e;
    const uint32_t to = next < 0 ? tile_to : begin + next;
    slopes[e] = static_cast<Real>(problem.slope(codes[e], from, to, bracket, begin));
  }
  if (bits) staging.settle(claim);
  __syncthreads();
  const Real unit = work.p == 1 ? Real(1)
                                : static_cast<Real>(ldexp(1.0, work.exponents[work.pass.first + row]));
  Real slope[each];
#pragma unroll
  for (int k = 0; k < each; ++k) {
    const int e = at(k);
    if (e >= points) break;
    const Real known = slopes[is_known(e) ? e : max(0, heads.at_or_before(e))];
    slope[k] = bad ? static_cast<Real>(NAN) : known * unit;
  }
  if (!bits) {
    Real* out = static_cast<Real*>(side.slopes) + row * side.count;
#pragma unroll
    for (int k = 0; k < each; ++k) {
      if (at(k) < points) out[number[at(k)]] = slope[k];
    }
    return;
  }
  __syncthreads();
  uint32_t* numbers = reinterpret_cast<uint32_t*>(codes);  // which are done with
#pragma unroll
  for (int k = 0; k < each; ++k) {
    if (at(k) < points) {
      const uint32_t point = number[at(k)], to = staging.count[point >> bits] + rank[k];
      numbers[to] = point;
      slopes[to] = slope[k];
    }
  }
  __syncthreads();
  write_runs<Real, each>(side, row, staging, numbers, slopes, points);
}

// Adds up what blocks found, in one order.
template <typename Real>
__global__ void __launch_bounds__(kThreads)
    values_kernel(TransportArguments work, int64_t blocks, double mass) {
  __shared__ typename cub::BlockReduce<double, kThreads>::TempStorage scratch;
  const int64_t slot = work.pass.first + blockIdx.x;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    sum += work.costs[blockIdx.x * blocks + i];
  }
  sum = cub::BlockReduce<double, kThreads>(scratch).Sum(sum);
  if (threadIdx.x == 0) {
    static_cast<Real*>(work.values)[slot] =
        static_cast<Real>(ldexp(sum / mass, work.p * work.exponents[slot]));
  }
}

// The gradient of a point goes on where the pass before ended, and gets its weight at the end: so it
// does not depend on how many slots a pass has.
template <typename Real, int D>
__device__ __forceinline__ void begin_pull(const PullArguments& work, int64_t b, int64_t i,
                                           bool continued, Real (&sum)[D]) {
  const Real* out = static_cast<const Real*>(work.out) + (b * work.from.count + i) * D;
#pragma unroll
  for (int k = 0; k < D; ++k) sum[k] = continued ? out[k] : Real(0);
}
template <typename Real, int D>
__device__ __forceinline__ void end_pull(const PullArguments& work, int64_t b, int64_t i, bool last,
                                         const Real (&sum)[D]) {
  const int64_t n = work.from.count;
  Real scale = 1;
  if (last) {
    const double mass = work.weights ? work.weights[b * n + i] : 1.0 / static_cast<double>(n);
    scale = static_cast<Real>(mass * work.scale);
  }
  Real* out = static_cast<Real*>(work.out) + (b * n + i) * D;
#pragma unroll
  for (int k = 0; k < D; ++k) out[k] = sum[k] * scale;
}

// A point's slopes of all directions of the pass, times these.
template <typename Real, int D>
__global__ void __launch_bounds__(kPullFew)
    pull_kernel(PullArguments work, int64_t first_batch, int64_t tiles) {
  __shared__ Real directions[kPullAhead][D], pulls[kPullAhead];
  const Pass& pass = work.pass;
  const int64_t b = first_batch + blockIdx.x / tiles, n = work.from.count;
  const int64_t i = blockIdx.x % tiles * kPullFew + threadIdx.x;
  const int64_t from = max(pass.first, b * pass.directions);
  const int64_t to = min(pass.first + pass.slots, (b + 1) * pass.directions);
  const Real* slopes = static_cast<const Real*>(work.from.slopes);
  slopes += (from - pass.first) * n + min(i, n - 1);
  const Real* grad = static_cast<const Real*>(work.grad);
  Real sum[D] = {};
  if (i < n) begin_pull<Real, D>(work, b, i, from > b * pass.directions, sum);
  for (int64_t slot = from; slot < to; slot += kPullAhead) {
    const int some = static_cast<int>(min(to - slot, int64_t(kPullAhead)));
    Real slope[kPullAhead];
#pragma unroll
    for (int k = 0; k < kPullAhead; ++k) {
      slope[k] = k < some ? *slopes : Real(0);
      slopes += n;
    }
    __syncthreads();
    const Real* theta =
        static_cast<const Real*>(work.directions.data) + (slot - b * pass.directions) * D;
    for (int e = threadIdx.x; e < kPullAhead * D; e += kPullFew) {
      directions[e / D][e % D] = e < some * D ? theta[e] : Real(0);
    }
    for (int k = threadIdx.x; k < kPullAhead; k += kPullFew) {
      pulls[k] = grad && k < some ? grad[slot + k] : Real(1);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kPullAhead; ++k) {
      const Real pull = slope[k] * pulls[k];
#pragma unroll
      for (int c = 0; c < D; ++c) sum[c] = fma(pull, directions[k][c], sum[c]);
    }
  }
  if (i < n) end_pull<Real, D>(work, b, i, to == (b + 1) * pass.directions, sum);
}

// Slopes of one bucket of each of the pass's slots, in shared memory in the order of their points.
// Calls `each` with the row, when they are there.
template <typename Real, typename Each>
__device__ __forceinline__ void for_buckets(const Bucketed& from, int64_t bucket, int64_t row,
                                            int64_t end, Real* shared, Each&& each) {
  constexpr int at_once = kPullEach;
  const int64_t n = from.count, first = bucket << from.bits;
  const int points = static_cast<int>(min(n - first, int64_t(1) << from.bits));
  const Real* slopes = static_cast<const Real*>(from.slopes) + first;
  const uint16_t* places = from.places + first;
  Real slope[at_once];
  uint16_t place[at_once];
  // The next slot's are on their way while these are used.
  const auto load = [&](int64_t row, int some) {
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const int e = some + k * kPullThreads + threadIdx.x;
      if (e < points) {
        slope[k] = slopes[row * n + e];
        place[k] = places[row * n + e];
      }
    }
  };
  load(row, 0);
  for (; row < end; ++row) {
    for (int some = 0; some < points; some += at_once * kPullThreads) {
      if (some > 0) load(row, some);
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        if (some + k * kPullThreads + threadIdx.x < points) shared[place[k]] = slope[k];
      }
    }
    if (row + 1 < end) load(row + 1, 0);
    __syncthreads();
    each(row, points);
    __syncthreads();
  }
}

// To rows of all points.
template <typename Real>
__global__ void __launch_bounds__(kPullThreads)
    unpack_kernel(Bucketed from, Real* out, bool finite, int64_t buckets) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  Real* shared = reinterpret_cast<Real*>(dynamic);
  const int64_t bucket = blockIdx.x % buckets, row = blockIdx.x / buckets;
  for_buckets(from, bucket, row, row + 1, shared, [&](int64_t row, int points) {
    Real* to = out + row * from.count + (bucket << from.bits);
    for (int e = threadIdx.x; e < points; e += kPullThreads) {
      const Real slope = shared[e];
      to[e] = finite && isnan(slope) ? Real(0) : slope;
    }
  });
}

template <typename Real, int D>
__global__ void __launch_bounds__(kPullThreads)
    pull_buckets_kernel(PullArguments work, int64_t first_batch, int64_t buckets) {
  __shared__ Real shared[1 << kBucketBits];
  const Pass& pass = work.pass;
  const int64_t b = first_batch + blockIdx.x / buckets, bucket = blockIdx.x % buckets;
  const int64_t from = max(pass.first, b * pass.directions);
  const int64_t to = min(pass.first + pass.slots, (b + 1) * pass.directions);
  const Real* grad = static_cast<const Real*>(work.grad);
  const Real* directions = static_cast<const Real*>(work.directions.data);
  const int64_t n = work.from.count, first = (bucket << kBucketBits) + threadIdx.x;
  Real sum[kPullEach][D] = {};
#pragma unroll
  for (int k = 0; k < kPullEach; ++k) {
    const int64_t i = first + k * kPullThreads;
    if (i < n) begin_pull<Real, D>(work, b, i, from > b * pass.directions, sum[k]);
  }
  for_buckets(work.from, bucket, from - pass.first, to - pass.first, shared,
              [&](int64_t row, int points) {
                const int64_t slot = pass.first + row;
                const Real* theta = directions + (slot - b * pass.directions) * D;
                const Real pull = grad ? __ldg(grad + slot) : Real(1);
#pragma unroll
                for (int k = 0; k < kPullEach; ++k) {
                  const int e = k * kPullThreads + threadIdx.x;
                  const Real slope = e < points ? shared[e] * pull : Real(0);
#pragma unroll
                  for (int c = 0; c < D; ++c) sum[k][c] = fma(slope, __ldg(theta + c), sum[k][c]);
                }
              });
#pragma unroll
  for (int k = 0; k < kPullEach; ++k) {
    const int64_t i = first + k * kPullThreads;
    if (i < n) end_pull<Real, D>(work, b, i, to == (b + 1) * pass.directions, sum[k]);
  }
}

// The batch elements of a pass, and a grid of blocks for some points of each.
struct Batches {
  int64_t first, count;
  explicit Batches(const Pass& pass)
      : first(pass.first / pass.directions),
        count((pass.first + pass.slots - 1) / pass.directions - first + 1) {}
};

template <typename Body>
void with_projecting(const Points& points, const Directions& directions, const Pass& pass,
                     int device, Body&& body) {
  with_real(points.format == Format::float64, [&](auto zero) {
    using Real = decltype(zero);
    with_dim(points.dim, [&](auto dim) {
      const Batches batches(pass);
      const int64_t tiles = ceil_div(points.count, kThreads * kKeysPoints);
      // Points read again for each group cost less than multiprocessors without a block.
      const int64_t wanted = int64_t(kProjectBlocks) * chip(device).multiprocessors;
      const int64_t groups =
          std::clamp<int64_t>(wanted / (tiles * batches.count), 1, pass.directions);
      const Projecting<Real, dim> projecting{
          points, static_cast<const Real*>(directions.data), pass, batches.first, tiles, groups};
      body(projecting, grid(tiles * groups * batches.count), zero, dim);
    });
  });
}

}  // namespace

void sliced_wasserstein_grid(const GridArguments& a, Place place) {
  const DeviceGuard guard(place.device);
  with_real(a.is_double, [&](auto zero) {
    const unsigned blocks = grid(ceil_div(a.batch * a.directions, kThreads));
    grid_kernel<decltype(zero)><<<blocks, kThreads, 0, stream_of(place)>>>(a);
    check(cudaGetLastError(), "the launch of grid_kernel");
  });
}

void sliced_wasserstein_keys(const KeysArguments& a, Place place) {
  const DeviceGuard guard(place.device);
  with_projecting(a.points, a.directions, a.pass, place.device,
                  [&](auto projecting, unsigned blocks, auto zero, auto dim) {
                    using Real = decltype(zero);
                    keys_kernel<Real, dim><<<blocks, kThreads, 0, stream_of(place)>>>(
                        projecting, a.bits, a.exponents, a.poison,
                        static_cast<Key<Real>*>(a.keys), a.number);
                    check(cudaGetLastError(), "the launch of keys_kernel");
                  });
}

void sliced_wasserstein_project(const Points& points, const Directions& directions,
                                const Pass& pass, void* out, Place place) {
  const DeviceGuard guard(place.device);
  with_projecting(points, directions, pass, place.device,
                  [&](auto projecting, unsigned blocks, auto zero, auto dim) {
                    using Real = decltype(zero);
                    project_kernel<Real, dim><<<blocks, kThreads, 0, stream_of(place)>>>(
                        projecting, static_cast<Real*>(out));
                    check(cudaGetLastError(), "the launch of project_kernel");
                  });
}

int64_t prefix_chunks(int64_t count) { return ceil_div(count, kPrefixChunk); }

void sliced_wasserstein_levels(const uint32_t* number, const double* weights, int64_t count,
                               const Pass& pass, double* levels, void* totals, Place place) {
  const DeviceGuard guard(place.device);
  const cudaStream_t stream = stream_of(place);
  Mass* sums = reinterpret_cast<Mass*>(levels);
  prefix(WeightSource{number, weights, count, pass}, sums, pass.slots, count, totals, stream);
  normalize_kernel<<<grid(ceil_div(count, kThreads) * pass.slots), kThreads, 0, stream>>>(count,
                                                                                          sums);
  check(cudaGetLastError(), "the launch of normalize_kernel");
  finish_levels_kernel<<<grid(ceil_div(pass.slots, kThreads)), kThreads, 0, stream>>>(
      weights, count, pass, levels);
  check(cudaGetLastError(), "the launch of finish_levels_kernel");
}

int64_t transport_blocks(int64_t n, int64_t m, bool is_double) {
  const int64_t tile = is_double ? kTransportTile<double> : kTransportTile<float>;
  return ceil_div(n, tile) + ceil_div(m, tile);
}

int bucket_bits(int64_t count, bool is_double) {
  for (int bits = kBucketBits; (is_double ? 8 : 4) << bits <= kMostBucketBytes; ++bits) {
    if (ceil_div(count, int64_t(1) << bits) <= kMostBuckets) return bits;
  }
  return 0;
}

void sliced_wasserstein_transport(const TransportArguments& a, Place place) {
  const DeviceGuard guard(place.device);
  const cudaStream_t stream = stream_of(place);
  const auto launch = [&](auto zero, auto spread) {
    using Real = decltype(zero);
    constexpr bool weighted = spread == Spread::weighted;
    const auto moments = [&](const SortedSide& side, int64_t wide) {
      prefix(MomentSource<Real, weighted>{side, a, wide}, side.moments, a.pass.slots, side.count,
             a.totals, stream);
    };
    if (a.x.moments) moments(a.x, a.y.count);
    if (a.y.moments) moments(a.y, a.x.count);
    const int64_t n = a.x.count, m = a.y.count;
    // Where the points of both sides meet one to one, all pieces begin with a point of x.
    const bool both = spread != Spread::alike || a.y.slopes;
    constexpr int64_t tile = kTransportTile<Real>;
    const int64_t tiles_x = ceil_div(n, tile), tiles_y = both ? ceil_div(m, tile) : 0;
    const unsigned blocks = grid(a.pass.slots * (tiles_x + tiles_y));
    const auto buckets = [](const SortedSide& side) {
      return side.bucket_bits ? ceil_div(side.count, int64_t(1) << side.bucket_bits) : 0;
    };
    const int64_t words = tile + 2 * std::max(buckets(a.x), buckets(a.y));
    const int64_t bytes = tile * (sizeof(Code<Real>) + sizeof(Real)) + words * sizeof(uint32_t);
    auto* kernel = transport_kernel<Real, spread>;
    allow_shared_memory(kernel, bytes);
    kernel<<<blocks, kTransportThreads, bytes, stream>>>(a, tiles_x, tiles_y);
    check(cudaGetLastError(), "the launch of transport_kernel");
    const double mass = weighted ? 1.0 : static_cast<double>(n) * static_cast<double>(m);
    values_kernel<Real>
        <<<grid(a.pass.slots), kThreads, 0, stream>>>(a, tiles_x + tiles_y, mass);
    check(cudaGetLastError(), "the launch of values_kernel");
  };
  with_real(a.is_double, [&](auto zero) {
    if (a.x.kept.levels || a.y.kept.levels) {
      launch(zero, std::integral_constant<Spread, Spread::weighted>());
    } else if (a.x.count != a.y.count) {
      launch(zero, std::integral_constant<Spread, Spread::equal>());
    } else {
      launch(zero, std::integral_constant<Spread, Spread::alike>());
    }
  });
}

void sliced_wasserstein_unpack(const Bucketed& from, int64_t slots, void* out, bool finite,
                               bool is_double, Place place) {
  const DeviceGuard guard(place.device);
  with_real(is_double, [&](auto zero) {
    using Real = decltype(zero);
    const int64_t buckets = ceil_div(from.count, int64_t(1) << from.bits);
    const int64_t bytes = sizeof(Real) << from.bits;
    auto* kernel = unpack_kernel<Real>;
    allow_shared_memory(kernel, bytes);
    kernel<<<grid(slots * buckets), kPullThreads, bytes, stream_of(place)>>>(
        from, static_cast<Real*>(out), finite, buckets);
    check(cudaGetLastError(), "the launch of unpack_kernel");
  });
}

bool can_pull_buckets(int bits) { return bits == kBucketBits; }

void sliced_wasserstein_pull(const PullArguments& a, Place place) {
  const DeviceGuard guard(place.device);
  const Batches batches(a.pass);
  const cudaStream_t stream = stream_of(place);
  with_real(a.is_double, [&](auto zero) {
    using Real = decltype(zero);
    with_dim(a.dim, [&](auto dim) {
      if (can_pull_buckets(a.from.bits)) {
        const int64_t buckets = ceil_div(a.from.count, 1 << kBucketBits);
        pull_buckets_kernel<Real, dim><<<grid(buckets * batches.count), kPullThreads, 0, stream>>>(
            a, batches.first, buckets);
        check(cudaGetLastError(), "the launch of pull_buckets_kernel");
        return;
      }
      const int64_t tiles = ceil_div(a.from.count, kPullFew);
      pull_kernel<Real, dim>
          <<<grid(tiles * batches.count), kPullFew, 0, stream>>>(a, batches.first, tiles);
      check(cudaGetLastError(), "the launch of pull_kernel");
    });
  });
}

}  // namespace sdcore
