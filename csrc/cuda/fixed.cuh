// Projections in fixed point: whole multiples of a power of two, which sorting takes.
#pragma once

#include <cstdint>

namespace sdcore {

// Keys and fixed-point numbers of the points' arithmetic.
template <typename Real>
struct Fixed;
template <>
struct Fixed<float> {
  using Key = uint32_t;
  using Code = int32_t;
  static constexpr int most = 126;  // an exponent whose power of two is a normal number
  static __device__ __forceinline__ Code floor(float x) { return __float2int_rd(x); }
  static __device__ __forceinline__ float power(int e) {
    return __int_as_float((e + 127) << 23);
  }
};
template <>
struct Fixed<double> {
  using Key = unsigned long long;
  using Code = long long;
  static constexpr int most = 1022;
  static __device__ __forceinline__ Code floor(double x) { return __double2ll_rd(x); }
  static __device__ __forceinline__ double power(int e) {
    return __longlong_as_double(static_cast<long long>(e + 1023) << 52);
  }
};
template <typename Real>
using Key = typename Fixed<Real>::Key;
template <typename Real>
using Code = typename Fixed<Real>::Code;

// To whole multiples of 2^exponent. Two factors, for one may be out of range where the numbers are
// tiny; products are exact, unless they are far below the grid.
template <typename Real>
struct Quantizer {
  Real first, second;
  __device__ explicit Quantizer(int exponent) {
    const int up = min(-exponent, Fixed<Real>::most);
    first = Fixed<Real>::power(max(up, -Fixed<Real>::most));
    second = Fixed<Real>::power(min(-exponent - up, Fixed<Real>::most));
  }
  // For finite x alone.
  __device__ Code<Real> operator()(Real x) const { return Fixed<Real>::floor(x * first * second); }
};

// The exponent of a grid on which numbers of up to this magnitude take so many bits, sign included.
template <typename Real>
__device__ __forceinline__ int grid_exponent(Real largest, int bits) {
  // Finite numbers beside an infinite one fit too: keys must not leave their row.
  constexpr int widest = sizeof(Real) == 4 ? 127 : 1023;
  if (!(largest > 0)) return 0;
  return (isinf(largest) ? widest : ilogb(largest)) + 2 - bits;
}

}  // namespace sdcore
