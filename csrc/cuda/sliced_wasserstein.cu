#include "sliced_wasserstein.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "points.cuh"
#include "runtime.h"

namespace sdcore {
namespace {

// Blocks that count and that fetch have one multiprocessor to themselves: what limits them is its
// shared memory.
constexpr int kCountThreads = 1024;
// Points of one thread at a time, in registers, of which it can have 64.
template <typename Real, bool Weighted>
constexpr int kCountPoints = 32 / sizeof(Real) / (Weighted ? 2 : 1);
constexpr int kRangeThreads = 256;
constexpr int kRangeDirections = 128;  // whose ends a block keeps at a time
constexpr int kSolveThreads = 1024;
constexpr int kGatherThreads = 512;
constexpr double kWeightUnit = 0x1p62;  // one over the unit of fixed-point weights

// Projection and bin in one: a point's place between the ends of a direction's bins, from 0 to 1,
// is an affine function of its coordinates.
template <typename Real, int D>
struct alignas(D == 3 ? 4 * sizeof(Real) : sizeof(Real)) Line {
  Real slope[D];
  Real offset;
};

template <typename Real>
struct Range {
  Real low, high;
};

// Unsigned integers in the order of the numbers.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(uint32_t bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}
__device__ __forceinline__ unsigned long long ordered(double x) {
  const unsigned long long bits = __double_as_longlong(x), sign = 1ull << 63;
  return bits & sign ? ~bits : bits | sign;
}
__device__ __forceinline__ double unordered(unsigned long long bits) {
  const unsigned long long sign = 1ull << 63;
  return __longlong_as_double(bits & sign ? bits & ~sign : ~bits);
}
template <typename Real>
using Ordered = decltype(ordered(Real()));

__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
  return __reduce_max_sync(0xffffffffu, x);
}
__device__ __forceinline__ unsigned long long warp_max(unsigned long long x) {
  for (int step = 16; step > 0; step /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

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
  line.offset = -range.low * scale;
  return line;
}

// The bin of a point, 0 to bins: one past the last stands for the last, which saves a comparison
// for each projection. Saturation also sends NaN to bin 0. Adding 2^23 and rounding down leaves a
// number's integer part in its lowest bits; the others, kBias, are taken off where rows begin.
template <int D>
__device__ __forceinline__ uint32_t bin_of(const float (&x)[D], const Line<float, D>& line,
                                           float bins) {
  float place = line.offset;
#pragma unroll
  for (int k = 0; k < D - 1; ++k) place = fmaf(x[k], line.slope[k], place);
  place = __saturatef(fmaf(x[D - 1], line.slope[D - 1], place));
  return __float_as_uint(__fmaf_rd(place, bins, 8388608.0f));
}
template <int D>
__device__ __forceinline__ uint32_t bin_of(const double (&x)[D], const Line<double, D>& line,
                                           double bins) {
  double place = line.offset;
#pragma unroll
  for (int k = 0; k < D; ++k) place = fma(x[k], line.slope[k], place);
  return static_cast<uint32_t>(__double2int_rd(fmin(fmax(place, 0.0), 1.0) * bins));
}
template <typename Real>
constexpr uint32_t kBias = sizeof(Real) == 4 ? 0x4b000000u : 0;

// A row of a table in shared memory, by its address there: from a bin to an entry's address is
// then one instruction, where the compiler takes three.
template <typename Real, typename Entry>
struct Row {
  uint32_t base;
  __device__ explicit Row(const Entry* row)
      : base(static_cast<uint32_t>(__cvta_generic_to_shared(row)) -
             kBias<Real> * static_cast<uint32_t>(sizeof(Entry))) {
    asm("" : "+r"(base));  // Or the compiler takes the bias off each address by itself.
  }
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

// Points first, first + step, ... of batch element b; from count on, the last one again.
template <typename Real, int D, int P>
__device__ __forceinline__ void load(const Points& points, int64_t b, int64_t first, int step,
                                     Real (&x)[P][D]) {
  with_format<Real>(points, [&](const auto* data) {
    data += b * points.stride[0];
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const int64_t i = min(first + static_cast<int64_t>(j) * step, points.count - 1);
#pragma unroll
      for (int k = 0; k < D; ++k) {
        x[j][k] = widen(data[i * points.stride[1] + k * points.stride[2]]);
      }
    }
  });
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
  int64_t chunks[2];
  Directions directions;
  Ends ends;
  uint32_t bins;
  int group;  // directions of a block
  int* poison;
};

// Adds 64 bits as two halves: shared memory has no such atomic.
__device__ __forceinline__ void add_wide(uint32_t low, uint32_t high, unsigned long long x) {
  const uint32_t part = static_cast<uint32_t>(x);
  const uint32_t before = fetch_add(low, part);
  fetch_add(high, static_cast<uint32_t>(x >> 32) + (before + part < before));
}

// A point with a coordinate that is not finite, or so large that a projection may overflow.
// By value, or all points would have to be in memory for this one.
template <typename Real, int D>
struct Point {
  Real x[D];
};
template <typename Real, int D>
__device__ __noinline__ void mark_if_not_finite(Point<Real, D> point, const Real* directions,
                                                int64_t slot, int here, int* poison) {
  for (int g = 0; g < here; ++g) {
    Real value = 0;
#pragma unroll
    for (int k = 0; k < D; ++k) value = fma(point.x[k], directions[g * D + k], value);
    if (!isfinite(value)) poison[slot + g] = 1;
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

template <typename Real, int D, bool Weighted>
__global__ void __launch_bounds__(kCountThreads, 1) histogram_kernel(HistogramWork work) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Ordered<Real> steepest;
  const uint32_t bins = work.bins, pitch = bins + 1;
  const int64_t count = work.directions.count;
  auto* lines = reinterpret_cast<Line<Real, D>*>(shared);
  auto* counters = reinterpret_cast<uint32_t*>(lines + work.group);

  const int64_t chunks = work.chunks[0] + work.chunks[1];
  const int64_t groups = (count + work.group - 1) / work.group;
  int64_t chunk = blockIdx.x % chunks;
  const int64_t first = blockIdx.x / chunks % groups * work.group;
  const int64_t b = blockIdx.x / chunks / groups;
  const bool second = chunk >= work.chunks[0];
  if (second) chunk -= work.chunks[0];
  const Side side = second ? work.side[1] : work.side[0];
  const int here = static_cast<int>(min(count - first, static_cast<int64_t>(work.group)));
  const Real* directions = static_cast<const Real*>(work.directions.data) + first * D;
  const int64_t slot = b * count + first;

  if (threadIdx.x == 0) steepest = 0;
  const uint32_t words = here * pitch * (Weighted ? 2 : 1);
  for (uint32_t i = threadIdx.x; i < words; i += kCountThreads) counters[i] = 0;
  __syncthreads();
  for (int g = threadIdx.x; g < here; g += kCountThreads) {
    const Real* theta = directions + g * D;
    lines[g] = line_of<Real, D>(ends_of<Real, D>(work.ends, slot + g, theta), theta);
    Real largest = 0;
    for (int k = 0; k < D; ++k) largest = fmax(largest, fabs(theta[k]));
    atomicMax(&steepest, ordered(largest));
  }
  __syncthreads();
  const Real theta_most = unordered(steepest);
  const Real safe = Largest<Real>::value / 4 / fmax(theta_most, Real(1));

  const int64_t n = side.points.count;
  const int64_t each = (n + (second ? work.chunks[1] : work.chunks[0]) - 1) /
                       (second ? work.chunks[1] : work.chunks[0]);
  const int64_t begin = chunk * each, end = min(begin + each, n);
  const Real scale = static_cast<Real>(bins);

  const auto add = [&](auto& x, auto& mass) {
    constexpr int P = sizeof(x) / sizeof(x[0]);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      Real size = fabs(x[j][0]);
#pragma unroll
      for (int k = 1; k < D; ++k) size += fabs(x[j][k]);
      if (!(size < safe)) {
        Point<Real, D> point;
#pragma unroll
        for (int k = 0; k < D; ++k) point.x[k] = x[j][k];
        mark_if_not_finite<Real, D>(point, directions, slot, here, work.poison);
      }
    }
    for (int g = 0; g < here; ++g) {
      const Line<Real, D> line = lines[g];
      const Row<Real, uint32_t> row(counters + g * pitch * (Weighted ? 2 : 1));
#pragma unroll
      for (int j = 0; j < P; ++j) {
        const uint32_t counter = row.at(bin_of<D>(x[j], line, scale));
        if constexpr (Weighted) {
          add_wide(counter, counter + pitch * 4, mass[j]);
        } else {
          increment(counter);
        }
      }
    }
  };
  const auto weight = [&](int64_t i) -> unsigned long long {
    if constexpr (!Weighted) return 1;
    const double w = side.weights[b * n + i];
    if (w != w) {
      for (int g = 0; g < here; ++g) work.poison[slot + g] = 1;
      return 0;
    }
    return __double2ull_rn(w * kWeightUnit);
  };

  constexpr int P = kCountPoints<Real, Weighted>;
  int64_t at = begin + threadIdx.x;
  for (; at - threadIdx.x + P * kCountThreads <= end; at += P * kCountThreads) {
    Real x[P][D];
    unsigned long long mass[P];
    load<Real, D, P>(side.points, b, at, kCountThreads, x);
#pragma unroll
    for (int j = 0; j < P; ++j) mass[j] = weight(at + j * kCountThreads);
    add(x, mass);
  }
  for (; at < end; at += kCountThreads) {
    Real x[1][D];
    unsigned long long mass[1] = {weight(at)};
    load<Real, D, 1>(side.points, b, at, kCountThreads, x);
    add(x, mass);
  }
  __syncthreads();

  for (int g = 0; g < here; ++g) {
    const uint32_t* row = counters + g * pitch * (Weighted ? 2 : 1);
    const int64_t to = (slot + g) * bins;
    for (uint32_t i = threadIdx.x; i < bins; i += kCountThreads) {
      if constexpr (Weighted) {
        const auto whole = [&](uint32_t j) {
          return row[j] | static_cast<unsigned long long>(row[j + pitch]) << 32;
        };
        unsigned long long sum = whole(i);
        if (i == bins - 1) sum += whole(bins);
        if (sum) atomicAdd(static_cast<unsigned long long*>(side.histogram) + to + i, sum);
      } else {
        uint32_t sum = row[i];
        if (i == bins - 1) sum += row[bins];
        if (sum) atomicAdd(static_cast<uint32_t*>(side.histogram) + to + i, sum);
      }
    }
  }
}

// The sums of x and y over the threads before this one, and over all.
template <typename T>
struct Pair {
  T x, y;
};
template <typename T>
__device__ void scan(Pair<T> mine, Pair<T>& before, Pair<T>& total, Pair<T>* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Pair<T> sum = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T x = __shfl_up_sync(0xffffffffu, sum.x, step);
    const T y = __shfl_up_sync(0xffffffffu, sum.y, step);
    if (lane >= step) {
      sum.x += x;
      sum.y += y;
    }
  }
  __syncthreads();  // the scratch of a scan before this one
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    Pair<T> whole = lane < kSolveThreads / 32 ? scratch[lane] : Pair<T>{0, 0};
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const T x = __shfl_up_sync(0xffffffffu, whole.x, step);
      const T y = __shfl_up_sync(0xffffffffu, whole.y, step);
      if (lane >= step) {
        whole.x += x;
        whole.y += y;
      }
    }
    scratch[lane] = whole;
  }
  __syncthreads();
  total = scratch[31];
  before = {sum.x - mine.x, sum.y - mine.y};
  if (warp > 0) {
    before.x += scratch[warp - 1].x;
    before.y += scratch[warp - 1].y;
  }
}

using Mass = long long;

__device__ __forceinline__ Mass mass_at(const Masses& masses, int64_t i) {
  return masses.wide ? static_cast<const Mass*>(masses.data)[i]
                     : static_cast<Mass>(static_cast<const uint32_t*>(masses.data)[i]);
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
  Masses x, y;
  const Real* directions;
  int64_t count;
  Ends ends;
  int64_t bins;
  const int* poison;
  Real* values;
  Real* table_x;
  Real* table_y;
  Real* edges;
  double* workspace;
};

// What a block of either solve kernel starts from.
struct Problem {
  int64_t slot, x, y;  // of the outputs, and where the histograms begin
  double unit_x, unit_y, width;
  bool bad;
};

template <typename Real, int D>
__device__ Problem begin(const SolveWork<Real>& work, Pair<Mass>* scratch) {
  Problem problem;
  problem.slot = blockIdx.x;
  const int64_t b = problem.slot / work.count, l = problem.slot % work.count;
  problem.x = (b * work.x.batch_stride + l) * work.bins;
  problem.y = (b * work.y.batch_stride + l) * work.bins;
  Pair<Mass> total = {work.x.total, work.y.total};
  if (total.x == 0 || total.y == 0) {
    Pair<Mass> mine = {0, 0}, before;
    for (int64_t i = threadIdx.x; i < work.bins; i += kSolveThreads) {
      mine.x += mass_at(work.x, problem.x + i);
      mine.y += mass_at(work.y, problem.y + i);
    }
    scan(mine, before, total, scratch);
  }
  problem.unit_x = 1.0 / static_cast<double>(total.x);
  problem.unit_y = 1.0 / static_cast<double>(total.y);
  problem.bad = work.poison[problem.slot] != 0 || total.x <= 0 || total.y <= 0;
  const Range<Real> range = ends_of<Real, D>(work.ends, problem.slot, work.directions + l * D);
  problem.width = (static_cast<double>(range.high) - static_cast<double>(range.low)) /
                  static_cast<double>(work.bins);
  if (threadIdx.x == 0) {
    work.edges[2 * problem.slot] = range.low;
    work.edges[2 * problem.slot + 1] = range.high;
  }
  return problem;
}

constexpr int kSolveBins = 4;  // of one thread at a time

template <typename Real>
__device__ Real or_nan(bool bad, Real x) {
  return bad ? static_cast<Real>(NAN) : x;
}

template <typename Real, int D>
__global__ void __launch_bounds__(kSolveThreads) solve_1_kernel(SolveWork<Real> work) {
  __shared__ Pair<Mass> scratch[32];
  __shared__ Pair<double> sums[32];
  const Problem problem = begin<Real, D>(work, scratch);
  Pair<Mass> carry = {0, 0};
  double gap = 0;
  for (int64_t tile = 0; tile < work.bins; tile += kSolveThreads * kSolveBins) {
    const int64_t first = tile + threadIdx.x * kSolveBins;
    Mass x[kSolveBins], y[kSolveBins];
    Pair<Mass> mine = {0, 0}, end, total;
#pragma unroll
    for (int j = 0; j < kSolveBins; ++j) {
      const bool inside = first + j < work.bins;
      x[j] = inside ? mass_at(work.x, problem.x + first + j) : 0;
      y[j] = inside ? mass_at(work.y, problem.y + first + j) : 0;
      mine.x += x[j];
      mine.y += y[j];
    }
    scan(mine, end, total, scratch);
    end.x += carry.x;
    end.y += carry.y;
    double f_before = end.x * problem.unit_x, g_before = end.y * problem.unit_y;
#pragma unroll
    for (int j = 0; j < kSolveBins; ++j) {
      end.x += x[j];
      end.y += y[j];
      const double f = end.x * problem.unit_x, g = end.y * problem.unit_y;
      if (first + j < work.bins) {
        gap += fabs(f - g);
        const Real slope_x = x[j] > 0 ? slope_1<Real>(f_before, f, g_before, g) : Real(0);
        const Real slope_y = y[j] > 0 ? slope_1<Real>(g_before, g, f_before, f) : Real(0);
        const int64_t at = problem.slot * work.bins + first + j;
        work.table_x[at] = or_nan(problem.bad, slope_x);
        if (work.table_y) work.table_y[at] = or_nan(problem.bad, slope_y);
      }
      f_before = f;
      g_before = g;
    }
    carry.x += total.x;
    carry.y += total.y;
  }
  Pair<double> before, total;
  scan(Pair<double>{gap, 0}, before, total, sums);
  if (threadIdx.x == 0) {
    work.values[problem.slot] = or_nan(problem.bad, static_cast<Real>(total.x * problem.width));
  }
}

// Per bin, up to and including it: one side's mass, and its first moment, in bins.
struct Moments {
  double* level;
  double* moment;
};

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
  const double level = i > 0 ? side.level[i - 1] : 0, moment = i > 0 ? side.moment[i - 1] : 0;
  return moment + (u - level) * static_cast<double>(i);
}

// One side's slopes: 2 (bin - mean of its partners).
template <typename Real>
__device__ void slopes_2(const Moments& mine, const Moments& other, const Problem& problem,
                         int64_t bins, Real* table) {
  for (int64_t i = threadIdx.x; i < bins; i += kSolveThreads) {
    const double begin = i > 0 ? mine.level[i - 1] : 0, end = mine.level[i], mass = end - begin;
    double slope = 0;
    if (mass > 0) {
      const double partners = moment_below(other, bins, end) - moment_below(other, bins, begin);
      slope = 2 * problem.width * (static_cast<double>(i) - partners / mass);
    }
    table[i] = or_nan(problem.bad, static_cast<Real>(slope));
  }
}

// The cost of the pieces of mass that begin where a bin of `mine` begins: to the end of that bin,
// or of the partner's. `first` also has those where both begin.
__device__ __forceinline__ double pieces_2(const Moments& mine, const Moments& other, int64_t bins,
                                           bool first) {
  double cost = 0;
  for (int64_t i = threadIdx.x; i < bins; i += kSolveThreads) {
    const double begin = i > 0 ? mine.level[i - 1] : 0, end = mine.level[i];
    if (!(end > begin)) continue;
    const int64_t j = bin_above(other.level, bins, begin);
    const double partner = j > 0 ? other.level[j - 1] : 0;
    if (!first && partner == begin) continue;
    const double apart = static_cast<double>(i - j);
    cost += fmax(0.0, fmin(end, other.level[j]) - begin) * apart * apart;
  }
  return cost;
}

template <typename Real, int D>
__global__ void __launch_bounds__(kSolveThreads) solve_2_kernel(SolveWork<Real> work) {
  __shared__ Pair<Mass> scratch[32];
  __shared__ Pair<double> sums[32];
  const Problem problem = begin<Real, D>(work, scratch);
  const int64_t bins = work.bins, at = problem.slot * bins, all = gridDim.x * bins;
  const Moments x = {work.workspace + at, work.workspace + all + at};
  const Moments y = {work.workspace + 2 * all + at, work.workspace + 3 * all + at};
  Pair<Mass> mass = {0, 0};
  Pair<double> moment = {0, 0};
  for (int64_t tile = 0; tile < bins; tile += kSolveThreads) {
    const int64_t i = tile + threadIdx.x;
    const bool inside = i < bins;
    const Pair<Mass> mine = {inside ? mass_at(work.x, problem.x + i) : 0,
                             inside ? mass_at(work.y, problem.y + i) : 0};
    const Pair<double> mine_1 = {mine.x * problem.unit_x * static_cast<double>(i),
                                 mine.y * problem.unit_y * static_cast<double>(i)};
    Pair<Mass> before, total;
    Pair<double> before_1, total_1;
    scan(mine, before, total, scratch);
    scan(mine_1, before_1, total_1, sums);
    if (inside) {
      x.level[i] = (mass.x + before.x + mine.x) * problem.unit_x;
      y.level[i] = (mass.y + before.y + mine.y) * problem.unit_y;
      x.moment[i] = moment.x + before_1.x + mine_1.x;
      y.moment[i] = moment.y + before_1.y + mine_1.y;
    }
    mass = {mass.x + total.x, mass.y + total.y};
    moment = {moment.x + total_1.x, moment.y + total_1.y};
  }
  __syncthreads();
  slopes_2(x, y, problem, bins, work.table_x + at);
  if (work.table_y) slopes_2(y, x, problem, bins, work.table_y + at);
  const Pair<double> cost = {pieces_2(x, y, bins, true), pieces_2(y, x, bins, false)};
  Pair<double> before, total;
  scan(cost, before, total, sums);
  if (threadIdx.x == 0) {
    const double value = (total.x + total.y) * problem.width * problem.width;
    work.values[problem.slot] = or_nan(problem.bad, static_cast<Real>(value));
  }
}

struct GatherWork {
  const void* grad;
  Points points;
  Directions directions;
  const double* weights;
  double mass;
  const void* table;
  const void* edges;
  uint32_t bins;
  int stage;  // directions whose tables are fetched at a time
  Points out;
};

__device__ __forceinline__ void copy_16(void* to, const void* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
template <typename Real>
__device__ __forceinline__ void copy_1(Real* to, const Real* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from),
               "n"(sizeof(Real))
               : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Of one direction: where a point's slope is in the table, and what it adds to the gradient.
template <typename Real, int D>
struct alignas(D == 3 ? 4 * sizeof(Real) : sizeof(Real)) Pull {
  Line<Real, D> line;
  Real theta[D];
};

template <typename Real, int D>
__host__ __device__ constexpr uint32_t table_pitch(uint32_t bins) {
  constexpr uint32_t some = 16 / sizeof(Real);
  return (bins + 1 + some - 1) / some * some;
}

// Starts fetching the tables of `here` directions from `first` on.
template <typename Real, int D>
__device__ void fetch(const GatherWork& work, int64_t b, int64_t first, int here, Real* tables,
                      Pull<Real, D>* pulls) {
  const int64_t slot = b * work.directions.count + first;
  const uint32_t bins = work.bins, pitch = table_pitch<Real, D>(bins);
  const Real* from = static_cast<const Real*>(work.table) + slot * bins;
  constexpr uint32_t some = 16 / sizeof(Real);
  for (int g = 0; g < here; ++g, from += bins, tables += pitch) {
    if (bins % some == 0) {
      for (uint32_t i = threadIdx.x * some; i < bins; i += blockDim.x * some) {
        copy_16(tables + i, from + i);
      }
    } else {
      for (uint32_t i = threadIdx.x; i < bins; i += blockDim.x) copy_1(tables + i, from + i);
    }
    if (threadIdx.x == 0) copy_1(tables + bins, from + bins - 1);
  }
  commit();
  for (int g = threadIdx.x; g < here; g += blockDim.x) {
    const Real* theta = static_cast<const Real*>(work.directions.data) + (first + g) * D;
    const Real* edge = static_cast<const Real*>(work.edges) + 2 * (slot + g);
    const Real grad = static_cast<const Real*>(work.grad)[slot + g];
    Pull<Real, D> pull;
    pull.line = line_of<Real, D>({edge[0], edge[1]}, theta);
    for (int k = 0; k < D; ++k) pull.theta[k] = theta[k] * grad;
    pulls[g] = pull;
  }
}

template <typename Real, int D, int P>
__global__ void __launch_bounds__(kGatherThreads, 1) gather_kernel(GatherWork work) {
  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t pitch = table_pitch<Real, D>(work.bins);
  const int64_t count = work.directions.count, n = work.points.count;
  Real* tables = reinterpret_cast<Real*>(shared);
  auto* pulls = reinterpret_cast<Pull<Real, D>*>(tables + 2 * work.stage * pitch);
  const int64_t tiles = (n + P * blockDim.x - 1) / (P * blockDim.x);
  const int64_t b = blockIdx.x / tiles;
  const int64_t at = blockIdx.x % tiles * P * blockDim.x + threadIdx.x;
  const auto some = [&](int64_t first) {
    return static_cast<int>(min(count - first, static_cast<int64_t>(work.stage)));
  };

  fetch<Real, D>(work, b, 0, some(0), tables, pulls);
  Real x[P][D], sum[P][D] = {};
  load<Real, D, P>(work.points, b, at, blockDim.x, x);
  const Real bins = static_cast<Real>(work.bins);
  int now = 0;
  for (int64_t first = 0; first < count; first += work.stage, now ^= 1) {
    const int64_t next = first + work.stage;
    if (next < count) {
      fetch<Real, D>(work, b, next, some(next), tables + (now ^ 1) * work.stage * pitch,
                     pulls + (now ^ 1) * work.stage);
      wait<1>();
    } else {
      wait<0>();
    }
    __syncthreads();
    const int here = some(first);
    for (int g = 0; g < here; ++g) {
      const Pull<Real, D> pull = pulls[now * work.stage + g];
      const Row<Real, Real> table(tables + (now * work.stage + g) * pitch);
#pragma unroll
      for (int j = 0; j < P; ++j) {
        const Real slope = entry(table.at(bin_of<D>(x[j], pull.line, bins)), Real());
#pragma unroll
        for (int k = 0; k < D; ++k) sum[j][k] = fma(slope, pull.theta[k], sum[j][k]);
      }
    }
    __syncthreads();
  }

  with_format<Real>(work.out, [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    data += b * work.out.stride[0];
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const int64_t i = at + static_cast<int64_t>(j) * blockDim.x;
      if (i >= n) continue;
      const double weight = work.weights ? work.weights[b * n + i] : 1;
      const Real mass = static_cast<Real>(weight * work.mass);
#pragma unroll
      for (int k = 0; k < D; ++k) {
        data[i * work.out.stride[1] + k * work.out.stride[2]] = Narrow<T>::from(sum[j][k] * mass);
      }
    }
  });
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Chip {
  int multiprocessors, shared_per_block;
};

Chip chip(int device) {
  Chip found;
  SDCORE_CUDA(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount,
                                     device));
  SDCORE_CUDA(cudaDeviceGetAttribute(&found.shared_per_block,
                                     cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return found;
}

template <typename Kernel>
void allow_shared_memory(Kernel kernel, int64_t bytes) {
  SDCORE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes)));
}

unsigned grid(int64_t blocks) {
  if (blocks > std::numeric_limits<int>::max()) {
    throw std::invalid_argument("a launch of " + std::to_string(blocks) +
                                " blocks: batch and points are too many for one call");
  }
  return static_cast<unsigned>(blocks);
}

// Calls `body` with the number of coordinates as a constant.
template <typename Body>
void with_dim(int64_t dim, Body&& body) {
  switch (dim) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      return body(std::integral_constant<int, 3>());
    case 4:
      return body(std::integral_constant<int, 4>());
  }
  throw std::invalid_argument("points must have 1 to 4 coordinates; got " + std::to_string(dim));
}

// Calls `body` with a value of the type that arithmetic is in.
template <typename Body>
void with_real(bool is_double, Body&& body) {
  if (is_double) {
    body(double());
  } else {
    body(float());
  }
}

cudaStream_t stream_of(Place place) { return reinterpret_cast<cudaStream_t>(place.stream); }

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

void sliced_wasserstein_histogram(const Side* sides, int count, Directions directions, Ends ends,
                                  int64_t bins, int* poison, Place place) {
  const DeviceGuard guard(place.device);
  const Chip gpu = chip(place.device);
  const Points& points = sides[0].points;
  with_real(points.format == Format::float64, [&](auto zero) {
    using Real = decltype(zero);
    with_dim(points.dim, [&](auto dim) {
      const auto launch = [&](auto weighted, HistogramWork work, int64_t all) {
        const int64_t each = static_cast<int64_t>(sizeof(Line<Real, dim>)) +
                             (bins + 1) * (weighted ? 8 : 4);
        // Static shared memory, and what the system keeps.
        const int64_t room = gpu.shared_per_block - 64;
        const int64_t most = std::min<int64_t>(room / each, 64);
        if (most == 0) {
          throw std::invalid_argument(std::to_string(bins) + " bins don't fit shared memory");
        }
        const int64_t groups = ceil_div(directions.count, most);
        work.group = static_cast<int>(ceil_div(directions.count, groups));
        const int64_t bytes = work.group * each;
        const int64_t resident = std::min<int64_t>(2, (gpu.shared_per_block + 1024) /
                                                          (bytes + 1024));
        const int64_t blocks = gpu.multiprocessors * resident;
        const int64_t chunks = std::max<int64_t>(1, blocks / (groups * points.batch));
        for (int side = 0; side < 2; ++side) {
          if (work.chunks[side] == 0) continue;
          const int64_t n = work.side[side].points.count;
          // At least enough points to be worth a block's zeroing and flushing.
          work.chunks[side] = std::clamp<int64_t>((chunks * n + all / 2) / all, 1,
                                                  ceil_div(n, 2 * kCountThreads));
        }
        auto* kernel = histogram_kernel<Real, dim, weighted>;
        allow_shared_memory(kernel, bytes);
        const int64_t size = (work.chunks[0] + work.chunks[1]) * groups * points.batch;
        kernel<<<grid(size), kCountThreads, bytes, stream_of(place)>>>(work);
        check(cudaGetLastError(), "the launch of histogram_kernel");
      };
      HistogramWork work = {{sides[0], sides[count - 1]},
                            {1, count - 1},
                            directions,
                            ends,
                            static_cast<uint32_t>(bins),
                            0,
                            poison};
      const bool weighted[2] = {sides[0].weights != nullptr, sides[count - 1].weights != nullptr};
      if (weighted[0] == weighted[1]) {
        int64_t all = 0;
        for (int side = 0; side < count; ++side) all += sides[side].points.count;
        weighted[0] ? launch(std::true_type(), work, all) : launch(std::false_type(), work, all);
        return;
      }
      for (int side = 0; side < 2; ++side) {
        work.side[0] = sides[side];
        work.chunks[0] = 1;
        work.chunks[1] = 0;
        const int64_t n = sides[side].points.count;
        weighted[side] ? launch(std::true_type(), work, n) : launch(std::false_type(), work, n);
      }
    });
  });
}

void sliced_wasserstein_solve(Masses x, Masses y, Directions directions, int64_t dim, Ends ends,
                              int64_t batch, int64_t bins, int p, const int* poison, void* values,
                              void* table_x, void* table_y, void* edges, double* workspace,
                              bool is_double, Place place) {
  const DeviceGuard guard(place.device);
  with_real(is_double, [&](auto zero) {
    using Real = decltype(zero);
    with_dim(dim, [&](auto d) {
      const SolveWork<Real> work = {x,
                                    y,
                                    static_cast<const Real*>(directions.data),
                                    directions.count,
                                    ends,
                                    bins,
                                    poison,
                                    static_cast<Real*>(values),
                                    static_cast<Real*>(table_x),
                                    static_cast<Real*>(table_y),
                                    static_cast<Real*>(edges),
                                    workspace};
      auto* kernel = p == 1 ? solve_1_kernel<Real, d> : solve_2_kernel<Real, d>;
      kernel<<<grid(batch * directions.count), kSolveThreads, 0, stream_of(place)>>>(work);
      check(cudaGetLastError(), "the launch of solve_kernel");
    });
  });
}

void sliced_wasserstein_gather(const void* grad, const Points& points, Directions directions,
                               const double* weights, double mass, const void* table,
                               const void* edges, int64_t bins, const Points& out, Place place) {
  const DeviceGuard guard(place.device);
  const Chip gpu = chip(place.device);
  with_real(points.format == Format::float64, [&](auto zero) {
    using Real = decltype(zero);
    with_dim(points.dim, [&](auto dim) {
      const auto launch = [&](auto per_thread) {
        const int64_t each = table_pitch<Real, dim>(static_cast<uint32_t>(bins)) * sizeof(Real) +
                             sizeof(Pull<Real, dim>);
        const int64_t most = (gpu.shared_per_block - 64) / (2 * each);
        if (most == 0) {
          throw std::invalid_argument(std::to_string(bins) + " bins don't fit shared memory");
        }
        const int64_t stage = std::min(most, directions.count);
        const int64_t all = ceil_div(points.count * points.batch, per_thread);
        const int64_t waves = ceil_div(all, gpu.multiprocessors * kGatherThreads);
        // As many threads as give each multiprocessor the same number of points.
        const int64_t threads = ceil_div(ceil_div(all, gpu.multiprocessors * waves), 32) * 32;
        const int64_t blocks = ceil_div(points.count, threads * per_thread) * points.batch;
        const GatherWork work = {
            grad,  points, directions,                  weights,                 mass,
            table, edges,  static_cast<uint32_t>(bins), static_cast<int>(stage), out};
        auto* kernel = gather_kernel<Real, dim, per_thread>;
        allow_shared_memory(kernel, 2 * stage * each);
        kernel<<<grid(blocks), static_cast<unsigned>(threads), 2 * stage * each,
                 stream_of(place)>>>(work);
        check(cudaGetLastError(), "the launch of gather_kernel");
      };
      constexpr int large = 64 / sizeof(Real) / (dim == 4 ? 2 : 1);
      // Few points go to more threads, so that all multiprocessors have some.
      if (points.count * points.batch >= gpu.multiprocessors * 128 * large) {
        launch(std::integral_constant<int, large>());
      } else {
        launch(std::integral_constant<int, 2>());
      }
    });
  });
}

}  // namespace sdcore
