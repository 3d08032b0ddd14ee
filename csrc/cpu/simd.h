// Vectors of 32 bytes, and one copy of a function per instruction set, chosen when it is loaded. GCC
// 12 keeps vectors of 64 on the stack where the chip's own are of 32: binning then took twice as
// long.
#pragma once

#include <cstdint>

// GCC warns that passing such vectors by value depends on the instruction set; every function
// that does so here is inlined into its caller.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define SDCORE_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // knows no levels; this AVX2 is without fused multiply-add
#define SDCORE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define SDCORE_CLONES
#endif
#define SDCORE_INLINE inline __attribute__((always_inline))

namespace sdcore {

template <typename Real>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int width = 8;
  typedef float Vector __attribute__((vector_size(32)));
  typedef int32_t Index __attribute__((vector_size(32)));
};

template <>
struct Simd<double> {
  static constexpr int width = 4;
  typedef double Vector __attribute__((vector_size(32)));
  typedef int64_t Index __attribute__((vector_size(32)));
};

}  // namespace sdcore
