#include "points.h"

#include "bits.h"
#include "simd.h"

namespace sdcore {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

SDCORE_INLINE float widen(float value) { return value; }
SDCORE_INLINE double widen(double value) { return value; }
SDCORE_INLINE float widen(BFloat16 value) { return bit_cast<float>(uint32_t{value.bits} << 16); }
SDCORE_INLINE float widen(Half value) {
  // Shifted into float's fields the exponent is 112 too small; a multiplication mends that, and
  // turns subnormal halves into normal floats on the way.
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t infinite = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | infinite | sign);
}

SDCORE_INLINE void narrow(float value, float& out) { out = value; }
SDCORE_INLINE void narrow(double value, double& out) { out = value; }
SDCORE_INLINE void narrow(float value, BFloat16& out) {
  const auto bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  out.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded >> 16);
}
SDCORE_INLINE void narrow(float value, Half& out) {
  const auto bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 lets the float adder round at the place of half's last bit.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

// Strides that are constants make vector code of these loops: kStep and kSkip are the strides of
// points and coordinates, 0 for any.
template <int64_t kStep, int64_t kSkip, typename Scalar, typename Real>
SDCORE_INLINE void load_strided(const Points& points, int64_t batch, int64_t first, int64_t count,
                                int64_t pitch, Real* planar) {
  const int64_t step = kStep ? kStep : points.stride[1], skip = kSkip ? kSkip : points.stride[2];
  const auto* base =
      static_cast<const Scalar*>(points.data) + batch * points.stride[0] + first * step;
  for (int64_t k = 0; k < points.dim; ++k) {
    Real* out = planar + k * pitch;
    for (int64_t i = 0; i < count; ++i) out[i] = widen(base[i * step + k * skip]);
    // Vectors run past the last point: they find it again there, which moves no minimum.
    for (int64_t i = count; i < pitch; ++i) out[i] = out[count - 1];
  }
}

template <int64_t kStep, int64_t kSkip, typename Scalar, typename Real>
SDCORE_INLINE void store_strided(const Points& points, int64_t batch, int64_t first, int64_t count,
                                 int64_t pitch, const Real* planar) {
  const int64_t step = kStep ? kStep : points.stride[1], skip = kSkip ? kSkip : points.stride[2];
  auto* base = static_cast<Scalar*>(points.data) + batch * points.stride[0] + first * step;
  for (int64_t k = 0; k < points.dim; ++k)
    for (int64_t i = 0; i < count; ++i) narrow(planar[k * pitch + i], base[i * step + k * skip]);
}

// Colors come interleaved or as planes.
#define SDCORE_BY_STRIDE(function, Scalar)                                    \
  do {                                                                        \
    if (points.dim == 3 && points.stride[1] == 3 && points.stride[2] == 1)    \
      function<3, 1, Scalar>(points, batch, first, count, pitch, planar);     \
    else if (points.stride[1] == 1)                                           \
      function<1, 0, Scalar>(points, batch, first, count, pitch, planar);     \
    else                                                                      \
      function<0, 0, Scalar>(points, batch, first, count, pitch, planar);     \
  } while (false)

}  // namespace

SDCORE_CLONES void load(const Points& points, int64_t batch, int64_t first, int64_t count,
                        int64_t pitch, float* planar) {
  switch (points.format) {
    case Format::float16: SDCORE_BY_STRIDE(load_strided, Half); break;
    case Format::bfloat16: SDCORE_BY_STRIDE(load_strided, BFloat16); break;
    default: SDCORE_BY_STRIDE(load_strided, float);
  }
}

SDCORE_CLONES void load(const Points& points, int64_t batch, int64_t first, int64_t count,
                        int64_t pitch, double* planar) {
  SDCORE_BY_STRIDE(load_strided, double);
}

SDCORE_CLONES void store(const Points& points, int64_t batch, int64_t first, int64_t count,
                        int64_t pitch, const float* planar) {
  switch (points.format) {
    case Format::float16: SDCORE_BY_STRIDE(store_strided, Half); break;
    case Format::bfloat16: SDCORE_BY_STRIDE(store_strided, BFloat16); break;
    default: SDCORE_BY_STRIDE(store_strided, float);
  }
}

SDCORE_CLONES void store(const Points& points, int64_t batch, int64_t first, int64_t count,
                        int64_t pitch, const double* planar) {
  SDCORE_BY_STRIDE(store_strided, double);
}

}  // namespace sdcore
