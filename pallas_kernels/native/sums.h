// Sums of products along the inputs, in the lanes of vectors, for tiles of rows and outputs that fill the registers.
//
// Both operands lie with their inputs side by side, so that neither is ever transposed, and the order of a result's
// additions is the same for every number of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "decode.h"

namespace quire {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float LanesAnywhere __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Lanes lanes_at(const float* from) { return *reinterpret_cast<const LanesAnywhere*>(from); }
inline void put(float* to, const Lanes& lanes) { *reinterpret_cast<LanesAnywhere*>(to) = lanes; }

constexpr int64_t kPad = 32;  // what rows of activations are padded to; also keeps rows out of one cache set
constexpr int kTile = 4;      // outputs whose sums are added up together

// One vector of activations or weights. `keep` has the compiler hold it in a register: it would rather read a row of
// activations again for each output, and the processor reads no more than two vectors in the time of two products.
#if defined(__x86_64__)
#define QUIRE_REGISTER "+v"
#else
#define QUIRE_REGISTER "+w"
#endif

struct Floats {
  Lanes lanes;
  explicit Floats(const float* from) { std::memcpy(&lanes, from, sizeof lanes); }
  void keep() { asm("" : QUIRE_REGISTER(lanes)); }
};

inline void add_products(Lanes& sum, const Floats& x, const Floats& w) { sum += x.lanes * w.lanes; }

#ifdef QUIRE_AVX512
struct Halves {
  __m512i lanes;
  explicit Halves(const Half* from) : lanes(_mm512_loadu_si512(from)) {}
  void keep() { asm("" : QUIRE_REGISTER(lanes)); }
};

inline void add_products(Lanes& sum, const Halves& x, const Halves& w) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)x.lanes, (__m512bh)w.lanes);
}

inline void add_lanes(const Lanes* sums, float* out, bool first) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]), _mm512_unpackhi_ps(sums[2], sums[3]));
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(out, first ? four : _mm_add_ps(_mm_loadu_ps(out), four));
}
#else
inline void add_lanes(const Lanes* sums, float* out, bool first) {
  for (int c = 0; c < kTile; ++c) {
    float lanes[kLanes];
    std::memcpy(lanes, sums + c, sizeof lanes);
    for (int width = kLanes / 2; width; width /= 2)
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    out[c] = first ? lanes[0] : out[c] + lanes[0];
  }
}
#endif

// Inputs whose products are summed in one go: six rows of activations and four of weights fit in an L1 cache.
template <typename Element>
constexpr int64_t kChunk = 4096 / sizeof(Element);

#ifdef QUIRE_AVX512
template <typename Element>
using Vector = std::conditional_t<sizeof(Element) == 2, Halves, Floats>;
#else
template <typename Element>
using Vector = Floats;
#endif

template <typename Element>
constexpr int kStep = sizeof(Element) == 2 ? 2 * kLanes : kLanes;

// What is fetched ahead while tiles are multiplied, spread over their steps: `each` lines of 64 bytes at a step, up to
// `end`.
struct Ahead {
  const uint8_t *at, *end;
  int64_t each;

  // `bytes` from `from` on, in `steps` steps.
  Ahead(const void* from, int64_t bytes, int64_t steps)
      : at(static_cast<const uint8_t*>(from)),
        end(at + bytes),
        each((bytes / 64 + steps - 1) / std::max<int64_t>(steps, 1)) {}

  template <int kLocality = 3>  // 3: into the nearest cache, 2: into the next one
  void step() {
    const uint8_t* from = at;
    for (int64_t i = 0; i < each; ++i, from += 64) __builtin_prefetch(from, 0, kLocality);
    at = from;
  }
  void between_tiles() {
    if (at >= end) each = 0;
  }
};

// Rows x outputs of the result: `sums[r, c]` = or += the products of `count` inputs. `kFetch`: `ahead` is fetched.
template <typename Element, int kRows, int kOutputs, bool kFetch>
void multiply(const Element* x, int64_t x_stride, const Element* w, int64_t w_stride, int64_t count, float* sums,
              int64_t sums_stride, bool first, Ahead& ahead) {
  Lanes total[kRows][kOutputs] = {};
  for (int64_t k = 0; k < count; k += kStep<Element>) {
    if constexpr (kFetch) ahead.step<2>();
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Vector<Element> row(x + r * x_stride + k);
      row.keep();
#pragma GCC unroll 8
      for (int c = 0; c < kOutputs; ++c) add_products(total[r][c], row, Vector<Element>(w + c * w_stride + k));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < kOutputs; c += kTile) add_lanes(total[r] + c, sums + r * sums_stride + c, first);
}

template <typename Element>
struct Tile {
  void (*run)(const Element*, int64_t, const Element*, int64_t, int64_t, float*, int64_t, bool, Ahead&);
  int64_t outputs;
};

// Sums fill the registers: 32 of AVX-512, and of ARM; 16 elsewhere.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kMostRows = 6;

template <typename Element, bool kFetch = false>
Tile<Element> tile_of(int64_t rows) {
  static constexpr Tile<Element> kTiles[] = {
      {multiply<Element, 1, 8, kFetch>, 8}, {multiply<Element, 2, 8, kFetch>, 8}, {multiply<Element, 3, 8, kFetch>, 8},
      {multiply<Element, 4, 4, kFetch>, 4}, {multiply<Element, 5, 4, kFetch>, 4}, {multiply<Element, 6, 4, kFetch>, 4},
  };
  return kTiles[rows - 1];
}
#else
constexpr int64_t kMostRows = 3;

template <typename Element, bool kFetch = false>
Tile<Element> tile_of(int64_t rows) {
  static constexpr Tile<Element> kTiles[] = {
      {multiply<Element, 1, 8, kFetch>, 8}, {multiply<Element, 2, 4, kFetch>, 4}, {multiply<Element, 3, 4, kFetch>, 4}};
  return kTiles[rows - 1];
}
#endif

// Calls `run` with the first row and the number of rows of each tile. One or two rows more than a tile has are taken in
// two equal parts: 4 and 3 rather than 6 and 1.
template <typename Run>
void for_tiles(int64_t num_rows, int64_t most, Run run) {
  for (int64_t r = 0; r < num_rows;) {
    int64_t left = num_rows - r, take = left <= most ? left : left < 2 * most ? (left + 1) / 2 : most;
    run(r, take);
    r += take;
  }
}

}  // namespace quire
