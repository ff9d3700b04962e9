// Scales and zero points as float32.
#pragma once

#include <cstdint>
#include <type_traits>

#include "decode.h"
#include "xla/ffi/api/ffi.h"

namespace quire {

// `count` numbers from `first` on.
template <typename T>
void widen_as(const void* from, int64_t first, int64_t count, float* to) {
  const T* start = static_cast<const T*>(from) + first;
  int64_t n = 0;
#if defined(QUIRE_AVX512) || defined(QUIRE_AVX2)
  if constexpr (std::is_same_v<T, _Float16>) {  // GCC converts them one by one
    for (; n + 8 <= count; n += 8)
      _mm256_storeu_ps(to + n, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(start + n))));
  }
#endif
  for (; n < count; ++n) {
    if constexpr (std::is_same_v<T, Half>)
      to[n] = float_of(start[n]);
    else
      to[n] = static_cast<float>(start[n]);
  }
}

inline void widen(xla::ffi::DataType type, const void* from, int64_t first, int64_t count, float* to) {
  if (type == xla::ffi::DataType::F32)
    widen_as<float>(from, first, count, to);
  else if (type == xla::ffi::DataType::BF16)
    widen_as<Half>(from, first, count, to);
  else
    widen_as<_Float16>(from, first, count, to);
}

}  // namespace quire
