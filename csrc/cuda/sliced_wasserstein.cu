#include "sliced_wasserstein.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "async.cuh"
#include "chip.h"
#include "launch.cuh"
#include "ordered.cuh"
#include "points.cuh"

namespace sdcore {
namespace {

// Blocks that count and that fetch have one multiprocessor to themselves: what limits them is its
// shared memory. Half the threads that fit leave each the registers to have the next points on
// their way. One more warp has the copy engine bring what they need.
constexpr int kCountThreads = 512;
constexpr int kCountBlock = kCountThreads + 32;
// Points of a thread at a time. Copied ones come through shared memory, where two tiles have to fit
// beside the counters of 11 directions.
template <typename Real, bool Weighted, bool Copied>
constexpr int kCountPoints = (Copied ? 16 : 32) / sizeof(Real) / (Weighted ? 2 : 1);
constexpr int kTiles = 2;  // of copied points: one in use, one on its way
// Directions whose lines a thread keeps in registers: what fits shared memory with 4096 bins. From
// there, 16 bytes for all lanes of a warp take as long as an increment by all of them.
constexpr int kMostLines = 11;
template <typename Real, int D, bool Copied>
constexpr bool kKeepsLines = Copied && sizeof(Real) == 4 && D <= 3;
constexpr int kRangeThreads = 256;
constexpr int kRangeDirections = 128;  // whose ends a block keeps at a time
constexpr int kSolveThreads = kPart / 2;
constexpr int kGatherThreads = 512;
constexpr int kMostDepth = 3;  // stages of tables in shared memory, in use or on their way
constexpr int kMostStage = 4;  // tables of a stage, gathered from without a branch in between
constexpr int kPulls = 64;     // directions whose lines and gradients are made at a time
// Bytes of shared memory that a block that counts has beside what is counted for it: static ones,
// and the rounding of addresses, which a plan leaves room for.
constexpr int64_t kStatic = 128, kSpare = kStatic + 64;
// In the place of a mass: a projection was not finite, or a weight NaN.
constexpr unsigned long long kPoison = ~0ull;

__host__ __device__ constexpr uint32_t round_up(uint32_t x, uint32_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
__host__ __device__ constexpr uint32_t padded_bins(uint32_t bins) { return round_up(bins, 8); }
__host__ __device__ constexpr uint32_t parts_of(uint32_t bins) {
  return (bins + kPart - 1) / kPart;
}

// Points of a chunk, in a multiple that the copy engine can begin at.
__host__ __device__ constexpr int64_t chunk_of(int64_t n, int64_t chunks) {
  return ((n + chunks - 1) / chunks + 15) / 16 * 16;
}

// Projection and bin in one: a point's place between the ends of a direction's bins, from 0 to 1,
// is an affine function of its coordinates.
template <typename Real, int D>
struct alignas(D == 3 ? 4 * sizeof(Real) : sizeof(Real)) Line {
  Real slope[D];
  Real offset;
};

// Bytes of shared memory that a block has before its counters.
template <typename Real, int D>
__host__ __device__ constexpr uint32_t histogram_head(int group, uint32_t bins) {
  const uint32_t lines = round_up(group * static_cast<uint32_t>(sizeof(Line<Real, D>)), 8);
  return round_up(lines + group * (parts_of(bins) * 8 + 4), 16);
}

template <typename Real>
struct Range {
  Real low, high;
};

// The ends of one direction's bins. Rounded step by step, so that all kernels see the same ends.
template <typename Real, int D>
__device__ Range<Real> ends_of(const Ends& ends, int64_t slot, const Real* theta) {
  if (ends.kind == Ends::given) {
    const Real* given = static_cast<const Real*>(ends.data) + 2 * slot;
    return {given[0], given[1]};
  }
  if (ends.kind == Ends::found) {
    const auto* found = static_cast<const Ordered<Real>*>(ends.data) + 2 * slot;
    return {unordered(~found[0]), unordered(found[1])};
  }
  Range<Real> range{0, 0};
  for (int k = 0; k < D; ++k) {
    Real a = theta[k] * static_cast<Real>(ends.low), b = theta[k] * static_cast<Real>(ends.high);
    if constexpr (sizeof(Real) == 4) {
      range.low = __fadd_rn(range.low, fminf(a, b));
      range.high = __fadd_rn(range.high, fmaxf(a, b));
    } else {
      range.low = __dadd_rn(range.low, fmin(a, b));
      range.high = __dadd_rn(range.high, fmax(a, b));
    }
  }
  return range;
}

template <typename Real, int D>
__device__ Line<Real, D> line_of(const Range<Real>& range, const Real* theta) {
  const Real width = range.high - range.low;
  const Real scale = range.high > range.low ? 1 / width : Real(0);
  Line<Real, D> line;
  for (int k = 0; k < D; ++k) line.slope[k] = theta[k] * scale;
  // Bins begin a few roundings lower: what lies on an edge counts in the bin above.
  constexpr Real above = kEdgeRoundings * (sizeof(Real) == 4 ? 0x1p-23 : 0x1p-52);
  line.offset = above - range.low * scale;
  return line;
}

// The bin of a point, 0 to bins: one past the last stands for the last, which saves a comparison
// for each projection. Saturation also sends NaN to bin 0. Adding 2 and rounding down leaves the
// integer part of a multiple of 2^-22 in a number's lowest bits; the other bits, 0x40000000, go
// when the bin is multiplied by the four bytes of an entry.
template <int D>
__device__ __forceinline__ uint32_t bin_of(const float (&x)[D], const Line<float, D>& line,
                                           float bins) {
  float place = line.offset;
#pragma unroll
  for (int k = 0; k < D - 1; ++k) place = fmaf(x[k], line.slope[k], place);
  place = __saturatef(fmaf(x[D - 1], line.slope[D - 1], place));
  return __float_as_uint(__fmaf_rd(place, bins, 2.0f));
}
template <int D>
__device__ __forceinline__ uint32_t bin_of(const double (&x)[D], const Line<double, D>& line,
                                           double bins) {
  double place = line.offset;
#pragma unroll
  for (int k = 0; k < D; ++k) place = fma(x[k], line.slope[k], place);
  return static_cast<uint32_t>(__double2int_rd(fmin(fmax(place, 0.0), 1.0) * bins));
}
// What bin_of takes for the number of bins.
__device__ __forceinline__ float unit_of(float, uint32_t bins) {
  return static_cast<float>(bins) * 0x1p-22f;
}
__device__ __forceinline__ double unit_of(double, uint32_t bins) { return bins; }

// A row of a table in shared memory, by its address there: from a bin to an entry's address is
// one instruction.
template <typename Entry>
struct Row {
  uint32_t base;
  __device__ explicit Row(uint32_t address) : base(address) {}
  __device__ uint32_t at(uint32_t bin) const {
    return base + bin * static_cast<uint32_t>(sizeof(Entry));
  }
};
__device__ __forceinline__ void increment(uint32_t address) {
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(address) : "memory");
}
__device__ __forceinline__ uint32_t fetch_add(uint32_t address, uint32_t x) {
  uint32_t before;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "r"(address), "r"(x)
               : "memory");
  return before;
}
__device__ __forceinline__ float entry(uint32_t address, float) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
  return value;
}
__device__ __forceinline__ double entry(uint32_t address, double) {
  double value;
  asm volatile("ld.shared.f64 %0, [%1];" : "=d"(value) : "r"(address));
  return value;
}

// Of a rescaling, in the numbers that arithmetic is in.
template <typename Real>
__device__ __forceinline__ const Clamped<Real>& numbers_of(const Rescale& rescale) {
  if constexpr (sizeof(Real) == 8) {
    return rescale.wide;
  } else {
    return rescale.narrow;
  }
}
// Where a coordinate is before it is kept in bounds; rounded once, alike in all kernels.
template <typename Real>
__device__ __forceinline__ Real place_of(Real x, const Clamped<Real>& by) {
  return fma(x, by.factor, by.offset);
}
// Coordinates as they count.
template <typename Real, int D, int P>
__device__ __forceinline__ void rescale_all(const Rescale& rescale, Real (&x)[P][D]) {
  if (!rescale.on) return;
  const Clamped<Real>& by = numbers_of<Real>(rescale);
#pragma unroll
  for (int j = 0; j < P; ++j) {
#pragma unroll
    for (int k = 0; k < D; ++k) {
      const Real place = place_of(x[j][k], by);
      x[j][k] = place < by.low ? by.low : place > by.high ? by.high : place;
    }
  }
}

struct TwoPoints {
  Points side[2];
  int64_t tiles[2];
};

template <typename Real, int D, int P>
__global__ void __launch_bounds__(kRangeThreads)
    range_kernel(TwoPoints both, const Real* __restrict__ directions, int64_t count,
                 Ordered<Real>* __restrict__ extremes) {
  __shared__ Ordered<Real> ends[2 * kRangeDirections];
  const int64_t tiles = both.tiles[0] + both.tiles[1];
  const int64_t b = blockIdx.x / tiles;
  int64_t tile = blockIdx.x % tiles;
  const bool second = tile >= both.tiles[0];
  if (second) tile -= both.tiles[0];
  const Points points = second ? both.side[1] : both.side[0];
  Real x[P][D];
  load<Real, D, P>(points, b, tile * P * kRangeThreads + threadIdx.x, kRangeThreads, x);
  for (int64_t first = 0; first < count; first += kRangeDirections) {
    const int here = static_cast<int>(min(count - first, static_cast<int64_t>(kRangeDirections)));
    for (int i = threadIdx.x; i < 2 * here; i += kRangeThreads) ends[i] = 0;
    __syncthreads();
    for (int l = 0; l < here; ++l) {
      Real theta[D];
#pragma unroll
      for (int k = 0; k < D; ++k) theta[k] = __ldg(directions + (first + l) * D + k);
      const Real infinity = static_cast<Real>(INFINITY);
      Real low = infinity, high = -infinity;
#pragma unroll
      for (int j = 0; j < P; ++j) {
        Real value = x[j][0] * theta[0];
#pragma unroll
        for (int k = 1; k < D; ++k) value = fma(x[j][k], theta[k], value);
        low = fmin(low, value);
        high = fmax(high, value);
      }
      const auto least = warp_max(~ordered(low)), most = warp_max(ordered(high));
      if (threadIdx.x % 32 == 0) {
        atomicMax(&ends[2 * l], least);
        atomicMax(&ends[2 * l + 1], most);
      }
    }
    __syncthreads();
    auto* out = extremes + 2 * (b * count + first);
    for (int i = threadIdx.x; i < 2 * here; i += kRangeThreads) {
      if (ends[i] > __ldcg(out + i)) atomicMax(out + i, ends[i]);
    }
    __syncthreads();
  }
}

struct HistogramWork {
  Side side[2];
  int threads[2];  // of a block that count this side's points, times points of a thread: a tile
  Directions directions;
  Ends ends;
  uint32_t bins;
  int group;  // directions of a block
  unsigned* finished;
};

// Adds 64 bits as two halves: shared memory has no such atomic.
__device__ __forceinline__ void add_wide(uint32_t low, uint32_t high, unsigned long long x) {
  const uint32_t part = static_cast<uint32_t>(x);
  const uint32_t before = fetch_add(low, part);
  fetch_add(high, static_cast<uint32_t>(x >> 32) + (before + part < before));
}

// A point with a coordinate that is not finite, or so large that a projection may overflow. By
// value, or all points would have to be in memory for this one.
template <typename Real, int D>
struct Point {
  Real x[D];
};
template <typename Real, int D>
__device__ __noinline__ void mark_if_not_finite(Point<Real, D> point, const Real* directions,
                                                int here, int* poison) {
  for (int g = 0; g < here; ++g) {
    Real value = 0;
#pragma unroll
    for (int k = 0; k < D; ++k) value = fma(point.x[k], directions[g * D + k], value);
    if (!isfinite(value)) poison[g] = 1;
  }
}

template <typename Real>
struct Largest;
template <>
struct Largest<float> {
  static constexpr float value = 3.402823466e38f;
};
template <>
struct Largest<double> {
  static constexpr double value = 1.7976931348623157e308;
};

__device__ __forceinline__ uint32_t warp_sum(uint32_t x) {
  return __reduce_add_sync(0xffffffffu, x);
}
__device__ __forceinline__ unsigned long long warp_sum(unsigned long long x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Eight masses to memory, as what the histogram holds.
__device__ __forceinline__ void store_8(void* out, int64_t at, int bits, const uint32_t (&x)[8]) {
  if (bits == 16) {
    uint4 packed;
    packed.x = x[0] | x[1] << 16;
    packed.y = x[2] | x[3] << 16;
    packed.z = x[4] | x[5] << 16;
    packed.w = x[6] | x[7] << 16;
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + at) = packed;
  } else {
    auto* to = reinterpret_cast<uint4*>(static_cast<uint32_t*>(out) + at);
    to[0] = make_uint4(x[0], x[1], x[2], x[3]);
    to[1] = make_uint4(x[4], x[5], x[6], x[7]);
  }
}
__device__ __forceinline__ void store_8(void* out, int64_t at, int,
                                        const unsigned long long (&x)[8]) {
  auto* to = reinterpret_cast<ulonglong2*>(static_cast<unsigned long long*>(out) + at);
#pragma unroll
  for (int j = 0; j < 4; ++j) to[j] = make_ulonglong2(x[2 * j], x[2 * j + 1]);
}

// A block counts one chunk of one side's points for a group of directions, in shared memory, and
// writes what it counted: adding it to one histogram in memory by atomics takes three times as
// long, and memory would have to be zeroed.
//
// Points that lie row after row are copied into shared memory: loads of coordinates three apart
// take the same pipe as the increments, three times as long as reading them there.
template <typename Real, int D, bool Weighted, bool Copied>
__global__ void __launch_bounds__(kCountBlock, 1)
    histogram_kernel(const __grid_constant__ HistogramWork work) {
  using Sum = std::conditional_t<Weighted, unsigned long long, uint32_t>;
  constexpr int P = kCountPoints<Real, Weighted, Copied>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Ordered<Real> steepest;
  const uint32_t bins = work.bins, pitch = padded_bins(bins + 1);
  const uint32_t row_words = pitch * (Weighted ? 2 : 1);
  const uint32_t parts = parts_of(bins);
  const int64_t count = work.directions.count;
  auto* lines = reinterpret_cast<Line<Real, D>*>(shared);  // first, for they are aligned to 16
  auto* totals = reinterpret_cast<unsigned long long*>(
      shared + round_up(work.group * static_cast<uint32_t>(sizeof(Line<Real, D>)), 8));
  auto* poison = reinterpret_cast<int*>(totals + work.group * parts);
  auto* counters = reinterpret_cast<uint32_t*>(shared + histogram_head<Real, D>(work.group, bins));

  const int64_t chunks = work.side[0].chunks + work.side[1].chunks;
  const int64_t groups = (count + work.group - 1) / work.group;
  int64_t chunk = blockIdx.x % chunks;
  const int64_t first = blockIdx.x / chunks % groups * work.group;
  const int64_t b = blockIdx.x / chunks / groups;
  const bool second = chunk >= work.side[0].chunks;
  if (second) chunk -= work.side[0].chunks;
  const Side& side = second ? work.side[1] : work.side[0];
  const int threads = second ? work.threads[1] : work.threads[0];
  const int here = static_cast<int>(min(count - first, static_cast<int64_t>(work.group)));
  const Real* directions = static_cast<const Real*>(work.directions.data) + first * D;
  const int64_t slot = b * count + first;

  const int64_t n = side.points.count;
  const int64_t each = chunk_of(n, side.chunks);
  const int64_t begin = min(chunk * each, n), end = min(begin + each, n);
  const bool counts = static_cast<int>(threadIdx.x) < threads;
  const int tile = P * threads;
  for (uint32_t i = threadIdx.x; i < here * row_words / 4; i += blockDim.x) {
    reinterpret_cast<uint4*>(counters)[i] = make_uint4(0, 0, 0, 0);
  }
  for (uint32_t i = threadIdx.x; i < here * parts; i += blockDim.x) totals[i] = 0;
  if (threadIdx.x == 0) steepest = 0;
  [[maybe_unused]] unsigned char* tiles =
      reinterpret_cast<unsigned char*>(counters + here * row_words);
#if SDCORE_COPY_ENGINE
  __shared__ uint64_t arrived[kTiles], used[kTiles];
  if (Copied && threadIdx.x == 0) {
    for (int i = 0; i < kTiles; ++i) {
      barrier_init(arrived + i, 1);
      barrier_init(used + i, threads / 32);
    }
    barriers_made();
  }
#endif
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (blockIdx.x == 0 && threadIdx.x == 0 && work.finished) *work.finished = 0;
  __syncthreads();
  const Points& source = side.points;
#if SDCORE_COPY_ENGINE
  if constexpr (Copied) {
    const int64_t bytes = static_cast<int64_t>(tile) * D * size_of(source.format);
    if (threadIdx.x == kCountThreads) {  // the others make the lines, and then count
      const auto* from = static_cast<const unsigned char*>(source.data) +
                         (b * source.stride[0] + begin * D) * size_of(source.format);
      const int64_t all = (end - begin) * D * size_of(source.format);
      int to = 0;
      uint32_t parity = 1;  // of a barrier that nobody has used yet, this phase is over
      for (int64_t at = 0; at < all; at += bytes) {
        const uint32_t some = static_cast<uint32_t>(min(bytes, all - at));
        barrier_wait(used + to, parity);
        barrier_expect(arrived + to, some);
        copy_bulk(tiles + to * bytes, from + at, some, arrived + to);
        if (++to == kTiles) {
          to = 0;
          parity ^= 1;
        }
      }
    }
  }
#endif
  [[maybe_unused]] Real next[P][D];
  if (!Copied && counts && begin < end) {
    load<Real, D, P>(source, b, begin + threadIdx.x, threads, next);
  }
  if (const int g = threadIdx.x; g < here) {
    const Real* theta = directions + g * D;
    lines[g] = line_of<Real, D>(ends_of<Real, D>(work.ends, slot + g, theta), theta);
    poison[g] = 0;
    Real largest = 0;
    for (int k = 0; k < D; ++k) largest = fmax(largest, fabs(theta[k]));
    atomicMax(&steepest, ordered(largest));
  }
  if (threadIdx.x < kCountThreads) sync_some(kCountThreads);
  const Real safe = Largest<Real>::value / 4 / fmax(unordered(steepest), Real(1));
  const Real scale = unit_of(Real(), bins);

  constexpr bool keeps = kKeepsLines<Real, D, Copied>;
  [[maybe_unused]] Line<Real, D> kept[keeps ? kMostLines : 1];
  if constexpr (keeps) {
#pragma unroll
    for (int g = 0; g < kMostLines; ++g) kept[g] = lines[min(g, here - 1)];
  }
  const uint32_t first_row = shared_address(counters), row_bytes = row_words * 4;
  const int points = counts ? static_cast<int>(end - begin) : 0, thread = threadIdx.x;
  [[maybe_unused]] int now = 0;
  [[maybe_unused]] uint32_t parity = 0;
  for (int from = 0; from < points; from += tile) {
    const int left = points - from - thread;  // from this thread's first point on
    Real x[P][D];
    if constexpr (Copied) {
#if SDCORE_COPY_ENGINE
      barrier_wait(arrived + now, parity);
      with_format<Real>(source, [&](const auto* format) {
        using T = std::remove_pointer_t<decltype(format)>;
        T* data = reinterpret_cast<T*>(tiles) + (now * tile + thread) * D;
#pragma unroll
        for (int j = 0; j < P; ++j) {
#pragma unroll
          for (int k = 0; k < D; ++k) x[j][k] = widen(data[j * threads * D + k]);
        }
      });
      __syncwarp();
      if (thread % 32 == 0) barrier_arrive(used + now);
      if (++now == kTiles) {
        now = 0;
        parity ^= 1;
      }
#endif
    } else {
#pragma unroll
      for (int j = 0; j < P; ++j) {
#pragma unroll
        for (int k = 0; k < D; ++k) x[j][k] = next[j][k];
      }
    }
    rescale_all<Real, D, P>(side.rescale, x);
    const auto size = [&](int j) {
      Real sum = 0;
#pragma unroll
      for (int k = 0; k < D; ++k) sum += fabs(x[j][k]);
      return sum;
    };
    bool odd = left <= (P - 1) * threads;
#pragma unroll
    for (int j = 0; j < P; ++j) odd |= !(size(j) < safe);
    if (odd) {
#pragma unroll
      for (int j = 0; j < P; ++j) {
        if (j * threads >= left) {
          x[j][0] = static_cast<Real>(NAN);  // counted in bin 0, and taken off again below
        } else if (!(size(j) < safe)) {
          Point<Real, D> point;
#pragma unroll
          for (int k = 0; k < D; ++k) point.x[k] = x[j][k];
          mark_if_not_finite<Real, D>(point, directions, here, poison);
        }
      }
    }
    // The next points are on their way while these are counted.
    if (!Copied && from + tile < points) {
      load<Real, D, P>(source, b, begin + from + tile + thread, threads, next);
    }
    unsigned long long mass[P];
    if constexpr (Weighted) {
#pragma unroll
      for (int j = 0; j < P; ++j) {
        const int64_t i = begin + from + thread + j * threads;
        const double weight = j * threads < left ? side.weights[b * n + i] : 0;
        if (weight != weight) {
          for (int g = 0; g < here; ++g) poison[g] = 1;
        }
        mass[j] = __double2ull_rn(weight * kWeightUnit);
      }
    }
    const auto count_in = [&](uint32_t base, const Line<Real, D>& line) {
      const Row<uint32_t> row(base);
#pragma unroll
      for (int j = 0; j < P; ++j) {
        const uint32_t counter = row.at(bin_of<D>(x[j], line, scale));
        if constexpr (Weighted) {
          add_wide(counter, counter + pitch * 4, mass[j]);
        } else {
          increment(counter);
        }
      }
    };
    uint32_t row = first_row;
    if constexpr (keeps) {
#pragma unroll
      for (int g = 0; g < kMostLines; ++g) {
        if (g >= here) break;
        count_in(row, kept[g]);
        row += row_bytes;
      }
    } else {
      Line<Real, D> following = lines[0];
      for (int g = 0; g < here; ++g) {
        // One ahead: a load waits for the increments that were issued before it.
        const Line<Real, D> line = following;
        following = lines[min(g + 1, here - 1)];
        count_in(row, line);
        row += row_bytes;
      }
    }
  }
  __syncthreads();

  // What was counted past the last bin belongs to it; what was no point does not count.
  for (int g = threadIdx.x; g < here; g += blockDim.x) {
    uint32_t* row = counters + g * row_words;
    if constexpr (Weighted) {
      const auto at = [&](uint32_t i) {
        return row[i] | static_cast<unsigned long long>(row[i + pitch]) << 32;
      };
      const unsigned long long sum = at(bins) + at(bins - 1);
      row[bins - 1] = static_cast<uint32_t>(sum);
      row[bins - 1 + pitch] = static_cast<uint32_t>(sum >> 32);
      row[bins] = row[bins + pitch] = 0;
    } else {
      row[bins - 1] += row[bins];
      row[bins] = 0;
      const int64_t tiles = (end - begin + tile - 1) / tile;
      row[0] -= static_cast<uint32_t>(tiles * tile - (end - begin));
    }
  }
  __syncthreads();

  const Histograms& out = side.out;
  const uint32_t wide = padded_bins(bins), vectors = wide / 8;
  const int64_t to = slot * out.chunks + side.first_chunk + chunk;  // one row further each chunk
  for (uint32_t v = threadIdx.x; v < here * round_up(vectors, 32); v += blockDim.x) {
    const uint32_t g = v / round_up(vectors, 32), at = v % round_up(vectors, 32) * 8;
    const uint32_t* row = counters + g * row_words + at;
    Sum x[8] = {}, sum = 0;
    if (at < wide) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[j] = row[j];
        if constexpr (Weighted) x[j] |= static_cast<Sum>(row[j + pitch]) << 32;
        sum += x[j];
      }
      store_8(out.masses, (to + g * out.chunks) * out.pitch + at, out.bits, x);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
      const uint32_t part = min(at / static_cast<uint32_t>(kPart), parts - 1);
      atomicAdd(totals + g * parts + part, static_cast<unsigned long long>(sum));
    }
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < here * parts; i += blockDim.x) {
    const uint32_t g = i / parts;
    out.totals[(to + g * out.chunks) * parts + i % parts] = poison[g] ? kPoison : totals[i];
  }
}

template <typename T>
struct Pair {
  T x, y;
};

template <typename T, int N>
struct Sums {
  T value[N];
};

// Sums over the threads before this one, and over all. Once in a kernel.
template <typename T, int N>
__device__ void scan(const Sums<T, N>& mine, Sums<T, N>& before, Sums<T, N>& total) {
  constexpr int warps = kSolveThreads / 32;
  static_assert(warps <= 32);
  __shared__ Sums<T, N> scratch[warps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto scan_warp = [&](Sums<T, N>& sum) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const T lower = __shfl_up_sync(0xffffffffu, sum.value[i], step);
        if (lane >= step) sum.value[i] += lower;
      }
    }
  };
  Sums<T, N> sum = mine;
  scan_warp(sum);
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  // Each warp scans the sums of all warps, which saves a second barrier.
  Sums<T, N> all = lane < warps ? scratch[lane] : Sums<T, N>{};
  scan_warp(all);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    total.value[i] = __shfl_sync(0xffffffffu, all.value[i], 31);
    const T earlier = __shfl_sync(0xffffffffu, all.value[i], max(warp - 1, 0));
    before.value[i] = (warp > 0 ? earlier : T(0)) + sum.value[i] - mine.value[i];
  }
}

// The sum over all threads, for the first one. Once in a kernel.
__device__ __forceinline__ double sum_of_block(double mine) {
  constexpr int warps = kSolveThreads / 32;
  __shared__ double scratch[warps];
  const auto sum_warp = [](double x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  };
  mine = sum_warp(mine);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = mine;
  __syncthreads();
  return threadIdx.x < 32 ? sum_warp(threadIdx.x < warps ? scratch[threadIdx.x] : 0) : 0;
}

using Mass = unsigned long long;

// The mass in two neighboring bins: the sums of what the chunks' blocks counted, fewer than 2^31.
__device__ __forceinline__ void add(Pair<uint32_t>& sum, uint32_t two) {
  sum.x += two & 0xffff;
  sum.y += two >> 16;
}
__device__ __forceinline__ void add(Pair<uint32_t>& sum, uint2 two) {
  sum.x += two.x;
  sum.y += two.y;
}
template <typename Two>
__device__ __forceinline__ Pair<Mass> sum_chunks(const void* masses, int64_t at, int64_t chunks,
                                                 int64_t pitch) {
  // Loads on their way at a time: all that the blocks of an H200 write for 32 directions.
  constexpr int some = sizeof(Two) == 4 ? 44 : 22;
  const Two* from = static_cast<const Two*>(masses) + at / 2;
  Pair<uint32_t> sum = {0, 0};
  for (int64_t chunk = 0; chunk < chunks; chunk += some, from += some * (pitch / 2)) {
    Two loaded[some];
#pragma unroll
    for (int j = 0; j < some; ++j) {
      loaded[j] = chunk + j < chunks ? __ldcg(from + j * (pitch / 2)) : Two();
    }
#pragma unroll
    for (int j = 0; j < some; ++j) add(sum, loaded[j]);
  }
  return {sum.x, sum.y};
}

// Bins i and i + 1 of a direction. Rows of counts are padded, those of 64 bits may not be.
__device__ Pair<Mass> masses_at(const Histograms& side, int64_t slot, int64_t i, int64_t bins) {
  if (i >= bins) return {0, 0};
  const int64_t at = slot * side.chunks * side.pitch + i;
  if (side.bits == 16) return sum_chunks<uint32_t>(side.masses, at, side.chunks, side.pitch);
  if (side.bits == 32) return sum_chunks<uint2>(side.masses, at, side.chunks, side.pitch);
  const Mass* from = static_cast<const Mass*>(side.masses) + at;
  Pair<Mass> sum = {0, 0};
  for (int64_t chunk = 0; chunk < side.chunks; ++chunk, from += side.pitch) {
    sum.x += from[0];
    if (i + 1 < bins) sum.y += from[1];
  }
  return sum;
}

// Of the mass of x in a bin, quantiles F(b-) to F(b), the part below G(b-) comes from lower bins of
// y and pulls with slope +1, the part above G(b) from higher ones with slope -1.
template <typename Real>
__device__ __forceinline__ Real slope_1(double f_before, double f, double g_before, double g) {
  const double below = fmax(0.0, fmin(g_before, f) - f_before);
  const double above = fmax(0.0, f - fmax(g, f_before));
  return static_cast<Real>(below - above) / static_cast<Real>(f - f_before);
}

template <typename Real>
struct SolveWork {
  Histograms x, y;
  bool one_y;
  const Real* directions;
  int64_t batch, count;
  Ends ends;
  int64_t bins;
  Real* values;
  double scale;
  bool reduce;
  Real* table_x;
  Real* table_y;
  Real* edges;
  double* costs;
  unsigned* finished;
  double* moments;
};

// What a block of the solve kernels starts from: one part of one direction's bins, of which each
// thread has two, and the mass before them.
struct Problem {
  int64_t slot, bin;
  Pair<Mass> x, y, before;
  double unit_x, unit_y, width;
  bool bad;
};

template <typename Real, int D>
__device__ Problem begin(const SolveWork<Real>& work) {
  __shared__ int bad;
  const int64_t parts = parts_of(static_cast<uint32_t>(work.bins));
  Problem problem;
  problem.slot = blockIdx.x / parts;
  const int64_t part = blockIdx.x % parts, l = problem.slot % work.count;
  problem.bin = part * kPart + 2 * threadIdx.x;
  const int64_t slot_y = work.one_y ? l : problem.slot;
  if (threadIdx.x == 0) bad = 0;
  __syncthreads();
  wait_for_earlier_kernels();
  let_next_kernel_start();
  problem.x = masses_at(work.x, problem.slot, problem.bin, work.bins);
  problem.y = masses_at(work.y, slot_y, problem.bin, work.bins);
  // Of the mass of all parts, that of earlier ones is added to the prefix sums.
  Sums<Mass, 6> sums = {};
  sums.value[0] = problem.x.x + problem.x.y;
  sums.value[1] = problem.y.x + problem.y.y;
  const auto sum = [&](const Histograms& side, int64_t slot, Mass& earlier, Mass& all) {
    const bool known = side.totals != nullptr;
    const int64_t size = known ? side.chunks * parts : work.bins;
    const Mass* from = known ? side.totals + slot * size
                             : static_cast<const Mass*>(side.masses) + slot * side.pitch;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < size; i += kSolveThreads) {
      const Mass mass = __ldcg(from + i);
      if (mass == kPoison) bad = 1;
      all += mass;
      if ((known ? i % parts : i / kPart) < part) earlier += mass;
    }
  };
  sum(work.x, problem.slot, sums.value[2], sums.value[3]);
  sum(work.y, slot_y, sums.value[4], sums.value[5]);
  Sums<Mass, 6> before, total;
  scan(sums, before, total);
  problem.unit_x = 1.0 / static_cast<double>(total.value[3]);
  problem.unit_y = 1.0 / static_cast<double>(total.value[5]);
  problem.before = {before.value[0] + total.value[2], before.value[1] + total.value[4]};
  problem.bad = bad != 0;
  const Range<Real> range = ends_of<Real, D>(work.ends, problem.slot, work.directions + l * D);
  problem.width = (static_cast<double>(range.high) - static_cast<double>(range.low)) /
                  static_cast<double>(work.bins);
  if (threadIdx.x == 0 && part == 0) {
    work.edges[2 * problem.slot] = range.low;
    work.edges[2 * problem.slot + 1] = range.high;
  }
  return problem;
}

template <typename Real>
__device__ Real or_nan(bool bad, Real x) {
  return bad ? static_cast<Real>(NAN) : x;
}

// A block's part of the cost to memory; the last block adds them up, in one order, to the values.
template <typename Real>
__device__ void finish(const SolveWork<Real>& work, bool bad, double cost) {
  __shared__ bool last;
  const double total = sum_of_block(cost);
  if (threadIdx.x == 0) {
    work.costs[blockIdx.x] = or_nan(bad, total);
    __threadfence();
    last = atomicAdd(work.finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  const int64_t parts = parts_of(static_cast<uint32_t>(work.bins));
  if (!work.reduce) {
    for (int64_t slot = threadIdx.x; slot < work.batch * work.count; slot += kSolveThreads) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += __ldcg(work.costs + slot * parts + part);
      work.values[slot] = static_cast<Real>(sum);
    }
    return;
  }
  const int lane = threadIdx.x % 32;
  for (int64_t b = threadIdx.x / 32; b < work.batch; b += kSolveThreads / 32) {
    double sum = 0;
    for (int64_t i = lane; i < work.count * parts; i += 32) {
      sum += __ldcg(work.costs + b * work.count * parts + i);
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) work.values[b] = static_cast<Real>(sum * work.scale);
  }
}

template <typename Real, int D>
__global__ void __launch_bounds__(kSolveThreads) solve_1_kernel(SolveWork<Real> work) {
  const Problem problem = begin<Real, D>(work);
  const Mass x[2] = {problem.x.x, problem.x.y}, y[2] = {problem.y.x, problem.y.y};
  Pair<Mass> end = problem.before;
  double f_before = end.x * problem.unit_x, g_before = end.y * problem.unit_y, cost = 0;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (problem.bin + j >= work.bins) break;
    end = {end.x + x[j], end.y + y[j]};
    const double f = end.x * problem.unit_x, g = end.y * problem.unit_y;
    cost += fabs(f - g) * problem.width;
    const int64_t at = problem.slot * work.bins + problem.bin + j;
    const Real slope_x = x[j] > 0 ? slope_1<Real>(f_before, f, g_before, g) : Real(0);
    work.table_x[at] = or_nan(problem.bad, slope_x);
    if (work.table_y) {
      const Real slope_y = y[j] > 0 ? slope_1<Real>(g_before, g, f_before, f) : Real(0);
      work.table_y[at] = or_nan(problem.bad, slope_y);
    }
    f_before = f;
    g_before = g;
  }
  finish(work, problem.bad, cost);
}

// For p = 2. Per bin, up to and including it: one side's mass; and the first moment, in bins, of
// the mass from the part's first bin on. `parts` has the moments of all parts before each.
struct Moments {
  const double* level;
  const double* moment;
  const double* parts;
};

struct MomentsWork {
  double* level;
  double* moment;
  double* part;
};
__device__ __forceinline__ MomentsWork moments_of(double* moments, int64_t slots, int64_t bins,
                                                  int side) {
  const int64_t parts = parts_of(static_cast<uint32_t>(bins));
  double* from = moments + side * slots * (2 * bins + parts);
  return {from, from + slots * bins, from + 2 * slots * bins};
}

template <typename Real, int D>
__global__ void __launch_bounds__(kSolveThreads) moments_kernel(SolveWork<Real> work) {
  const Problem problem = begin<Real, D>(work);
  const double bin = static_cast<double>(problem.bin);
  const Pair<double> first = {problem.x.x * problem.unit_x * bin,
                              problem.y.x * problem.unit_y * bin};
  const Pair<double> second = {problem.x.y * problem.unit_x * (bin + 1),
                               problem.y.y * problem.unit_y * (bin + 1)};
  Sums<double, 2> before, total;
  scan(Sums<double, 2>{{first.x + second.x, first.y + second.y}}, before, total);
  const int64_t slots = work.batch * work.count;
  const auto write = [&](int side, Mass before, const Pair<Mass>& mass, double unit,
                         double moment_before, double first, double second, double all) {
    const MomentsWork out = moments_of(work.moments, slots, work.bins, side);
    const int64_t at = problem.slot * work.bins + problem.bin;
    if (problem.bin < work.bins) {
      out.level[at] = or_nan(problem.bad, (before + mass.x) * unit);
      out.moment[at] = moment_before + first;
    }
    if (problem.bin + 1 < work.bins) {
      out.level[at + 1] = or_nan(problem.bad, (before + mass.x + mass.y) * unit);
      out.moment[at + 1] = moment_before + first + second;
    }
    if (threadIdx.x == 0) out.part[blockIdx.x] = all;
  };
  write(0, problem.before.x, problem.x, problem.unit_x, before.value[0], first.x, second.x,
        total.value[0]);
  write(1, problem.before.y, problem.y, problem.unit_y, before.value[1], first.y, second.y,
        total.value[1]);
}

// The first bin up to which there is more mass than u, or the last bin.
__device__ __forceinline__ int64_t bin_above(const double* level, int64_t bins, double u) {
  int64_t low = 0, high = bins - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (level[middle] > u) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// First moment of the mass below quantile u.
__device__ __forceinline__ double moment_below(const Moments& side, int64_t bins, double u) {
  const int64_t i = bin_above(side.level, bins, u);
  if (i == 0) return 0;
  const double moment = side.moment[i - 1] + side.parts[(i - 1) / kPart];
  return moment + (u - side.level[i - 1]) * static_cast<double>(i);
}

// One side's slope: 2 (bin - mean of its partners).
template <typename Real>
__device__ Real slope_2(const Moments& mine, const Moments& other, double width, int64_t bins,
                        int64_t i) {
  const double begin = i > 0 ? mine.level[i - 1] : 0, end = mine.level[i], mass = end - begin;
  if (mass <= 0) return 0;  // not NaN's way
  const double partners = moment_below(other, bins, end) - moment_below(other, bins, begin);
  return static_cast<Real>(2 * width * (static_cast<double>(i) - partners / mass));
}

// The cost of the piece of mass that begins where bin i of `mine` begins, up to the end of that
// bin or of the partner's. Of pieces that begin where bins of both do, `first` has them.
__device__ __forceinline__ double piece_2(const Moments& mine, const Moments& other, int64_t bins,
                                          int64_t i, bool first) {
  const double begin = i > 0 ? mine.level[i - 1] : 0, end = mine.level[i];
  if (!(end > begin)) return 0;
  const int64_t j = bin_above(other.level, bins, begin);
  if (!first && (j > 0 ? other.level[j - 1] : 0) == begin) return 0;
  const double apart = static_cast<double>(i - j);
  return fmax(0.0, fmin(end, other.level[j]) - begin) * apart * apart;
}

template <typename Real>
__global__ void __launch_bounds__(kSolveThreads) solve_2_kernel(SolveWork<Real> work) {
  extern __shared__ double before[];  // [2, parts]: first moments of all parts before
  const int64_t bins = work.bins, slots = work.batch * work.count;
  const int64_t parts = parts_of(static_cast<uint32_t>(bins));
  const int64_t slot = blockIdx.x / parts, part = blockIdx.x % parts;
  const auto side = [&](int number) {
    const MomentsWork all = moments_of(work.moments, slots, bins, number);
    if (threadIdx.x == 0) {
      double sum = 0;
      for (int64_t i = 0; i < parts; ++i) {
        before[number * parts + i] = sum;
        sum += all.part[slot * parts + i];
      }
    }
    return Moments{all.level + slot * bins, all.moment + slot * bins, before + number * parts};
  };
  const Moments x = side(0), y = side(1);
  __syncthreads();
  const Real* edge = work.edges + 2 * slot;
  const double width = (static_cast<double>(edge[1]) - static_cast<double>(edge[0])) /
                       static_cast<double>(bins);
  const bool bad = isnan(x.level[0]);
  double cost = 0;
  const int64_t end = min(bins, (part + 1) * kPart);
  for (int64_t i = part * kPart + threadIdx.x; i < end; i += kSolveThreads) {
    work.table_x[slot * bins + i] = or_nan(bad, slope_2<Real>(x, y, width, bins, i));
    if (work.table_y) {
      work.table_y[slot * bins + i] = or_nan(bad, slope_2<Real>(y, x, width, bins, i));
    }
    cost += piece_2(x, y, bins, i, true) + piece_2(y, x, bins, i, false);
  }
  finish(work, bad, cost * width * width);
}

struct GatherWork {
  const void* grad;  // Real, of batch element b and direction l at b * strides[0] + l * strides[1]
  int64_t grad_stride[2];
  Points points;
  Rescale rescale;
  Directions directions;
  const double* weights;
  double mass;
  const void* table;
  const void* edges;
  uint32_t bins;
  int stage;  // tables of a stage of the ring in shared memory
  int depth;  // its stages
  bool dense_out;
  Points out;
};

#if !SDCORE_COPY_ENGINE
// Waits until the copies of this thread's oldest stage have arrived.
__device__ __forceinline__ void wait_for_copies(int depth) {
  static_assert(kMostDepth == 3);
  if (depth == 3) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
}
__device__ __forceinline__ void copy_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
#endif

// Of one direction: where a point's slope is in the table, and what it adds to the gradient.
template <typename Real, int D>
struct alignas(D == 3 ? 4 * sizeof(Real) : sizeof(Real)) Pull {
  Line<Real, D> line;
  Real theta[D];
};

template <typename Real>
__host__ __device__ constexpr uint32_t table_pitch(uint32_t bins) {
  return round_up(bins + 1, 16 / sizeof(Real));
}

// Whether tables can be copied 16 bytes at a time.
template <typename Real>
__device__ __forceinline__ bool is_whole(const Real* tables, uint32_t bins) {
  return bins % (16 / sizeof(Real)) == 0 && reinterpret_cast<uintptr_t>(tables) % 16 == 0;
}

// The tables of all directions, some at a time, a stage, on their way through shared memory. An
// entry past the last of each is the last once more.
template <typename Real>
struct Ring {
  Real* memory;
  uint32_t bins;
  int stage;  // tables of a stage
  bool whole;

  __device__ uint32_t pitch() const { return table_pitch<Real>(bins); }
  __device__ Real* at(int slot) const { return memory + slot * stage * pitch(); }

#if SDCORE_COPY_ENGINE
  // By one warp: copies by all threads were half of the kernel's instructions. `arrived` expects
  // the warp's 32 lanes, and one of them for the bytes.
  __device__ void fetch(const Real* tables, int slot, int here, uint64_t* arrived) const {
    const int lane = threadIdx.x % 32;
    Real* to = at(slot);
    if (lane == 0) {
      const uint32_t bytes = bins * static_cast<uint32_t>(sizeof(Real));
      barrier_expect(arrived + slot, whole ? here * bytes : 0);
      for (int g = 0; whole && g < here; ++g) {
        copy_bulk(to + g * pitch(), tables + g * bins, bytes, arrived + slot);
      }
    }
    for (int g = 0; !whole && g < here; ++g) {
      for (uint32_t i = lane; i < bins; i += 32) copy_1(to + g * pitch() + i, tables + g * bins + i);
    }
    if (lane < here) copy_1(to + lane * pitch() + bins, tables + lane * bins + bins - 1);
    barrier_arrive_with_copies(arrived + slot);
  }
#else
  // By all threads, one stage.
  __device__ void fetch(const Real* tables, int slot, int here) const {
    constexpr uint32_t some = 16 / sizeof(Real);
    for (int g = 0; g < here; ++g) {
      const Real* from = tables + g * bins;
      Real* to = at(slot) + g * pitch();
      if (whole) {
        for (uint32_t i = threadIdx.x * some; i < bins; i += blockDim.x * some) {
          copy_16(to + i, from + i);
        }
      } else {
        for (uint32_t i = threadIdx.x; i < bins; i += blockDim.x) copy_1(to + i, from + i);
      }
      if (threadIdx.x == 0) copy_1(to + bins, from + bins - 1);
    }
  }
#endif
};

// Points stay in registers while the tables of all directions come by.
template <typename Real, int D, int P>
__global__ void __launch_bounds__(kGatherThreads, 1)
    gather_kernel(const __grid_constant__ GatherWork work) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Pull<Real, D> pulls[kPulls];
  const uint32_t bins = work.bins;
  const int stage = work.stage, depth = work.depth, threads = static_cast<int>(blockDim.x);
  const int64_t count = work.directions.count, n = work.points.count;
  const int64_t block = static_cast<int64_t>(P) * threads;
  const int64_t tiles = (n + block - 1) / block, b = blockIdx.x / tiles;
  const int64_t begin = blockIdx.x % tiles * block, at = begin + threadIdx.x;
  const Real* tables = static_cast<const Real*>(work.table) + b * count * bins;
  const Ring<Real> ring = {reinterpret_cast<Real*>(shared), bins, stage, is_whole(tables, bins)};
  const auto some = [&](int64_t first) {
    return static_cast<int>(min(count - first, static_cast<int64_t>(stage)));
  };

  wait_for_earlier_kernels();
  let_next_kernel_start();
#if SDCORE_COPY_ENGINE
  __shared__ uint64_t arrived[kMostDepth], used[kMostDepth];
  if (threadIdx.x == 0) {
    for (int i = 0; i < depth; ++i) {
      barrier_init(arrived + i, 33);
      barrier_init(used + i, threads / 32);
    }
    barriers_made();
  }
  __syncthreads();
  const auto fetch = [&](int64_t first, int slot) {
    if (threadIdx.x < 32 && first < count) {
      ring.fetch(tables + first * bins, slot, some(first), arrived);
    }
  };
  uint32_t parity = 0;  // of the phase in which the present stage's tables arrive
#else
  const auto fetch = [&](int64_t first, int slot) {
    if (first < count) ring.fetch(tables + first * bins, slot, some(first));
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#endif
  for (int i = 0; i < depth - 1; ++i) fetch(static_cast<int64_t>(i) * stage, i);
  Real x[P][D], sum[P][D] = {};
  load<Real, D, P>(work.points, b, at, threads, x);
  rescale_all<Real, D, P>(work.rescale, x);
  const Real scale = unit_of(Real(), bins);
  int now = 0;
  const int at_once = kPulls / stage * stage;
  for (int64_t first = 0; first < count; first += stage) {
    const int pulled = static_cast<int>(first % at_once);
    if (pulled == 0) {
      __syncthreads();
      for (int g = threadIdx.x; g < at_once && first + g < count; g += threads) {
        const int64_t l = first + g;
        const Real* theta = static_cast<const Real*>(work.directions.data) + l * D;
        const Real* edge = static_cast<const Real*>(work.edges) + 2 * (b * count + l);
        const Real grad = static_cast<const Real*>(
            work.grad)[b * work.grad_stride[0] + l * work.grad_stride[1]];
        Pull<Real, D> pull;
        pull.line = line_of<Real, D>({edge[0], edge[1]}, theta);
        for (int k = 0; k < D; ++k) pull.theta[k] = theta[k] * grad;
        pulls[g] = pull;
      }
      __syncthreads();
    }
    // The place of the stage before is free when all are done with it.
    const int before = now == 0 ? depth - 1 : now - 1;
    const int64_t coming = first + static_cast<int64_t>(depth - 1) * stage;
#if SDCORE_COPY_ENGINE
    barrier_wait(arrived + now, parity);
    if (threadIdx.x < 32 && first > 0 && coming < count) {
      barrier_wait(used + before, now == 0 ? parity ^ 1 : parity);
    }
#else
    wait_for_copies(depth);
    __syncthreads();
#endif
    fetch(coming, before);
    const int here = some(first);
    const auto gather = [&](int g) {
      const Pull<Real, D> pull = pulls[pulled + g];
      const Row<Real> table(shared_address(ring.at(now) + g * ring.pitch()));
#pragma unroll
      for (int j = 0; j < P; ++j) {
        const Real slope = entry(table.at(bin_of<D>(x[j], pull.line, scale)), Real());
#pragma unroll
        for (int k = 0; k < D; ++k) sum[j][k] = fma(slope, pull.theta[k], sum[j][k]);
      }
    };
    if (here == kMostStage) {
      // Without branches in between, so that one table's entries arrive while the next one's bins
      // are found.
#pragma unroll
      for (int g = 0; g < kMostStage; ++g) gather(g);
    } else {
      for (int g = 0; g < here; ++g) gather(g);
    }
#if SDCORE_COPY_ENGINE
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(used + now);
#endif
    if (++now == depth) {
      now = 0;
#if SDCORE_COPY_ENGINE
      parity ^= 1;
#endif
    }
  }

#pragma unroll
  for (int j = 0; j < P; ++j) {
    const int64_t i = at + static_cast<int64_t>(j) * threads;
    const double weight = work.weights && i < n ? work.weights[b * n + i] : 1;
    const Real mass = static_cast<Real>(weight * work.mass);
#pragma unroll
    for (int k = 0; k < D; ++k) sum[j][k] *= mass;
  }
  if (work.rescale.on) {
    // Read again: there are no registers to remember in which coordinates were kept in bounds.
    const Clamped<Real>& by = numbers_of<Real>(work.rescale);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      Real point[1][D];
      load<Real, D, 1>(work.points, b, at + static_cast<int64_t>(j) * threads, 0, point);
#pragma unroll
      for (int k = 0; k < D; ++k) {
        const Real place = place_of(point[0][k], by);
        if (!(place >= by.low && place <= by.high)) sum[j][k] = 0;
      }
    }
  }
  with_format<Real>(work.out, [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    data += b * work.out.stride[0];
#if SDCORE_COPY_ENGINE
    if (work.dense_out) {
      // Where the tables were, as it is to lie in memory: three stores of every third number take
      // three times the transactions.
      T* staged = reinterpret_cast<T*>(shared);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < P; ++j) {
#pragma unroll
        for (int k = 0; k < D; ++k) {
          staged[(j * threads + threadIdx.x) * D + k] = Narrow<T>::from(sum[j][k]);
        }
      }
      copy_out_ready();
      __syncthreads();
      if (threadIdx.x == 0) {
        const int64_t points = min(block, n - begin);
        copy_out(data + begin * D, staged, static_cast<uint32_t>(points * D * sizeof(T)));
        copied_out();
      }
      return;
    }
#endif
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const int64_t i = at + static_cast<int64_t>(j) * threads;
      if (i >= n) continue;
#pragma unroll
      for (int k = 0; k < D; ++k) {
        data[i * work.out.stride[1] + k * work.out.stride[2]] = Narrow<T>::from(sum[j][k]);
      }
    }
  });
}

// Bytes of the tiles of copied points in shared memory.
template <typename Real>
int64_t tile_bytes(int64_t dim, Format format, int threads) {
  return kTiles * kCountPoints<Real, false, true> * threads * dim * size_of(format);
}

// Rows of coordinates, one after the other, that the copy engine takes.
bool is_dense(const Points& points) {
  const int64_t size = size_of(points.format);
  const auto aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  return points.stride[2] == 1 && points.stride[1] == points.dim &&
         aligned(reinterpret_cast<intptr_t>(points.data)) &&
         (points.batch == 1 || aligned(points.stride[0] * size)) &&
         aligned(points.count * points.dim * size);
}

}  // namespace

void sliced_wasserstein_range(const Points* sides, int count, Directions directions,
                              void* extremes, Place place) {
  const DeviceGuard guard(place.device);
  with_real(sides[0].format == Format::float64, [&](auto zero) {
    using Real = decltype(zero);
    with_dim(sides[0].dim, [&](auto dim) {
      constexpr int P = 64 / sizeof(Real) / (dim == 4 ? 2 : 1);
      TwoPoints both = {{sides[0], sides[count - 1]}, {0, 0}};
      for (int side = 0; side < count; ++side) {
        both.tiles[side] = ceil_div(sides[side].count, P * kRangeThreads);
      }
      const int64_t blocks = (both.tiles[0] + both.tiles[1]) * sides[0].batch;
      range_kernel<Real, dim, P><<<grid(blocks), kRangeThreads, 0, stream_of(place)>>>(
          both, static_cast<const Real*>(directions.data), directions.count,
          static_cast<Ordered<Real>*>(extremes));
      check(cudaGetLastError(), "the launch of range_kernel");
    });
  });
}

HistogramPlan sliced_wasserstein_plan(int64_t n, int64_t others, int64_t dim, int64_t batch,
                                      int64_t directions, int64_t bins, bool weighted,
                                      bool is_double, int device) {
  const Chip gpu = chip(device);
  const int64_t real = is_double ? 8 : 4;
  const int64_t each = padded_bins(static_cast<uint32_t>(bins) + 1) * (weighted ? 8 : 4) +
                       parts_of(static_cast<uint32_t>(bins)) * 8 + (dim + 1) * real + 4;
  // Room for copied points, unless bins need it all; and static shared memory and rounding.
  int64_t room = gpu.shared_per_block - kSpare;
  int64_t tiles = 0;
  if (gpu.has_copy_engine && !weighted) {
    tiles = is_double ? tile_bytes<double>(dim, Format::float64, kCountThreads)
                      : tile_bytes<float>(dim, Format::float32, kCountThreads);
  }
  if (room - tiles >= each) room -= tiles;
  const int64_t most = std::min({room / each, int64_t{kMostLines}, directions});
  if (most == 0) {
    throw std::invalid_argument(std::to_string(bins) + " bins don't fit shared memory");
  }
  // As many groups of directions as leave the blocks the least to do, each side's rounded down to
  // whole blocks. One group more reads the points once more.
  HistogramPlan plan;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t groups = ceil_div(directions, most); groups <= 4 * ceil_div(directions, most);
       ++groups) {
    const int64_t group = ceil_div(directions, groups);
    const int64_t resident = std::clamp<int64_t>(
        gpu.shared_per_block / (group * each + tiles + 1024), 1, 3);
    const int64_t blocks = gpu.multiprocessors * resident / (groups * batch);
    const int64_t mine = blocks * n / (n + others), theirs = blocks * others / (n + others);
    const double work = static_cast<double>(resident * group) /
                        static_cast<double>(std::max<int64_t>(mine + theirs, 1)) *
                        (1 + 0.002 * static_cast<double>(groups));
    if (work >= least) continue;
    least = work;
    plan.group = group;
    // Each with enough points to be worth its zeroing and writing.
    plan.chunks = std::clamp<int64_t>(mine, 1, ceil_div(n, 4 * kCountThreads));
  }
  const int64_t chunk = chunk_of(n, plan.chunks);
  plan.bits = weighted ? 64 : chunk <= 65535 ? 16 : 32;
  plan.pitch = padded_bins(static_cast<uint32_t>(bins));
  plan.parts = parts_of(static_cast<uint32_t>(bins));
  return plan;
}

void sliced_wasserstein_histogram(const Side* sides, int count, Directions directions, Ends ends,
                                  int64_t bins, unsigned* finished, Place place) {
  const DeviceGuard guard(place.device);
  const Chip gpu = chip(place.device);
  const Points& points = sides[0].points;
  with_real(points.format == Format::float64, [&](auto zero) {
    using Real = decltype(zero);
    with_dim(points.dim, [&](auto dim) {
      const auto launch = [&](auto weighted, auto copied) {
        HistogramWork work = {{sides[0], sides[count - 1]},
                              {0, 0},
                              directions,
                              ends,
                              static_cast<uint32_t>(bins),
                              static_cast<int>(std::min(sides[0].group, directions.count)),
                              finished};
        if (count == 1) work.side[1].chunks = 0;
        constexpr int P = kCountPoints<Real, weighted, copied>;
        int64_t tiles = 0;
        for (int side = 0; side < count; ++side) {
          const int64_t chunk = chunk_of(sides[side].points.count, sides[side].chunks);
          const int64_t passes = ceil_div(chunk, P * kCountThreads);
          // As many threads as leave none of a chunk's tiles much emptier than the others.
          work.threads[side] = static_cast<int>(ceil_div(ceil_div(chunk, P * passes), 32) * 32);
          if (copied) {
            tiles = std::max(tiles,
                             tile_bytes<Real>(dim, sides[side].points.format, work.threads[side]));
          }
        }
        const uint32_t words = padded_bins(work.bins + 1) * (weighted ? 2 : 1);
        const int64_t bytes = histogram_head<Real, dim>(work.group, work.bins) +
                              static_cast<int64_t>(work.group) * words * 4 + tiles;
        if (bytes > gpu.shared_per_block - kStatic || work.group > kMostLines) return false;
        auto* kernel = histogram_kernel<Real, dim, weighted, copied>;
        allow_shared_memory(kernel, bytes);
        const int64_t blocks = (work.side[0].chunks + work.side[1].chunks) *
                               ceil_div(directions.count, work.group) * points.batch;
        sdcore::launch(kernel, grid(blocks), kCountBlock, bytes, place, true,
                       "the launch of histogram_kernel", work);
        return true;
      };
      bool launched = false;
      if (sides[0].weights) {
        launched = launch(std::true_type(), std::false_type());
      } else {
        const bool dense =
            gpu.has_copy_engine && is_dense(points) && is_dense(sides[count - 1].points);
        launched = (dense && launch(std::false_type(), std::true_type())) ||
                   launch(std::false_type(), std::false_type());
      }
      if (!launched) {
        throw std::invalid_argument("a group of " + std::to_string(sides[0].group) +
                                    " directions does not fit shared memory");
      }
    });
  });
}

void sliced_wasserstein_solve(const SolveArguments& a, Place place) {
  const DeviceGuard guard(place.device);
  with_real(a.is_double, [&](auto zero) {
    using Real = decltype(zero);
    with_dim(a.dim, [&](auto d) {
      const SolveWork<Real> work = {a.x,
                                    a.y,
                                    a.one_y,
                                    static_cast<const Real*>(a.directions.data),
                                    a.batch,
                                    a.directions.count,
                                    a.ends,
                                    a.bins,
                                    static_cast<Real*>(a.values),
                                    a.scale,
                                    a.reduce,
                                    static_cast<Real*>(a.table_x),
                                    static_cast<Real*>(a.table_y),
                                    static_cast<Real*>(a.edges),
                                    a.costs,
                                    a.finished,
                                    a.moments};
      const uint32_t parts = parts_of(static_cast<uint32_t>(a.bins));
      const unsigned blocks = grid(a.batch * a.directions.count * parts);
      if (a.p == 1) {
        auto* kernel = solve_1_kernel<Real, d>;
        const Chip gpu = chip(place.device);
        // Early, when the first multiprocessor is done with counting: no second block must go there.
        const bool early = blocks <= static_cast<unsigned>(gpu.multiprocessors);
        const int64_t alone = early ? gpu.shared_per_block / 2 : 0;
        allow_shared_memory(kernel, alone);
        launch(kernel, blocks, kSolveThreads, alone, place, early, "the launch of solve_1_kernel",
               work);
        return;
      }
      launch(moments_kernel<Real, d>, blocks, kSolveThreads, 0, place, false,
             "the launch of moments_kernel", work);
      solve_2_kernel<Real>
          <<<blocks, kSolveThreads, 2 * parts * sizeof(double), stream_of(place)>>>(work);
      check(cudaGetLastError(), "the launch of solve_2_kernel");
    });
  });
}

void sliced_wasserstein_gather(const GatherArguments& a, Place place) {
  const DeviceGuard guard(place.device);
  const Chip gpu = chip(place.device);
  with_real(a.points.format == Format::float64, [&](auto zero) {
    using Real = decltype(zero);
    with_dim(a.points.dim, [&](auto dim) {
      const auto launch = [&](auto per_thread) {
        const int64_t table = table_pitch<Real>(static_cast<uint32_t>(a.bins)) * sizeof(Real);
        const int64_t room = gpu.shared_per_block - kPulls * sizeof(Pull<Real, dim>) - 128;
        const int64_t depth = room >= kMostDepth * table ? kMostDepth : kMostDepth - 1;
        const int64_t stage =
            std::min({room / (depth * table), int64_t{kMostStage}, a.directions.count});
        if (stage == 0) {
          throw std::invalid_argument(std::to_string(a.bins) + " bins don't fit shared memory");
        }
        const int64_t all = ceil_div(a.points.count * a.points.batch, per_thread);
        const int64_t waves = ceil_div(all, gpu.multiprocessors * kGatherThreads);
        // As many threads as give each multiprocessor the same number of points.
        const int64_t threads = ceil_div(ceil_div(all, gpu.multiprocessors * waves), 32) * 32;
        const int64_t blocks = ceil_div(a.points.count, threads * per_thread) * a.points.batch;
        const int64_t staged = threads * per_thread * dim * size_of(a.out.format);
        const bool dense_out = gpu.has_copy_engine && is_dense(a.out) && staged <= room;
        const GatherWork work = {a.grad,
                                 {a.grad_stride[0], a.grad_stride[1]},
                                 a.points,
                                 a.rescale,
                                 a.directions,
                                 a.weights,
                                 a.mass,
                                 a.table,
                                 a.edges,
                                 static_cast<uint32_t>(a.bins),
                                 static_cast<int>(stage),
                                 static_cast<int>(depth),
                                 dense_out,
                                 a.out};
        auto* kernel = gather_kernel<Real, dim, per_thread>;
        const int64_t bytes = std::max(depth * stage * table, dense_out ? staged : 0);
        allow_shared_memory(kernel, bytes);
        sdcore::launch(kernel, grid(blocks), static_cast<unsigned>(threads), bytes, place, true,
                       "the launch of gather_kernel", work);
      };
      constexpr int large = 64 / sizeof(Real) / (dim == 4 ? 2 : 1), small = std::max(1, large / 4);
      // Few points go to more threads, so that all multiprocessors have some.
      if (a.points.count * a.points.batch < gpu.multiprocessors * kGatherThreads * small) {
        launch(std::integral_constant<int, small>());
      } else {
        launch(std::integral_constant<int, large>());
      }
    });
  });
}

}  // namespace sdcore
