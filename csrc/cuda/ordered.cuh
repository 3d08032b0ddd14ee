// Floating-point numbers as unsigned integers of the same order, which atomics and sorting take.
#pragma once

#include <cstdint>

namespace sdcore {

__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(uint32_t bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}
__device__ __forceinline__ unsigned long long ordered(double x) {
  const unsigned long long bits = __double_as_longlong(x), sign = 1ull << 63;
  return bits & sign ? ~bits : bits | sign;
}
__device__ __forceinline__ double unordered(unsigned long long bits) {
  const unsigned long long sign = 1ull << 63;
  return __longlong_as_double(bits & sign ? bits & ~sign : ~bits);
}
template <typename Real>
using Ordered = decltype(ordered(Real()));

__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
  return __reduce_max_sync(0xffffffffu, x);
}
__device__ __forceinline__ unsigned long long warp_max(unsigned long long x) {
  for (int step = 16; step > 0; step /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

}  // namespace sdcore
