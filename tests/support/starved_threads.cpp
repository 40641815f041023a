// Runs `in_parallel` where the n-th allocation of its thread fails, for n from 0 up to one that it
// does not reach: all tasks must be done, or `failed` said, and nothing thrown.
#include <cstdio>

#include "native_threads.h"

thread_local int left = -1;  // allocations until one fails; below zero, none does

void* operator new(size_t size) {
  if (left >= 0 && left-- == 0) throw std::bad_alloc();
  return std::malloc(size);
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }

int main() {
  for (int n = 0, reached = 1; reached; ++n) {
    std::atomic<i64> done{0};
    left = n;
    const bool failed = in_parallel(4, 100, [&](std::atomic<i64>& next) {
      while (next++ < 100) ++done;
    });
    reached = left < 0;
    left = -1;
    if (failed || done != 100) return 1;
    std::printf("%d\n", n);
  }
  // Whatever a task throws ends in a word.
  return !in_parallel(2, 2, [](std::atomic<i64>&) { throw 1; });
}
