// New keys and values into their pages, in place, as a custom call of XLA on a CPU.
#include <algorithm>
#include <cstring>

#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace quire {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kAloneBytes = 1 << 16;  // that are not worth waking another thread

struct Problem {
  uint8_t* pages;              // [N, 2, K, P, D]
  const uint8_t* from[2];      // keys and values, [T, K, D]
  const int32_t* slots;        // [T]
  int64_t rows, heads, page_size, pages_bound, row_bytes;
};

// One head's keys, or its values: rows of padding, which share slots, are never written by two threads.
void write_head(const void* problem, int64_t index) {
  const Problem& p = *static_cast<const Problem*>(problem);
  int64_t which = index / p.heads, head = index % p.heads;
  for (int64_t t = 0; t < p.rows; ++t) {
    int64_t slot = std::min<int64_t>(std::max(p.slots[t], 0), p.pages_bound - 1);
    int64_t page = slot / p.page_size, offset = slot % p.page_size;
    std::memcpy(p.pages + (((page * 2 + which) * p.heads + head) * p.page_size + offset) * p.row_bytes,
                p.from[which] + (t * p.heads + head) * p.row_bytes, p.row_bytes);
  }
}

ffi::Error kv_write(ffi::ThreadPool pool, ffi::AnyBuffer pages, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                    ffi::Buffer<ffi::S32> slots, ffi::Result<ffi::AnyBuffer> out) {
  if (out->untyped_data() != pages.untyped_data()) return ffi::Error::InvalidArgument("pages are not written in place");
  auto shape = pages.dimensions();
  Problem p;
  p.pages = static_cast<uint8_t*>(out->untyped_data());
  p.from[0] = static_cast<const uint8_t*>(keys.untyped_data());
  p.from[1] = static_cast<const uint8_t*>(values.untyped_data());
  p.slots = slots.typed_data(), p.rows = slots.dimensions()[0];
  p.heads = shape[2], p.page_size = shape[3], p.pages_bound = shape[0] * shape[3];
  p.row_bytes = pages.size_bytes() / std::max<int64_t>(pages.element_count(), 1) * shape[4];
  if (p.rows * p.heads * p.row_bytes < kAloneBytes)
    for (int64_t i = 0; i < 2 * p.heads; ++i) write_head(&p, i);
  else
    run_all(pool, &p, write_head, 2 * p.heads);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace quire

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_kv_write, quire::kv_write,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>());
