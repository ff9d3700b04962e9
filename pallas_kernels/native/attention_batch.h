// A ragged batch cut into tiles, what threads take of it, and the order in which they read its keys and values.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention_math.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace quire::paged {

namespace ffi = xla::ffi;

constexpr int64_t kTileRows = 96;        // rows, tokens times query heads, that share a reading of keys
constexpr int64_t kAheadBlocks = 2;      // blocks that are fetched ahead of the one that is read
constexpr int64_t kAloneWork = 1 << 13;  // by `cost`: what is not worth waking another thread for

using ReadBlock = void (*)(const uint8_t* const* rows, const uint8_t* const* ahead, int64_t dims, float* out);

struct Tile {
  int64_t sequence, head, row, count;  // the kv head; the first token row, and how many
  int64_t position;                    // of the first row in its sequence
  int64_t first, last;                 // keys that any row sees
  int64_t parts = -1, left = -1;       // where its chunks' results wait, and their count does; -1 = joined at once
  int64_t first_chunk() const { return first / kChunkKeys; }
  int64_t chunks() const { return first < last ? (last + kChunkKeys - 1) / kChunkKeys - first_chunk() : 0; }
};

struct Item {  // some chunks of a tile
  int64_t tile, from, until;
};

struct Problem {  // `group`: query heads of a kv head; `row_bytes`: of one head's stored key
  int64_t heads, kv_heads, group, dims, page_size, pages, table_width, row_bytes, threads;
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
  ReadBlock read_keys, read_values;
  std::vector<Tile> tiles;
  std::vector<Item> items;
  std::unique_ptr<std::atomic<int64_t>[]> left;
  float* parts;  // of a chunk: top and sum of each row, then their values

  // The number of a row of stored numbers; tables are not trusted.
  int64_t row_of(const int32_t* table, int64_t page, int which, int64_t head, int64_t offset) const {
    int64_t id = page < table_width ? std::min<int64_t>(std::max(table[page], 0), pages - 1) : 0;
    return ((id * 2 + which) * kv_heads + head) * page_size + offset;
  }
  int64_t part_size(int64_t rows) const { return up_to(2 * rows, kLanes) + rows * width_of(dims); }
};

// Cuts the batch into tiles, the last rows of a sequence first: they see most.
inline void make_tiles(Problem& p, const int32_t* starts, const int32_t* contexts, int64_t sequences, int64_t tokens) {
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
inline void make_items(Problem& p) {
  auto cost = [&](const Tile& tile) { return (tile.last - tile.first) * (8 + tile.count * p.group); };
  int64_t total = 0, parts = 0, cut = 0;
  for (const Tile& tile : p.tiles) total += cost(tile);
  if (total < kAloneWork) p.threads = 1;
  int64_t most = total < kAloneWork ? std::max<int64_t>(total, 1) : std::max<int64_t>(total / (4 * p.threads), 1);
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
}

// Blocks of a chunk that hold keys which a tile's rows see, relative to the chunk.
struct Range {
  int64_t base, from, until;
  Range(const Tile& tile, int64_t chunk)
      : base(chunk * kChunkKeys),
        from(std::max<int64_t>(tile.first - base, 0) / kBlock * kBlock),
        until(std::min(tile.last - base, kChunkKeys)) {}
};

// Where a block's keys (`which` 0) or values (1) lie; those that no row sees are zeros.
inline void locate(const Problem& p, const Tile& tile, int64_t key, int which, const uint8_t** rows) {
  const int32_t* table = p.tables + tile.sequence * p.table_width;
  int64_t page = key / p.page_size, offset = key % p.page_size, run;
  for (int64_t i = 0; i < kBlock; i += run, offset = 0, ++page) {
    run = std::min(p.page_size - offset, kBlock - i);
    const uint8_t* row = p.data + p.row_of(table, page, which, tile.head, offset) * p.row_bytes;
    int64_t first = tile.first - key - i, last = tile.last - key - i;
    for (int64_t j = 0; j < run; ++j) rows[i + j] = j >= first && j < last ? row + j * p.row_bytes : p.nothing;
  }
}

// The order in which an item's blocks are read: a chunk's keys, its values, the next chunk's; and a few blocks of the
// item that this thread probably takes next.
class Course {
 public:
  Course(const Problem& p, int64_t index) : p_(p) {
    enter(index);
    for (int64_t i = 0; i < kAheadBlocks; ++i) {
      const uint8_t** rows = find();
      for (int64_t j = 0; j < kBlock; ++j) fetch_row(rows[j], p.row_bytes);
    }
  }
  const uint8_t* const* next() { return ring_[taken_++ % kRing]; }
  const uint8_t* const* ahead() { return find(); }  // before `next`

 private:
  static constexpr int64_t kRing = kAheadBlocks + 1;

  void enter(int64_t index) {
    index_ = index;
    if (index < static_cast<int64_t>(p_.items.size())) chunk_ = p_.items[index].from, which_ = 0, block_ = -1;
  }
  const uint8_t** find() {
    const uint8_t** rows = ring_[found_++ % kRing];
    int64_t items = p_.items.size();
    while (index_ < items && chunk_ == p_.items[index_].until) enter(index_ + p_.threads);
    if (index_ >= items) {
      std::fill_n(rows, kBlock, p_.nothing);
      return rows;
    }
    const Tile& tile = p_.tiles[p_.items[index_].tile];
    Range range(tile, chunk_);
    if (block_ < 0) block_ = range.from;
    locate(p_, tile, range.base + block_, which_, rows);
    block_ += kBlock;
    if (block_ >= range.until) block_ = -1, chunk_ += which_, which_ ^= 1;
    return rows;
  }

  const Problem& p_;
  int64_t index_, chunk_ = 0, block_ = -1, found_ = 0, taken_ = 0;
  int which_ = 0;
  const uint8_t* ring_[kRing][kBlock];
};

}  // namespace quire::paged
