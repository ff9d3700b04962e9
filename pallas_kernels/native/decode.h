// Packed weights to rows of plain numbers: what each format means, and how to read it fast.
//
// A row is one output's weights along the inputs. `decode` writes `count` of them, a multiple of 32 whenever the
// weights have groups, as bfloat16 (`Half`) or float. Values are `(number - zero) * scale + offset`: exact without a scale,
// which also means without an offset, and rounded once to the element's type with one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#define QUIRE_AVX512 1
#elif defined(__AVX2__) && defined(__F16C__)
#define QUIRE_AVX2 1
#endif
#if defined(QUIRE_AVX512) && defined(__AVX512VBMI__)
#define QUIRE_VBMI 1
#endif
#if defined(QUIRE_AVX512) || defined(QUIRE_AVX2)
#include <immintrin.h>
#endif

namespace quire {

// What numbers become: `(number - zero) * scale + offset`, or `number - zero` if not `scaled`.
struct Rule {
  bool scaled;
  float scale = 1, zero = 0, offset = 0;
};

enum class Format { kInt4, kInt8, kFp8 };  // two's complement, the lower four bits first; e4m3fn

// Bytes to fetch ahead of those that are decoded: without, a core reads half of what it can from memory.
constexpr int64_t kAhead = 8192;

using Half = uint16_t;  // a bfloat16's bits

inline Half half_of(float value) {  // to nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Half>(bits >> 16 | 0x40);
  return static_cast<Half>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float float_of(Half half) {
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void store(float* out, float value) { *out = value; }
inline void store(Half* out, float value) { *out = half_of(value); }

inline Half fp8_to_half(uint8_t number) {
  uint32_t magnitude = number & 0x7f, sign = (number & 0x80u) << 8;
  if (magnitude == 0x7f) return static_cast<Half>(sign | 0x7fc0);
  if (magnitude < 8) return static_cast<Half>(sign | half_of(static_cast<float>(magnitude) * 0x1p-9f));
  return static_cast<Half>(sign | ((magnitude << 4) + (120u << 7)));
}

// The 128 magnitudes of e4m3fn.
struct Fp8Table {
  alignas(64) Half halves[128];
  alignas(64) uint8_t low[128], high[128];  // their bytes
  Fp8Table() {
    for (int i = 0; i < 128; ++i) {
      halves[i] = fp8_to_half(static_cast<uint8_t>(i));
      low[i] = static_cast<uint8_t>(halves[i]), high[i] = static_cast<uint8_t>(halves[i] >> 8);
    }
  }
};
inline const Fp8Table kFp8;

template <Format F>
inline float number_at(const uint8_t* row, int64_t k) {
  if constexpr (F == Format::kInt8) return static_cast<float>(static_cast<int8_t>(row[k]));
  if constexpr (F == Format::kFp8) {
    float magnitude = float_of(kFp8.halves[row[k] & 0x7f]);
    return row[k] & 0x80 ? -magnitude : magnitude;
  }
  int nibble = row[k / 2] >> (k % 2 * 4) & 15;
  return static_cast<float>((nibble ^ 8) - 8);
}

template <Format F>
constexpr int kBits = F == Format::kInt4 ? 4 : 8;

#ifdef QUIRE_AVX512

inline __m512i join(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

inline __m512 floats_of(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// 32 numbers of a row per call of `halves`, 16 per call of `floats`; set up once per group.
template <Format F>
struct Reader;

template <>
struct Reader<Format::kInt4> {  // a table of the 16 values there can be
  __m512 values;
  __m512i halves_table;

  explicit Reader(const Rule& rule) {
    values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    values = _mm512_sub_ps(values, _mm512_set1_ps(rule.zero));
    if (rule.scaled)
      values = _mm512_add_ps(_mm512_mul_ps(values, _mm512_set1_ps(rule.scale)), _mm512_set1_ps(rule.offset));
    halves_table = join(values, values);
  }
  __m512i halves(const uint8_t* row) const {  // an index's upper bits count for nothing
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
#ifdef QUIRE_VBMI
    __m512i nibbles = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2424202004040000), bytes);
#else
    __m512i nibbles = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
#endif
    return _mm512_permutexvar_epi16(nibbles, halves_table);
  }
  __m512 floats(const uint8_t* row) const {
    __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row)));
    return _mm512_permutexvar_ps(_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28)), values);
  }
};

template <>
struct Reader<Format::kInt8> {
  __m512 scale, zero, offset;
  bool scaled;

  explicit Reader(const Rule& rule)
      : scale(_mm512_set1_ps(rule.scale)),
        zero(_mm512_set1_ps(rule.zero)),
        offset(_mm512_set1_ps(rule.offset)),
        scaled(rule.scaled) {}
  __m512 floats(const uint8_t* row) const {
    __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
    __m512 value = _mm512_sub_ps(_mm512_cvtepi32_ps(wide), zero);
    return scaled ? _mm512_add_ps(_mm512_mul_ps(value, scale), offset) : value;
  }
  __m512i halves(const uint8_t* row) const { return join(floats(row), floats(row + 16)); }
};

template <>
struct Reader<Format::kFp8> {
  __m512 scale, offset;
  bool scaled;
  __m512i table[4];

  explicit Reader(const Rule& rule)
      : scale(_mm512_set1_ps(rule.scale)), offset(_mm512_set1_ps(rule.offset)), scaled(rule.scaled) {
    for (int i = 0; i < 4; ++i) table[i] = _mm512_load_si512(kFp8.halves + 32 * i);
  }
  __m512 value_of(__m512 number) const { return _mm512_add_ps(_mm512_mul_ps(number, scale), offset); }
  __m512i plain(const uint8_t* row) const {
    __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
    __mmask32 upper = _mm512_test_epi16_mask(bytes, _mm512_set1_epi16(0x40));
    __m512i magnitude = _mm512_permutex2var_epi16(table[0], bytes, table[1]);
    magnitude = _mm512_mask_blend_epi16(upper, magnitude, _mm512_permutex2var_epi16(table[2], bytes, table[3]));
    // magnitude | (sign & 0x8000)
    return _mm512_ternarylogic_epi32(magnitude, _mm512_slli_epi16(bytes, 8), _mm512_set1_epi16(-0x8000), 0xf8);
  }
  __m512i halves(const uint8_t* row) const {
    __m512i value = plain(row);
    if (!scaled) return value;
    __m512 low = floats_of(_mm512_castsi512_si256(value)), high = floats_of(_mm512_extracti64x4_epi64(value, 1));
    return join(value_of(low), value_of(high));
  }
};

inline void read32(const Reader<Format::kFp8>& reader, const uint8_t* row, float* out) {
  __m512i value = reader.plain(row);
  __m512 low = floats_of(_mm512_castsi512_si256(value)), high = floats_of(_mm512_extracti64x4_epi64(value, 1));
  _mm512_storeu_ps(out, reader.scaled ? reader.value_of(low) : low);
  _mm512_storeu_ps(out + 16, reader.scaled ? reader.value_of(high) : high);
}

template <Format F>
inline void read32(const Reader<F>& reader, const uint8_t* row, float* out) {
  _mm512_storeu_ps(out, reader.floats(row));
  _mm512_storeu_ps(out + 16, reader.floats(row + 16 * kBits<F> / 8));
}

template <Format F>
inline void read32(const Reader<F>& reader, const uint8_t* row, Half* out) {
  _mm512_storeu_si512(out, reader.halves(row));
}

#elif defined(QUIRE_AVX2)

// Eight numbers of a row.
template <Format F>
inline __m256 numbers(const uint8_t* row);

template <>
inline __m256 numbers<Format::kInt8>(const uint8_t* row) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row))));
}

template <>
inline __m256 numbers<Format::kInt4>(const uint8_t* row) {  // each to the top of 32 bits of its own, and down again
  int32_t eight;
  std::memcpy(&eight, row, 4);
  __m256i tops = _mm256_sllv_epi32(_mm256_set1_epi32(eight), _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0));
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(tops, 28));
}

template <>
inline __m256 numbers<Format::kFp8>(const uint8_t* row) {  // as float16: sign, three bits of exponent more, mantissa
  __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row)));
  __m128i halves = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<int16_t>(0xbfff)));
  __m256 value = _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256));
  __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), value);
  return _mm256_or_ps(value, _mm256_cmp_ps(magnitude, _mm256_set1_ps(480), _CMP_EQ_OQ));  // which is e4m3fn's NaN
}

template <Format F>
struct Reader {
  __m256 scale, zero, offset;
  bool scaled;

  explicit Reader(const Rule& rule)
      : scale(_mm256_set1_ps(rule.scale)),
        zero(_mm256_set1_ps(rule.zero)),
        offset(_mm256_set1_ps(rule.offset)),
        scaled(rule.scaled) {}
};

template <Format F>
inline void read32(const Reader<F>& reader, const uint8_t* row, float* out) {
  for (int i = 0; i < 32; i += 8) {
    __m256 value = _mm256_sub_ps(numbers<F>(row + i * kBits<F> / 8), reader.zero);
    if (reader.scaled) value = _mm256_add_ps(_mm256_mul_ps(value, reader.scale), reader.offset);
    _mm256_storeu_ps(out + i, value);
  }
}

#endif

#ifdef QUIRE_AVX512

// Whole groups of a multiple of 32 weights. `scales`, `zeros`, `offsets`: of the first group; the next one's are
// `stride` further on. A function of its own: in a large one GCC keeps the loop's counters in vectors.
template <Format F, bool kZeros, bool kOffsets>
__attribute__((noinline)) void decode_groups(const uint8_t* bytes, int64_t group, int64_t groups, const float* scales,
                                             const float* zeros, const float* offsets, int64_t stride, Half* out) {
  for (int64_t g = 0, at = 0; g < groups; ++g, at += stride) {
    Reader<F> reader(Rule{true, scales[at], kZeros ? zeros[at] : 0, kOffsets ? offsets[at] : 0});
    for (int64_t k = 0; k < group; k += 32, bytes += 32 * kBits<F> / 8, out += 32) read32(reader, bytes, out);
  }
}

#ifdef QUIRE_VBMI
// 64 numbers, byte by byte: a table for the upper ones and one for the lower ones, interleaved.
inline void read_fp8(const uint8_t* row, Half* out) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // interleaving takes eight bytes of each sixteen
  __m512i bytes = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(row));
  __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kFp8.low), bytes, _mm512_load_si512(kFp8.low + 64));
  __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(kFp8.high), bytes, _mm512_load_si512(kFp8.high + 64));
  high = _mm512_ternarylogic_epi32(high, bytes, _mm512_set1_epi8(-128), 0xf8);  // high | (bytes & sign)
  _mm512_storeu_si512(out, _mm512_unpacklo_epi8(low, high));
  _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi8(low, high));
}
#endif

#endif

// `count` numbers from `first` on of the row at `row`. Without AVX2 the compiler makes what it can of the loop.
template <Format F, typename Element>
__attribute__((noinline)) void decode(const uint8_t* row, int64_t first, int64_t count, const Rule& rule,
                                      Element* out) {
  int64_t k = 0;
  [[maybe_unused]] const uint8_t* bytes = row + first * kBits<F> / 8;
#ifdef QUIRE_VBMI
  if constexpr (F == Format::kFp8 && sizeof(Element) == 2)
    if (!rule.scaled)
      for (; k + 64 <= count; k += 64) read_fp8(bytes + k, out + k);
#endif
#if defined(QUIRE_AVX512) || defined(QUIRE_AVX2)
  Reader<F> reader(rule);
  for (; k + 32 <= count; k += 32) read32(reader, bytes + k * kBits<F> / 8, out + k);
#endif
  for (; k < count; ++k) {
    float value = number_at<F>(row, first + k) - rule.zero;
    store(out + k, rule.scaled ? value * rule.scale + rule.offset : value);
  }
}

}  // namespace quire
