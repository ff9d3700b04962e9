// The product of integers, `[M, K] x [N, K]` on both sides, as a custom call of XLA on a CPU: weights of 8 or 4 bits with
// one scale per output meet activations in fixed point, of one digit of 8 bits or of two. Nothing is converted to floats
// but sums, and weights are multiplied as they were stored.
//
// AVX-512's dots multiply unsigned bytes with signed ones. Weights become unsigned as they are read, by 128 or 8 more.
// What that adds to a lane's sum is known beforehand, and sums start with its negative.
#include <algorithm>

#include "decode.h"
#include "digits.h"
#include "sums.h"
#include "threads.h"
#include "widen.h"
#include "xla/ffi/api/ffi.h"

namespace quire {
namespace {

namespace ffi = xla::ffi;

#ifdef QUIRE_VNNI

constexpr int64_t kPanel = 32;               // outputs of a piece
constexpr int64_t kNearBytes = 24 * 1024;    // of weights that stay in the nearest cache for all rows
constexpr int64_t kFewRows = 8;              // up to which weights are used so seldom that they may come and go
constexpr int64_t kMostInputs = 1 << 16;     // of which sums of any weights and activations fit in 32 bits
constexpr int64_t kWorthSharing = 1 << 16;   // activations to round, for more than one thread
constexpr int64_t kBlockBytes = 256 * 1024;  // of activations that share weights in a cache

struct Problem {
  int64_t rows, inputs, outputs;
  Digits x;
  const uint8_t* stored;
  ffi::DataType stored_type;
  const void* scales;  // [outputs], or null for 1
  ffi::DataType scale_type;
  const int8_t* zeros;  // [outputs], or null
  void* out;
  ffi::DataType out_type;
  int64_t num_panels, block;  // block: rows
};

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

inline __m512i add_pairs(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

// The sums of the lanes of each of four vectors.
inline __m128 lane_sums(const __m512i* sums) {
  __m512i ab = add_pairs(sums[0], sums[1]), cd = add_pairs(sums[2], sums[3]);
  __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_cvtepi32_ps(_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

// The same of two digits, the higher one first.
inline __m128 lane_sums(const __m512i* high, const __m512i* low) {
  Lanes sums[4];
  for (int c = 0; c < 4; ++c)
    sums[c] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[c], 8), low[c]));
  alignas(16) float found[4];
  add_lanes(sums, found, true);
  return _mm_load_ps(found);
}

// Eight outputs' weights, rows side by side; and what their sums are multiplied with, and what is taken off.
struct Weights {
  const uint8_t* rows;
  int64_t stride;
  const float *scales, *zeros;

  Weights from(int64_t c) const { return {rows + c * stride, stride, scales + c, zeros + c}; }
};

inline void put_results(const Problem& p, int64_t row, int64_t output, int64_t count, __m128 sums, const Weights& of) {
  if (p.zeros) sums = _mm_sub_ps(sums, _mm_mul_ps(_mm_loadu_ps(of.zeros), _mm_set1_ps(p.x.totals[row])));
  sums = _mm_mul_ps(_mm_mul_ps(sums, _mm_set1_ps(p.x.units[row])), _mm_loadu_ps(of.scales));
  int64_t at = row * p.outputs + output;
  __mmask8 mask = static_cast<__mmask8>((1 << std::min<int64_t>(count, 4)) - 1);
  if (p.out_type == ffi::DataType::F32)
    _mm_mask_storeu_ps(static_cast<float*>(p.out) + at, mask, sums);
  else
    _mm_mask_storeu_epi16(static_cast<Half*>(p.out) + at, mask, (__m128i)_mm_cvtneps_pbh(sums));
}

// Rows x outputs of the result, of which `real` outputs are wanted.
template <Format F, int kDigits, int kRows, int kOutputs>
void multiply_tile(const Problem& p, int64_t row, int64_t output, int64_t real, const Weights& weights, Ahead& ahead) {
  constexpr int kNumbers = kRows * kDigits;
  __m128 found[kRows][kOutputs / 4] = {};
  for (int64_t chunk = 0; chunk < p.x.chunks; ++chunk) {
    __m512i total[kNumbers][kOutputs];
#pragma GCC unroll 8
    for (int r = 0; r < kNumbers; ++r) {
      __m512i start = _mm512_load_si512(p.x.starts + ((row * kDigits + r) * p.x.chunks + chunk) * 16);
#pragma GCC unroll 8
      for (int c = 0; c < kOutputs; ++c) total[r][c] = start;
    }
    int64_t first = chunk * p.x.chunk, end = std::min(first + p.x.chunk, p.inputs);
    const int8_t* x = p.x.numbers + row * kDigits * p.x.stride;
    for (int64_t k = first; k < end; k += 64) {
      ahead.step();
      __m512i w[kOutputs];
#pragma GCC unroll 8
      for (int c = 0; c < kOutputs; ++c) w[c] = bytes_at<F>(weights.rows + c * weights.stride + k * kBits<F> / 8);
#pragma GCC unroll 8
      for (int r = 0; r < kNumbers; ++r) {
        __m512i each = _mm512_load_si512(x + r * p.x.stride + k);
        asm("" : QUIRE_REGISTER(each));
#pragma GCC unroll 8
        for (int c = 0; c < kOutputs; ++c) total[r][c] = _mm512_dpbusd_epi32(total[r][c], w[c], each);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < kOutputs; c += 4)
        found[r][c / 4] += kDigits == 2 ? lane_sums(total[kDigits * r] + c, total[kDigits * r + kDigits - 1] + c)
                                        : lane_sums(total[r] + c);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < kOutputs; c += 4)
      if (c < real) put_results(p, row + r, output + c, real - c, found[r][c / 4], weights.from(c));
}

// Rows are few enough that GCC keeps all sums in registers.
template <Format F, int kDigits>
struct Tiles {
  using Run = void (*)(const Problem&, int64_t, int64_t, int64_t, const Weights&, Ahead&);
  static constexpr int64_t kMostRows = 4 - kDigits;

  static Run run(int64_t rows) {
    if constexpr (kDigits == 2) {
      static constexpr Run kRuns[] = {multiply_tile<F, 2, 1, 4>, multiply_tile<F, 2, 2, 4>};
      return kRuns[rows - 1];
    } else {
      static constexpr Run kRuns[] = {multiply_tile<F, 1, 1, 8>, multiply_tile<F, 1, 2, 4>, multiply_tile<F, 1, 3, 4>};
      return kRuns[rows - 1];
    }
  }
  static int64_t width(int64_t rows) { return rows * kDigits == 1 ? 8 : 4; }
};

// Eight outputs' weights as they lie; or in `copy`, if there are fewer or a step would read more than there is: only the
// last outputs of a matrix, so that a thread's copy, once filled, stays until all rows have met it.
Weights weights_at(const Problem& p, int64_t output, int64_t real, int64_t bytes, bool fill, uint8_t* copy) {
  const uint8_t* rows = p.stored + output * bytes;
  bool ends_inside = p.inputs % 64 == 0 || (output + 8) * p.inputs + 64 <= p.outputs * p.inputs;
  if (real == 8 && ends_inside) return {rows, bytes, nullptr, nullptr};
  if (fill) {
    std::memset(copy, 0, 8 * (bytes + 64));
    for (int64_t i = 0; i < real; ++i) std::memcpy(copy + i * (bytes + 64), rows + i * bytes, bytes);
  }
  return {copy, bytes + 64, nullptr, nullptr};
}

template <Format F, int kDigits>
void run_panel(const void* problem, int64_t index) {
  using Of = Tiles<F, kDigits>;
  const Problem& p = *static_cast<const Problem*>(problem);
  int64_t first = index % p.num_panels * kPanel, count = std::min(kPanel, p.outputs - first);
  int64_t row = index / p.num_panels * p.block, num_rows = std::min(p.block, p.rows - row);
  float scales[kPanel], zeros[kPanel] = {};
  std::fill(scales, scales + kPanel, 1.0f);
  if (p.scales) widen(p.scale_type, p.scales, first, count, scales);
  if (p.zeros) widen_as<int8_t>(p.zeros, first, count, zeros);
  int64_t bytes = p.inputs * kBits<F> / 8, at_once = 8;
  while (num_rows > kFewRows && at_once < kPanel && 2 * at_once * p.inputs <= kNearBytes) at_once *= 2;
  int64_t steps = num_rows * at_once / (Of::kMostRows * Of::width(num_rows)) * p.inputs / 64;
  uint8_t* copy = scratch<uint8_t>(2, 8 * (bytes + 64));
  // The weights of some outputs stay in the nearest cache for all rows; meanwhile the next ones come.
  for (int64_t n = 0; n < count; n += at_once) {
    const uint8_t* next = p.stored + (first + n) * bytes + std::max(at_once * bytes, kAhead);
    Ahead ahead = ahead_of(next, at_once * bytes, steps);
    for_tiles(num_rows, Of::kMostRows, [&](int64_t r, int64_t take) {
      for (int64_t e = n; e < std::min(n + at_once, count); e += 8) {
        int64_t real = std::min<int64_t>(8, count - e);
        Weights weights = weights_at(p, first + e, real, bytes, r == 0, copy);
        weights.scales = scales + e, weights.zeros = zeros + e;
        if (ahead.at >= next + at_once * bytes) ahead.each = 0;
        for (int64_t c = 0; c < real; c += Of::width(take))
          Of::run(take)(p, row + r, first + e + c, std::min(Of::width(take), real - c), weights.from(c), ahead);
      }
    });
  }
}

Piece rounding_of(ffi::DataType x, int64_t digits) {
  if (x == ffi::DataType::BF16) return digits == 2 ? round_rows<Half, 2> : round_rows<Half, 1>;
  if (x == ffi::DataType::F32) return digits == 2 ? round_rows<float, 2> : round_rows<float, 1>;
  if (x == ffi::DataType::S8 && digits == 1) return round_rows<int8_t, 1>;
  return nullptr;
}

Piece runner_of(ffi::DataType stored, int64_t digits) {
  if (stored == ffi::DataType::S8) return digits == 2 ? run_panel<Format::kInt8, 2> : run_panel<Format::kInt8, 1>;
  if (stored == ffi::DataType::S4) return digits == 2 ? run_panel<Format::kInt4, 2> : run_panel<Format::kInt4, 1>;
  return nullptr;
}

ffi::Error product_of(ffi::ThreadPool pool, const ffi::AnyBuffer& x, int64_t digits, Problem p) {
  Piece run = runner_of(p.stored_type, digits);
  Piece round = rounding_of(x.element_type(), digits);
  if (!run || !round || digits < 1 || digits > 2) return ffi::Error::InvalidArgument("no product of these types");
  if (p.inputs > kMostInputs) return ffi::Error::InvalidArgument("sums of so many inputs do not fit in 32 bits");
  p.x = room_for(p.rows, digits, p.inputs);
  Rounding task{p.x, x.untyped_data(), p.rows, p.inputs, x.dimensions()[1], p.stored_type == ffi::DataType::S4 ? kMore<Format::kInt4> : kMore<Format::kInt8>};
  int64_t pieces = (p.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  if (p.rows * p.inputs < kWorthSharing)
    for (int64_t i = 0; i < pieces; ++i) round(&task, i);
  else
    run_all(pool, &task, round, pieces);
  p.block = std::max<int64_t>(kBlockBytes / (digits * p.x.stride) / 6 * 6, 12);
  p.num_panels = (p.outputs + kPanel - 1) / kPanel;
  run_all(pool, &p, run, p.num_panels * ((p.rows + p.block - 1) / p.block));
  return ffi::Error::Success();
}

#endif

ffi::Error integer_product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer stored, ffi::AnyBuffer scales,
                           ffi::AnyBuffer zeros, ffi::Result<ffi::AnyBuffer> out, int64_t digits) {
#ifdef QUIRE_VNNI
  Problem p;
  p.rows = x.dimensions()[0], p.outputs = stored.dimensions()[0], p.inputs = stored.dimensions()[1];
  p.stored = static_cast<const uint8_t*>(stored.untyped_data()), p.stored_type = stored.element_type();
  p.scales = scales.element_count() ? scales.untyped_data() : nullptr, p.scale_type = scales.element_type();
  p.zeros = zeros.element_count() ? static_cast<const int8_t*>(zeros.untyped_data()) : nullptr;
  p.out = out->untyped_data(), p.out_type = out->element_type();
  if (p.out_type != ffi::DataType::F32 && p.out_type != ffi::DataType::BF16)
    return ffi::Error::InvalidArgument("results are float32 or bfloat16");
  return product_of(pool, x, digits, p);
#else
  return ffi::Error::InvalidArgument("this processor has no dots of 8-bit integers");
#endif
}

}  // namespace
}  // namespace quire

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_integer_product, quire::integer_product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("digits"));

extern "C" int quire_dots_of_integers() {
#ifdef QUIRE_VNNI
  return 1;
#else
  return 0;
#endif
}
