// Sliced Wasserstein distance and gradient on a GPU, by binning: the stages, each a launch. The
// formulas are in sdcore/ops/sliced_wasserstein.py; arithmetic is float for half, bfloat16 and
// float points and double for double points ("Real" below).
//
// A launcher takes addresses, sizes and a stream, puts kernels on the stream and returns. It
// allocates nothing and never waits; what it needs for work the caller hands in.
#pragma once

#include <cstdint>

#include "../points.h"
#include "place.h"

namespace sdcore {

// Weights are added in fixed point, in any order: one over the unit.
constexpr double kWeightUnit = 0x1p62;

// EDGE_ROUNDINGS of sdcore/ops/sliced_wasserstein.py.
constexpr double kEdgeRoundings = 8;

// Points of more coordinates are projected by the caller, one direction to a batch element.
constexpr int kMostCoordinates = 4;

// Bins of a block that solves, two to a thread.
constexpr int64_t kPart = 1024;

// Real [count, dim], contiguous.
struct Directions {
  const void* data;
  int64_t count;
};

// Where the bins of each direction begin and end.
struct Ends {
  enum Kind { found, box, given } kind;
  const void* data;  // found: what `range` writes; given: Real [batch, directions, 2]
  double low, high;  // box: of every coordinate
};

// What the blocks that count write, of each [batch, direction, chunk]: the mass in each bin
// [pitch], in counts of 16 or 32 bits or, of weighted points, multiples of 2^-62 in 64; and of
// each part of kPart bins the sum.
struct Histograms {
  void* masses;
  unsigned long long* totals;  // [parts]; -1 where a projection was not finite. Null: add masses up
  int bits;
  int64_t pitch, chunks;
};

// With `on`, each coordinate x counts as factor x + offset, kept from low to high; a NaN stays.
template <typename Real>
struct Clamped {
  Real factor, offset, low, high;
};
struct Rescale {
  bool on;
  Clamped<float> narrow;  // the same numbers twice: conversions in a kernel take time
  Clamped<double> wide;
};

// Points, their weights, double [batch, count], null if equal, and where their masses go: into so
// many chunks from the first on.
struct Side {
  Points points;
  Rescale rescale;
  const double* weights;
  Histograms out;
  int64_t first_chunk, chunks;
  int64_t group;  // directions of a block
};

// How n points, counted by the same launch as `others`, are to be counted.
struct HistogramPlan {
  int64_t chunks, pitch, parts, group;
  int bits;
};
HistogramPlan sliced_wasserstein_plan(int64_t n, int64_t others, int64_t dim, int64_t batch,
                                      int64_t directions, int64_t bins, bool weighted,
                                      bool is_double, int device);

// extremes, [batch, directions, 2] unsigned integers of Real's size, zeroed by the caller or
// holding those of other points, takes up the ends of the projections.
void sliced_wasserstein_range(const Points* sides, int count, Directions directions,
                              void* extremes, Place place);

// Counts the points of one or two sides, either both weighted or none. Zeroes `finished`, which
// may be null.
void sliced_wasserstein_histogram(const Side* sides, int count, Directions directions, Ends ends,
                                  int64_t bins, unsigned* finished, Place place);

struct SolveArguments {
  Histograms x, y;
  bool one_y;  // all batch elements have the same histograms of y
  Directions directions;
  int64_t dim;
  Ends ends;
  int64_t batch, bins;
  int p;
  void* values;  // Real [batch, directions]; or [batch], their sum times scale, with `reduce`
  bool reduce;
  double scale;
  void* table_x;       // Real [batch, directions, bins]
  void* table_y;       // likewise, or null
  void* edges;         // Real [batch, directions, 2]
  double* costs;       // workspace [batch, directions, parts]
  unsigned* finished;  // workspace [1], zeroed by the launch that counted
  double* moments;     // workspace [2, batch, directions, 2 bins + parts]; for p = 2
  bool is_double;
};
void sliced_wasserstein_solve(const SolveArguments& arguments, Place place);

// The gradient to points [batch, count, dim], times `mass` and the weights, if there are any, from
// that of the values; the factor of a rescaling is not in it. `out` may be the points, if they are
// not rescaled.
struct GatherArguments {
  const void* grad;  // Real, of b and l at b * grad_stride[0] + l * grad_stride[1]
  int64_t grad_stride[2];
  Points points;
  Rescale rescale;
  Directions directions;
  const double* weights;
  double mass;
  const void* table;  // Real [batch, directions, bins]
  const void* edges;  // Real [batch, directions, 2]
  int64_t bins;
  Points out;
};
void sliced_wasserstein_gather(const GatherArguments& arguments, Place place);

}  // namespace sdcore
