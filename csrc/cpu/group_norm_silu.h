// Group normalization with SiLU on CPU, and its gradient. The formulas are in
// sdcore/ops/group_norm_silu.py; arithmetic is float for half, bfloat16 and float and double for
// double.
#pragma once

#include <array>

#include "../points.h"

namespace sdcore {

// All tensors of [batch, channels, pixels] are of one format and lie alike: without gaps, channels
// (last) or pixels side by side. Vectors are of doubles. Null for what is absent.
struct GroupNormArguments {
  Format format;
  int64_t batch, channels, pixels, groups;
  bool last, silu;
  double eps;
  const void *x, *residual;
  void *total, *out;
  const double *weight, *bias, *shift;  // [channels], [channels], [batch, channels]
  double *mean, *rstd;                  // [batch, groups]; means off the first value of a group
  int threads;
};

// x, weight, bias, shift, mean and rstd are read as the forward had and left them, x being total
// where there was a residual.
struct GroupNormBackwardArguments {
  GroupNormArguments forward;
  const void *grad, *more;  // more is added to the gradient to x
  void* to_x;
  double *to_weight, *to_bias, *to_shift;  // [batch, channels] each
};

void group_norm_silu(const GroupNormArguments& arguments);
void group_norm_silu_backward(const GroupNormBackwardArguments& arguments);

}  // namespace sdcore
