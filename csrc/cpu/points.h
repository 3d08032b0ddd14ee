// Point sets as callers hold them, and as the kernels read them: blocks of planar coordinates.
#pragma once

#include <cstdint>

namespace sdcore {

enum class Format { float32, float64, float16, bfloat16 };

// [batch, count, dim] with strides in elements.
struct Points {
  void* data;
  Format format;
  int64_t batch, count, dim;
  int64_t stride[3];
};

// planar[k * pitch + i] = coordinate k of point first + i, as float or double; entries from count
// to pitch repeat the last point. Double takes float64 points only, float all others.
void load(const Points& points, int64_t batch, int64_t first, int64_t count, int64_t pitch,
          float* planar);
void load(const Points& points, int64_t batch, int64_t first, int64_t count, int64_t pitch,
          double* planar);

// The inverse: writes `count` points, rounding to their format.
void store(const Points& points, int64_t batch, int64_t first, int64_t count, int64_t pitch,
           const float* planar);
void store(const Points& points, int64_t batch, int64_t first, int64_t count, int64_t pitch,
           const double* planar);

}  // namespace sdcore
