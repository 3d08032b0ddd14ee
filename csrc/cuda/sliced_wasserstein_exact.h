// Sliced Wasserstein distance and gradient on a GPU, by sorting: the stages, each a launch or a few.
// The formulas are in sdcore/ops/sliced_wasserstein.py; arithmetic is as in sliced_wasserstein.h.
//
// A slot is a direction of a batch element, b * directions + l. A pass works on some consecutive
// slots; what it needs memory for has one row for each of them.
//
// Projections are compared in fixed point: a slot's are whole multiples of 2^exponent, rounded
// down, in `bits` bits. The exponent follows from the largest magnitude, so that `bits` of one more
// than a number's significand has lose nothing of the largest; and rounding down to one grid and
// then to a coarser one is the same as rounding to that at once, so that a set sorted by itself
// fits any grid.
#pragma once

#include <cstdint>

#include "sliced_wasserstein.h"

namespace sdcore {

struct Pass {
  int64_t first, slots;
  int64_t directions;  // of a batch element, in all
};

// A set that was sorted before the call: its projections in order, and their weights' sums up to
// each, normalized; null if they are equal. `one`: the same for all batch elements.
struct Kept {
  const void* values;    // Real [1 or batch, directions, count]
  const double* levels;  // double, likewise
  int64_t count;
  bool one;
};

// Of all slots: the exponent, and whether a value is not finite or a weight NaN, as far as the ends
// show. `extremes` is what `sliced_wasserstein_range` wrote, and `weights` are [batch, count].
struct GridArguments {
  const void* extremes;
  Kept kept;                 // without values: none
  const double* weights[2];  // null: equal
  int64_t count[2];
  int64_t batch, directions;
  int bits;
  int* exponents;  // [batch, directions]
  int* poison;     // [batch, directions]
  bool is_double;
};
void sliced_wasserstein_grid(const GridArguments& arguments, Place place);

// Keys of a pass's slots, to be sorted: the row, then the projection in fixed point. And, unless it
// is null, the number of each point beside it. Marks slots where a projection is not finite.
struct KeysArguments {
  Points points;
  Directions directions;
  Pass pass;
  int bits;
  const int* exponents;
  int* poison;
  void* keys;        // uint32, uint64 for double points, [slots, count]
  uint32_t* number;  // [slots, count]
};
void sliced_wasserstein_keys(const KeysArguments& arguments, Place place);

// Projections as they are, Real [slots, count].
void sliced_wasserstein_project(const Points& points, const Directions& directions,
                                const Pass& pass, void* out, Place place);

// Sums of weights up to each point, in the order of the sorted ones: double [slots, count], the
// last one being 1. `totals` is workspace, [slots, prefix_chunks(count)] of 8 bytes.
int64_t prefix_chunks(int64_t count);
void sliced_wasserstein_levels(const uint32_t* number, const double* weights, int64_t count,
                               const Pass& pass, double* levels, void* totals, Place place);

// Slopes of points, Real [slots, count]: those of 2^bits points with neighboring numbers are
// together, a bucket, in no order; `places` tells which of its points each belongs to. With zero
// bits there are no buckets: they are in the order of the points.
struct Bucketed {
  const void* slopes;
  const uint16_t* places;  // [slots, count]
  int bits;
  int64_t count;
};
// Bits for so many points.
int bucket_bits(int64_t count, bool is_double);

// One side of a transport problem: sorted keys, or what was sorted before.
struct SortedSide {
  const void* keys;  // as sorted; null for a kept set
  Kept kept;         // levels of keys have a row for each of the pass's slots
  const uint32_t* number;  // of each sorted point; null: no gradient is wanted
  // Written, as `Bucketed` says: the derivative per unit of weight. Null: not wanted.
  void* slopes;
  uint16_t* places;
  uint32_t* cursors;  // workspace [slots, buckets], zeroed
  int bucket_bits;
  double* moments;  // workspace [slots, count]; for p = 2, if the other side wants slopes
  int64_t count;
};

struct TransportArguments {
  SortedSide x, y;
  Pass pass;
  int bits;
  const int* exponents;
  const int* poison;
  int p;
  double* costs;  // workspace [slots, transport_blocks(n, m, is_double)]
  void* totals;   // workspace [slots, prefix_chunks(the larger count)] of 8 bytes; for p = 2
  void* values;   // Real [batch, directions]: those of the pass are written
  bool is_double;
};
int64_t transport_blocks(int64_t n, int64_t m, bool is_double);
void sliced_wasserstein_transport(const TransportArguments& arguments, Place place);

// Slopes, Real [slots, count], in the order of the points. With `finite`, 0 in the place of NaN.
void sliced_wasserstein_unpack(const Bucketed& from, int64_t slots, void* out, bool finite,
                               bool is_double, Place place);

// Whether `sliced_wasserstein_pull` takes slopes in buckets of so many bits.
bool can_pull_buckets(int bits);

// The gradient to points, Real [batch, count, dim], from the slopes of a pass; of a batch element
// that is spread over several passes it is complete after the last.
struct PullArguments {
  Bucketed from;
  Directions directions;
  int64_t dim;
  Pass pass;
  const void* grad;  // Real [batch, directions], or null: `scale` for all
  double scale;
  const double* weights;  // double [batch, count]; null: equal
  void* out;
  bool is_double;
};
void sliced_wasserstein_pull(const PullArguments& arguments, Place place);

// All of it, in one launch and 27 bits, for projections of as many points of x as of y, all of equal
// weight, that fit shared memory: up to so many.
struct SmallArguments {
  const float *x, *y;  // [slots, count]
  int64_t slots, count;
  int p;
  float* values;  // [slots]
  // [slots, count], of x per unit of weight, in the order of the points. Null: not wanted.
  float* slopes;
  float unknown;  // slope where the value is NaN
};
int64_t most_small_points(int device);
void sliced_wasserstein_small(const SmallArguments& arguments, Place place);

}  // namespace sdcore
