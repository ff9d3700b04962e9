// Activations in fixed point, as products of integers take them.
//
// A row is written in units of its own: one digit in -127 .. 127, or two in -128 .. 127, the higher one first, of
// numbers up to 32639. Of two digits the unit is a power of two: bfloat16 numbers of more than a 128th of the largest
// stay exact.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "decode.h"
#include "sums.h"
#include "threads.h"

#if defined(QUIRE_AVX512) && defined(__AVX512VNNI__)
#define QUIRE_VNNI 1
#endif

namespace quire {

#ifdef QUIRE_VNNI

struct Digits {
  int8_t* numbers;  // [rows, digits, stride], zeros after the last input
  int32_t* starts;  // [rows, digits, 16]: of each lane's sum, for weights that are read as more than they are
  float* units;     // [rows]
  float* totals;    // [rows]: of the row's numbers
  int64_t stride;   // in inputs
};

struct Rounding {
  Digits to;
  const void* x;
  int64_t rows, inputs, stride;  // stride: of x
  int32_t more;                  // what weights are read as more than they are
};

constexpr int64_t kRowsAtOnce = 4;

inline __m512 sixteen(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m512 sixteen(const Half* from, __mmask16 mask) { return floats_of(_mm256_maskz_loadu_epi16(mask, from)); }

inline __mmask16 mask_of(int64_t left) { return left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1); }

// NaN if a number is: compared as integers, NaNs are the largest.
template <typename T>
float largest_of(const T* x, int64_t count) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += 16) {
    __m512i bits = _mm512_castps_si512(sixteen(x + k, mask_of(count - k)));
    most = _mm512_max_epi32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  int32_t bits = _mm512_reduce_max_epi32(most);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The least power of two of which 32639 are enough for a row; NaN if the largest number is none.
inline float unit_of(float largest) {
  float unit = std::max(largest * (1 / 32639.0f), 0x1p-100f);
  if (!(unit <= 0x1p126f)) return largest - largest;
  uint32_t bits;
  std::memcpy(&bits, &unit, 4);
  bits = (bits + 0x7fffff) & 0x7f800000;
  std::memcpy(&unit, &bits, 4);
  return unit;
}

template <typename T, int kDigits>
void round_row(const Rounding& task, int64_t row) {
  const Digits& to = task.to;
  const T* x = static_cast<const T*>(task.x) + row * task.stride;
  int8_t* out = to.numbers + row * kDigits * to.stride;
  const float limit = kDigits == 2 ? 32639.0f : 127.0f;
  float largest = largest_of(x, task.inputs);
  // Of one digit products, not divisions: so XLA computes `quantize_activations`.
  float unit = kDigits == 2 ? unit_of(largest) : largest * (1 / limit);
  __m512 by = _mm512_set1_ps(1 / (unit == 0 ? 1 : unit));
  __m512i total = _mm512_setzero_si512();
  for (int64_t k = 0; k < task.inputs; k += 16) {
    __m512 value = _mm512_mul_ps(sixteen(x + k, mask_of(task.inputs - k)), by);
    value = _mm512_max_ps(_mm512_min_ps(value, _mm512_set1_ps(limit)), _mm512_set1_ps(-limit));
    __m512i number = _mm512_cvtps_epi32(value);
    total = _mm512_add_epi32(total, number);
    if constexpr (kDigits == 2) {
      __m512i high = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(128)), 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), _mm512_cvtepi32_epi8(high));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (kDigits - 1) * to.stride + k), _mm512_cvtepi32_epi8(number));
  }
  to.units[row] = unit, to.totals[row] = _mm512_reduce_add_epi32(total);
}

// Numbers that were rounded elsewhere.
template <>
inline void round_row<int8_t, 1>(const Rounding& task, int64_t row) {
  const int8_t* x = static_cast<const int8_t*>(task.x) + row * task.stride;
  std::memcpy(task.to.numbers + row * task.to.stride, x, task.inputs);
  task.to.units[row] = 1, task.to.totals[row] = 0;
}

template <typename T, int kDigits>
void round_rows(const void* problem, int64_t index) {
  const Rounding& task = *static_cast<const Rounding*>(problem);
  const Digits& to = task.to;
  int64_t end = std::min((index + 1) * kRowsAtOnce, task.rows), written = (task.inputs + 15) / 16 * 16;
  if constexpr (std::is_same_v<T, int8_t>) written = task.inputs;
  for (int64_t row = index * kRowsAtOnce; row < end; ++row) {
    round_row<T, kDigits>(task, row);
    for (int64_t digit = row * kDigits; digit < (row + 1) * kDigits; ++digit) {
      int8_t* numbers = to.numbers + digit * to.stride;
      std::memset(numbers + written, 0, to.stride - written);
      __m512i sums = _mm512_setzero_si512();
      for (int64_t k = 0; k < to.stride; k += 64)
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_load_si512(numbers + k));
      _mm512_store_si512(to.starts + digit * 16, _mm512_mullo_epi32(sums, _mm512_set1_epi32(-task.more)));
    }
  }
}

// Room for `rows` rows in the calling thread's memory.
inline Digits room_for(int64_t rows, int64_t digits, int64_t inputs) {
  Digits to;
  to.stride = (inputs + 63) / 64 * 64;
  if (to.stride % 1024 == 0) to.stride += 64;  // rows would share the sets of a cache
  int64_t numbers = rows * digits * to.stride, starts = rows * digits * 64;
  to.numbers = scratch<int8_t>(1, numbers + starts + 8 * rows);
  to.starts = reinterpret_cast<int32_t*>(to.numbers + numbers);
  to.units = reinterpret_cast<float*>(to.numbers + numbers + starts), to.totals = to.units + rows;
  return to;
}

#endif

}  // namespace quire
