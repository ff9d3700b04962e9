// Tiles of products of integers, by AVX-512's dots of four unsigned bytes with four signed ones.
//
// Weights become unsigned as they are read, by 128 or 8 more than they are. What that adds to a sum is known
// beforehand, and sums start with its negative. Activations' digits are rows like any others ("numbers").
//
// Few numbers: weights are multiplied where they lie, sums lie along the inputs, and the lanes are added up in the end.
// That costs a third of the dots of 576 inputs; so for more, weights are turned once, four inputs of 16 outputs to a
// vector, and sums lie along the outputs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "decode.h"
#include "digits.h"
#include "sums.h"

namespace quire {

#ifdef QUIRE_VNNI

template <Format F>
constexpr int kMore = F == Format::kInt4 ? 8 : 128;

// 64 weights as unsigned bytes, `kMore<F>` more than they are.
template <Format F>
inline __m512i bytes_at(const uint8_t* from) {
  if constexpr (F == Format::kInt8) {
    return _mm512_xor_si512(_mm512_loadu_si512(from), _mm512_set1_epi8(-128));
  } else {
    __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    __m512i both = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
    return _mm512_ternarylogic_epi32(both, _mm512_set1_epi8(15), _mm512_set1_epi8(8), 0x6a);  // (both & 15) ^ 8
  }
}

// The same, of which `count` are there; bytes beyond them are of no account.
template <Format F>
inline __m512i some_bytes_at(const uint8_t* from, int64_t count) {
  if (count >= 64) return bytes_at<F>(from);
  uint8_t bytes[64] = {};
  std::memcpy(bytes, from, count * kBits<F> / 8);
  return bytes_at<F>(bytes);
}

// 16 sums as floats: of one digit, or of two.
template <int kDigits>
inline __m512 joined(const int32_t* high, const int32_t* low) {
  __m512 sums = _mm512_cvtepi32_ps(_mm512_load_si512(low));
  if (kDigits == 1) return sums;
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(high)), _mm512_set1_ps(256), sums);
}

// ---- Sums along the inputs

struct Rows {
  const uint8_t* at;
  int64_t stride;
};

inline __m512i add_pairs(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

// The sums of the lanes of each of four vectors.
inline __m128i lane_sums(const __m512i* sums) {
  __m512i ab = add_pairs(sums[0], sums[1]), cd = add_pairs(sums[2], sums[3]);
  __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Numbers x outputs of the lanes' sums. A function of its own: beside other code GCC moves sums between registers and
// memory in each step.
template <Format F, int kNumbers, int kOutputs>
__attribute__((noinline)) void add_lanes_up(const int8_t* x, int64_t x_stride, Rows w, int64_t steps,
                                            const int32_t* starts, __m512i* out, Ahead& ahead) {
  __m512i total[kNumbers][kOutputs];
#pragma GCC unroll 8
  for (int r = 0; r < kNumbers; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kOutputs; ++c) total[r][c] = _mm512_load_si512(starts + r * 16);
  for (int64_t k = 0; k < steps * 64; k += 64) {
    ahead.step();
    __m512i weights[kOutputs];
#pragma GCC unroll 8
    for (int c = 0; c < kOutputs; ++c) weights[c] = bytes_at<F>(w.at + c * w.stride + k * kBits<F> / 8);
#pragma GCC unroll 8
    for (int r = 0; r < kNumbers; ++r) {
      __m512i each = _mm512_load_si512(x + r * x_stride + k);
      asm("" : QUIRE_REGISTER(each));
#pragma GCC unroll 8
      for (int c = 0; c < kOutputs; ++c) total[r][c] = _mm512_dpbusd_epi32(total[r][c], weights[c], each);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kNumbers; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kOutputs; ++c) _mm512_store_si512(out + r * kOutputs + c, total[r][c]);
}

// Numbers x outputs of the sums, 16 of which have room for each number.
template <Format F, int kNumbers, int kOutputs>
void multiply_lanes(const int8_t* x, int64_t x_stride, Rows w, int64_t steps, const int32_t* starts, int32_t* sums,
                    Ahead& ahead) {
  __m512i lanes[kNumbers * kOutputs];
  add_lanes_up<F, kNumbers, kOutputs>(x, x_stride, w, steps, starts, lanes, ahead);
#pragma GCC unroll 8
  for (int r = 0; r < kNumbers; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < kOutputs; c += 4)
      _mm_store_si128(reinterpret_cast<__m128i*>(sums + r * 16 + c), lane_sums(lanes + r * kOutputs + c));
}

template <Format F>
struct LaneTile {
  using Run = void (*)(const int8_t*, int64_t, Rows, int64_t, const int32_t*, int32_t*, Ahead&);
  static constexpr int64_t kMost = 6;

  static int64_t outputs(int64_t numbers) { return numbers <= 2 ? 8 : 4; }
  static Run run(int64_t numbers) {
    static constexpr Run kRuns[] = {multiply_lanes<F, 1, 8>, multiply_lanes<F, 2, 8>, multiply_lanes<F, 3, 4>,
                                    multiply_lanes<F, 4, 4>, multiply_lanes<F, 5, 4>, multiply_lanes<F, 6, 4>};
    return kRuns[numbers - 1];
  }
};

// ---- Sums along the outputs

constexpr int64_t kWidth = 64;  // outputs of a turned panel
constexpr int64_t kColumnTile = 6;

// 16 x 16 numbers of 32 bits, columns for rows.
inline void transpose(__m512i* v) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {
    __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]), b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {  // t[4 r + i]: of rows 4 r to 4 r + 3, columns i, 4 + i, 8 + i, 12 + i
    __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    v[i] = _mm512_shuffle_i32x4(a, c, 0x88), v[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), v[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// Inputs `from` to `from + count` of a panel's rows: [inputs / 4][kWidth][4]. Rows that are not there are anything.
template <Format F>
void turn(const uint8_t* rows, int64_t stride, int64_t num_rows, int64_t from, int64_t count, uint8_t* out) {
  for (int64_t n = 0; n < num_rows; n += 16) {
    for (int64_t k = 0; k < count; k += 64) {
      __m512i v[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        const uint8_t* at = rows + std::min(n + i, num_rows - 1) * stride + (from + k) * kBits<F> / 8;
        __builtin_prefetch(at + 16 * stride);
        v[i] = some_bytes_at<F>(at, count - k);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(out + (k / 4 + i) * kWidth * 4 + n * 4, v[i]);
    }
  }
}

// Adds the products of numbers with a turned panel to their sums, [numbers, kWidth].
template <int kNumbers>
void multiply_columns(const int8_t* x, int64_t x_stride, const uint8_t* w, int64_t steps, int32_t* sums, Ahead& ahead) {
  __m512i total[kNumbers][4];
#pragma GCC unroll 8
  for (int r = 0; r < kNumbers; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) total[r][c] = _mm512_load_si512(sums + r * kWidth + c * 16);
  for (int64_t k = 0; k < steps; ++k) {
    ahead.step<2>();
    __m512i weights[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) weights[c] = _mm512_load_si512(w + (k * 4 + c) * 64);
#pragma GCC unroll 8
    for (int r = 0; r < kNumbers; ++r) {
      int32_t four;
      std::memcpy(&four, x + r * x_stride + k * 4, 4);
      __m512i each = _mm512_set1_epi32(four);
      asm("" : QUIRE_REGISTER(each));
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) total[r][c] = _mm512_dpbusd_epi32(total[r][c], weights[c], each);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kNumbers; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) _mm512_store_si512(sums + r * kWidth + c * 16, total[r][c]);
}

inline auto column_tile(int64_t numbers) {
  using Run = void (*)(const int8_t*, int64_t, const uint8_t*, int64_t, int32_t*, Ahead&);
  static constexpr Run kRuns[] = {multiply_columns<1>, multiply_columns<2>, multiply_columns<3>,
                                  multiply_columns<4>, multiply_columns<5>, multiply_columns<6>};
  return kRuns[numbers - 1];
}

#endif

}  // namespace quire
