// The threads of XLA's own pool, and each one's memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace quire {

// A thread's own memory, kept for its next call: `count` of T, aligned to a cache line.
template <typename T>
T* scratch(int which, size_t count) {
  thread_local std::vector<float> memory[4];
  size_t wanted = count * sizeof(T) / sizeof(float) + 32;
  if (memory[which].size() < wanted) memory[which].resize(wanted);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory[which].data()) + 63) / 64 * 64);
}

using Piece = void (*)(const void* problem, int64_t index);

// Pieces are shared out in ranges, one for each thread, so that a thread reads on where it was: what is fetched ahead
// is its own. Who has done with a range goes on with the next one's rest. The caller takes pieces itself and waits only
// for those that others have begun, so that a pool whose threads are all busy, or wait in calls like this one, holds
// nothing up.
struct Work {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges;
  std::atomic<int64_t> takers{0}, done{0};
  int64_t count;
  const void* problem;  // as long as pieces are left
  Piece run;

  Work(const void* problem, Piece run, int64_t count, int64_t threads)
      : ranges(threads), count(count), problem(problem), run(run) {
    for (int64_t t = 0; t < threads; ++t)
      ranges[t].next.store(count * t / threads, std::memory_order_relaxed), ranges[t].end = count * (t + 1) / threads;
  }

  void take() {
    size_t own = takers.fetch_add(1, std::memory_order_relaxed);
    for (size_t t = 0; t < ranges.size(); ++t) {
      Range& range = ranges[(own + t) % ranges.size()];
      for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
        run(problem, i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  }
};

inline void run_all(xla::ffi::ThreadPool pool, const void* problem, Piece run, int64_t count) {
  int64_t threads = std::max<int64_t>(std::min<int64_t>(pool.num_threads(), count), 1);
  auto work = std::make_shared<Work>(problem, run, count, threads);
  for (int64_t i = 1; i < threads; ++i) pool.Schedule([work] { work->take(); });
  work->take();
  for (int spins = 0; work->done.load(std::memory_order_acquire) < count; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

// Outputs of a panel, which are shared out in pieces of one panel and one of `blocks` of rows: as many, in multiples of
// `step`, as leave no thread without work at the end, but for a twentieth of the time.
inline int64_t panel_of(int64_t outputs, int64_t blocks, int64_t threads, int64_t widest, int64_t step) {
  int64_t best = step;
  double best_use = 0;
  for (int64_t panel = widest; panel > 0; panel -= step) {
    int64_t pieces = (outputs + panel - 1) / panel * blocks, rounds = (pieces + threads - 1) / threads;
    double use = double(outputs * blocks) / double(rounds * threads * panel);
    if (use > best_use + 0.05) best = panel, best_use = use;
  }
  return best;
}

}  // namespace quire
