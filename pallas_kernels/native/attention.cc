// Attention over the pages of a KV cache, as a custom call of XLA on a CPU: decode rows, prompt chunks, drafts alike.
//
// A tile is a run of one sequence's new tokens with all query heads of one kv head. It walks over the keys that it sees
// in chunks of `kChunkKeys`, from absolute positions on. Of a chunk it reads the keys, block by block, into its cache,
// multiplies them with all its rows, computes each row's softmax of the chunk, reads the values and multiplies them
// with the weights. Chunks are joined in their order. Where there are too few tiles for the threads, the chunks of one
// are computed apart; whoever finishes the last one joins them, in the same order with the same function. So a row's
// bits depend on its own query, keys and values alone.
#include <algorithm>
#include <vector>

#include "attention_batch.h"
#include "attention_math.h"
#include "attention_read.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace quire::paged {
namespace {

constexpr int64_t kStride = kChunkKeys + 16;  // words of a row of scores; powers of two share sets of a cache

// A thread's memory for one tile.
struct Room {
  float *queries, *operand, *scores, *part, *values, *key_scales, *value_scales;
  Seen* seen;
  int64_t query_stride;

  Room(const Problem& p, int64_t rows, int64_t steps) : query_stride(steps + 16) {
    int64_t width = width_of(p.dims), operand_size = kBlock * std::max(steps, width);
    int64_t sizes[] = {rows * query_stride, operand_size,  rows * kStride, p.part_size(rows),
                       rows * width,        up_to(2 * rows, 16), kChunkKeys,         kChunkKeys};
    int64_t total = 0;
    for (int64_t size : sizes) total += up_to(size, 16);
    float* at = scratch<float>(0, total);
    float** places[] = {&queries, &operand, &scores, &part, &values, reinterpret_cast<float**>(&seen), &key_scales,
                        &value_scales};
    for (int i = 0; i < 8; ++i) *places[i] = at, at += up_to(sizes[i], 16);
  }
};

// ---- Queries and results

float query_at(const Problem& p, int64_t index) {
  if (p.type == ffi::DataType::F32) return reinterpret_cast<const float*>(p.q)[index];
  if (p.type == ffi::DataType::BF16) return float_of(reinterpret_cast<const Half*>(p.q)[index]);
  return widen(reinterpret_cast<const _Float16*>(p.q)[index]);
}

template <typename Element>
void read_queries(const Problem& p, const Tile& tile, float* out, int64_t stride) {
  for (int64_t m = 0; m < tile.count * p.group; ++m) {
    int64_t at = ((tile.row + m / p.group) * p.heads + tile.head * p.group + m % p.group) * p.dims;
    Element* to = reinterpret_cast<Element*>(out + m * stride);
    if (p.type == (sizeof(Element) == 2 ? ffi::DataType::BF16 : ffi::DataType::F32))
      std::memcpy(to, p.q + at * sizeof(Element), p.dims * sizeof(Element));
    else
      for (int64_t d = 0; d < p.dims; ++d) store(to + d, query_at(p, at + d));
    if (p.dims % kInputs<Element>) to[p.dims] = 0;
  }
}

void start(const Problem& p, const Tile& tile, Room& room) {
  for (int64_t m = 0; m < tile.count * p.group; ++m)
    room.seen[m] = p.sinks ? Seen{p.sinks[tile.head * p.group + m % p.group] * kLog2E, 1} : Seen{kMasked, 0};
  std::fill_n(room.values, tile.count * p.group * width_of(p.dims), 0.0f);
}

void store_row(Half* out, const float* values, int64_t count) {
  int64_t d = 0;
#ifdef QUIRE_AVX512
  for (; d + 32 <= count; d += 32)
    _mm512_storeu_si512(out + d, join(_mm512_loadu_ps(values + d), _mm512_loadu_ps(values + d + 16)));
#endif
  for (; d < count; ++d) out[d] = half_of(values[d]);
}

void store_row(_Float16* out, const float* values, int64_t count) {
  int64_t d = 0;
#ifdef QUIRE_WIDE
  for (; d + 16 <= count; d += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d), _mm512_cvtps_ph(_mm512_loadu_ps(values + d), 0));
#endif
  for (; d < count; ++d) out[d] = static_cast<_Float16>(values[d]);
}

void finish(const Problem& p, const Tile& tile, const Room& room) {
  int64_t width = width_of(p.dims);
  for (int64_t m = 0; m < tile.count * p.group; ++m) {
    int64_t at = ((tile.row + m / p.group) * p.heads + tile.head * p.group + m % p.group) * p.dims;
    float* values = room.values + m * width;
    float sum = room.seen[m].sum;
    Lanes share = all(sum == 0 ? 0.0f : 1 / sum);  // 0: a row that sees nothing
    for (int64_t d = 0; d < width; d += kLanes) put(values + d, lanes_at(values + d) * share);
    if (p.type == ffi::DataType::F32)
      std::memcpy(p.out + at * 4, values, p.dims * 4);
    else if (p.type == ffi::DataType::BF16)
      store_row(reinterpret_cast<Half*>(p.out) + at, values, p.dims);
    else
      store_row(reinterpret_cast<_Float16*>(p.out) + at, values, p.dims);
  }
}

// ---- One chunk

void read_scales(const Problem& p, const Tile& tile, const Range& range, const Room& room) {
  const int32_t* table = p.tables + tile.sequence * p.table_width;
  int64_t page = (range.base + range.from) / p.page_size, offset = (range.base + range.from) % p.page_size, run;
  for (int64_t key = range.from; key < up_to(range.until, kBlock); key += run, offset = 0, ++page) {
    run = std::min(p.page_size - offset, up_to(range.until, kBlock) - key);
    const float* keys = p.scales + p.row_of(table, page, 0, tile.head, offset);
    const float* values = p.scales + p.row_of(table, page, 1, tile.head, offset);
    int64_t first = tile.first - range.base - key, last = tile.last - range.base - key;
    for (int64_t j = 0; j < run; ++j) {
      bool seen = j >= first && j < last;
      room.key_scales[key + j] = seen ? keys[j] : 0;
      room.value_scales[key + j] = seen ? values[j] : 0;
    }
  }
}

// The first key that no row of a block of rows sees, up to `m` and without it, relative to `base`.
int64_t end_of(const Problem& p, const Tile& tile, int64_t m, int64_t base) {
  return std::min(tile.position + (m - 1) / p.group + 1 - base, kChunkKeys);
}

// Turns dots into weights, row by row, up to where the row's block needs them.
template <typename Element>
void weigh_rows(const Problem& p, const Tile& tile, Room& room, int64_t base, int64_t from, Seen* seen) {
  for_tiles(tile.count * p.group, kMostRows, [&](int64_t first_row, int64_t rows) {
    int64_t until = std::max<int64_t>(end_of(p, tile, first_row + rows, base), 0);
    for (int64_t m = first_row; m < first_row + rows; ++m) {
      int64_t last = std::max<int64_t>(end_of(p, tile, m + 1, base), 0), position = tile.position + m / p.group;
      int64_t first = p.window ? std::max<int64_t>(position - p.window + 1 - base, 0) : 0;
      seen[m] = weigh<Element>(room.scores + m * kStride, std::min(first, last), last, from, until,
                               p.scales ? room.key_scales : nullptr, p.scales ? room.value_scales : nullptr, p.rule);
    }
  });
}

// What the rows see of a chunk: `seen`, and weighted values `[rows, width]`.
template <typename Element>
void run_chunk(const Problem& p, const Tile& tile, Room& room, Course& course, int64_t chunk, Seen* seen,
               float* values) {
  int64_t steps = (p.dims + kInputs<Element> - 1) / kInputs<Element>, stored = steps_of<Element>(p.dims);
  int64_t width = width_of(p.dims), rows = tile.count * p.group;
  Range range(tile, chunk);
  if (p.scales) read_scales(p, tile, range, room);
  for (int64_t block = range.from; block < range.until; block += kBlock) {
    const uint8_t* const* ahead = course.ahead();
    p.read_keys(course.next(), ahead, p.dims, room.operand);
    for_tiles(rows, kMostRows, [&](int64_t m, int64_t count) {
      if (end_of(p, tile, m + count, range.base) <= block) return;
      product_for<Element>(count)(room.queries + m * room.query_stride, room.query_stride, room.operand, kLanes,
                                  stored * kLanes, steps, kBlock / kLanes, room.scores + m * kStride + block, kStride,
                                  true);
    });
  }
  weigh_rows<Element>(p, tile, room, range.base, range.from, seen);
  for (int64_t block = range.from; block < range.until; block += kBlock) {
    const uint8_t* const* ahead = course.ahead();
    p.read_values(course.next(), ahead, p.dims, room.operand);
    for_tiles(rows, kMostRows, [&](int64_t m, int64_t count) {
      int64_t keys = std::min(end_of(p, tile, m + count, range.base) - block, kBlock);
      if (keys <= 0) return;
      product_for<Element>(count)(room.scores + m * kStride + block / kInputs<Element>, kStride, room.operand, width,
                                  kLanes, (keys + kInputs<Element> - 1) / kInputs<Element>, width / kLanes,
                                  values + m * width, width, block == range.from);
    });
  }
}

// ---- Tiles

void join_parts(const Problem& p, const Tile& tile, Room& room, const float* part, int64_t chunks) {
  int64_t rows = tile.count * p.group, width = width_of(p.dims);
  for (; chunks; --chunks, part += p.part_size(rows))
    for (int64_t m = 0; m < rows; ++m)
      join_chunk(room.seen[m], room.values + m * width, reinterpret_cast<const Seen*>(part)[m],
                 part + up_to(2 * rows, kLanes) + m * width, width);
}

template <typename Element>
void run_item(const void* problem, int64_t index) {
  const Problem& p = *static_cast<const Problem*>(problem);
  const Item& item = p.items[index];
  const Tile& tile = p.tiles[item.tile];
  int64_t rows = tile.count * p.group;
  Room room(p, rows, steps_of<Element>(p.dims));
  read_queries<Element>(p, tile, room.queries, room.query_stride);
  if (tile.parts < 0) start(p, tile, room);
  Course course(p, index);
  for (int64_t chunk = item.from; chunk < item.until; ++chunk) {
    float* part = tile.parts < 0 ? room.part : p.parts + tile.parts + (chunk - tile.first_chunk()) * p.part_size(rows);
    run_chunk<Element>(p, tile, room, course, chunk, reinterpret_cast<Seen*>(part), part + up_to(2 * rows, kLanes));
    if (tile.parts < 0) join_parts(p, tile, room, part, 1);
  }
  if (tile.parts >= 0) {
    int64_t done = item.until - item.from;
    if (p.left[tile.left].fetch_sub(done, std::memory_order_acq_rel) != done) return;
    start(p, tile, room);
    join_parts(p, tile, room, p.parts + tile.parts, tile.chunks());
  }
  finish(p, tile, room);
}

// ---- The call

template <typename Element, Stored S>
Piece reads(Problem& p) {
  p.read_keys = read_keys<Element, S>, p.read_values = read_values<Element, S>;
  return run_item<Element>;
}

template <typename Element>
Piece runner_for(Problem& p, ffi::DataType stored) {
  if (stored == ffi::DataType::BF16) return reads<Element, Stored::kHalf>(p);
  if (stored == ffi::DataType::S8) return reads<Element, Stored::kInt8>(p);
  if (stored == ffi::DataType::F8E4M3FN) return reads<Element, Stored::kFp8>(p);
  if constexpr (sizeof(Element) == 4) {
    if (stored == ffi::DataType::F32) return reads<Element, Stored::kFloat>(p);
    if (stored == ffi::DataType::F16) return reads<Element, Stored::kFloat16>(p);
  }
  return nullptr;
}

Piece runner_of(Problem& p, ffi::DataType stored) {
#ifdef QUIRE_AVX512
  if (p.type == ffi::DataType::BF16)
    if (Piece run = runner_for<Half>(p, stored)) return run;
#endif
  if (p.type == ffi::DataType::F32 || p.type == ffi::DataType::BF16 || p.type == ffi::DataType::F16)
    return runner_for<float>(p, stored);
  return nullptr;
}

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer data, ffi::Buffer<ffi::F32> scales,
                     ffi::Buffer<ffi::F32> sinks, ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> contexts,
                     ffi::Buffer<ffi::S32> tables, ffi::Buffer<ffi::S32> count, ffi::Result<ffi::AnyBuffer> out,
                     float scale, float cap, int64_t window) {
  Problem p;
  auto shape = data.dimensions();
  p.pages = shape[0], p.kv_heads = shape[2], p.page_size = shape[3], p.dims = shape[4];
  int64_t tokens = q.dimensions()[0];
  p.heads = q.dimensions()[1], p.group = p.heads / p.kv_heads, p.table_width = tables.dimensions()[1];
  p.q = static_cast<const uint8_t*>(q.untyped_data()), p.data = static_cast<const uint8_t*>(data.untyped_data());
  p.scales = scales.element_count() ? scales.typed_data() : nullptr;
  p.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  p.tables = tables.typed_data();
  p.out = static_cast<uint8_t*>(out->untyped_data()), p.type = q.element_type();
  p.window = window, p.rule = {scale, cap};
  Piece run = runner_of(p, data.element_type());
  if (!run) return ffi::Error::InvalidArgument("no attention of these types");
  p.row_bytes = data.size_bytes() / std::max<int64_t>(data.element_count() / p.dims, 1);
  std::vector<uint8_t> nothing(p.dims * 4 + 64);
  p.nothing = nothing.data();
  int64_t sequences = std::min<int64_t>(std::max(count.typed_data()[0], 0), contexts.dimensions()[0]);
  int64_t live = std::min<int64_t>(std::max(starts.typed_data()[sequences], 0), tokens);
  size_t row_bytes = out->size_bytes() / std::max<int64_t>(tokens, 1);
  std::memset(p.out + live * row_bytes, 0, (tokens - live) * row_bytes);
  make_tiles(p, starts.typed_data(), contexts.typed_data(), sequences, live);
  p.threads = std::max<int64_t>(pool.num_threads(), 1);
  make_items(p);
  if (p.threads > 1)
    run_all(pool, &p, run, p.items.size());
  else
    for (size_t i = 0; i < p.items.size(); ++i) run(&p, i);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace quire::paged

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_paged_attention, quire::paged::attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("cap")
                                  .Attr<int64_t>("window"));
