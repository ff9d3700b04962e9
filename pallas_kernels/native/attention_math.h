// What attention computes of one block of keys: scores, weights, weighted values; and how parts of a softmax are joined.
//
// Each result is one chain of additions in the order of the dims or keys, whatever rows share a block. Keys that a row
// does not see add zeros to it, which changes nothing. So a row's bits depend on its own keys alone.
#pragma once

#include <cstdint>

#include "attention_read.h"

namespace quire {

constexpr int64_t kChunkKeys = 256;     // keys, from a multiple of it on, whose softmax is computed in one go
constexpr float kMasked = -1e30f;   // finite: the difference of two must be a number

#if defined(__AVX512F__)
inline Lanes spread(const float* word) { return _mm512_set1_ps(*word); }
#else
inline Lanes spread(const float* word) { return *word - Lanes{}; }
#endif

template <typename Element>
inline void add_step(Lanes& sum, const Lanes& a, const Lanes& b) {
#ifdef QUIRE_AVX512
  if constexpr (sizeof(Element) == 2) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    return;
  }
#endif
  sum += a * b;
}

// Rows x vectors of the result, `= or += steps of left x right`. `stride`s in words: of rows of the left operand and of
// the result; from step to step and from vector to vector of the right one.
template <typename Element, int kRows, int kVectors>
void product(const float* left, int64_t left_stride, const float* right, int64_t step_stride, int64_t vector_stride,
             int64_t steps, float* out, int64_t out_stride, bool first) {
  Lanes sums[kRows][kVectors] = {};
  if (!first) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = lanes_at(out + r * out_stride + v * kLanes);
  }
  for (int64_t s = 0; s < steps; ++s) {
    Lanes vectors[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) vectors[v] = lanes_at(right + s * step_stride + v * vector_stride);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Lanes word = spread(left + r * left_stride + s);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) add_step<Element>(sums[r][v], word, vectors[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) put(out + r * out_stride + v * kLanes, sums[r][v]);
}

// The same for any number of vectors, a multiple of two.
template <typename Element, int kRows>
void product_of(const float* left, int64_t left_stride, const float* right, int64_t step_stride, int64_t vector_stride,
                int64_t steps, int64_t vectors, float* out, int64_t out_stride, bool first) {
  int64_t v = 0;
  for (; v + 4 <= vectors; v += 4)
    product<Element, kRows, 4>(left, left_stride, right + v * vector_stride, step_stride, vector_stride, steps,
                               out + v * kLanes, out_stride, first);
  if (v < vectors)
    product<Element, kRows, 2>(left, left_stride, right + v * vector_stride, step_stride, vector_stride, steps,
                               out + v * kLanes, out_stride, first);
}

template <typename Element>
using Product = void (*)(const float*, int64_t, const float*, int64_t, int64_t, int64_t, int64_t, float*, int64_t, bool);

// By the number of rows, at most `kMostRows`: their sums fill the registers.
template <typename Element>
Product<Element> product_for(int64_t rows) {
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr Product<Element> kProducts[] = {product_of<Element, 1>, product_of<Element, 2>,
                                                   product_of<Element, 3>, product_of<Element, 4>,
                                                   product_of<Element, 5>, product_of<Element, 6>};
#else
  static constexpr Product<Element> kProducts[] = {product_of<Element, 1>, product_of<Element, 2>,
                                                   product_of<Element, 3>};
#endif
  return kProducts[rows - 1];
}

// ---- Functions of vectors

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Lanes all(float value) { return value - Lanes{}; }
inline Lanes larger(const Lanes& a, const Lanes& b) { return a > b ? a : b; }

// 2 ** x for x <= 0, exactly 1 for 0, to 1e-7. The polynomial is (2 ** r - 1) / r at the nodes of Chebyshev.
inline Lanes exp2_of(Lanes x) {
  constexpr float kC[] = {0.69314718802934f, 0.24022650922343f, 0.05550357104254f,
                          0.00961805666990f, 0.00133908673514f, 0.00015461447459f};
#if defined(__AVX512F__)
  Lanes whole = _mm512_roundscale_ps(x, 8);
#else
  Lanes clipped = larger(x, all(-126.0f)), shifted = clipped + 12582912.0f, whole = shifted - 12582912.0f;
  Lanes small = x;
  x = clipped;
#endif
  Lanes r = x - whole;
  Lanes value = all(kC[5]);
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) value = value * r + kC[i];
  value = value * r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(value, whole);
#else
  value = (Lanes)((Ints)value + ((Ints)shifted << 23));
  return small < -126.0f ? Lanes{} : value;
#endif
}

// tanh(x): a polynomial where 1 - 2 ** … would lose what is left.
inline Lanes tanh_of(const Lanes& x) {
  Lanes size = x < 0.0f ? -x : x, square = x * x;
  Lanes t = exp2_of(size * -2.8853900817779268f), far = (1.0f - t) / (1.0f + t);
  Lanes near = all(-5.70498872745e-3f);
  near = near * square + 2.06390887954e-2f;
  near = near * square + -5.37397155531e-2f;
  near = near * square + 1.33314422036e-1f;
  near = near * square + -3.33332819422e-1f;
  near = near * square * x + x;
  return size < 0.625f ? near : x < 0.0f ? -far : far;
}

inline float sum_of(const Lanes& lanes) {
  float values[kLanes];
  std::memcpy(values, &lanes, sizeof values);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  return values[0];
}

inline float largest_of(const Lanes& lanes) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(lanes);
#else
  float values[kLanes];
  std::memcpy(values, &lanes, sizeof values);
  for (int i = 1; i < kLanes; ++i) values[0] = values[i] > values[0] ? values[i] : values[0];
  return values[0];
#endif
}

// ---- The softmax

constexpr float kLog2E = 1.4426950408889634f;

// From dots to scores, in units of ln 2.
struct ScoreRule {
  float scale;             // of a dot
  float cap = 0;           // 0 = none
  Lanes apply(Lanes score) const {
    if (cap == 0) return score * (scale * kLog2E);
    return tanh_of(score * (scale / cap)) * (cap * kLog2E);
  }
};

inline void put_weights(float* out, const Lanes& weights) { put(out, weights); }
#ifdef QUIRE_AVX512
inline void put_weights(Half* out, const Lanes& weights) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(weights));
}
#endif

// What a row has seen of a softmax: its largest score, and the sum of 2 ** (score - largest).
struct Seen {
  float top, sum;
};

// A row's dots with the keys of a chunk become their weights, in the same memory: those of `[first, last)` are the keys
// that it sees, those of `[from, until)` are written. The scales are of keys and of values, or null.
template <typename Element>
__attribute__((noinline)) Seen weigh(float* row, int64_t first, int64_t last, int64_t from, int64_t until,
                                     const float* key_scales, const float* value_scales, const ScoreRule& rule) {
  Element* weights = reinterpret_cast<Element*>(row);
  int64_t start = first / kLanes * kLanes;
  int32_t numbers[kLanes];
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  Ints lane;
  std::memcpy(&lane, numbers, sizeof lane);
  Lanes top = all(kMasked), sum = {};
  for (int64_t k = start; k < last; k += kLanes) {
    Lanes score = lanes_at(row + k);
    if (key_scales) score *= lanes_at(key_scales + k);
    score = rule.apply(score);
    if (k < first || k + kLanes > last) {
      Ints key = lane + static_cast<int32_t>(k);
      score = (key >= static_cast<int32_t>(first)) & (key < static_cast<int32_t>(last)) ? score : all(kMasked);
    }
    put(row + k, score);
    top = larger(score, top);
  }
  float largest = first < last ? largest_of(top) : kMasked;
  for (int64_t k = from; k < start && k < until; k += kLanes) put_weights(weights + k, Lanes{});
  int64_t k = start;
  for (; k < last; k += kLanes) {
    Lanes weight = exp2_of(lanes_at(row + k) - largest);
    if (k < first || k + kLanes > last) {
      Ints key = lane + static_cast<int32_t>(k);
      weight = (key >= static_cast<int32_t>(first)) & (key < static_cast<int32_t>(last)) ? weight : Lanes{};
    }
    sum += weight;
    if (value_scales) weight *= lanes_at(value_scales + k);
    put_weights(weights + k, weight);
  }
  for (; k < until; k += kLanes) put_weights(weights + k, Lanes{});
  return {largest, sum_of(sum)};
}

// Joins what a row saw in one chunk to what it saw before.
__attribute__((noinline)) inline void join_chunk(Seen& all_seen, float* values, const Seen& seen, const float* part,
                                                 int64_t width) {
  if (seen.top <= kMasked) return;
  float pair[kLanes] = {all_seen.top - std::max(all_seen.top, seen.top), seen.top - std::max(all_seen.top, seen.top)};
  Lanes factors = exp2_of(lanes_at(pair));
  std::memcpy(pair, &factors, sizeof pair);
  Lanes old = all(pair[0]), fresh = all(pair[1]);
  all_seen = {std::max(all_seen.top, seen.top), all_seen.sum * pair[0] + seen.sum * pair[1]};
  for (int64_t d = 0; d < width; d += kLanes) put(values + d, lanes_at(values + d) * old + lanes_at(part + d) * fresh);
}

}  // namespace quire
