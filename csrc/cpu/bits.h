// The bits of one number read as another.
#pragma once

#include <cstring>

namespace sdcore {

template <typename To, typename From>
inline __attribute__((always_inline)) To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast changes no size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace sdcore
