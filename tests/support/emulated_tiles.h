// AMX tiles in memory, so that the build for AMX runs on CPUs that have none.
//
// Compiled in by `-include`, before the kernels, in place of -mamx-tile and -mamx-bf16. Semantics
// are those of the Intel manual (LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS); what would raise an
// exception of the processor there ends the process here.
#pragma once
#include <immintrin.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
  int rows = 0, bytes = 0;  // none: not configured, or released
  alignas(64) uint8_t data[16][64];
};
inline thread_local Tile tiles[8];

inline Tile& configured(int number) {
  if (!tiles[number].rows) std::abort();
  return tiles[number];
}

inline void zero(int number) {
  Tile& tile = configured(number);
  std::memset(tile.data, 0, sizeof tile.data);
}

inline void configure(const void* from) {
  const auto* config = (const uint8_t*)from;
  if (config[0] != 1) std::abort();  // the palette
  for (int i = 0; i < 8; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * i, 2);
    tiles[i].bytes = bytes, tiles[i].rows = config[48 + i];
    if (bytes > 64 || tiles[i].rows > 16) std::abort();
    if (tiles[i].rows) zero(i);
  }
}

inline void release() {
  for (Tile& tile : tiles) tile.rows = tile.bytes = 0;
}

inline void load(int number, const void* from, int64_t stride) {
  zero(number);
  Tile& tile = configured(number);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(tile.data[r], (const uint8_t*)from + r * stride, tile.bytes);
}

inline void store(int number, void* to, int64_t stride) {
  const Tile& tile = configured(number);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy((uint8_t*)to + r * stride, tile.data[r], tile.bytes);
}

// Sums of even and of odd elements begin at zero, are added, and then added to what was there.
// Rounds to nearest even and takes numbers below 1e-38 for zero, whatever the thread's rule is.
inline void multiply(int sum, int left, int right) {
  Tile &c = configured(sum), &a = configured(left), &b = configured(right);
  if (c.rows != a.rows || c.bytes != b.bytes || a.bytes != b.rows * 4) std::abort();
  const unsigned rule = _mm_getcsr();
  _mm_setcsr(0x9fc0);
  const __m512i high = _mm512_set1_epi32(0xffff0000);
  auto even = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
  auto odd = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, high)); };
  for (int r = 0; r < c.rows; ++r) {
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int k = 0; k < b.rows; ++k) {
      int32_t pair;
      std::memcpy(&pair, a.data[r] + 4 * k, 4);
      const __m512i x = _mm512_set1_epi32(pair), y = _mm512_load_si512(b.data[k]);
      sums[0] = _mm512_fmadd_ps(even(x), even(y), sums[0]);
      sums[1] = _mm512_fmadd_ps(odd(x), odd(y), sums[1]);
    }
    const __m512 before = _mm512_load_ps((const float*)c.data[r]);
    _mm512_store_ps((float*)c.data[r], _mm512_add_ps(before, _mm512_add_ps(sums[0], sums[1])));
  }
  _mm_setcsr(rule);
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::configure
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply
#define syscall(...) 0  // the system grants the tiles
