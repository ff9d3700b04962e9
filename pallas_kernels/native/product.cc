// The product of activations with packed weights, `[M, K] x [N, K]`, as a custom call of XLA on a CPU.
//
// Outputs are shared out to the threads of XLA's own pool in panels. A thread decodes some outputs' weights, a chunk of
// inputs at a time, to where the caches hold them, and multiplies all rows with them: weights are read from memory once,
// packed. Sums lie along the inputs in the lanes of a vector, chunk by chunk, so that neither operand is ever
// transposed, and the order of a result's additions is the same for every number of rows and of threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#include "decode.h"
#include "xla/ffi/api/ffi.h"

namespace quire {
namespace {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

constexpr int64_t kPad = 32;          // what rows of activations are padded to; also keeps rows out of one cache set
constexpr int64_t kFewRows = 24;      // up to which decoded weights are used so seldom that they should stay in L1
constexpr int64_t kRowBlock = 512;    // rows that share a decoding
constexpr int kTile = 4;              // outputs whose sums are added up together

// ---- Sums

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

// Rows x outputs of the result: `sums[r, c]` = or += the products of `count` inputs.
template <typename Element, int kRows, int kOutputs>
void multiply(const Element* x, int64_t x_stride, const Element* w, int64_t w_stride, int64_t count, float* sums,
              int64_t sums_stride, bool first) {
  Lanes total[kRows][kOutputs] = {};
  for (int64_t k = 0; k < count; k += kStep<Element>) {
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
  void (*run)(const Element*, int64_t, const Element*, int64_t, int64_t, float*, int64_t, bool);
  int64_t outputs;
};

// Sums fill the registers: 32 of AVX-512, and of ARM; 16 elsewhere.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kMostRows = 6;

template <typename Element>
Tile<Element> tile_of(int64_t rows) {
  static constexpr Tile<Element> kTiles[] = {
      {multiply<Element, 1, 8>, 8}, {multiply<Element, 2, 8>, 8}, {multiply<Element, 3, 8>, 8},
      {multiply<Element, 4, 4>, 4}, {multiply<Element, 5, 4>, 4}, {multiply<Element, 6, 4>, 4},
  };
  return kTiles[rows - 1];
}
#else
constexpr int64_t kMostRows = 3;

template <typename Element>
Tile<Element> tile_of(int64_t rows) {
  static constexpr Tile<Element> kTiles[] = {
      {multiply<Element, 1, 8>, 8}, {multiply<Element, 2, 4>, 4}, {multiply<Element, 3, 4>, 4}};
  return kTiles[rows - 1];
}
#endif

// ---- One problem

struct Problem {
  int64_t rows, inputs, outputs, stride, group, groups;  // stride: of activations; group: 0 = a scale per output
  const void* x;
  const uint8_t* stored;
  const void* scales;  // [groups, outputs]
  ffi::DataType scale_type;
  const int8_t* zeros;  // the same, or null
  void* out;
  ffi::DataType out_type;
  int64_t panel, num_panels;  // outputs of one
};

// A thread's own memory, kept for its next call.
struct Scratch {
  std::vector<float> floats;

  template <typename T>
  static T* aligned(std::vector<float>& memory, size_t count) {
    size_t wanted = count * sizeof(T) / sizeof(float) + 32;
    if (memory.size() < wanted) memory.resize(wanted);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
};

template <typename T>
T* scratch(int which, size_t count) {
  thread_local std::vector<float> memory[4];
  return Scratch::aligned<T>(memory[which], count);
}

template <typename T>
void widen(const void* from, int64_t first, int64_t count, float* to) {
  const T* start = static_cast<const T*>(from) + first;
  for (int64_t n = 0; n < count; ++n) {
    if constexpr (std::is_same_v<T, Half>)
      to[n] = float_of(start[n]);
    else
      to[n] = static_cast<float>(start[n]);
  }
}

// Scales and zero points of a panel's outputs, [groups, panel].
void widen_scales(const Problem& p, int64_t first, int64_t count, float* scales, float* zeros) {
  auto widen_scale = p.scale_type == ffi::DataType::F32    ? widen<float>
                     : p.scale_type == ffi::DataType::BF16 ? widen<Half>
                                                           : widen<_Float16>;
  for (int64_t g = 0; g < p.groups; ++g) {
    widen_scale(p.scales, g * p.outputs + first, count, scales + g * p.panel);
    if (p.zeros) widen<int8_t>(p.zeros, g * p.outputs + first, count, zeros + g * p.panel);
  }
}

// Inputs `from` to `to` of one output's weights, and zeros up to a multiple of the padding.
template <Format F, typename Element>
void decode_row(const Problem& p, int64_t output, int64_t from, int64_t to, const float* scales, const float* zeros,
                Element* out) {
  int64_t end = std::min(to, p.inputs);
  const uint8_t* row = p.stored + output * p.inputs * kBits<F> / 8;
  if (p.group == 0) {
    decode<F>(row, from, end - from, 1.0f, p.zeros ? zeros[0] : 0.0f, false, out);
  } else {
    int64_t g = from / p.group * p.panel;
    for (int64_t k = from; k < end; k += p.group, g += p.panel) {
      decode<F>(row, k, p.group, scales[g], p.zeros ? zeros[g] : 0.0f, true, out + (k - from));
    }
  }
  if (end < to) std::memset(out + (end - from), 0, (to - end) * sizeof(Element));
}

template <typename Element>
void multiply_rows(const Problem& p, int64_t row, int64_t num_rows, const Element* w, int64_t w_stride, int64_t from,
                   int64_t count, int64_t outputs, float* sums, int64_t sums_stride) {
  for (int64_t r = 0; r < num_rows;) {
    int64_t left = num_rows - r;
    // One or two rows more than a tile has, in two equal parts: 4 and 3 rather than 6 and 1.
    int64_t take = left <= kMostRows ? left : left < 2 * kMostRows ? (left + 1) / 2 : kMostRows;
    const Element* x = static_cast<const Element*>(p.x) + (row + r) * p.stride + from;
    Tile<Element> tile = tile_of<Element>(take);
    for (int64_t n = 0; n < outputs; n += tile.outputs)
      tile.run(x, p.stride, w + n * w_stride, w_stride, count, sums + r * sums_stride + n, sums_stride, from == 0);
    r += take;
  }
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
void run_panel(const Problem& p, int64_t index) {
  int64_t panel = index % p.num_panels, row = index / p.num_panels * kRowBlock;
  int64_t num_rows = std::min(kRowBlock, p.rows - row);
  int64_t first = panel * p.panel, count = std::min(p.panel, p.outputs - first);
  float* scales = scratch<float>(0, p.panel * p.groups);
  float* zeros = scratch<float>(1, p.panel * p.groups);
  widen_scales(p, first, count, scales, zeros);
  bool few = num_rows <= kFewRows;
  int64_t at_once = few ? 8 : p.panel;
  int64_t padded = (p.inputs + kPad - 1) / kPad * kPad;
  int64_t span = few ? padded : std::min(padded, kChunk<Element>), w_stride = span + kPad;
  Element* w = scratch<Element>(2, at_once * w_stride);
  float* sums = scratch<float>(3, num_rows * at_once);
  for (int64_t n = 0; n < count; n += at_once) {
    int64_t real = std::min(at_once, count - n), whole = (real + 7) / 8 * 8;
    for (int64_t from = 0; from < padded; from += span) {
      int64_t to = std::min(from + span, padded);
      for (int64_t i = 0; i < real; ++i)
        decode_row<F>(p, first + n + i, from, to, scales + n + i, zeros + n + i, w + i * w_stride);
      for (int64_t i = real; i < whole; ++i) std::memset(w + i * w_stride, 0, (to - from) * sizeof(Element));
      for (int64_t k = from; k < to; k += kChunk<Element>)
        multiply_rows<Element>(p, row, num_rows, w + (k - from), w_stride, k, std::min(kChunk<Element>, to - k), whole, sums,
                               at_once);
    }
    if (p.out_type == ffi::DataType::F32)
      finish<float>(p, row, num_rows, first + n, real, scales + n, sums, at_once);
    else
      finish<Half>(p, row, num_rows, first + n, real, scales + n, sums, at_once);
  }
}

using RunPanel = void (*)(const Problem&, int64_t);

template <typename Element>
RunPanel runner_of(ffi::DataType stored) {
  if (stored == ffi::DataType::S4) return run_panel<Format::kInt4, Element>;
  if (stored == ffi::DataType::S8) return run_panel<Format::kInt8, Element>;
  if (stored == ffi::DataType::F8E4M3FN) return run_panel<Format::kFp8, Element>;
  return nullptr;
}

// ---- Threads

// Whoever comes takes the next piece. The caller takes pieces itself and waits only for those that others have begun,
// so that a pool whose threads are all busy, or wait in calls like this one, holds nothing up.
struct Work {
  std::atomic<int64_t> next{0}, done{0};
  int64_t count;
  const Problem* problem;  // as long as pieces are left
  RunPanel run;

  void take() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      run(*problem, i);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

void run_all(ffi::ThreadPool pool, const Problem& problem, RunPanel run, int64_t count) {
  auto work = std::make_shared<Work>();
  work->count = count, work->problem = &problem, work->run = run;
  int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->take(); });
  work->take();
  for (int spins = 0; work->done.load(std::memory_order_acquire) < count; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

// Outputs of a panel: as many as leave no thread without work at the end, but for a twentieth of the time. Of few rows
// small panels, which are decoded eight outputs at a time in any case.
int64_t panel_of(int64_t rows, int64_t outputs, int64_t threads) {
  if (rows <= kFewRows) return 32;
  int64_t blocks = (rows + kRowBlock - 1) / kRowBlock, best = 32;
  double best_use = 0;
  for (int64_t panel : {128, 96, 64, 32}) {
    int64_t pieces = (outputs + panel - 1) / panel * blocks, rounds = (pieces + threads - 1) / threads;
    double use = double(outputs * blocks) / double(rounds * threads * panel);
    if (use > best_use + 0.05) best = panel, best_use = use;
  }
  return best;
}

// ---- The call

ffi::Error packed_product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer stored, ffi::AnyBuffer scales,
                          ffi::AnyBuffer zeros, ffi::Result<ffi::AnyBuffer> out) {
  Problem p;
  p.rows = x.dimensions()[0], p.stride = x.dimensions()[1];
  p.outputs = stored.dimensions()[0], p.inputs = stored.dimensions()[1];
  p.groups = scales.dimensions()[0], p.group = p.groups > 1 ? p.inputs / p.groups : 0;
  if (p.stride != (p.inputs + kPad - 1) / kPad * kPad)
    return ffi::Error::InvalidArgument("activations are not padded to a multiple of 32");
  p.x = x.untyped_data(), p.stored = static_cast<const uint8_t*>(stored.untyped_data());
  p.scales = scales.untyped_data(), p.scale_type = scales.element_type();
  p.zeros = zeros.element_count() ? static_cast<const int8_t*>(zeros.untyped_data()) : nullptr;
  p.out = out->untyped_data(), p.out_type = out->element_type();
  if (p.out_type != ffi::DataType::F32 && p.out_type != ffi::DataType::BF16)
    return ffi::Error::InvalidArgument("results are float32 or bfloat16");
  RunPanel run = nullptr;
  if (x.element_type() == ffi::DataType::F32) run = runner_of<float>(stored.element_type());
#ifdef QUIRE_AVX512
  if (x.element_type() == ffi::DataType::BF16) run = runner_of<Half>(stored.element_type());
#endif
  if (!run) return ffi::Error::InvalidArgument("no product of these types");
  p.panel = panel_of(p.rows, p.outputs, std::max<int64_t>(pool.num_threads(), 1));
  p.num_panels = (p.outputs + p.panel - 1) / p.panel;
  int64_t blocks = (p.rows + kRowBlock - 1) / kRowBlock;
  run_all(pool, p, run, p.num_panels * blocks);
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
                                  .Ret<xla::ffi::AnyBuffer>());

extern "C" int quire_dots_of_bfloat16() {
#ifdef QUIRE_AVX512
  return 1;
#else
  return 0;
#endif
}
