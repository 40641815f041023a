// What all native kernels share: memory of a worker, and threads.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

using i64 = int64_t;

namespace {

i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

class Memory {  // buffers of one worker; freed with it
  std::vector<void*> held;

 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory() { for (void* p : held) std::free(p); }
  template <class T> T* make(i64 n) {  // zeroed, aligned, and padded for the loads of whole vectors
    size_t bytes = round_up(n * sizeof(T), 64) + 64;
    void* p = std::aligned_alloc(64, bytes);
    if (!p) throw std::bad_alloc();
    held.push_back(p);
    return (T*)std::memset(p, 0, bytes);
  }
};

// While one lives, its thread takes numbers below 1e-38 for zero. Features and their gradients get
// there, and each operation on such a number would take a hundred times as long.
class TinyIsZero {
  const unsigned before = _mm_getcsr();

 public:
  TinyIsZero() { _mm_setcsr(before | 0x8040); }  // flush results, and read operands as zero
  ~TinyIsZero() { _mm_setcsr(before); }
};

// Run `work(next)` on threads of its own; each takes numbers below `tasks` from `next` until none
// is left. Returns whether memory ran out. Throws nothing: its callers are called from C.
template <class Work> bool in_parallel(i64 threads, i64 tasks, Work work) noexcept {
  std::atomic<i64> next{0};
  std::atomic<bool> failed{false};
  auto guarded = [&] {
    const TinyIsZero rule;
    try {
      work(next);
    } catch (...) {
      failed = true;
    }
  };
  std::vector<std::thread> others;
  try {
    others.reserve(std::max<i64>(0, std::min(threads, tasks) - 1));
    for (i64 i = 1; i < std::min(threads, tasks); ++i) others.emplace_back(guarded);
  } catch (...) {
  }  // no more threads to be had, or no memory for them: those there are do the work
  guarded();
  for (std::thread& other : others) other.join();
  return failed;
}

}  // namespace
