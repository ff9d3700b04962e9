// Norms, gates and rotated heads, row by row, as custom calls of XLA on a CPU.
//
// Each pass reads a row once, in float32 lanes, and writes it once; numbers are rounded to the rows' type where
// `rowwise/api.py` says so. A row's sums have one order, whatever rows are beside it.
#include <algorithm>
#include <cmath>

#include "attention_math.h"
#include "threads.h"
#include "units.h"
#include "xla/ffi/api/ffi.h"

namespace quire {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kPieceNumbers = 1 << 14;  // that are worth waking another thread

// ---- Vectors of a row

inline void put_lanes(float* to, const Lanes& lanes) { put(to, lanes); }

inline void put_lanes(Half* to, const Lanes& lanes) {
#ifdef QUIRE_AVX512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(lanes));
#else
  float values[kLanes];
  put(values, lanes);
  for (int i = 0; i < kLanes; ++i) to[i] = half_of(values[i]);
#endif
}

inline void put_lanes(_Float16* to, const Lanes& lanes) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT));
#else
  float values[kLanes];
  put(values, lanes);
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<_Float16>(values[i]);
#endif
}

template <typename T>
inline Lanes rounded(const Lanes& lanes) {
  if constexpr (sizeof(T) == 4) return lanes;
  T kept[kLanes];
  put_lanes(kept, lanes);
  return widen_lanes(kept);
}

// Calls `run` with the start of each vector of `count` numbers and how many of its lanes there are.
template <typename Run>
inline void for_vectors(int64_t count, Run run) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) run(k, kLanes);
  if (k < count) run(k, static_cast<int>(count - k));
}

template <typename T>
inline Lanes read(const T* from, int count) {
  if (count == kLanes) return widen_lanes(from);
  T kept[kLanes] = {};
  std::memcpy(kept, from, count * sizeof(T));
  return widen_lanes(kept);
}

template <typename T>
inline void write(T* to, const Lanes& lanes, int count) {
  if (count == kLanes) return put_lanes(to, lanes);
  T kept[kLanes];
  put_lanes(kept, lanes);
  std::memcpy(to, kept, count * sizeof(T));
}

// ---- Norms

// What numbers are multiplied with, so that their mean square is 1.
template <typename T>
float inverse_rms(const T* x, int64_t count, float eps) {
  Lanes sums[4] = {};
  int turn = 0;
  for_vectors(count, [&](int64_t k, int real) {
    Lanes each = read(x + k, real);
    sums[turn] += each * each;
    turn = (turn + 1) % 4;
  });
  float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return 1.0f / std::sqrt(sum / static_cast<float>(count) + eps);
}

template <typename T>
void norm_row(const T* x, const T* weight, int64_t count, float eps, T* out) {
  Lanes factor = all(inverse_rms(x, count, eps));
  for_vectors(count, [&](int64_t k, int real) {
    write(out + k, rounded<T>(read(x + k, real) * factor) * read(weight + k, real), real);
  });
}

struct NormProblem {
  const void *x, *residual, *weight;  // residual: null = none
  void *out, *sum;
  int64_t rows, count, block;
  float eps;
};

template <typename T>
void run_norm(const void* problem, int64_t index) {
  const auto& p = *static_cast<const NormProblem*>(problem);
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t row = index * p.block; row < std::min((index + 1) * p.block, p.rows); ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.count;
    if (p.residual) {
      const T* residual = static_cast<const T*>(p.residual) + row * p.count;
      T* sum = static_cast<T*>(p.sum) + row * p.count;
      for_vectors(p.count, [&](int64_t k, int real) { write(sum + k, read(x + k, real) + read(residual + k, real), real); });
      x = sum;
    }
    norm_row(x, weight, p.count, p.eps, static_cast<T*>(p.out) + row * p.count);
  }
}

// ---- Gates

enum Activation : int64_t { kSilu, kGeluTanh };

template <Activation A>
inline Lanes activate(const Lanes& x) {
  if constexpr (A == kGeluTanh) {
    Lanes inner = (x + x * x * x * 0.044715f) * 0.7978845608028654f;
    return x * 0.5f * (tanh_of(inner) + 1.0f);
  }
  Lanes t = exp2_of((x < 0.0f ? x : -x) * kLog2E);
  return (x < 0.0f ? x * t : x) / (t + 1.0f);
}

struct GateProblem {
  const void* x;
  void* out;
  int64_t rows, count, block;
};

template <typename T, Activation A>
void run_gate(const void* problem, int64_t index) {
  const auto& p = *static_cast<const GateProblem*>(problem);
  for (int64_t row = index * p.block; row < std::min((index + 1) * p.block, p.rows); ++row) {
    const T* gates = static_cast<const T*>(p.x) + row * 2 * p.count;
    T* out = static_cast<T*>(p.out) + row * p.count;
    for_vectors(p.count, [&](int64_t k, int real) {
      write(out + k, rounded<T>(activate<A>(read(gates + k, real))) * read(gates + p.count + k, real), real);
    });
  }
}

// ---- Heads

struct HeadsProblem {
  const void *qkv, *norms[2];  // null = not normed
  const float *cos, *sin;
  void* out[3];
  int64_t rows, counts[3], dim, turned, block;
  float eps;
};

// `out = x cos + (x with its halves exchanged) sin`, of the first `size` dims.
template <typename T>
void turn(const T* x, const float* cos, const float* sin, int64_t size, T* out) {
  int64_t half = size / 2;
  auto part = [&](const T* a, const T* b, int64_t at) {
    for_vectors(half, [&](int64_t k, int real) {
      Lanes value = read(a + k, real) * read(cos + at + k, real) + read(b + k, real) * read(sin + at + k, real);
      write(out + at + k, value, real);
    });
  };
  part(x, x + half, 0), part(x + half, x, half);
}

template <typename T>
void run_heads(const void* problem, int64_t index) {
  const auto& p = *static_cast<const HeadsProblem*>(problem);
  int64_t width = (p.counts[0] + p.counts[1] + p.counts[2]) * p.dim;
  T* normed = scratch<T>(0, p.dim);
  for (int64_t row = index * p.block; row < std::min((index + 1) * p.block, p.rows); ++row) {
    const T* x = static_cast<const T*>(p.qkv) + row * width;
    for (int which = 0; which < 3; ++which) {
      T* out = static_cast<T*>(p.out[which]) + row * p.counts[which] * p.dim;
      for (int64_t head = 0; head < p.counts[which]; ++head, x += p.dim, out += p.dim) {
        const T* from = x;
        if (which < 2 && p.norms[which]) {
          norm_row(x, static_cast<const T*>(p.norms[which]), p.dim, p.eps, normed);
          from = normed;
        }
        int64_t size = which < 2 ? p.turned : 0;
        if (size) turn(from, p.cos + row * size, p.sin + row * size, size, out);
        std::memcpy(out + size, from + size, (p.dim - size) * sizeof(T));
      }
    }
  }
}

// ---- The calls

template <typename P>
void run_rows(ffi::ThreadPool pool, P& p, int64_t numbers, Piece run) {
  p.block = std::max<int64_t>(kPieceNumbers / std::max<int64_t>(numbers, 1), 1);
  int64_t pieces = (p.rows + p.block - 1) / p.block;
  if (pieces > 1)
    run_all(pool, &p, run, pieces);
  else if (pieces)
    run(&p, 0);
}

// The one of three functions for the rows' type; null if there is none.
Piece of_type(ffi::DataType type, Piece floats, Piece halves, Piece floats16) {
  return type == ffi::DataType::F32 ? floats : type == ffi::DataType::BF16 ? halves
                                             : type == ffi::DataType::F16  ? floats16
                                                                           : nullptr;
}

ffi::Error no_type() { return ffi::Error::InvalidArgument("rows are float32, bfloat16 or float16"); }

ffi::Error rms_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer residual, ffi::AnyBuffer weight,
                    ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> sum, float eps) {
  Piece run = of_type(x.element_type(), run_norm<float>, run_norm<Half>, run_norm<_Float16>);
  if (!run) return no_type();
  NormProblem p;
  p.x = x.untyped_data(), p.residual = residual.element_count() ? residual.untyped_data() : nullptr;
  p.weight = weight.untyped_data(), p.out = out->untyped_data(), p.sum = sum->untyped_data();
  p.rows = x.dimensions()[0], p.count = x.dimensions()[1], p.eps = eps;
  run_rows(pool, p, p.count, run);
  return ffi::Error::Success();
}

ffi::Error gate(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out, int64_t activation) {
  Piece run = activation == kSilu
                  ? of_type(x.element_type(), run_gate<float, kSilu>, run_gate<Half, kSilu>, run_gate<_Float16, kSilu>)
                  : of_type(x.element_type(), run_gate<float, kGeluTanh>, run_gate<Half, kGeluTanh>,
                            run_gate<_Float16, kGeluTanh>);
  if (!run) return no_type();
  GateProblem p;
  p.x = x.untyped_data(), p.out = out->untyped_data();
  p.rows = x.dimensions()[0], p.count = x.dimensions()[1] / 2;
  run_rows(pool, p, 4 * p.count, run);
  return ffi::Error::Success();
}

ffi::Error turns(ffi::Buffer<ffi::F32> angles, ffi::Result<ffi::Buffer<ffi::F32>> cos,
                 ffi::Result<ffi::Buffer<ffi::F32>> sin, float scale) {
  int64_t half = angles.dimensions()[1];
  for (int64_t row = 0; row < angles.dimensions()[0]; ++row) {
    float *c = cos->typed_data() + row * 2 * half, *s = sin->typed_data() + row * 2 * half;
    for (int64_t k = 0; k < half; ++k) {
      float angle = angles.typed_data()[row * half + k];
      c[k] = c[half + k] = std::cos(angle) * scale;
      s[half + k] = std::sin(angle) * scale, s[k] = -s[half + k];
    }
  }
  return ffi::Error::Success();
}

ffi::Error heads(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                 ffi::AnyBuffer q_norm, ffi::AnyBuffer k_norm, ffi::Result<ffi::AnyBuffer> q,
                 ffi::Result<ffi::AnyBuffer> k, ffi::Result<ffi::AnyBuffer> v, float eps) {
  Piece run = of_type(qkv.element_type(), run_heads<float>, run_heads<Half>, run_heads<_Float16>);
  if (!run) return no_type();
  HeadsProblem p;
  p.qkv = qkv.untyped_data(), p.cos = cos.typed_data(), p.sin = sin.typed_data();
  p.norms[0] = q_norm.element_count() ? q_norm.untyped_data() : nullptr;
  p.norms[1] = k_norm.element_count() ? k_norm.untyped_data() : nullptr;
  ffi::Result<ffi::AnyBuffer>* results[] = {&q, &k, &v};
  for (int i = 0; i < 3; ++i)
    p.out[i] = (*results[i])->untyped_data(), p.counts[i] = (*results[i])->dimensions()[1];
  p.rows = qkv.dimensions()[0], p.dim = q->dimensions()[2], p.turned = cos.dimensions()[1], p.eps = eps;
  run_rows(pool, p, qkv.dimensions()[1], run);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace quire

using Any = xla::ffi::AnyBuffer;
using Floats32 = xla::ffi::Buffer<xla::ffi::F32>;

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    quire_rms_norm, quire::rms_norm,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Arg<Any>().Arg<Any>().Arg<Any>().Ret<Any>().Ret<Any>().Attr<float>(
        "eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    quire_gate, quire::gate,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Arg<Any>().Ret<Any>().Attr<int64_t>("activation"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_turns, quire::turns,
                              xla::ffi::Ffi::Bind().Arg<Floats32>().Ret<Floats32>().Ret<Floats32>().Attr<float>("scale"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_heads, quire::heads,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<Any>()
                                  .Arg<Floats32>()
                                  .Arg<Floats32>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Attr<float>("eps"));
