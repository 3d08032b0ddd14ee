// Point sets as the kernels read them: blocks of planar coordinates.
#pragma once

#include "../points.h"

namespace sdcore {

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
