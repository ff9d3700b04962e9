// Steps through dense weights `[K, N]`: two vectors of a step's weights, their product with an input spread over a vector,
// and their sums put in the order of the outputs.
#pragma once

#include <cstdint>
#include <cstring>

#include "decode.h"
#include "sums.h"

namespace quire {

inline float widen(float value) { return value; }
inline float widen(Half value) { return float_of(value); }
inline float widen(_Float16 value) { return static_cast<float>(value); }

template <typename W>
inline Lanes widen_lanes(const W* from) {
  float wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = widen(from[i]);
  return lanes_at(wide);
}

inline Lanes widen_lanes(const float* from) { return lanes_at(from); }

#if defined(__AVX512F__)
inline Lanes widen_lanes(const _Float16* from) {  // which GCC would do one by one
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#elif defined(QUIRE_AVX2)
inline Lanes widen_lanes(const _Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#endif

template <typename Weight>
struct FloatUnit {
  using W = Weight;
  using X = float;
  using Vector = Lanes;
  static constexpr int64_t kOutputs = 2 * kLanes, kInputs = 1;

  static void load(const W* w, int64_t stride, int64_t outputs, int64_t inputs, Vector* out) {
    if (outputs >= kOutputs) {
      out[0] = widen_lanes(w), out[1] = widen_lanes(w + kLanes);
    } else {
      float wide[2 * kLanes] = {};
      for (int i = 0; i < outputs; ++i) wide[i] = widen(w[i]);
      out[0] = lanes_at(wide), out[1] = lanes_at(wide + kLanes);
    }
  }
  static Vector spread(const X* x) { return Lanes{} + *x; }
  static void add(Lanes& sum, const Vector& x, const Vector& w) { sum += x * w; }
  static void settle(const float* sums, float* out) { std::memcpy(out, sums, 2 * sizeof(Lanes)); }
};

#ifdef QUIRE_AVX512
struct HalfUnit {
  using W = Half;
  using X = Half;
  using Vector = __m512i;
  static constexpr int64_t kOutputs = 32, kInputs = 2;

  static void load(const W* w, int64_t stride, int64_t outputs, int64_t inputs, Vector* out) {
    __m512i first, second = _mm512_setzero_si512();
    if (outputs >= kOutputs) {
      first = _mm512_loadu_si512(w);
      if (inputs > 1) second = _mm512_loadu_si512(w + stride);
    } else {
      __mmask32 mask = (1u << outputs) - 1;
      first = _mm512_maskz_loadu_epi16(mask, w);
      if (inputs > 1) second = _mm512_maskz_loadu_epi16(mask, w + stride);
    }
    out[0] = _mm512_unpacklo_epi16(first, second), out[1] = _mm512_unpackhi_epi16(first, second);
  }
  static Vector spread(const X* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return _mm512_set1_epi32(pair);
  }
  static void add(Lanes& sum, const Vector& x, const Vector& w) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
  }
  static void settle(const float* sums, float* out) {  // interleaving takes four outputs of each eight
    __m512 low = _mm512_loadu_ps(sums), high = _mm512_loadu_ps(sums + 16);
    __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(low, second, high));
  }
};
#endif

}  // namespace quire
