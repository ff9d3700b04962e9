// The product of 8-bit integers, `[M, K] x [N, K]`, summed exactly in 32 bits, as a custom call of XLA on a CPU.
//
// AVX-512's dots multiply unsigned bytes with signed ones. Weights become unsigned as they are read, by 128 more, and
// what that adds to a row's results, 128 times the sum of its activations, is taken off in the end.
#include <algorithm>
#include <vector>

#include "decode.h"
#include "sums.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

#if defined(QUIRE_AVX512) && defined(__AVX512VNNI__)
#define QUIRE_VNNI 1
#endif

namespace quire {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kPanel = 64;  // outputs of a piece
constexpr int64_t kBytes = 64;  // of a vector

struct Problem {
  int64_t rows, inputs, outputs;
  const int8_t* x;
  const int8_t* weight;
  const int32_t* sums;  // of each row's activations
  int32_t* out;
};

#ifdef QUIRE_VNNI
inline __m512i bytes_at(const int8_t* from, int64_t left) {
  if (left >= kBytes) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi8((1ull << left) - 1, from);
}

inline __m512i low_pairs(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

// The sums of the lanes of each of four vectors.
inline __m128i lane_sums(const __m512i* sums) {
  __m512i ab = low_pairs(sums[0], sums[1]), cd = low_pairs(sums[2], sums[3]);
  __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Rows x outputs of the result. The last outputs of a matrix may be fewer: those that are not there are read as the
// last one that is, and dropped.
template <int kRows, int kOutputs>
void multiply_bytes(const Problem& p, int64_t row, int64_t output, int64_t real, bool fetch) {
  const __m512i high = _mm512_set1_epi8(-128);
  const int8_t* weights[kOutputs];
  for (int c = 0; c < kOutputs; ++c) weights[c] = p.weight + (output + std::min<int64_t>(c, real - 1)) * p.inputs;
  const int8_t* x = p.x + row * p.inputs;
  __m512i total[kRows][kOutputs] = {};
  auto step = [&](int64_t k, int64_t left) __attribute__((always_inline)) {
    __m512i w[kOutputs];
#pragma GCC unroll 8
    for (int c = 0; c < kOutputs; ++c) w[c] = _mm512_xor_si512(bytes_at(weights[c] + k, left), high);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      __m512i each = bytes_at(x + r * p.inputs + k, left);
      asm("" : QUIRE_REGISTER(each));
#pragma GCC unroll 8
      for (int c = 0; c < kOutputs; ++c) total[r][c] = _mm512_dpbusd_epi32(total[r][c], w[c], each);
    }
  };
  int64_t k = 0;
  for (; k + kBytes <= p.inputs; k += kBytes) {
    if (fetch)
      for (int c = 0; c < kOutputs; ++c) __builtin_prefetch(weights[c] + kOutputs * p.inputs + k);
    step(k, kBytes);
  }
  if (k < p.inputs) step(k, p.inputs - k);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    int32_t found[kOutputs];
    for (int c = 0; c < kOutputs; c += 4) {
      __m128i sums = _mm_sub_epi32(lane_sums(total[r] + c), _mm_set1_epi32(128 * p.sums[row + r]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(found + c), sums);
    }
    std::memcpy(p.out + (row + r) * p.outputs + output, found, real * sizeof(int32_t));
  }
}

void run_bytes(const void* problem, int64_t index) {
  const Problem& p = *static_cast<const Problem*>(problem);
  using Run = void (*)(const Problem&, int64_t, int64_t, int64_t, bool);
  // GCC spills the sums of five rows and more.
  static constexpr Run kTiles[] = {multiply_bytes<1, 8>, multiply_bytes<2, 4>, multiply_bytes<3, 4>,
                                   multiply_bytes<4, 4>};
  int64_t end = std::min((index + 1) * kPanel, p.outputs);
  // Eight outputs at a time, whose weights stay in the nearest cache for all rows.
  for (int64_t first = index * kPanel; first < end; first += 8) {
    for_tiles(p.rows, 4, [&](int64_t r, int64_t take) {
      int64_t width = take == 1 ? 8 : 4;
      for (int64_t n = first; n < std::min(first + 8, end); n += width)
        kTiles[take - 1](p, r, n, std::min(width, end - n), r == 0);
    });
  }
}
#endif

ffi::Error integer_product(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::S8> weight,
                           ffi::Result<ffi::Buffer<ffi::S32>> out) {
#ifdef QUIRE_VNNI
  Problem p;
  p.rows = x.dimensions()[0], p.inputs = x.dimensions()[1], p.outputs = weight.dimensions()[0];
  p.x = x.typed_data(), p.weight = weight.typed_data(), p.out = out->typed_data();
  std::vector<int32_t> sums(p.rows);
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t k = 0; k < p.inputs; ++k) sums[r] += p.x[r * p.inputs + k];
  p.sums = sums.data();
  run_all(pool, &p, run_bytes, (p.outputs + kPanel - 1) / kPanel);
  return ffi::Error::Success();
#else
  return ffi::Error::InvalidArgument("this processor has no dots of 8-bit integers");
#endif
}

}  // namespace
}  // namespace quire

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_integer_product, quire::integer_product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>());

extern "C" int quire_dots_of_integers() {
#ifdef QUIRE_VNNI
  return 1;
#else
  return 0;
#endif
}
