// How the threads of a call share its work. A phase's work is cut into pieces, and whoever runs takes the next piece:
// nobody waits for a thread that does not run. A phase is over when all its pieces are done.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstddef>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kernels {

// One phase of a call. Its two counters lie in cache lines of their own.
class Phase {
 public:
  // Runs `work(first, last)` for pieces of at most `size` of `items` items, until none is left to take; waits for the
  // pieces of other threads unless this is the `last` phase.
  template <class Work>
  void Run(size_t items, size_t size, const Work& work, bool last = false) {
    const size_t pieces = (items + size - 1) / size;
    for (size_t piece; (piece = next_.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      const size_t first = piece * size;
      work(first, first + size < items ? first + size : items);
      done_.fetch_add(1, std::memory_order_release);
    }
    if (!last) Wait(pieces);
  }

 private:
  void Wait(size_t pieces) const {
    for (size_t turn = 0; done_.load(std::memory_order_acquire) < pieces; ++turn) {
      if (turn > kSpins) {
        sched_yield();
      } else {
#if defined(__x86_64__)
        _mm_pause();
#endif
      }
    }
  }

  static constexpr size_t kSpins = 4000;

  alignas(64) std::atomic<size_t> next_{0};
  alignas(64) std::atomic<size_t> done_{0};
};

}  // namespace kernels
