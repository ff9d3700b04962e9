// Attention over the pages of a KV cache, as a custom call of XLA on a CPU: decode rows, prompt chunks and drafts alike.
//
// A tile is a run of one sequence's new tokens with all query heads of one kv head. It walks over the keys that it sees in
// chunks of `kChunkKeys`, from absolute positions on. Of a chunk it reads the keys, block by block, into its cache, multiplies
// them with all its rows, computes each row's softmax of the chunk, reads the values and multiplies them with the
// weights. Chunks are joined in their order. Where there are too few tiles for the threads, a tile's chunks are computed
// apart, and whoever finishes the last one joins them, in the same order with the same function. So the bits of a row
// depend on its own query, keys and values alone.
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "attention_math.h"
#include "attention_read.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace quire {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kTileRows = 96;       // rows, tokens times query heads, that share a reading of keys
constexpr int64_t kAloneWork = 1 << 15; // keys times heads that are not worth waking another thread
constexpr int64_t kStride = kChunkKeys + 16;  // words of a row of scores; not a power of two, which shares sets of a cache

struct Tile {
  int64_t sequence, head, row, count;  // the kv head; the first token row, and how many
  int64_t position;                    // of the first row in its sequence
  int64_t first, last;                 // keys that any row sees
  int64_t parts = -1, left = -1;       // where its chunks' results wait, and their number; -1 = joined at once
  int64_t first_chunk() const { return first / kChunkKeys; }
  int64_t chunks() const { return first < last ? (last + kChunkKeys - 1) / kChunkKeys - first_chunk() : 0; }
};

struct Item {  // some chunks of a tile
  int64_t tile, from, until;
};

struct Problem {
  int64_t heads, kv_heads, group, dims, page_size, pages, table_width, row_bytes;
  const uint8_t* q;
  const uint8_t* data;
  const float* scales;  // null = none
  const float* sinks;
  const int32_t* tables;
  uint8_t* out;
  ffi::DataType type;  // of queries and results
  int64_t window;      // 0 = all
  ScoreRule rule;
  const uint8_t* nothing;  // a row of zeros
  std::vector<Tile> tiles;
  std::vector<Item> items;
  std::unique_ptr<std::atomic<int64_t>[]> left;
  float* parts;  // of a chunk: top and sum of each row, then their values

  int64_t part_size(int64_t rows) const { return up_to(2 * rows, kLanes) + rows * width_of(dims); }
};

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

void finish(const Problem& p, const Tile& tile, const Room& room) {
  int64_t width = width_of(p.dims);
  for (int64_t m = 0; m < tile.count * p.group; ++m) {
    int64_t at = ((tile.row + m / p.group) * p.heads + tile.head * p.group + m % p.group) * p.dims;
    float* values = room.values + m * width;
    Lanes share = all(room.seen[m].sum > 0 || room.seen[m].sum != room.seen[m].sum ? 1 / room.seen[m].sum : 0.0f);
    for (int64_t d = 0; d < width; d += kLanes) put(values + d, lanes_at(values + d) * share);
    if (p.type == ffi::DataType::F32) {
      std::memcpy(p.out + at * 4, values, p.dims * 4);
    } else if (p.type == ffi::DataType::BF16) {
      auto* to = reinterpret_cast<Half*>(p.out) + at;
      for (int64_t d = 0; d < p.dims; ++d) to[d] = half_of(values[d]);
    } else {
      auto* to = reinterpret_cast<_Float16*>(p.out) + at;
      for (int64_t d = 0; d < p.dims; ++d) to[d] = static_cast<_Float16>(values[d]);
    }
  }
}

// ---- One chunk

// Where a block's keys (`which` 0) or values (1) lie; those that no row sees are zeros. With keys, the scales of both.
void locate(const Problem& p, const Tile& tile, const Room& room, int64_t base, int64_t block, int which,
            const uint8_t** rows) {
  const int32_t* table = p.tables + tile.sequence * p.table_width;
  int64_t page = (base + block) / p.page_size, offset = (base + block) % p.page_size;
  int64_t values = p.kv_heads * p.page_size, run;
  for (int64_t i = 0; i < kBlock; i += run, offset = 0, ++page) {
    run = std::min(p.page_size - offset, kBlock - i);
    int64_t id = page < p.table_width ? std::min<int64_t>(std::max(table[page], 0), p.pages - 1) : 0;
    int64_t at = (id * 2 * p.kv_heads + tile.head) * p.page_size + offset;
    const uint8_t* row = p.data + (at + which * values) * p.row_bytes;
    int64_t first = tile.first - base - block - i, last = tile.last - base - block - i;
    for (int64_t j = 0; j < run; ++j) rows[i + j] = j >= first && j < last ? row + j * p.row_bytes : p.nothing;
    if (!p.scales || which) continue;
    for (int64_t j = 0; j < run; ++j) {
      bool seen = j >= first && j < last;
      room.key_scales[block + i + j] = seen ? p.scales[at + j] : 0;
      room.value_scales[block + i + j] = seen ? p.scales[at + values + j] : 0;
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

// What the rows see of the keys from `base` on: `seen`, and weighted values `[rows, width]`.
template <typename Element, Stored S>
void run_chunk(const Problem& p, const Tile& tile, Room& room, int64_t base, Seen* seen, float* values) {
  int64_t steps = (p.dims + kInputs<Element> - 1) / kInputs<Element>;
  int64_t stored = steps_of<Element>(p.dims), width = width_of(p.dims), rows = tile.count * p.group;
  int64_t from = std::max<int64_t>(tile.first - base, 0) / kBlock * kBlock, until = std::min(tile.last - base, kChunkKeys);
  const uint8_t* places[2][kBlock];
  int turn = 0;
  auto find = [&](int64_t block, int which) { locate(p, tile, room, base, block, which, places[turn ^ 1]); };  // the next
  find(from, 0), turn ^= 1;
  for (int64_t block = from; block < until; block += kBlock, turn ^= 1) {
    block + kBlock < until ? find(block + kBlock, 0) : find(from, 1);
    read_keys<Element, S>(places[turn], places[turn ^ 1], p.dims, room.operand);
    for_tiles(rows, kMostRows, [&](int64_t m, int64_t count) {
      if (end_of(p, tile, m + count, base) <= block) return;
      product_for<Element>(count)(room.queries + m * room.query_stride, room.query_stride, room.operand, kLanes,
                                  stored * kLanes, steps, kBlock / kLanes, room.scores + m * kStride + block, kStride,
                                  true);
    });
  }
  weigh_rows<Element>(p, tile, room, base, from, seen);
  for (int64_t block = from; block < until; block += kBlock, turn ^= 1) {
    if (block + kBlock < until)
      find(block + kBlock, 1);
    else
      std::fill_n(places[turn ^ 1], kBlock, p.nothing);
    read_values<Element, S>(places[turn], places[turn ^ 1], p.dims, room.operand);
    for_tiles(rows, kMostRows, [&](int64_t m, int64_t count) {
      int64_t keys = std::min(end_of(p, tile, m + count, base) - block, kBlock);
      if (keys <= 0) return;
      product_for<Element>(count)(room.scores + m * kStride + block / kInputs<Element>, kStride, room.operand, width,
                                  kLanes, (keys + kInputs<Element> - 1) / kInputs<Element>, width / kLanes,
                                  values + m * width, width, block == from);
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

template <typename Element, Stored S>
void run_item(const void* problem, int64_t index) {
  const Problem& p = *static_cast<const Problem*>(problem);
  const Item& item = p.items[index];
  const Tile& tile = p.tiles[item.tile];
  int64_t rows = tile.count * p.group;
  Room room(p, rows, steps_of<Element>(p.dims));
  read_queries<Element>(p, tile, room.queries, room.query_stride);
  if (tile.parts < 0) start(p, tile, room);
  for (int64_t chunk = item.from; chunk < item.until; ++chunk) {
    float* part = tile.parts < 0 ? room.part : p.parts + tile.parts + (chunk - tile.first_chunk()) * p.part_size(rows);
    run_chunk<Element, S>(p, tile, room, chunk * kChunkKeys, reinterpret_cast<Seen*>(part), part + up_to(2 * rows, kLanes));
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

// Cuts the batch into tiles, the last rows of a sequence first: they see most.
void make_tiles(Problem& p, const int32_t* starts, const int32_t* contexts, int64_t sequences, int64_t tokens) {
  int64_t most = std::max<int64_t>(kTileRows / p.group, 1);
  for (int64_t s = 0; s < sequences; ++s) {
    int64_t begin = std::min<int64_t>(std::max(starts[s], 0), tokens);
    int64_t end = std::min<int64_t>(std::max<int64_t>(starts[s + 1], begin), tokens);
    int64_t context = std::min<int64_t>(contexts[s], p.table_width * p.page_size);
    for (int64_t row = begin + (end - begin - 1) / most * most; row >= begin && row < end; row -= most) {
      Tile tile{s, 0, row, std::min(most, end - row), context - (end - row)};
      tile.first = p.window ? std::max<int64_t>(tile.position - p.window + 1, 0) : 0;
      tile.last = std::max<int64_t>(tile.position + tile.count, 0);
      for (tile.head = 0; tile.head < p.kv_heads; ++tile.head) p.tiles.push_back(tile);
    }
  }
}

// Makes items of tiles: tiles so long that a thread would be left with one while others have none are cut up.
int64_t make_items(Problem& p, int64_t threads) {
  auto cost = [&](const Tile& tile) { return (tile.last - tile.first) * (8 + tile.count * p.group); };
  int64_t total = 0, parts = 0, cut = 0;
  for (const Tile& tile : p.tiles) total += cost(tile);
  int64_t most = total < kAloneWork ? std::max<int64_t>(total, 1) : std::max<int64_t>(total / (4 * threads), 1);
  for (int64_t t = 0; t < static_cast<int64_t>(p.tiles.size()); ++t) {
    Tile& tile = p.tiles[t];
    int64_t from = tile.first_chunk(), chunks = tile.chunks();
    int64_t pieces = std::min(chunks, (cost(tile) + most - 1) / most);
    if (pieces > 1) {
      tile.parts = parts, tile.left = cut++;
      parts += chunks * p.part_size(tile.count * p.group);
    }
    for (int64_t i = 0; i < std::max<int64_t>(pieces, 1); ++i)
      p.items.push_back({t, from + chunks * i / std::max<int64_t>(pieces, 1),
                         from + chunks * (i + 1) / std::max<int64_t>(pieces, 1)});
  }
  p.left.reset(new std::atomic<int64_t>[cut]);
  for (const Tile& tile : p.tiles)
    if (tile.left >= 0) p.left[tile.left].store(tile.chunks(), std::memory_order_relaxed);
  p.parts = scratch<float>(3, parts);
  return total < kAloneWork ? 1 : threads;
}

// ---- The call

template <typename Element>
Piece runner_for(ffi::DataType stored) {
  if (stored == ffi::DataType::BF16) return run_item<Element, Stored::kHalf>;
  if (stored == ffi::DataType::S8) return run_item<Element, Stored::kInt8>;
  if (stored == ffi::DataType::F8E4M3FN) return run_item<Element, Stored::kFp8>;
  if constexpr (sizeof(Element) == 4) {
    if (stored == ffi::DataType::F32) return run_item<Element, Stored::kFloat>;
    if (stored == ffi::DataType::F16) return run_item<Element, Stored::kFloat16>;
  }
  return nullptr;
}

Piece runner_of(ffi::DataType queries, ffi::DataType stored) {
#ifdef QUIRE_AVX512
  if (queries == ffi::DataType::BF16)
    if (Piece run = runner_for<Half>(stored)) return run;
#endif
  if (queries == ffi::DataType::F32 || queries == ffi::DataType::BF16 || queries == ffi::DataType::F16)
    return runner_for<float>(stored);
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
  Piece run = runner_of(p.type, data.element_type());
  if (!run) return ffi::Error::InvalidArgument("no attention of these types");
  p.row_bytes = data.size_bytes() / std::max<int64_t>(data.element_count() / p.dims, 1);
  std::vector<uint8_t> nothing(p.dims * 4 + 64);
  p.nothing = nothing.data();
  int64_t sequences = std::min<int64_t>(std::max(count.typed_data()[0], 0), contexts.dimensions()[0]);
  int64_t live = std::min<int64_t>(std::max(starts.typed_data()[sequences], 0), tokens);
  size_t row_bytes = out->size_bytes() / std::max<int64_t>(tokens, 1);
  std::memset(p.out + live * row_bytes, 0, (tokens - live) * row_bytes);
  make_tiles(p, starts.typed_data(), contexts.typed_data(), sequences, live);
  int64_t threads = make_items(p, std::max<int64_t>(pool.num_threads(), 1));
  if (threads > 1)
    run_all(pool, &p, run, p.items.size());
  else
    for (size_t i = 0; i < p.items.size(); ++i) run(&p, i);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace quire

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_paged_attention, quire::attention,
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
