// Delta Sampling's combination, guidance and step on CPU, and their gradient. The formulas are in
// sdcore/ops/delta_combine.py; arithmetic is float for half, bfloat16 and float and double for
// double.
#pragma once

#include <array>
#include <vector>

#include "../points.h"

namespace sdcore {

enum class Prediction { epsilon, v, sample };
enum class Output { prediction, x0, next };

// A tensor of [batch, axes...]; data is null for one that is absent.
struct Values {
  void* data;
  Format format;
  int64_t batch_stride;
  std::vector<int64_t> strides;
};

// One number of each sample; data is null for 1.
struct Numbers {
  const double* data;
  int64_t stride;
};

enum Which { kTarget, kTargetU, kSource, kSourceU, kAdapted, kAdaptedU, kSample, kState, kParts };

struct DeltaArguments {
  std::array<Values, kParts> parts;  // to read; in the backward, gradients to write
  Values out, out_u;                 // to write; in the backward, gradients to read
  int64_t batch;
  std::vector<int64_t> sizes;
  Numbers alpha, sigma, next_alpha, next_sigma, strengths, guidances;
  double strength, guidance, rescale;
  std::array<Prediction, 3> types;  // of target, source, adapted
  bool guided;
  Output output;
  bool delta_u;  // in the backward: whether the unconditional branch has a delta
  int threads;
};

void delta_combine(const DeltaArguments& arguments);
void delta_combine_backward(const DeltaArguments& arguments);

}  // namespace sdcore
