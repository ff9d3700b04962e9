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

// Whoever comes takes the next piece. The caller takes pieces itself and waits only for those that others have begun,
// so that a pool whose threads are all busy, or wait in calls like this one, holds nothing up.
struct Work {
  std::atomic<int64_t> next{0}, done{0};
  int64_t count;
  const void* problem;  // as long as pieces are left
  Piece run;

  void take() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      run(problem, i);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

inline void run_all(xla::ffi::ThreadPool pool, const void* problem, Piece run, int64_t count) {
  auto work = std::make_shared<Work>();
  work->count = count, work->problem = problem, work->run = run;
  int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->take(); });
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
