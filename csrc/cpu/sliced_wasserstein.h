// Sliced Wasserstein distance and gradient on CPU. The formulas are in
// sdcore/ops/sliced_wasserstein.py; arithmetic is float for half, bfloat16 and float points and
// double for double points ("Real" below).
#pragma once

#include "points.h"

namespace sdcore {

// Directions [count, dim], Real, contiguous. Weights [batch, n], double, contiguous, each row
// summing to one; null for equal weights.

struct BinnedArguments {
  Points x, y;
  const void* directions;
  int64_t directions_count;
  const double* weights_x;
  const double* weights_y;
  int p;
  int64_t bins;
  bool has_range;
  double range_low, range_high;
  void* values;   // [batch, directions]
  void* table_x;  // [batch, directions, bins]
  void* table_y;
  void* edges;  // [batch, directions, 2]
  int threads;
};
void binned(const BinnedArguments& arguments);

struct BinnedBackwardArguments {
  const void* grad;  // [batch, directions], contiguous
  Points points;
  const void* directions;
  int64_t directions_count;
  const double* weights;
  const void* table;
  const void* edges;
  int64_t bins;
  Points out;  // shaped as points
  int threads;
};
void binned_backward(const BinnedBackwardArguments& arguments);

struct ExactArguments {
  Points x, y;
  const void* directions;
  int64_t directions_count;
  const double* weights_x;
  const double* weights_y;
  int p;
  const void* grad;  // [batch, directions], contiguous; null for all ones
  void* values;      // [batch, directions]
  void* grad_x;      // Real [batch, n, dim], contiguous; null if not needed
  void* grad_y;
  int threads;
};
void exact(const ExactArguments& arguments);

}  // namespace sdcore
