// Sliced Wasserstein distance and gradient on a GPU, by binning: the stages, each a launch. The
// formulas are in sdcore/ops/sliced_wasserstein.py; arithmetic is float for half, bfloat16 and
// float points and double for double points ("Real" below).
//
// A launcher takes addresses, sizes and a stream, puts kernels on the stream and returns. It
// allocates nothing and never waits; what it needs for work the caller hands in.
#pragma once

#include <cstdint>

#include "points.h"

namespace sdcore {

// Points of more coordinates are projected by the caller, one direction to a batch element.
constexpr int kMostCoordinates = 4;

// Where the launch goes.
struct Place {
  int device;
  uintptr_t stream;
};

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

// One side of the problem: its points, their weights (double [batch, count], null for equal ones)
// and, of each [batch, direction], the mass in each bin: 32-bit counts or, of weighted points,
// 64-bit multiples of 2^-62. To be zeroed by the caller.
struct Side {
  Points points;
  const double* weights;
  void* histogram;
};

// Masses of either kind; `total` of counts, 0 where it has to be added up.
struct Masses {
  const void* data;
  bool wide;
  int64_t total;
  int64_t batch_stride;  // in histograms: 0 if all batch elements have the same
};

// extremes, [batch, directions, 2] unsigned integers of Real's size, zeroed by the caller or
// holding those of other points, takes up the ends of the projections.
void sliced_wasserstein_range(const Points* sides, int count, Directions directions,
                              void* extremes, Place place);

// Adds the points of one or two sides to their histograms, and 1 to poison, int32 [batch,
// directions], where a projection is not finite or a weight is NaN.
void sliced_wasserstein_histogram(const Side* sides, int count, Directions directions, Ends ends,
                                  int64_t bins, int* poison, Place place);

// From histograms to values, Real [batch, directions], tables, Real [batch, directions, bins]
// (table_y null if not wanted), and the ends of the bins, Real [batch, directions, 2]. For p = 2
// workspace is double [2, 2, batch, directions, bins].
void sliced_wasserstein_solve(Masses x, Masses y, Directions directions, int64_t dim, Ends ends,
                              int64_t batch, int64_t bins, int p, const int* poison, void* values,
                              void* table_x, void* table_y, void* edges, double* workspace,
                              bool is_double, Place place);

// The gradient to points [batch, count, dim], from that of the values, Real [batch, directions],
// times `mass` and, where there are any, the weights. `out` may be the points.
void sliced_wasserstein_gather(const void* grad, const Points& points, Directions directions,
                               const double* weights, double mass, const void* table,
                               const void* edges, int64_t bins, const Points& out, Place place);

}  // namespace sdcore
