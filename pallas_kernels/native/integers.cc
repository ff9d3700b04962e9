// The product of integers, `[M, K] x [N, K]` on both sides, as a custom call of XLA on a CPU: weights of 8 or 4 bits
// with one scale per output meet activations in fixed point, of one digit of 8 bits or of two. Nothing is converted to
// floats but sums, which are exact: the order of additions, and so the number of rows and of threads, makes no
// difference.
#include <algorithm>

#include "decode.h"
#include "digits.h"
#include "integers.h"
#include "sums.h"
#include "threads.h"
#include "widen.h"
#include "xla/ffi/api/ffi.h"

namespace quire {
namespace {

namespace ffi = xla::ffi;

#ifdef QUIRE_VNNI

constexpr int64_t kMostInputs = 1 << 16;     // of which sums of any weights and activations fit in 32 bits
constexpr int64_t kWorthSharing = 1 << 16;   // activations to round, for more than one thread
constexpr int64_t kBlockBytes = 512 * 1024;  // of activations that share weights in a cache
constexpr int64_t kMostAhead = 256 * 1024;   // bytes of weights to fetch while others are multiplied
constexpr int64_t kFewNumbers = 16;          // rows x digits up to which turning weights costs more than it saves
constexpr int64_t kFewPanel = 32;            // outputs of a piece
constexpr int64_t kMostDeep = 640;           // inputs of a turned panel, which then fits in the nearest cache

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

// What the sums of a panel's outputs are multiplied with, and what is taken off.
struct Rules {
  alignas(64) float scales[kWidth], zeros[kWidth];

  Rules(const Problem& p, int64_t first, int64_t count) {
    std::fill(scales, scales + kWidth, 1.0f);
    std::fill(zeros, zeros + kWidth, 0.0f);
    if (p.scales) widen(p.scale_type, p.scales, first, count, scales);
    if (p.zeros) widen_as<int8_t>(p.zeros, first, count, zeros);
  }
};

// Sums of one row and `count` outputs, at most 16; `i`: of the first output in the panel.
inline void put_results(const Problem& p, const Rules& rules, int64_t row, int64_t output, int64_t i, int64_t count,
                        __m512 sums) {
  __m512 total = _mm512_set1_ps(p.x.totals[row]), unit = _mm512_set1_ps(p.x.units[row]);
  if (p.zeros) sums = _mm512_fnmadd_ps(_mm512_loadu_ps(rules.zeros + i), total, sums);
  sums = _mm512_mul_ps(_mm512_mul_ps(sums, unit), _mm512_loadu_ps(rules.scales + i));
  int64_t at = row * p.outputs + output;
  if (p.out_type == ffi::DataType::F32)
    _mm512_mask_storeu_ps(static_cast<float*>(p.out) + at, mask_of(count), sums);
  else
    _mm256_mask_storeu_epi16(static_cast<Half*>(p.out) + at, mask_of(count), (__m256i)_mm512_cvtneps_pbh(sums));
}

// ---- Few rows: sums lie along the inputs

// Eight outputs' weights as they lie; or in `copy`, if there are fewer or a step would read more than there is.
template <Format F>
Rows rows_at(const Problem& p, int64_t output, int64_t real, uint8_t* copy) {
  int64_t bytes = p.inputs * kBits<F> / 8;
  const uint8_t* rows = p.stored + output * bytes;
  bool ends_inside = p.inputs % 64 == 0 || (output + 8) * p.inputs + 64 <= p.outputs * p.inputs;
  if (real == 8 && ends_inside) return {rows, bytes};
  std::memset(copy, 0, 8 * (bytes + 64));
  for (int64_t i = 0; i < real; ++i) std::memcpy(copy + i * (bytes + 64), rows + i * bytes, bytes);
  return {copy, bytes + 64};
}

template <Format F, int kDigits>
void run_few(const void* problem, int64_t index) {
  const Problem& p = *static_cast<const Problem*>(problem);
  int64_t first = index * kFewPanel, count = std::min(kFewPanel, p.outputs - first);
  int64_t bytes = p.inputs * kBits<F> / 8, steps = (p.inputs + 63) / 64;
  int64_t numbers = kDigits * p.rows;
  int64_t tiles = (numbers + LaneTile<F>::kMost - 1) / LaneTile<F>::kMost * (numbers > 2 ? 2 : 1);
  Rules rules(p, first, count);
  uint8_t* copy = scratch<uint8_t>(2, 8 * (bytes + 64));
  for (int64_t n = 0; n < count; n += 8) {
    int64_t real = std::min<int64_t>(8, count - n);
    Rows w = rows_at<F>(p, first + n, real, copy);
    Ahead ahead(p.stored + (first + n) * bytes + std::max(8 * bytes, kAhead), 8 * bytes, tiles * steps);
    alignas(64) int32_t sums[kFewNumbers][16];
    for_tiles(numbers, LaneTile<F>::kMost, [&](int64_t r, int64_t take) {
      for (int64_t c = 0; c < 8; c += LaneTile<F>::outputs(take))
        LaneTile<F>::run(take)(p.x.numbers + r * p.x.stride, p.x.stride, {w.at + c * w.stride, w.stride}, steps,
                               p.x.starts + r * 16, sums[r] + c, ahead);
      ahead.between_tiles();
    });
    for (int64_t r = 0; r < p.rows; ++r)
      put_results(p, rules, r, first + n, n, real, joined<kDigits>(sums[r * kDigits], sums[(r + 1) * kDigits - 1]));
  }
}

// ---- More rows: sums lie along the outputs

template <Format F, int kDigits>
void run_many(const void* problem, int64_t index) {
  const Problem& p = *static_cast<const Problem*>(problem);
  int64_t first = index % p.num_panels * kWidth, count = std::min(kWidth, p.outputs - first);
  int64_t row = index / p.num_panels * p.block, num_rows = std::min(p.block, p.rows - row);
  int64_t numbers = num_rows * kDigits;
  int64_t bytes = p.inputs * kBits<F> / 8, parts = (p.inputs + kMostDeep - 1) / kMostDeep;
  int64_t deep = ((p.inputs + parts - 1) / parts + 63) / 64 * 64;
  uint8_t* turned = scratch<uint8_t>(2, deep * kWidth);
  int32_t* sums = scratch<int32_t>(3, numbers * kWidth);
  int64_t wanted = kWidth * bytes <= kMostAhead ? kWidth * bytes : 0;
  Ahead ahead(p.stored + (first + kWidth) * bytes, wanted, (numbers + kColumnTile - 1) / kColumnTile * (p.inputs / 4));
  for (int64_t r = 0; r < numbers; ++r) {
    __m512i lanes = _mm512_load_si512(p.x.starts + (row * kDigits + r) * 16);
    __m512i start = _mm512_set1_epi32(_mm512_reduce_add_epi32(lanes));
    for (int64_t v = 0; v < kWidth; v += 16) _mm512_store_si512(sums + r * kWidth + v, start);
  }
  for (int64_t k = 0; k < p.inputs; k += deep) {
    int64_t now = std::min(deep, p.inputs - k);
    turn<F>(p.stored + first * bytes, bytes, count, k, now, turned);
    const int8_t* x = p.x.numbers + row * kDigits * p.x.stride + k;
    for_tiles(numbers, kColumnTile, [&](int64_t r, int64_t take) {
      column_tile(take)(x + r * p.x.stride, p.x.stride, turned, (now + 3) / 4, sums + r * kWidth, ahead);
      ahead.between_tiles();
    });
  }
  Rules rules(p, first, count);
  for (int64_t r = 0; r < num_rows; ++r) {
    const int32_t *high = sums + r * kDigits * kWidth, *low = high + (kDigits - 1) * kWidth;
    for (int64_t v = 0; v < count; v += 16)
      put_results(p, rules, row + r, first + v, v, count - v, joined<kDigits>(high + v, low + v));
  }
}

// ---- The call

template <Format F>
Piece runner_of(int64_t digits, bool few) {
  if (few) return digits == 2 ? run_few<F, 2> : run_few<F, 1>;
  return digits == 2 ? run_many<F, 2> : run_many<F, 1>;
}

Piece rounding_of(ffi::DataType x, int64_t digits) {
  if (x == ffi::DataType::BF16) return digits == 2 ? round_rows<Half, 2> : round_rows<Half, 1>;
  if (x == ffi::DataType::F32) return digits == 2 ? round_rows<float, 2> : round_rows<float, 1>;
  if (x == ffi::DataType::S8 && digits == 1) return round_rows<int8_t, 1>;
  return nullptr;
}

ffi::Error product_of(ffi::ThreadPool pool, const ffi::AnyBuffer& x, int64_t digits, Problem p) {
  bool is_int4 = p.stored_type == ffi::DataType::S4, few = p.rows * digits <= kFewNumbers;
  if (!is_int4 && p.stored_type != ffi::DataType::S8 || digits < 1 || digits > 2)
    return ffi::Error::InvalidArgument("no product of these types");
  Piece run = is_int4 ? runner_of<Format::kInt4>(digits, few) : runner_of<Format::kInt8>(digits, few);
  Piece round = rounding_of(x.element_type(), digits);
  if (!round) return ffi::Error::InvalidArgument("no product of these types");
  if (p.inputs > kMostInputs) return ffi::Error::InvalidArgument("sums of so many inputs do not fit in 32 bits");
  p.x = room_for(p.rows, digits, p.inputs);
  int32_t more = is_int4 ? kMore<Format::kInt4> : kMore<Format::kInt8>;
  Rounding task{p.x, x.untyped_data(), p.rows, p.inputs, x.dimensions()[1], more};
  int64_t pieces = (p.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  if (p.rows * p.inputs < kWorthSharing)
    for (int64_t i = 0; i < pieces; ++i) round(&task, i);
  else
    run_all(pool, &task, round, pieces);
  p.block = few ? p.rows : std::max<int64_t>(kBlockBytes / (digits * p.x.stride) / 6 * 6, 12);
  int64_t panel = few ? kFewPanel : kWidth;
  p.num_panels = (p.outputs + panel - 1) / panel;
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
