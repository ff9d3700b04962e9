// The product of activations with weights of 16 or 32 bits as they were loaded, as a custom call of XLA on a CPU.
//
// Weights `[K, N]` are multiplied where they lie, and sums lie along the outputs: an input is spread over a vector, and
// meets 16 outputs' weights. bfloat16 is multiplied in pairs of inputs, so two rows of weights are interleaved first, in
// registers. With few rows a thread reads four pairs of a panel at a time, as long stretches of memory, and its sums wait
// in the cache. With many it interleaves a chunk of inputs once, and tiles of rows and outputs fill the registers.
// Either way a result is one chain of additions along its inputs, the same for every number of rows and of threads.
//
// Weights `[N, K]`, an embedding as the head, are multiplied as packed ones are once they are decoded (`product.cc`).
#include <algorithm>
#include <type_traits>

#include "decode.h"
#include "sums.h"
#include "threads.h"
#include "units.h"
#include "xla/ffi/api/ffi.h"

namespace quire {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kFewRows = 24;    // up to which weights are used so seldom that interleaving them in a cache costs more
constexpr int64_t kRowBlock = 256;  // rows that share an interleaving
constexpr int64_t kAtOnce = 4;      // steps of inputs of few rows between two visits of a sum

inline int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct Problem {
  int64_t rows, inputs, outputs, stride;  // stride: of activations
  const void* x;
  const void* weight;
  void* out;
  ffi::DataType out_type;
  int64_t panel, num_panels, block;  // outputs of one; rows that are multiplied together
};

// ---- Results

inline void store_row(float* out, const float* sums, int64_t count) {
  for (; count >= kLanes; count -= kLanes, out += kLanes, sums += kLanes) put(out, lanes_at(sums));
  for (int64_t n = 0; n < count; ++n) out[n] = sums[n];
}

inline void store_row(Half* out, const float* sums, int64_t count) {
#ifdef QUIRE_AVX512
  for (; count >= 32; count -= 32, out += 32, sums += 32)
    _mm512_storeu_si512(out, join(_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 16)));
#endif
  for (int64_t n = 0; n < count; ++n) out[n] = half_of(sums[n]);
}

inline void put_row(const Problem& p, int64_t row, int64_t output, const float* sums, int64_t count) {
  int64_t at = row * p.outputs + output;
  if (p.out_type == ffi::DataType::F32)
    store_row(static_cast<float*>(p.out) + at, sums, count);
  else
    store_row(static_cast<Half*>(p.out) + at, sums, count);
}

// ---- Weights [K, N]

template <typename Unit>
void finish_columns(const Problem& p, int64_t row, int64_t num_rows, int64_t first, int64_t count, const float* sums,
                    int64_t sums_stride) {
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t n = 0; n < count; n += Unit::kOutputs) {
      float settled[Unit::kOutputs];
      Unit::settle(sums + r * sums_stride + n, settled);
      put_row(p, row + r, first + n, settled, std::min(count - n, Unit::kOutputs));
    }
  }
}

template <typename Unit>
void multiply_few(const Problem& p, int64_t row, int64_t num_rows, int64_t first, int64_t count, float* sums,
                  int64_t sums_stride) {
  using Vector = typename Unit::Vector;
  const auto* x = static_cast<const typename Unit::X*>(p.x) + row * p.stride;
  const auto* weight = static_cast<const typename Unit::W*>(p.weight) + first;
  constexpr int64_t kInputs = kAtOnce * Unit::kInputs;
  std::memset(sums, 0, num_rows * sums_stride * sizeof(float));
  for (int64_t k = 0; k < p.inputs; k += kInputs) {
    for (int64_t n = 0; n < count; n += Unit::kOutputs) {
      Vector w[kAtOnce][2] = {};
#pragma GCC unroll 4
      for (int64_t i = 0; i < kAtOnce; ++i) {
        int64_t at = k + i * Unit::kInputs;
        const auto* from = weight + at * p.outputs + n;
        for (int64_t j = 0; j < Unit::kInputs; ++j) __builtin_prefetch(from + (kInputs + j) * p.outputs, 0, 2);
        if (at < p.inputs) Unit::load(from, p.outputs, count - n, p.inputs - at, w[i]);
      }
      for (int64_t r = 0; r < num_rows; ++r) {
        float* sum = sums + r * sums_stride + n;
        Lanes low = lanes_at(sum), high = lanes_at(sum + kLanes);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kAtOnce; ++i) {
          Vector each = Unit::spread(x + r * p.stride + k + i * Unit::kInputs);
          asm("" : QUIRE_REGISTER(each));
          Unit::add(low, each, w[i][0]), Unit::add(high, each, w[i][1]);
        }
        put(sum, low), put(sum + kLanes, high);
      }
    }
  }
}

// Rows x vectors of sums, over `steps` steps of inputs; vectors of weights lie side by side, step by step.
template <typename Unit, int kRows, int kVectors>
void multiply_tile(const typename Unit::X* x, int64_t x_stride, const typename Unit::Vector* w, int64_t steps,
                   float* sums, int64_t sums_stride) {
  Lanes total[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) total[r][c] = lanes_at(sums + r * sums_stride + c * kLanes);
  for (int64_t k = 0; k < steps; ++k, w += kVectors, x += Unit::kInputs) {
    typename Unit::Vector each[kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) each[c] = w[c];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      typename Unit::Vector row = Unit::spread(x + r * x_stride);
      asm("" : QUIRE_REGISTER(row));
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) Unit::add(total[r][c], row, each[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) put(sums + r * sums_stride + c * kLanes, total[r][c]);
}

#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers
constexpr int kColumnVectors = 4;
#else
constexpr int kColumnVectors = 2;
#endif
constexpr int64_t kColumnRows = 6;

template <typename Unit>
constexpr int64_t kSteps = 512 / sizeof(typename Unit::X) / Unit::kInputs;  // whose weights of a tile fit in an L1 cache
template <typename Unit>
constexpr int64_t kFetched = 8 * Unit::kInputs;  // inputs ahead

template <typename Unit>
auto column_tile(int64_t rows) {
  using Run = void (*)(const typename Unit::X*, int64_t, const typename Unit::Vector*, int64_t, float*, int64_t);
  static constexpr Run kTiles[] = {
      multiply_tile<Unit, 1, kColumnVectors>, multiply_tile<Unit, 2, kColumnVectors>,
      multiply_tile<Unit, 3, kColumnVectors>, multiply_tile<Unit, 4, kColumnVectors>,
      multiply_tile<Unit, 5, kColumnVectors>, multiply_tile<Unit, 6, kColumnVectors>,
  };
  return kTiles[rows - 1];
}

// `steps` steps of a panel's weights from input `k` on, interleaved, tile by tile: whole stretches of memory are read.
template <typename Unit>
void gather(const Problem& p, int64_t k, int64_t steps, int64_t first, int64_t count, typename Unit::Vector* w) {
  constexpr int64_t kTileOutputs = kColumnVectors / 2 * Unit::kOutputs;
  for (int64_t i = 0; i < steps; ++i) {
    int64_t at = k + i * Unit::kInputs;
    const auto* from = static_cast<const typename Unit::W*>(p.weight) + at * p.outputs + first;
    for (int64_t n = 0; n < up(count, kTileOutputs); n += Unit::kOutputs) {
      auto* to = w + (n / kTileOutputs * kSteps<Unit> + i) * kColumnVectors + n % kTileOutputs / kLanes;
      for (int64_t j = 0; j < Unit::kInputs; ++j) __builtin_prefetch(from + n + (kFetched<Unit> + j) * p.outputs, 0, 2);
      if (n < count)
        Unit::load(from + n, p.outputs, count - n, p.inputs - at, to);
      else
        to[0] = to[1] = typename Unit::Vector{};
    }
  }
}

template <typename Unit>
void multiply_many(const Problem& p, int64_t row, int64_t num_rows, int64_t first, int64_t count, float* sums,
                   int64_t sums_stride) {
  using Vector = typename Unit::Vector;
  constexpr int64_t kTileOutputs = kColumnVectors / 2 * Unit::kOutputs;
  const auto* x = static_cast<const typename Unit::X*>(p.x) + row * p.stride;
  Vector* w = scratch<Vector>(2, kSteps<Unit> * up(count, kTileOutputs) / kLanes);
  std::memset(sums, 0, num_rows * sums_stride * sizeof(float));
  for (int64_t k = 0; k < p.inputs; k += kSteps<Unit> * Unit::kInputs) {
    int64_t steps = std::min(kSteps<Unit>, (p.inputs - k + Unit::kInputs - 1) / Unit::kInputs);
    gather<Unit>(p, k, steps, first, count, w);
    for (int64_t n = 0; n < count; n += kTileOutputs) {
      const Vector* tile = w + n / kTileOutputs * kSteps<Unit> * kColumnVectors;
      for_tiles(num_rows, kColumnRows, [&](int64_t r, int64_t take) {
        column_tile<Unit>(take)(x + r * p.stride + k, p.stride, tile, steps, sums + r * sums_stride + n, sums_stride);
      });
    }
  }
}

template <typename Unit>
void run_columns(const void* problem, int64_t index) {
  const Problem& p = *static_cast<const Problem*>(problem);
  int64_t first = index % p.num_panels * p.panel, row = index / p.num_panels * p.block;
  int64_t count = std::min(p.panel, p.outputs - first), num_rows = std::min(p.block, p.rows - row);
  int64_t sums_stride = (count + 127) / 128 * 128 + 16;
  float* sums = scratch<float>(3, num_rows * sums_stride);
  if (p.rows <= kFewRows)
    multiply_few<Unit>(p, row, num_rows, first, count, sums, sums_stride);
  else
    multiply_many<Unit>(p, row, num_rows, first, count, sums, sums_stride);
  finish_columns<Unit>(p, row, num_rows, first, count, sums, sums_stride);
}

// ---- Weights [N, K]

// Rows `first` to `first + count` of the weights, as they lie if they can be multiplied so; otherwise widened, or with
// zeros up to a multiple of the padding and of eight rows, in `copy`. `stride`: of the result.
template <typename Element, typename W>
const Element* weights_at(const Problem& p, int64_t first, int64_t count, int64_t copy_stride, Element* copy,
                          int64_t& stride) {
  const W* from = static_cast<const W*>(p.weight) + first * p.inputs;
  if constexpr (std::is_same_v<Element, W>) {
    if (p.inputs % kPad == 0 && count % 8 == 0) {
      stride = p.inputs;
      return from;
    }
  }
  stride = copy_stride;
  for (int64_t i = 0; i < up(count, 8); ++i) {
    Element* to = copy + i * copy_stride;
    int64_t real = i < count ? p.inputs : 0, k = 0;
    if constexpr (std::is_same_v<Element, W>) {
      std::memcpy(to, from + i * p.inputs, real * sizeof(W));
    } else {
      for (; k + kLanes <= real; k += kLanes) {
        __builtin_prefetch(from + i * p.inputs + k + kAhead / sizeof(W));
        put(to + k, widen_lanes(from + i * p.inputs + k));
      }
      for (; k < real; ++k) to[k] = widen(from[i * p.inputs + k]);
    }
    std::memset(to + real, 0, (copy_stride - real) * sizeof(Element));
  }
  return copy;
}

template <typename Element, typename W>
void run_rows(const void* problem, int64_t index) {
  const Problem& p = *static_cast<const Problem*>(problem);
  int64_t first = index % p.num_panels * p.panel, row = index / p.num_panels * p.block;
  int64_t count = std::min(p.panel, p.outputs - first), num_rows = std::min(p.block, p.rows - row);
  int64_t padded = up(p.inputs, kPad), at_once = num_rows <= kFewRows ? 8 : p.panel;
  Element* copy = scratch<Element>(2, at_once * (padded + kPad));
  float* sums = scratch<float>(3, num_rows * at_once);
  const auto* x = static_cast<const Element*>(p.x) + row * p.stride;
  for (int64_t n = 0; n < count; n += at_once) {
    int64_t real = std::min(at_once, count - n), stride;
    const Element* w = weights_at<Element, W>(p, first + n, real, padded + kPad, copy, stride);
    for (int64_t k = 0; k < padded; k += kChunk<Element>) {
      int64_t inputs = std::min(kChunk<Element>, padded - k);
      for_tiles(num_rows, kMostRows, [&](int64_t r, int64_t take) {
        Tile<Element> tile = w != copy && r == 0 ? tile_of<Element, true>(take) : tile_of<Element>(take);
        for (int64_t c = 0; c < real; c += tile.outputs) {
          const Element* from = w + c * stride + k;
          Ahead ahead(from + tile.outputs * stride, tile.outputs * inputs * sizeof(Element), inputs / kStep<Element>);
          tile.run(x + r * p.stride + k, p.stride, from, stride, inputs, sums + r * at_once + c, at_once, k == 0, ahead);
        }
      });
    }
    for (int64_t r = 0; r < num_rows; ++r) put_row(p, row + r, first + n, sums + r * at_once, real);
  }
}

// ---- The call

template <typename W>
Piece on_floats(bool by_rows) {
  return by_rows ? run_rows<float, W> : run_columns<FloatUnit<W>>;
}

Piece runner_of(ffi::DataType x, ffi::DataType weight, bool by_rows) {
#ifdef QUIRE_AVX512
  if (x == ffi::DataType::BF16 && weight == ffi::DataType::BF16)
    return by_rows ? run_rows<Half, Half> : run_columns<HalfUnit>;
#endif
  if (x != ffi::DataType::F32) return nullptr;
  if (weight == ffi::DataType::F32) return on_floats<float>(by_rows);
  if (weight == ffi::DataType::BF16) return on_floats<Half>(by_rows);
  if (weight == ffi::DataType::F16) return on_floats<_Float16>(by_rows);
  return nullptr;
}

ffi::Error dense_product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                         ffi::Result<ffi::AnyBuffer> out, bool by_rows) {
  Problem p;
  p.rows = x.dimensions()[0], p.stride = x.dimensions()[1];
  p.outputs = weight.dimensions()[by_rows ? 0 : 1], p.inputs = weight.dimensions()[by_rows ? 1 : 0];
  if (p.stride != up(p.inputs, kPad))
    return ffi::Error::InvalidArgument("activations are not padded to a multiple of 32");
  p.x = x.untyped_data(), p.weight = weight.untyped_data();
  p.out = out->untyped_data(), p.out_type = out->element_type();
  if (p.out_type != ffi::DataType::F32 && p.out_type != ffi::DataType::BF16)
    return ffi::Error::InvalidArgument("results are float32 or bfloat16");
  Piece run = runner_of(x.element_type(), weight.element_type(), by_rows);
  if (!run) return ffi::Error::InvalidArgument("no product of these types");
  int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  p.block = std::min(p.rows, kRowBlock);
  // Small matrices are cut up further, so that a thread that others hold up has not much left to do.
  if (up(p.outputs, 256) / 256 * up(p.rows, p.block) / p.block < 8 * threads) p.block = std::min(p.rows, kRowBlock / 2);
  int64_t blocks = (p.rows + p.block - 1) / p.block;
  if (by_rows)
    p.panel = 64;
  else if (p.rows <= kFewRows)  // long stretches of memory, and four pieces for each thread
    p.panel = std::max<int64_t>(up((p.outputs + 4 * threads - 1) / (4 * threads), 32), 64);
  else
    p.panel = panel_of(p.outputs, blocks, threads, 256, 64);
  p.num_panels = (p.outputs + p.panel - 1) / p.panel;
  run_all(pool, &p, run, p.num_panels * blocks);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace quire

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_dense_product, quire::dense_product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<bool>("by_rows"));
