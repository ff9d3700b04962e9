// The product of activations with packed weights, `[M, K] x [N, K]`, as a custom call of XLA on a CPU.
//
// Outputs are shared out to the threads of XLA's own pool in panels. A thread decodes some outputs' weights, a chunk of
// inputs at a time, to where the caches hold them, and multiplies all rows with them: weights are read from memory once,
// packed. Sums lie along the inputs in the lanes of a vector, chunk by chunk, so that neither operand is ever
// transposed, and the order of a result's additions is the same for every number of rows and of threads.
#include <algorithm>
#include <type_traits>

#include "decode.h"
#include "sums.h"
#include "threads.h"
#include "widen.h"
#include "xla/ffi/api/ffi.h"

namespace quire {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kRowBlock = 512;             // rows that share a decoding
constexpr int64_t kNarrowRows = 24;            // up to which panels are as narrow as can be
constexpr int64_t kMostAhead = 128 * 1024;     // bytes of packed weights to fetch while others are multiplied

// ---- One problem

struct Problem {
  int64_t rows, inputs, outputs, stride, group, groups;  // stride: of activations; group: 0 = sums are scaled
  const void* x;
  const uint8_t* stored;
  const void* scales;  // [groups, outputs]
  ffi::DataType scale_type;
  const int8_t* zeros;  // the same, or null
  const void* offsets;  // the same, of the scales' type, or null
  void* out;
  ffi::DataType out_type;
  int64_t panel, num_panels;  // outputs of one
};

// What the weights of a panel's outputs become, [groups, panel].
struct Rules {
  float *scales, *zeros, *offsets;

  Rule at(int64_t i) const { return {true, scales[i], zeros ? zeros[i] : 0.0f, offsets ? offsets[i] : 0.0f}; }
};

// Fetches what the next panel's are made of: lines far from each other, which no processor foresees.
void fetch_rules(const Problem& p, int64_t first) {
  int64_t size = p.scale_type == ffi::DataType::F32 ? 4 : 2;
  for (int64_t g = 0; g < p.groups; ++g) {
    int64_t at = g * p.outputs + first;
    for (int64_t b = 0; b < p.panel * size; b += 64) {
      __builtin_prefetch(static_cast<const uint8_t*>(p.scales) + at * size + b);
      if (p.offsets) __builtin_prefetch(static_cast<const uint8_t*>(p.offsets) + at * size + b);
    }
    if (p.zeros)
      for (int64_t b = 0; b < p.panel; b += 64) __builtin_prefetch(p.zeros + at + b);
  }
}

Rules rules_of(const Problem& p, int64_t first, int64_t count) {
  int64_t size = p.panel * p.groups;
  float* memory = scratch<float>(0, 3 * size);
  Rules rules{memory, p.zeros ? memory + size : nullptr, p.offsets ? memory + 2 * size : nullptr};
  for (int64_t g = 0; g < p.groups; ++g) {
    int64_t from = g * p.outputs + first, to = g * p.panel;
    widen(p.scale_type, p.scales, from, count, rules.scales + to);
    if (p.zeros) widen_as<int8_t>(p.zeros, from, count, rules.zeros + to);
    if (p.offsets) widen(p.scale_type, p.offsets, from, count, rules.offsets + to);
  }
  return rules;
}

#ifdef QUIRE_AVX512
// Whole groups of bfloat16, the common case; `at` is the first one's place in the rules.
template <Format F>
void decode_rules(const uint8_t* bytes, int64_t group, int64_t groups, const Rules& rules, int64_t at, int64_t stride,
                  Half* out) {
  const float *scales = rules.scales + at, *zeros = rules.zeros + at, *offsets = rules.offsets + at;
  if (rules.zeros && rules.offsets)
    decode_groups<F, true, true>(bytes, group, groups, scales, zeros, offsets, stride, out);
  else if (rules.zeros)
    decode_groups<F, true, false>(bytes, group, groups, scales, zeros, offsets, stride, out);
  else if (rules.offsets)
    decode_groups<F, false, true>(bytes, group, groups, scales, zeros, offsets, stride, out);
  else
    decode_groups<F, false, false>(bytes, group, groups, scales, zeros, offsets, stride, out);
}
#endif

template <Format F, typename Element>
void decode_in_groups(const Problem& p, const uint8_t* row, int64_t from, int64_t end, const Rules& rules, int64_t i,
                      Element* out) {
  int64_t first = from / p.group, at = first * p.panel + i;
#ifdef QUIRE_AVX512
  if constexpr (sizeof(Element) == 2) {
    if (p.group % 32 == 0 && from % p.group == 0 && end % p.group == 0) {
      decode_rules<F>(row + from * kBits<F> / 8, p.group, end / p.group - first, rules, at, p.panel, out);
      return;
    }
  }
#endif
  int64_t left = std::min((first + 1) * p.group, end) - from;  // the first may have begun before
  for (int64_t k = from; k < end; at += p.panel) {
    decode<F>(row, k, left, rules.at(at), out + (k - from));
    k += left, left = std::min(p.group, end - k);
  }
}

// Inputs `from` to `to` of one output's weights, and zeros up to a multiple of the padding. `i`: of the output in the
// panel.
template <Format F, typename Element>
void decode_row(const Problem& p, int64_t output, int64_t from, int64_t to, const Rules& rules, int64_t i,
                Element* out) {
  int64_t end = std::min(to, p.inputs);
  const uint8_t* row = p.stored + output * p.inputs * kBits<F> / 8;
  for (int64_t b = from * kBits<F> / 8; b < end * kBits<F> / 8; b += 64) __builtin_prefetch(row + b + kAhead);
  if (p.group == 0)
    decode<F>(row, from, end - from, Rule{false, 1, rules.at(i).zero, 0}, out);
  else
    decode_in_groups<F>(p, row, from, end, rules, i, out);
  if (end < to) std::memset(out + (end - from), 0, (to - end) * sizeof(Element));
}

template <typename Element, bool kFetch>
void multiply_rows(const Problem& p, int64_t row, int64_t num_rows, const Element* w, int64_t w_stride, int64_t from,
                   int64_t count, int64_t outputs, float* sums, int64_t sums_stride, Ahead& ahead) {
  for_tiles(num_rows, kMostRows, [&](int64_t r, int64_t take) {
    const Element* x = static_cast<const Element*>(p.x) + (row + r) * p.stride + from;
    Tile<Element> tile = tile_of<Element, kFetch>(take);
    ahead.between_tiles();
    for (int64_t n = 0; n < outputs; n += tile.outputs)
      tile.run(x, p.stride, w + n * w_stride, w_stride, count, sums + r * sums_stride + n, sums_stride, from == 0,
               ahead);
  });
}

template <typename Out>
void finish(const Problem& p, int64_t row, int64_t num_rows, int64_t output, int64_t count, const float* scales,
            const float* sums, int64_t sums_stride) {
  for (int64_t r = 0; r < num_rows; ++r) {
    Out* out = static_cast<Out*>(p.out) + (row + r) * p.outputs + output;
    const float* sum = sums + r * sums_stride;
    if (p.group) {
      for (int64_t n = 0; n < count; ++n) store(out + n, sum[n]);
    } else {
      for (int64_t n = 0; n < count; ++n) store(out + n, sum[n] * scales[n]);
    }
  }
}

// One panel of outputs for one block of rows.
template <Format F, typename Element>
void run_panel(const void* problem, int64_t index) {
  const Problem& p = *static_cast<const Problem*>(problem);
  int64_t panel = index % p.num_panels, row = index / p.num_panels * kRowBlock;
  int64_t num_rows = std::min(kRowBlock, p.rows - row);
  int64_t first = panel * p.panel, count = std::min(p.panel, p.outputs - first);
  Rules rules = rules_of(p, first, count);
  fetch_rules(p, first + p.panel);
  // One tile's rows meet eight outputs, decoded to the nearest cache; more rows a panel, in the next one.
  bool few = num_rows <= kMostRows;
  int64_t at_once = few ? 8 : p.panel;
  int64_t padded = (p.inputs + kPad - 1) / kPad * kPad, bytes = p.inputs * kBits<F> / 8;
  int64_t span = few ? padded : std::min(padded, kChunk<Element>), w_stride = span + kPad;
  int64_t steps = (num_rows + kMostRows - 1) / kMostRows * (at_once / kTile) * padded / kStep<Element>;
  bool fetch = !few && at_once * bytes <= kMostAhead;
  Element* w = scratch<Element>(2, at_once * w_stride);
  float* sums = scratch<float>(3, num_rows * at_once);
  for (int64_t n = 0; n < count; n += at_once) {
    int64_t real = std::min(at_once, count - n), whole = (real + 7) / 8 * 8;
    Ahead ahead(p.stored + (first + n + at_once) * bytes, at_once * bytes, steps);
    for (int64_t from = 0; from < padded; from += span) {
      int64_t to = std::min(from + span, padded);
      for (int64_t i = 0; i < real; ++i)
        decode_row<F>(p, first + n + i, from, to, rules, n + i, w + i * w_stride);
      for (int64_t i = real; i < whole; ++i) std::memset(w + i * w_stride, 0, (to - from) * sizeof(Element));
      auto multiply = fetch ? multiply_rows<Element, true> : multiply_rows<Element, false>;
      for (int64_t k = from; k < to; k += kChunk<Element>)
        multiply(p, row, num_rows, w + (k - from), w_stride, k, std::min(kChunk<Element>, to - k), whole, sums, at_once,
                 ahead);
    }
    if (p.out_type == ffi::DataType::F32)
      finish<float>(p, row, num_rows, first + n, real, rules.scales + n, sums, at_once);
    else
      finish<Half>(p, row, num_rows, first + n, real, rules.scales + n, sums, at_once);
  }
}

template <typename Element>
Piece runner_of(ffi::DataType stored) {
  if (stored == ffi::DataType::S4) return run_panel<Format::kInt4, Element>;
  if (stored == ffi::DataType::S8) return run_panel<Format::kInt8, Element>;
  if (stored == ffi::DataType::F8E4M3FN) return run_panel<Format::kFp8, Element>;
  return nullptr;
}

// ---- The call

ffi::Error packed_product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer stored, ffi::AnyBuffer scales,
                          ffi::AnyBuffer zeros, ffi::AnyBuffer offsets, ffi::Result<ffi::AnyBuffer> out) {
  Problem p;
  p.rows = x.dimensions()[0], p.stride = x.dimensions()[1];
  p.outputs = stored.dimensions()[0], p.inputs = stored.dimensions()[1];
  bool is_moved = offsets.element_count() > 0;
  p.groups = scales.dimensions()[0], p.group = p.groups > 1 || is_moved ? p.inputs / p.groups : 0;
  if (p.stride != (p.inputs + kPad - 1) / kPad * kPad)
    return ffi::Error::InvalidArgument("activations are not padded to a multiple of 32");
  p.x = x.untyped_data(), p.stored = static_cast<const uint8_t*>(stored.untyped_data());
  p.scales = scales.untyped_data(), p.scale_type = scales.element_type();
  p.zeros = zeros.element_count() ? static_cast<const int8_t*>(zeros.untyped_data()) : nullptr;
  p.offsets = is_moved ? offsets.untyped_data() : nullptr;
  if (is_moved && offsets.element_type() != p.scale_type)
    return ffi::Error::InvalidArgument("offsets are not of the scales' type");
  p.out = out->untyped_data(), p.out_type = out->element_type();
  if (p.out_type != ffi::DataType::F32 && p.out_type != ffi::DataType::BF16)
    return ffi::Error::InvalidArgument("results are float32 or bfloat16");
  Piece run = nullptr;
  if (x.element_type() == ffi::DataType::F32) run = runner_of<float>(stored.element_type());
#ifdef QUIRE_AVX512
  if (x.element_type() == ffi::DataType::BF16) run = runner_of<Half>(stored.element_type());
#endif
  if (!run) return ffi::Error::InvalidArgument("no product of these types");
  int64_t blocks = (p.rows + kRowBlock - 1) / kRowBlock, threads = std::max<int64_t>(pool.num_threads(), 1);
  // With few rows memory is the limit, and a panel's first outputs are not fetched ahead: many panels share the wait.
  p.panel = p.rows <= kNarrowRows ? 32 : panel_of(p.outputs, blocks, threads, 128, 32);
  p.num_panels = (p.outputs + p.panel - 1) / p.panel;
  run_all(pool, &p, run, p.num_panels * blocks);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace quire

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_packed_product, quire::packed_product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());

extern "C" int quire_dots_of_bfloat16() {
#ifdef QUIRE_AVX512
  return 1;
#else
  return 0;
#endif
}
