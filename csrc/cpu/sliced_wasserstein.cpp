#include "sliced_wasserstein.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "bits.h"
#include "parallel.h"
#include "simd.h"

namespace sdcore {
namespace {

// Points of one block are loaded, widened and made planar once for a group of directions; their
// histograms of 4096 bins then fit an L2 cache of 1 MiB.
constexpr int64_t kGroup = 32;
// EDGE_ROUNDINGS of sdcore/ops/sliced_wasserstein.py.
constexpr double kEdgeRoundings = 8;
// Projections are computed a tile at a time: four vectors of accumulators stay in registers.
constexpr int kVectors = 4;
template <typename Real>
constexpr int64_t tile = kVectors * Simd<Real>::width;

// 8192 points of three coordinates take 96 KiB, half of a small L2 cache; a histogram of 4096
// bins then stays in L1 for 8192 updates.
int64_t block_size(int64_t dim, int64_t count) {
  const int64_t size = std::clamp<int64_t>(32768 / dim / 64 * 64, 64, 8192);
  return std::min(size, ceil_div(count, 64) * 64);
}

// The unsigned integer of a number's size.
template <typename Real>
struct BitsOf;
template <>
struct BitsOf<float> {
  using Type = uint32_t;
};
template <>
struct BitsOf<double> {
  using Type = uint64_t;
};

template <typename Real>
struct Block {
  std::vector<Real> planar;
  int64_t pitch, count = 0, dim;

  Block(int64_t dim, int64_t pitch) : planar(dim * pitch), pitch(pitch), dim(dim) {}

  void read(const Points& points, int64_t batch, int64_t first) {
    count = std::min(pitch, points.count - first);
    load(points, batch, first, count, pitch, planar.data());
  }
};

// The bins of one direction.
template <typename Real>
struct Bins {
  Real low, scale, last;

  // Bins begin a few roundings lower: what lies on an edge counts in the bin above.
  Bins(Real low, Real high, int64_t bins)
      : low(low - static_cast<Real>(kEdgeRoundings) * std::numeric_limits<Real>::epsilon() *
                      (high - low)),
        scale(high > low ? bins / (high - low) : 0),
        last(bins - 1) {}
};

// Hot loops. Each is written once, for all dimensions and both types, and inlined into one
// function per type that exists once per instruction set.

template <typename Real, int kDim>
SDCORE_INLINE void project_tile(const Real* planar, int64_t pitch, int64_t dim,
                                const Real* direction, Real offset,
                                typename Simd<Real>::Vector* out) {
  using Vector = typename Simd<Real>::Vector;
  for (int v = 0; v < kVectors; ++v) out[v] = Vector{} + offset;
  for (int64_t k = 0; k < (kDim ? kDim : dim); ++k) {
    for (int v = 0; v < kVectors; ++v) {
      Vector value;
      std::memcpy(&value, planar + k * pitch + v * Simd<Real>::width, sizeof(value));
      out[v] += value * direction[k];
    }
  }
}

SDCORE_INLINE void store_index(const Simd<float>::Index& whole, int32_t* index) {
  std::memcpy(index, &whole, sizeof(whole));
}
SDCORE_INLINE void store_index(const Simd<double>::Index& whole, int32_t* index) {
  for (int lane = 0; lane < Simd<double>::width; ++lane)
    index[lane] = static_cast<int32_t>(whole[lane]);
}

template <typename Real, int kDim>
SDCORE_INLINE void index_tile(const Real* planar, int64_t pitch, int64_t dim,
                              const Real* direction, const Bins<Real>& bins, int32_t* index,
                              typename Simd<Real>::Vector& poison) {
  using Vector = typename Simd<Real>::Vector;
  Vector position[kVectors];
  project_tile<Real, kDim>(planar, pitch, dim, direction, -bins.low, position);
  const Vector zero{}, last = zero + bins.last;
  for (int v = 0; v < kVectors; ++v) {
    poison += position[v] * Real(0);  // stays zero unless a projection is not finite
    const Vector scaled = position[v] * bins.scale;
    const Vector above = scaled > zero ? scaled : zero;  // NaN to bin 0, so that nothing is lost
    const Vector inside = above < last ? above : last;
    store_index(__builtin_convertvector(inside, typename Simd<Real>::Index),
                index + v * Simd<Real>::width);
  }
}

template <typename Real>
SDCORE_INLINE bool is_poisoned(const typename Simd<Real>::Vector& poison) {
  Real sum = 0;
  for (int lane = 0; lane < Simd<Real>::width; ++lane) sum += poison[lane];
  return sum != 0;  // also true for NaN
}

template <typename Real, int kDim>
SDCORE_INLINE bool index_block_body(const Block<Real>& block, const Real* direction,
                                    const Bins<Real>& bins, int32_t* index) {
  typename Simd<Real>::Vector poison{};
  for (int64_t i = 0; i < block.count; i += tile<Real>)
    index_tile<Real, kDim>(block.planar.data() + i, block.pitch, block.dim, direction, bins,
                           index + i, poison);
  return is_poisoned<Real>(poison);
}

template <typename Real, int kDim>
SDCORE_INLINE void range_block_body(const Block<Real>& block, const Real* direction, Real& low,
                                    Real& high) {
  using Vector = typename Simd<Real>::Vector;
  Vector least = Vector{} + low, most = Vector{} + high;
  for (int64_t i = 0; i < block.count; i += tile<Real>) {
    Vector value[kVectors];
    project_tile<Real, kDim>(block.planar.data() + i, block.pitch, block.dim, direction, Real(0),
                             value);
    for (int v = 0; v < kVectors; ++v) {
      least = value[v] < least ? value[v] : least;
      most = value[v] > most ? value[v] : most;
    }
  }
  for (int lane = 0; lane < Simd<Real>::width; ++lane) {
    low = std::min<Real>(low, least[lane]);
    high = std::max<Real>(high, most[lane]);
  }
}

// Left to itself the compiler reads tables with gather instructions; the whole pass then takes a
// tenth longer on Zen 4. The empty statement hides that the loads could be one instruction.
template <typename Real>
SDCORE_INLINE Real one_load(const Real* address) {
  auto bits = bit_cast<typename BitsOf<Real>::Type>(*address);
#if defined(__GNUC__)
  asm("" : "+r"(bits));
#endif
  return bit_cast<Real>(bits);
}

template <typename Real, int kDim>
SDCORE_INLINE void gather_block_body(const Block<Real>& block, const Real* direction,
                                     const Real* pull, const Bins<Real>& bins, const Real* table,
                                     Real* sums) {
  using Vector = typename Simd<Real>::Vector;
  Vector unused{};
  for (int64_t i = 0; i < block.count; i += tile<Real>) {
    alignas(64) int32_t index[tile<Real>];
    index_tile<Real, kDim>(block.planar.data() + i, block.pitch, block.dim, direction, bins, index,
                           unused);
    alignas(64) Real slope[tile<Real>];
    for (int lane = 0; lane < tile<Real>; ++lane) slope[lane] = one_load(table + index[lane]);
    for (int64_t k = 0; k < (kDim ? kDim : block.dim); ++k) {
      Real* sum = sums + k * block.pitch + i;
      for (int v = 0; v < kVectors; ++v) {
        Vector total, part;
        std::memcpy(&total, sum + v * Simd<Real>::width, sizeof(total));
        std::memcpy(&part, slope + v * Simd<Real>::width, sizeof(part));
        total += part * pull[k];
        std::memcpy(sum + v * Simd<Real>::width, &total, sizeof(total));
      }
    }
  }
}

template <typename Real, int kDim>
SDCORE_INLINE void project_block_body(const Block<Real>& block, const Real* direction, Real* out) {
  for (int64_t i = 0; i < block.count; i += tile<Real>) {
    typename Simd<Real>::Vector value[kVectors];
    project_tile<Real, kDim>(block.planar.data() + i, block.pitch, block.dim, direction, Real(0),
                             value);
    std::memcpy(out + i, value, sizeof(value));
  }
}

// Colors have three dimensions; their loops are unrolled.
#define SDCORE_FOR_DIM(body, ...) \
  (block.dim == 3 ? body<Real, 3>(__VA_ARGS__) : body<Real, 0>(__VA_ARGS__))
#define SDCORE_HOT(type)                                                                         \
  SDCORE_CLONES bool index_block(const Block<type>& block, const type* direction,               \
                                 const Bins<type>& bins, int32_t* index) {                       \
    using Real = type;                                                                           \
    return SDCORE_FOR_DIM(index_block_body, block, direction, bins, index);                      \
  }                                                                                              \
  SDCORE_CLONES void range_block(const Block<type>& block, const type* direction, type& low,     \
                                 type& high) {                                                   \
    using Real = type;                                                                           \
    SDCORE_FOR_DIM(range_block_body, block, direction, low, high);                               \
  }                                                                                              \
  SDCORE_CLONES void gather_block(const Block<type>& block, const type* direction,               \
                                  const type* pull, const Bins<type>& bins, const type* table,   \
                                  type* sums) {                                                  \
    using Real = type;                                                                           \
    SDCORE_FOR_DIM(gather_block_body, block, direction, pull, bins, table, sums);                \
  }                                                                                              \
  SDCORE_CLONES void project_block(const Block<type>& block, const type* direction, type* out) { \
    using Real = type;                                                                           \
    SDCORE_FOR_DIM(project_block_body, block, direction, out);                                   \
  }                                                                                              \
  SDCORE_CLONES void to_table(int64_t bins, const double* slope, const double* mass,             \
                              type* table) {                                                     \
    /* Without mass there is no slope, and none is left. */                                      \
    constexpr double least = std::numeric_limits<double>::min();                                 \
    for (int64_t i = 0; i < bins; ++i)                                                           \
      table[i] = static_cast<type>(slope[i] / std::max(mass[i], least));                         \
  }
SDCORE_HOT(float)
SDCORE_HOT(double)

// One-dimensional transport between sorted values. `level[i]` is the mass up to and including
// value i, ending at one. Adds the slopes; returns W_p^p.
template <typename ValueX, typename ValueY, typename Slope>
double transport(int64_t n, const ValueX& x, const double* level_x, int64_t m, const ValueY& y,
                 const double* level_y, int p, Slope* slope_x, Slope* slope_y) {
  double cost = 0, level = 0;
  for (int64_t i = 0, j = 0; i < n && j < m;) {
    const double end_x = level_x[i], end_y = level_y[j];
    const double end = std::min(end_x, end_y), mass = end - level;
    const double gap = static_cast<double>(x(i)) - static_cast<double>(y(j));
    const double sign = (gap > 0) - (gap < 0);
    const double slope = (p == 1 ? sign : 2 * gap) * mass;
    cost += (p == 1 ? sign * gap : gap * gap) * mass;
    if (slope_x) slope_x[i] += slope;
    if (slope_y) slope_y[j] -= slope;
    level = end;
    i += end_x <= end;
    j += end_y <= end;
  }
  return cost;
}

// The same of masses on one grid, for p = 1, without a branch: what counts of a bin is how much of it
// meets bins before it and behind it, and of all bins how far the levels are apart. Slopes are
// written, not added to; the result is in widths of a bin.
SDCORE_CLONES double transport_on_grid(int64_t bins, const double* level_x, const double* level_y,
                                       double* slope_x, double* slope_y) {
  const auto met = [](double from, double end, double other_from, double other_end) {
    const double before = std::min(std::max(other_from, from), end) - from;
    const double behind = end - std::min(std::max(other_end, from), end);
    return before - behind;
  };
  slope_x[0] = met(0, level_x[0], 0, level_y[0]);
  slope_y[0] = met(0, level_y[0], 0, level_x[0]);
  for (int64_t i = 1; i < bins; ++i) {
    slope_x[i] = met(level_x[i - 1], level_x[i], level_y[i - 1], level_y[i]);
    slope_y[i] = met(level_y[i - 1], level_y[i], level_x[i - 1], level_x[i]);
  }
  constexpr int kLanes = 8;
  double gaps[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= bins; i += kLanes)
    for (int k = 0; k < kLanes; ++k) gaps[k] += std::abs(level_x[i + k] - level_y[i + k]);
  for (; i < bins; ++i) gaps[0] += std::abs(level_x[i] - level_y[i]);
  return std::accumulate(gaps, gaps + kLanes, 0.0);
}

// Masses of bins and the levels that they end at, by what they add up to.
SDCORE_CLONES void to_levels(int64_t bins, const uint64_t* total, const uint64_t* running,
                             double sum, double* mass, double* level) {
  for (int64_t i = 0; i < bins; ++i) {
    mass[i] = static_cast<double>(total[i]) / sum;
    level[i] = static_cast<double>(running[i]) / sum;
  }
}

// Binned.

// How a pass over both sides is cut into tasks, two for each thread, so that one that is held up by
// another process does not hold up the rest.
struct Shares {
  int64_t group;   // directions in a task
  int64_t groups;
  int64_t parts;  // shares of the points: each costs histograms of its own

  Shares(const BinnedArguments& a, int64_t batches) {
    const int64_t wanted = ceil_div(2 * a.threads, 2 * batches);
    // Fewer directions than 4 would read the points too often.
    group = std::clamp<int64_t>(ceil_div(a.directions_count, wanted), 4, kGroup);
    groups = ceil_div(a.directions_count, group);
    const int64_t count = std::min(a.x.count, a.y.count);
    const int64_t blocks = ceil_div(count, block_size(a.x.dim, count));
    parts = std::clamp<int64_t>(ceil_div(wanted, groups), 1, blocks);
  }
};

// What one side of the problem is to the histogram pass. Equal weights are counted in 32 bits.
// Other weights are added as integers of 2^-62, so that the sum does not depend on the order:
// not on threads, not on blocks.
template <typename Count>
struct Histograms {
  const Points* sides[2];
  const double* weights[2];
  int64_t directions, bins, group, parts, batches;
  std::vector<Count> counts;      // [batches, 2, parts, directions, bins]
  std::vector<uint8_t> poisoned;  // [batches, 2, parts, directions]

  int64_t slot(int64_t b, int side, int64_t part, int64_t direction) const {
    return ((b * 2 + side) * parts + part) * directions + direction;
  }
};

// Two bin numbers by one load, eight to a turn of the loop: a seventh faster than one by one.
void add(const int32_t* index, int64_t count, const std::vector<uint64_t>&, uint32_t* histogram) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t pairs[4];
    std::memcpy(pairs, index + i, sizeof(pairs));
    for (const uint64_t pair : pairs) {
      ++histogram[static_cast<uint32_t>(pair)];
      ++histogram[pair >> 32];
    }
  }
  for (; i < count; ++i) ++histogram[index[i]];
}
void add(const int32_t* index, int64_t count, const std::vector<uint64_t>& mass,
         uint64_t* histogram) {
  for (int64_t i = 0; i < count; ++i) histogram[index[i]] += mass[i];
}

void to_fixed_point(const double* weights, int64_t count, std::vector<uint64_t>& mass) {
  for (int64_t i = 0; i < count; ++i) mass[i] = static_cast<uint64_t>(weights[i] * 0x1p62);
}

// The blocks of one of `parts` equal shares of the points.
template <typename Real, typename Body>
void for_blocks(const Points& points, int64_t batch, int64_t part, int64_t parts,
                const Body& body) {
  const int64_t size = block_size(points.dim, points.count);
  const int64_t blocks = ceil_div(points.count, size);
  Block<Real> block(points.dim, size);
  for (int64_t i = blocks * part / parts; i < blocks * (part + 1) / parts; ++i) {
    block.read(points, batch, i * size);
    body(block, i * size);
  }
}

template <typename Real, typename Count>
void count_part(Histograms<Count>& h, const Real* directions, const Real* edges,
                int64_t first_batch, int64_t b, int side, int64_t part, int64_t group) {
  const Points& points = *h.sides[side];
  const int64_t begin = group * h.group, end = std::min(h.directions, begin + h.group);
  const int64_t size = block_size(points.dim, points.count);
  const int64_t batch = first_batch + b;
  std::vector<int32_t> index(size);
  std::vector<uint64_t> mass(sizeof(Count) == 8 ? size : 0, 1);
  for_blocks<Real>(points, batch, part, h.parts, [&](const Block<Real>& block, int64_t first) {
    if (h.weights[side])
      to_fixed_point(h.weights[side] + batch * points.count + first, block.count, mass);
    for (int64_t l = begin; l < end; ++l) {
      const Real* edge = edges + (batch * h.directions + l) * 2;
      const int64_t slot = h.slot(b, side, part, l);
      h.poisoned[slot] |= index_block(block, directions + l * points.dim,
                                      Bins<Real>(edge[0], edge[1], h.bins), index.data());
      add(index.data(), block.count, mass, h.counts.data() + slot * h.bins);
    }
  });
}

// Cumulated mass of one side, ending at one, and whether all its projections are finite.
template <typename Count>
bool cumulate(const Histograms<Count>& h, int64_t b, int side, int64_t l,
              std::vector<double>& mass, std::vector<double>& level) {
  std::vector<uint64_t> total(h.bins);
  bool finite = true;
  for (int64_t part = 0; part < h.parts; ++part) {
    const int64_t slot = h.slot(b, side, part, l);
    finite &= !h.poisoned[slot];
    const Count* counts = h.counts.data() + slot * h.bins;
    for (int64_t i = 0; i < h.bins; ++i) total[i] += counts[i];
  }
  std::vector<uint64_t> running(h.bins);
  std::partial_sum(total.begin(), total.end(), running.begin());
  to_levels(h.bins, total.data(), running.data(), static_cast<double>(running.back()), mass.data(),
            level.data());
  return finite;
}

template <typename Real>
void write_table(const std::vector<double>& slope, const std::vector<double>& mass, bool finite,
                 Real* table) {
  const int64_t bins = mass.size();
  if (finite)
    to_table(bins, slope.data(), mass.data(), table);
  else
    std::fill(table, table + bins, std::numeric_limits<Real>::quiet_NaN());
}

template <typename Real, typename Count>
void solve_binned(const Histograms<Count>& h, const BinnedArguments& a, int64_t batch,
                  int64_t b, int64_t l) {
  std::vector<double> mass_x(h.bins), mass_y(h.bins), level_x(h.bins), level_y(h.bins);
  std::vector<double> slope_x(h.bins), slope_y(h.bins);
  const bool finite_x = cumulate(h, b, 0, l, mass_x, level_x);
  const bool finite = cumulate(h, b, 1, l, mass_y, level_y) && finite_x;
  const int64_t at = batch * h.directions + l;
  const Real* edge = static_cast<const Real*>(a.edges) + at * 2;
  const double width = (static_cast<double>(edge[1]) - edge[0]) / h.bins;
  const auto center = [&](int64_t i) { return i * width; };  // only differences matter
  const double cost = a.p == 1
                          ? width * transport_on_grid(h.bins, level_x.data(), level_y.data(),
                                                      slope_x.data(), slope_y.data())
                          : transport(h.bins, center, level_x.data(), h.bins, center,
                                      level_y.data(), a.p, slope_x.data(), slope_y.data());
  static_cast<Real*>(a.values)[at] =
      finite ? static_cast<Real>(cost) : std::numeric_limits<Real>::quiet_NaN();
  write_table(slope_x, mass_x, finite, static_cast<Real*>(a.table_x) + at * h.bins);
  write_table(slope_y, mass_y, finite, static_cast<Real*>(a.table_y) + at * h.bins);
}

// The projection of the box [low, high]^dim.
template <typename Real>
void edges_of_box(const BinnedArguments& a) {
  const auto* directions = static_cast<const Real*>(a.directions);
  auto* edges = static_cast<Real*>(a.edges);
  for (int64_t l = 0; l < a.directions_count; ++l) {
    Real low = 0, high = 0;
    for (int64_t k = 0; k < a.x.dim; ++k) {
      const Real theta = directions[l * a.x.dim + k];
      const Real from = theta * static_cast<Real>(a.range_low);
      const Real to = theta * static_cast<Real>(a.range_high);
      low += std::min(from, to);
      high += std::max(from, to);
    }
    for (int64_t b = 0; b < a.x.batch; ++b) {
      edges[(b * a.directions_count + l) * 2] = low;
      edges[(b * a.directions_count + l) * 2 + 1] = high;
    }
  }
}

template <typename Real>
void edges_of_data(const BinnedArguments& a) {
  const auto* directions = static_cast<const Real*>(a.directions);
  const Shares shares(a, a.x.batch);
  const int64_t groups = shares.groups, parts = shares.parts;
  constexpr Real infinity = std::numeric_limits<Real>::infinity();
  std::vector<Real> found(a.x.batch * 2 * parts * a.directions_count * 2);
  parallel_for(a.x.batch * 2 * parts * groups, a.threads, [&](int64_t task) {
    const int64_t group = task % groups, slot = task / groups;
    const int64_t part = slot % parts, side = slot / parts % 2, b = slot / parts / 2;
    const int64_t begin = group * shares.group;
    const int64_t end = std::min(a.directions_count, begin + shares.group);
    Real* edge = found.data() + slot * a.directions_count * 2;
    for (int64_t l = begin; l < end; ++l) edge[2 * l] = infinity, edge[2 * l + 1] = -infinity;
    for_blocks<Real>(side ? a.y : a.x, b, part, parts, [&](const Block<Real>& block, int64_t) {
      for (int64_t l = begin; l < end; ++l)
        range_block(block, directions + l * a.x.dim, edge[2 * l], edge[2 * l + 1]);
    });
  });
  auto* edges = static_cast<Real*>(a.edges);
  for (int64_t b = 0; b < a.x.batch; ++b) {
    for (int64_t l = 0; l < a.directions_count; ++l) {
      Real low = infinity, high = -infinity;
      for (int64_t slot = b * 2 * parts; slot < (b + 1) * 2 * parts; ++slot) {
        low = std::min(low, found[(slot * a.directions_count + l) * 2]);
        high = std::max(high, found[(slot * a.directions_count + l) * 2 + 1]);
      }
      edges[(b * a.directions_count + l) * 2] = low;
      edges[(b * a.directions_count + l) * 2 + 1] = high;
    }
  }
}

template <typename Real, typename Count>
void binned_as(const BinnedArguments& a) {
  if (a.has_range)
    edges_of_box<Real>(a);
  else
    edges_of_data<Real>(a);
  const auto* directions = static_cast<const Real*>(a.directions);
  const auto* edges = static_cast<const Real*>(a.edges);
  // A few batch elements at a time: many small images share one start of the threads, and large
  // ones do not hold all their histograms at once.
  const int64_t bytes = 2 * a.directions_count * a.bins * static_cast<int64_t>(sizeof(Count));
  const int64_t at_once = std::clamp<int64_t>((int64_t{64} << 20) / bytes, 1, a.x.batch);
  for (int64_t first = 0; first < a.x.batch; first += at_once) {
    const int64_t batches = std::min(at_once, a.x.batch - first);
    const Shares shares(a, batches);
    const int64_t groups = shares.groups, parts = shares.parts;
    const int64_t slots = batches * 2 * parts * a.directions_count;
    Histograms<Count> h{{&a.x, &a.y},
                              {a.weights_x, a.weights_y},
                              a.directions_count,
                              a.bins,
                              shares.group,
                              parts,
                              batches,
                              std::vector<Count>(slots * a.bins),
                              std::vector<uint8_t>(slots)};
    parallel_for(batches * 2 * parts * groups, a.threads, [&](int64_t task) {
      const int64_t group = task % groups, slot = task / groups;
      count_part(h, directions, edges, first, slot / parts / 2, static_cast<int>(slot / parts % 2),
                 slot % parts, group);
    });
    parallel_for(batches * a.directions_count, a.threads, [&](int64_t task) {
      const int64_t b = task / a.directions_count;
      solve_binned<Real>(h, a, first + b, b, task % a.directions_count);
    });
  }
}

template <typename Real>
void binned_backward_as(const BinnedBackwardArguments& a) {
  const auto* grad = static_cast<const Real*>(a.grad);
  const auto* directions = static_cast<const Real*>(a.directions);
  const auto* table = static_cast<const Real*>(a.table);
  const auto* edges = static_cast<const Real*>(a.edges);
  const int64_t dim = a.points.dim, count = a.points.count;
  // Coordinates and sums of 1024 points and one table come to 40 KiB: a tenth faster than 8192.
  const int64_t size = std::min<int64_t>(1024, block_size(dim, count));
  const int64_t blocks = ceil_div(count, size);
  parallel_for(a.points.batch * blocks, a.threads, [&](int64_t task) {
    const int64_t b = task / blocks, first = task % blocks * size;
    Block<Real> block(dim, size);
    block.read(a.points, b, first);
    std::vector<Real> sums(dim * size), pull(dim);
    for (int64_t l = 0; l < a.directions_count; ++l) {
      const int64_t at = b * a.directions_count + l;
      const Real* direction = directions + l * dim;
      for (int64_t k = 0; k < dim; ++k) pull[k] = grad[at] * direction[k];
      gather_block(block, direction, pull.data(),
                   Bins<Real>(edges[2 * at], edges[2 * at + 1], a.bins), table + at * a.bins,
                   sums.data());
    }
    const double* weights = a.weights ? a.weights + b * count + first : nullptr;
    for (int64_t k = 0; k < dim; ++k)
      for (int64_t i = 0; i < block.count; ++i)
        sums[k * size + i] *= static_cast<Real>(weights ? weights[i] : 1.0 / count);
    store(a.out, b, first, block.count, size, sums.data());
  });
}

// Exact.

// Unsigned integers in the order of the numbers they stand for.
template <typename Real>
typename BitsOf<Real>::Type to_key(Real value) {
  using Key = typename BitsOf<Real>::Type;
  const auto bits = bit_cast<Key>(value);
  const Key top = Key{1} << (sizeof(Key) * 8 - 1);
  return bits & top ? ~bits : bits | top;
}
template <typename Real>
Real from_key(typename BitsOf<Real>::Type key) {
  using Key = typename BitsOf<Real>::Type;
  const Key top = Key{1} << (sizeof(Key) * 8 - 1);
  return bit_cast<Real>(key & top ? key ^ top : ~key);
}

// What is sorted: the key alone where only values are needed, or with the point's number.
template <typename Key>
struct Numbered {
  Key key;
  uint32_t number;
};
template <typename Key>
Key key_of(Numbered<Key> item) {
  return item.key;
}
inline uint32_t key_of(uint32_t key) { return key; }
inline uint64_t key_of(uint64_t key) { return key; }

// Radix sort from the least significant digit. All digits are counted in one pass, and a digit
// that all keys share costs no pass of its own. The result is in `items`.
template <typename Item>
void radix_sort(std::vector<Item>& items, std::vector<Item>& spare) {
  using Key = decltype(key_of(Item{}));
  constexpr int kBits = 11, kDigits = 1 << kBits;
  constexpr int kPasses = (sizeof(Key) * 8 + kBits - 1) / kBits;
  std::vector<uint32_t> counts(kPasses * kDigits);
  for (const Item& item : items)
    for (int pass = 0; pass < kPasses; ++pass)
      ++counts[pass * kDigits + (key_of(item) >> (pass * kBits)) % kDigits];
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t* offset = counts.data() + pass * kDigits;
    if (offset[(key_of(items[0]) >> (pass * kBits)) % kDigits] == items.size()) continue;
    uint32_t sum = 0;
    for (int digit = 0; digit < kDigits; ++digit) sum += std::exchange(offset[digit], sum);
    for (const Item& item : items)
      spare[offset[(key_of(item) >> (pass * kBits)) % kDigits]++] = item;
    items.swap(spare);
  }
}

// One side of one direction's problem.
template <typename Real>
struct Sorted {
  using Key = typename BitsOf<Real>::Type;
  std::vector<Real> values, slopes;
  std::vector<double> level;
  std::vector<Key> keys, spare_keys;
  std::vector<Numbered<Key>> items, spare_items;
  bool finite = true;

  // Sorts the projections in `values`. The numbers of the points come along if they are needed.
  void sort(bool numbered) {
    const size_t n = values.size();
    finite = true;
    for (const Real value : values) finite &= std::isfinite(value);
    if (numbered) {
      items.resize(n), spare_items.resize(n);
      for (size_t i = 0; i < n; ++i) items[i] = {to_key(values[i]), static_cast<uint32_t>(i)};
      radix_sort(items, spare_items);
      for (size_t i = 0; i < n; ++i) values[i] = from_key<Real>(items[i].key);
    } else {
      keys.resize(n), spare_keys.resize(n);
      for (size_t i = 0; i < n; ++i) keys[i] = to_key(values[i]);
      radix_sort(keys, spare_keys);
      for (size_t i = 0; i < n; ++i) values[i] = from_key<Real>(keys[i]);
    }
  }

  double weight(const double* weights, size_t i) const {
    return weights ? weights[items[i].number] : 1.0;
  }

  void cumulate(const double* weights) {
    const size_t n = values.size();
    level.resize(n);
    double running = 0;
    for (size_t i = 0; i < n; ++i) level[i] = running += weight(weights, i);
    for (size_t i = 0; i < n; ++i) level[i] /= running;
  }

  // Points that tie share their slopes by weight. Writes out[number] = slope.
  void share_ties(const double* weights, Real* out) const {
    const size_t n = values.size();
    for (size_t begin = 0, end; begin < n; begin = end) {
      end = begin + 1;
      if (end == n || values[end] != values[begin]) {
        out[items[begin].number] = slopes[begin];
        continue;
      }
      double slope = slopes[begin], mass = weight(weights, begin);
      for (; end < n && values[end] == values[begin]; ++end)
        slope += slopes[end], mass += weight(weights, end);
      for (size_t i = begin; i < end; ++i)
        out[items[i].number] = mass > 0 ? slope / mass * weight(weights, i) : 0;
    }
  }
};

// Equally many points of equal weight: they pair up in order.
template <typename Real>
double pair_up(Sorted<Real>& x, Sorted<Real>& y, int p, bool need_x, bool need_y) {
  const size_t n = x.values.size();
  const Real each = Real(1) / n;
  double cost = 0;
  for (size_t i = 0; i < n; ++i) {
    const Real gap = x.values[i] - y.values[i];
    const Real slope = p == 1 ? (gap > 0 ? each : gap < 0 ? -each : 0) : 2 * gap * each;
    cost += p == 1 ? std::abs(gap) : gap * gap;
    if (need_x) x.slopes[i] = slope;
    if (need_y) y.slopes[i] = -slope;
  }
  return cost / n;
}

template <typename Real>
double solve_sorted(Sorted<Real>& x, Sorted<Real>& y, const double* weights_x,
                    const double* weights_y, int p, bool need_x, bool need_y) {
  x.slopes.assign(need_x ? x.values.size() : 0, 0);
  y.slopes.assign(need_y ? y.values.size() : 0, 0);
  if (!weights_x && !weights_y && x.values.size() == y.values.size())
    return pair_up(x, y, p, need_x, need_y);
  x.cumulate(weights_x);
  y.cumulate(weights_y);
  return transport(
      x.values.size(), [&](int64_t i) { return x.values[i]; }, x.level.data(), y.values.size(),
      [&](int64_t j) { return y.values[j]; }, y.level.data(), p,
      need_x ? x.slopes.data() : nullptr, need_y ? y.slopes.data() : nullptr);
}

template <typename Real>
Block<Real> planar_copy(const Points& points, int64_t batch, int threads) {
  Block<Real> all(points.dim, ceil_div(points.count, 64) * 64);
  const int64_t size = block_size(points.dim, points.count);
  all.count = points.count;
  parallel_for(ceil_div(points.count, size), threads, [&](int64_t i) {
    Block<Real> block(points.dim, size);
    block.read(points, batch, i * size);
    const int64_t room = std::min(size, all.pitch - i * size);
    for (int64_t k = 0; k < points.dim; ++k)
      std::copy_n(block.planar.data() + k * size, room,
                  all.planar.data() + k * all.pitch + i * size);
  });
  return all;
}

template <typename Real>
void project_all(const Block<Real>& points, const Real* direction, std::vector<Real>& out) {
  out.resize(points.pitch);
  project_block(points, direction, out.data());
  out.resize(points.count);
}

// sums[k][i] += sum over these directions of slope[i] * grad * direction[k], always in the order
// of the directions.
template <typename Real>
void pull_back(const std::vector<std::vector<Real>>& slopes, int64_t first, int64_t used,
               const Real* directions, const Real* grad, int threads, Block<Real>& sums) {
  const int64_t size = block_size(sums.dim, sums.count);
  parallel_for(ceil_div(sums.count, size), threads, [&](int64_t task) {
    const int64_t begin = task * size, end = std::min(sums.count, begin + size);
    for (int64_t c = 0; c < used; ++c) {
      const Real* slope = slopes[c].data();
      for (int64_t k = 0; k < sums.dim; ++k) {
        const Real pull = directions[(first + c) * sums.dim + k] * (grad ? grad[first + c] : 1);
        Real* sum = sums.planar.data() + k * sums.pitch;
        for (int64_t i = begin; i < end; ++i) sum[i] += slope[i] * pull;
      }
    }
  });
}

template <typename Real>
void write_gradient(const Block<Real>& sums, int64_t batch, void* out) {
  Real* rows = static_cast<Real*>(out) + batch * sums.count * sums.dim;
  for (int64_t i = 0; i < sums.count; ++i)
    for (int64_t k = 0; k < sums.dim; ++k)
      rows[i * sums.dim + k] = sums.planar[k * sums.pitch + i];
}

// How many directions are sorted at once: one per thread, fewer if that would take over 1 GiB.
template <typename Real>
int64_t directions_at_once(const ExactArguments& a) {
  const int64_t per_point = 2 * sizeof(Numbered<typename BitsOf<Real>::Type>) + 3 * sizeof(Real) +
                            sizeof(double);
  const int64_t bytes = (a.x.count + a.y.count) * per_point;
  const int64_t most = std::min<int64_t>(a.threads, a.directions_count);
  return std::clamp<int64_t>((int64_t{1} << 30) / bytes, 1, std::max<int64_t>(most, 1));
}

template <typename Real>
void exact_as(const ExactArguments& a) {
  const auto* directions = static_cast<const Real*>(a.directions);
  const int64_t at_once = directions_at_once<Real>(a), dim = a.x.dim;
  std::vector<Sorted<Real>> x(at_once), y(at_once);
  std::vector<std::vector<Real>> slopes_x(at_once), slopes_y(at_once);
  for (int64_t b = 0; b < a.x.batch; ++b) {
    const Block<Real> points_x = planar_copy<Real>(a.x, b, a.threads);
    const Block<Real> points_y = planar_copy<Real>(a.y, b, a.threads);
    Block<Real> sums_x(a.grad_x ? dim : 0, points_x.pitch);
    Block<Real> sums_y(a.grad_y ? dim : 0, points_y.pitch);
    sums_x.count = a.x.count, sums_y.count = a.y.count;
    const double* weights_x = a.weights_x ? a.weights_x + b * a.x.count : nullptr;
    const double* weights_y = a.weights_y ? a.weights_y + b * a.y.count : nullptr;
    const Real* grad =
        a.grad ? static_cast<const Real*>(a.grad) + b * a.directions_count : nullptr;
    for (int64_t first = 0; first < a.directions_count; first += at_once) {
      const int64_t used = std::min(at_once, a.directions_count - first);
      parallel_for(used, a.threads, [&](int64_t c) {
        project_all(points_x, directions + (first + c) * dim, x[c].values);
        project_all(points_y, directions + (first + c) * dim, y[c].values);
        x[c].sort(a.grad_x || weights_x);
        y[c].sort(a.grad_y || weights_y);
        double cost = solve_sorted(x[c], y[c], weights_x, weights_y, a.p, a.grad_x, a.grad_y);
        const bool finite = x[c].finite && y[c].finite;
        constexpr Real nan = std::numeric_limits<Real>::quiet_NaN();
        static_cast<Real*>(a.values)[b * a.directions_count + first + c] =
            finite ? static_cast<Real>(cost) : nan;
        if (a.grad_x) {
          slopes_x[c].assign(finite ? a.x.count : 0, 0);
          slopes_x[c].resize(a.x.count, nan);
          if (finite) x[c].share_ties(weights_x, slopes_x[c].data());
        }
        if (a.grad_y) {
          slopes_y[c].assign(finite ? a.y.count : 0, 0);
          slopes_y[c].resize(a.y.count, nan);
          if (finite) y[c].share_ties(weights_y, slopes_y[c].data());
        }
      });
      if (a.grad_x) pull_back(slopes_x, first, used, directions, grad, a.threads, sums_x);
      if (a.grad_y) pull_back(slopes_y, first, used, directions, grad, a.threads, sums_y);
    }
    if (a.grad_x) write_gradient(sums_x, b, a.grad_x);
    if (a.grad_y) write_gradient(sums_y, b, a.grad_y);
  }
}

}  // namespace

void binned(const BinnedArguments& a) {
  const bool weighted = a.weights_x || a.weights_y;
  if (a.x.format == Format::float64)
    weighted ? binned_as<double, uint64_t>(a) : binned_as<double, uint32_t>(a);
  else
    weighted ? binned_as<float, uint64_t>(a) : binned_as<float, uint32_t>(a);
}

void binned_backward(const BinnedBackwardArguments& a) {
  a.points.format == Format::float64 ? binned_backward_as<double>(a)
                                     : binned_backward_as<float>(a);
}

void exact(const ExactArguments& a) {
  a.x.format == Format::float64 ? exact_as<double>(a) : exact_as<float>(a);
}

}  // namespace sdcore
