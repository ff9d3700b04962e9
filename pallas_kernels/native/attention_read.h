// Keys and values as they are stored to what products read: words of 4 bytes, which are floats, or pairs of bfloat16.
//
// A block is `kBlock` keys. Keys come out with keys in the lanes, `[kBlock / kLanes, steps, kLanes]`; a step is one
// input of a dot, or a pair. Values come out with their dims in the lanes, `[kBlock / kInputs, width]`; a step is one
// key, or a pair of keys. Either way a product spreads a word of its left operand over a vector.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "decode.h"
#include "sums.h"
#include "units.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__F16C__)
#define QUIRE_WIDE 1
#endif

namespace quire {

constexpr int64_t kBlock = 64;

enum class Stored { kFloat, kHalf, kFloat16, kInt8, kFp8 };

template <Stored S>
constexpr int64_t kStoredBytes = S == Stored::kFloat ? 4 : S == Stored::kHalf || S == Stored::kFloat16 ? 2 : 1;

template <typename Element>
constexpr int64_t kInputs = 4 / sizeof(Element);  // of a step

inline int64_t up_to(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

template <typename Element>
int64_t steps_of(int64_t dims) {  // that are stored: whole vectors of them
  return up_to((dims + kInputs<Element> - 1) / kInputs<Element>, kLanes);
}

inline int64_t width_of(int64_t dims) { return up_to(dims, 2 * kLanes); }  // of values

inline void fetch_row(const uint8_t* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
}

#ifdef QUIRE_WIDE

template <Stored S>
inline __m512 sixteen(const uint8_t* at) {
  if constexpr (S == Stored::kFloat) return _mm512_loadu_ps(at);
  if constexpr (S == Stored::kInt8)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
  if constexpr (S == Stored::kHalf || S == Stored::kFloat16) {
    __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    if constexpr (S == Stored::kFloat16) return _mm512_cvtph_ps(narrow);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
  }
  if constexpr (S == Stored::kFp8) {  // as float16: sign, three bits of exponent more, mantissa
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    __m256i halves = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(256));
    __mmask16 nan = _mm512_cmp_ps_mask(_mm512_abs_ps(value), _mm512_set1_ps(480), _CMP_EQ_OQ);
    return _mm512_mask_mov_ps(value, nan, _mm512_set1_ps(__builtin_nanf("")));
  }
}

// 16 words from the dims at `at` on.
template <typename Element, Stored S>
inline __m512i words(const uint8_t* at) {
#ifdef QUIRE_AVX512
  if constexpr (std::is_same_v<Element, Half>) {
    if constexpr (S == Stored::kHalf) return _mm512_loadu_si512(at);
    if constexpr (S == Stored::kInt8) return join(sixteen<S>(at), sixteen<S>(at + 16));
    if constexpr (S == Stored::kFp8) return Reader<Format::kFp8>(Rule{false}).plain(at);
  }
#endif
  if constexpr (std::is_same_v<Element, float>) return _mm512_castps_si512(sixteen<S>(at));
}

// Words of `row` from dim `dim` on; those beyond its end are 0, and memory beyond is not read.
template <typename Element, Stored S>
inline __m512i words_until(const uint8_t* row, int64_t dim, int64_t dims) {
  constexpr int64_t kCount = 16 * kInputs<Element>;
  const uint8_t* at = row + dim * kStoredBytes<S>;
  if (dim + kCount <= dims) return words<Element, S>(at);
  alignas(64) uint8_t end[64] = {};
  if (dim < dims) std::memcpy(end, at, (dims - dim) * kStoredBytes<S>);
  return words<Element, S>(end);
}

// Rows of words become columns.
inline void transpose(__m512i* r, float* out) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // r[4 * b + i]: columns i, i + 4, i + 8, i + 12 of rows 4 * b to 4 * b + 3
    __m512i even01 = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), odd01 = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    __m512i even23 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    __m512i odd23 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    _mm512_store_si512(out + 16 * i, _mm512_shuffle_i32x4(even01, even23, 0x88));
    _mm512_store_si512(out + 16 * (i + 4), _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    _mm512_store_si512(out + 16 * (i + 8), _mm512_shuffle_i32x4(even01, even23, 0xdd));
    _mm512_store_si512(out + 16 * (i + 12), _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
  }
}

// `ahead`: rows of the block that comes next, which are fetched meanwhile.
template <typename Element, Stored S>
void read_keys(const uint8_t* const* rows, const uint8_t* const* ahead, int64_t dims, float* out) {
  constexpr int64_t kCount = 16 * kInputs<Element>;
  for (int64_t first = 0; first < kBlock; first += 16) {
    for (int64_t i = first; i < first + 16; ++i) fetch_row(ahead[i], dims * kStoredBytes<S>);
    for (int64_t dim = 0; dim < dims; dim += kCount, out += 256) {
      const uint8_t* at[16];
      alignas(64) uint8_t ends[16][64];
      for (int i = 0; i < 16; ++i) at[i] = rows[first + i] + dim * kStoredBytes<S>;
      if (dim + kCount > dims) {
        std::memset(ends, 0, sizeof ends);
        for (int i = 0; i < 16; ++i) std::memcpy(ends[i], at[i], (dims - dim) * kStoredBytes<S>), at[i] = ends[i];
      }
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = words<Element, S>(at[i]);
      transpose(r, out);
    }
  }
}

template <typename Element, Stored S>
void read_values(const uint8_t* const* rows, const uint8_t* const* ahead, int64_t dims, float* out) {
  int64_t width = width_of(dims);
  for (int64_t i = 0; i < kBlock; i += 2, out += 2 / kInputs<Element> * width) {
    fetch_row(ahead[i], dims * kStoredBytes<S>), fetch_row(ahead[i + 1], dims * kStoredBytes<S>);
    for (int64_t dim = 0; dim < width; dim += 32) {
      if constexpr (sizeof(Element) == 2) {
        const __m512i low = _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006,
                                              0x270007, 0x280008, 0x290009, 0x2a000a, 0x2b000b, 0x2c000c, 0x2d000d,
                                              0x2e000e, 0x2f000f);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        __m512i a = words_until<Element, S>(rows[i], dim, dims), b = words_until<Element, S>(rows[i + 1], dim, dims);
        _mm512_store_si512(out + dim, _mm512_permutex2var_epi16(a, low, b));
        _mm512_store_si512(out + dim + 16, _mm512_permutex2var_epi16(a, high, b));
      } else {
        for (int64_t d = dim; d < dim + 32; d += 16) {
          _mm512_store_si512(out + d, words_until<Element, S>(rows[i], d, dims));
          _mm512_store_si512(out + width + d, words_until<Element, S>(rows[i + 1], d, dims));
        }
      }
    }
  }
}

#else

// A row as floats, with zeros up to `width`.
template <Stored S>
inline void widen_row(const uint8_t* row, int64_t dims, int64_t width, float* out) {
  if constexpr (S == Stored::kInt8 || S == Stored::kFp8) {
    decode<S == Stored::kInt8 ? Format::kInt8 : Format::kFp8>(row, 0, dims, Rule{false}, out);
  } else {
    using W = std::conditional_t<S == Stored::kFloat, float, std::conditional_t<S == Stored::kHalf, Half, _Float16>>;
    const W* from = reinterpret_cast<const W*>(row);
    int64_t k = 0;
    for (; k + kLanes <= dims; k += kLanes) put(out + k, widen_lanes(from + k));
    for (; k < dims; ++k) out[k] = widen(from[k]);
  }
  std::fill(out + dims, out + width, 0.0f);
}

template <typename Element, Stored S>
void read_keys(const uint8_t* const* rows, const uint8_t* const* ahead, int64_t dims, float* out) {
  static_assert(std::is_same_v<Element, float>);
  int64_t steps = steps_of<float>(dims);
  for (int64_t first = 0; first < kBlock; first += kLanes) {
    for (int64_t dim = 0; dim < steps; dim += kLanes, out += kLanes * kLanes) {
      float wide[kLanes][kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const uint8_t* row = rows[first + i] + dim * kStoredBytes<S>;
        widen_row<S>(row, std::min<int64_t>(dims - dim, kLanes), kLanes, wide[i]);
      }
      for (int d = 0; d < kLanes; ++d)
        for (int i = 0; i < kLanes; ++i) out[d * kLanes + i] = wide[i][d];
    }
    for (int64_t i = first; i < first + kLanes; ++i) fetch_row(ahead[i], dims * kStoredBytes<S>);
  }
}

template <typename Element, Stored S>
void read_values(const uint8_t* const* rows, const uint8_t* const* ahead, int64_t dims, float* out) {
  int64_t width = width_of(dims);
  for (int64_t i = 0; i < kBlock; ++i) {
    widen_row<S>(rows[i], dims, width, out + i * width);
    fetch_row(ahead[i], dims * kStoredBytes<S>);
  }
}

#endif

}  // namespace quire
