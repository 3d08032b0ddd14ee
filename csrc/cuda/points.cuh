// Reading points into registers, and writing them back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../points.h"

namespace sdcore {

// Bytes of a number.
__host__ __device__ constexpr int64_t size_of(Format format) {
  return format == Format::float64 ? 8 : format == Format::float32 ? 4 : 2;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ double widen(double x) { return x; }

template <typename T>
struct Narrow {
  static __device__ __forceinline__ T from(float x) { return x; }
};
template <>
struct Narrow<double> {
  static __device__ __forceinline__ double from(double x) { return x; }
};
template <>
struct Narrow<__half> {
  static __device__ __forceinline__ __half from(float x) { return __float2half_rn(x); }
};
template <>
struct Narrow<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 from(float x) { return __float2bfloat16_rn(x); }
};

// Calls `body` with the points' memory as what it is. The branch is the same for all threads;
// around a loop over points it costs nothing, where a template for each format would multiply
// the kernels. Arithmetic in double takes float64 points only, in float all others.
template <typename Real, typename Body>
__device__ __forceinline__ void with_format(const Points& points, Body&& body) {
  if constexpr (sizeof(Real) == 8) {
    body(static_cast<double*>(points.data));
  } else if (points.format == Format::float32) {
    body(static_cast<float*>(points.data));
  } else if (points.format == Format::float16) {
    body(static_cast<__half*>(points.data));
  } else {
    body(static_cast<__nv_bfloat16*>(points.data));
  }
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

}  // namespace sdcore
